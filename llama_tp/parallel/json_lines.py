"""JSON lines over TCP between ranks: what health speaks. No pickle, and nothing is waited for for
long.

Refuses to know what the lines mean.
"""

import contextlib
import errno
import ipaddress
import json
import socket
from typing import Any

LINE_BYTES = 1 << 18  # longest line: an error with its traceback, with communicator
SOCKET_S = 0.5  # longest wait for a peer that does not read


class JsonLinesConnection:
    """One connection. What a peer does not read in time is dropped: it will be judged by its
    silence."""

    def __init__(self, sock: socket.socket, rank: int | None = None):
        # rank: of the peer, None until it has said so
        self.sock, self.rank, self._buffer = sock, rank, b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(SOCKET_S)

    def send(self, message: object) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Any] | None:
        """The messages that have come in; None once the peer has gone, or talks nonsense."""
        try:
            data = self.sock.recv(1 << 16)
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except TimeoutError:
            return []
        except (OSError, ValueError, RecursionError):
            return None
        return messages if data and len(self._buffer) <= LINE_BYTES else None


def listen(master: str, n_nodes: int, port: int = 0) -> socket.socket:
    """A listening socket of the driver, which is on the machine `master`.

    It listens on the loopback if all ranks are on this machine, or if `master` can only mean this
    machine; else on the interface that has the master's address. If no interface has it (address
    translation), or if the master's name means the loopback here and may mean another address
    elsewhere (Debian puts a host's own name at 127.0.1.1), it listens on all of them.
    """
    host = "127.0.0.1" if n_nodes == 1 else master
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        if host in ("localhost", address[0]) or not ipaddress.ip_address(address[0]).is_loopback:
            return socket.create_server((address[0], port), family=family)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL and not isinstance(error, socket.gaierror):
            raise  # a port that is taken, say
    return socket.create_server(("", port))


def call(host: str, port: int) -> JsonLinesConnection:
    """A worker's connection to the driver (rank 0), which listens already."""
    return JsonLinesConnection(socket.create_connection((host, port), timeout=30), rank=0)
