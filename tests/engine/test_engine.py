"""The engine's loop on one rank: stops, lengths, logprobs, aborts, and a request that fails
alone."""

import pytest
import torch

from llama_tp.arch.errors import UserError
from llama_tp.arch.weights import table
from llama_tp.engine.request import Request
from llama_tp.engine.worker import Worker
from llama_tp.parallel.groups import single_rank
from llama_tp.sampling.params import SamplingParams
from tests import reference
from tests.engines import GatheredWorker, alphabet, engine, serve
from tests.ranks import run
from tests.shapes import SHRUNK

CONFIG = SHRUNK["8b"]
WEIGHTS = reference.random_weights(table(CONFIG))
IDS = [3, 17, 99, 250, 8]
GREEDY = reference.greedy(WEIGHTS, CONFIG, IDS, 12)


def one(params: dict, ids=IDS):
    tokens, _, deltas = serve(
        single_rank(), [("r", ids, {"temperature": 0.0, "max_tokens": 12, **params})], config=CONFIG
    )
    return tokens["r", 0], "".join(delta.text for delta in deltas), deltas


def letters(ids) -> str:
    return "".join(chr(0x100 + i) for i in ids)


def test_length():
    tokens, text, deltas = one({})
    assert tokens == GREEDY and text == letters(GREEDY) and deltas[-1].finish_reason == "length"
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * 11


def test_a_stop_id_ends_and_is_not_part_of_the_output():
    at = next(i for i in range(2, 12) if GREEDY[i] not in GREEDY[:i])
    tokens, text, deltas = one({"stop_ids": (GREEDY[at],)})
    assert (
        tokens == GREEDY[:at]
        and text == letters(GREEDY[:at])
        and deltas[-1].finish_reason == "stop"
    )


def test_a_stop_string_cuts_the_text():
    tokens, text, deltas = one({"stop": letters(GREEDY[3:5])})
    assert (
        text == letters(GREEDY[: letters(GREEDY).index(letters(GREEDY[3:5]))])
        and deltas[-1].finish_reason == "stop"
    )


def test_min_tokens_holds_stop_strings_off():
    _, text, _ = one({"stop": letters(GREEDY[:1]), "min_tokens": 2})
    assert text.startswith(letters(GREEDY[:2]))


def test_logprobs_of_prompt_and_output():
    """Scored in chunks, they are those of one full forward pass."""
    ids = [(7 * k) % 260 for k in range(150)]
    _, _, deltas = one({"logprobs": 2, "prompt_logprobs": 1, "max_tokens": 3}, ids)
    tokens = [t for delta in deltas for t in delta.ids]
    raw = torch.log_softmax(reference.logits(WEIGHTS, CONFIG, ids + tokens), -1)
    scores = deltas[0].prompt_logprobs
    assert scores[0] is None and len(scores) == 150
    assert [each.token for each in scores[1:]] == ids[1:]
    assert [each.logprob for each in scores[1:]] == pytest.approx(
        [float(raw[i, ids[i + 1]]) for i in range(149)], abs=1e-4
    )
    assert [delta.logprobs[0].logprob for delta in deltas] == pytest.approx(
        [float(raw[149 + i, token]) for i, token in enumerate(tokens)], abs=1e-4
    )
    assert all(delta.prompt_logprobs is None for delta in deltas[1:])


# of the 264 rows of the embedding: the others have no text
N_IDS, SHORT = 150, [(7 * k) % 150 for k in range(10)]


def answers_with_fewer_ids(ranks, worker):
    """{name: tokens}, and {name: logprobs of the prompt and of the output}, of a tokenizer that
    does not know all rows."""
    ways = {
        "greedy": {"temperature": 0.0},
        "whole": {"temperature": 2.0, "top_p": 1.0, "seed": 3},
        "shortlist": {"temperature": 1.5, "top_k": 20, "seed": 4},
    }
    plain = [(name, SHORT, {**params, "max_tokens": 8}) for name, params in ways.items()]
    scored = [
        (f"{name} scored", ids, {**params, "logprobs": 3, "prompt_logprobs": 3})
        for name, ids, params in plain
    ]
    got = serve(ranks, [*plain, *scored], config=CONFIG, tokenizer=alphabet(N_IDS), worker=worker)
    if got is None:
        return None
    scores: dict = {}
    for delta in got[2]:
        scores.setdefault(delta.request_id, []).extend(
            [*(delta.prompt_logprobs or ()), *delta.logprobs]
        )
    return {name: ids for (name, _), ids in got[0].items()}, scores


def test_rows_without_text_count_in_logprobs_and_are_never_chosen():
    """As transformers and vLLM: log_softmax over all rows of the checkpoint's embedding. The same
    at tp 1 and 2, sharded or not."""
    [(tokens, scores)] = run(1, answers_with_fewer_ids, Worker)
    best = reference.logits(WEIGHTS, CONFIG, SHORT)
    assert (best.argmax(-1) >= N_IDS).any()  # the rows without text would matter
    for name in ("greedy", "whole", "shortlist"):
        ids, scored = tokens[name], scores[f"{name} scored"]
        assert ids == tokens[f"{name} scored"] and len(ids) == 8 and max(ids) < N_IDS
        raw = torch.log_softmax(reference.logits(WEIGHTS, CONFIG, SHORT + ids), -1)
        for i, entry in enumerate(scored[1:]):
            assert entry.token == (SHORT + ids)[i + 1] and entry.logprob == pytest.approx(
                float(raw[i, entry.token]), abs=1e-4
            )
            values, at = raw[i, :N_IDS].topk(3)
            assert [token for token, _ in entry.top] == at.tolist()
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert run(1, answers_with_fewer_ids, GatheredWorker)[0] == (tokens, scores)
    two = run(2, answers_with_fewer_ids, Worker)[0]
    assert two[0] == tokens and run(2, answers_with_fewer_ids, GatheredWorker)[0] == two
    assert [each.logprob for each in two[1]["whole scored"][1:]] == pytest.approx(
        [each.logprob for each in scores["whole scored"][1:]], abs=1e-4
    )


def test_logprobs_of_the_prompt_come_once_also_when_the_end_follows_the_first_token():
    running = engine(single_rank(), CONFIG)
    running.submit(Request("r", IDS, SamplingParams(prompt_logprobs=0)))
    [first] = running.step()
    assert len(first.prompt_logprobs) == len(IDS) and [
        delta.prompt_logprobs for delta in running.abort("r")
    ] == [None]


def test_a_request_that_is_not_finite_ends_alone():
    """A NaN in one embedding row poisons the request that uses it, and nobody that runs beside or
    after it."""
    weights = dict(WEIGHTS)
    weights["tok_embeddings.weight"] = WEIGHTS["tok_embeddings.weight"].clone()
    weights["tok_embeddings.weight"][200] = float("nan")
    requests = [
        ("bad", [200, 5], {"temperature": 0.0}),
        ("good", IDS, {"temperature": 0.0, "max_tokens": 12}),
        ("later", IDS, {"temperature": 0.0, "max_tokens": 12}),
    ]
    tokens, _, deltas = serve(
        single_rank(), requests, arrivals=2, config=CONFIG, weights=weights, n_blocks=4
    )
    assert tokens["good", 0] == tokens["later", 0] == GREEDY
    ended = [delta for delta in deltas if delta.request_id == "bad"]
    assert (
        len(ended) == 1
        and ended[0].finish_reason == "abort"
        and "not finite" in ended[0].error
        and not ended[0].ids
    )


def test_abort_frees_at_once():
    running = engine(single_rank(), CONFIG)
    running.submit(Request("r", IDS, SamplingParams(n=2)))
    running.step()
    assert [delta.finish_reason for delta in running.abort("r")] == ["abort", "abort"]
    assert (
        not running.has_work
        and running.scheduler.n_free_blocks == 64
        and running.abort("unknown") == []
    )


@pytest.mark.parametrize("ids, says", [([264], "vocabulary"), (list(range(200)) * 6, "too long")])
def test_what_can_never_run_is_refused(ids, says):
    with pytest.raises(UserError, match=says):
        engine(single_rank(), CONFIG).submit(Request("r", ids, SamplingParams()))


def test_ids_are_unique():
    running = engine(single_rank(), CONFIG)
    running.submit(Request("r", IDS, SamplingParams()))
    with pytest.raises(UserError, match="its own"):
        running.submit(Request("r", IDS, SamplingParams()))


@pytest.mark.parametrize(
    "params, ids, reason",
    [
        ({}, (5, 6, 7, 8), "length"),
        ({"stop_ids": [7]}, (5, 6), "stop"),
        ({"stop_ids": [5]}, (), "stop"),
        ({"stop": [chr(0x106) + chr(0x107)]}, (5, 6, 7), "stop"),
        ({"stop": [chr(0x105)], "min_tokens": 1}, (5, 6, 7, 8), "length"),
        ({"stop": [chr(0x106)], "min_tokens": 1}, (5, 6), "stop"),
    ],
    ids=str,
)
def test_several_tokens_of_a_step_are_one_delta_up_to_where_the_sequence_ends(params, ids, reason):
    one = engine(single_rank(), CONFIG, weights=WEIGHTS)
    one.submit(Request("a", IDS, SamplingParams(max_tokens=4, temperature=0, **params)))
    step = one.scheduler.plan()
    [(sequence, tokens)] = one.scheduler.update(step, {step.rows[0].row: [5, 6, 7, 8, 9]})
    delta = one._gained(sequence, tokens)
    assert delta.ids == ids and delta.finish_reason == reason and not one.has_work
    stopped = reason == "stop" and "stop" in params
    text = "".join(chr(0x100 + token) for token in ids)
    assert delta.text == (text[: text.index(params["stop"][0])] if stopped else text)
