"""The local socket between the HTTP server and rank 0: frames of a length and JSON, and the two
ends of it.

A frame is 4 bytes, the length (big endian), and so many bytes of JSON, one object. No pickle: what
is read here cannot run. The HTTP server listens on a socket file in a folder that only its user may
enter, and rank 0 connects.

    server -> rank 0   {"do": "submit", "id", "prompt": [ids], "params": {SamplingParams}, "outputs": [[ids] | null, ...]}
                       {"do": "abort", "id"}
    rank 0 -> server   {"is": "ready", "n_vocab", "max_model_len", ...}                         once
                       {"is": "scores", "id", "scores": [score | null, ...]}                    prompt logprobs, piece by piece
                       {"is": "step", "deltas": [...], "refused": {id: [what, found, fix]}, "stats": {...},
                        "begun": [ids that have a row since this step and are not done with it],
                        "step_s"}

A score is [token, logprob, [[token, logprob], ...]]; a delta {"id", "index", "ids", "text",
"logprobs": [score, ...], "finish_reason", "error"}. This module knows no more of them than that
they are JSON objects.
"""  # noqa: E501

import asyncio
import collections
import contextlib
import json
import queue
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from llama_tp.arch.errors import UserError

MAX_FRAME_BYTES = 1 << 28  # far above any honest frame: a prompt of a million ids has some 7 MB
LENGTH = struct.Struct(">I")
CONNECT_S = 10.0
TURN_BYTES = 1 << 16  # that the server encodes at once: some tenths of a millisecond


class BrokenFrame(Exception):
    """The peer sent what is no frame: too long, cut short, or no JSON object."""


def encode(message: dict[str, Any]) -> bytes:
    """One frame. ValueError for NaN and infinities, which JSON does not have, and for what is too
    long."""
    data = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    if len(data) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {len(data):,} bytes is longer than {MAX_FRAME_BYTES:,}")
    return LENGTH.pack(len(data)) + data


def length_of(head: bytes) -> int:
    """Bytes that follow the four of `head`. Raises BrokenFrame for more than a frame may have."""
    length: int = LENGTH.unpack(head)[0]
    if length > MAX_FRAME_BYTES:
        raise BrokenFrame(f"a frame of {length:,} bytes")
    return length


def decode(data: bytes) -> dict[str, Any]:
    """What the bytes after the length say."""
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenFrame(str(error)) from None
    if not isinstance(message, dict):
        raise BrokenFrame(f"a {type(message).__name__} instead of an object")
    return message


class RankEnd:
    """Rank 0's end. A thread moves frames from the socket into a queue and does nothing else.

    Args:
        path: of the socket file.
        on_close: called by the thread when the server has gone (or talks nonsense).

    Raises UserError if nobody listens there.
    """

    def __init__(self, path: str, on_close: Callable[[], None] = lambda: None):
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(CONNECT_S)
        try:
            self._sock.connect(path)
        except OSError as error:
            raise UserError(
                "rank 0 does not reach the HTTP server",
                f"{path}: {error}",
                "start python -m llama_tp.serve again",
            ) from None
        self._sock.settimeout(None)
        self._file = self._sock.makefile("rb")
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._on_close = on_close
        threading.Thread(target=self._read, name="llama_tp link", daemon=True).start()

    def _read(self) -> None:
        try:
            while len(head := self._file.read(LENGTH.size)) == LENGTH.size:
                data = self._file.read(n_bytes := length_of(head))
                if len(data) < n_bytes:
                    break
                self._queue.put(decode(data))
        except (OSError, ValueError, BrokenFrame):
            pass  # a peer that breaks off or talks nonsense has gone
        self._queue.put(None)
        self._on_close()

    def take(self, wait: bool) -> list[dict[str, Any]] | None:
        """The messages that have come in, at least one if `wait`; None once the server has gone."""
        came = [self._queue.get()] if wait else []
        with contextlib.suppress(queue.Empty):
            while True:
                came.append(self._queue.get_nowait())
        messages = [message for message in came if message is not None]
        return messages if len(messages) == len(came) else None

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; to a server that has gone, nothing: `take` tells."""
        with contextlib.suppress(OSError):
            self._sock.sendall(encode(message))

    def close(self) -> None:
        """Safe to call twice."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class ServerEnd:
    """The server's end, on its event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self._unsent: collections.deque[dict[str, Any]] = collections.deque()
        self._n_sent = 0  # bytes in this turn of the loop

    async def take(self) -> dict[str, Any] | None:
        """The next message; None once rank 0 has gone. Raises BrokenFrame."""
        try:
            n_bytes = length_of(await self._reader.readexactly(LENGTH.size))
            return decode(await self._reader.readexactly(n_bytes))
        except (asyncio.IncompleteReadError, OSError):
            return None

    def send(self, message: dict[str, Any]) -> None:
        """Hands a message to the loop, which sends it; never waits. What a rank that has gone does
        not read is dropped.

        Of many at once (a thousand prompts) some are encoded now, the others in later turns of the
        loop, between which it looks after everybody else."""
        self._unsent.append(message)
        self._send_some()

    def _send_some(self) -> None:
        if not self._n_sent:
            asyncio.get_running_loop().call_soon(self._next_turn)
        while self._unsent and self._n_sent < TURN_BYTES:
            data = encode(self._unsent.popleft())
            self._n_sent += len(data)
            if not self._writer.is_closing():
                self._writer.write(data)

    def _next_turn(self) -> None:
        self._n_sent = 0
        if self._unsent:
            self._send_some()

    def close(self) -> None:
        self._writer.close()
