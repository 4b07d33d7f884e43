"""One order's answer, streamed or whole: deltas from the request manager, through the protocol's
presenter, to
the client.

Whatever way it ends (read to the end, an error, a client that has gone), the request manager is
told, so that nothing goes on running that nobody will read.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llama_tp.arch.errors import UserError
from llama_tp.engine.delta import Delta
from llama_tp.protocol.errors import error_body
from llama_tp.protocol.order import Order, ServedModel
from llama_tp.protocol.reply import Chunks, Fold
from llama_tp.server.middleware import bug, carried, log_bug
from llama_tp.server.request_manager import RequestManager, StreamHandle

PING_S = 15.0  # of silence, after which a stream shows that it lives: proxies cut what is silent
UNREAD_BYTES = 16 << 20  # of a stream's deltas that wait for a client who does not read
# of a reply, sent at once; bytes, of one that does not stream. The next is sent when the client has
# read
PIECE_CHARS = 1 << 16
BIG = 2000  # tokens, above which a reply is put together off the event loop
# a list shorter than that may hold long ones; a longer one is written in such pieces
FEW, PIECE = 64, 1000


class EventStream(StreamingResponse):
    """Server-sent events; `at_end` is called when the last was sent, and when the client has
    gone."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]):
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


class JsonReply(Response):
    """A text of JSON, sent as fast as the client reads; `at_end` is called when the last byte was
    sent, and when he has gone."""

    media_type = "application/json"
    at_end: Callable[[], None] = staticmethod(lambda: None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            for i in range(0, len(self.body) or 1, PIECE_CHARS):
                await send(
                    {
                        "type": "http.response.body",
                        "body": self.body[i : i + PIECE_CHARS],
                        "more_body": i + PIECE_CHARS < len(self.body),
                    }
                )
        finally:
            self.at_end()


def json_reply(content: object) -> JsonReply:
    """A reply in JSON, without NaN, which is none."""
    return JsonReply(dumps(content))


def long_reply(content: object) -> JsonReply:
    """The same for long lists, to be made in a thread."""
    return JsonReply(dumps_in_pieces(content))


def dumps(content: object) -> str:
    return json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def dumps_in_pieces(content: object) -> str:
    """As `dumps`, in many short calls: in one call of json no other thread runs, so that the event
    loop would stand still (50 ms for 800,000 ids)."""
    if isinstance(content, dict):
        return (
            "{"
            + ",".join(
                f"{dumps(str(key))}:{dumps_in_pieces(value)}" for key, value in content.items()
            )
            + "}"
        )
    if isinstance(content, list) and len(content) < FEW:
        return "[" + ",".join(map(dumps_in_pieces, content)) + "]"
    if isinstance(content, list):
        return (
            "["
            + ",".join(dumps(content[i : i + PIECE])[1:-1] for i in range(0, len(content), PIECE))
            + "]"
        )
    return dumps(content)


async def answer(
    order: Order,
    model: ServedModel,
    manager: RequestManager,
    request: Request,
    created: int,
    fingerprint: str,
) -> Response:
    """Hands the order to the request manager and answers, with `created` and `fingerprint` in the
    reply.
    Raises RequestError before anything is sent."""
    chunks = Chunks(order, model, created, fingerprint)
    handle = manager.take(list(order.requests), UNREAD_BYTES if order.stream else None)
    if order.stream:
        return EventStream(
            _events(chunks, handle, request.scope["request_id"]), lambda: manager.drop(handle)
        )
    reply = None
    try:
        reply = await _unless_gone(_whole(chunks, handle), request)
        reply.at_end = lambda: manager.drop(handle)  # until then it takes its memory
        return reply
    finally:
        if reply is None:
            manager.drop(handle)


async def _events(chunks: Chunks, handle: StreamHandle, request_id: str = "") -> AsyncIterator[str]:
    """The stream as text. An error in its middle is an event of its own: it cannot be a status any
    more."""
    try:
        yield _framed(chunks.begin())
        while not handle.is_read:
            news = asyncio.ensure_future(handle.take())
            try:
                while not (await asyncio.wait([news], timeout=PING_S))[0]:
                    yield ": still waiting\n\n"
            finally:
                news.cancel()  # if the client has gone
            text = "".join(map(_framed, await _grown(chunks, news.result())))
            for i in range(0, len(text), PIECE_CHARS):
                yield text[i : i + PIECE_CHARS]
        yield _framed(chunks.end())
    except UserError as error:
        yield _framed([error_body(error)])
    except Exception:
        log_bug(request_id)
        yield _framed([error_body(bug(request_id))])
    yield "data: [DONE]\n\n"


def _framed(chunks: list[dict[str, Any]]) -> str:
    return "".join(f"data: {dumps(chunk)}\n\n" for chunk in chunks)


async def _grown(chunks: Chunks, deltas: list[Delta]) -> list[list[dict[str, Any]]]:
    """The chunks of each delta."""

    def grow() -> list[list[dict[str, Any]]]:
        return [chunks.take(delta) for delta in deltas]

    if any(len(delta.prompt_logprobs or ()) > BIG for delta in deltas):
        return await asyncio.to_thread(carried(grow))
    return carried(grow)()


async def _whole(chunks: Chunks, handle: StreamHandle) -> JsonReply:
    fold = Fold(chunks.order)
    for chunk in chunks.begin():
        fold.add(chunk)
    while not handle.is_read:
        for chunks_of_one in await _grown(chunks, await handle.take()):
            for chunk in chunks_of_one:
                fold.add(chunk)
    usage = chunks.usage()
    if usage["total_tokens"] > BIG:
        return await asyncio.to_thread(carried(lambda: long_reply(fold.reply(usage))))
    return carried(lambda: json_reply(fold.reply(usage)))()


async def _unless_gone(work: Awaitable[JsonReply], request: Request) -> JsonReply:
    """The work's result; if the client goes meanwhile, the work is dropped and the reply is for
    nobody."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else JsonReply(status_code=499)
    finally:
        for each in (task, gone):
            each.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
