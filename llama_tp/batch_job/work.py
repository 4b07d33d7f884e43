"""Runs the lines of a batch job on an engine, many at once to keep its rows busy, and writes the
answers in the input's order.

The engine is handed in: the real one, or a test's.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from llama_tp.arch.errors import UserError
from llama_tp.batch_job.check import duplicate_id
from llama_tp.batch_job.job import Job
from llama_tp.batch_job.lines import (
    answer,
    beginning,
    has_failed,
    lines_of,
    order_of,
    read_line,
    refusal,
)
from llama_tp.engine.delta import Delta
from llama_tp.engine.request import Request
from llama_tp.protocol.errors import RequestError
from llama_tp.protocol.reply import Chunks, Fold

AHEAD = 4  # samples handed to the engine, for each of its rows: it never waits for the next line
# lines begun or done but not written, for each row: behind a long one, short ones go on
REORDER = 32
HELD_BYTES = 256 << 20  # the same in bytes of output


class Engine(Protocol):
    """What runs the requests of the lines."""

    def submit(self, request: Request, /) -> object: ...

    def step(self) -> list[Delta]: ...

    def abort(self, request_id: str, /) -> object: ...


@dataclass
class _Reply:
    """A line's reply as it grows."""

    chunks: Chunks
    fold: Fold

    def begin(self) -> None:
        for chunk in self.chunks.begin():
            self.fold.add(chunk)

    def take(self, delta: Delta) -> None:
        for chunk in self.chunks.take(delta):
            self.fold.add(chunk)


@dataclass
class _Slot:
    """One line between input and output. `text` is its output line, once there is one; until then
    a line that runs has a `reply`."""

    custom_id: str
    reply: _Reply | None = None
    text: bytes | None = None
    failed: bool = False


class Work:
    """What is left of a job.

    Args:
        n_rows: sequences that the engine computes at once.
        fingerprint: of the replies.
        progress: called after each step with (lines written, failed lines among them, tokens
            generated since the last call).
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        n_rows: int,
        fingerprint: str,
        progress: Callable[[int, int, int], None],
    ):
        self.job, self.engine, self.fingerprint, self.progress = job, engine, fingerprint, progress
        self.n_rows = n_rows
        self.slots: deque[_Slot] = deque()
        self.by_request: dict[str, _Slot] = {}
        self.running: dict[str, int] = {}  # samples in the engine, by request
        self.n_running = self.n_held = 0  # all of them; bytes of slots' texts
        self.lines = self._lines(job.target.n_lines)
        self.input_ended = False

    def run(self, wants_stop: Callable[[], bool]) -> bool:
        """Runs until all lines are written (True), or until a step after which `wants_stop()`
        (False: what was done in order is written). Raises UserError if the output cannot be
        written."""
        while not wants_stop():
            self._feed()
            deltas = self.engine.step()
            n_tokens = sum(self._take(delta) for delta in deltas)
            self._write()
            self.progress(self.job.target.n_lines, self.job.n_failed, n_tokens)
            if self.input_ended and not self.slots:
                self.job.finish()
                return True
        return False

    def _lines(self, start: int) -> Iterator[tuple[int, bytes, bytes | None]]:
        """(number, input line, output line to copy or None) of what is not written yet. UserError
        if the input has changed."""
        done = self.job.old.lines() if self.job.old else iter(())
        for _ in range(start):
            next(done, None)
        self.job.check_input()  # loading a model takes minutes
        for number, raw in lines_of(self.job.input, start):
            old = next(done, None)
            if old is not None and has_failed(
                old, beginning(self.job.custom_id(raw, number), self.job.key)
            ):
                old = None
            yield number, raw, old
        self.job.check_input()

    def _feed(self) -> None:
        """Begins lines until the engine has enough to do, or too many wait for their turn to be
        written."""
        while (
            self.n_running < AHEAD * self.n_rows
            and len(self.slots) < REORDER * self.n_rows
            and self.n_held < HELD_BYTES
        ):
            line = next(self.lines, None)
            if line is None:
                self.input_ended = True
                return
            number, raw, old = line
            slot = _Slot(self.job.custom_id(raw, number))
            self.slots.append(slot)
            if old is not None:
                self._finish(slot, old)
            else:
                self._begin(slot, raw, number)

    def _begin(self, slot: _Slot, raw: bytes, number: int) -> None:
        job = self.job
        try:
            if number in job.duplicates:
                raise duplicate_id()
            order = order_of(read_line(raw, number), job.model, job.defaults, job.key)
            chunks = Chunks(order, job.model, job.created, self.fingerprint)
            slot.reply = _Reply(chunks, Fold(order))
            slot.reply.begin()
            for request in order.requests:
                self.engine.submit(request)
                self.by_request[request.id] = slot
                self.running[request.id] = order.n
                self.n_running += order.n
        except UserError as error:  # of a line that --skip_bad lets pass
            self._fail(slot, error)

    def _take(self, delta: Delta) -> int:
        """One delta into its line's reply. -> tokens in it."""
        slot = self.by_request.get(delta.request_id)
        if slot is None or slot.reply is None:  # of a line that has failed meanwhile
            return 0
        if delta.finish_reason:
            self.running[delta.request_id] -= 1
            self.n_running -= 1
        try:
            slot.reply.take(delta)
        except RequestError as error:
            self._fail(slot, error)
            return len(delta.ids)
        reply = slot.reply
        if reply.chunks.done:
            self._forget(slot)
            body = reply.fold.reply(reply.chunks.usage())
            self._finish(slot, answer(slot.custom_id, self.job.key, body))
        return len(delta.ids)

    def _fail(self, slot: _Slot, error: UserError) -> None:
        for request_id in self._forget(slot):
            self.engine.abort(request_id)
        slot.failed = True
        self._finish(slot, refusal(slot.custom_id, self.job.key, error))

    def _forget(self, slot: _Slot) -> list[str]:
        """Takes a line's requests out of the books. -> their ids."""
        if slot.reply is None:
            return []
        ids = [request.id for request in slot.reply.chunks.order.requests]
        for request_id in ids:
            self.by_request.pop(request_id, None)
            self.n_running -= self.running.pop(request_id, 0)
        return ids

    def _finish(self, slot: _Slot, text: bytes) -> None:
        slot.text, slot.reply = text, None
        self.n_held += len(text)

    def _write(self) -> None:
        """Writes what is next in the input's order, as far as it is done."""
        ready = []
        while self.slots and (text := self.slots[0].text) is not None:
            slot = self.slots.popleft()
            ready.append(text)
            self.n_held -= len(text)
            self.job.n_failed += slot.failed
        self.job.target.append(ready)
