"""What a client's connection may cost: how many there are, how long each is waited for, and how
fast it must read.

uvicorn's HTTP/1.1 on h11, which limits the bytes of the headers and the time between two requests.
The rest is here: a client that says nothing or sends its headers for ever, one that does not read,
one too many. One that has only stopped sending (what `nc -N` does) gets its reply, and is told from
one that has gone.
"""

import asyncio
import errno
import fcntl
import http
import logging
import socket
import struct
import termios
import time
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_tp.arch.errors import UserError
from llama_tp.protocol.errors import RequestError
from llama_tp.server.middleware import reply_of

USUAL_CONNECTIONS = 4096
OWN_FILES = 128  # sockets and pipes of this process, and connections that are being refused
N_REFUSED = 64  # of these; whoever comes while so many are told is not told
# of one connection, in a turn of the loop; asyncio's 256 KB of 200 take a fifth of a second
READ_BYTES = 1 << 16
LOOK_S = 0.25  # how often the connections are looked at
# for a client to read why it is refused: closing on unread bytes would take the reply with it
LINGER_S = 2.0
# bytes a second that a client must read, on average over `write_s`; Apache's number
LEAST_RATE = 500


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of the connections that clients hold.

    Args:
        max_connections: most at once; None: as many as the open files allow, at most 4,096.
        header_s: for a request's headers to come, from the connection or their first byte on.
        keep_alive_s: between a reply and the next request.
        write_s: in which a client that has fallen behind must read something (LEAST_RATE).
    """

    max_connections: int | None = None
    header_s: float = 30.0
    keep_alive_s: float = 5.0
    write_s: float = 60.0


def backlog_of(n_files: int) -> int:
    """Connections that the kernel holds until we accept them, all of which asyncio may accept at
    once."""
    return max(16, min(1024, n_files // 8))


def most_connections(wanted: int | None, n_files: int) -> int:
    """How many connections `n_files` open files allow: accept() never fails for want of one. Raises
    UserError."""
    # up to three turns of accepting before the first is counted
    possible = n_files - 3 * backlog_of(n_files) - OWN_FILES
    if possible < (wanted or 1):
        raise UserError(
            f"the limit of open files is too low for {wanted or 1} connections",
            f"found {n_files} files, enough for {max(0, possible)}",
            "raise it (ulimit -Hn) or lower --max_connections",
        )
    return wanted or min(possible, USUAL_CONNECTIONS)


class Connections:
    """What all connections share."""

    def __init__(self, limits: ConnectionLimits, most: int):
        self.limits, self.most = limits, most
        self.idle: dict[Connection, None] = {}  # without a request; in order of since when

    async def watch(self, connections: set[Any]) -> None:
        """Ends those that are over their limits, for ever. `connections` is uvicorn's set of them,
        whose type knows its own classes only."""
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for each in list(connections):
                each.check(now)


class Connection(H11Protocol):
    """HTTP/1.1 with one client, in bounds; what it cannot read, which never comes to the
    middleware, is
    told in OpenAI's shape."""

    def __init__(self, shared: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._shared, self._limits = shared, shared.limits
        self._head_since: float | None = None  # headers are being waited for
        # when the client was looked at, and its unread bytes
        self._behind: tuple[float, int] | None = None
        self._over_since: float | None = None  # it has been told why it is refused
        self._half_closed = False

    # --------------------------------------------------------------------------- what happens to it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        selector: Any = transport  # no type knows how much asyncio reads at once
        selector.max_size = READ_BYTES
        self._take_note()
        if len(self.connections) > self._shared.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._shared.idle.pop(self, None)

    def data_received(self, data: bytes) -> None:
        if self._over_since is None:
            super().data_received(data)
            self._take_note()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._take_note()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._behind = time.monotonic(), self._n_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._behind = None

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio asks, uvicorn says None
        """Whether the connection stays open to be written to: there is a whole request, and its
        reply has not been sent.

        A client that has gone looks the same (its kernel even answers keep-alive probes), until it
        is sent something: then a reset comes back. A stream sends its next token; before the head
        of a reply HTTP/1.1 allows a 100, which clients skip."""
        if self._over_since is not None or not self._is_at_work() or self.cycle.more_body:
            return False
        self._half_closed, self.cycle.keep_alive = True, False
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(
                self.conn.send(
                    h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
                )
            )
        return True

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(
                RequestError(
                    msg, "", "send HTTP/1.1 with at most 64 KiB of headers", code="invalid_http"
                )
            )
        else:
            self.transport.close()  # it has its reply, or the beginning of it

    # ----------------------------------------------------------------------------------- its limits

    def check(self, now: float) -> None:
        """Ends it if it is over a limit."""
        if self._over_since is not None and now - self._over_since > LINGER_S:
            self.transport.abort()
        elif self._head_since is not None and now - self._head_since > self._limits.header_s:
            self._head_since = None
            if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
                self._refuse(
                    RequestError(
                        "the headers do not come",
                        f"not all of them in {self._limits.header_s:g} s",
                        "send them again",
                        code="request_timeout",
                        status=408,
                    )
                )
            else:
                self.transport.close()
        elif self._half_closed and self.transport.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_ERROR
        ):
            self.transport.abort()  # the reset; asyncio does not look at who has sent the last byte
        elif self._behind is not None:
            self._check_reading(now, *self._behind)
        elif self.transport.is_closing():
            self._behind = now, self._n_unread()  # what it still has to read keeps it open

    def _check_reading(self, now: float, since: float, before: int) -> None:
        """`before` bytes were unread at the time `since`."""
        if now - since > self._limits.write_s:
            n_unread = self._n_unread()
            self._behind = now, n_unread
            if n_unread > max(0.0, before - LEAST_RATE * self._limits.write_s):
                self.transport.abort()

    def _n_unread(self) -> int:
        """Bytes that wait here and in the kernel: megabytes may have to leave that one before it
        takes any of ours."""
        waiting = bytearray(4)
        try:
            fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, waiting)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOTTY):
                raise
        n_in_kernel: int = struct.unpack("i", waiting)[0]
        return self.transport.get_write_buffer_size() + n_in_kernel

    def _is_at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _take_note(self) -> None:
        """Of what is being waited for."""
        if self._is_at_work() or self._over_since is not None or self.transport.is_closing():
            self._shared.idle.pop(self, None)
            self._head_since = None
            return
        self._shared.idle.setdefault(self)
        if self.timeout_keep_alive_task is None:  # else uvicorn waits for the next request
            self._head_since = self._head_since or time.monotonic()

    def _make_room(self) -> None:
        """Ends the connection that has been idle for longest. If all are at work, it is this one:
        it is told."""
        oldest = next(
            each
            for each in self._shared.idle
            if each is self or not each.transport.get_write_buffer_size()
        )
        if oldest is not self:
            self._shared.idle.pop(oldest)
            oldest.transport.abort()
        elif len(self.connections) > self._shared.most + N_REFUSED:
            self.transport.abort()
        else:
            self._refuse(
                RequestError(
                    "the server has too many connections",
                    f"the limit is {self._shared.most}, and all are at work",
                    "ask again a little later",
                    code="too_many_connections",
                    status=503,
                )
            )

    def _refuse(self, error: UserError) -> None:
        """Tells why, and reads on, for a moment, without listening."""
        status, headers, body = reply_of(error)
        headers |= {"content-length": str(len(body)), "connection": "close"}
        for event in (
            h11.Response(
                status_code=status,
                headers=list(headers.items()),
                reason=http.HTTPStatus(status).phrase,
            ),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.write_eof()
        self._over_since = time.monotonic()
        if self._is_at_work():
            # for the application, which waits for the rest of the request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._take_note()


class LogLimit(logging.Filter):
    """Lets `most` records from one place of the code pass in `window_s`: what a client can cause,
    it can cause a million times."""

    def __init__(self, most: int = 10, window_s: float = 60.0):
        super().__init__()
        self._most, self._window_s = most, window_s
        # by file and line: the window's begin, records in it
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        place = record.pathname, record.lineno
        begin, n = self._seen.get(place, (now, 0))
        if now - begin > self._window_s:
            if n > self._most:
                record.msg = f"{record.msg} ({n - self._most} more of these were left out)"
            begin, n = now, 0
        self._seen[place] = begin, n + 1
        return n < self._most
