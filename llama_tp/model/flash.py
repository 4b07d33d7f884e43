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
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llama_tp.model.attention import Paged, Span, attend, plan

ARGUMENTS = {"enable_gqa", "seqused_k", "block_table", "num_splits"}
PAGE = 256  # slots: pages are multiples of it
WIDEST_HEAD = 256
HEAD_STEP = 8
# of what the trial computes twice, in bf16 or fp16; a sequence gone astray is off by 1 and more
CLOSE = 0.1
# (context, rows of a chunk) of the trial's sequences: enough tiles to be split
TRIED = ((5, 1), (300, 1), (700, 130))


class Heads(NamedTuple):
    """Query heads and KV heads of this rank, and their width."""

    n: int
    n_kv: int
    width: int


class PagedAttention:
    """Attention over a paged cache by `call`: varlen_attn, or what takes its arguments.

    Args:
        one_pass: the num_splits with which a step that is not grouped is one pass: 1, or None where
            torch takes none.
        fixed_bits: never split, since the number of splits depends on the company.
    """

    def __init__(self, call: Callable[..., torch.Tensor], one_pass: int | None, fixed_bits: bool):
        self.call, self.one_pass, self.fixed_bits = call, one_pass, fixed_bits

    def __call__(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: Paged
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


def open_paged(
    call: Callable[..., torch.Tensor],
    heads: Heads,
    dtype: torch.dtype,
    device: torch.device,
    fixed_bits: bool,
) -> PagedAttention | str:
    """What attends with such heads on this device, once it gave what plain torch gives; or why
    nothing does."""
    if heads.width % HEAD_STEP or heads.width > WIDEST_HEAD:
        takes = f"FlashAttention takes multiples of {HEAD_STEP} up to {WIDEST_HEAD}"
        return f"heads {heads.width} wide: {takes}"
    missing = ARGUMENTS - inspect.signature(call).parameters.keys()
    if missing:
        return f"torch {torch.__version__}: varlen_attn has no {', '.join(sorted(missing))}"
    reasons = []
    for one_pass in (1, None):
        paged = PagedAttention(call, one_pass, fixed_bits)
        try:
            off = _off(paged, heads, dtype, device)
        except Exception as e:  # whatever a kernel can throw: plain torch always works
            reasons.append(f"with num_splits {one_pass}: {str(e).partition(chr(10))[0]}")
            continue
        if off <= CLOSE:  # False for NaN
            return paged
        reasons.append(f"with num_splits {one_pass}: off by {off:.2g}")
    return f"torch {torch.__version__}: varlen_attn {'; '.join(reasons)}"


@torch.inference_mode()
def _off(paged: PagedAttention, heads: Heads, dtype: torch.dtype, device: torch.device) -> float:
    """How far `paged` is from plain torch, for decodes and for chunks. NaN if it wrote any."""
    (H, K, E), width = heads, 1 + max(used for used, _ in TRIED) // PAGE
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
        ours = paged(q, k, v, Paged.of(tables, [used for used, _ in TRIED], ends, device))
        worst = torch.maximum(
            worst,
            (ours.float() - attend(q, k, v, plan(spans, H, PAGE, empty, device)).float())
            .abs()
            .max(),
        )
    return worst.item()
