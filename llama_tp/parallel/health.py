"""Liveness: if one rank fails, dies or hangs, the whole job ends soon, with one message that says which and why.

A daemon thread in each rank holds a TCP connection of its own to the driver and sends a sign of life every second, as a
line of JSON. The driver's thread judges (verdict), prints one error and tells everyone to leave; should the driver be
the one that is gone, the lowest worker speaks. On this path there is no collective and no teardown, only `os._exit`:
whatever hangs, hangs in those. Refuses to know what the work is; its users mark it with `busy`.

    with Watch(ranks, step_timeout_s=120) as watch:
        with watch.busy("load", watch.load_timeout_s): ...
        with watch.busy("step 17"): ...
"""

import atexit
import contextlib
import hmac
import json
import math
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

from llama_tp.parallel import log
from llama_tp.parallel.groups import Ranks
from llama_tp.parallel.verdict import Seen, Sign, silent, verdict
from llama_tp.spec.errors import UserError

BEAT_S = 1.0            # between two signs of life
WINDOW_S = 1.0          # from the first symptom to the verdict: a cause may be heard after its effects
SIGNALLED_S = 2.0       # a driver told to end by a signal still explains what it has just seen, then leaves
FAIL_WAIT_S = 10.0      # a failed rank waits this long for the driver's verdict before it speaks for itself
ERROR_CHARS = 20_000    # of a traceback, its end
LINE_BYTES = 1 << 18    # longest message: an error of ERROR_CHARS in JSON, with room
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)    # torchrun passes on the one that it got


class Watch:
    """Watches over the ranks from its construction to `close`; every rank makes one, right after `init_ranks`.

    With a single rank there is nobody to wait for: then nothing is started, and errors simply propagate.

    Args:
        ranks: this rank.
        step_timeout_s: limit of `busy` without a limit of its own, and of a silence while idle.
        load_timeout_s: for `busy("load", watch.load_timeout_s)`, and until a rank is first heard.
    """

    def __init__(self, ranks: Ranks, step_timeout_s: float = 120, load_timeout_s: float = 1800):
        self.ranks, self.step_timeout_s, self.load_timeout_s = ranks, step_timeout_s, load_timeout_s
        self._mark = ("", 0.0, math.inf)                    # what the main thread does, since when, limit in s
        self._call = self._step = self._done = 0
        self._error, self._echo, self._left = "", False, False
        self._signal, self._signalled_at = 0, math.inf
        self._noticed_at = None                             # when the first symptom was seen
        self._main = threading.get_ident()
        # Only torchrun's death orphans ranks; elsewhere (mpirun, nohup) a parent may end and mean nothing by it.
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        self._thread = None
        if ranks.tp > 1:
            self._start()

    # What users say.

    @contextlib.contextmanager
    def busy(self, what: str, limit_s: float | None = None):
        """Marks the block as work in which ranks wait for each other; longer than `limit_s` is a hang. Marks nest.

        The default limit is the step timeout. math.inf marks a wait that is wrong only if a peer leaves meanwhile.
        """
        outer = self._mark
        self._mark = (what, time.monotonic(), self.step_timeout_s if limit_s is None else limit_s)
        try:
            yield
        finally:
            self._mark = outer

    def progress(self, call: int, step: int) -> None:
        """How far this rank is, for the messages: calls of the API begun, steps begun."""
        self._call, self._step = call, step

    def add_done(self, n: int) -> None:
        """Counts work of this rank (bytes loaded), which travels with its signs of life."""
        self._done += n

    def all_done(self) -> int:
        """Driver: what all ranks have counted, as last heard."""
        others = self._table[1:] if self._thread is not None else []
        return self._done + sum(seen.sign.done for seen in others)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends the job because of `error`: one message from the driver, exit code 1 on every rank, within 10 s.

        With a single rank, raises it.
        """
        if self._thread is None:
            raise error
        self._echo, self._error = is_echo(error), describe(error)
        self._ring()
        time.sleep(FAIL_WAIT_S)
        leave(1, f"rank {self.ranks.rank}: {self._error}")

    def close(self) -> None:
        """Says good-bye and stops watching. Peers that still count on this rank will end with an error."""
        if self._thread is None or self._left:
            return
        self._left = True
        self._ring()
        self._thread.join(5 * BEAT_S)
        atexit.unregister(self.close)
        sys.excepthook = self._hook
        if self._handlers:
            signal.set_wakeup_fd(-1)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and self._thread is not None and not isinstance(error, SystemExit):
            self.fail(error)
        self.close()

    # Starting: the driver listens and publishes where in the launch's store; workers connect.

    def _start(self) -> None:
        ranks, now = self.ranks, time.monotonic()
        self._table = [Seen(rank, now, sign=Sign(limit_s=self.load_timeout_s)) for rank in range(ranks.tp)]
        self._me = self._table[ranks.rank]
        self._me.pid, self._me.host = os.getpid(), socket.gethostname()
        self._lines: dict[int, Line] = {}                   # by rank
        self._lowest = 1                                    # the worker that speaks if the driver cannot
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ, self._on_bell)
        key = f"llama_tp/watch/{ranks.tally.watches}"
        ranks.tally.watches += 1
        if ranks.is_driver:
            self._listener, address = listen(ranks)
            self._token = secrets.token_hex(16)
            self._selector.register(self._listener, selectors.EVENT_READ, self._on_connect)
            ranks.store.set(key, json.dumps([*address, self._token, self._me.pid, self._me.host]))
        else:                                               # the store makes us wait for a driver that is late
            host, port, token, self._table[0].pid, self._table[0].host = json.loads(ranks.store.get(key))
            line = Line(socket.create_connection((host, port), timeout=30), rank=0)
            line.send([token, ranks.rank, self._me.pid, self._me.host])
            self._lines[0] = line
            self._selector.register(line.sock, selectors.EVENT_READ, lambda: self._on_line(line))
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._handlers[number] = signal.signal(number, lambda number, frame: None)
            # A main thread inside a collective never gets to a Python handler; the byte gets to our thread.
            signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._hook, sys.excepthook = sys.excepthook, lambda kind, error, trace: self.fail(error)
        atexit.register(self.close)
        self._thread = threading.Thread(target=self._run, name="llama_tp watch", daemon=True)
        self._thread.start()

    # The thread: hear, say, judge; once a second, or as soon as there is news.

    def _run(self) -> None:
        beat_at = 0.0
        while not self._left:
            for key, _ in self._selector.select(max(0.0, beat_at - time.monotonic())):
                key.data()
            now = time.monotonic()
            if self._parent and os.getppid() != self._parent and not self._error:
                self._error = f"torchrun (pid {self._parent}) is gone"
            self._say(now)
            self._judge(now)
            beat_at = now + (BEAT_S if self._noticed_at is None and not self._signal else BEAT_S / 4)
        self._say(time.monotonic())
        for sock in [self._ear, self._bell] + [line.sock for line in self._lines.values()]:
            sock.close()
        if self.ranks.is_driver:
            self._listener.close()

    def _say(self, now: float) -> None:
        what, since, limit_s = self._mark
        self._me.heard = now
        self._me.sign = Sign(self._call, self._step, self.ranks.tally.collectives, what, now - since if what else 0.0,
                             limit_s, place(self._main), self._error, self._echo, self._left,
                             signal.Signals(self._signal).name if self._signal else "", self._done)
        if self.ranks.is_driver:
            # Workers are to judge the driver's silence only: its errors and delays it judges itself.
            told = replace(self._me.sign, busy_s=0.0, error="", echo=False)
            alive = [rank for rank in self._lines if not self._table[rank].gone and not self._table[rank].lost]
            message = {"sign": asdict(told), "lowest": min(alive, default=1)}
        else:
            message = {"sign": asdict(self._me.sign)}
        for line in self._lines.values():
            line.send(message)

    def _judge(self, now: float) -> None:
        """Ends this process once something has been wrong for WINDOW_S, or soon after a signal asked for it."""
        driver = self._table[0]
        alone = driver.lost or driver.sign.left
        table = self._table if self.ranks.is_driver else [driver, self._me] if alone else [driver]
        cause = verdict(table, now, self.step_timeout_s)
        if cause is None:
            self._noticed_at = None
        elif self._noticed_at is None:
            self._noticed_at = now
        elif now >= self._noticed_at + WINDOW_S:
            own = driver.sign.left and bool(self._error)    # nobody else has heard of it
            self._end(1, cause.text if self.ranks.is_driver or self.ranks.rank == self._lowest or own else "", now)
        if now >= self._signalled_at + SIGNALLED_S * (1 if self.ranks.is_driver else 2):
            self._end(128 + self._signal, "", now)

    def _end(self, code: int, text: str, now: float) -> NoReturn:
        """Tells everyone to leave, takes stopped ranks of this host along (only SIGKILL reaches them), and leaves."""
        within_sight = self._table if self.ranks.is_driver else self._table[:1]
        stopped = [[seen.pid, seen.host] for seen in silent(within_sight, now)]
        for line in self._lines.values():
            line.send({"leave": code, "stopped": stopped})
        kill_here(stopped)
        leave(code, text)

    # What the sockets bring.

    def _ring(self) -> None:
        """Wakes the thread: there is something to say now."""
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")

    def _on_bell(self) -> None:
        for number in self._ear.recv(4096):                 # a zero from `_ring`, or a signal's number
            if number and not self._signal:
                self._signal, self._signalled_at = number, time.monotonic()

    def _on_connect(self) -> None:
        line = Line(self._listener.accept()[0], rank=-1)
        self._selector.register(line.sock, selectors.EVENT_READ, lambda: self._on_line(line))

    def _on_line(self, line: "Line") -> None:
        messages = line.receive()
        if messages is None:
            self._selector.unregister(line.sock)
            if line.rank >= 0:
                self._table[line.rank].lost = True
            return
        for message in messages:
            if line.rank < 0:
                self._greet(line, message)
            else:
                self._hear(self._table[line.rank], message)

    def _greet(self, line: "Line", message: object) -> None:
        """The first line of a worker: the launch's token, its rank, pid and host. Anybody else is cut off."""
        good = isinstance(message, list) and len(message) == 4 and hmac.compare_digest(str(message[0]), self._token)
        if not good or message[1] not in range(1, self.ranks.tp):
            self._selector.unregister(line.sock)
            line.sock.close()
            return
        line.rank = message[1]
        seen = self._table[line.rank]
        seen.pid, seen.host, seen.heard = message[2], message[3], time.monotonic()
        self._lines[line.rank] = line

    def _hear(self, seen: Seen, message: dict) -> None:
        seen.heard = time.monotonic()
        if "leave" in message:
            kill_here(message["stopped"])
            leave(message["leave"], "")
        seen.sign = Sign(**message["sign"])
        self._lowest = message.get("lowest", self._lowest)


class Line:
    """JSON lines over a socket. A peer that does not read is not waited for: its messages are dropped."""

    def __init__(self, sock: socket.socket, rank: int):
        self.sock, self.rank, self._buffer = sock, rank, b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(0.5)

    def send(self, message: object) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list | None:
        """The messages that have come in; None once the peer has gone, or talks nonsense."""
        try:
            data = self.sock.recv(1 << 16)
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except TimeoutError:
            return []
        except (OSError, ValueError):
            return None
        return messages if data and len(self._buffer) <= LINE_BYTES else None


def listen(ranks: Ranks) -> tuple[socket.socket, tuple[str, int]]:
    """The driver's listening socket: on the loopback when all ranks are on this machine, else on every interface."""
    host = "127.0.0.1" if ranks.n_nodes == 1 else ""
    sock = socket.create_server((host, 0), backlog=ranks.tp)
    return sock, (host or ranks.master, sock.getsockname()[1])


def kill_here(stopped: list) -> None:
    """Ends processes that were stopped, if they are on this host."""
    for pid, host in stopped:
        if pid and host == socket.gethostname() and pid != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def leave(code: int, text: str) -> NoReturn:
    """Ends this process at once: no collective, no teardown, no exit handlers, any of which may hang."""
    if text:
        log.write(f"error: {text}\n")
    os._exit(code)


def describe(error: BaseException) -> str:
    """What to print of an error: a UserError's sentence, or the end of anything else's traceback."""
    if isinstance(error, UserError):
        return str(error)
    trace = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}\n{trace[-ERROR_CHARS:]}".rstrip()


def is_echo(error: BaseException) -> bool:
    """Whether the error only says that another rank went away, as gloo and NCCL put it."""
    return isinstance(error, (RuntimeError, OSError)) and re.search(
        r"onnection (closed|reset|refused)|Broken pipe|remote process exited|NCCL communicator|peer", str(error)) is not None


def place(thread: int) -> str:
    """Where a thread is: "file.py:12 in function"."""
    frame = sys._current_frames().get(thread)
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""
