"""Every function with several OpenMP threads: the same bits as with one. Under ThreadSanitizer
(make sanitize) these are the tests whose parallel loops it watches."""

from array import array

import pytest
import torch

from llama_tp.native.calls import (
    DTYPES,
    Functions,
    Layers,
    LayerSizes,
    LayerTensors,
    Numerators,
    padded,
    read_all,
)
from llama_tp.native.library import load

pytestmark = pytest.mark.skipif(
    load() is None, reason="the C++ parts are not built here: python -m llama_tp.native.build"
)

# A prompt of 90 rows and two sequences that decode, one over several tiles of 256 slots.
SPANS = array("q", [0, 5, 90, 0, 90, 300, 1, 6, 91, 3, 1, 25])
TABLES = array("i", [*range(6), *range(10, 29), 7])
T, D, H, K, E, F, N, S = 92, 64, 8, 2, 16, 48, 30, 16
FLAT = [5 + t for t in range(90)]  # positions of the prompt's rows
BLOCKS = torch.tensor([p // S for p in FLAT] + [28, 7])
OFFSETS = torch.tensor([p % S for p in FLAT] + [300 % S, 3])


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(f: Functions, n_out: int, n_in: int) -> torch.Tensor:
    weight = normal(padded(n_out), n_in, dtype=f.dtype)
    f.pack(weight)
    return weight


def attention(f: Functions, cache) -> list[torch.Tensor]:
    """Rotated, written to the cache and attended with, part by part."""
    qkv, angles = normal(T, H + 2 * K, E, dtype=f.dtype), normal(T, 1, E // 2, seed=1)
    f.rotate(qkv[:, : H + K], angles.cos(), angles.sin())
    f.write_kv(qkv[:, H : H + K], qkv[:, H + K :], BLOCKS, OFFSETS, *cache)
    return [qkv, *cache, f.attend(qkv[:, :H], *cache, SPANS, TABLES, True)]


def layers(f: Functions, cache) -> list[torch.Tensor]:
    ones = torch.ones(D, dtype=f.dtype)
    shapes = ((H + 2 * K) * E, D), (D, H * E), (2 * F, D), (D, F)
    wqkv, wo, w13, w2 = (packed(f, *shape) for shape in shapes)
    runner = Layers(
        f, [LayerTensors(ones, wqkv, wo, ones, w13, w2)], LayerSizes(H, K, E, F, 1e-5, n_chunks=2)
    )
    angles, x = normal(T, 1, E // 2, seed=1), normal(T, D, dtype=f.dtype)
    step = runner.step(T, angles.cos(), angles.sin(), BLOCKS, OFFSETS, SPANS, TABLES, True)
    out = runner(x, step, [tuple(cache)])
    assert out is not None
    return [x, out, *cache]


def everything(dtype: torch.dtype, n_threads: int) -> list[torch.Tensor]:
    """What each function gives with so many threads."""
    torch.set_num_threads(n_threads)
    f, numerators = Functions(load(), dtype), Numerators(load())
    x, weight = normal(600, D, dtype=dtype), packed(f, 200, D)
    logits = normal(3, 5000), torch.full((3, 1), 0.7), torch.full((3, 1), 5.0)
    cache = list(normal(2, N, K, S, E, dtype=dtype, seed=2))
    return [
        *attention(f, [each.clone() for each in cache]),
        *layers(f, [each.clone() for each in cache]),
        f.add_norm(x.clone(), x, torch.ones(D, dtype=dtype), 1e-5),
        f.silu_mul(x),
        weight,
        f.product(x, weight, 200, 2),
        f.partial_sums(x[:5], weight, 200, 4),
        f.embedding(weight, torch.arange(199, -1, -1), 200),
        numerators.softmax_numerators(*logits),
        numerators.chunk_sums(*logits, 1024),
        torch.tensor(read_all(load(), torch.arange(1 << 14, dtype=torch.int32)) % (1 << 62)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_bits(dtype):
    before = torch.get_num_threads()
    try:
        one, many = everything(dtype, 1), everything(dtype, 3)
    finally:
        torch.set_num_threads(before)
    for i, (ours, theirs) in enumerate(zip(many, one, strict=True)):
        assert torch.equal(ours, theirs) and ours.any(), i
