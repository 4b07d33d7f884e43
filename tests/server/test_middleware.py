"""Bodies that are too long, unwanted, slow or cut short: the client sees why, and the log stays
quiet."""

import asyncio
import json
import socket
import time

import pytest

from llama_tp.server import middleware
from llama_tp.server.metrics import Metrics
from tests.ranks import PATIENCE_S
from tests.servers import pretending

HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\n"
    "Content-Type: application/json\r\n"
)


@pytest.fixture(scope="module")
def server():
    with pretending("live", keys=["KEY"], max_body_bytes=100_000) as one:
        yield one


@pytest.mark.parametrize(
    "path, key, code",
    [("/v1/completions", "KEY", 413), ("/v1/completions", "wrong", 401), ("/nothing", "KEY", 413)],
)
def test_a_large_body_does_not_take_the_reply_with_it(path, key, code, server):
    """Closing a socket with bytes unread resets the connection; a client that is still sending
    would see nothing else."""
    body = json.dumps({"prompt": "x" * 20_000_000}).encode()
    status, told = server.post(path, body, Authorization=f"Bearer {key}")
    assert status == code and told["error"]["message"]


def test_a_body_that_is_small_enough_and_unwanted_neither(server):
    status, told = server.post("/nothing", b"x" * 90_000, Authorization="Bearer KEY")
    assert status == 404 and told["error"]["code"] == "not_found"


def test_a_client_that_asks_first_is_told_at_once(server):
    with socket.create_connection(server.url[7:].split(":"), PATIENCE_S) as s:
        s.sendall((HEAD + "Content-Length: 200000\r\nExpect: 100-continue\r\n\r\n").encode())
        assert s.recv(100).startswith(b"HTTP/1.1 413")


def test_a_client_that_goes_while_it_sends_is_no_failure_of_ours(server):
    with socket.create_connection(server.url[7:].split(":"), PATIENCE_S) as s:
        s.sendall((HEAD + "Content-Length: 1000\r\n\r\n{").encode())
    text = b""
    while b'status="499"' not in text:
        time.sleep(0.02)
        text = server.get("/metrics", Authorization="Bearer KEY")[2]
    assert "Traceback" not in server.stderr and b'status="500"' not in text


def test_health_can_be_asked_for_with_head(server):
    with socket.create_connection(server.url[7:].split(":"), PATIENCE_S) as s:
        s.sendall(b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        reply = b"".join(iter(lambda: s.recv(1000), b""))
    assert reply.startswith(b"HTTP/1.1 200") and reply.endswith(b"\r\n\r\n")


def gated(pieces, app, headers=((b"content-length", b"999999"),), **options):
    """What the middleware sends for one request whose body is what the async iterator `pieces`
    gives;
    `app` reads it first."""
    sent, source = [], None

    async def receive():
        return {"type": "http.request", "body": await anext(source), "more_body": True}

    async def send(message):
        sent.append(message)

    async def main():
        nonlocal source
        source = pieces()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": list(headers),
        }
        await asyncio.wait_for(
            middleware.GuardMiddleware(app, Metrics("x"), **options)(scope, receive, send), 10
        )

    asyncio.run(main())
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]


async def reads_all(scope, receive, send):
    while (await receive())["more_body"]:
        pass


def test_a_body_that_comes_too_slowly_is_given_up(monkeypatch):
    """A byte now and then is no silence."""
    for name, value in (("BODY_S", 0.3), ("BODY_RATE", 100), ("LINGER_S", 0.05)):
        monkeypatch.setattr(middleware, name, value)

    async def slow():
        while True:
            await asyncio.sleep(0.05)
            yield b"x"

    started = time.monotonic()
    assert gated(slow, reads_all) == (408, "request_timeout")
    assert time.monotonic() - started < 5


def test_bodies_have_a_quota_together(monkeypatch):
    """There is room for three large ones; the fourth waits in vain, the fifth comes when they have
    been answered. Small ones need none."""
    monkeypatch.setattr(middleware, "LINGER_S", 0.05)
    monkeypatch.setattr(middleware, "BODIES", 3)
    monkeypatch.setattr(middleware, "ROOM_S", 0.2)
    all_here, statuses = asyncio.Event(), []

    async def app(scope, receive, send):
        await receive()
        if not scope["small"]:
            statuses.append("read")
        if len(statuses) == 4:
            all_here.set()
        await asyncio.wait_for(all_here.wait(), 5)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def main():
        door = middleware.GuardMiddleware(app, Metrics("x"), max_body_bytes=100_000)

        async def ask(n: int):
            async def receive():
                return {"type": "http.request", "body": b"x" * n, "more_body": False}

            async def send(message):
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                    all_here.set()

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/",
                "query_string": b"",
                "headers": [],
                "small": n < 1000,
            }
            await door(scope, receive, send)

        await asyncio.gather(*[ask(100_000) for _ in range(4)], ask(100))
        assert sorted(map(str, statuses)) == ["200"] * 4 + ["429"] + ["read"] * 3
        await ask(100_000)
        assert statuses[-2:] == ["read", 200] and door.room._value == 3

    asyncio.run(main())


@pytest.mark.parametrize(
    "kind, n_free", [(b"application/json", 0), (b"text/event-stream; charset=utf-8", 1)]
)
def test_a_reply_that_is_not_read_keeps_the_room_of_its_body(kind, n_free, monkeypatch):
    """/tokenize makes 65 MB of a body of 3.6 MB: as many as clients wished lay there unread. A
    stream has a bound of its own."""
    monkeypatch.setattr(middleware, "BODIES", 1)

    async def app(scope, receive, send):
        await receive()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        )
        await send({"type": "http.response.body", "body": b"{}"})

    async def main():
        door, is_sent = (
            middleware.GuardMiddleware(app, Metrics("x"), max_body_bytes=100_000),
            asyncio.Event(),
        )

        async def receive():
            return {"type": "http.request", "body": b"x" * 100_000, "more_body": False}

        async def send(message):
            if message["type"] == "http.response.body":
                assert door.room._value == n_free
                is_sent.set()

        await door(
            {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []},
            receive,
            send,
        )
        assert is_sent.is_set() and door.room._value == 1

    asyncio.run(main())


def test_a_chunk_that_is_none_is_400_and_nothing_else(server):
    """It comes while the application waits for it."""
    with socket.create_connection(server.url[7:].split(":"), 5) as s:
        s.sendall((HEAD + "Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n").encode())
        time.sleep(0.2)
        s.sendall(b"no chunk\r\n")
        reply = b"".join(iter(lambda: s.recv(4000), b""))
    assert (
        reply.startswith(b"HTTP/1.1 400")
        and json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    )
    time.sleep(0.3)
    assert server.get("/health")[0] == 200 and "Traceback" not in server.stderr


def test_a_body_that_stops_coming_is_given_up(monkeypatch):
    monkeypatch.setattr(middleware, "BODY_S", 0.05)
    monkeypatch.setattr(middleware, "LINGER_S", 0.05)
    sent = []

    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass

    async def main():
        pieces = asyncio.Queue()
        pieces.put_nowait({"type": "http.request", "body": b"{", "more_body": True})

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": [(b"content-length", b"9")],
        }
        await asyncio.wait_for(
            middleware.GuardMiddleware(app, Metrics("x"))(scope, pieces.get, send), PATIENCE_S
        )

    asyncio.run(main())
    assert (
        sent[0]["status"] == 408
        and json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"
    )
