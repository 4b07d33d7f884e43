"""Layers in one call of C++ each against the same functions called one by one: the same bits, on 1,
2 and 4 real ranks."""

import pytest
import torch

from llama_tp.arch.weights import table
from llama_tp.model.attention import Span
from llama_tp.model.kernels import TorchKernels
from llama_tp.model.kv_cache import KVCache, Slots
from llama_tp.model.layer import Batch
from llama_tp.model.native_layers import NativeLayers
from llama_tp.model.transformer import build
from llama_tp.native.library import load
from llama_tp.parallel.groups import single_rank
from tests import reference
from tests.ranks import run
from tests.shapes import SHRUNK

S = 16
TABLES = [[1, 4], [0], [3, 2]]
# (sequence, first position, rows): a prompt and a row that decodes; one row; three sequences that
# decode; rows that nobody owns
STEPS = [
    ([(0, 0, 20), (1, 0, 1)], 0),
    ([(1, 1, 1)], 0),
    ([(0, 20, 1), (1, 2, 1), (2, 0, 1)], 0),
    ([(0, 21, 2)], 3),
]


def batch(model, cache, parts, n_padding: int) -> Batch:
    ids, positions, blocks, spans = [], [], [], []
    for sequence, start, n in parts:
        spans.append(Span(len(ids), start, n, TABLES[sequence]))
        positions += range(start, start + n)
        blocks += [TABLES[sequence][p // S] for p in range(start, start + n)]
        ids += [(13 * p + 5 * sequence) % 251 for p in range(start, start + n)]
    flat = torch.tensor(
        [ids + [0] * n_padding, positions + [0] * n_padding, blocks + [cache.trash] * n_padding]
    )
    plan = model.kernels.plan(spans, model.config.n_heads // model.ranks.tp, cache, len(flat[0]))
    return Batch(flat[0], flat[1], Slots(flat[2], flat[1] % S), plan)


def hidden(
    ranks, shape: str, dtype: torch.dtype, deterministic: bool, one_by_one: bool
) -> list[torch.Tensor]:
    """What each of STEPS gives, and the cache that they leave."""
    config = SHRUNK[shape]
    model = build(
        config,
        ranks,
        dtype,
        64,
        reference.random_weights(table(config), dtype=dtype),
        deterministic,
    )
    assert isinstance(model._in_one_call, NativeLayers)
    if one_by_one:
        model._in_one_call = None
    cache = KVCache(config, ranks.tp, 8, S, dtype, torch.device("cpu"))
    with torch.inference_mode():
        return [model(batch(model, cache, *step), cache) for step in STEPS] + [cache.k, cache.v]


@pytest.mark.skipif(
    load() is None, reason="the C++ parts are not built here: python -m llama_tp.native.build"
)
@pytest.mark.parametrize("tp", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", ""])
@pytest.mark.parametrize(
    "shape, dtype",
    [("1b", torch.float32), ("70b", torch.bfloat16), ("wide", torch.bfloat16)],
    ids=str,
)
def test_the_same_bits(shape, dtype, deterministic, tp):
    ours, theirs = (
        run(tp, hidden, shape, dtype, deterministic, one_by_one) for one_by_one in (False, True)
    )
    for of_rank, expected in zip(ours, theirs):
        assert all(torch.equal(a, b) for a, b in zip(of_rank, expected))
        assert all(each.isfinite().all() and each.any() for each in of_rank)


def test_torch_kernels_go_one_by_one():
    config = SHRUNK["1b"]
    model = build(
        config,
        single_rank(),
        torch.float32,
        64,
        reference.random_weights(table(config)),
        kernels=TorchKernels(),
    )
    assert model._in_one_call is None
