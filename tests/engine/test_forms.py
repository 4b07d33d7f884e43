"""Structured output through the engine: masks made on the driver, applied on the vocabulary's shards, at every tp."""

import json
import re

import pytest
import torch

from llama_tp.engine.request import Request, SamplingParams
from llama_tp.engine.runner import Runner
from llama_tp.engine.sampler import allowed
from llama_tp.parallel.groups import single_rank
from llama_tp.spec.errors import UserError
from llama_tp.text.grammar import Form, json_schema, lark, regex
from llama_tp.text.token_table import Tokenizer
from tests.engines import engine, serve
from tests.ranks import run
from tests.shapes import SHRUNK

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'llama_tp[serve]'")

END = 256


def letters(text: str) -> list[int]:
    return list(text.encode())


# A byte a token, one that ends, and three without text: 260 ids, those of the shrunk 8B.
LETTERS = Tokenizer([bytes([i]) for i in range(256)] + [b""] * 4, {"<|end|>": END}, None, (END,), letters)
SCHEMA = json_schema({"type": "object", "properties": {"ok": {"type": "boolean"}, "how": {"enum": ["well", "badly", "not"]}},
                      "required": ["ok", "how"], "additionalProperties": False})
CODE = regex("[a-f]{3,8}-[0-9]{2}")
PROMPT = [7, 200, 31, 4, 90]
WAYS = {"greedy": {"temperature": 0.0}, "filtered": {"temperature": 1.2, "top_k": 30, "seed": 3},
        "undecided": {"temperature": 5.0, "top_p": 0.99, "seed": 4}, "gathered": {"temperature": 1.0, "logprobs": 2, "seed": 5}}
REQUESTS = [(f"{name}-{kind}", PROMPT, {**params, "form": form, "n": 2, "max_tokens": 90}) for name, params in WAYS.items()
            for kind, form in (("json", SCHEMA), ("code", CODE))] + [("free", PROMPT, {"temperature": 0.0, "max_tokens": 12})]


def served(tp: int, requests, **options) -> dict:
    """{(id, sample): (ids, text, finish reason)}."""
    _, _, deltas = run(tp, serve, requests, config=SHRUNK["8b"], tokenizer=LETTERS, runner=Runner, **options)[0]
    out: dict = {}
    for delta in deltas:
        ids, text, _ = out.get((delta.request_id, delta.index), ([], "", None))
        out[delta.request_id, delta.index] = ids + list(delta.ids), text + delta.text, delta.finish_reason
    return out


@pytest.fixture(scope="module")
def alone() -> dict:
    return {key: value for request in REQUESTS for key, value in served(1, [request]).items()}


def test_every_way_of_sampling_keeps_the_form(alone):
    for (name, _), (_, text, reason) in alone.items():
        assert reason == ("length" if name == "free" else "stop"), (name, text)
        if name.endswith("json"):
            assert set(json.loads(text)) == {"ok", "how"}
        elif name.endswith("code"):
            assert re.fullmatch("[a-f]{3,8}-[0-9]{2}", text)
    assert len({text for (name, _), (_, text, _) in alone.items() if name.endswith("code")}) > 4      # and is free within it


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "ahead"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_same_at_every_tp_and_in_company(alone, tp, graphs):
    assert served(tp, REQUESTS, graphs=graphs, n_blocks=24, max_rows=6) == alone


def test_it_goes_on_from_half_a_form():
    whole, text, _ = served(1, [REQUESTS[0]])["greedy-json", 0]
    one = engine(single_rank(), SHRUNK["8b"], tokenizer=LETTERS, runner=Runner)
    params = SamplingParams(temperature=0, form=SCHEMA, n=2, max_tokens=90)
    one.submit(Request("r", PROMPT, params, (tuple(whole[:9]), None)))
    deltas = []
    while one.has_work:
        deltas += one.step()
    assert [i for delta in deltas for i in delta.ids] == whole[9:]


def test_what_cannot_be_followed_is_refused_and_queues_nothing():
    one = engine(single_rank(), SHRUNK["8b"], tokenizer=LETTERS, runner=Runner)
    for form in (Form("json", '{"type": 5}'), Form("regex", "(")):
        with pytest.raises(UserError):
            one.submit(Request("r", PROMPT, SamplingParams(form=form)))
    assert not one.has_work and one.scheduler.n_waiting == 0 and one.scheduler.n_driven == 0
    for params in ({"form": "json"}, {"form": SCHEMA, "min_tokens": 3}, {"form": SCHEMA, "ignore_eos": True}):
        with pytest.raises(UserError):
            SamplingParams(**params)


def test_a_form_that_breaks_ends_its_own_sample_alone(monkeypatch):
    one = engine(single_rank(), SHRUNK["8b"], tokenizer=LETTERS, runner=Runner)
    one.submit(Request("bad", PROMPT, SamplingParams(temperature=0, form=lark('start: "abc" "def"'), max_tokens=20)))
    one.submit(Request("good", PROMPT, SamplingParams(temperature=0, max_tokens=6)))
    deltas = one.step()
    [track] = [track for sequence, track in one._tracks.items() if sequence.request.id == "bad"]

    def too_much():
        raise UserError("the form of the answer cannot be kept", "too much work", "make it simpler")
    monkeypatch.setattr(track.constraint, "mask", too_much)
    while one.has_work:
        deltas += one.step()
    ends = {delta.request_id: (delta.finish_reason, delta.error) for delta in deltas if delta.finish_reason}
    assert ends["good"] == ("length", None) and ends["bad"][0] == "abort" and "too much work" in ends["bad"][1]
    assert one.scheduler.n_driven == 0 and one.scheduler.n_free_blocks == one.scheduler.blocks.n_blocks


def test_bits_are_read_as_they_were_written():
    words = torch.tensor([[5, 1 << 30, -(1 << 31)], [0, 0, 1]], dtype=torch.int32)
    all_of_them = allowed(words, 0, 100)
    assert all_of_them.nonzero().tolist() == [[0, 0], [0, 2], [0, 62], [0, 95], [1, 64]]
    assert torch.equal(allowed(words, 50, 30), all_of_them[:, 50:80])
