"""The tests that carry the house, on real ranks: tp, batch and cache invariance, and no leaks
(layout: tests/checkpoint).

Without --deterministic, tokens are compared with the one-file reference in fp32. With it, bits are:
every logit that a token was chosen from, at every tp, in every company, chunking, preemption and
prefix hit, in fp32 and bf16.
"""

import itertools

import pytest
import torch

from llama_tp.arch.weights import table
from llama_tp.engine.request import Request, SamplingParams
from llama_tp.engine.runner import Runner
from llama_tp.parallel.groups import single_rank
from tests import reference
from tests.engines import engine, serve
from tests.ranks import run
from tests.shapes import SHRUNK

TPS = [1, 2, *(pytest.param(tp, marks=pytest.mark.slow) for tp in (4, 8))]
PROMPTS = [
    [(i * k * k + 5 * k + i) % 260 for k in range(n)]
    for i, n in enumerate((5, 33, 70, 1, 290, 17), start=1)
]
GREEDY = {"temperature": 0.0, "max_tokens": 8}
ALONE = [(f"r{i}", ids, GREEDY) for i, ids in enumerate(PROMPTS)]
# the same requests among others that share prefixes with them, arriving one a step, in a cache too
# small for all
CROWD = [
    each
    for i, ids in enumerate(PROMPTS)
    for each in (
        (f"r{i}", ids, GREEDY),
        (f"other{i}", ids[:20] + [7, i], {"max_tokens": 70, "n": 2}),
    )
] + [("again", PROMPTS[4], GREEDY)]
TIGHT = {"n_blocks": 20, "max_rows": 6, "step_tokens": 24, "arrivals": 1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases(*choices, quick: list[tuple]) -> list:
    """Each choice of each at tp 1, 2, 4 and 8; slow unless named in `quick`."""
    return [
        pytest.param(*case, marks=[] if case in quick else pytest.mark.slow)
        for case in itertools.product(*choices, (1, 2, 4, 8))
    ]


def served(tp: int, requests, **options):
    return run(tp, serve, requests, **options)[0]


def same_bits(ours: dict, theirs: dict) -> None:
    shared = [key for key in theirs if key[0].startswith("r")]
    assert len(shared) == len(PROMPTS) * GREEDY["max_tokens"]
    different = [key for key in shared if not torch.equal(ours[key], theirs[key])]
    assert not different, (
        f"{len(different)} of {len(shared)} logits differ, first at {different[0]}"
    )


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_tp_invariance_of_tokens(shape, tp, fast):
    """Default mode: greedy tokens at any tp are those of the one-file reference, and logits agree
    to 1e-4."""
    config = SHRUNK[shape]
    weights = reference.random_weights(table(config))
    tokens, logits, _ = served(tp, ALONE, config=config, fast=fast)
    for i, ids in enumerate(PROMPTS):
        expected = reference.greedy(weights, config, ids, 8)
        assert tokens[f"r{i}", 0] == expected
        whole = reference.logits(weights, config, ids + expected)
        for k in range(8):  # cache invariance: decode against a full forward
            ours, theirs = logits[f"r{i}", 0, len(ids) + k], whole[len(ids) + k - 1]
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("shape", ["1b", "mha"])  # mha: tp does not divide its vocabulary of 271
def test_ranks_agree_on_greedy_tokens_without_gathering_logits(shape, tp):
    """Also where the best token is there twice: the lower id wins, in one shard or over two."""
    config = SHRUNK[shape]
    weights = reference.random_weights(table(config))
    if not config.tied:
        head, half = weights["output.weight"], config.vocab_size // 2
        head[half : 2 * half] = head[:half]
    tokens, logits, _ = served(tp, ALONE, config=config, weights=weights, runner=Runner)
    assert not logits  # none came to the driver
    for i, ids in enumerate(PROMPTS):
        assert tokens[f"r{i}", 0] == reference.greedy(weights, config, ids, 8)


SEEDED = [
    (f"r{i}", ids, {"seed": 5 + i, "max_tokens": 12, "n": 2, **params})
    for i, (ids, params) in enumerate(
        zip(
            PROMPTS,
            (
                {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
                {"temperature": 1.3, "top_p": 0.3},
                {"min_p": 0.2, "top_p": 1.0},
                {"temperature": 1.0, "top_p": 1.0},
                {"top_p": 0.999},
                {"temperature": 0.9, "top_k": 3, "repetition_penalty": 1.2},
            ),
        )
    )
]

SAMPLED = [(f"s{name}", ids, params) for name, ids, params in SEEDED]


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("shape", ["8b", "mha"])
def test_the_same_seed_gives_the_same_tokens_at_every_tp(shape, tp):
    """Filters, whole distributions and penalties, from shortlists where these decide, against one
    rank's whole logits."""
    expected, _, _ = served(1, SEEDED, config=SHRUNK[shape])
    tokens, _, _ = served(tp, SEEDED, config=SHRUNK[shape], runner=Runner)
    assert tokens == expected and len({tuple(ids) for ids in tokens.values()}) == 2 * len(SEEDED)


@pytest.mark.parametrize("shape, tp", cases(["1b", "mha"], quick=[("1b", 1), ("mha", 2)]))
def test_replayed_decodes_and_steps_planned_ahead_change_no_token(shape, tp):
    """As on CUDA: greedy, filtered and driver-chosen tokens, in a crowd that preempts, against the
    plain way."""
    options = {"config": SHRUNK[shape], "runner": Runner}
    expected, _, _ = served(1, [*ALONE, *SAMPLED], **options)
    tokens, _, _ = served(tp, [*ALONE, *SAMPLED], **options, graphs=True)
    assert tokens == expected
    crowded, _, _ = served(tp, CROWD, **options, graphs=True, **TIGHT)
    assert all(crowded[f"r{i}", 0] == expected[f"r{i}", 0] for i in range(len(PROMPTS)))


@pytest.fixture(scope="module")
def baseline():
    """Bits of each request run alone on one rank, by (shape, dtype, fast); computed once."""
    known = {}

    def of(shape: str, dtype: str, fast: bool = True) -> dict:
        if (shape, dtype, fast) not in known:
            known[shape, dtype, fast] = {}
            for request in ALONE:
                _, logits, _ = served(
                    1,
                    [request],
                    config=SHRUNK[shape],
                    dtype=DTYPES[dtype],
                    deterministic=True,
                    fast=fast,
                )
                known[shape, dtype, fast] |= logits
        return known[shape, dtype, fast]

    return of


@pytest.mark.parametrize(
    "shape, dtype, tp",
    cases(
        ["1b", "8b", "wide", "70b", "405b"],
        DTYPES,
        quick=[
            ("1b", "bf16", 2),
            ("8b", "bf16", 1),
            ("8b", "bf16", 2),
            ("8b", "bf16", 4),
            ("8b", "fp32", 2),
            ("wide", "bf16", 2),
        ],
    ),
)
def test_deterministic_bits(shape, dtype, tp, baseline):
    deterministic_bits(shape, dtype, tp, baseline)


@pytest.mark.parametrize("dtype, tp", cases(DTYPES, quick=[("bf16", 2)]))
def test_deterministic_bits_in_plain_torch(dtype, tp, baseline):
    deterministic_bits("8b", dtype, tp, baseline, fast=False)


def deterministic_bits(shape, dtype, tp, baseline, fast=True):
    """--deterministic: alone at tp 1 = together at tp n = in a crowd with chunks, preemptions and
    prefix hits at tp n."""
    options = {"config": SHRUNK[shape], "dtype": DTYPES[dtype], "deterministic": True, "fast": fast}
    _, together, _ = served(tp, ALONE, **options)
    same_bits(together, baseline(shape, dtype, fast))
    _, crowded, _ = served(tp, CROWD, **options, **TIGHT)
    same_bits(crowded, baseline(shape, dtype, fast))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_and_plain_agree_within_rounding(dtype, baseline):
    """The C++ kernels against plain torch through a whole model: logits of the same step differ by
    roundings only."""
    fast, plain = baseline("8b", dtype, True), baseline("8b", dtype, False)
    # later steps may follow another token
    first = [(f"r{i}", 0, len(ids)) for i, ids in enumerate(PROMPTS)]
    for key in first:
        limit = {"fp32": 1e-4, "bf16": 4e-2}[dtype] * plain[key].abs().max()
        assert (fast[key] - plain[key]).abs().max() < limit


def test_deterministic_bits_with_two_threads(baseline):
    """One rank with two threads gives the bits of one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, together, _ = served(
            1, ALONE, config=SHRUNK["8b"], dtype=torch.bfloat16, deterministic=True
        )
    finally:
        torch.set_num_threads(before)
    same_bits(together, baseline("8b", "bf16"))


def test_the_crowd_is_rough():
    """The crowd of the tests above really chunks, preempts and hits prefixes (else they would prove
    nothing)."""
    options = {key: value for key, value in TIGHT.items() if key != "arrivals"}
    one = engine(single_rank(), SHRUNK["8b"], **options)
    queue = list(CROWD)
    while queue or one.has_work:
        if queue:
            name, ids, params = queue.pop(0)
            one.submit(Request(name, ids, SamplingParams(**params)))
        one.step()
    assert one.scheduler.n_preemptions > 0
    assert one.scheduler.prefix_hit_tokens > 0
    assert max(map(len, PROMPTS)) > 10 * TIGHT["step_tokens"]


def test_batch_invariance_of_sampled_tokens():
    """Seeded samples do not depend on the company, at any tp."""
    params = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 12, "seed": 5, "n": 2}
    mine = ("mine", PROMPTS[1], params)
    alone, _, _ = served(1, [mine], config=SHRUNK["8b"])
    crowded, _, _ = served(2, [CROWD[0], mine, *CROWD[1:]], config=SHRUNK["8b"], **TIGHT)
    assert alone["mine", 0] != alone["mine", 1]
    for sample in (0, 1):
        assert crowded["mine", sample] == alone["mine", sample]


def test_odd_sizes_are_padded():
    """A vocabulary and an FFN width that tp does not divide: the reference's tokens, and the same
    bits."""
    config = SHRUNK["mha"]  # vocabulary 271, FFN 200
    weights = reference.random_weights(table(config))
    for tp in (2, 4):
        tokens, _, _ = served(tp, ALONE[:2], config=config)
        assert tokens["r0", 0] == reference.greedy(weights, config, PROMPTS[0], 8)
        assert tokens["r1", 0] == reference.greedy(weights, config, PROMPTS[1], 8)


@pytest.mark.slow
def test_sixteen_ranks_share_eight_kv_heads():
    config = SHRUNK["8b"]
    weights = reference.random_weights(table(config))
    tokens, _, _ = served(16, ALONE[:3], config=config)
    for i in range(3):
        assert tokens[f"r{i}", 0] == reference.greedy(weights, config, PROMPTS[i], 8)
