"""JSON lines over TCP between ranks: what health speaks. No pickle, and nothing is waited for for long.

Refuses to know what the lines mean.
"""

import contextlib
import json
import socket

from llama_tp.parallel.groups import Ranks

LINE_BYTES = 1 << 18    # longest line: an error with its traceback, with room
SOCKET_S = 0.5          # longest wait for a peer that does not read


class Line:
    """One connection. What a peer does not read in time is dropped: it will be judged by its silence."""

    def __init__(self, sock: socket.socket, rank: int | None = None):
        self.sock, self.rank, self._buffer = sock, rank, b""    # rank: of the peer, None until it has said so
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(SOCKET_S)

    def send(self, message: object) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list | None:
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


def listen(ranks: Ranks) -> tuple[socket.socket, str, int]:
    """The driver's listening socket, and the host and port to call.

    It listens on the loopback if all ranks are on this machine, else on the interface that has the master's address,
    and on every interface only if the master's name is not that of an interface here (address translation).
    """
    host = "127.0.0.1" if ranks.n_nodes == 1 else ranks.master
    for bound in (host, ""):
        with contextlib.suppress(OSError):
            family = socket.getaddrinfo(bound, 0, type=socket.SOCK_STREAM)[0][0] if bound else socket.AF_INET
            sock = socket.create_server((bound, 0), family=family, backlog=ranks.tp)
            return sock, host, sock.getsockname()[1]
    raise OSError(f"no port to listen on at {host}")


def call(host: str, port: int) -> Line:
    """A worker's connection to the driver (rank 0), which listens already."""
    return Line(socket.create_connection((host, port), timeout=30), rank=0)
