"""Paged grouped-query attention for one rank's heads: prefill chunks and decodes of a step, in a
fixed order.

Pure torch, the same on CPU and CUDA. Every query row gets the same bits whatever else is in the
step, however the prompt was cut into chunks and on however many ranks the heads are spread:

* a row's scores and weighted values are rows of fp32 matrix products with at least ROWS_FLOOR rows:
  from 4 rows on MKL's bits for a row depend neither on its place nor on the number of rows, of
  columns or of matrices in the batch (measured: torch 2.13, AVX512, head dims 2 to 128, 1 and 2
  threads; below it takes a matrix-vector kernel);
* values have a multiple of WIDTH columns there, zeros if need be: at 6 and 10 MKL sums the last two
  columns of an odd row in another order than those of an even one (measured so);
* the context is padded to whole tiles of TILE slots; torch's softmax over a row does not change
  when -inf is appended in multiples of the vector width;
* the weighted sum of values runs tile by tile, in order: later, masked tiles add exact zeros.

It knows blocks and positions, not requests.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llama_tp.model.kv_cache import on_device

TILE = 256  # context slots summed by one matrix product; a multiple of every block size
ROWS_FLOOR = (
    16  # rows of every product: 4 suffice as measured, 16 leaves communicator for other kernels
)
WIDTH = 8  # columns of values come in multiples of so many
QUERY_CHUNK = 128  # prefill rows attended at once: keeps early rows from scoring a long chunk's end
SCORES_LIMIT = 1 << 25  # fp32 scores held at once (128 MiB)


@dataclass
class Group:
    """B sequences with n query rows each, attended together."""

    rows: torch.Tensor  # (B * n,) int64: their rows in the step
    n: int
    table: torch.Tensor  # (B, M / S) int64 block ids, padded with the empty block
    hidden: torch.Tensor  # (B, 1, n, 1, M) bool: True where a query must not see the slot


class Span(NamedTuple):
    """Consecutive tokens of one sequence in a step: rows [row, row + n) are positions [start, start
    + n)."""

    row: int
    start: int
    n: int
    blocks: list[int]  # the sequence's block table, at least up to position start + n - 1


class Paged:
    """B sequences as tensors on the device, whatever their lengths: what a captured step can hold.

    table: (B, W) int32 block ids, padded with the empty block. used: (B,) int32, the context, this
        step's positions included.
    ends: (B + 1,) int32, where each sequence's rows begin, and the last one's end; key_ends: the
        same of the contexts.
    max_n: most rows of a sequence.
    """

    def __init__(self, table: torch.Tensor, used: torch.Tensor, ends: torch.Tensor, max_n: int):
        self.table, self.used, self.ends, self.max_n = table, used, ends, max_n
        self.key_ends = F.pad(used.cumsum(0, dtype=torch.int32), (1, 0))

    @classmethod
    def of(
        cls, tables: list[list[int]], used: list[int], ends: list[int], device: torch.device
    ) -> "Paged":
        """From ints; all tables of one length."""
        on = (
            on_device(torch.tensor(ints, dtype=torch.int32), device)
            for ints in (tables, used, ends)
        )
        return cls(*on, max(b - a for a, b in zip(ends, ends[1:])))


def plan(
    spans: list[Span], n_heads: int, block_size: int, empty_block: int, device: torch.device
) -> list[Group]:
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
        step = max(1, SCORES_LIMIT // (tiles * TILE * max(n_heads, ROWS_FLOOR)))
        groups += [
            _group(alike[at : at + step], block_size, empty_block, device)
            for at in range(0, len(alike), step)
        ]
    return groups


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
    hidden = torch.arange(M) > positions[:, :, None]  # (B, n, M)
    return Group(
        on_device(rows, device),
        n,
        on_device(table, device),
        on_device(hidden[:, None, :, None], device),
    )


def attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, groups: list[Group]
) -> torch.Tensor:
    """Softmax attention of every query row over its sequence's cached context, its own position
    included.

    Args:
        q: (T, H, E), rotated.
        k_cache, v_cache: (N, K, S, E), one layer; this step's keys and values already written.

    Returns: (T, H, E) in q's dtype; rows outside all groups are zero.
    """
    out = torch.zeros_like(q)
    for group in groups:
        out[group.rows] = _attend_group(q[group.rows], k_cache, v_cache, group).to(q.dtype)
    return out


def attend_decodes(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: Paged
) -> torch.Tensor:
    """The same for sequences of one row each, without the host knowing their lengths: every block
    of the tables is gathered, and what lies beyond a sequence masked. q: (B, H, E) -> (B, H, E). No
    promise about bits."""
    (B, W), (_, K, S, E) = plan.table.shape, k_cache.shape
    seen = torch.arange(W * S, device=q.device) < plan.used.unsqueeze(1)  # (B, M)
    k, v = (
        cache[plan.table.long()].transpose(1, 2).reshape(B, K, W * S, E)
        for cache in (k_cache, v_cache)
    )
    # (B, K, G, E)
    out = F.scaled_dot_product_attention(q.view(B, K, -1, E), k, v, attn_mask=seen[:, None, None])
    return out.reshape(B, -1, E)


def _attend_group(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, group: Group
) -> torch.Tensor:
    (B, n_blocks), n = group.table.shape, group.n
    _, K, S, E = k_cache.shape
    G, M = q.shape[1] // K, n_blocks * S
    q = q.float().view(B, n, K, G, E).transpose(1, 2).reshape(B * K, n * G, E) * (1 / math.sqrt(E))
    if n * G < ROWS_FLOOR:
        q = F.pad(q, (0, 0, 0, ROWS_FLOOR - n * G))  # (B * K, R, E)
    k = _gather(k_cache, group.table)  # (B * K, M, E)
    scores = torch.bmm(q, k.transpose(1, 2))[:, : n * G]  # (B * K, n * G, M)
    scores = scores.reshape(B, K, n, G, M).masked_fill_(group.hidden, -math.inf)
    weights = torch.softmax(scores, dim=-1).view(B * K, n * G, M)
    if n * G < ROWS_FLOOR:
        weights = F.pad(weights, (0, 0, 0, ROWS_FLOOR - n * G))  # (B * K, R, M)
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
