"""Real processes for tests: a pool of gloo ranks that run functions, commands that start in
milliseconds, and a torchrun that cannot outlive its test.

    from tests.ranks import command, run, torchrun

    def adds(ranks, n):                       # module level, so that the other processes find it
        return all_reduce(torch.full((n,), 1.0), ranks).tolist()

    def test_adds():
        assert run(2, adds, 3) == [[2.0] * 3] * 2

    def test_generate():
        assert command("generate", "--prompt", "x", "--ckpt_dir", folder).returncode == 0

The pool of each size is started at its first use and lives until the session ends. Results and
arguments are pickled: that is for tests only.

Importing torch takes 1 to 2 s of a core. Pools and commands are forked from a server that has done
it (`FORK`). What `torchrun` launches, and the servers of tests/servers.py, are new processes.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from llama_tp.parallel.groups import close, init_ranks, single_rank

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120  # for what must come, on a busy machine too: ends a hang, promises nothing
_pools: dict[int, "Pool"] = {}
# The process that children are forked from. It has no threads, and no state but imported modules.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.preload"])


class RankFailed(AssertionError):
    """A function raised, or hung, in a rank of the pool; the text holds that rank's traceback."""


def run(tp: int, fn, *args, timeout: float = PATIENCE_S, **kwargs) -> list:
    """Calls `fn(ranks, *args, **kwargs)` on `tp` ranks at once; their results in rank order.

    `fn` must be a module-level function of a test module. tp 1 runs in this process. After a
    failure the pool is thrown away, so the next call starts with fresh ranks.
    """
    if tp == 1:
        return [fn(single_rank(), *args, **kwargs)]
    return pool(tp).run(fn, *args, timeout=timeout, **kwargs)


def pool(tp: int) -> "Pool":
    """The session's pool of `tp` ranks."""
    if tp not in _pools:
        _pools[tp] = Pool(tp)
    return _pools[tp]


class Pool:
    """tp processes, each with `Ranks` of its own, waiting for functions to call."""

    def __init__(self, tp: int):
        port = free_port()
        self.tp, self.pipes, self.processes = tp, [], []
        for rank in range(tp):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=_rank_main, args=(rank, tp, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, fn, *args, timeout: float = PATIENCE_S, **kwargs) -> list:
        answers, deadline = [], time.monotonic() + timeout
        try:
            for pipe in self.pipes:
                pipe.send((fn, args, kwargs))
            waiting = dict(enumerate(self.pipes))
            while waiting and time.monotonic() < deadline:
                ready = multiprocessing.connection.wait(
                    list(waiting.values()), deadline - time.monotonic()
                )
                for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                    answers.append((rank, *waiting.pop(rank).recv()))
                if any(error for _, _, error in answers):
                    # the others' errors, if they come soon
                    deadline = min(deadline, time.monotonic() + 2)
        except (EOFError, OSError) as error:
            answers.append((-1, None, f"a rank of the pool died: {error!r}"))
        errors = [f"rank {rank}:\n{error}" for rank, _, error in answers if error]
        if errors or len(answers) < self.tp:
            self.stop()
            late = sorted(set(range(self.tp)) - {rank for rank, _, _ in answers})
            raise RankFailed("\n".join(errors) + (f"\nno answer from ranks {late}" if late else ""))
        return [result for _, result, _ in sorted(answers, key=lambda answer: answer[0])]

    def stop(self) -> None:
        _pools.pop(self.tp, None)
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)


def _rank_main(rank: int, tp: int, port: int, pipe) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(tp),
        LOCAL_WORLD_SIZE=str(tp),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LLAMA_TP_THREADS="1",
    )
    ranks = init_ranks("cpu", timeout_s=120)
    while True:
        try:
            fn, args, kwargs = pipe.recv()
        except EOFError:
            break
        except Exception:
            pipe.send((None, traceback.format_exc()))  # the function could not be imported here
            continue
        try:
            answer = (fn(ranks, *args, **kwargs), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        pipe.send(answer)
    close(ranks)


def command(
    *words: str, stdin: str | bytes = "", env: dict[str, str] | None = None, code: int | None = None
) -> subprocess.CompletedProcess:
    """The finished `python -m llama_tp.WORDS`, with its stdout and stderr as text; one process.

    It is forked from a process that has imported torch, so it starts in milliseconds. Arguments,
    environment, standard streams, exit code, threads and signals are as in a new process. What a
    command imports, and when, is not seen here: a test of that starts a new Python.

    Args:
        env: added to this process's environment.
        code: fails the test unless the command ended with it.
    """
    env = {**os.environ, "LLAMA_TP_THREADS": "1", **(env or {})}
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name, stream) for stream in ("stdin", "stdout", "stderr")]
        files[0].write_bytes(stdin if isinstance(stdin, bytes) else stdin.encode())
        process = FORK.Process(target=_command, args=(files, words, env))
        process.start()
        process.join(PATIENCE_S)
        if process.is_alive():
            process.kill()
            process.join()
        stdout, stderr = (file.read_text("utf-8") if file.exists() else "" for file in files[1:])
    assert process.exitcode != -signal.SIGKILL, f"ended after {PATIENCE_S} s: {stdout}\n{stderr}"
    assert code in (None, process.exitcode), stderr
    return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


def _command(files: list[Path], words: tuple[str, ...], env: dict[str, str]) -> None:
    """In the forked process: becomes `python -m llama_tp.WORDS` with these standard streams."""
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv, code = list(words), 0  # runpy puts the module's path in the first one's place
    try:
        runpy.run_module(f"llama_tp.{words[0]}", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # as every Python ends: threads are joined, then atexit functions run
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


@atexit.register
def stop_pools() -> None:
    """Ends all pools."""
    for each in list(_pools.values()):
        each.stop()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def free_pair() -> int:
    """A --master_port: free a moment ago, as the port after it was. Below those that the kernel
    hands out to others by itself."""
    while True:
        port = random.randrange(10_000, 32_000)
        with (
            contextlib.suppress(OSError),
            socket.create_server(("", port)),
            socket.create_server(("", port + 1)),
        ):
            return port


class Launched:
    """A running torchrun: `.process`, `.pids()` of its ranks, `.wait()`; stdout and stderr go to
    files.

    `start_s` is how long it took until its ranks were seen: what a promise of seconds is held
    against (`soon`).
    """

    def __init__(self, process: subprocess.Popen, folder: Path):
        self.process, self.folder = process, folder
        self.started, self.start_s = time.monotonic(), 0.0
        self.seen: set[int] = set()

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def pids(self) -> list[int]:
        """Process ids of the ranks, in rank order: the agent's children carry RANK in their
        environment."""
        ranks = {}
        for pid in children(self.process.pid):
            with contextlib.suppress(OSError):
                env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = [line[5:] for line in env if line.startswith(b"RANK=")]
                if rank:
                    ranks[int(rank[0])] = pid
        self.seen |= set(ranks.values())
        self.start_s = self.start_s or (time.monotonic() - self.started if ranks else 0.0)
        return [ranks[rank] for rank in sorted(ranks)]

    def soon(self, promised_s: float) -> float:
        """A promise of so many seconds, on a machine that is as busy as this one was when it
        started this job."""
        return promised_s + 3 * self.start_s

    def wait_for(self, text: str, timeout: float = PATIENCE_S, where: str = "stderr") -> None:
        """Waits until `text` has been printed."""
        deadline = time.monotonic() + timeout
        while text not in getattr(self, where):
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.stderr}"
            assert time.monotonic() < deadline, f"no {text!r} after {timeout} s:\n{self.stderr}"
            time.sleep(0.05)
        self.pids()

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """The exit code; fails the test if it does not end in time."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout} s:\n{self.stdout}\n{self.stderr}"
            ) from None

    def left_over(self, within: float = 0) -> list[int]:
        """Ranks once seen by `pids` that still live after `within` seconds."""
        deadline = time.monotonic() + within
        while (
            alive := [pid for pid in self.seen if is_alive(pid)]
        ) and time.monotonic() < deadline:
            time.sleep(0.05)
        return alive


@contextlib.contextmanager
def torchrun(
    n: int,
    argv: list[str],
    env: dict[str, str] | None = None,
    options: list[str] | None = None,
    module: str = "llama_tp.launch",
):
    """Starts `argv` (["-m", "module", ...] or ["script.py", ...]) on `n` ranks, as our launcher
    does; kills all of it at the end.

    `options` are more of the launcher's; `module` torch.distributed.run is torchrun as torch has
    it.
    """
    # in the environment of all that belongs to this job
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            sys.executable,
            "-m",
            module,
            *(options or []),
            "--nproc_per_node",
            str(n),
            *argv,
        ]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            process = subprocess.Popen(
                command,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "LLAMA_TP_THREADS": "1",
                    **(env or {}),
                    "LLAMA_TP_TEST_JOB": mark,
                },
            )
        launched = Launched(process, folder)
        try:
            yield launched
        finally:
            end_job(process, f"LLAMA_TP_TEST_JOB={mark}")


def end_job(process: subprocess.Popen, variable: str) -> None:
    """Kills a process, and all that are marked as belonging to it (see `marked`)."""
    process.kill()
    process.wait()
    while left := marked(variable):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def marked(variable: str) -> list[int]:
    """All living processes with this "NAME=value" in their environment (Linux)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and is_alive(int(folder.name)):
            with contextlib.suppress(OSError):
                if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def children(pid: int) -> list[int]:
    """Direct children of a process (Linux)."""
    with contextlib.suppress(OSError):
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    return []


def is_alive(pid: int) -> bool:
    """Whether the process runs or is stopped; a zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
