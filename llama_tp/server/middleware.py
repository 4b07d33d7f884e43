"""The middleware in front of the routes: who may come in, with how much, under which id; and the
answer
when we fail.

Plain ASGI around the whole application, so that nothing gets past it: not a route that somebody
adds, not a path that a Host header twists (it looks at the path alone), not a websocket.
"""

import asyncio
import hashlib
import json
import logging
import re
import secrets
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_tp.arch.errors import UserError
from llama_tp.protocol.errors import RequestError, error_body, status_of
from llama_tp.server.metrics import Metrics

LOG = logging.getLogger("llama_tp.server")
# need no key; everything else does
OPEN = frozenset(("/", "/health", "/readyz", "/livez", "/ping"))
HANDLERS = frozenset(
    (
        *OPEN,
        "/load",
        "/metrics",
        "/version",
        "/openapi.json",
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
    )
)
NOT_IN_AN_ID = re.compile(r"[^A-Za-z0-9._:-]")
BODY_S = 60.0  # of silence in the middle of a body, after which its sender is not waited for
BODY_RATE = 8192  # bytes a second, on average, that its sender must reach after the first BODY_S
SMALL_BYTES = 1 << 16  # bodies up to this always find room
# so many larger ones are read at once, until they are answered; others wait so long, unread
BODIES, ROOM_S = 32, 30.0
# of a body that nobody wants: closing on unread bytes would take the reply with it
LINGER_BYTES, LINGER_S = 64 << 20, 10.0
SILENT_S = 2.0  # in the middle of it
P = ParamSpec("P")
T = TypeVar("T")
SAFE = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


def reply_of(error: UserError) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body with which an error is told."""
    status, headers = status_of(error), {"content-type": "application/json"}
    retry_s = error.retry_s if isinstance(error, RequestError) else None
    if retry_s:
        headers["retry-after"] = str(retry_s)
    elif status >= 500:
        headers["x-should-retry"] = "false"  # OpenAI's clients would send it twice more
    return status, headers, json.dumps(error_body(error)).encode()


def bug(request_id: str) -> RequestError:
    """What a client is told of an exception of ours: nothing but where to look."""
    return RequestError(
        "the server has failed",
        f"request {request_id}",
        "its log says more",
        code="internal_error",
        status=500,
    )


def carried(work: Callable[P, T]) -> Callable[P, T]:
    """`work`, with whatever it raises turned into what a future can carry to the one who waits, and
    an event loop survives.

    A StopIteration never arrives (the request would hang for ever), SystemExit would end the
    server, and a panic in a library written in Rust, which is no Exception, would get past every
    handler.
    """

    def run(*args: P.args, **named: P.kwargs) -> T:
        try:
            return work(*args, **named)
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, StopIteration):
                raise
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return run


def log_bug(request_id: str) -> None:
    """The exception that is being handled, with its traceback; not more of them than a log can
    take."""
    LOG.error("server: request %s failed\n%s", request_id, traceback.format_exc())


class GuardMiddleware:
    """ASGI middleware: keys, sizes, request ids and the shape of every error.

    Args:
        app: the application behind.
        keys: API keys, any of which opens; none: no key is asked for.
        max_body_bytes: longer bodies get 413, whether or not they say their length first.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        keys: tuple[str, ...] = (),
        max_body_bytes: int = 8 << 20,
    ):
        self.app, self.metrics, self.max_body_bytes = app, metrics, max_body_bytes
        self.room = asyncio.Semaphore(BODIES)  # for large bodies
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        request_id = (
            NOT_IN_AN_ID.sub("", headers.get(b"x-request-id", b"").decode("latin-1"))[:128]
            or uuid.uuid4().hex
        )
        started, status = time.monotonic(), 0
        body = _Body(receive, self, headers)

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                body.release()
                await body.read_out()
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    *SAFE,
                ]
            await send(message)

        scope["request_id"] = request_id
        try:
            self._check(scope["path"], headers)
            await self.app(scope, body.receive, send_on)
        except UserError as error:
            if not status:
                await _tell(error, send_on)
        except BaseException:
            if _is_cancelled():
                raise
            log_bug(request_id)
            if not status:
                await _tell(bug(request_id), send_on)
        finally:
            body.release()
            handler = scope["path"] if scope["path"] in HANDLERS else "other"
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            self.metrics.replied(handler, method, status, time.monotonic() - started)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises RequestError for a missing or wrong key, and for a body that says itself that it
        is too long."""
        if self._keys and path not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            digest = _digest(given.strip())
            # all of them, always
            matches = [secrets.compare_digest(digest, key) for key in self._keys]
            if not any(matches) or scheme.lower() != b"bearer":
                raise RequestError(
                    "the API key is missing or wrong",
                    "",
                    "send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    status=401,
                )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > self.max_body_bytes:
            raise _too_long(self.max_body_bytes)


def _is_cancelled() -> bool:
    """The task is being ended from outside, which is no failure of what it did."""
    task = asyncio.current_task()
    if task is not None and hasattr(task, "cancelling"):  # Python 3.11
        return bool(task.cancelling() > 0)
    return task is None or isinstance(sys.exc_info()[1], asyncio.CancelledError)


class _Body:
    """What a client sends, in bounds of size, silence and slowness.

    Args:
        middleware: has the bounds, and the room that all bodies share.
        headers: tell whether there is one, and whether the client sends it without asking first
            (Expect).
    """

    def __init__(self, receive: Receive, middleware: GuardMiddleware, headers: dict[bytes, bytes]):
        self._receive, self._middleware = receive, middleware
        self._n_bytes, self._has_room, self._ended = 0, False, False
        self._begun = time.monotonic()
        has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        self._comes = has_body and b"expect" not in headers

    async def receive(self) -> Message:
        """The next piece; after the last, news of the client's going. Raises RequestError out of
        bounds."""
        if self._ended:
            return await self._receive()
        slow_in_s = self._begun + BODY_S + self._n_bytes / BODY_RATE - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, min(BODY_S, slow_in_s)))
        except asyncio.TimeoutError:
            self._ended = True
            raise RequestError(
                "the body does not come",
                f"{self._n_bytes:,} bytes in {time.monotonic() - self._begun:.0f} s",
                "send it again",
                code="request_timeout",
                status=408,
            ) from None
        self._ended = not message.get("more_body", False)
        self._n_bytes += len(message.get("body", b""))
        if self._n_bytes > self._middleware.max_body_bytes:
            raise _too_long(self._middleware.max_body_bytes)
        if self._n_bytes > SMALL_BYTES and not self._has_room:
            await self._take_room()
        return message

    async def _take_room(self) -> None:
        """Waits for room: what its sender sends meanwhile stays in the network."""
        asked = time.monotonic()
        try:
            await asyncio.wait_for(self._middleware.room.acquire(), ROOM_S)
        except asyncio.TimeoutError:
            self._middleware.metrics.rejected("bodies")
            raise _Crowded(
                f"{BODIES} are being read, and none was done within {ROOM_S:g} s"
            ) from None
        self._has_room = True
        self._begun += time.monotonic() - asked  # which is not its sender's fault

    def release(self) -> None:
        """Gives its room to another. Safe to call twice."""
        if self._has_room:
            self._middleware.room.release()
        self._has_room = False

    async def read_out(self) -> None:
        """Throws away what is left of it, before a reply that does not need it."""
        deadline, n_bytes = time.monotonic() + LINGER_S, 0
        while self._comes and not self._ended and n_bytes < LINGER_BYTES:
            try:
                message = await asyncio.wait_for(
                    self._receive(), max(min(SILENT_S, deadline - time.monotonic()), 0)
                )
            except asyncio.TimeoutError:
                return
            self._ended = not message.get("more_body", False)
            n_bytes += len(message.get("body", b""))


class _Crowded(RequestError):
    """There is no room for a large body."""

    retry_s = 1

    def __init__(self, found: str):
        super().__init__(
            "the server reads too many large bodies",
            found,
            "ask again a little later",
            code="rate_limit_exceeded",
            status=429,
        )


def _too_long(most: int) -> RequestError:
    return RequestError(
        "the body is too long",
        f"the limit is {most:,} bytes",
        "send less, or raise --max_body_bytes",
        code="request_too_large",
        status=413,
    )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _tell(error: UserError, send: Send) -> None:
    status, headers, body = reply_of(error)
    headers["content-length"] = str(len(body))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
