"""The driver's loop behind a server, with a real engine and a link made of lists."""

import json

import pytest
import torch

from llama_tp.engine.request import Request
from llama_tp.engine.service import serve
from llama_tp.parallel.groups import single_rank
from llama_tp.sampling.params import SamplingParams
from tests.engines import engine
from tests.shapes import SHRUNK

TINY = SHRUNK["8b"]


class Script:
    """A link: before step n come the messages script[n]; it closes when the script is over and
    nothing is left to do."""

    def __init__(self, script: dict, one):
        self.script, self.engine, self.n, self.sent = dict(script), one, 0, []

    def take(self, wait: bool):
        messages = self.script.pop(self.n, [])
        self.n += 1
        if wait and not messages:
            if not self.script:
                return None
            return self.take(wait)
        return json.loads(json.dumps(messages))

    def send(self, message):
        self.sent.append(json.loads(json.dumps(message, allow_nan=False)))


def submit(name, ids=(1, 2, 3), outputs=(), **params):
    params = SamplingParams(**{"seed": 1, "max_tokens": 6, **params})
    return {
        "do": "submit",
        "id": name,
        "prompt": ids,
        "outputs": outputs,
        "params": {field: getattr(params, field) for field in params.__dataclass_fields__},
    }


def run(script, **options):
    one = engine(single_rank(), TINY, deterministic=True, **options)
    link = Script(script, one)
    serve(one, link)
    assert one.scheduler.n_free_blocks == one.scheduler.blocks.n_blocks
    return one, link.sent


def deltas(sent, name):
    return [
        delta
        for message in sent
        if message["is"] == "step"
        for delta in message["deltas"]
        if delta["id"] == name
    ]


def test_requests_are_served_with_the_engine_s_own_tokens():
    one, sent = run(
        {
            0: [submit("a", logit_bias={7: 2.5}, n=2)],
            2: [submit("b", (5, 6), stop=("x",), logprobs=1)],
        }
    )
    assert (
        sent[0]["is"] == "ready"
        and sent[0]["n_vocab"] == TINY.vocab_size
        and sent[0]["deterministic"] is True
    )
    other = engine(single_rank(), TINY, deterministic=True)
    other.submit(
        Request("a", [1, 2, 3], SamplingParams(seed=1, max_tokens=6, logit_bias={7: 2.5}, n=2))
    )
    alone = []
    while other.has_work:
        alone += other.step()
    for index in (0, 1):
        ids = sum((d["ids"] for d in deltas(sent, "a") if d["index"] == index), [])
        assert ids == [i for d in alone if d.index == index for i in d.ids] and len(ids) == 6
    assert deltas(sent, "b")[-1]["finish_reason"] == "length"
    token, logprob, top = deltas(sent, "b")[0]["logprobs"][0]
    assert [token] == deltas(sent, "b")[0]["ids"] and logprob < 0 and len(top) == 1
    assert (
        sent[-1]["stats"]["n_running"] == 0
        and sent[-1]["stats"]["n_steps"] == one.scheduler.n_steps
    )


def test_an_abort_frees_before_the_next_step():
    _, sent = run(
        {
            0: [submit("a", max_tokens=500), submit("b", max_tokens=20)],
            4: [{"do": "abort", "id": "a"}],
        }
    )
    assert [m["begun"] for m in sent if m["is"] == "step"] == [["a", "b"], *[[]] * 19]
    reasons = [delta["finish_reason"] for delta in deltas(sent, "a")]
    assert reasons == [None] * 4 + ["abort"]
    with_abort = next(
        m
        for m in sent
        if m["is"] == "step" and any(d["finish_reason"] == "abort" for d in m["deltas"])
    )
    assert with_abort["stats"]["n_running"] == 1
    assert len(deltas(sent, "b")) == 20


def test_a_refused_request_harms_nobody():
    _, sent = run(
        {
            0: [submit("a"), submit("bad", (TINY.vocab_size,)), submit("a")],
            1: [{"do": "abort", "id": "never seen"}],
        }
    )
    refused = {
        name: error for m in sent if m["is"] == "step" for name, error in m["refused"].items()
    }
    assert "outside the vocabulary" in refused["bad"][0] and "its own" in refused["a"][0]
    assert deltas(sent, "a")[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("n_prompt", [1, 2, 700])
def test_scores_of_a_prompt_come_in_pieces_before_the_first_delta(n_prompt):
    _, sent = run({0: [submit("a", [i % 200 for i in range(n_prompt)], prompt_logprobs=1)]})
    kinds = [message["is"] for message in sent]
    scores = [score for message in sent if message["is"] == "scores" for score in message["scores"]]
    assert len(scores) == (n_prompt if n_prompt > 1 else 0)
    if scores:
        assert scores[0] is None and scores[1][0] == 1 and scores[1][1] <= 0
        assert kinds[1:].index("scores") < len(kinds) - 2
        assert max(len(m["scores"]) for m in sent if m["is"] == "scores") <= 512


def test_scores_that_are_no_numbers_can_be_sent():
    one = engine(single_rank(), TINY)
    with torch.no_grad():
        one.worker.model.norm.weight.fill_(float("nan"))
    link = Script({0: [submit("a", prompt_logprobs=1)]}, one)
    serve(one, link)
    assert "not finite" in deltas(link.sent, "a")[-1]["error"]


def test_an_interrupted_request_goes_on():
    _, whole = run({0: [submit("a", temperature=1.0)]})
    ids = sum((d["ids"] for d in deltas(whole, "a")), [])
    _, rest = run({0: [submit("a", temperature=1.0, outputs=[ids[:2]])]})
    assert sum((d["ids"] for d in deltas(rest, "a")), []) == ids[2:]
