"""torch's paged FlashAttention (torch.nn.attention.varlen.varlen_attn): what a torch offers, and
the calls of it that are right.

Read in varlen.py of 2.11.0, 2.12.1, 2.13.0 and 2.14.1, in the strings of libtorch_cuda.so of the
first two, and in pytorch #179760, which exposed num_splits, and #194167, which is what came of it:

| torch | paged keys | num_splits | steps that are not grouped |
|---|---|---|---|
| 2.11 | none: no enable_gqa, seqused_k, block_table, num_splits | | |
| 2.12 | yes | refused ("num_splits requires FA3") | one pass |
| 2.13, 2.14 | yes | taken | one pass with num_splits 1; with None wrong for small batches > 1 |

All of them refuse keys without cu_seq_k ("both set or both not set"), although seqused_k says the
same. *Grouped* are decodes whose query heads share KV heads: with one row a sequence, window (-1,
-1) and no row more, FlashAttention lays the heads of a group side by side and may split the context
rightly, at its own choice. enable_gqa, always given, keeps 2.14 from choosing cuDNN. Signatures
tell 2.11 from the others and nothing else: what is left is tried, on the device, and compared.
Never run on a GPU so far.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from llama_tp.backends.attention.tiles import plan
from llama_tp.backends.base import LayerShape, Span
from llama_tp.backends.kv_cache import KVCache, Slots, on_device

ARGUMENTS = {"enable_gqa", "seqused_k", "block_table", "num_splits"}
PAGE = 256  # slots: pages are multiples of it
WIDEST_HEAD = 256
HEAD_STEP = 8
AMPERE = (8, 0)  # FlashAttention needs a GPU of this generation or a later one
# of what the trial computes twice, in bf16 or fp16; a sequence gone astray is off by 1 and more
CLOSE = 0.1
# (context, rows of a chunk) of the trial's sequences: enough tiles to be split
TRIED = ((5, 1), (300, 1), (700, 130))


class PagedPlan:
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
    ) -> "PagedPlan":
        """From ints; all tables of one length."""
        table, used_, ends_ = (
            on_device(torch.tensor(ints, dtype=torch.int32), device)
            for ints in (tables, used, ends)
        )
        return cls(table, used_, ends_, max(b - a for a, b in zip(ends, ends[1:])))


class FlashAttention:
    """An Attention by `call`: varlen_attn, or what takes its arguments. Prefill and decodes are one
    call that reads the blocks, (K, S, E) each, where they lie.

    Args:
        one_pass: the num_splits with which a step that is not grouped is one pass: 1, or None where
            torch takes none.
        fixed_bits: never split, since the number of splits depends on the company.
    """

    name = "FlashAttention"
    block_size = PAGE

    def __init__(
        self,
        call: Callable[..., Any],
        one_pass: int | None,
        fixed_bits: bool,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.call, self.one_pass, self.fixed_bits = call, one_pass, fixed_bits
        self.shape, self.dtype, self.device = shape, dtype, device

    def new_cache(self, n_layers: int, n_blocks: int, block_size: int | None = None) -> KVCache:
        S = block_size or self.block_size
        block_shape = (self.shape.n_kv_heads, S, self.shape.head_dim)
        return KVCache(n_layers, n_blocks, S, block_shape, self.dtype, self.device)

    def plan(self, spans: list[Span], cache: KVCache, n_tokens: int) -> PagedPlan:
        width = max(len(span.blocks) for span in spans)
        tables = [span.blocks + [cache.empty] * (width - len(span.blocks)) for span in spans]
        used = [span.start + span.n for span in spans]
        ends = [0, *(span.row + span.n for span in spans)]
        return PagedPlan.of(tables, used, ends, self.device)

    def plan_decodes(self, table: torch.Tensor, positions: torch.Tensor) -> PagedPlan:
        used = positions.to(torch.int32) + 1
        ends = torch.arange(len(used) + 1, dtype=torch.int32, device=used.device)
        return PagedPlan(table, used, ends, 1)

    def table_widths(self, n_rows: int, most: int) -> list[int]:
        return [most]  # beyond a sequence's own blocks nothing is read

    def write(
        self, cache: KVCache, layer: int, slots: Slots, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        k_cache, v_cache = cache.layers[layer]
        k_cache[slots.blocks, :, slots.offsets] = k
        v_cache[slots.blocks, :, slots.offsets] = v

    def attend(self, q: torch.Tensor, cache: KVCache, layer: int, plan: PagedPlan) -> torch.Tensor:
        return self.paged(q, *cache.layers[layer], plan)

    def paged(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: PagedPlan
    ) -> torch.Tensor:
        """q: (T, H, E); caches: (N, K, S, E). -> (T, H, E); rows of no sequence hold anything."""
        T, B = len(q), len(plan.used)
        n = B if plan.max_n == 1 else T  # a grouped call takes no row more
        grouped = (
            plan.max_n == 1
            and q.shape[1] > k_cache.shape[1]
            and not (self.fixed_bits and self.one_pass is None)
        )
        k, v = (cache.transpose(1, 2) for cache in (k_cache, v_cache))  # (N, S, K, E) each
        out = self.call(
            q[:n].contiguous(),
            k,
            v,
            plan.ends,
            plan.key_ends,
            plan.max_n,
            plan.table.shape[1] * k.shape[1],
            window_size=(-1, -1) if grouped else (-1, 0),
            enable_gqa=True,
            seqused_k=plan.used,
            block_table=plan.table,
            num_splits=None if grouped and not self.fixed_bits else self.one_pass,
        )
        return out if n == T else F.pad(out, (0, 0, 0, 0, 0, T - n))


def open_flash(
    shape: LayerShape, dtype: torch.dtype, device: torch.device, fixed_bits: bool
) -> FlashAttention | str:
    """Paged FlashAttention on this GPU, or why there is none."""
    if dtype == torch.float32:
        return "it computes in bfloat16 and float16, not in float32"
    capability = torch.cuda.get_device_capability(device)
    if capability < AMPERE:
        return "it takes a GPU of compute capability 8.0, this one has {}.{}".format(*capability)
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler: a second

    return try_flash(varlen_attn, shape, dtype, device, fixed_bits)


def try_flash(
    call: Callable[..., Any],
    shape: LayerShape,
    dtype: torch.dtype,
    device: torch.device,
    fixed_bits: bool,
) -> FlashAttention | str:
    """What attends by `call` with such heads on this device, once it gave what plain torch gives;
    or why nothing does."""
    if shape.head_dim % HEAD_STEP or shape.head_dim > WIDEST_HEAD:
        takes = f"FlashAttention takes multiples of {HEAD_STEP} up to {WIDEST_HEAD}"
        return f"heads {shape.head_dim} wide: {takes}"
    missing = ARGUMENTS - inspect.signature(call).parameters.keys()
    if missing:
        return f"torch {torch.__version__}: varlen_attn has no {', '.join(sorted(missing))}"
    reasons = []
    for one_pass in (1, None):
        flash = FlashAttention(call, one_pass, fixed_bits, shape, dtype, device)
        try:
            off = _off(flash)
        except Exception as e:  # whatever a kernel can throw: plain torch always works
            reasons.append(f"with num_splits {one_pass}: {str(e).partition(chr(10))[0]}")
            continue
        if off <= CLOSE:  # False for NaN
            return flash
        reasons.append(f"with num_splits {one_pass}: off by {off:.2g}")
    return f"torch {torch.__version__}: varlen_attn {'; '.join(reasons)}"


@torch.inference_mode()
def _off(flash: FlashAttention) -> float:
    """How far `flash` is from plain torch, for decodes and for chunks. NaN if it wrote any."""
    dtype, device = flash.dtype, flash.device
    H, K, E = flash.shape.n_heads, flash.shape.n_kv_heads, flash.shape.head_dim
    width = 1 + max(used for used, _ in TRIED) // PAGE
    empty = len(TRIED) * width
    generator = torch.Generator().manual_seed(0)
    k, v = (
        torch.randn(empty + 1, K, PAGE, E, generator=generator).to(device, dtype) for _ in range(2)
    )
    k[empty] = v[empty] = 0
    tables = [list(range(i * width, (i + 1) * width)) for i in range(len(TRIED))]
    worst = torch.zeros((), device=device)
    for rows in ([1] * len(TRIED), [n for _, n in TRIED]):
        ends = [sum(rows[:i]) for i in range(len(rows) + 1)]
        spans = [
            Span(at, used - n, n, table)
            for at, (used, _), n, table in zip(ends, TRIED, rows, tables)
        ]
        q = torch.randn(ends[-1], H, E, generator=generator).to(device, dtype)
        given = PagedPlan.of(tables, [used for used, _ in TRIED], ends, device)
        ours, theirs = flash.paged(q, k, v, given), plan(spans, H, PAGE, empty, device)
        off = (ours.float() - theirs.attend(q, k, v).float()).abs().max()
        worst = torch.maximum(worst, off)
    return worst.item()
