"""The request manager: takes requests, hands them to the ranks, hands out what comes back, and
keeps the
books meanwhile.

The books are what makes the server outlive its ranks: for every request in flight they hold the ids
that each of its samples has written. When the ranks are gone, the request waits here; when there
are new ones, it is handed to them with those ids and goes on from there. Its reader sees a pause
and nothing else.

Knows no HTTP and no processes; runs on one event loop, and nothing in it waits.
"""

import asyncio
import time
from dataclasses import asdict
from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.engine.delta import Delta, TokenLogprobs
from llama_tp.engine.request import Request
from llama_tp.protocol.errors import RequestError
from llama_tp.server.link import ServerEnd
from llama_tp.server.metrics import Metrics

DELTA_BYTES, SCORE_BYTES = 400, 120  # that a delta takes here, and one (token, logprob) of it
TAKEN_BYTES = 1 << 18  # of deltas, handed out at once
UNREAD_S = 10.0  # in which a reader takes something, or too much that is unread is his fault
# runs in which the ranks died and a request gained nothing: then it may be what kills them
MAX_BARREN = 3

WHY_NOT = {
    "loading": "the model is loading",
    "restarting": "the ranks are being started again",
    "stalled": "the ranks have not been heard for a while",
    # nothing new is taken, by state
    "draining": "the server is shutting down",
    "dead": "the ranks have ended",
}


class Unavailable(RequestError):
    """There are no ranks to take this. `retry_s` is when to ask again, None for never."""

    def __init__(self, why: str, retry_s: int | None):
        fix = "ask again a little later" if retry_s else "the server has to be started again"
        super().__init__(why, "", fix, code="engine_unavailable", status=503)
        self.retry_s = retry_s


class Full(RequestError):
    """Too much waits already."""

    retry_s = 1

    def __init__(self, found: str):
        super().__init__(
            "the server has too much to do",
            found,
            "ask again a little later",
            code="rate_limit_exceeded",
            status=429,
        )


class Behind(RequestError):
    """What was written has not been read, and there is too much of it."""

    def __init__(self, n_bytes: int):
        super().__init__(
            "the stream was not read",
            f"{n_bytes >> 20} MB of it were waiting",
            "read it faster, or ask for less",
            code="stream_not_read",
            status=408,
        )


class Failed(RequestError):
    """The request was taken and could not be finished, which is no fault of its sender."""

    def __init__(self, why: str):
        super().__init__(
            "the request could not be finished", why, "", code="engine_error", status=500
        )


class InFlightRequest:
    """One request from the moment it is taken to its last delta, and what it has written so far."""

    def __init__(self, request: Request, handle: "StreamHandle"):
        self.request, self.handle = request, handle
        # None: has finished
        self.outputs: list[list[int] | None] = [[] for _ in range(request.params.n)]
        self.n_output = 0  # ids of all samples
        self.arrived = time.monotonic()
        self.n_longest = 0  # ids of the longest sample that has finished
        self.begun_at = 0.0  # when a sample of it first had a row
        self.first_at = 0.0  # when its first token came
        self.last_at = [0.0] * request.params.n  # when each sample's last one came
        self.n_barren = 0
        self.is_over = False
        # prompt logprobs that have come in; None once handed out
        self._scores: list[TokenLogprobs | None] | None = []

    @property
    def n_unfinished(self) -> int:
        return sum(ids is not None for ids in self.outputs)

    def begin(self, at: float) -> None:
        """It has a row since then; the first call counts."""
        self.begun_at = self.begun_at or max(at, self.arrived)

    def end(self, error: Exception) -> None:
        """Nothing more will come but this."""
        if not self.is_over:
            self.is_over = True
            self.handle.put(error)

    def message(self) -> dict[str, Any]:
        """What hands it to the ranks, from where it stands."""
        if self._scores:
            self._scores = []  # half a prompt's: they all come again
        params = self.request.params
        # all of asdict takes 30 ms for 1,024 prompts
        told = vars(params) | {"form": params.form and asdict(params.form)}
        return {
            "do": "submit",
            "id": self.request.id,
            "prompt": self.request.prompt_ids,
            "params": told,
            "outputs": self.outputs,
        }

    def hear_scores(self, scores: list[Any]) -> None:
        if self._scores is not None:
            self._scores += [each and _score(each) for each in scores]

    def hear(self, delta: dict[str, Any]) -> None:
        """Takes in a delta, and hands it out."""
        index, ids = delta["index"], delta["ids"]
        prompt_logprobs = None
        if index == 0 and self._scores is not None:
            if self.request.params.prompt_logprobs is not None:
                prompt_logprobs = tuple(self._scores) or (None,) * len(self.request.prompt_ids)
            self._scores = None
        if delta["finish_reason"]:
            self.outputs[index] = None
            self.is_over = not self.n_unfinished
        else:
            self.outputs[index] += ids
        self.n_output += len(ids)
        self.n_barren = 0
        self.handle.put(
            Delta(
                self.request.id,
                index,
                tuple(ids),
                delta["text"],
                tuple(map(_score, delta["logprobs"])),
                delta["finish_reason"],
                delta["error"],
                prompt_logprobs,
            )
        )


class StreamHandle:
    """Requests that were taken together. `take` gives their deltas as they come.

    Args:
        n_scores: logprobs that they may have, which count against the request manager's
            `max_scores` until
            they are dropped.
        max_unread_bytes: of deltas that nobody takes, before they are given up; None: no limit.
    """

    def __init__(
        self, requests: list[Request], n_scores: int = 0, max_unread_bytes: int | None = None
    ):
        self.inflight = [InFlightRequest(request, self) for request in requests]
        self.n_scores, self._max_unread_bytes = n_scores, max_unread_bytes
        self.n_unread_bytes = 0
        self._unread_since = 0.0  # when something was put to nothing, or taken and something left
        self._news: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._n_left = sum(request.params.n for request in requests)
        self._error: Exception | None = None

    @property
    def is_read(self) -> bool:
        """The last delta of the last sample has been taken."""
        return not self._n_left

    @property
    def is_behind(self) -> bool:
        """Too much is unread, and not only since a moment ago."""
        return (
            self._max_unread_bytes is not None
            and self.n_unread_bytes > self._max_unread_bytes
            and time.monotonic() - self._unread_since > UNREAD_S
        )

    def put(self, item: Delta | Exception) -> None:
        """For `take`."""
        if self._news.empty():
            self._unread_since = time.monotonic()
        self.n_unread_bytes += _n_bytes(item)
        self._news.put_nowait(item)

    def clear(self) -> None:
        """Forgets what has not been taken."""
        self._news, self.n_unread_bytes = asyncio.Queue(), 0

    async def take(self) -> list[Delta]:
        """What has come since the last call, at least one delta and no more than TAKEN_BYTES after
        it. Raises UserError: the engine refused a request; or Failed, Behind, Unavailable. What
        came before an error is handed out before it."""
        items: list[Delta] = []
        n_bytes = 0
        while not self._error and not (items and (self._news.empty() or n_bytes > TAKEN_BYTES)):
            item = await self._news.get()
            if isinstance(item, Exception):
                self._error = item
            else:
                self._n_left -= item.finish_reason is not None
                items.append(item)
            n_bytes += _n_bytes(item)
        self.n_unread_bytes -= n_bytes
        self._unread_since = time.monotonic()
        if self._error and not items:
            raise self._error
        return items


def _n_bytes(item: Delta | Exception) -> int:
    if isinstance(item, Exception):
        return 0
    scores = (*item.logprobs, *(item.prompt_logprobs or ()))
    return DELTA_BYTES + SCORE_BYTES * sum(1 + len(one.top) for one in scores if one)


def _n_scores(request: Request, max_model_len: int) -> int:
    """Logprobs that its reply may hold, alternatives included."""
    params, n_prompt = request.params, len(request.prompt_ids)
    n_output = (
        max_model_len - n_prompt
        if params.max_tokens is None
        else min(params.max_tokens, max_model_len - n_prompt)
    )
    of_output = 0 if params.logprobs is None else params.n * n_output * (1 + params.logprobs)
    return of_output + (
        0 if params.prompt_logprobs is None else n_prompt * (1 + params.prompt_logprobs)
    )


def _score(one: list[Any]) -> TokenLogprobs:
    return TokenLogprobs(one[0], one[1], tuple((token, value) for token, value in one[2]))


class RequestManager:
    """All inflight, and the link to whichever ranks there are.

    Args:
        max_queue: most samples that wait for a row, beside those that have one.
        metrics: is told what happens.
        max_scores: most logprobs (samples x tokens x alternatives) that the requests in flight may
            ask for together.
        restart_s: what a client is told to wait when there are no ranks.
        stale_s: silence of ranks that owe an answer, from which on nothing new is taken.

    `info` is what the ranks said of themselves, None until the first have loaded; `stats` what they
    said last.
    """

    def __init__(
        self,
        max_queue: int,
        metrics: Metrics,
        restart_s: int = 5,
        stale_s: float = float("inf"),
        max_scores: int = 1 << 24,
    ):
        self.max_queue, self.max_scores, self.metrics = max_queue, max_scores, metrics
        self.restart_s, self.stale_s = restart_s, stale_s
        self.info: dict[str, Any] | None = None
        self.stats: dict[str, Any] = {}
        self.draining = False
        self.dead = ""  # why there will be no more ranks
        self.heard_at = time.monotonic()  # the last word of the ranks
        # the first message that they have not answered; None: they owe nothing
        self._owed_since: float | None = None
        self._link: ServerEnd | None = None
        self._inflight: dict[str, InFlightRequest] = {}  # in order of arrival
        self._n_scores = 0  # of all stream handles that have not been dropped
        self._changed = asyncio.Event()

    @property
    def state(self) -> str:
        """ "ready", or why nothing new is taken: "loading", "restarting", "stalled", "draining",
        "dead"."""
        if self.dead or self.draining:
            return "dead" if self.dead else "draining"
        if not self._link:
            return "restarting" if self.info else "loading"
        return "ready" if self.silent_s <= self.stale_s else "stalled"

    @property
    def silent_s(self) -> float:
        """How long ranks that have loaded have owed an answer and said nothing. They answer every
        message, an abort too, so that clients who come and go change nothing about it: only a word
        of the ranks does."""
        return time.monotonic() - self._owed_since if self._link and self._owed_since else 0.0

    @property
    def n_inflight(self) -> int:
        return len(self._inflight)

    @property
    def n_samples(self) -> int:
        """Samples that are not finished."""
        return sum(inflight.n_unfinished for inflight in self._inflight.values())

    # --------------------------------------------------------------------------------- for requests

    def ready(self) -> dict[str, Any]:
        """`info`. Raises Unavailable unless the ranks are there."""
        if self.info is None or self.state != "ready":
            raise Unavailable(WHY_NOT[self.state], None if self.dead else self.restart_s)
        return self.info

    def take(self, requests: list[Request], max_unread_bytes: int | None = None) -> StreamHandle:
        """Takes all of them, or raises Unavailable, Full or another RequestError and takes none.
        Every stream handle must be dropped."""
        info = self.ready()
        most = info["max_rows"] + self.max_queue
        n_new = sum(request.params.n for request in requests)
        if n_new > most:
            raise RequestError(
                "one call asks for more samples than the server queues",
                f"found {n_new}, and the limit is {most}",
                "send several calls, or raise --max_queue",
            )
        if self.n_samples + n_new > most:
            self.metrics.rejected("queue_full")
            raise Full(f"{self.n_samples} samples run or wait, and the limit is {most}")
        handle = StreamHandle(requests, self._admit_scores(requests, info), max_unread_bytes)
        self._n_scores += handle.n_scores
        try:
            for inflight in handle.inflight:
                self._send(inflight.message())
                self._inflight[inflight.request.id] = inflight
        except BaseException:
            self.drop(handle)
            raise
        return handle

    def _admit_scores(self, requests: list[Request], info: dict[str, Any]) -> int:
        """How many logprobs they may have. Raises Full or RequestError."""
        n_new = sum(_n_scores(request, info.get("max_model_len", 0)) for request in requests)
        if n_new > self.max_scores:
            raise RequestError(
                "one call asks for more logprobs than the server holds",
                f"found {n_new:,} (samples x tokens x "
                f"alternatives), and the limit is {self.max_scores:,}",
                "ask for fewer of them, set max_tokens, or raise --max_queue_logprobs",
            )
        if n_new and self._n_scores + n_new > self.max_scores:
            self.metrics.rejected("logprobs")
            raise Full(
                f"{self._n_scores:,} of {self.max_scores:,} logprobs are taken, and this asks for "
                f"{n_new:,}"
            )
        return n_new

    def drop(self, handle: StreamHandle) -> None:
        """The reader has gone, or has read it all; what still runs is aborted. Safe to call
        twice."""
        self._n_scores -= handle.n_scores
        handle.n_scores = 0
        for inflight in handle.inflight:
            if self._inflight.pop(inflight.request.id, None):
                inflight.is_over = True
                self.metrics.finished(inflight, "abort")
                self._send({"do": "abort", "id": inflight.request.id})
        self._changed.set()

    async def wait_until_empty(self) -> None:
        """Returns when no request is in flight."""
        while self._inflight:
            self._changed.clear()
            await self._changed.wait()

    def cut(self, error: Exception) -> None:
        """Ends every request in flight with an error."""
        for inflight in list(self._inflight.values()):
            self._fail(inflight, error)

    # -------------------------------------------------------------------------------- for the ranks

    def attach(self, link: ServerEnd, info: dict[str, Any]) -> None:
        """New ranks are ready: what was in flight goes on there, in the order of its arrival."""
        self.info, self._link, self.stats, self._owed_since = info, link, {}, None
        self.heard_at = time.monotonic()
        for inflight in self._inflight.values():
            self._send(inflight.message())

    def detach(self) -> None:
        """The ranks are gone. Flights wait for the next ones, except those that may have run in
        several and gained nothing."""
        if self._link is None or self.info is None:
            return
        self._link, self.stats = None, {}
        n_ahead = 0  # samples: rows are given in the order of arrival
        for inflight in list(self._inflight.values()):
            if n_ahead >= self.info["max_rows"]:
                break
            n_ahead += inflight.n_unfinished
            inflight.n_barren += 1
            if inflight.n_barren >= MAX_BARREN:
                self._fail(
                    inflight,
                    Failed(f"the ranks ended {MAX_BARREN} times while this request was running"),
                )

    def give_up(self, why: str) -> None:
        """There will be no more ranks."""
        self.detach()
        self.dead = why
        self.cut(Unavailable(WHY_NOT["dead"], None))

    def hear(self, message: dict[str, Any]) -> None:
        """A message of the ranks."""
        self.heard_at = now = time.monotonic()
        self._take_in(message, now)
        self._owed_since = now if self._inflight else None

    def _take_in(self, message: dict[str, Any], now: float) -> None:
        if message["is"] == "scores":
            if inflight := self._inflight.get(message["id"]):
                inflight.hear_scores(message["scores"])
            return
        for request_id, (what, found, fix) in message["refused"].items():
            if inflight := self._inflight.get(request_id):
                self._fail(inflight, UserError(what, found, fix))
        for request_id in message["begun"]:
            if inflight := self._inflight.get(request_id):
                inflight.begin(now - message["step_s"])
        for delta in message["deltas"]:
            inflight = self._inflight.get(delta["id"])
            if inflight and inflight.outputs[delta["index"]] is not None:
                # what its first step ended is not among the begun
                inflight.begin(now - message["step_s"])
                self.metrics.gained(inflight, delta, now)
                inflight.hear(delta)
                if inflight.is_over:
                    self._inflight.pop(inflight.request.id)
                    self._changed.set()
                elif inflight.handle.is_behind:
                    self._give_up_on(inflight.handle)
        self.metrics.counted(
            self.stats, message["stats"], sum(len(delta["ids"]) for delta in message["deltas"])
        )
        self.stats = message["stats"]

    def _give_up_on(self, handle: StreamHandle) -> None:
        """Nobody reads it: it ends, and what is unread goes."""
        error = Behind(handle.n_unread_bytes)
        handle.clear()
        for inflight in handle.inflight:
            if self._inflight.get(inflight.request.id) is inflight:
                self._send({"do": "abort", "id": inflight.request.id})
                self._fail(inflight, error)

    def _send(self, message: dict[str, Any]) -> None:
        """To the ranks, if there are any."""
        if self._link is None:
            return
        self._owed_since = self._owed_since or time.monotonic()
        self._link.send(message)

    def _fail(self, inflight: InFlightRequest, error: Exception) -> None:
        self._inflight.pop(inflight.request.id, None)
        self.metrics.finished(inflight, "error")
        inflight.end(error)
        self._changed.set()
