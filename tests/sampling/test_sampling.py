"""Filters against transformers' processors, draws against frequencies and against softmax in
doubles, and the sharded sampler against the gathered one, token for token."""

import math

import pytest
import torch

from llama_tp.native.library import load
from llama_tp.parallel.groups import single_rank
from llama_tp.sampling import filters, gathered
from llama_tp.sampling.filters import (
    adjusted,
    filter_probs,
    likeliest,
    place_in_chunks,
)
from llama_tp.sampling.gathered import GatheredRow, GatheredSampler
from llama_tp.sampling.logprobs import score
from llama_tp.sampling.numerators import NativeNumerators, SoftmaxNumerators
from llama_tp.sampling.params import (
    NOT_FINITE,
    SHORTLIST_TOO_SHORT,
    Draw,
    SamplingMode,
    SamplingParams,
    drawn_mode,
    mode_of,
    random53,
)
from llama_tp.sampling.sharded import ShardedSampler
from tests.ranks import run as in_ranks

V = 50
LOGITS = torch.randn(V, generator=torch.Generator().manual_seed(0)) * 3


NUMERATORS = {"torch": SoftmaxNumerators()} | ({"C++": NativeNumerators(load())} if load() else {})
WAYS = ["torch", pytest.param("C++", marks=pytest.mark.skipif(not load(), reason="not built"))]


def row(prompt=(1, 2, 3), output=(), seed=1, index=0, **params) -> GatheredRow:
    ids = [*prompt, *output]
    return GatheredRow(SamplingParams(**params), ids, len(prompt), seed, index)


def choose(rows, logits, masks=None, way="torch", n_vocab=10**6, eos_ids=()) -> list[int]:
    """From gathered logits (R, V)."""
    sampler = GatheredSampler(torch.device("cpu"), n_vocab, NUMERATORS[way], eos_ids)
    return sampler.sample(rows, logits, masks)


def on_shards(ranks, rows, logits, way="torch", n_vocab=10**6) -> list[int]:
    """From this rank's part of logits (R, V), all rows in one call."""
    sampler = ShardedSampler(ranks, n_vocab, NUMERATORS[way])
    width = -(-logits.shape[1] // ranks.tp)
    mine = logits[:, ranks.rank * width :][:, :width]
    draws = [Draw.of(r.params, random53(r.seed, r.sample, len(r.ids))) for r in rows]
    modes = frozenset(drawn_mode(r.params) for r in rows)
    return sampler.sample(mine, ranks.rank * width, modes, torch.tensor(draws)).tolist()


def keep(probs: torch.Tensor, **params) -> list[int]:
    """The ids, best first, that the filters keep of probabilities (V,)."""
    params = SamplingParams(**params)
    values, ids = likeliest(probs.double().unsqueeze(0), len(probs))
    draws = torch.tensor([Draw.of(params)])
    kept, _ = filter_probs(values, filters.unpacked(draws))
    return ids[kept > 0].tolist()


def kept(**params) -> set[int]:
    return set(keep(torch.softmax(LOGITS, -1), **params))


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
    ours = adjusted(LOGITS, SamplingParams(repetition_penalty=1.3), ids, 2, ())
    torch.testing.assert_close(ours, theirs)


def test_penalties_and_bias_by_hand():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 4.0})
    ours = adjusted(LOGITS, params, [4, 5, 5, 6], 1, ())
    expected = LOGITS.clone()
    expected[5] -= 0.5 + 2 * 0.25
    expected[6] -= 0.5 + 0.25
    expected[9] += 4.0
    torch.testing.assert_close(ours, expected)
    assert (
        adjusted(LOGITS, SamplingParams(), [1, 2], 1, (3,)) is LOGITS
    )  # nothing asked for, nothing copied


def test_min_tokens_holds_stop_ids_off():
    params = SamplingParams(min_tokens=2, stop_ids=(4,))
    masked = adjusted(LOGITS, params, [1, 8], 1, (5,))
    assert masked[4] == masked[5] == -math.inf and masked[6] == LOGITS[6]
    assert adjusted(LOGITS, params, [1, 8, 8], 1, (5,)) is LOGITS
    params = SamplingParams(min_tokens=2, ignore_eos=True, stop_ids=(4,))
    assert adjusted(LOGITS, params, [1], 1, (5,))[5] == LOGITS[5]


def test_the_token_that_crosses_top_p_is_kept():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert keep(probs, top_p=0.6) == [0, 1]
    assert keep(probs, top_p=1e-9) == [0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "params", [{"top_p": 0.97}, {"top_k": 30, "top_p": 1.0}, {"min_p": 0.01, "top_p": 1.0}]
)
def test_the_whole_vocabulary_gives_what_the_candidates_give(monkeypatch, params, way):
    rows = [row((1, i), temperature=4.0, seed=i, **params) for i in range(40)]
    expected = choose(rows, LOGITS.repeat(40, 1), way=way)
    monkeypatch.setattr(gathered, "TOP_CANDIDATES", 3)  # too few to decide
    assert choose(rows, LOGITS.repeat(40, 1), way=way) == expected and len(set(expected)) > 3


MIXED = [
    {"top_p": 0.5},
    {"top_k": 5, "top_p": 1.0},
    {"top_k": 20, "top_p": 0.9},
    {"min_p": 0.1, "top_p": 1.0},
    {"top_p": 0.8, "min_p": 0.05},
    {"top_k": 64},
    {"top_p": 1.0},
]


def tokens_of_shards(ranks, rows, logits, way):
    return on_shards(ranks, rows, logits, way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_give_the_token_that_gathered_logits_give(tp, tied, way):
    """All filters, and none, in one step; where a shortlist is too short it says so."""
    logits = torch.randn(280, 1002, generator=torch.Generator().manual_seed(4)) * 3
    logits = (4 * logits).round() / 4 if tied else logits  # many equal ones, as in bf16
    rows = [row((1, i), seed=i, temperature=0.7, **MIXED[i % len(MIXED)]) for i in range(280)]
    expected = choose(rows, logits, way=way)
    for ours in in_ranks(tp, tokens_of_shards, rows, logits, way):
        assert all(a in (b, SHORTLIST_TOO_SHORT) for a, b in zip(ours, expected))
        assert sum(token != SHORTLIST_TOO_SHORT for token in ours) > 200
        assert SHORTLIST_TOO_SHORT not in ours[6::7]  # without filters there is no shortlist


def test_of_equal_values_the_lower_id_is_first():
    values = torch.tensor(
        [[0.5, -1.0, 2.0, 0.5, -0.5, 2.0, -1.0], [-3.0, -3.0, -3.0, -2.0, -3.0, -3.0, -torch.inf]]
    )
    best, ids = likeliest(values, 6)
    assert ids.tolist() == [[2, 5, 0, 3, 4, 1], [3, 0, 1, 2, 4, 5]] and torch.equal(
        best, values.gather(1, ids)
    )


def test_a_shortlist_that_does_not_decide_says_so():
    flat, alone = torch.zeros(1, 1000), single_rank()
    assert on_shards(alone, [row(temperature=1.0, top_p=0.9)], flat) == [SHORTLIST_TOO_SHORT]
    assert on_shards(alone, [row(temperature=1.0, top_k=65)], flat) == [SHORTLIST_TOO_SHORT]
    ours = on_shards(alone, [row(temperature=1.0, top_k=64, top_p=1.0)], flat)
    assert ours == choose([row(temperature=1.0, top_k=64, top_p=1.0)], flat)
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 1000)
        logits[1, 700] = bad
        for params in ({"top_k": 3}, {"top_p": 1.0}):
            rows = [row(temperature=1.0, **params)] * 2
            assert on_shards(alone, rows, logits)[1] == NOT_FINITE
            assert choose(rows, logits)[1] == NOT_FINITE


def test_a_top_k_beyond_the_vocabulary_is_the_whole_vocabulary():
    drawn, all_of_it = (
        choose(
            [row((1, i), temperature=3.0, top_k=top_k, top_p=1.0, seed=i) for i in range(50)],
            LOGITS.repeat(50, 1),
        )
        for top_k in (2**31 - 1, V)
    )
    assert drawn == all_of_it and len(set(drawn)) > 10 and min(drawn) >= 0


def plainly(logits: torch.Tensor, params: SamplingParams, u: float) -> tuple[int, float]:
    """The rules written anew, in doubles: the token, and how far u is from the next boundary."""
    probs, ids = torch.softmax(logits.double() / params.temperature, 0).sort(descending=True)
    probs = probs[: params.top_k or None]
    mass, kept = float(probs.sum()), []
    for p in probs.tolist():
        if sum(kept) <= params.top_p * mass and p >= params.min_p * float(probs[0]):
            kept.append(p)
    reached = torch.tensor(kept, dtype=torch.float64).cumsum(0) / sum(kept)
    return int(ids[(reached <= u).sum()]), float((reached - u).abs().min())


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_rules_in_doubles(way):
    logits = torch.randn(210, 300, generator=torch.Generator().manual_seed(3)) * 3
    params = [{"top_k": 9, "top_p": 0.7, "min_p": 0.05}, *MIXED[:-1]]
    rows = [row((1, i), seed=i, temperature=0.9, **params[i % len(params)]) for i in range(210)]
    n_clear = 0
    for ours, one, values in zip(choose(rows, logits, way=way), rows, logits):
        u = random53(one.seed, one.sample, 2) * 2.0**-53
        token, margin = plainly(values, one.params, u)
        n_clear += margin > 1e-6
        assert ours == token or margin <= 1e-6
    assert n_clear > 200


@pytest.mark.parametrize("way", WAYS)
def test_a_draw_from_integer_weights_is_the_softmax_quantile(way):
    """Against softmax in doubles: the same token unless u lies within 1e-6 of a boundary; and
    shards change nothing."""
    ours = NUMERATORS[way]
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(1)) * 4
    u = torch.rand(200, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    temperature, best = torch.full((200, 1), 0.8), logits.amax(-1, keepdim=True)
    chunks = ours.chunk_sums(logits, temperature, best)
    total = chunks.sum(-1, keepdim=True)
    target = (u * total.double()).long()
    tokens = place_in_chunks(logits, chunks, target, temperature, best, ours)[:, 0]
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
    rows = [row((0,) * (1 + i), temperature=1.5, **params) for i in range(n)]
    counts = torch.zeros(V)
    for at in range(0, n, 500):
        for token in choose(rows[at : at + 500], LOGITS.repeat(500, 1)):
            counts[token] += 1
    probs, expected = torch.softmax(LOGITS / 1.5, -1), torch.zeros(V)
    ids = keep(probs, **params)
    expected[ids] = probs[ids] / probs[ids].sum() * n
    assert ((counts - expected).abs() <= 5 * expected.sqrt() + 1).all()
    assert not counts[expected == 0].any()


def test_draws_are_keyed_by_seed_sample_and_position_alone():
    params = {"temperature": 1.0, "top_p": 1.0}
    alone = choose([row((1, 2, 3), seed=9, **params)], LOGITS.unsqueeze(0))[0]
    crowd = [row((4,), **params), row((7, 8, 9), seed=9, **params)]
    assert alone == choose(crowd, LOGITS.repeat(2, 1))[1]
    draws = {
        random53(seed, index, position)
        for seed in (1, 2)
        for index in (0, 1)
        for position in range(100)
    }
    assert len(draws) == 400 and all(0 <= draw < 2**53 for draw in draws)


def test_logprobs_are_those_of_the_raw_logits():
    biased = row(temperature=0.3, top_k=2, logit_bias={11: 50.0}, logprobs=3)
    assert choose([biased], LOGITS.unsqueeze(0)) == [11]
    [told] = score(LOGITS.unsqueeze(0), [11], 3)
    raw = torch.log_softmax(LOGITS, -1)
    assert told.logprob == pytest.approx(float(raw[11]))
    best = raw.topk(3)
    assert told.top == tuple(zip(best.indices.tolist(), best.values.tolist()))
    assert score(LOGITS.unsqueeze(0), [4], 0)[0].top == ()


def test_a_row_that_is_not_finite_fails_alone():
    best = int(LOGITS.argmax())
    for bad in (float("nan"), float("inf")):
        logits = LOGITS.repeat(3, 1)
        logits[1, 7] = bad
        only = torch.tensor([1 << 3], dtype=torch.int32)  # token 3 alone may come
        for masks, token in ((None, best), ([only] * 3, 3)):  # a mask does not hide it
            for params in ({"temperature": 0}, {"top_k": 1}):
                ours = choose([row(**params)] * 3, logits, masks)
                assert ours == [token, NOT_FINITE, token]


def test_each_row_has_its_own_rules_in_one_call():
    """Modes, penalties and masks side by side, and ids beyond n_vocab."""
    only = torch.tensor([1 << 3], dtype=torch.int32)
    rows = [
        row(temperature=0),
        row(temperature=0, logit_bias={9: 100.0}),
        row(temperature=1.0, top_k=1),
        row(temperature=1.0, top_p=1.0),
        row(temperature=0, logprobs=1),
    ]
    logits = LOGITS.repeat(5, 1)
    before = logits.clone()
    logits[:, V - 1] = before[:, V - 1] = 100.0
    alone = [choose([one], LOGITS[: V - 1].unsqueeze(0))[0] for one in rows]
    ours = choose(rows, logits, [None, None, None, None, only], n_vocab=V - 1)
    assert ours == [*alone[:4], 3] and ours[1] == 9 and torch.equal(logits, before)


@pytest.mark.parametrize(
    "params, mode",
    [
        ({"temperature": 0}, SamplingMode.GREEDY),
        ({"temperature": 0, "top_k": 5}, SamplingMode.GREEDY),
        ({"temperature": 1, "top_p": 1}, SamplingMode.UNFILTERED),
        ({"top_p": 0.9}, SamplingMode.TOP_K_TOP_P),
        ({"top_p": 1, "top_k": 5}, SamplingMode.TOP_K_TOP_P),
        ({"top_p": 1, "min_p": 0.1}, SamplingMode.TOP_K_TOP_P),
        *(
            ({"temperature": 0, name: value}, SamplingMode.GATHERED)
            for name, value in {
                "repetition_penalty": 1.1,
                "presence_penalty": 0.1,
                "frequency_penalty": -0.1,
                "logit_bias": {1: 1.0},
                "min_tokens": 1,
                "logprobs": 0,
            }.items()
        ),
    ],
    ids=str,
)
def test_modes(params, mode):
    params = SamplingParams(**params)
    assert mode_of(params) == mode and drawn_mode(params) != SamplingMode.GATHERED
    draws = torch.tensor([Draw.of(params)])
    if mode in (SamplingMode.UNFILTERED, SamplingMode.TOP_K_TOP_P):
        assert filters.without_filters(draws).tolist() == [mode == SamplingMode.UNFILTERED]
