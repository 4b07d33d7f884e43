"""Collectives against plain arithmetic, on 2 real gloo ranks (4 and 8: slow)."""

import pytest
import torch

from llama_tp.parallel import collectives as c
from tests.ranks import run

DEGREES = [1, 2, *(pytest.param(tp, marks=pytest.mark.slow) for tp in (4, 8))]


def reduces(ranks, dtype):
    x = torch.arange(6).reshape(2, 3).to(dtype) * (ranks.rank + 1)
    y = c.all_reduce(x, ranks)
    assert y is x
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("tp", DEGREES)
def test_all_reduce_is_the_sum(tp, dtype):
    want = torch.arange(6).reshape(2, 3).to(dtype) * sum(range(1, tp + 1))
    for got in run(tp, reduces, dtype):
        assert got.dtype == dtype and torch.equal(got, want)


def stacks(ranks):
    x = torch.arange(12).reshape(3, 4).t() + 100 * ranks.rank  # not contiguous
    return c.gather_stack(x, ranks), c.gather_to_driver(x.to(torch.bfloat16), ranks)


@pytest.mark.parametrize("tp", DEGREES)
def test_gathers_are_in_rank_order(tp):
    want = torch.stack([torch.arange(12).reshape(3, 4).t() + 100 * rank for rank in range(tp)])
    results = run(tp, stacks)
    for rank, (stack, shards) in enumerate(results):
        assert torch.equal(stack, want)
        if rank:
            assert shards is None
        else:
            assert torch.equal(torch.stack(shards), want.to(torch.bfloat16))


def chunks(dtype):
    """Eight partial sums whose total depends on the order of addition."""
    g = torch.Generator().manual_seed(3)
    scale = 10.0 ** torch.randint(-3, 4, (8, 1, 1), generator=g)
    return list((torch.randn(8, 5, 33, generator=g) * scale).to(dtype).float())


def sums_own_chunks(ranks, dtype):
    n = 8 // ranks.tp
    return c.tree_sum(c.tree_add(chunks(dtype)[ranks.rank * n : (ranks.rank + 1) * n]), ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", DEGREES)
def test_tree_sum_has_the_same_bits_at_every_tp(tp, dtype):
    a = chunks(dtype)
    want = ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]))
    in_a_row = sum(a[1:], a[0])
    if dtype == torch.float32:
        assert not torch.equal(want, in_a_row), "the data must be able to tell orders apart"
    for got in run(tp, sums_own_chunks, dtype):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "n, shape",
    [(1, "0"), (2, "(01)"), (3, "((01)2)"), (5, "(((01)(23))4)"), (8, "(((01)(23))((45)(67)))")],
)
def test_tree_add_shape(n, shape):
    class Term(str):
        def __add__(self, other):
            return Term(f"({str(self)}{str(other)})")

    assert c.tree_add([Term(i) for i in range(n)]) == shape


def talks(ranks):
    x = torch.full((3,), float(ranks.rank + 7))
    c.broadcast(x, ranks)
    got = [x.tolist()]
    for n in (0, 1, 1023, 1024, 5000):
        ints = [(-1) ** i * (2**62 + i) for i in range(n)]
        if ranks.is_driver:
            c.send_ints(ints, ranks)
            got.append(True)
        else:
            got.append(c.recv_ints(ranks) == ints)
    for data in (b"", b"\x00\xff" * 3, b"x" * 100_000):
        got.append(c.broadcast_bytes(data if ranks.is_driver else None, ranks) == data)
    c.barrier(ranks)
    return got


@pytest.mark.parametrize("tp", DEGREES)
def test_messages_arrive_whole(tp):
    for got in run(tp, talks):
        assert got[0] == [7.0] * 3 and all(got[1:])
