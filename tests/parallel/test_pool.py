"""The tests' own pool of ranks: a failure is told with its traceback, and does not spoil what comes
after."""

import os
import time

import pytest

from tests.ranks import PATIENCE_S, RankFailed, marked, run, torchrun


def rank_of(ranks):
    return ranks.rank


def fails_on_one(ranks):
    if ranks.rank == 1:
        raise ValueError("boom")


def hangs_on_one(ranks):
    time.sleep(100 * ranks.rank)


def dies_on_one(ranks):
    if ranks.rank == 1:
        os._exit(3)


@pytest.mark.parametrize(
    "fn, timeout, said",
    [
        (fails_on_one, PATIENCE_S, "rank 1:.*ValueError: boom"),
        (hangs_on_one, 3, r"no answer from ranks \[1\]"),
        (dies_on_one, PATIENCE_S, "a rank of the pool died"),
    ],
)
def test_a_failure_is_told_and_the_next_pool_is_fresh(fn, timeout, said):
    assert run(2, rank_of) == [0, 1]
    with pytest.raises(RankFailed, match=f"(?s){said}"):
        run(2, fn, timeout=timeout)
    assert run(2, rank_of) == [0, 1]


def test_no_process_outlives_torchrun(tmp_path):
    """Not even one that ignores its parent's death and hides in a session of its own."""
    script = tmp_path / "stays.py"
    script.write_text(
        "import os, signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "print('here', file=sys.stderr, flush=True)\ntime.sleep(1000)\n"
    )
    with torchrun(1, [str(script)]) as job:
        job.wait_for("here")
        assert len(job.pids()) == 1
        environ = open(f"/proc/{job.pids()[0]}/environ").read().split("\0")
        mark = next(line for line in environ if line.startswith("LLAMA_TP_TEST_JOB="))
        assert len(marked(mark)) == 3
    assert marked(mark) == []
