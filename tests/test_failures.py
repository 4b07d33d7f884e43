"""A rank that raises, dies, stops or hangs ends the whole job: soon, with a non-zero code and one
clear message."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import free_pair, torchrun

DEMO = Path(__file__).parent.parent / "checkpoints" / "demo"
FAULTS = str(Path(__file__).parent / "scripts" / "faults")
ENDLESS = [
    "-m",
    "llama_tp.generate",
    "--ckpt_dir",
    str(DEMO),
    "--prompt",
    "ROMEO:",
    "--ignore_eos",
    "--device",
    "cpu",
    "--max_seq_len",
    "512",
    "--max_batch_size",
    "2",
    "--n_samples",
    "100",
]


def errors(job) -> list[str]:
    return [line for line in job.stderr.splitlines() if re.match(r"(\[rank \d+\] )?error: ", line)]


def generating(job) -> None:
    """Waits until the job has loaded and written some text."""
    while len(job.stdout) < 40:
        assert job.process.poll() is None, job.stderr
        time.sleep(0.05)
    job.pids()


def ended(job, promised_s: float) -> str:
    """The job's one error message, once it has ended in time with a non-zero code and left no rank
    behind."""
    assert job.wait(job.soon(promised_s)) != 0
    assert not job.left_over(within=job.soon(5))
    assert len(errors(job)) == 1, job.stderr
    return errors(job)[0]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job(rank):
    with torchrun(2, ENDLESS) as job:
        generating(job)
        os.kill(job.pids()[rank], signal.SIGKILL)
        assert f"rank {rank} " in (message := ended(job, 30)) and "died" in message


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_ends_the_job(rank):
    with torchrun(2, [*ENDLESS, "--step_timeout", "4"]) as job:
        generating(job)
        os.kill(job.pids()[rank], signal.SIGSTOP)
        assert f"rank {rank} " in (message := ended(job, 34)) and "stopped answering" in message


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_stopped_while_it_imports_ends_the_job(rank):
    """No connection of its own yet, so that only those who wait for it can tell."""
    with torchrun(
        2, [*ENDLESS, "--load_timeout", "5"], env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    ) as job:
        while len(job.pids()) < 2:
            time.sleep(0.01)
        os.kill(job.pids()[rank], signal.SIGSTOP)
        assert f"rank {rank} has not come within 5 s" in ended(job, 60)


@pytest.mark.slow
def test_a_killed_torchrun_leaves_no_rank_behind():
    with torchrun(2, ENDLESS) as job:
        generating(job)
        os.kill(job.process.pid, signal.SIGKILL)
        assert not job.left_over(within=job.soon(10))


@pytest.mark.parametrize(
    "fault, says",
    [
        pytest.param(
            "1:load:raise",
            "rank 1: ValueError: a fault was planted here",
            marks=pytest.mark.slow,
        ),
        ("1:step:raise", "rank 1: ValueError: a fault was planted here"),
        pytest.param(
            "0:step:raise",
            "rank 0: ValueError: a fault was planted here",
            marks=pytest.mark.slow,
        ),
        ("1:step:hang", "hangs"),
        pytest.param("1:load:exit", "died during load", marks=pytest.mark.slow),
    ],
)
def test_a_faulty_rank_ends_the_job(fault, says):
    path = os.pathsep.join([FAULTS, *filter(None, [os.environ.get("PYTHONPATH")])])
    with torchrun(
        2,
        [*ENDLESS, "--step_timeout", "4", "--load_timeout", "30"],
        env={"FAULT": fault, "PYTHONPATH": path},
    ) as job:
        while not job.pids():
            time.sleep(0.05)
        assert says in ended(job, 45)


def test_a_truncated_shard_ends_every_rank(tmp_path):
    """Found from the headers on all ranks at once: one message with the file and the fix, in
    seconds."""
    folder = shutil.copytree(DEMO, tmp_path / "cut")
    shard = folder / "consolidated.01.pth"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with torchrun(
        2,
        ["-m", "llama_tp.generate", "--ckpt_dir", str(folder), "--prompt", "x", "--device", "cpu"],
    ) as job:
        while not job.pids():
            time.sleep(0.05)
        message = ended(job, 60)  # seconds, not the half hour of a load; a busy machine needs some
    assert "consolidated.01.pth" in message and "again" in message


@pytest.mark.slow
def test_two_nodes_on_one_host():
    """Two torchrun agents, one rank each, write the text of one torchrun with two ranks; only rank
    0 prints."""
    port = free_pair()
    args = [
        "-m",
        "llama_tp.generate",
        "--ckpt_dir",
        str(DEMO),
        "--prompt",
        "ROMEO:",
        "--temperature",
        "0",
        "--max_gen_len",
        "20",
        "--device",
        "cpu",
        "--deterministic",
    ]

    def options(node: int) -> list[str]:
        return [
            "--nnodes",
            "2",
            "--node_rank",
            str(node),
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            str(port),
        ]

    with (
        torchrun(1, args, options=options(0)) as first,
        torchrun(1, args, options=options(1)) as second,
    ):
        assert first.wait() == 0, first.stderr
        assert second.wait() == 0, second.stderr
        text = first.stdout
        assert second.stdout == "" and len(text) > 20
    with torchrun(2, args) as one:
        assert one.wait() == 0
        assert one.stdout == text
