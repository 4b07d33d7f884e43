"""schemathesis: thousands of requests made from our OpenAPI document, sound and unsound ones; none may get a 5xx or a 422, and
what is refused is refused in OpenAI's shape."""

import itertools
import json

import hypothesis
import pytest

from tests.servers import serving

pytestmark = pytest.mark.slow
schemathesis = pytest.importorskip("schemathesis", reason="a client of the extra llama_tp[clients]: make test-clients")
# Cases a route: in all over 2,000. A GET without parameters has one sound case, and some unsound ones.
N_CASES = {"/v1/chat/completions": 700, "/v1/completions": 700, "/tokenize": 300, "/detokenize": 300, "/v1/models/{name}": 60}
ERROR = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def server():
    with serving("--nproc_per_node", "2", "--max_seq_len", "128", "--max_n", "4") as one:
        yield one
        assert "Traceback" not in one.stderr and one.end() == 0, one.stderr


@pytest.fixture(scope="module")
def operations(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return {(found.ok().method.upper(), found.ok().path): found.ok() for found in schema.get_all_operations()}


def is_right(case, reply) -> None:
    """Holds a reply against what we promise of all replies."""
    said = f"{case.method} {case.formatted_path} {str(case.body)[:500]} -> {reply.status_code} {reply.text[:500]}"
    assert reply.status_code < 500 and reply.status_code != 422, said
    [kind] = reply.headers["content-type"]
    if reply.status_code >= 400:
        error = json.loads(reply.text)["error"]
        assert set(error) == ERROR and isinstance(error["message"], str) and isinstance(error["code"], str | None), said
    elif kind.startswith("text/event-stream"):
        assert reply.text.endswith("data: [DONE]\n\n") and '"error"' not in reply.text.partition("\n")[0], said
    elif kind.startswith("application/json"):
        json.loads(reply.text)


def test_no_case_out_of_thousands_is_a_5xx(operations, server):
    assert {path for _, path in operations} >= set(N_CASES)
    counts = dict.fromkeys(itertools.product(operations, ("sound", "unsound")), 0)
    statuses: dict[int, int] = {}
    for key, operation in operations.items():
        for kind, mode in (("sound", schemathesis.GenerationMode.POSITIVE), ("unsound", schemathesis.GenerationMode.NEGATIVE)):
            most = N_CASES.get(key[1], 10) if kind == "sound" else N_CASES.get(key[1], 10) // 2
            try:
                strategy = operation.as_strategy(generation_mode=mode)

                @hypothesis.settings(max_examples=most, deadline=None, database=None, derandomize=True,
                                     suppress_health_check=list(hypothesis.HealthCheck))
                @hypothesis.given(case=strategy)
                def look(case):
                    reply = case.call(timeout=60)
                    counts[key, kind] += 1
                    statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
                    is_right(case, reply)
                look()
            except hypothesis.errors.Unsatisfiable:                 # nothing unsound to send where there is nothing to send
                assert kind == "unsound"
    print(f"{sum(counts.values())} cases, statuses {dict(sorted(statuses.items()))}")
    assert sum(counts.values()) >= 2000 and statuses[200] > 100 and statuses[400] > 500, (counts, statuses)
    assert server.get("/health")[0] == 200
