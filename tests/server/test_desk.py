"""The books of what is in flight, and an answer's stream, without ranks."""

import asyncio
import itertools

import pytest

from llama_tp.engine.request import Request, SamplingParams
from llama_tp.server import answer
from llama_tp.server.desk import MAX_BARREN, Desk, Unavailable
from llama_tp.server.metrics import Metrics

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
        desk, info = Desk(100, Metrics("m")), {"max_rows": 4}
        desk.attach(Link(), info)
        tickets = [desk.take([request("a", n=3)]), desk.take([request("b", n=2)]), desk.take([request("c")])]
        for _ in range(MAX_BARREN):
            desk.detach()
            link = Link()
            desk.attach(link, info)
        assert [ticket.flights[0].is_over for ticket in tickets] == [True, True, False]
        assert [message["id"] for message in link.sent] == ["c"]
    asyncio.run(main())


STEP = {"is": "step", "deltas": [], "refused": {}, "begun": [], "step_s": 1.0, "stats": STATS}


def test_only_a_word_of_the_ranks_ends_their_silence(monkeypatch):
    """Clients that come and go every second, before ranks that hang: the silence grows from the first message on."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    async def main():
        desk = Desk(100, Metrics("m"), stale_s=60)
        desk.attach(Link(), {"max_rows": 4})
        now[0] += 1000
        assert desk.silent_s == 0.0, "nothing was asked of them"
        for _ in range(30):
            ticket = desk.take([request("a")])
            now[0] += 1
            desk.drop(ticket)
        assert desk.silent_s == 30.0 and desk.state == "ready", "the last one has gone: the abort of it is owed an answer, too"
        desk.hear(STEP)
        now[0] += 1000
        assert desk.silent_s == 0.0 and desk.state == "ready", "they have answered, and have no work"
        desk.take([request("b")])
        now[0] += 59
        desk.hear(STEP)
        now[0] += 59
        assert desk.silent_s == 59.0 and desk.state == "ready"
        now[0] += 2
        assert desk.state == "stalled"
        with pytest.raises(Unavailable, match="the ranks have not been heard"):
            desk.take([request("c")])
        desk.hear(STEP)
        assert desk.state == "ready" and desk.silent_s == 0.0
    asyncio.run(main())


def test_waiting_computing_the_prompt_and_writing_are_timed_apart(monkeypatch):
    """4 s in the queue, 2 s for the prompt in steps of one second, 3 s of writing."""
    async def main():
        desk, clock = Desk(100, Metrics("m")), None
        desk.attach(Link(), {"max_rows": 1})
        monkeypatch.setattr("time.monotonic", lambda: next(clock))
        clock = itertools.repeat(100.0)
        desk.take([request("a")])
        for at, begun, reason in ((103, [], None), (105, ["a"], None), (106, [], "token"), (109, ["a"], "stop")):
            clock = itertools.repeat(float(at))
            new = {"id": "a", "index": 0, "ids": [5], "text": "x", "logprobs": [], "error": None}
            desk.hear({"is": "step", "deltas": [new | {"finish_reason": reason if reason == "stop" else None}] if reason else [],
                       "refused": {}, "begun": begun, "step_s": 1.0, "stats": STATS})
        monkeypatch.undo()
        page = desk.metrics.text(desk).decode()
        for name, seconds in (("queue", 4), ("prefill", 2), ("decode", 3)):
            assert f'llama_tp:request_{name}_time_seconds_sum{{model_name="m"}} {seconds}.0' in page
    asyncio.run(main())


def test_a_stream_whose_client_goes_leaves_no_task_behind():
    async def main():
        desk = Desk(100, Metrics("m"))
        desk.attach(Link(), {"max_rows": 4})
        events = answer._events(NoChunks, desk.take([request("a")]))
        assert await anext(events) == ""
        reader = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait([reader])
        await asyncio.sleep(0)
        assert reader.cancelled() and asyncio.all_tasks() == {asyncio.current_task()}
    asyncio.run(main())
