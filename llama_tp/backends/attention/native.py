"""Attention by the C++ kernels (native/kernels.cpp): CPU, fp32 and bf16."""

from array import array
from ctypes import CDLL
from dataclasses import dataclass

import torch

from llama_tp.backends.base import LayerShape, Span
from llama_tp.backends.kv_cache import KVCache, Slots
from llama_tp.backends.linear.native import DTYPES


@dataclass(frozen=True)
class NativePlan:
    """A step's sequences as the C++ side reads them."""

    spans: array  # of int64, four a sequence: row, start, n, where its table begins
    tables: array  # of int32: block tables, one after the other
    complete: bool  # whether the spans cover all rows of the step


class NativeAttention:
    """An Attention whose cache blocks are (K, S, E) numbers in the order of the C++ kernels: those
    of every 16 slots of a head are regrouped (GROUP in kernels.cpp), so that block sizes are
    multiples of 16. Rows of padding are zero."""

    name = "C++"
    block_size = 16

    def __init__(self, library: CDLL, shape: LayerShape, dtype: torch.dtype):
        self.shape, self.dtype = shape, dtype
        self._attend = getattr(library, f"attend_{DTYPES[dtype]}")
        self._write = getattr(library, f"write_kv_{DTYPES[dtype]}")

    def new_cache(self, n_layers: int, n_blocks: int, block_size: int | None = None) -> KVCache:
        S = block_size or self.block_size
        block_shape = (self.shape.n_kv_heads, S, self.shape.head_dim)
        return KVCache(n_layers, n_blocks, S, block_shape, self.dtype, torch.device("cpu"))

    def plan(self, spans: list[Span], cache: KVCache, n_tokens: int) -> NativePlan:
        heads, tables = array("q"), array("i")
        for span in spans:
            heads.extend((span.row, span.start, span.n, len(tables)))
            tables.extend(span.blocks)
        return NativePlan(heads, tables, sum(span.n for span in spans) == n_tokens)

    def plan_decodes(self, table: torch.Tensor, positions: torch.Tensor) -> NativePlan:
        rows = zip(positions.tolist(), table.tolist())
        spans, tables = array("q"), array("i", table.flatten().tolist())
        for row, (position, blocks) in enumerate(rows):
            spans.extend((row, position, 1, row * len(blocks)))
        return NativePlan(spans, tables, True)

    def table_widths(self, n_rows: int, most: int) -> list[int]:
        return [most]  # beyond a sequence's own blocks nothing is read

    def write(
        self, cache: KVCache, layer: int, slots: Slots, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        k_cache, v_cache = cache.layers[layer]
        _, K, S, E = k_cache.shape
        self._write(
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            slots.blocks.data_ptr(),
            slots.offsets.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            len(k),
            K,
            S,
            E,
        )

    def attend(self, q: torch.Tensor, cache: KVCache, layer: int, plan: NativePlan) -> torch.Tensor:
        k_cache, v_cache = cache.layers[layer]
        _, K, S, E = k_cache.shape
        out = (torch.empty if plan.complete else torch.zeros)(q.shape, dtype=q.dtype)
        self._attend(
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            plan.spans.buffer_info()[0],
            len(plan.spans) // 4,
            plan.tables.buffer_info()[0],
            q.shape[1],
            K,
            S,
            E,
        )
        return out
