"""Paged attention against torch's own, over scattered blocks, chunks, grouped heads and long
contexts."""

import pytest
import torch
import torch.nn.functional as F

from llama_tp.backends.attention import tiles
from llama_tp.backends.attention.tiles import TileAttention, plan
from llama_tp.backends.base import LayerShape, Span

CPU = torch.device("cpu")
S = 16
EMPTY = 120  # a block of zeros in the caches below, behind at most 120 others


def caches(n_kv_heads: int, head_dim: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shape = (EMPTY + 1, n_kv_heads, S, head_dim)
    made = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    for cache in made:
        cache[EMPTY] = 0
    return made


def expected(q, k_cache, v_cache, span: Span) -> torch.Tensor:
    """torch's scaled_dot_product_attention on one sequence. q: (n, H, E)."""
    M = span.start + span.n
    k, v = ([cache[b] for b in span.blocks] for cache in (k_cache, v_cache))
    k, v = (torch.cat(blocks, dim=1)[:, :M].float() for blocks in (k, v))  # (K, M, E)
    mask = torch.arange(M) <= torch.arange(span.start, M)[:, None]
    G = q.shape[1] // len(k)
    out = F.scaled_dot_product_attention(
        q.float().transpose(0, 1), k.repeat_interleave(G, 0), v.repeat_interleave(G, 0), mask
    )
    return out.transpose(0, 1)


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(8, 2, 16), (4, 4, 32), (6, 1, 20)])
def test_mixed_step_equals_sdpa(heads, kv_heads, head_dim):
    k_cache, v_cache = caches(kv_heads, head_dim)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1)).tolist()
    spans, row = [], 0
    for start, n in ((0, 1), (17, 1), (0, 40), (300, 200), (599, 1), (255, 1), (256, 1)):
        blocks = [order.pop() if len(order) > 1 else order[0] for _ in range(-(-(start + n) // S))]
        spans.append(Span(row, start, n, blocks))
        row += n
    # 2 padding rows
    q = torch.randn(row + 2, heads, head_dim, generator=torch.Generator().manual_seed(2))
    out = plan(spans, heads, S, EMPTY, CPU).attend(q, k_cache, v_cache)
    for span in spans:
        rows = slice(span.row, span.row + span.n)
        torch.testing.assert_close(
            out[rows], expected(q[rows], k_cache, v_cache, span), rtol=1e-4, atol=1e-5
        )
    assert not out[row:].any()


def test_limits_on_scores_change_no_bits(monkeypatch):
    """However a step is cut to bound memory, each row's bits stay."""
    k_cache, v_cache = caches(2, 16)
    spans = [
        Span(0, 0, 200, list(range(13))),
        Span(200, 330, 1, list(range(13, 34))),
        Span(201, 40, 1, [34, 35, 36]),
    ]
    q = torch.randn(202, 8, 16, generator=torch.Generator().manual_seed(3))
    whole = plan(spans, 8, S, EMPTY, CPU).attend(q, k_cache, v_cache)
    for limit, chunk in ((1, 128), (20_000, 50), (1 << 25, 7)):
        monkeypatch.setattr(tiles, "SCORES_LIMIT", limit)
        monkeypatch.setattr(tiles, "QUERY_CHUNK", chunk)
        assert torch.equal(plan(spans, 8, S, EMPTY, CPU).attend(q, k_cache, v_cache), whole)


def test_a_nan_left_behind_reaches_nobody():
    attention = TileAttention(LayerShape(32, 4, 2, 16, 8, 1e-5, 1, 1), torch.float32, CPU)
    cache = attention.new_cache(1, 4)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    cache.clear([0, 2, cache.empty])
    spans = [Span(0, 20, 1, [0, 2])]
    out = attention.attend(torch.ones(1, 4, 16), cache, 0, attention.plan(spans, cache, 1))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("G", [1, 2, 3, 4])
def test_a_row_has_its_bits_in_any_chunk_at_any_head_width(G, dtype):
    """40 rows across the end of a tile, cut into two at every place. (At head widths 6 and 10 a
    row's bits depended on whether its place in the product is odd: torch 2.13, Zen 5.)"""
    n, start, blocks = 40, 236, list(range(18))
    for head_dim in (*range(2, 17, 2), 20, 24, 32, 64, 128):
        k_cache, v_cache = caches(2, head_dim, dtype)
        q = torch.randn(n, 2 * G, head_dim, generator=torch.Generator().manual_seed(4)).to(dtype)
        whole = plan([Span(0, start, n, blocks)], 2 * G, S, EMPTY, CPU).attend(q, k_cache, v_cache)
        for cut in range(1, n):
            parts = [
                plan([Span(0, start + at, end - at, blocks)], 2 * G, S, EMPTY, CPU).attend(
                    q[at:end], k_cache, v_cache
                )
                for at, end in ((0, cut), (cut, n))
            ]
            assert torch.equal(torch.cat(parts), whole), (head_dim, cut)
