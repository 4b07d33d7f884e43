"""Ranks that fail in real processes: how soon all are gone, with which code, and what is said,
once.

Most ranks here are forked from a server that has imported torch already (tests/ranks.py), so that
a job takes a second to start; what depends on torchrun is tested under torchrun.
tests/test_failures.py does the same to whole commands.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from llama_tp.arch.errors import UserError
from llama_tp.parallel.collectives import all_reduce, barrier
from llama_tp.parallel.groups import close, init_ranks, single_rank
from llama_tp.parallel.hard_exit import kill_here
from llama_tp.parallel.health import MAX_STRANGERS, Watch
from llama_tp.parallel.json_lines import listen
from tests.listeners import listeners
from tests.ranks import FORK, free_pair, free_port, run, torchrun

STEP_S, LOAD_S = 2.0, 4.0
END_S = 45.0  # all ranks are gone by then, on a busy machine too, and before gloo's own 60 s are up


def rank_main() -> None:
    """A rank: loads for a moment, then takes steps for ever, unless FAULT ("rank:place:action;
    ...") says otherwise."""
    ranks = init_ranks("cpu", timeout_s=60)
    faults = [fault.strip().split(":") for fault in os.environ.get("FAULT", "").split(";") if fault]

    def strike(place: str) -> None:
        for rank, where, action in faults:
            if where == place and rank in (str(ranks.rank), "*"):
                {
                    "raise": raise_value_error,
                    "refuse": refuse,
                    "exit": crash,
                    "hang": hang,
                    "stop": stop_me,
                    "idle": lambda: time.sleep(1.7 * STEP_S),
                    "home": go_home,
                }[action]()

    with contextlib.suppress(GoHome), Watch(ranks, STEP_S, LOAD_S) as watch:
        with watch.busy("load", watch.load_timeout_s):
            strike("load")
            barrier(ranks)
        for n in range(1, int(os.environ.get("STEPS", "100000"))):
            watch.progress(1 + n // 10, n)
            with watch.busy(f"step {n}"):
                strike(f"step {n}")
                all_reduce(torch.ones(4), ranks)
            if n == 5 and ranks.is_driver:
                print("running", file=sys.stderr, flush=True)
            strike(f"after {n}")
            time.sleep(0.01)
        strike("end")
    close(ranks)


class GoHome(SystemExit):
    """Leaves the `with` in good order."""


def raise_value_error():
    raise ValueError("boom")


def refuse():
    raise UserError("the weights are odd", "3 of them", "get even ones")


def crash():
    time.sleep(0.3)
    os._exit(7)


def hang():
    time.sleep(1000)


def stop_me():
    os.kill(os.getpid(), signal.SIGSTOP)


def go_home():
    raise GoHome(0)


class Job:
    """tp forked ranks; their output in one file each, as a launcher would collect it."""

    def __init__(self, tp: int, folder, **env):
        self.folder, self.port = folder, free_port()
        self.ranks = [
            FORK.Process(target=forked_rank, args=(rank, tp, self.port, str(folder), env))
            for rank in range(tp)
        ]
        for process in self.ranks:
            process.start()

    @property
    def stderr(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("stderr*")))

    def running(self) -> None:
        """Waits until the ranks take steps."""
        while "running" not in self.stderr:
            assert any(process.is_alive() for process in self.ranks), self.stderr
            time.sleep(0.02)

    def codes(self, within: float = END_S) -> list[int]:
        """The ranks' exit codes, once all have ended in time."""
        deadline = time.monotonic() + within
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        assert not any(process.is_alive() for process in self.ranks), (
            f"not gone after {within} s: {self.stderr}"
        )
        return [process.exitcode for process in self.ranks]

    def message(self) -> str:
        """What the job said, which must be one error."""
        said = self.stderr.replace("running\n", "")
        assert said.count("error: ") == 1 and said.startswith("error: "), said
        return said.removeprefix("error: ").rstrip()


def forked_rank(rank: int, tp: int, port: int, folder: str, env: dict) -> None:
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(tp),
        LOCAL_WORLD_SIZE=str(tp),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LLAMA_TP_THREADS="1",
        **env,
    )
    rank_main()


@pytest.fixture
def job(tmp_path):
    """Starts jobs, and sees to it that nothing is left of them."""
    jobs = []

    def start(tp=2, **env) -> Job:
        jobs.append(Job(tp, tmp_path, **env))
        return jobs[-1]

    yield start
    for process in [process for each in jobs for process in each.ranks]:
        process.kill()
        process.join(10)


def test_a_good_end_is_quiet(job):
    """Also with idle times beyond every timeout, and with one rank that goes home long after the
    others."""
    good = job(3, STEPS="20", FAULT="*:after 7:idle;0:end:idle")
    assert good.codes() == [0, 0, 0]
    assert good.stderr == "running\n"
    assert not any(path.read_text() for path in good.folder.glob("stdout*")), (
        "init must not write to stdout"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(job, rank):
    killed = job(3)
    killed.running()
    killed.ranks[rank].kill()
    codes = killed.codes()
    assert codes.pop(rank) == -9 and codes == [1, 1]
    name = rf"rank {rank} \(pid {killed.ranks[rank].pid}, host {re.escape(socket.gethostname())}\)"
    assert re.fullmatch(rf"{name} died( during step \d+)?: .*out of memory.*", killed.message())


# Jobs in which a rank stops answering or comes to a halt: fault, that rank's exit code, what is
# said.
HALTS = {
    "driver stops": (
        "0:step 9:stop",
        -9,
        r"rank 0 \(pid \d+, .*\) has stopped answering.*: no sign of life for .*",
    ),
    "worker stops": (
        "1:step 9:stop",
        -9,
        r"rank 1 \(pid \d+, .*\) has stopped answering.*: no sign of life for .*",
    ),
    "driver hangs": (
        "0:step 9:hang",
        1,
        r"rank 0 \(.*\) hangs during step 9: rank 1 has waited in step 9 for \d s "
        r"\(limit 2 s\); it is at test_health.py:\d+ in hang",
    ),
    "worker hangs": (
        "1:step 9:hang",
        1,
        r"rank 1 \(.*\) hangs during step 9: rank 0 has waited in step 9 for \d s "
        r"\(limit 2 s\); it is at test_health.py:\d+ in hang",
    ),
    "load hangs": (
        "1:load:hang",
        1,
        r"rank 1 \(.*\) hangs during load: rank 0 has waited in load for \d s .*",
    ),
    "no call": (
        "1:after 19:hang",
        1,
        r"rank 1 \(.*\) has not made call 3, in which rank 0 has waited for \d s .*",
    ),
}


@pytest.fixture(scope="module")
def halted(tmp_path_factory):
    """All these jobs, started at once: they mostly wait for their timeouts."""
    jobs = {
        name: Job(2, tmp_path_factory.mktemp("job"), FAULT=fault)
        for name, (fault, *_) in HALTS.items()
    }
    yield jobs
    for process in [process for each in jobs.values() for process in each.ranks]:
        process.kill()
        process.join(10)


@pytest.mark.parametrize("name", HALTS)
def test_a_halt(halted, name):
    fault, code, said = HALTS[name]
    codes = halted[name].codes()
    assert codes.pop(int(fault[0])) == code and codes == [1]
    assert re.fullmatch(said, halted[name].message())


def test_a_rank_that_raises(job):
    raised = job(FAULT="1:step 9:raise")
    assert raised.codes() == [1, 1]
    assert raised.message().startswith("rank 1: ValueError: boom\nTraceback")
    assert raised.message().count("Traceback") == 1 and "in raise_value_error" in raised.message()


def test_ranks_that_all_refuse_speak_once(job):
    refused = job(4, FAULT="*:load:refuse")
    assert refused.codes() == [1] * 4
    assert refused.message() == "rank 0: the weights are odd - 3 of them - get even ones"


def test_a_rank_that_dies_while_loading(job):
    died = job(FAULT="1:load:exit")
    assert sorted(died.codes()) == [1, 7]
    assert "rank 1 " in died.message() and "died during load" in died.message()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_leaves_early(job, rank):
    left = job(FAULT=f"{rank}:after 9:home")
    codes = left.codes()
    assert codes[rank] == 0 and codes[1 - rank] == 1
    assert left.message() == (
        f"rank {rank} has left, while rank {1 - rank} was still in step 10: "
        "every rank must make every call"
    )


def test_a_single_rank_told_to_end_is_named(job):
    told = job()
    told.running()
    told.ranks[1].terminate()
    assert told.codes() == [1, 1]
    assert re.match(r"rank 1 \(.*\) was told to end by SIGTERM", told.message())


def test_strangers_are_cut_off(job):
    """Whoever connects without the launch's token is dropped, whatever it says, and nobody is
    disturbed."""
    disturbed = job(STEPS="200")
    disturbed.running()
    store = dist.TCPStore("127.0.0.1", disturbed.port, is_master=False)
    host, port, *_ = json.loads(store.get("llama_tp/watch/0"))
    assert host == "127.0.0.1"
    for words in (
        b'["\xc3\xa9", 1, 2, "x"]\n',
        b"[[]]\n",
        b'{"leave": 9, "stopped": []}\n',
        b"\xff\n",
        b"x" * 300_000,
    ):
        with socket.create_connection((host, port), timeout=5) as stranger:
            with contextlib.suppress(ConnectionError):
                stranger.sendall(words)
                assert stranger.recv(100) == b""
    silent = [socket.create_connection((host, port), timeout=5) for _ in range(MAX_STRANGERS + 20)]
    # as many as may be: older ones make communicator for newer ones
    assert all(each.recv(100) == b"" for each in silent[:20])
    assert disturbed.codes() == [0, 0] and disturbed.stderr == "running\n"


@pytest.mark.parametrize(
    "n_nodes, master, bound",
    [
        (1, "far.example", "127.0.0.1"),  # one machine: nobody else can call
        (2, "127.0.0.1", "127.0.0.1"),  # can only mean this machine
        (2, "own.name", "0.0.0.0"),  # the loopback here, and something else on the other nodes
        (2, "192.0.2.1", "0.0.0.0"),  # not an interface of ours
    ],
)
def test_where_the_driver_listens(n_nodes, master, bound, monkeypatch):
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **named: resolve(
            {"own.name": "127.0.1.1"}.get(host, host), *rest, **named
        ),
    )
    with listen(master, n_nodes) as sock:
        assert sock.getsockname()[0] == bound


def test_only_our_own_command_is_killed():
    with subprocess.Popen(["sleep", "60"]) as other:
        kill_here([[other.pid, socket.gethostname()], [0, socket.gethostname()]])
        time.sleep(0.1)
        assert other.poll() is None
        other.kill()


def signs_in(ranks, seconds: float) -> int:
    """How often an idle rank tells the others that it is alive."""
    watch, said = Watch(ranks), []
    say = watch._say
    watch._say = lambda now: (said.append(now), say(now))
    time.sleep(seconds)
    n = len(said)
    barrier(ranks)
    watch.close()
    return n


def test_ranks_do_not_answer_every_sign_of_life():
    """One a second each. Answering what one hears made them talk without end, on a third of a core
    each."""
    assert all(2 <= n <= 6 for n in run(2, signs_in, 3.2))


def test_a_single_rank_watches_nobody():
    handler, hook = signal.getsignal(signal.SIGTERM), sys.excepthook
    with pytest.raises(ValueError, match="boom"), Watch(single_rank(), 0.01) as watch:
        with watch.busy("step 1"):
            time.sleep(0.1)
        watch.fail(ValueError("boom"))
    assert (signal.getsignal(signal.SIGTERM), sys.excepthook) == (handler, hook)


# Under torchrun.


def errors(launched) -> list[str]:
    return [line for line in launched.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "rank.py"
    path.write_text("from tests.parallel.test_health import rank_main\nrank_main()\n")
    return [str(path)]


@pytest.mark.slow
def test_torchrun_says_which_rank_was_killed(script):
    """It ends the others within 0.1 s: the driver must find the time to explain."""
    with torchrun(2, script) as launched:
        launched.wait_for("running")
        os.kill(launched.pids()[1], signal.SIGKILL)
        assert launched.wait(END_S) != 0
        assert not launched.left_over(within=launched.soon(1))
        assert (
            len(errors(launched)) == 1
            and "rank 1 (pid" in errors(launched)[0]
            and "died" in errors(launched)[0]
        )


def test_a_killed_torchrun_takes_its_ranks_along(script):
    with torchrun(2, script) as launched:
        launched.wait_for("running")
        os.kill(launched.process.pid, signal.SIGKILL)
        assert not launched.left_over(within=launched.soon(10))
        assert errors(launched) == [f"error: rank 0: torchrun (pid {launched.process.pid}) is gone"]


@pytest.mark.slow
def test_a_torchrun_killed_while_ranks_start_takes_them_along(script):
    with torchrun(2, script) as launched:
        while len(launched.pids()) < 2:
            time.sleep(0.01)
        os.kill(launched.process.pid, signal.SIGKILL)
        assert not launched.left_over(within=launched.soon(15))


def test_a_torchrun_told_to_end_ends_quietly(script):
    with torchrun(2, script) as launched:
        launched.wait_for("running")
        launched.process.send_signal(signal.SIGINT)
        launched.wait(END_S)
        assert not launched.left_over(within=launched.soon(1)) and errors(launched) == []


def test_two_agents_as_two_nodes(script):
    """Ranks on two nodes watch each other over the network; a death on one ends both."""
    port = free_pair()

    def node(n):
        return torchrun(
            1,
            script,
            options=[
                "--nnodes",
                "2",
                "--node_rank",
                str(n),
                "--master_addr",
                "127.0.0.1",
                "--master_port",
                str(port),
            ],
        )

    with node(0) as first, node(1) as second:
        first.wait_for("running")
        [rank] = first.pids()
        # the launcher itself cannot be told where to listen
        found = {each[1:] for each in listeners([rank])}
        assert ("127.0.0.1", port + 1) in found and not {"0.0.0.0", "::"} & {
            address for address, _ in found
        }
        os.kill(second.pids()[0], signal.SIGKILL)
        assert first.wait(END_S) != 0 and second.wait(END_S) != 0
        assert not first.left_over(within=first.soon(1)) and not second.left_over(
            within=second.soon(1)
        )
        for said in map(errors, (first, second)):  # each machine's terminal tells it, once
            assert len(said) == 1 and "rank 1 (pid" in said[0]
