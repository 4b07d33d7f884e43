"""Collectives through shared memory: sizes, order, late ranks, and what stays behind."""

import os
import time
from dataclasses import replace

import pytest
import torch

from llama_tp.native.library import load
from llama_tp.parallel.collectives import (
    all_reduce,
    barrier,
    broadcast,
    gather_stack,
    recv_ints,
    send_ints,
    tree_add,
    tree_sum,
)
from tests.ranks import PATIENCE_S, pool, run, torchrun

pytestmark = pytest.mark.skipif(
    load() is None, reason="the C++ parts are not built here: python -m llama_tp.native.build"
)

TPS = [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)]
# in elements: within a vector, a chunk of 256 KiB, over several
SIZES = [1, 15, 16, 2048, 65536, 131071, 300_000]


def value(rank: int, n: int, dtype) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(rank)).to(dtype)


def sums_are_the_tree(ranks) -> bool:
    assert ranks.communicator is not None
    for n in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            expected = tree_add([value(rank, n, dtype).float() for rank in range(ranks.tp)]).to(
                dtype
            )
            assert torch.equal(all_reduce(value(ranks.rank, n, dtype), ranks), expected), (n, dtype)
        wide = tree_add([value(rank, n, torch.float32) for rank in range(ranks.tp)])
        assert torch.equal(tree_sum(value(ranks.rank, n, torch.float32), ranks), wide)
        # gloo's bits
        assert torch.equal(
            tree_sum(value(ranks.rank, n, torch.float32), replace(ranks, communicator=None)), wide
        )
    return True


@pytest.mark.parametrize("tp", TPS)
def test_sums_are_the_tree_of_every_size(tp):
    assert all(run(tp, sums_are_the_tree))


def a_long_mix(ranks) -> bool:
    """Operations of all kinds in a row, each rank late in turn: buffers are reused without a word
    lost."""
    for i in range(300):
        if i % ranks.tp == ranks.rank and i % 7 == 0:
            time.sleep(0.002)
        gathered = gather_stack(torch.tensor([ranks.rank, i]), ranks)
        assert gathered.tolist() == [[rank, i] for rank in range(ranks.tp)]
        told = broadcast(torch.tensor([i if ranks.is_driver else -1] * 3), ranks)
        assert told.tolist() == [i] * 3
        ints = [i] * (1 + 500 * (i % 5))
        if ranks.is_driver:
            send_ints(ints, ranks)
        else:
            assert recv_ints(ranks) == ints
        x = all_reduce(torch.full((i + 1,), float(ranks.rank + 1)), ranks)
        assert x.tolist() == [ranks.tp * (ranks.tp + 1) / 2] * (i + 1)
    return True


@pytest.mark.parametrize("tp", TPS)
def test_a_long_mix_of_operations(tp):
    assert all(run(tp, a_long_mix))


def late(ranks) -> str:
    """The driver sums alone, with little patience."""
    impatient = replace(
        ranks, communicator=type(ranks.communicator).__new__(type(ranks.communicator))
    )
    impatient.communicator.__dict__.update(ranks.communicator.__dict__)
    impatient.communicator.place = ranks.communicator.place._replace(timeout_s=0.5)
    error = ""
    if ranks.is_driver:
        try:
            all_reduce(torch.ones(1), impatient)
        except RuntimeError as e:
            error = str(e)
    barrier(ranks)  # over gloo
    return error


def test_a_rank_that_does_not_come_is_an_error_in_time():
    assert "within 0.5 s" in run(2, late)[0]
    pool(2).stop()  # its communicator has lost count


SCRIPT = """
import os, torch
from llama_tp.parallel.collectives import all_reduce
from llama_tp.parallel.groups import close, init_ranks
ranks = init_ranks("cpu")
print(f"{ranks.communicator is not None} {all_reduce(torch.ones(3), ranks).tolist()}\\n", end="", flush=True)
close(ranks)
"""  # noqa: E501


@pytest.mark.parametrize(
    "env, shared",
    [
        ({}, True),
        ({"LLAMA_TP_SHARED": "0"}, False),
        pytest.param({"LLAMA_TP_NATIVE": "0"}, False, marks=pytest.mark.slow),
    ],
)
def test_without_it_gloo_does_the_work_and_nothing_stays_behind(tmp_path, env, shared):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    before = set(os.listdir("/dev/shm"))
    with torchrun(2, [str(script)], env=env) as job:
        assert job.wait() == 0, job.stderr
        assert job.stdout.split("\n")[:2] == [f"{shared} [2.0, 2.0, 2.0]"] * 2
    # other tests' jobs may begin and end beside this one
    deadline, new = time.monotonic() + PATIENCE_S, set(os.listdir("/dev/shm")) - before
    while left := {name for name in new if name.startswith("llama_tp-")} & set(
        os.listdir("/dev/shm")
    ):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
