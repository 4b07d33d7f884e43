"""Which tokens each sample of a request with a form may write next, as workers in other processes
find out (text/grammar_pool).

A mask is asked for as soon as a token is known and taken when the next is to be sampled, a whole
pass of the model later. `wait` waits `GRACE_S` for one that is late. After that its row is left out
of the steps (`Sequence.held`) until it has come, and one that has been late is not waited for again
until it has come in time for a while. A request whose mask does not come at all, or whose form
cannot be kept, is among the `failures`. A worker that somebody kills is replaced: the new one is
told what the samples have written.

Driver only. Knows no tensors and no sampling.
"""

import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from llama_tp.arch.errors import UserError
from llama_tp.engine.request import Request, Sequence
from llama_tp.text.grammar import Form
from llama_tp.text.grammar_pool import (
    MAX_DEATHS,
    START_S,
    GrammarPool,
    Worker,
    error_of,
    start_message,
    tokens_message,
    wait_for,
)
from llama_tp.text.grammar_process import ALL, HEAD

# an honest mask takes less than a thousandth of a second, an honest form some to compile
GRACE_S = 0.02
ALONE_S = 0.2  # the same where the step has no other rows
N_FORGIVEN = 32  # masks in time, after which one may be late again


@dataclass(eq=False)
class _Followed:
    """A form, its samples that still run, and the worker that follows it; None as long as all
    workers are taken."""

    request: Request
    form: Form
    samples: dict[int, Sequence]
    worker: Worker | None = None
    # by sample; none there: it is asked for
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    unsent: list[tuple[int, int]] = field(default_factory=list)  # (sample, token)
    n_unanswered: int = 0
    asked_at: float = 0.0
    was_there: bool = False  # the worker, when it was looked at last
    n_deaths: int = 0
    cpu_s: float = 0.0  # of the worker, when it was asked
    n_to_forgive: int = 0  # masks that have to come in time before one is waited for

    @property
    def waits(self) -> bool:
        return self.worker is not None and len(self.masks) + len(self.unsent) < len(self.samples)


class Masks:
    """The running requests with a form, and the masks of their samples.

    Args:
        pool: where workers come from.
        max_workers: as many requests with forms run at once; others wait, and keep their order.
    """

    def __init__(self, pool: GrammarPool, max_workers: int):
        self.pool, self._max_workers = pool, max_workers
        self._followed: dict[Request, _Followed] = {}
        self._unstarted: deque[_Followed] = deque()
        self._failures: list[tuple[Sequence, UserError]] = []

    def begin(self, request: Request, sequences: list[Sequence]) -> None:
        """Follows the form of a request from what its samples have written so far. ValueError if
        it has none."""
        if request.params.form is None:
            raise ValueError(f"the request {request.id!r} has no form")
        samples = {sequence.index: sequence for sequence in sequences}
        one = _Followed(request, request.params.form, samples)
        self._followed[request] = one
        self._unstarted.append(one)
        self._start_some()

    def sampled(self, sequence: Sequence, token: int) -> None:
        """A sample has written a token. The next mask is asked for by `ask`."""
        one = self._followed.get(sequence.request)
        if one is None or sequence.index not in one.samples:  # it has failed meanwhile
            return
        one.masks.pop(sequence.index, None)
        one.unsent.append((sequence.index, token))

    def ask(self) -> None:
        """Asks for the masks that follow what has been sampled."""
        for one in self._followed.values():
            if one.unsent and one.worker:
                one.worker.send(tokens_message(one.unsent))
                one.n_unanswered += len(one.unsent)
                one.unsent, one.asked_at, one.cpu_s = [], time.monotonic(), one.worker.cpu_s
                self._hold(one, bool(one.n_to_forgive))

    def end(self, sequence: Sequence) -> None:
        """A sample has ended. Nothing happens if it has no form, or has ended before."""
        one = self._followed.get(sequence.request)
        if one is None or one.samples.pop(sequence.index, None) is None:
            return
        one.masks.pop(sequence.index, None)
        one.unsent = [(index, token) for index, token in one.unsent if index != sequence.index]
        if not one.samples:
            self._dismiss(sequence.request, one)

    def _dismiss(self, request: Request, one: _Followed) -> None:
        """A worker that has not answered all, or was late, is not used again."""
        del self._followed[request]
        if one.worker is None:
            self._unstarted.remove(one)
            return
        if one.n_unanswered or one.n_to_forgive:
            one.worker.kill()
        else:
            self.pool.give(one.worker)
        self._start_some()

    def wait(self, sequences: list[Sequence], alone: bool) -> None:
        """Returns when all their masks are there, or have had their time, which is longer where
        nobody waits with them: `alone` says that the step has no other rows."""
        ones = {
            one.request: one
            for one in (self._followed.get(sequence.request) for sequence in sequences)
            if one
        }
        for one in ones.values():  # most have come while the model ran: no need to poll
            if one.worker and one.waits:
                self._read(one, one.worker)
        while True:
            now = time.monotonic()
            grace_s = ALONE_S if alone and all(one.waits for one in ones.values()) else GRACE_S
            waited = [
                (one.asked_at + grace_s - now, one)
                for one in ones.values()
                if one.waits and not one.n_to_forgive
            ]
            in_time = [one for left, one in waited if left > 0]
            if not in_time:
                break
            self._take(in_time, max(left for left, _ in waited))
        for _, one in waited:
            self._hold(one, True)
            self._blame(one)

    @staticmethod
    def _blame(one: _Followed) -> None:
        """A worker that has computed for too long makes room for others; one that was not given a
        CPU is not to blame."""
        if one.worker and one.worker.cpu_s > one.cpu_s + GRACE_S:
            one.n_to_forgive = N_FORGIVEN
            one.worker.demote()

    def look(self, seconds: float = 0.0) -> None:
        """Takes what has come, waiting so long for anything."""
        ones = [
            one
            for one in self._followed.values()
            if one.waits and any(sequence.held for sequence in one.samples.values())
        ]
        if ones:
            self._take(ones, seconds)
        now = time.monotonic()
        for one in ones:
            if one.worker is None or not one.waits:
                continue
            self._blame(one)
            limit = self.pool.answer_s if one.worker.pid else START_S
            if now > one.asked_at + limit:
                self._fail(one, self.pool.too_much(one.worker))

    def get(self, sequence: Sequence) -> np.ndarray | None:
        """The mask, (words,) uint32; None: it is late."""
        one = self._followed.get(sequence.request)
        return None if one is None else one.masks.get(sequence.index)

    def failures(self) -> list[tuple[Sequence, UserError]]:
        """Samples that cannot go on, and why; each is told once. One may have ended meanwhile."""
        failures, self._failures = self._failures, []
        return failures

    def close(self) -> None:
        """Ends all processes."""
        for one in self._followed.values():
            if one.worker:
                one.worker.kill()
        self.pool.close()

    # ------------------------------------------------------------------------------------ the parts

    def _start_some(self) -> None:
        n_workers = len(self._followed) - len(self._unstarted)
        while self._unstarted and n_workers < self._max_workers:
            self._start(self._unstarted.popleft())
            n_workers += 1

    def _start(self, one: _Followed) -> None:
        one.worker, one.was_there, one.unsent, one.masks = self.pool.take(), False, [], {}
        one.cpu_s = one.worker.cpu_s
        outputs = [(index, sequence.output_ids) for index, sequence in one.samples.items()]
        one.worker.send(start_message(one.form, outputs))
        one.n_unanswered, one.asked_at = len(one.samples), time.monotonic()

    def _take(self, ones: list[_Followed], seconds: float) -> None:
        by_worker = {one.worker: one for one in ones if one.worker}
        for worker in wait_for(by_worker, seconds):
            self._read(by_worker[worker], worker)

    def _read(self, one: _Followed, worker: Worker) -> None:
        for answer in worker.take():
            self._hear(one, answer)
        if worker.pid and not one.was_there:  # its time begins when it is there
            one.was_there, one.asked_at = True, time.monotonic()
        if worker.gone and one.waits:
            self._replace(one, worker)

    def _hear(self, one: _Followed, answer: bytearray) -> None:
        if answer[:1] == b"e":
            sample, error = error_of(answer)
            one.n_unanswered -= one.n_unanswered if sample == ALL else 1
            self._fail(one, error, sample)
            return
        one.n_unanswered -= 1
        _, sample = HEAD.unpack_from(answer)
        if sample in one.samples:  # else it has ended meanwhile
            one.masks[sample] = np.frombuffer(answer, np.uint32, offset=HEAD.size)
            one.samples[sample].held = False
            one.n_deaths = 0
            if one.n_to_forgive and time.monotonic() < one.asked_at + GRACE_S:
                one.n_to_forgive -= 1

    def _replace(self, one: _Followed, worker: Worker) -> None:
        one.n_deaths += 1
        if one.n_deaths == MAX_DEATHS or time.monotonic() > one.asked_at + self.pool.cpu_s:
            self._fail(one, self.pool.too_much(worker))
            return
        worker.kill()
        self._start(one)

    def _fail(self, one: _Followed, error: UserError, sample: int = ALL) -> None:
        for sequence in [
            sequence for index, sequence in one.samples.items() if sample in (ALL, index)
        ]:
            self._failures.append((sequence, error))
            sequence.held = True
            self.end(sequence)

    @staticmethod
    def _hold(one: _Followed, held: bool) -> None:
        for index, sequence in one.samples.items():
            sequence.held = held and index not in one.masks
