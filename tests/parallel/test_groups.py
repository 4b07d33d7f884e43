"""Ranks from the environment, fairscale's getters, devices, threads."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups

from llama_tp.arch.errors import UserError
from llama_tp.parallel import groups
from llama_tp.parallel.groups import close, init_ranks, pick_device, set_threads, usable_cores
from llama_tp.parallel.rendezvous import Launch, first_host, read_launch
from tests.ranks import PATIENCE_S, ROOT, free_port, run


def getters(ranks):
    group = fairscale_groups.get_model_parallel_group()
    timeouts = [
        g._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for g in (group, fairscale_groups.get_data_parallel_group(), ranks.control)
    ]
    return (
        group is ranks.group,
        fairscale_groups.get_model_parallel_rank() == ranks.rank,
        fairscale_groups.get_model_parallel_world_size() == ranks.tp,
        fairscale_groups.get_model_parallel_src_rank() == 0,
        dist.get_backend(ranks.control) == "gloo",
        timeouts == [120, 120, 365 * 86400],
        torch.get_num_threads() == 1,
    )


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fairscale_agrees_with_ranks(tp):
    assert run(tp, getters) == [(True,) * 7] * tp


def test_a_plain_process_is_one_rank_without_groups(monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    ranks = init_ranks("cpu")
    assert (ranks.rank, ranks.tp, ranks.group, ranks.control) == (
        0,
        1,
        None,
        None,
    ) and ranks.is_driver
    assert not dist.is_initialized()
    close(ranks)
    with pytest.raises(
        UserError, match="model_parallel_size is 2.*1 rank.*llama_tp.launch --nproc_per_node 2"
    ):
        init_ranks("cpu", model_parallel_size=2)


def test_torchrun_environment():
    env = dict(
        RANK="5",
        WORLD_SIZE="8",
        LOCAL_RANK="1",
        LOCAL_WORLD_SIZE="4",
        MASTER_ADDR="a",
        MASTER_PORT="29500",
    )
    assert read_launch(env) == Launch(5, 8, 1, 4, 2, "a", 29500)
    assert read_launch({}) is None
    with pytest.raises(UserError, match="MASTER_ADDR"):
        read_launch({k: v for k, v in env.items() if k != "MASTER_ADDR"})
    with pytest.raises(UserError, match="WORLD_SIZE is not a number - 'x'"):
        read_launch({**env, "WORLD_SIZE": "x"})


def test_slurm_environment():
    env = dict(
        SLURM_PROCID="5",
        SLURM_NTASKS="8",
        SLURM_LOCALID="1",
        SLURM_STEP_NUM_NODES="2",
        SLURM_STEP_NODELIST="gpu[007-008]",
        SLURM_JOB_ID="123456",
    )
    assert read_launch(env) == Launch(5, 8, 1, 4, 2, "gpu007", 20000 + 123456 % 20000)
    assert read_launch({**env, "MASTER_ADDR": "h", "MASTER_PORT": "1"}) == Launch(
        5, 8, 1, 4, 2, "h", 1
    )
    assert read_launch({**env, "SLURM_NTASKS": "1"}) is None


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[003-010,12],cpu1", "gpu003"),
        ("n[1,4]-ib,b", "n1-ib"),
        ("x1.cluster.org,y", "x1.cluster.org"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_devices_without_cuda():
    assert pick_device(None, 3) == torch.device("cpu")
    with pytest.raises(UserError, match="no GPU"):
        pick_device("cuda", 0)


SLURM_RANK = """
import json, os
from llama_tp.parallel.collectives import gather_ints
from llama_tp.parallel.groups import close, init_ranks
from tests.listeners import listeners
ranks = init_ranks("cpu", timeout_s=60)
print(json.dumps([ranks.rank, ranks.tp, ranks.local_rank, ranks.local_size, ranks.n_nodes,
                  gather_ints(ranks.rank, ranks), sorted({address for _, address, _ in listeners([os.getpid()])})]))
close(ranks)
close(ranks)
"""  # noqa: E501


@pytest.mark.parametrize("n_nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_tasks_of_slurm_find_each_other(n_nodes):
    """What srun would start; stdout holds nothing but what the script prints, and no port is open
    to everybody."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    env.update(
        SLURM_NTASKS="2",
        SLURM_NNODES=str(n_nodes),
        SLURM_JOB_NODELIST="localhost",
        MASTER_PORT=str(free_port()),
    )
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", SLURM_RANK],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**env, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task // n_nodes)},
        )
        for task in range(2)
    ]
    try:
        said = [json.loads(task.communicate(timeout=PATIENCE_S)[0]) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    addresses = {address for *_, each in said for address in each}
    assert addresses == {"127.0.0.1"} if n_nodes == 1 else not addresses & {"0.0.0.0", "::"}
    assert [each[:-1] for each in said] == [
        [task, 2, task // n_nodes, 2 // n_nodes, n_nodes, [0, 1]] for task in range(2)
    ]


def test_a_launch_whose_store_is_gone_is_refused_at_once(monkeypatch):
    env = dict(
        RANK="0",
        WORLD_SIZE="2",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        TORCHELASTIC_USE_AGENT_STORE="True",
        LLAMA_TP_THREADS="1",
    )
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    started = time.monotonic()
    with pytest.raises(
        UserError,
        match="rank 0 does not reach the launch's store at 127.0.0.1:.*Connection refused",
    ):
        init_ranks("cpu", timeout_s=60)
    assert time.monotonic() - started < 60 / 2  # at once, and not after the timeout


def test_threads_are_divided_among_the_ranks_of_a_node(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("LLAMA_TP_THREADS", raising=False)
    monkeypatch.setattr("llama_tp.parallel.groups.usable_cores", lambda: 6)
    try:
        set_threads(2)
        assert torch.get_num_threads() == 3
        set_threads(16)
        assert torch.get_num_threads() == 1
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        set_threads(1)
        assert torch.get_num_threads() == 1  # as it was
        # a single rank of torchrun, or of serve: OMP_NUM_THREADS is 1
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        set_threads(1)
        assert torch.get_num_threads() == 6
        monkeypatch.setenv("LLAMA_TP_THREADS", "2")
        set_threads(16)
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("LLAMA_TP_THREADS", "many")
        with pytest.raises(UserError, match="LLAMA_TP_THREADS is not a number of threads - 'many'"):
            set_threads(1)
    finally:
        torch.set_num_threads(before)
    assert 1 <= usable_cores() <= os.cpu_count()


def test_ranks_that_cannot_connect_are_one_clear_error(monkeypatch):
    """What gloo raised when garbage came to its port while the ranks connected (seen in
    test_listeners)."""

    def disturbed(*_, **__):
        raise RuntimeError(
            "Gloo connectFullMesh failed: Connection closed by peer\nand a trace of its C++"
        )

    env = {
        "RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "x",
        "MASTER_PORT": 1,
    }
    for name, value in env.items():
        monkeypatch.setenv(name, str(value))
    for name in ("set_threads", "pin", "end_with_launcher", "listen_on_loopback", "roll_call"):
        monkeypatch.setattr(groups, name, lambda *_: None)
    monkeypatch.setattr(groups.dist, "init_process_group", disturbed)
    with pytest.raises(
        UserError, match="rank 0 cannot connect to the others - Gloo connectFullMesh failed"
    ):
        groups.init_ranks("cpu", store=groups.dist.HashStore())
