"""The sampler against transformers' processors, against frequencies, and by hand."""

import math

import pytest
import torch

from llama_tp.engine import sampler
from llama_tp.engine.request import Request, SamplingParams, Sequence
from llama_tp.engine.sampler import (
    SHORTLIST,
    adjusted,
    choose,
    filtered,
    likeliest,
    pick,
    place_in,
    score,
    uniform,
    unpacked,
)
from llama_tp.engine.step import NOT_FINITE, UNDECIDED
from llama_tp.native.library import load
from llama_tp.sampling.numerators import NativeNumerators, SoftmaxNumerators

NUMERATORS = SoftmaxNumerators()

V = 50
LOGITS = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 3


def sequence(prompt=(1, 2, 3), output=(), seed=1, index=0, **params) -> Sequence:
    out = Sequence(Request("r", list(prompt), SamplingParams(**params)), index, seed)
    out.ids += output
    return out


def picked(rows: list[Sequence], logits: torch.Tensor, tp: int) -> list[int]:
    """pick, from what tp shards of the logits (R, V) would send."""
    draws = torch.tensor([row.draw() for row in rows])
    temperature, best = unpacked(draws)[0].float(), logits.amax(-1, keepdim=True)
    lists, first = [], 0
    for shard in logits.chunk(tp, dim=-1):
        values, at = likeliest(shard, SHORTLIST)
        mass = NUMERATORS.chunk_sums(shard, temperature, best).sum(-1, keepdim=True)
        lists.append(torch.cat([values.view(torch.int32).long(), at + first, mass], dim=1))
        first += shard.shape[1]
    return pick(torch.stack(lists), best, draws, NUMERATORS).tolist()


def kept(**params) -> set[int]:
    return set(filtered(torch.softmax(LOGITS, -1), SamplingParams(**params))[1].tolist())


@pytest.mark.parametrize(
    "params, name, argument",
    [
        ({"top_k": 7, "top_p": 1.0}, "TopKLogitsWarper", {"top_k": 7}),
        ({"top_p": 0.9}, "TopPLogitsWarper", {"top_p": 0.9}),
        ({"top_p": 0.3}, "TopPLogitsWarper", {"top_p": 0.3}),
        ({"min_p": 0.05, "top_p": 1.0}, "MinPLogitsWarper", {"min_p": 0.05}),
    ],
)
def test_filters_keep_what_transformers_keeps(params, name, argument):
    process = pytest.importorskip(
        "transformers.generation.logits_process", reason="the oracle is in the test extra"
    )
    theirs = getattr(process, name)(**argument)(None, LOGITS.unsqueeze(0).clone())[0]
    assert kept(**params) == set(torch.nonzero(theirs > -math.inf).flatten().tolist())


def test_top_k_then_top_p_as_transformers():
    process = pytest.importorskip(
        "transformers.generation.logits_process", reason="the oracle is in the test extra"
    )
    theirs = process.TopPLogitsWarper(0.8)(
        None, process.TopKLogitsWarper(9)(None, LOGITS.unsqueeze(0).clone())
    )[0]
    assert kept(top_k=9, top_p=0.8) == set(torch.nonzero(theirs > -math.inf).flatten().tolist())


def test_repetition_penalty_is_transformers():
    process = pytest.importorskip(
        "transformers.generation.logits_process", reason="the oracle is in the test extra"
    )
    ids = [3, 7, 7, 12]
    theirs = process.RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor([ids]), LOGITS.unsqueeze(0).clone()
    )[0]
    ours = adjusted(sequence(ids[:2], ids[2:], repetition_penalty=1.3), LOGITS, ())
    torch.testing.assert_close(ours, theirs)


def test_penalties_and_bias_by_hand():
    ours = adjusted(
        sequence(
            (4,), (5, 5, 6), presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 4.0}
        ),
        LOGITS,
        (),
    )
    expected = LOGITS.clone()
    expected[5] -= 0.5 + 2 * 0.25
    expected[6] -= 0.5 + 0.25
    expected[9] += 4.0
    torch.testing.assert_close(ours, expected)
    assert adjusted(sequence(), LOGITS, (3,)) is LOGITS  # nothing asked for, nothing copied


def test_min_tokens_holds_stop_ids_off():
    masked = adjusted(sequence(output=(8,), min_tokens=2, stop_ids=(4,)), LOGITS, (5,))
    assert masked[4] == masked[5] == -math.inf and masked[6] == LOGITS[6]
    assert adjusted(sequence(output=(8, 8), min_tokens=2, stop_ids=(4,)), LOGITS, (5,)) is LOGITS
    assert (
        adjusted(sequence(min_tokens=2, ignore_eos=True, stop_ids=(4,)), LOGITS, (5,))[5]
        == LOGITS[5]
    )


def test_the_token_that_crosses_top_p_is_kept():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert filtered(probs, SamplingParams(top_p=0.6))[1].tolist() == [0, 1]
    assert filtered(probs, SamplingParams(top_p=1e-9))[1].tolist() == [0]


def test_a_full_sort_gives_what_the_candidates_give(monkeypatch):
    flat = torch.softmax(LOGITS / 4, -1)
    expected = filtered(flat, SamplingParams(top_p=0.97))
    monkeypatch.setattr(sampler, "TOP_CANDIDATES", 3)  # too few to decide: the row is sorted whole
    ours = filtered(flat, SamplingParams(top_p=0.97))
    assert ours[1].tolist() == expected[1].tolist() and len(ours[1]) > 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.5},
        {"top_k": 5, "top_p": 1.0},
        {"top_k": 20, "top_p": 0.9},
        {"min_p": 0.1, "top_p": 1.0},
        {"top_p": 0.8, "min_p": 0.05},
        {"top_k": 64},
    ],
    ids=str,
)
def test_shortlists_give_the_token_that_all_logits_give(params, tp, tied):
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(4)) * 3
    logits = (4 * logits).round() / 4 if tied else logits  # many equal ones, as in bf16
    rows = [sequence(prompt=(1, i), seed=i, temperature=0.7, **params) for i in range(40)]
    expected = [choice.token for choice in choose(rows, logits, ())]
    ours = picked(rows, logits, tp)
    assert sum(token != UNDECIDED for token in ours) > 20
    assert all(a in (b, UNDECIDED) for a, b in zip(ours, expected))


def test_of_equal_values_the_lower_id_is_first():
    values = torch.tensor(
        [[0.5, -1.0, 2.0, 0.5, -0.5, 2.0, -1.0], [-3.0, -3.0, -3.0, -2.0, -3.0, -3.0, -torch.inf]]
    )
    best, ids = likeliest(values, 6)
    assert ids.tolist() == [[2, 5, 0, 3, 4, 1], [3, 0, 1, 2, 4, 5]] and torch.equal(
        best, values.gather(1, ids)
    )


def test_a_shortlist_that_does_not_decide_says_so():
    flat = torch.zeros(1, 1000)
    assert picked([sequence(temperature=1.0, top_p=0.9)], flat, 2) == [UNDECIDED]
    assert picked([sequence(temperature=1.0, top_k=65)], flat, 2) == [UNDECIDED]
    assert picked([sequence(temperature=1.0, top_k=64, top_p=1.0)], flat, 2) != [UNDECIDED]
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 1000)
        logits[1, 700] = bad
        assert picked([sequence(temperature=1.0, top_k=3)] * 2, logits, 2)[1] == NOT_FINITE


@pytest.mark.parametrize("way", ["torch", "C++"])
def test_a_draw_from_integer_weights_is_the_softmax_quantile(way):
    """Against softmax in doubles: the same token unless u lies within 1e-6 of a boundary; and
    shards change nothing."""
    if way == "C++" and load() is None:
        pytest.skip("the C++ parts are not built here: python -m llama_tp.native.build")
    ours = NativeNumerators(load()) if way == "C++" else NUMERATORS
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(1)) * 4
    u = torch.rand(200, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    temperature, best = torch.full((200, 1), 0.8), logits.amax(-1, keepdim=True)
    chunks = ours.chunk_sums(logits, temperature, best)
    total = chunks.sum(-1, keepdim=True)
    tokens = place_in(logits, chunks, (u * total.double()).long(), temperature, best, ours)[:, 0]
    reached = torch.softmax(logits.double() / 0.8, -1).cumsum(-1)
    expected = torch.searchsorted(reached, u, right=True)[:, 0]
    margin = (reached - u).abs().amin(-1)
    assert (
        torch.equal(tokens[margin > 1e-6], expected[margin > 1e-6]) and (margin > 1e-6).sum() > 180
    )
    halves = [
        ours.chunk_sums(half.contiguous(), temperature, best).sum(-1, keepdim=True)
        for half in logits.chunk(2, dim=-1)
    ]
    assert torch.equal(sum(halves), total)


@pytest.mark.parametrize("params", [{"top_p": 1.0}, {"top_p": 0.9}, {"top_k": 5, "top_p": 1.0}])
def test_draws_follow_the_probabilities(params):
    """4,000 draws at different positions: every kept token within 5 standard deviations of its
    probability."""
    n = 4000
    rows = [sequence((0,) * (1 + i), temperature=1.5, **params) for i in range(n)]
    counts = torch.zeros(V)
    for at in range(0, n, 500):
        for choice in choose(rows[at : at + 500], LOGITS.expand(500, V), ()):
            counts[choice.token] += 1
    probs = torch.softmax(LOGITS / 1.5, -1)
    keep, ids = (
        filtered(probs, SamplingParams(**params))
        if params != {"top_p": 1.0}
        else (probs, torch.arange(V))
    )
    expected = torch.zeros(V).index_put((ids,), keep / keep.sum()) * n
    assert ((counts - expected).abs() <= 5 * expected.sqrt() + 1).all()
    assert not counts[expected == 0].any()


def test_draws_are_keyed_by_seed_sample_and_position_alone():
    row = {"temperature": 1.0, "top_p": 1.0}
    alone = choose([sequence((1, 2, 3), seed=9, **row)], LOGITS.unsqueeze(0), ())[0].token
    crowd = choose(
        [sequence((4,), **row), sequence((7, 8, 9), seed=9, **row)], LOGITS.expand(2, V), ()
    )[1].token
    assert alone == crowd
    draws = {
        uniform(seed, index, position)
        for seed in (1, 2)
        for index in (0, 1)
        for position in range(100)
    }
    assert len(draws) == 400 and all(0 <= u < 1 for u in draws)


def test_logprobs_are_those_of_the_raw_logits():
    row = sequence(temperature=0.3, top_k=2, logit_bias={11: 50.0}, logprobs=3)
    choice = choose([row], LOGITS.unsqueeze(0), ())[0]
    raw = torch.log_softmax(LOGITS, -1)
    assert choice.token == 11
    assert choice.logprobs.logprob == pytest.approx(float(raw[11]))
    best = raw.topk(3)
    assert choice.logprobs.top == tuple(zip(best.indices.tolist(), best.values.tolist()))
    assert score(LOGITS.unsqueeze(0), [4], 0)[0].top == ()


def test_a_row_that_is_not_finite_fails_alone():
    logits = LOGITS.repeat(3, 1)
    logits[1, 7] = float("nan")
    choices = choose([sequence(temperature=0)] * 3, logits, ())
    assert [choice.token for choice in choices] == [
        int(LOGITS.argmax()),
        None,
        int(LOGITS.argmax()),
    ]
