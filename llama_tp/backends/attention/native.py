"""Attention by the C++ kernels (native/kernels.cpp): CPU, fp32 and bf16."""

from array import array
from dataclasses import dataclass

import torch

from llama_tp.backends.base import LayerShape, Span
from llama_tp.backends.kv_cache import KVCache, Slots
from llama_tp.native.calls import GROUP, Functions


@dataclass(frozen=True)
class NativePlan:
    """A step's sequences as the C++ side reads them."""

    spans: "array[int]"  # of int64, four a sequence: row, start, n, where its table begins
    tables: "array[int]"  # of int32: block tables, one after the other
    complete: bool  # whether the spans cover all rows of the step


class NativeAttention:
    """An Attention whose cache blocks are (K, S, E) numbers in the order of the C++ kernels: those
    of every GROUP slots of a head are regrouped. Rows of padding are zero."""

    name = "C++"
    block_size = GROUP

    def __init__(self, functions: Functions, shape: LayerShape):
        self.functions, self.shape = functions, shape

    def new_cache(self, n_layers: int, n_blocks: int, block_size: int | None = None) -> KVCache:
        S = block_size or self.block_size
        block_shape = (self.shape.n_kv_heads, S, self.shape.head_dim)
        device = torch.device("cpu")
        return KVCache(n_layers, n_blocks, S, block_shape, self.functions.dtype, device)

    def plan(self, spans: list[Span], cache: KVCache, n_tokens: int) -> NativePlan:
        heads, tables = array("q"), array("i")
        for span in spans:
            heads.extend((span.row, span.start, span.n, len(tables)))
            tables.extend(span.blocks)
        return NativePlan(heads, tables, sum(span.n for span in spans) == n_tokens)

    def plan_decodes(self, table: torch.Tensor, positions: torch.Tensor) -> NativePlan:
        spans, tables = array("q"), array("i", table.flatten().tolist())
        for row, position in enumerate(positions.tolist()):
            spans.extend((row, position, 1, row * table.shape[1]))
        return NativePlan(spans, tables, True)

    def table_widths(self, n_rows: int, most: int) -> list[int]:
        return [most]  # beyond a sequence's own blocks nothing is read

    def write(
        self, cache: KVCache, layer: int, slots: Slots, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self.functions.write_kv(k, v, slots.blocks, slots.offsets, *cache.layers[layer])

    def attend(self, q: torch.Tensor, cache: KVCache, layer: int, plan: NativePlan) -> torch.Tensor:
        return self.functions.attend(
            q, *cache.layers[layer], plan.spans, plan.tables, plan.complete
        )
