"""Bodies that are too long, unwanted, slow or cut short: the client sees why, and the log stays quiet."""

import asyncio
import json
import socket
import time

import pytest

from llama_tp.server import gate
from llama_tp.server.metrics import Metrics
from tests.ranks import PATIENCE_S
from tests.servers import pretending

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server():
    with pretending("live", keys=["KEY"], max_body_bytes=100_000) as one:
        yield one


@pytest.mark.parametrize("path, key, code", [
    ("/v1/completions", "KEY", 413), ("/v1/completions", "wrong", 401), ("/nothing", "KEY", 413)])
def test_a_large_body_does_not_take_the_reply_with_it(path, key, code, server):
    """Closing a socket with bytes unread resets the connection; a client that is still sending would see nothing else."""
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


def test_a_body_that_stops_coming_is_given_up(monkeypatch):
    monkeypatch.setattr(gate, "BODY_S", 0.05)
    monkeypatch.setattr(gate, "LINGER_S", 0.05)
    sent = []

    async def app(scope, receive, send):
        while (await receive())["more_body"]:
            pass

    async def main():
        pieces = asyncio.Queue()
        pieces.put_nowait({"type": "http.request", "body": b"{", "more_body": True})

        async def send(message):
            sent.append(message)
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": [(b"content-length", b"9")]}
        await asyncio.wait_for(gate.Gate(app, Metrics("x"))(scope, pieces.get, send), PATIENCE_S)
    asyncio.run(main())
    assert sent[0]["status"] == 408 and json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"
