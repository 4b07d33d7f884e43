"""The C++ attention and elementwise kernels against plain torch, and a row's bits against the
company it is in."""

import copy

import pytest
import torch

from llama_tp.backends.attention.native import NativeAttention
from llama_tp.backends.attention.tiles import TileAttention
from llama_tp.backends.base import LayerShape, Span
from llama_tp.backends.elementwise.native import NativeElementwise
from llama_tp.backends.kv_cache import KVCache, Slots
from llama_tp.model.llama import TorchElementwise
from llama_tp.native.calls import Functions
from llama_tp.native.library import load

pytestmark = pytest.mark.skipif(
    load() is None, reason="the C++ parts are not built here: python -m llama_tp.native.build"
)

S = 16
DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
}
HEADS = [
    (8, 2, 16),
    (4, 4, 32),
    (6, 1, 20),
    (8, 1, 64),
    (16, 2, 128),
    (32, 8, 4),
    (2, 1, 2),
    (9, 3, 80),
]
SPANS = [(0, 1), (17, 1), (0, 40), (300, 200), (599, 1), (255, 1), (256, 1), (1500, 3)]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(dtype):
    return TorchElementwise(), NativeElementwise(Functions(load(), dtype))


def attentions(heads: int, kv_heads: int, head_dim: int, dtype):
    shape = LayerShape(32, heads, kv_heads, head_dim, 8, 1e-5, 1, 1)
    plain = TileAttention(shape, dtype, torch.device("cpu"))
    return plain, NativeAttention(Functions(load(), dtype), shape)


def cache_of(heads: int, kv_heads: int, head_dim: int, dtype, n_blocks=400) -> KVCache:
    cache = attentions(heads, kv_heads, head_dim, dtype)[0].new_cache(1, n_blocks)
    cache.k[:, :n_blocks], cache.v[:, :n_blocks] = (
        normal(1, n_blocks, kv_heads, S, head_dim, dtype=dtype, seed=s) for s in (5, 6)
    )
    return cache


def as_native(cache: KVCache) -> KVCache:
    """The same contents in the order of the C++ kernels: 16 slots' numbers of one dimension side by
    side (bf16: of a pair of dimensions where the machine multiplies pairs), and values in pairs of
    slots there."""
    L, N, K, _, E = cache.k.shape
    P = Functions(load(), cache.k.dtype).inputs_together or 2
    regrouped = copy.copy(cache)
    regrouped.k = (
        cache.k.view(L, N, K, S // 16, 16, E // P, P)
        .transpose(4, 5)
        .reshape(cache.k.shape)
        .contiguous()
    )
    regrouped.v = (
        cache.v.view(L, N, K, S // 16, 16 // P, P, E)
        .transpose(5, 6)
        .reshape(cache.v.shape)
        .contiguous()
    )
    regrouped.layers = list(zip(regrouped.k, regrouped.v))
    return regrouped


def scattered(shapes) -> tuple[list[Span], int]:
    """Spans (start, n) one after the other in a step, over blocks in no order; -> spans, rows."""
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1)).tolist()
    spans, row = [], 0
    for start, n in shapes:
        spans.append(Span(row, start, n, [order.pop() for _ in range(-(-(start + n) // S))]))
        row += n
    return spans, row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_attention(heads, kv_heads, head_dim, dtype):
    cache = cache_of(heads, kv_heads, head_dim, dtype)
    spans, rows = scattered(SPANS)
    # q is a part of qkv; 2 padding rows
    qkv = normal(rows + 2, heads + 3, head_dim, dtype=dtype, seed=2)
    expected, ours = (
        attention.attend(qkv[:, :heads], its, 0, attention.plan(spans, its, rows + 2))
        for attention, its in zip(
            attentions(heads, kv_heads, head_dim, dtype), (cache, as_native(cache))
        )
    )
    torch.testing.assert_close(ours, expected, **CLOSE[dtype])
    assert not ours[rows:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_attention_bits_of_a_row_are_its_own(heads, kv_heads, head_dim, dtype):
    """Alone, in company, in one chunk or many, with all heads or one rank's, on one thread or
    two."""
    cache = cache_of(heads, kv_heads, head_dim, dtype)
    _, native = attentions(heads, kv_heads, head_dim, dtype)
    spans, rows = scattered(SPANS)
    q = normal(rows, heads, head_dim, dtype=dtype, seed=2)
    whole = native.attend(q, cache, 0, native.plan(spans, cache, rows))
    for span in spans:
        for at in range(0, span.n, 7):
            part = slice(span.row + at, span.row + min(at + 7, span.n))
            alone = Span(0, span.start + at, part.stop - part.start, span.blocks)
            plan = native.plan([alone], cache, alone.n)
            out = native.attend(q[part].contiguous(), cache, 0, plan)
            assert torch.equal(out, whole[part])
    G, one = heads // kv_heads, cache_of(heads // kv_heads, 1, head_dim, dtype)
    one.k[:], one.v[:] = cache.k[:, :, -1:], cache.v[:, :, -1:]
    _, one_head = attentions(G, 1, head_dim, dtype)
    out = one_head.attend(q[:, -G:].contiguous(), one, 0, one_head.plan(spans, one, rows))
    assert torch.equal(out, whole[:, -G:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(native.attend(q, cache, 0, native.plan(spans, cache, rows)), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decodes_planned_from_tensors_are_those_planned_from_spans(dtype):
    cache, (_, native) = cache_of(4, 2, 16, dtype), attentions(4, 2, 16, dtype)
    spans, rows = scattered([(0, 1), (17, 1), (600, 1)])
    width = max(len(span.blocks) for span in spans)
    tables = [span.blocks + [cache.empty] * (width - len(span.blocks)) for span in spans]
    table = torch.tensor(tables, dtype=torch.int32)
    given = native.plan_decodes(table, torch.tensor([span.start for span in spans]))
    q = normal(rows, 4, 16, dtype=dtype)
    expected = native.attend(q, cache, 0, native.plan(spans, cache, rows))
    assert torch.equal(native.attend(q, cache, 0, given), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 37, 256, 2048])
@pytest.mark.parametrize("T", [1, 5])
def test_add_norm(T, D, dtype):
    x, delta, weight = (
        normal(T, D, dtype=dtype),
        normal(T, D, dtype=dtype, seed=1),
        normal(D, dtype=dtype, seed=2),
    )
    for added in (None, delta):
        results = []
        for kernels in both(dtype):
            sum_ = x.clone()
            results.append((kernels.add_norm(sum_, added, weight, 1e-5), sum_))
        (expected, expected_sum), (ours, our_sum) = results
        assert torch.equal(our_sum, expected_sum)
        torch.testing.assert_close(ours, expected, **CLOSE[dtype])
    alone = both(dtype)[1].add_norm(x[-1:].clone(), delta[-1:], weight, 1e-5)
    assert torch.equal(alone, ours[-1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads, head_dim", HEADS)
def test_rotation_and_cache_write(heads, kv_heads, head_dim, dtype):
    T, blocks = 5, torch.tensor([3, 3, 0, 7, 9])
    offsets = torch.tensor([14, 15, 0, 1, 8])
    angles = normal(T, 1, head_dim // 2, seed=3)
    qkv = normal(T, heads + 2 * kv_heads, head_dim, dtype=dtype)
    results = []
    for elementwise, attention, order in zip(
        both(dtype), attentions(heads, kv_heads, head_dim, dtype), (lambda cache: cache, as_native)
    ):
        cache = order(cache_of(heads, kv_heads, head_dim, dtype, n_blocks=10))
        qk, v = qkv.clone().split((heads + kv_heads, kv_heads), dim=1)
        rotated = elementwise.rotate(qk, angles.cos(), angles.sin())
        q, k = rotated.split((heads, kv_heads), dim=1)
        attention.write(cache, 0, Slots(blocks, offsets), k, v)
        results.append((q, cache))
    (expected, there), (ours, here) = results
    there = as_native(there)
    torch.testing.assert_close(ours, expected, **CLOSE[dtype])
    torch.testing.assert_close(here.k, there.k, **CLOSE[dtype])
    assert torch.equal(here.v, there.v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("F", [16, 50, 512])
def test_silu_mul(F, dtype):
    x = 20 * normal(3, 2 * F, dtype=dtype)
    x[0, :4] = torch.tensor([-1000.0, 1000.0, 0.0, -0.0]).to(dtype)
    expected, ours = (kernels.silu_mul(x) for kernels in both(dtype))
    torch.testing.assert_close(ours, expected, **CLOSE[dtype])
    # another rank's part of the FFN
    half = torch.cat([x[:, F // 2 : F], x[:, F + F // 2 :]], dim=1).contiguous()
    assert torch.equal(both(dtype)[1].silu_mul(half), ours[:, F // 2 :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_through_and_stays_in_its_row(dtype):
    kernels, (_, attention) = (
        NativeElementwise(Functions(load(), dtype)),
        attentions(2, 1, 16, dtype),
    )
    nan = normal(2, 64, dtype=dtype)
    nan[1, 5] = float("nan")
    normed = kernels.add_norm(nan.clone(), None, normal(64, dtype=dtype), 1e-5)
    assert normed[0].isfinite().all() and normed[1].isnan().all()
    assert kernels.silu_mul(nan)[1].isnan().sum() == 1
    cache = cache_of(2, 1, 16, dtype)
    spans, rows = scattered([(20, 1), (40, 1)])
    cache.k[0, spans[1].blocks[0]] = float("nan")
    out = attention.attend(
        normal(rows, 2, 16, dtype=dtype), cache, 0, attention.plan(spans, cache, rows)
    )
    assert out[0].isfinite().all() and out[1].isnan().all()
