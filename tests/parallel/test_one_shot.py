"""Sums over NVLink behind their seam: a stand-in for symmetric memory on gloo ranks, right, wrong
or absent."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from llama_tp.parallel.collectives import all_reduce, broadcast, gather_stack, tree_add, tree_sum
from llama_tp.parallel.one_shot import MAX_BYTES, open_one_shot
from tests.ranks import run


class Stand:
    """`memory` and `ops` in one: what torch's symmetric memory does, through the ranks' own group:
    it adds in the order of ranks, each time rounding to the dtype."""

    def __init__(self, ranks, absent_on: int = -1, wrong_on: int = -1):
        self.ranks, self.absent, self.wrong, self.n_sums = (
            ranks,
            absent_on == ranks.rank,
            wrong_on == ranks.rank,
            0,
        )

    def empty(self, n, dtype, device):
        if self.absent:
            raise RuntimeError("no NVLink here")
        self.buffer = torch.empty(n, dtype=dtype, device=device)
        return self.buffer

    def rendezvous(self, buffer, group_name):
        """Waits for all ranks, as torch's does."""
        assert buffer is self.buffer and group_name == self.ranks.group.group_name
        dist.all_reduce(torch.zeros(1), group=self.ranks.group)

    def one_shot_all_reduce_out(self, x, how, group_name, out):
        assert (
            how == "sum"
            and x.data_ptr() == self.buffer.data_ptr()
            and group_name == self.ranks.group.group_name
        )
        self.n_sums += 1
        parts = [torch.empty_like(x) for _ in range(self.ranks.tp)]
        dist.all_gather(parts, x, group=self.ranks.group)
        out.copy_(sum(parts[1:], start=parts[0]) + self.wrong)


def opened(ranks, **faults):
    stand = Stand(ranks, **faults)
    return open_one_shot(
        ranks.group, ranks.control, ranks.rank, ranks.tp, ranks.device, stand, stand
    ), stand


def sums_and_the_rest(ranks) -> bool:
    communicator, stand = opened(ranks)
    ranks, before = replace(ranks, communicator=communicator), stand.n_sums
    parts = [
        torch.randn(64, 16, generator=torch.Generator().manual_seed(rank))
        for rank in range(ranks.tp)
    ]
    assert torch.allclose(all_reduce(parts[ranks.rank].clone(), ranks), sum(parts), atol=1e-5)
    assert stand.n_sums == before + 1
    # keeps its own order
    assert torch.equal(tree_sum(parts[ranks.rank].clone(), ranks), tree_add(parts))
    big, odd = torch.ones(MAX_BYTES), torch.ones(3)  # too long, not aligned
    assert (
        all_reduce(big, ranks).sum() == ranks.tp * MAX_BYTES
        and all_reduce(odd, ranks).sum() == 3 * ranks.tp
    )
    assert stand.n_sums == before + 1
    assert gather_stack(torch.tensor([ranks.rank]), ranks).flatten().tolist() == list(
        range(ranks.tp)
    )
    assert broadcast(torch.tensor([ranks.rank + 5]), ranks).item() == 5
    return True


@pytest.mark.parametrize("tp", [2, *(pytest.param(tp, marks=pytest.mark.slow) for tp in (4, 8))])
def test_small_sums_take_it_and_all_else_the_group(tp):
    assert all(run(tp, sums_and_the_rest))


def none_anywhere(ranks) -> bool:
    return opened(ranks, absent_on=1)[0] is None and opened(ranks, wrong_on=1)[0] is None


def test_all_ranks_do_without_if_one_lacks_it_or_sums_wrongly():
    assert run(2, none_anywhere, timeout=30) == [True, True]


def test_it_can_be_turned_off():
    assert run(2, turned_off) == [True, True]


def turned_off(ranks) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_TP_SHARED", "0")
        return opened(ranks)[0] is None
