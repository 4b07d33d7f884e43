"""Structured output through the engine: masks made on the driver, applied on the vocabulary's
shards, at every tp."""

import json
import os
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from llama_tp.arch.errors import UserError
from llama_tp.engine.masks import Masks
from llama_tp.engine.request import Request, SamplingParams
from llama_tp.engine.runner import Runner
from llama_tp.engine.sampler import allowed
from llama_tp.parallel.groups import single_rank
from llama_tp.text.grammar import Form, json_schema, lark, regex
from llama_tp.text.grammar_pool import GrammarPool
from llama_tp.text.tokenizer import open_tokenizer
from tests.engines import engine, letters, serve
from tests.ranks import children, is_alive, run
from tests.shapes import SHRUNK

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'llama_tp[serve]'")

FOLDER = tempfile.TemporaryDirectory(prefix="llama_tp-letters-")
LETTERS = letters(Path(FOLDER.name))  # 260 ids, those of the shrunk 8B
SCHEMA = json_schema(
    {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "how": {"enum": ["well", "badly", "not"]}},
        "required": ["ok", "how"],
        "additionalProperties": False,
    }
)
CODE = regex("[a-f]{3,8}-[0-9]{2}")
PROMPT = [7, 200, 31, 4, 90]
WAYS = {
    "greedy": {"temperature": 0.0},
    "filtered": {"temperature": 1.2, "top_k": 30, "seed": 3},
    "undecided": {"temperature": 5.0, "top_p": 0.99, "seed": 4},
    "gathered": {"temperature": 1.0, "logprobs": 2, "seed": 5},
}
REQUESTS = [
    (f"{name}-{kind}", PROMPT, {**params, "form": form, "n": 2, "max_tokens": 90})
    for name, params in WAYS.items()
    for kind, form in (("json", SCHEMA), ("code", CODE))
] + [("free", PROMPT, {"temperature": 0.0, "max_tokens": 12})]


def lettered(ranks, folder, requests, **options):
    """`serve` with the tokenizer in `folder`: one that has been sent between processes is not the
    same."""
    return serve(
        ranks,
        requests,
        config=SHRUNK["8b"],
        tokenizer=open_tokenizer(None, folder),
        runner=Runner,
        **options,
    )


def served(tp: int, requests, **options) -> dict:
    """{(id, sample): (ids, text, finish reason)}."""
    _, _, deltas = run(tp, lettered, FOLDER.name, requests, timeout=120, **options)[0]
    out: dict = {}
    for delta in deltas:
        ids, text, _ = out.get((delta.request_id, delta.index), ([], "", None))
        out[delta.request_id, delta.index] = (
            ids + list(delta.ids),
            text + delta.text,
            delta.finish_reason,
        )
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
    # and is free within it
    assert len({text for (name, _), (_, text, _) in alone.items() if name.endswith("code")}) > 4


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "ahead"])
@pytest.mark.parametrize("tp", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
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


def test_what_cannot_be_followed_is_refused_and_takes_nobody_along():
    one = engine(single_rank(), SHRUNK["8b"], tokenizer=LETTERS, runner=Runner)
    bad = {
        "schema": Form("json", '{"type": 5}'),
        "regex": Form("regex", "("),
        "late": lark('start: "a" x{60000}\nx: "b"'),
    }
    for name, form in bad.items():
        one.submit(Request(name, PROMPT, SamplingParams(form=form, temperature=0, n=2)))
        with pytest.raises(UserError, match="the form of the answer"):
            one.check(Request("r", PROMPT, SamplingParams(form=form)))
    one.submit(Request("good", PROMPT, SamplingParams(temperature=0, max_tokens=6)))
    ends = {
        (delta.request_id, delta.index): delta for delta in to_the_end(one) if delta.finish_reason
    }
    assert ends["good", 0].finish_reason == "length" and len(ends) == 7
    for name in ("schema", "regex"):
        for index in (0, 1):
            delta = ends[name, index]
            assert (
                delta.finish_reason == "abort"
                and "not understood" in delta.error
                and delta.refused[0] in delta.error
            )
    assert (
        one.scheduler.n_driven == 0 and one.scheduler.n_free_blocks == one.scheduler.blocks.n_blocks
    )
    for params in (
        {"form": "json"},
        {"form": SCHEMA, "min_tokens": 3},
        {"form": SCHEMA, "ignore_eos": True},
    ):
        with pytest.raises(UserError):
            SamplingParams(**params)
    one.dismiss()


def test_a_form_that_breaks_ends_its_own_sample_alone():
    """llguidance finds out late that this grammar is beyond its limits."""
    one = engine(single_rank(), SHRUNK["8b"], tokenizer=LETTERS, runner=Runner)
    one.submit(
        Request(
            "bad",
            PROMPT,
            SamplingParams(temperature=0, form=lark('start: "a" x{60000}\nx: "b"'), max_tokens=20),
        )
    )
    one.submit(Request("good", PROMPT, SamplingParams(temperature=0, max_tokens=6)))
    ends = {
        delta.request_id: (delta.finish_reason, delta.error)
        for delta in to_the_end(one)
        if delta.finish_reason
    }
    assert (
        ends["good"] == ("length", None)
        and ends["bad"][0] == "abort"
        and "Too many items" in ends["bad"][1]
    )
    assert (
        one.scheduler.n_driven == 0 and one.scheduler.n_free_blocks == one.scheduler.blocks.n_blocks
    )
    one.dismiss()


def to_the_end(one, seconds: float = 60) -> list:
    deltas, deadline = [], time.monotonic() + seconds
    while one.has_work:
        assert time.monotonic() < deadline, deltas
        deltas += one.step()
    return deltas


# past the check of its size: its mask does not come for minutes
STUCK = Form("regex", "(a?){30000}a{30000}")


def beside_stuck_ones(ranks, folder, requests, hostile) -> tuple | None:
    """-> {(id, sample): ids} of the requests, and [(steps, step at which it ended, error)] of the
    hostile ones."""
    one = engine(
        ranks, SHRUNK["8b"], tokenizer=open_tokenizer(None, folder), runner=Runner, max_rows=12
    )
    if not ranks.is_driver:
        one.follow()
        return None
    one._masks = Masks(GrammarPool(one.tokenizer, cpu_s=0.4), 12)
    for i, form in enumerate(hostile):
        one.submit(Request(f"stuck{i}", PROMPT, SamplingParams(temperature=0, form=form)))
    for name, ids, params in requests:
        one.submit(Request(name, ids, SamplingParams(**params)))
    tokens, ends, n_alone = {}, {}, 0
    while one.has_work:
        deltas = one.step()
        one.scheduler.check_integrity()
        n_alone += bool(deltas) and all(
            sequence.held for sequence in one.scheduler.running if "stuck" in sequence.request.id
        )
        for delta in deltas:
            tokens.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
            if delta.finish_reason:
                ends[delta.request_id] = delta.error
    one.dismiss()
    assert (
        one.scheduler.n_free_blocks == one.scheduler.blocks.n_blocks and one.scheduler.n_driven == 0
    )
    return tokens, ends, n_alone


@pytest.mark.parametrize("tp", [1, 2])
def test_a_row_whose_mask_is_late_is_left_out_and_ended(alone, tp):
    """The others get on meanwhile, and write what they write undisturbed."""
    tokens, ends, n_alone = run(
        tp, beside_stuck_ones, FOLDER.name, REQUESTS[:4] + REQUESTS[-1:], [STUCK] * 4, timeout=120
    )[0]
    assert n_alone > 20  # steps of the others while the hostile ones were held
    for i in range(4):
        assert (
            "takes too much to follow" in ends[f"stuck{i}"]
            and "0.4 s of computing" in ends[f"stuck{i}"]
        )
        assert not tokens[f"stuck{i}", 0]
    for (name, index), (ids, _, _) in alone.items():
        assert name not in ends or tokens[name, index] == ids and ends[name] is None


def processes_of(one) -> tuple[int, list[int]]:
    """Of the fork server, and of its workers."""
    server = one._masks.pool._server.pid
    return server, [pid for pid in children(server) if is_alive(pid)]


def all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_alive, pids))


def test_killed_processes_are_replaced_and_the_text_is_the_same(alone):
    one = engine(single_rank(), SHRUNK["8b"], tokenizer=LETTERS, runner=Runner)
    for name, ids, params in REQUESTS[:3]:
        one.submit(Request(name, ids, SamplingParams(**params)))
    tokens, n_killed, kills = {}, 0, [100, 60, 40, 10]
    while one.has_work:
        if kills and sum(map(len, tokens.values())) >= kills[-1]:
            server, workers = processes_of(one)
            for pid in workers + [server] * (kills.pop() == 60):
                os.kill(pid, signal.SIGKILL)
                n_killed += 1
        for delta in one.step():
            assert delta.error is None
            tokens.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
    one.dismiss()
    assert n_killed > 8 and tokens == {key: alone[key][0] for key in tokens} and len(tokens) == 6


def test_a_stopped_process_holds_up_nobody_else(alone):
    one = engine(single_rank(), SHRUNK["8b"], tokenizer=LETTERS, runner=Runner)
    one._masks = Masks(GrammarPool(LETTERS, cpu_s=0.4), 8)
    name, ids, params = REQUESTS[0]
    one.submit(Request("stopped", ids, SamplingParams(**params | {"n": 1})))
    [followed] = one._masks._followed.values()
    while not followed.worker.pid:  # until it is there
        one.step()
    stopped = followed.worker.pid
    os.kill(stopped, signal.SIGSTOP)
    one.submit(Request(name, ids, SamplingParams(**params)))
    deltas = to_the_end(one)
    written = [
        i for delta in deltas if (delta.request_id, delta.index) == (name, 0) for i in delta.ids
    ]
    assert written == alone[name, 0][0]
    assert "takes too much" in next(
        delta.error for delta in deltas if delta.request_id == "stopped" and delta.finish_reason
    )
    server, workers = processes_of(one)
    assert all_end([stopped])
    one.dismiss()
    assert all_end([server, *workers, stopped])


def test_an_aborted_request_leaves_no_process_at_work():
    one = engine(single_rank(), SHRUNK["8b"], tokenizer=LETTERS, runner=Runner)
    one.submit(Request("stuck", PROMPT, SamplingParams(temperature=0, form=STUCK)))
    one.submit(Request("free", PROMPT, SamplingParams(temperature=0, max_tokens=900)))
    while not next(sequence for sequence in one._tracks if sequence.request.id == "stuck").held:
        one.step()
    worker = next(iter(one._masks._followed.values())).worker.pid
    one.abort("stuck")
    one.step()
    assert not one._masks._followed and all_end([worker])
    one.abort("free")
    one.dismiss()


def test_bits_are_read_as_they_were_written():
    words = torch.tensor([[5, 1 << 30, -(1 << 31)], [0, 0, 1]], dtype=torch.int32)
    all_of_them = allowed(words, 0, 100)
    assert all_of_them.nonzero().tolist() == [[0, 0], [0, 2], [0, 62], [0, 95], [1, 64]]
    assert torch.equal(allowed(words, 50, 30), all_of_them[:, 50:80])
