"""Hostile forms over HTTP: 400 by name, soon, while everybody else is served."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama_tp.server.app import MAX_TRIALS
from tests.servers import pretending

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'llama_tp[serve]'")

STOPPER = "(a?){30000}a{30000}"
BODY = {"prompt": "x", "max_tokens": 3}


def schema(inner: dict) -> dict:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": inner}}
    }


def slow(i: int) -> dict:
    """Gets past the check of its size, and takes long to compile."""
    return schema(
        {"type": "string", "allOf": [{"pattern": f"{'b' * i}a{{{k}}}"} for k in range(1, 250)]}
    )


@pytest.fixture(scope="module")
def server():
    with pretending("live") as one:
        # its processes have started
        assert one.post("/v1/completions", BODY | {"regex": "[0-9]+"})[0] == 200
        yield one  # and end with it: `end` looks for what is left
        assert "Traceback" not in one.stderr and one.end() == 0, one.stderr


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"regex": STOPPER}, "regex"),
        ({"regex": "(a?){3000}a{3000}"}, "regex"),
        ({"regex": "a{1000000}"}, "regex"),
        (schema({"type": "string", "pattern": STOPPER}), "response_format"),
        ({"structured_outputs": {"regex": STOPPER}}, "structured_outputs"),
        (schema({"patternProperties": {STOPPER: {}}}), "response_format"),
        ({"grammar": f"start: /{STOPPER}/"}, "grammar"),
        ({"grammar": 'start: ("a"?){30000} "a"{30000}'}, "grammar"),
        ({"regex": ".*" * 3000}, "regex"),
        ({"regex": ""}, "regex"),
    ],
)
def test_a_form_that_is_too_much_is_400_by_name_and_soon(fields, param, server):
    started = time.monotonic()
    status, body = server.post("/v1/completions", BODY | fields)
    assert (
        status == 400
        and body["error"]["param"] == param
        and body["error"]["code"] == "invalid_value"
    ), body
    # a tenth of a second on an idle machine; minutes without the check
    assert time.monotonic() - started < 10
    assert server.get("/health")[0] == 200


def test_honest_requests_are_served_beside_many_slow_forms(server):
    """As many as may wait: none of them gets past, and nobody else waits for the last of them."""
    with ThreadPoolExecutor(MAX_TRIALS + 20) as threads:
        hostile = [
            threads.submit(server.post, "/v1/completions", BODY | slow(i))
            for i in range(MAX_TRIALS + 10)
        ]
        n_honest = n_refused = 0
        while not all(each.done() for each in hostile):
            assert server.get("/health")[0] == 200
            status, body = server.post("/v1/completions", BODY)
            assert status == 200
            # known to be good
            status, body = server.post("/v1/completions", BODY | {"regex": "[0-9]+"})
            assert status == 200
            status, body = server.post(
                "/v1/completions", BODY | {"regex": f"[0-9]{{{n_honest + 1}}}"}
            )
            assert status in (200, 429), body
            n_honest += status == 200
            n_refused += status == 429
    statuses = [each.result()[0] for each in hostile]
    assert set(statuses) == {400, 429} and n_honest
    for status, body in (each.result() for each in hostile):
        assert ("takes too much" if status == 400 else "ask again a little later") in body["error"][
            "message"
        ]
    assert server.post("/v1/completions", BODY | {"regex": "[a-c]+"})[0] == 200
