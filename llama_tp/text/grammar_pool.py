"""Workers for forms (grammar_process), as their parent sees them: started, handed out, tried with a
form, killed.

One form has one worker, so that a form that takes long delays nobody else. A worker that has served
an honest form serves the next one. One more than is needed stands by. Nothing here waits but
`try_form`; knows no requests.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from llama_tp.arch.errors import UserError
from llama_tp.text.grammar import Form, check_tokenizer
from llama_tp.text.grammar_process import MEMORY_BYTES, Frames, frame
from llama_tp.text.token_table import Tokenizer

CPU_S = 2.0  # for one message: an honest one takes a thousandth of it
START_S = 60.0  # for a worker to be there: with the fork server, a second on an idle machine
# times the limit of CPU time an answer may take: where others have work, it gets less than a core
ANSWER_CPU_S = 2.5
# a trial that takes longer makes room for others, and goes on with the lowest priority
QUICK_S = 0.1
N_QUICK = N_SLOW = 4  # trials at once
NICE, LOWEST = 5, 19
PROCESS_CLOCK = 2  # Linux: with a process id, the number of the clock of its CPU time
# kept beyond the ones at work: forking another takes 1 to 5 ms, and each holds some 25 MB
MAX_IDLE = 2
MAX_DEATHS = 5  # of workers over one answer, sooner than a limit can have ended them
MAX_GOOD = 1024  # forms that are known to be good


class Worker:
    """One end of a worker's socket. `pid` is 0 until it is there; `gone`: it has ended."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self.sock, self.pid, self.gone, self.demoted = sock, 0, False, False
        self._frames, self._out, self._handle = Frames(sock), b"", -1

    def send(self, body: bytes) -> None:
        """Never waits: what does not fit now is sent by `take`."""
        self._out += frame(body)
        self._send_some()

    def _send_some(self) -> None:
        with contextlib.suppress(OSError):  # full, or gone: then `take` finds out
            while self._out:
                self._out = self._out[self.sock.send(self._out) :]

    def events(self) -> int:
        """What to poll its socket for."""
        return select.POLLIN | (select.POLLOUT if self._out else 0)

    def take(self) -> list[bytearray]:
        """The answers that have come: see grammar_process."""
        self._send_some()
        bodies = self._frames.read()
        if bodies is None:
            self.gone, bodies = True, []
        if bodies and not self.pid:
            self._know(int(bodies.pop(0)[1:]))
        return bodies

    def _know(self, pid: int) -> None:
        self.pid = pid
        with contextlib.suppress(OSError, AttributeError):
            self._handle = os.pidfd_open(pid)  # a process id may be another's, some time

    @property
    def cpu_s(self) -> float:
        """CPU time that it has used so far; 0 of one that is not there."""
        with contextlib.suppress(OSError):
            return time.clock_gettime(~self.pid << 3 | PROCESS_CLOCK) if self.pid else 0.0
        return 0.0

    def demote(self) -> None:
        """Gives it the lowest priority, for good."""
        if self.pid and not self.demoted:
            self.demoted = True
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self.pid, LOWEST)

    def kill(self) -> None:
        """Safe to call twice. One that is not there yet ends when it finds nobody."""
        with contextlib.suppress(OSError):
            if self._handle >= 0:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            elif self.pid:
                os.kill(self.pid, signal.SIGKILL)
        if self._handle >= 0:
            os.close(self._handle)
        self._handle, self.pid, self.gone = -1, 0, True
        self.sock.close()


class Busy(UserError):
    """Too many forms are being tried that take long."""


class GrammarPool:
    """Starts workers, hands them out, and tries forms in them.

    Args:
        tokenizer: one that `open_tokenizer` has made, which the processes open again.
        nice: of its workers, as long as they are quick.
        cpu_s: the limit of CPU time for one message to a worker.

    Raises UserError where forms cannot be followed: no llguidance, a tokenizer without an end.
    """

    def __init__(self, tokenizer: Tokenizer, nice: int = 0, cpu_s: float = CPU_S):
        check_tokenizer(tokenizer)
        if tokenizer.source is None:
            raise UserError(
                "structured output needs a tokenizer that other processes can open",
                "this one was not read from a file",
                "open it with llama_tp.text.tokenizer.open_tokenizer",
            )
        self._source, self._nice, self.cpu_s, self.answer_s = (
            tokenizer.source,
            nice,
            cpu_s,
            ANSWER_CPU_S * cpu_s,
        )
        # the fork server, and the socket to it: both or neither
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._idle: list[Worker] = []
        self._good: OrderedDict[Form, None] = OrderedDict()
        self._lock = threading.Lock()
        self._quick, self._slow = (
            threading.BoundedSemaphore(N_QUICK),
            threading.BoundedSemaphore(N_SLOW),
        )

    def prepare(self) -> None:
        """Starts what the first form would have to wait for."""
        self.give(self.take())

    def take(self) -> Worker:
        """A worker without a form; the caller gives it back."""
        with self._lock:
            while self._idle and (worker := self._idle.pop()):
                worker.take()
                if not worker.gone:
                    break
                worker.kill()
            else:
                worker = self._fork()
            if not self._idle:
                self._idle.append(self._fork())  # the one that stands by
            return worker

    def give(self, worker: Worker) -> None:
        """Takes a worker back, which has answered all that it was sent; else `kill` it."""
        with self._lock:
            if worker.gone or worker.demoted or len(self._idle) >= MAX_IDLE:
                worker.kill()
            else:
                self._idle.append(worker)

    def _fork(self) -> Worker:
        mine, its = socket.socketpair()
        with its:
            for _ in range(2):
                if self._control is None:
                    self._server, self._control = self._start()
                try:
                    socket.send_fds(
                        self._control,
                        [str(self._nice).encode()],
                        [its.fileno()],
                        socket.MSG_DONTWAIT,
                    )
                    break
                except OSError:  # it has ended, or does not listen
                    self._stop()
        return Worker(mine)

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """The fork server, on CPUs of its parent's parent: a rank is pinned to a few, and needs
        these itself."""
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(__file__).resolve().parents[2])
        env = os.environ | {
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }
        with its:
            process = subprocess.Popen(
                [sys.executable, "-m", "llama_tp.text.grammar_process"],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
        mine.send(json.dumps([*self._source, self.cpu_s]).encode())
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setaffinity(process.pid, os.sched_getaffinity(os.getppid()))
        return process, mine

    def _stop(self) -> None:
        if self._server is not None and self._control is not None:
            self._control.close()
            self._server.kill()
            self._server.wait()
        self._server = self._control = None

    def close(self) -> None:
        """Ends all of it, also workers that are still out. Safe to call twice."""
        with self._lock:
            for worker in self._idle:
                worker.kill()
            self._idle.clear()
            self._stop()

    def knows(self, form: Form) -> bool:
        """Whether it has been tried lately, and was good."""
        with self._lock:
            if form in self._good:
                self._good.move_to_end(form)
            return form in self._good

    def try_form(self, form: Form) -> None:
        """Compiles a form and takes the first steps along it. Raises UserError for one that cannot
        be followed, or that takes too much time or memory; Busy. Waits for up to some seconds, and
        may be called by many threads."""
        if self.knows(form):
            return
        for _ in range(MAX_DEATHS):
            worker = self.take()
            with self._quick:
                worker.send(start_message(form, [(0, [])], is_trial=True))
                answer = self._wait_quickly(worker)
            if not worker.gone:  # else somebody has killed it: no limit can be reached so soon
                break
            worker.kill()
        try:
            if answer is None and not worker.gone:
                answer = self._try_slowly(worker)
            if answer is None:
                raise self.too_much(worker)
            if answer[:1] == b"e":
                raise error_of(answer)[1]
        except UserError:
            worker.kill()
            raise
        self.give(worker)
        with self._lock:
            self._good[form] = None
            if len(self._good) > MAX_GOOD:
                self._good.popitem(last=False)

    def too_much(self, worker: Worker) -> UserError:
        """What to say of a worker that has ended, or does not answer."""
        found = (
            f"more than {self.cpu_s:g} s of computing or {MEMORY_BYTES >> 20} MB of memory"
            if worker.gone or worker.pid
            else f"the process that follows it has not started within {START_S:g} s"
        )
        return UserError(
            "the form of the answer takes too much to follow",
            found,
            "make the schema, regex or grammar simpler",
        )

    def _wait_quickly(self, worker: Worker) -> bytearray | None:
        """Its answer, unless it has computed for half of QUICK_S. One that was not given a CPU
        meanwhile is not to blame."""
        begun_s, deadline = worker.cpu_s, time.monotonic() + self.answer_s
        while (answer := _wait(worker, QUICK_S)) is None and not worker.gone:
            if worker.cpu_s - begun_s >= QUICK_S / 2 or time.monotonic() > deadline:
                break
        return answer

    def _try_slowly(self, worker: Worker) -> bytearray | None:
        worker.demote()
        if not self._slow.acquire(blocking=False):
            raise Busy(
                "the form of the answer takes long to check, and so do others",
                f"{N_SLOW} are being checked",
                "ask again a little later, or make the schema, regex or grammar simpler",
            )
        try:
            return _wait(worker, self.answer_s)
        finally:
            self._slow.release()


def _wait(worker: Worker, seconds: float) -> bytearray | None:
    """A worker's next answer; None if it ends, or does not come in time. The time counts from when
    the worker is there."""
    deadline = time.monotonic() + seconds
    start_by = time.monotonic() + START_S
    while not worker.gone:
        was_there = bool(worker.pid)
        if answers := worker.take():
            return answers[0]
        now = time.monotonic()
        if worker.pid and not was_there:
            deadline = now + seconds
        left = (deadline if worker.pid else start_by) - now
        if left <= 0:
            return None
        wait_for([worker], left)
    return None


def wait_for(workers: Iterable[Worker], seconds: float) -> list[Worker]:
    """Those that have something to take, at least one unless the time is over."""
    by_file = {worker.sock.fileno(): worker for worker in workers}
    poll = select.poll()
    for file, worker in by_file.items():
        poll.register(file, worker.events())
    return [by_file[file] for file, _ in poll.poll(max(0.0, 1000 * seconds))]


def start_message(
    form: Form, outputs: list[tuple[int, list[int]]], is_trial: bool = False
) -> bytes:
    return json.dumps(
        {"form": [form.kind, form.source], "outputs": outputs, "try": is_trial}
    ).encode()


def tokens_message(tokens: list[tuple[int, int]]) -> bytes:
    return json.dumps({"tokens": tokens}).encode()


def error_of(answer: bytes | bytearray) -> tuple[int, UserError]:
    """The sample that an e is about, and the error."""
    sample, *words = json.loads(answer[1:])
    return sample, UserError(*words)
