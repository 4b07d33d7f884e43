"""Layers in one call of C++ each against the same functions called one by one: the same bits, on 1,
2 and 4 real ranks."""

from dataclasses import replace

import pytest
import torch

from llama_tp.arch.weights import table
from llama_tp.backends.base import ForwardBatch, Span
from llama_tp.backends.kv_cache import Slots
from llama_tp.backends.layer.native import NativeLayers
from llama_tp.model.build import choose_backends, from_weights, plain_backends
from llama_tp.native.library import load
from llama_tp.parallel.groups import single_rank
from tests import reference
from tests.engines import shard_of
from tests.ranks import run
from tests.shapes import SHRUNK

NEEDS_LIBRARY = pytest.mark.skipif(
    load() is None, reason="the C++ parts are not built here: python -m llama_tp.native.build"
)
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


def batch(model, cache, parts, n_padding: int) -> ForwardBatch:
    ids, positions, blocks, spans = [], [], [], []
    for sequence, start, n in parts:
        spans.append(Span(len(ids), start, n, TABLES[sequence]))
        positions += range(start, start + n)
        blocks += [TABLES[sequence][p // S] for p in range(start, start + n)]
        ids += [(13 * p + 5 * sequence) % 251 for p in range(start, start + n)]
    flat = torch.tensor(
        [ids + [0] * n_padding, positions + [0] * n_padding, blocks + [cache.trash] * n_padding]
    )
    plan = model.backends.attention.plan(spans, cache, len(flat[0]))
    return ForwardBatch(flat[0], flat[1], Slots(flat[2], flat[1] % S), plan)


def hidden(
    ranks, shape: str, dtype: torch.dtype, deterministic: bool, one_by_one: bool
) -> list[torch.Tensor]:
    """What each of STEPS gives, and the cache that they leave."""
    config = SHRUNK[shape]
    model = from_weights(
        config,
        ranks,
        dtype,
        64,
        reference.random_weights(table(config), dtype=dtype),
        deterministic,
    )
    if one_by_one:
        model.run_layers = model.layer_by_layer
    else:
        assert isinstance(model.run_layers, NativeLayers) and not model.backends.not_taken
    cache = model.backends.attention.new_cache(config.n_layers, 8)
    with torch.inference_mode():
        return [model(batch(model, cache, *step), cache) for step in STEPS] + [cache.k, cache.v]


@NEEDS_LIBRARY
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


def test_plain_backends_go_layer_by_layer():
    config, ranks = SHRUNK["1b"], single_rank()
    backends = plain_backends(shard_of(config, ranks), ranks, torch.float32)
    weights = reference.random_weights(table(config))
    model = from_weights(config, ranks, torch.float32, 64, weights, backends=backends)
    assert model.run_layers == model.layer_by_layer


def on_gloo(ranks) -> tuple[list[torch.Tensor], tuple[str, ...]]:
    ranks = replace(ranks, communicator=None)
    backends = choose_backends(shard_of(SHRUNK["1b"], ranks), ranks, torch.float32, True)
    return hidden(ranks, "1b", torch.float32, True, True), backends.not_taken


@NEEDS_LIBRARY
def test_without_shared_memory_layers_go_one_by_one_with_the_same_bits_and_it_is_said():
    theirs = run(2, hidden, "1b", torch.float32, True, False)
    for (ours, not_taken), expected in zip(run(2, on_gloo), theirs):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected))
        assert len(not_taken) == 1 and "not in shared memory" in not_taken[0]
