"""Which rank is named, and for what: the judgement by itself, on tables written by hand."""

import math

import pytest
import torch.distributed as dist

from llama_tp.arch.errors import UserError
from llama_tp.parallel.diagnosis import Seen, Sign, describe, diagnose, is_echo, silent

NOW = 1000.0


def seen(rank, ago=0.5, lost=False, **sign):
    return Seen(rank, NOW - ago, 100 + rank, "box", Sign(**sign), lost)


def text(*table, idle_limit_s=30.0):
    cause = diagnose(list(table), NOW, idle_limit_s)
    return cause.text if cause else None


def step(busy_s=1.0, collectives=50, limit_s=3.0, **more):
    return dict(
        what="step 7", busy_s=busy_s, limit_s=limit_s, collectives=collectives, call=2, **more
    )


@pytest.mark.parametrize(
    "table",
    [
        [seen(0), seen(1)],
        [seen(0, **step()), seen(1, **step(collectives=49))],
        [seen(0, ago=25), seen(1)],  # idle, quiet, within the limit
        [seen(0, what="call 3", busy_s=9999, limit_s=math.inf), seen(1)],  # a wait without limit
        [seen(0), seen(1, left=True, lost=True)],  # ended in good order
        [seen(0, **step()), seen(1, left=True, lost=True)],  # a moment earlier than rank 0
        # the whole job was told to end
        [seen(0, signal="SIGTERM"), seen(1, signal="SIGTERM", lost=True)],
        # a long read that holds the GIL
        [seen(0), seen(1, ago=100, what="load", busy_s=1, limit_s=500)],
    ],
)
def test_nothing_is_wrong(table):
    assert text(*table) is None


def test_a_death_is_the_cause_of_a_broken_collective():
    table = (
        seen(0, error="RuntimeError: gloo: Connection closed by peer", echo=True),
        seen(1, lost=True, what="load"),
    )
    assert text(*table).startswith("rank 1 (pid 101, host box) died during load")
    assert "out of memory" in text(*table)


def test_an_exception_is_the_cause_of_everything_else():
    assert (
        text(seen(0, **step(busy_s=99)), seen(1, error="ValueError: boom"), seen(2, lost=True))
        == "rank 1: ValueError: boom"
    )


def test_an_echo_is_better_than_nothing():
    assert (
        text(seen(0), seen(1, error="RuntimeError: NCCL error", echo=True))
        == "rank 1: RuntimeError: NCCL error"
    )


def test_silence():
    assert (
        "rank 1 (pid 101, host box) has stopped answering during step 7: no sign of life for 4 s"
        in text(seen(0, **step(busy_s=3.9)), seen(1, ago=4, **step()))
    )
    assert "rank 0 (pid 100, host box) has stopped answering: no sign of life for 31 s" in text(
        seen(0, ago=31), seen(1)
    )


def test_the_rank_that_all_wait_for_is_named():
    late = seen(2, **step(busy_s=5, collectives=48, where="worker.py:9 in run"))
    said = text(seen(0, **step(busy_s=5)), seen(1, **step(busy_s=5)), late)
    assert said.startswith(
        "rank 2 (pid 102, host box) hangs during step 7: rank 0 has waited in step 7 for 6 s "
        "(limit 3 s)"
    ) and said.endswith("it is at worker.py:9 in run")


def test_with_no_rank_behind_the_one_over_time_is_named():
    assert text(seen(0), seen(1, **step(busy_s=5, collectives=0))).startswith(
        "rank 1 (pid 101, host box) has been in step 7 for 6 s (limit 3 s), and no rank is behind "
        "it"
    )


def test_a_call_that_was_not_made():
    said = text(
        seen(0, what="step 7", busy_s=5, limit_s=3, call=3, collectives=9),
        seen(1, call=2, collectives=8),
    )
    assert said.startswith(
        "rank 1 (pid 101, host box) has not made call 3, in which rank 0 has waited for 6 s"
    )


def test_a_rank_that_left_early():
    said = "rank 1 has left, while rank 0 was still in step 7: every rank must make every call"
    assert (
        text(
            seen(0, error="RuntimeError: closed", echo=True, **step()),
            seen(1, left=True, lost=True),
        )
        == said
    )
    assert (
        text(seen(0, **step(busy_s=20, limit_s=60)), seen(1, ago=20, left=True, lost=True)) == said
    )


def test_one_rank_told_to_end():
    assert (
        text(seen(0), seen(1, signal="SIGTERM"))
        == "rank 1 (pid 101, host box) was told to end by SIGTERM"
    )


def test_silent_ranks_are_those_that_only_sigkill_reaches():
    table = [seen(0), seen(1, ago=9), seen(2, ago=9, lost=True), seen(3, ago=9, left=True)]
    assert [each.rank for each in silent(table, NOW)] == [1]


def test_errors_as_text():
    assert describe(UserError("no weights", "none", "copy them")) == "no weights - none - copy them"
    try:
        raise ValueError("boom")
    except ValueError as error:
        said = describe(error)
    assert said.startswith("ValueError: boom\n") and "test_errors_as_text" in said
    assert len(describe(ValueError("x" * 10 + "\n" + "y" * 10))) < 200


@pytest.mark.parametrize(
    "error, echo",
    [
        (
            RuntimeError(
                "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"
            ),
            True,
        ),
        (RuntimeError("Timed out waiting 3000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (FileNotFoundError("peer.txt"), False),
        (UserError("nccl is not there"), False),
    ],
)
def test_echoes(error, echo):
    assert is_echo(error) is echo
