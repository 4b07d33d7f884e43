"""The books of what is in flight, and an answer's stream, without ranks."""

import asyncio
import itertools
import tracemalloc

import pytest

from llama_tp.engine.request import Request
from llama_tp.protocol.errors import RequestError
from llama_tp.sampling.params import SamplingParams
from llama_tp.server import answer
from llama_tp.server.metrics import Metrics
from llama_tp.server.request_manager import MAX_BARREN, Full, RequestManager, Unavailable

STATS = {"prefix_hit_tokens": 0, "prefill_tokens": 0, "n_preemptions": 0, "n_steps": 0}


class Link:
    """Keeps what would be sent."""

    def __init__(self):
        self.sent = []
        self.send = self.sent.append


class NoChunks:
    begin = staticmethod(lambda: [])


def request(name: str, **params) -> Request:
    return Request(name, [1, 2], SamplingParams(seed=1, **params))


def test_only_requests_that_may_have_run_are_given_up_for_the_ends_of_the_ranks():
    """Behind the first four samples nothing has had a row: it cannot have killed the ranks."""

    async def main():
        manager, info = RequestManager(100, Metrics("m")), {"max_rows": 4}
        manager.attach(Link(), info)
        handles = [
            manager.take([request("a", n=3)]),
            manager.take([request("b", n=2)]),
            manager.take([request("c")]),
        ]
        for _ in range(MAX_BARREN):
            manager.detach()
            link = Link()
            manager.attach(link, info)
        assert [handle.inflight[0].is_over for handle in handles] == [True, True, False]
        assert [message["id"] for message in link.sent] == ["c"]

    asyncio.run(main())


STEP = {"is": "step", "deltas": [], "refused": {}, "begun": [], "step_s": 1.0, "stats": STATS}


def test_only_a_word_of_the_ranks_ends_their_silence(monkeypatch):
    """Clients that come and go every second, before ranks that hang: the silence grows from the
    first message on."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    async def main():
        manager = RequestManager(100, Metrics("m"), stale_s=60)
        manager.attach(Link(), {"max_rows": 4})
        now[0] += 1000
        assert manager.silent_s == 0.0, "nothing was asked of them"
        for _ in range(30):
            handle = manager.take([request("a")])
            now[0] += 1
            manager.drop(handle)
        assert manager.silent_s == 30.0 and manager.state == "ready", (
            "the last one has gone: the abort of it is owed an answer, too"
        )
        manager.hear(STEP)
        now[0] += 1000
        assert manager.silent_s == 0.0 and manager.state == "ready", (
            "they have answered, and have no work"
        )
        manager.take([request("b")])
        now[0] += 59
        manager.hear(STEP)
        now[0] += 59
        assert manager.silent_s == 59.0 and manager.state == "ready"
        now[0] += 2
        assert manager.state == "stalled"
        with pytest.raises(Unavailable, match="the ranks have not been heard"):
            manager.take([request("c")])
        manager.hear(STEP)
        assert manager.state == "ready" and manager.silent_s == 0.0

    asyncio.run(main())


def gained(name: str, n_scores: int) -> dict:
    scores = [[5, -0.5, [[i, -0.5 * i] for i in range(20)]] for _ in range(n_scores)]
    return STEP | {
        "deltas": [
            {
                "id": name,
                "index": 0,
                "ids": [5],
                "text": "x",
                "logprobs": scores,
                "error": None,
                "finish_reason": None,
            }
        ]
    }


def test_a_stream_that_nobody_reads_is_given_up_and_keeps_nothing(monkeypatch):
    """2,000 tokens with 20 logprobs are 5 MB; the other stream is read, and gains as much."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    async def main():
        manager, link = RequestManager(100, Metrics("m")), Link()
        manager.attach(link, {"max_rows": 4})
        unread, read = (manager.take([request(name)], max_unread_bytes=1 << 20) for name in "ab")
        tracemalloc.start()
        n_read = 0
        for _ in range(2000):
            now[0] += 0.1
            manager.hear(gained("a", 1))
            manager.hear(gained("b", 1))
            n_read += len(await read.take())
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert n_read == 2000 and not read.inflight[0].is_over
        assert held < 1 << 20
        assert (
            unread.inflight[0].is_over
            and {"do": "abort", "id": "a"} in link.sent
            and manager.n_inflight == 1
        )
        with pytest.raises(RequestError, match="the stream was not read"):
            while True:
                await unread.take()

    asyncio.run(main())


def test_much_at_once_is_no_backlog(monkeypatch):
    """The logprobs of a long prompt come in one piece; whoever waits for them has not had the time
    to read them."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    async def main():
        manager = RequestManager(100, Metrics("m"))
        manager.attach(Link(), {"max_rows": 4})
        handle = manager.take([request("a")], max_unread_bytes=1 << 20)
        now[0] += 1000
        for _ in range(3):
            manager.hear(gained("a", 1000))
        assert len(await handle.take()) < 3, "in pieces, so that they are not all written at once"
        while handle.n_unread_bytes:
            await handle.take()
        assert not handle.inflight[0].is_over

    asyncio.run(main())


def test_logprobs_are_admitted_by_their_number():
    """n x tokens x (top + 1), of the prompt too; what has been asked for counts until its reply has
    been sent."""

    async def main():
        manager = RequestManager(100, Metrics("m"), max_scores=1000)
        manager.attach(Link(), {"max_rows": 4, "max_model_len": 102})
        wish = dict(n=2, max_tokens=20, logprobs=4)
        handles = [manager.take([request(str(i), **wish)]) for i in range(5)]
        with pytest.raises(Full) as caught:
            manager.take([request("5", max_tokens=1, logprobs=0)])
        assert caught.value.status == 429 and "1,000 of 1,000 logprobs" in str(caught.value)
        manager.take([request("6")])
        for error in (
            dict(logprobs=10),
            dict(n=2, max_tokens=500, logprobs=5),
            dict(max_tokens=1, prompt_logprobs=20, n=1),
        ):
            ids = [1] * (2 if "logprobs" in error else 50)
            with pytest.raises(RequestError) as caught:
                manager.take([Request("7", ids, SamplingParams(seed=1, **error))])
            assert caught.value.status == 400 and "more logprobs than the server holds" in str(
                caught.value
            )
        for handle in handles:
            manager.drop(handle)
            manager.drop(handle)
        assert manager.take([request("8", **wish), request("9", max_tokens=399, logprobs=1)])

    asyncio.run(main())


def test_waiting_computing_the_prompt_and_writing_are_timed_apart(monkeypatch):
    """4 s in the queue, 2 s for the prompt in steps of one second, 3 s of writing."""

    async def main():
        manager, clock = RequestManager(100, Metrics("m")), None
        manager.attach(Link(), {"max_rows": 1})
        monkeypatch.setattr("time.monotonic", lambda: next(clock))
        clock = itertools.repeat(100.0)
        manager.take([request("a")])
        for at, begun, reason in (
            (103, [], None),
            (105, ["a"], None),
            (106, [], "token"),
            (109, ["a"], "stop"),
        ):
            clock = itertools.repeat(float(at))
            new = {"id": "a", "index": 0, "ids": [5], "text": "x", "logprobs": [], "error": None}
            manager.hear(
                {
                    "is": "step",
                    "deltas": [new | {"finish_reason": reason if reason == "stop" else None}]
                    if reason
                    else [],
                    "refused": {},
                    "begun": begun,
                    "step_s": 1.0,
                    "stats": STATS,
                }
            )
        monkeypatch.undo()
        page = manager.metrics.text(manager).decode()
        for name, seconds in (("queue", 4), ("prefill", 2), ("decode", 3)):
            assert f'llama_tp:request_{name}_time_seconds_sum{{model_name="m"}} {seconds}.0' in page

    asyncio.run(main())


def test_a_stream_whose_client_goes_leaves_no_task_behind():
    async def main():
        manager = RequestManager(100, Metrics("m"))
        manager.attach(Link(), {"max_rows": 4})
        events = answer._events(NoChunks, manager.take([request("a")]))
        assert await anext(events) == ""
        reader = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait([reader])
        await asyncio.sleep(0)
        assert reader.cancelled() and asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
