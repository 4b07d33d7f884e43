"""Paged grouped-query attention in plain torch: every device and dtype, and what the other backends
are tested against.

Every query row gets the same bits whatever else is in the step, however the prompt was cut into
chunks and on however many ranks the heads are spread:

* A row's scores and weighted values are rows of fp32 matrix products with at least MIN_ROWS rows.
  From 4 rows on MKL's bits for a row depend neither on its place nor on the number of rows, of
  columns or of matrices in the batch (measured: torch 2.13, AVX512, head dims 2 to 128, 1 and 2
  threads); below it takes a matrix-vector kernel.
* Values have a multiple of WIDTH columns there, zeros if need be: at 6 and 10 MKL sums the last two
  columns of an odd row in another order than those of an even one (measured so).
* The context is padded to whole tiles of TILE slots; torch's softmax over a row does not change
  when -inf is appended in multiples of the vector width.
* The weighted sum of values runs tile by tile, in order: later, masked tiles add exact zeros.

It knows blocks and positions, not requests.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llama_tp.backends.base import LayerShape, Span
from llama_tp.backends.kv_cache import KVCache, Slots, on_device

TILE = 256  # context slots summed by one matrix product; a multiple of every block size
# rows of every product: 4 suffice as measured, 16 leaves a margin for other kernels
MIN_ROWS = 16
WIDTH = 8  # columns of values come in multiples of so many
QUERY_CHUNK = 128  # prefill rows attended at once: keeps early rows from scoring a long chunk's end
SCORES_LIMIT = 1 << 25  # fp32 scores held at once (128 MiB)
# positions whose keys and values a captured step may gather in a layer: 256 MiB of an 8B model's
GATHER_LIMIT = 1 << 16


class TilePlan(ABC):
    """How a step is attended."""

    @abstractmethod
    def attend(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        """q: (T, H, E); caches: (N, K, S, E), one layer -> (T, H, E) in q's dtype."""


class TileAttention:
    """An Attention whose cache blocks are (K, S, E): local KV head, slot, head dim."""

    name = "torch"
    block_size = 16  # small enough that short prompts share prefixes

    def __init__(self, shape: LayerShape, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device

    def new_cache(self, n_layers: int, n_blocks: int, block_size: int | None = None) -> KVCache:
        S = block_size or self.block_size
        block_shape = (self.shape.n_kv_heads, S, self.shape.head_dim)
        return KVCache(n_layers, n_blocks, S, block_shape, self.dtype, self.device)

    def plan(self, spans: list[Span], cache: KVCache, n_tokens: int) -> TilePlan:
        return plan(spans, self.shape.n_heads, cache.block_size, cache.empty, self.device)

    def plan_decodes(self, table: torch.Tensor, positions: torch.Tensor) -> TilePlan:
        return GatheredDecodes(table, positions + 1)

    def table_widths(self, n_rows: int, most: int) -> list[int]:
        """Blocks of the whole table are gathered: contexts of up to 512 positions, 2,048 and so on,
        as far as memory should be spent."""
        widths = {min(most, 32 << shift) for shift in range(0, 2 * most.bit_length(), 2)}
        return [
            width for width in sorted(widths) if n_rows * width * self.block_size <= GATHER_LIMIT
        ]

    def write(
        self, cache: KVCache, layer: int, slots: Slots, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        k_cache, v_cache = cache.layers[layer]
        k_cache[slots.blocks, :, slots.offsets] = k
        v_cache[slots.blocks, :, slots.offsets] = v

    def attend(self, q: torch.Tensor, cache: KVCache, layer: int, plan: TilePlan) -> torch.Tensor:
        return plan.attend(q, *cache.layers[layer])


class GatheredDecodes(TilePlan):
    """One row for each of B sequences, whose lengths the host does not know: every block of the
    tables is gathered, and what lies beyond a sequence masked. No promise about bits.

    table: (B, W) int32 block ids; used: (B,), the context, this step's position included.
    """

    def __init__(self, table: torch.Tensor, used: torch.Tensor):
        self.table, self.used = table, used

    def attend(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        (B, W), (_, K, S, E) = self.table.shape, k_cache.shape
        seen = torch.arange(W * S, device=q.device) < self.used.unsqueeze(1)  # (B, M)
        k, v = (
            cache[self.table.long()].transpose(1, 2).reshape(B, K, W * S, E)
            for cache in (k_cache, v_cache)
        )
        # (B, K, G, E)
        out = F.scaled_dot_product_attention(
            q.view(B, K, -1, E), k, v, attn_mask=seen[:, None, None]
        )
        return out.reshape(B, -1, E)


@dataclass
class Group:
    """B sequences with n query rows each, attended together."""

    rows: torch.Tensor  # (B * n,) int64: their rows in the step
    n: int
    table: torch.Tensor  # (B, M / S) int64 block ids, padded with the empty block
    masked: torch.Tensor  # (B, 1, n, 1, M) bool: True where a query must not see the slot


@dataclass
class Groups(TilePlan):
    """A step cut into groups. Rows outside all groups are zero."""

    groups: list[Group]

    def attend(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(q)
        for group in self.groups:
            out[group.rows] = _attend_group(q[group.rows], k_cache, v_cache, group).to(q.dtype)
        return out


def plan(
    spans: list[Span], n_heads: int, block_size: int, empty_block: int, device: torch.device
) -> Groups:
    """Cuts a step into groups, once for all layers: decodes of like context together, prefills in
    chunks of rows.

    Args:
        spans: the step's sequences.
        n_heads: query heads on this rank, to bound the scores held at once.
        empty_block: a block of zeros, for the end of padded tables: another request's block could
            hold a NaN, which masking takes out of the scores but not out of 0 * NaN in the sum of
            values.
    """
    decodes: dict[int, list[Span]] = {}
    groups = []
    for span in spans:
        if span.n == 1:
            tiles = -(-(span.start + 1) // TILE)
            decodes.setdefault(1 << (tiles - 1).bit_length(), []).append(span)  # at most 2x padding
            continue
        step = max(1, min(QUERY_CHUNK, SCORES_LIMIT // (n_heads * (span.start + span.n))))
        for at in range(0, span.n, step):
            part = Span(span.row + at, span.start + at, min(step, span.n - at), span.blocks)
            groups.append(_group([part], block_size, empty_block, device))
    for tiles, alike in sorted(decodes.items()):
        step = max(1, SCORES_LIMIT // (tiles * TILE * max(n_heads, MIN_ROWS)))
        groups += [
            _group(alike[at : at + step], block_size, empty_block, device)
            for at in range(0, len(alike), step)
        ]
    return Groups(groups)


def _group(spans: list[Span], block_size: int, empty_block: int, device: torch.device) -> Group:
    n = spans[0].n
    M = TILE * max(-(-(s.start + n) // TILE) for s in spans)
    table = torch.full((len(spans), M // block_size), empty_block, dtype=torch.int64)
    for i, span in enumerate(spans):
        used = -(-(span.start + n) // block_size)
        table[i, :used] = torch.tensor(span.blocks[:used])
    first = torch.tensor([[s.row, s.start] for s in spans])  # (B, 2)
    rows = (first[:, :1] + torch.arange(n)).flatten()  # (B * n,)
    positions = first[:, 1:] + torch.arange(n)  # (B, n)
    masked = torch.arange(M) > positions[:, :, None]  # (B, n, M)
    return Group(
        on_device(rows, device),
        n,
        on_device(table, device),
        on_device(masked[:, None, :, None], device),
    )


def _attend_group(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: Group
) -> torch.Tensor:
    (B, n_blocks), n = group.table.shape, group.n
    _, K, S, E = k_cache.shape
    G, M = q.shape[1] // K, n_blocks * S
    q = q.float().view(B, n, K, G, E).transpose(1, 2).reshape(B * K, n * G, E) * (1 / math.sqrt(E))
    if n * G < MIN_ROWS:
        q = F.pad(q, (0, 0, 0, MIN_ROWS - n * G))  # (B * K, R, E)
    k = _gather(k_cache, group.table)  # (B * K, M, E)
    scores = torch.bmm(q, k.transpose(1, 2))[:, : n * G]  # (B * K, n * G, M)
    scores = scores.reshape(B, K, n, G, M).masked_fill_(group.masked, -math.inf)
    weights = torch.softmax(scores, dim=-1).view(B * K, n * G, M)
    if n * G < MIN_ROWS:
        weights = F.pad(weights, (0, 0, 0, MIN_ROWS - n * G))  # (B * K, R, M)
    v = _gather(v_cache, group.table)  # (B * K, M, E)
    if E % WIDTH:
        v = F.pad(v, (0, -E % WIDTH))
    out = torch.bmm(weights[:, :, :TILE], v[:, :TILE])  # (B * K, R, E)
    for at in range(TILE, M, TILE):
        out += torch.bmm(weights[:, :, at : at + TILE], v[:, at : at + TILE])
    return out[:, : n * G, :E].reshape(B, K, n, G, E).transpose(1, 2).reshape(B * n, K * G, E)


def _gather(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The blocks of B sequences side by side, one matrix a head. (N, K, S, E), (B, n) -> (B * K, n
    * S, E) fp32."""
    _, K, S, E = cache.shape
    B, n = table.shape
    # (B, K, n, S, E)
    blocks = cache.index_select(0, table.flatten()).view(B, n, K, S, E).transpose(1, 2)
    return blocks.to(torch.float32, memory_format=torch.contiguous_format).reshape(B * K, n * S, E)
