"""schemathesis: thousands of requests made from our OpenAPI document, sound and unsound ones; none
may get a 5xx or a 422, and what is refused is refused in OpenAI's shape."""

import collections
import contextlib
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.servers import serving

pytestmark = pytest.mark.slow
schemathesis = pytest.importorskip(
    "schemathesis", reason="a client of the extra llama_tp[clients]: make test-clients"
)
# Cases a route: in all over 2,000. A GET without parameters has one sound case, and some unsound
# ones.
N_CASES = {
    "/v1/chat/completions": 500,
    "/v1/completions": 500,
    "/tokenize": 150,
    "/detokenize": 150,
    "/v1/models/{name}": 60,
}
# What is right by itself: most of what a schema allows is refused for one field or another, and
# gets no further.
RIGHT = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "O", "max_tokens": 4},
    "/tokenize": {"prompt": "O"},
    "/detokenize": {"tokens": [5]},
}
KINDS = {
    "sound": schemathesis.GenerationMode.POSITIVE,
    "near": schemathesis.GenerationMode.POSITIVE,
    "unsound": schemathesis.GenerationMode.NEGATIVE,
}
ERROR = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def server():
    with serving("--nproc_per_node", "2", "--max_seq_len", "128", "--max_n", "4") as one:
        yield one
        assert "Traceback" not in one.stderr and one.end() == 0, one.stderr


@pytest.fixture(scope="module")
def operations(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return {
        (found.ok().method.upper(), found.ok().path): found.ok()
        for found in schema.get_all_operations()
    }


def is_right(case, reply) -> None:
    """Holds a reply against what we promise of all replies."""
    asked = f"{case.method} {case.formatted_path} {str(case.body)[:500]}"
    said = f"{asked} -> {reply.status_code} {reply.text[:500]}"
    assert reply.status_code < 500 and reply.status_code != 422, said
    [kind] = reply.headers["content-type"]
    if reply.status_code >= 400:
        error = json.loads(reply.text)["error"]
        assert (
            set(error) == ERROR
            and isinstance(error["message"], str)
            and isinstance(error["code"], str | None)
        ), said
    elif kind.startswith("text/event-stream"):
        assert (
            reply.text.endswith("data: [DONE]\n\n")
            and '"error"' not in reply.text.partition("\n")[0]
        ), said
    elif kind.startswith("application/json"):
        json.loads(reply.text)


def look_at(operation, kind: str, most: int, statuses: collections.Counter) -> None:
    """Sends up to `most` cases: sound ones, unsound ones, or right ones with one field or two of a
    sound one ("near")."""
    names = st.lists(
        st.sampled_from(
            sorted(operation.body[0].definition["schema"]["properties"]) if operation.body else [""]
        ),
        min_size=1,
        max_size=2,
        unique=True,
    )

    @hypothesis.settings(
        max_examples=most,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=KINDS[kind]), chosen=names)
    def look(case, chosen):
        if kind == "near":
            case.body = RIGHT[operation.path] | {
                name: case.body[name] for name in chosen if name in case.body
            }
        reply = case.call(timeout=60)
        statuses[kind, reply.status_code] += 1
        is_right(case, reply)

    # a GET without parameters: nothing unsound to send
    with contextlib.suppress(hypothesis.errors.Unsatisfiable):
        look()


def test_no_case_out_of_thousands_is_a_5xx(operations, server):
    assert {path for _, path in operations} >= set(N_CASES)
    statuses = collections.Counter()
    for (_, path), operation in operations.items():
        for kind in KINDS if path in RIGHT else ("sound", "unsound"):
            look_at(operation, kind, N_CASES.get(path, 10), statuses)
    print(f"{statuses.total()} cases: {dict(sorted(statuses.items()))}")
    assert (
        statuses.total() >= 2000 and statuses["near", 200] > 200 and statuses["unsound", 400] > 500
    )
    assert server.get("/health")[0] == 200 and not server.failures()
