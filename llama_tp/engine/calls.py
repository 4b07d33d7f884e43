"""One call, made on every rank: what lets each rank run the same script and get the same results.

The driver works, the workers follow its steps until the call ends, and then everybody gets the
driver's result or its error, as JSON over the control group (nothing is pickled). Between calls a
rank may idle for hours: waiting here has no time limit of its own, because liveness is health's.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.engine.engine import BYE, Engine
from llama_tp.parallel.collectives import broadcast_bytes, recv_ints, send_ints

# messages between steps: a call begins, it ends, it has an item to hand out
CALL, RESULT, YIELD = -2, -3, -4


class Calls:
    """The calls of one rank, in order.

    Args:
        engine: this rank's engine.
    """

    def __init__(self, engine: Engine):
        self.engine, self.ranks, self.n_calls = engine, engine.ranks, 0
        self._open = ""  # the call that has begun and not ended

    def call(self, name: str, work: Callable[[], object]) -> Any:
        """Runs `work` on the driver and returns its JSON-able result on every rank, or raises its
        UserError on every
        rank. `name` must be the same everywhere: it tells apart ranks that have lost each other."""
        results = list(self.stream(name, lambda: iter([work()])))
        return results[0]

    def stream(self, name: str, work: Callable[[], Iterator[object]]) -> Iterator[Any]:
        """The same for a generator: every item is handed out on every rank as it is made. A
        consumer that stops
        early on the driver ends the call; on a worker the rest is followed unseen. One call at a
        time: UserError."""
        if self._open:
            raise UserError(
                f"{name} was called while {self._open} still runs",
                "its items have not all been taken",
                "take them all first, or close() it",
            )
        self.n_calls += 1
        self._open = name
        try:
            yield from self._run(name, work)
        finally:
            self._open = ""

    def _run(self, name: str, work: Callable[[], Iterator[object]]) -> Iterator[Any]:
        self.engine.watch.progress(self.n_calls, self.engine.n_steps)
        mark = zlib.crc32(name.encode())
        if self.engine.is_driver:
            send_ints([CALL, self.n_calls, mark], self.ranks)
            yield from self._lead(work)
        else:
            # may take hours, but not longer than the driver lives
            with self.engine.watch.busy(name, math.inf):
                self._join(recv_ints(self.ranks), name, mark)
            yield from self._follow()

    def _lead(self, work: Callable[[], Iterator[object]]) -> Iterator[Any]:
        error = None
        try:
            for item in work():
                data = json.dumps(item).encode()
                send_ints([YIELD], self.ranks)
                broadcast_bytes(data, self.ranks)
                yield json.loads(data)  # what the workers see: tuples are lists here too
        except UserError as e:
            error = {"what": e.what, "found": e.found, "fix": e.fix}
            raise
        except GeneratorExit:
            raise
        except BaseException as e:  # a bug or Ctrl-C: the job cannot go on in step
            self.engine.watch.fail(e)
            raise
        finally:
            send_ints([RESULT], self.ranks)
            broadcast_bytes(json.dumps(error).encode(), self.ranks)

    def _follow(self) -> Iterator[Any]:
        try:
            while (kind := self.engine.follow()[0]) == YIELD:
                yield json.loads(broadcast_bytes(None, self.ranks))
        except GeneratorExit:
            while (kind := self.engine.follow()[0]) == YIELD:
                broadcast_bytes(None, self.ranks)
            broadcast_bytes(None, self.ranks)
            raise
        if kind == BYE:
            raise UserError("the driver ended in the middle of a call", "", "see rank 0's message")
        error = json.loads(broadcast_bytes(None, self.ranks))
        if error:
            raise UserError(**error)

    def _join(self, message: list[int], name: str, mark: int) -> None:
        """Checks that the driver has begun the very call that this worker is making."""
        everyone = "every rank must make every call, in the same order"
        if message[0] == BYE:
            raise UserError(
                f"rank {self.ranks.rank} called {name}, and rank 0 has ended without making this "
                "call",
                f"it was call {self.n_calls}",
                everyone,
            )
        if message != [CALL, self.n_calls, mark]:
            raise UserError(
                f"rank {self.ranks.rank} called {name}, and rank 0 made another call",
                f"it was call {self.n_calls}",
                everyone,
            )
