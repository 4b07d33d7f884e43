"""Sums over NVLink in one step: every GPU reads all others' few KB and adds them itself, where NCCL
goes round in several (10-20 us instead of 20-40 for a decode's sums; torch's symmetric memory,
torch.distributed._symmetric_memory).

`OneShot` takes a communicator's place in `Ranks` (shared_memory.py): small sums its own way, all
else
through
NCCL. `open_one_shot` compares it with NCCL before anyone relies on it. Never run on GPUs so far;
the tests stand in for `memory` and `ops`.
"""

import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

MAX_BYTES = 256 << 10  # beyond it, reading everything from everyone costs more than NCCL's ring
ALIGNMENT = 16  # bytes: the kernel adds vectors of so many


class OneShot:
    """One buffer that all GPUs of a node have mapped.

    Args:
        memory: `empty` and `rendezvous`; ops: `one_shot_all_reduce_out` (torch's own, unless
            tested).
    """

    # it adds in the order of ranks: the same bits everywhere, not those of collectives.tree_add
    in_tree_order = False

    def __init__(
        self,
        group: dist.ProcessGroup,
        tp: int,
        device: torch.device,
        memory: Any = symmetric_memory,
        ops: Any = None,
    ):
        self.group, self.tp, self.device = group, tp, device
        self.ops = ops or torch.ops.symm_mem
        self._memory, self._buffer = (
            memory,
            memory.empty(MAX_BYTES, dtype=torch.uint8, device=device),
        )

    def map(self) -> None:
        """Maps all ranks' buffers, waiting for every one of them."""
        self._memory.rendezvous(self._buffer, self.group.group_name)

    def sums(self, x: torch.Tensor) -> bool:
        """Whether `sum` can take x."""
        return (
            x.dtype in (torch.bfloat16, torch.float32)
            and x.is_contiguous()
            and x.nbytes <= MAX_BYTES
            and x.nbytes % ALIGNMENT == 0
        )

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sums x over the ranks in place."""
        mine = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        mine.copy_(x)
        self.ops.one_shot_all_reduce_out(mine, "sum", self.group.group_name, x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x (contiguous) in rank order: (tp, *x.shape); through NCCL."""
        out = x.new_empty((self.tp, *x.shape))
        dist.all_gather(list(out.unbind()), x, group=self.group)
        return out

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrites x (contiguous) with the driver's; through NCCL."""
        dist.broadcast(x, src=0, group=self.group)
        return x


def open_one_shot(
    group: dist.ProcessGroup,
    control: dist.ProcessGroup,
    rank: int,
    tp: int,
    device: torch.device,
    memory: Any = symmetric_memory,
    ops: Any = None,
) -> OneShot | None:
    """Every rank of one node calls it once. -> None on all ranks if any of them cannot, or gets
    another sum than the group's own."""
    one, mapped, right = None, False, False
    with contextlib.suppress(Exception):  # no NVLink, no such driver, another torch: build says so
        if os.environ.get("LLAMA_TP_SHARED") != "0":
            one = OneShot(group, tp, device, memory, ops)
    # or those that can would wait in `map` for one that cannot
    if _all(one is not None, control) and one is not None:
        with contextlib.suppress(Exception):
            one.map()
            mapped = True
        if _all(mapped, control):
            # a list: every rank sums all three
            right = all([_same(one, rank, n) for n in (8, 4096, MAX_BYTES // 2)])
    return one if _all(right, control) else None


def _same(one: OneShot, rank: int, n: int) -> bool:
    """Whether n bf16 numbers of each rank have the sum that the group gives: small whole ones,
    since the kernel rounds to bf16 after each rank, which of others leaves no bound to tell right
    from wrong by."""
    mine = torch.randint(-8, 9, (n,), generator=torch.Generator().manual_seed(rank)).to(
        one.device, torch.bfloat16
    )
    expected = mine.float()
    dist.all_reduce(expected, group=one.group)
    return torch.equal(one.sum(mine).float(), expected)


def _all(mine: bool, control: dist.ProcessGroup) -> bool:
    every = torch.tensor([mine], dtype=torch.int64)
    dist.all_reduce(every, dist.ReduceOp.MIN, group=control)
    return bool(every.item())
