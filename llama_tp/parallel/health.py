"""Liveness: if one rank fails, dies or hangs, the whole job ends soon, with one message that says
which and why.

A daemon thread in each rank holds a TCP connection of its own to the driver and sends a sign of
life every second, as a line of JSON. The driver's thread judges (diagnosis), prints one error and
tells everyone to leave; should the driver be the one that is gone, the lowest worker speaks. On
this path there is no collective and no teardown, only `os._exit`: whatever hangs, hangs in those.
Refuses to know what the work is; its users mark it with `busy`.

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
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from llama_tp.parallel.diagnosis import Seen, Sign, describe, diagnose, is_echo, silent
from llama_tp.parallel.groups import Ranks
from llama_tp.parallel.hard_exit import kill_here, leave
from llama_tp.parallel.json_lines import JsonLinesConnection, call, listen

BEAT_S = 1.0  # between two signs of life
WINDOW_S = 1.0  # from the first symptom to the diagnosis: a cause may be heard after its effects
# a driver told to end by a signal still explains what it has just seen, then leaves
SIGNALLED_S = 2.0
# a failed rank waits this long for the driver's diagnosis before it speaks for itself
FAIL_WAIT_S = 10.0
MAX_STRANGERS = 64  # connections that have not said yet who they are; of more, the oldest is closed
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # torchrun passes on the one that it got


class Watch:
    """Watches over the ranks from its construction to `close`; every rank makes one, right after
    `init_ranks`.

    With a single rank there is nobody to wait for: then nothing is started, and errors simply
    propagate. With more, SIGTERM, SIGINT and SIGHUP end the rank quietly, even out of a collective,
    unless they have handlers already; and an exception that nobody catches is a `fail`.

    Args:
        ranks: this rank.
        step_timeout_s: limit of `busy` without a limit of its own, and of a silence while idle.
        load_timeout_s: for `busy("load", watch.load_timeout_s)`, and until a rank is first heard.
    """

    def __init__(self, ranks: Ranks, step_timeout_s: float = 120, load_timeout_s: float = 1800):
        self.ranks, self.step_timeout_s, self.load_timeout_s = ranks, step_timeout_s, load_timeout_s
        self._mark = ("", 0.0, math.inf)  # what the main thread does, since when, limit in s
        self._last = ""  # the last mark, for an error that has left it
        self._call = self._step = self._done = 0
        self._error, self._echo, self._left = "", False, False
        self._signal, self._signalled_at = 0, math.inf
        self._noticed_at: float | None = None  # when the first symptom was seen
        self._main = threading.get_ident()
        # Only torchrun's death orphans ranks; elsewhere (mpirun, nohup) a parent may end and mean
        # nothing by it.
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        self._thread: threading.Thread | None = None
        if ranks.tp > 1:
            if ranks.store is None:
                raise ValueError("several ranks find each other in a store, and there is none")
            self._start(ranks.store)

    # What users say.

    @contextlib.contextmanager
    def busy(self, what: str, limit_s: float | None = None) -> Iterator[None]:
        """Marks the block as work in which ranks wait for each other; longer than `limit_s` is a
        hang. Marks nest.

        The default limit is the step timeout. math.inf marks a wait that is wrong only if a peer
        leaves meanwhile.
        """
        outer, self._last = self._mark, what
        self._mark = (what, time.monotonic(), self.step_timeout_s if limit_s is None else limit_s)
        if limit_s is not None:  # not a step, so rare: let the others know now
            self._ring()
        try:
            yield
        finally:
            self._mark = outer
            if limit_s is not None:  # else a peer that dies now would still be under this limit
                self._ring()

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
        """Ends the job because of `error`: one message from the driver, exit code 1 on every rank,
        within 10 s.

        With a single rank, or after `close`, raises it.
        """
        if self._thread is None or self._left:
            raise error
        self._mark = self._mark if self._mark[0] else (self._last, time.monotonic(), math.inf)
        self._echo, self._error = is_echo(error), describe(error)
        self._ring()
        time.sleep(FAIL_WAIT_S)
        leave(1, f"rank {self.ranks.rank}: {self._error}")

    def close(self) -> None:
        """Says good-bye and stops watching. Peers that still count on this rank will end with an
        error."""
        if self._thread is None or self._left:
            return
        if self._handlers and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        sys.excepthook = self._hook
        atexit.unregister(self.close)
        self._left = True
        self._ring()
        self._thread.join(5 * BEAT_S)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, SystemExit) and self._thread is not None:
            self.fail(error)
        self.close()

    # Starting: the driver listens and publishes where in the launch's store; workers connect.

    def _start(self, store: dist.Store) -> None:
        ranks, now = self.ranks, time.monotonic()
        self._table = [
            Seen(rank, now, sign=Sign(limit_s=self.load_timeout_s)) for rank in range(ranks.tp)
        ]
        self._me = self._table[ranks.rank]
        self._me.pid, self._me.host = os.getpid(), socket.gethostname()
        self._lines: dict[int, JsonLinesConnection] = {}  # by rank
        self._strangers: list[JsonLinesConnection] = []
        self._lowest = 1  # the worker that speaks if the driver cannot
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._ear, selectors.EVENT_READ, self._on_bell)
        key = f"llama_tp/watch/{ranks.counters.watches}"
        ranks.counters.watches += 1
        if ranks.is_driver:
            self._listener = listen(ranks.master, ranks.n_nodes)
            self._token = secrets.token_hex(16)
            self._selector.register(self._listener, selectors.EVENT_READ, self._on_connect)
            host = "127.0.0.1" if ranks.n_nodes == 1 else ranks.master
            store.set(
                key,
                json.dumps(
                    [
                        host,
                        self._listener.getsockname()[1],
                        self._token,
                        self._me.pid,
                        self._me.host,
                    ]
                ),
            )
        else:  # the store makes us wait for a driver that is late
            host, port, token, self._table[0].pid, self._table[0].host = json.loads(store.get(key))
            line = call(host, port)
            line.send([token, ranks.rank, self._me.pid, self._me.host])
            self._lines[0] = line
            self._selector.register(line.sock, selectors.EVENT_READ, lambda: self._on_line(line))
        self._handlers: dict[int, Any] = {}  # what was there before ours
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._handlers[number] = signal.signal(number, lambda number, frame: None)
            if self._handlers:
                # A main thread inside a collective never gets to a Python handler; the byte gets to
                # our thread.
                signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._hook, sys.excepthook = sys.excepthook, lambda kind, error, trace: self.fail(error)
        atexit.register(self.close)
        self._thread = threading.Thread(target=self._run, name="llama_tp watch", daemon=True)
        self._thread.start()

    # The thread: hear, say, judge; once a second, or as soon as there is news.

    def _run(self) -> None:
        beat_at = 0.0
        while not self._left:
            events = [
                key.data for key, _ in self._selector.select(max(0.0, beat_at - time.monotonic()))
            ]
            for on_event in events:
                on_event()
            now = time.monotonic()
            if self._parent and os.getppid() != self._parent and not self._error:
                self._error, beat_at = f"torchrun (pid {self._parent}) is gone", now
            # Only at the beat, or rung for news: if each answered what it hears, they would talk
            # without end (a third of a core on each rank, before this line).
            if now >= beat_at or self._on_bell in events:
                self._say(now)
                beat_at = now + (
                    BEAT_S if self._noticed_at is None and not self._signal else BEAT_S / 4
                )
            self._judge(now)
        self._say(time.monotonic())
        for sock in [self._ear, self._bell] + [
            line.sock for line in [*self._lines.values(), *self._strangers]
        ]:
            sock.close()
        if self.ranks.is_driver:
            self._listener.close()

    def _say(self, now: float) -> None:
        what, since, limit_s = self._mark
        self._me.heard = now
        self._me.sign = Sign(
            self._call,
            self._step,
            self.ranks.counters.collectives,
            what,
            now - since if what else 0.0,
            limit_s,
            place(self._main),
            self._error,
            self._echo,
            self._left,
            signal.Signals(self._signal).name if self._signal else "",
            self._done,
        )
        if self.ranks.is_driver:
            # Workers are to judge the driver's silence only: its errors and delays it judges
            # itself.
            told = replace(self._me.sign, busy_s=0.0, error="", echo=False)
            alive = [
                rank
                for rank in self._lines
                if not self._table[rank].gone and not self._table[rank].lost
            ]
            message = {"sign": asdict(told), "lowest": min(alive, default=1)}
        else:
            message = {"sign": asdict(self._me.sign)}
        for line in self._lines.values():
            line.send(message)

    def _judge(self, now: float) -> None:
        """Ends this process once something has been wrong for WINDOW_S, or soon after a signal
        asked for it."""
        driver = self._table[0]
        if self.ranks.is_driver:
            table = self._table
        else:  # the driver judges this rank, as long as it is there
            alone = (driver.lost or driver.sign.left) and not self._signal
            table = [driver, self._me] if alone else [driver]
        cause = diagnose(table, now, self.step_timeout_s)
        if cause is None:
            self._noticed_at = None
        elif self._noticed_at is None:
            self._noticed_at = now
        elif now >= self._noticed_at + WINDOW_S:
            own = driver.sign.left and bool(self._error)  # nobody else has heard of it
            self._end(
                1,
                cause.text
                if self.ranks.is_driver or self.ranks.rank == self._lowest or own
                else "",
                now,
            )
        if now >= self._signalled_at + SIGNALLED_S * (1 if self.ranks.is_driver else 2):
            self._end(128 + self._signal, "", now)

    def _end(self, code: int, text: str, now: float) -> NoReturn:
        """Tells everyone to leave, takes stopped ranks of this host along (only SIGKILL reaches
        them), and leaves."""
        within_sight = self._table if self.ranks.is_driver else self._table[:1]
        stopped = [(seen.pid, seen.host) for seen in silent(within_sight, now)]
        for line in self._lines.values():
            line.send({"leave": code, "stopped": stopped})
        kill_here(stopped)
        leave(code, text)

    # What the sockets bring.

    def _ring(self) -> None:
        """Wakes the thread: there is something to say now."""
        if self._thread is not None:
            with contextlib.suppress(OSError):  # full: it will wake anyhow
                self._bell.send(b"\0")

    def _on_bell(self) -> None:
        for number in self._ear.recv(4096):  # a zero from `_ring`, or the number of any signal
            if number in self._handlers and not self._signal:
                self._signal, self._signalled_at = number, time.monotonic()

    def _on_connect(self) -> None:
        line = JsonLinesConnection(self._listener.accept()[0])
        self._strangers.append(line)
        if len(self._strangers) > MAX_STRANGERS:
            self._hang_up(self._strangers[0])
        self._selector.register(line.sock, selectors.EVENT_READ, lambda: self._on_line(line))

    def _on_line(self, line: JsonLinesConnection) -> None:
        messages = line.receive()
        if messages is None:
            self._hang_up(line)
            if line.rank is not None:
                self._table[line.rank].lost = True
            return
        for message in messages:
            if line.rank is not None:
                self._hear(self._table[line.rank], message)
            elif not self._greet(line, message):
                self._hang_up(line)
                return

    def _hang_up(self, line: JsonLinesConnection) -> None:
        if line in self._strangers:
            self._strangers.remove(line)
        self._selector.unregister(line.sock)
        line.sock.close()

    def _greet(self, line: JsonLinesConnection, message: object) -> bool:
        """The first line of a worker: the launch's token, its rank, pid and host. Anybody else is
        cut off."""
        if not (
            isinstance(message, list)
            and len(message) == 4
            and hmac.compare_digest(str(message[0]).encode(), self._token.encode())
        ):
            return False
        self._strangers.remove(line)
        line.rank = message[1]
        seen = self._table[line.rank]
        seen.pid, seen.host, seen.heard = message[2], message[3], time.monotonic()
        self._lines[line.rank] = line
        return True

    def _hear(self, seen: Seen, message: dict[str, Any]) -> None:
        seen.heard = time.monotonic()
        if "leave" in message:
            kill_here([(pid, host) for pid, host in message["stopped"]])
            leave(message["leave"], "")
        seen.sign = Sign(**message["sign"])
        self._lowest = message.get("lowest", self._lowest)


def place(thread: int) -> str:
    """Where a thread is in somebody's code, not torch's: "file.py:12 in function"."""
    frame = sys._current_frames().get(thread)
    while frame and frame.f_back and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return (
        f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        if frame
        else ""
    )
