"""Clients that say nothing, do not read, stop sending, or are too many: each is ended in time, the
others see nothing of it."""

import contextlib
import json
import logging
import os
import socket
import time

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.server.connections import LogLimit, backlog_of, most_connections
from tests.servers import pretending

COMPLETION = (
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    "Content-Length: {}\r\n\r\n{}"
)


def connected(server, small: bool = False) -> socket.socket:
    """A connection to it. small: with as little room for what comes back as the kernel allows."""
    sock = socket.socket()
    if small:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.settimeout(20)
    host, port = server.url.removeprefix("http://").split(":")
    sock.connect((host, int(port)))
    return sock


def asking(**body) -> bytes:
    text = json.dumps(body)
    return COMPLETION.format(len(text), text).encode()


def all_of(sock: socket.socket) -> bytes:
    """What comes until the server closes; b"" too where it resets."""
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: sock.recv(65536), b""))
    return b""


def n_files(server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def load(server) -> dict:
    return json.loads(server.get("/load")[2])


def wait_until(condition, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_open_files_are_enough_for_all_connections():
    for n_files in (1 << 20, 20_000, 4096, 1024, 256):
        assert 0 < most_connections(None, n_files) <= min(4096, n_files - 3 * backlog_of(n_files))
    assert most_connections(9000, 1 << 20) == 9000
    for wanted, found in ((1000, 1024), (None, 64)):
        with pytest.raises(
            UserError, match=f"the limit of open files is too low .* found {found} files"
        ):
            most_connections(wanted, found)


def test_a_log_line_that_repeats_is_counted_and_not_written(monkeypatch):
    now, limit, passed = [0.0], LogLimit(most=3, window_s=60), []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for i in range(200):
        now[0] = i
        record = logging.LogRecord("a", 40, "file.py", 1, "no %s", ("luck",), None)
        passed += [record.getMessage()] if limit.filter(record) else []
    assert (
        passed
        == ["no luck"] * 3 + ["no luck (58 more of these were left out)", "no luck", "no luck"] * 3
    )
    assert limit.filter(logging.LogRecord("a", 40, "file.py", 2, "another", (), None))


@pytest.fixture(scope="module")
def server():
    with pretending("live", max_body_bytes=100_000) as one:
        yield one


@pytest.fixture(scope="module")
def strict():
    """A server that has no patience."""
    with pretending("live", connections={"header_s": 1, "keep_alive_s": 1, "write_s": 1}) as one:
        yield one


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_only_stops_sending_gets_its_reply(version, server):
    """What `nc -N` does. A prompt that begins with 1 takes 20 ms a token: the end of sending comes
    long before the reply."""
    with connected(server) as sock:
        sock.sendall(
            asking(prompt=[1, 5], max_tokens=20, seed=3).replace(
                b"HTTP/1.1", f"HTTP/{version}".encode()
            )
        )
        sock.shutdown(socket.SHUT_WR)
        reply = all_of(sock)
    head, _, body = reply.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and json.loads(body)["usage"]["completion_tokens"] == 20
    assert reply.startswith(b"HTTP/1.1 100") == (version == "1.1")


def test_a_client_that_only_stops_sending_gets_its_stream(server):
    with connected(server) as sock:
        sock.sendall(asking(prompt=[1, 5], max_tokens=20, seed=3, stream=True))
        sock.shutdown(socket.SHUT_WR)
        assert b"data: [DONE]" in all_of(sock)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_gone_is_told_from_one_that_stops_sending(stream, server):
    """Both send the same; the reply of the one who has gone is not computed to its end (10 s)."""
    with connected(server) as sock:
        sock.sendall(asking(prompt=[1, 5], max_tokens=500, stream=stream))
        wait_until(lambda: load(server)["running"])
    wait_until(lambda: not load(server)["running"], 6)


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"  # noqa: E501


def cpu_s(server) -> float:
    fields = open(f"/proc/{server.process.pid}/stat").read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def head_of(sent: bytes, server) -> bytes:
    """The first line of the reply to it."""
    with connected(server) as sock:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            sock.sendall(sent)
        return all_of(sock).partition(b"\r\n")[0]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 15_000 + b"\r\n",
        POST + b"1\r\n \r\n" * 10_000 + b"0\r\n\r\n",
        POST + b"2\r\n{}\r\n0\r\n" + b"a:\r\n" * 15_000 + b"\r\n",
    ],
)
def test_many_lines_or_chunks_hold_nobody_up(sent, server):
    """60 KB of either took a tenth of a second of everybody's loop; of fifty clients, many seconds.
    Now a tenth of it is read."""
    before = cpu_s(server)
    for _ in range(20):
        assert head_of(sent, server) == b"HTTP/1.1 400 Bad Request"
    hostile_s, before = cpu_s(server) - before, cpu_s(server)
    for _ in range(20):
        assert (
            head_of(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", server)
            == b"HTTP/1.1 200 OK"
        )
    honest_s = cpu_s(server) - before
    assert hostile_s < 10 * honest_s + 0.2, (hostile_s, honest_s)


def test_honest_lines_and_chunks_are_read(server):
    body = json.dumps({"prompt": "x" * 50_000, "max_tokens": 1}).encode()
    chunks = b"".join(
        b"80\r\n" + body[i : i + 128] + b"\r\n"
        if len(body) - i >= 128
        else b"%x\r\n%s\r\n" % (len(body) - i, body[i:])
        for i in range(0, len(body), 128)
    )
    post = POST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n" + b"x-a: b\r\n" * 100 + b"\r\n")
    letters = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"prompt": "x"}')
    for sent in (post + chunks + b"0\r\n\r\n", post + letters + b"0\r\n\r\n"):
        assert head_of(sent, server) in (b"HTTP/1.1 200 OK", b"HTTP/1.1 400 Bad Request"), (
            "read; the prompt may be too long"
        )
    pipelined = (
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 500
        + b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    with connected(server) as sock:
        sock.sendall(pipelined)
        assert all_of(sock).count(b"HTTP/1.1 200 OK") == 501


def test_more_connections_than_open_files_do_not_stop_the_server_or_fill_its_log():
    """asyncio logs every accept() that fails for want of files, some thousand times a second."""
    with pretending("live", n_files=256) as server, contextlib.ExitStack() as stack:
        begun = time.monotonic()
        for _ in range(400):
            stack.enter_context(connected(server))
        while time.monotonic() < begun + 2:
            assert server.get("/health")[0] == 200
            time.sleep(0.1)
        assert n_files(server) < 200 and len(server.stderr) < 20_000, server.stderr[:3000]
        assert "out of system resource" not in server.stderr


def test_silence_and_headers_without_end_are_ended(strict):
    before = n_files(strict)
    with contextlib.ExitStack() as stack:
        silent, slow, kept = (
            [stack.enter_context(connected(strict)) for _ in range(20)] for _ in range(3)
        )
        for sock in kept:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        for sock in kept:
            while not sock.recv(4096).endswith(b'"ok"}'):
                pass
            sock.sendall(b"GET /hea")  # the next one's headers have their time, too
        for _ in range(8):  # a byte now and then buys none
            for sock in slow:
                with contextlib.suppress(OSError):
                    sock.sendall(b"GET /health HTTP/1.1\r\nX-")
            time.sleep(0.2)
        assert {all_of(sock) for sock in silent} == {b""}
        assert all(all_of(sock).startswith(b"HTTP/1.1 408") for sock in kept)
        for sock in slow:
            all_of(sock)
        wait_until(lambda: n_files(strict) <= before)  # though the clients have not closed theirs


def test_one_connection_too_many_takes_the_place_of_an_idle_one_or_is_told():
    with (
        pretending("live", connections={"max_connections": 4}) as server,
        contextlib.ExitStack() as stack,
    ):
        idle = [stack.enter_context(connected(server)) for _ in range(4)]
        at_work = []
        for i in range(4):
            at_work.append(stack.enter_context(connected(server)))
            at_work[-1].sendall(asking(prompt=[1, 5], max_tokens=400, stream=True))
            assert at_work[-1].recv(4096).startswith(b"HTTP/1.1 200") and all_of(idle[i]) == b"", (
                "the oldest goes first"
            )
        with connected(server) as sock:
            sock.sendall(asking(prompt=[1, 5]))
            head, _, body = all_of(sock).partition(b"\r\n\r\n")
        assert (
            head.startswith(b"HTTP/1.1 503")
            and json.loads(body)["error"]["code"] == "too_many_connections"
        )
        with contextlib.ExitStack() as others:  # those beyond are not even told
            for _ in range(200):
                others.enter_context(connected(server))
            wait_until(lambda: n_files(server) < 120)
            assert all(sock.recv(4096) for sock in at_work)
        at_work.pop().close()
        wait_until(lambda: server.get("/health")[0] == 200)


def test_what_nobody_reads_is_ended_and_given_up(strict):
    """8 samples with 20 logprobs each are some 8 MB; the client takes the first bytes and no
    more."""
    wish = dict(
        model="fake",
        messages=[{"role": "user", "content": "x"}],
        n=8,
        max_tokens=480,
        logprobs=True,
        top_logprobs=20,
    )
    with contextlib.ExitStack() as stack:
        before = n_files(strict)
        for stream in (True, False):
            sock = stack.enter_context(connected(strict, small=True))
            sock.sendall(
                asking(**wish, stream=stream).replace(b"/v1/completions", b"/v1/chat/completions")
            )
            assert sock.recv(20).startswith(b"HTTP/1.1 200")
        wait_until(lambda: n_files(strict) <= before)
        assert load(strict)["server_load"] == 0


def test_a_client_that_reads_slowly_is_not_cut(strict):
    """It takes 30 KB a second, which is more than must be; its stream takes longer than `write_s`,
    and comes whole."""
    wish = dict(
        model="fake",
        messages=[{"role": "user", "content": "x"}],
        n=8,
        max_tokens=40,
        logprobs=True,
        top_logprobs=20,
    )
    with connected(strict, small=True) as sock:
        sock.sendall(
            asking(**wish, stream=True).replace(b"/v1/completions", b"/v1/chat/completions")
        )
        begun, text = time.monotonic(), b""
        while b"[DONE]" not in text[-100:] and (piece := sock.recv(1 << 14)):
            text += piece
            time.sleep(0.02)
        assert b"[DONE]" in text[-100:] and time.monotonic() - begun > 2, len(text)
