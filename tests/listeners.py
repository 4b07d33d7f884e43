"""What a tree of processes listens on, from /proc (Linux), and what strangers send there."""

import contextlib
import os
import pickle
import random
import socket
import struct
import threading
from ipaddress import ip_address
from pathlib import Path

from tests.ranks import children

LISTEN = "0A"  # the state of a socket in /proc/net/tcp


class Boom:
    """A pickle that shows whether it was read: it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    return [pid, *(each for child in children(pid) for each in tree(child))]


def listeners(pids: list[int]) -> set[tuple[int, str, int]]:
    """(pid, address, port) of each TCP socket on which one of them listens. A socket that several
    hold is the first one's: a child has its parent's between fork and exec."""
    inodes = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.setdefault(os.readlink(file), pid)
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTEN and f"socket:[{words[9]}]" in inodes:
                address, port = words[1].split(":")
                found.add((inodes[f"socket:[{words[9]}]"], str(address_of(address)), int(port, 16)))
    return found


def address_of(digits: str):
    """The address that the kernel writes as words of the machine's own byte order."""
    words = struct.unpack(f">{len(digits) // 8}I", bytes.fromhex(digits))
    address = ip_address(struct.pack(f"={len(words)}I", *words))
    return getattr(address, "ipv4_mapped", None) or address


def beyond_loopback(found: set[tuple[int, str, int]]) -> set[tuple[int, str, int]]:
    return {each for each in found if not ip_address(each[1]).is_loopback}


class Lookout:
    """Collects all listeners that a tree of processes ever has, from its start on: `.found`."""

    def __init__(self, pid: int):
        self.pid, self.found, self._over = pid, set(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self.found |= listeners(tree(self.pid))

    def __enter__(self) -> "Lookout":
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._over.set()
        self._thread.join()


def garbage(proof: Path) -> list[bytes]:
    """What a stranger may send; `proof` is there afterwards if somebody has unpickled it."""
    dice = random.Random(1)
    lengths = ("I", 2**32 - 1), ("Q", 2**63), ("I", 0), ("Q", 1)
    huge = [struct.pack(order + kind, value) for order in "<>" for kind, value in lengths]
    return [
        b"",
        b"\n",
        dice.randbytes(8),
        dice.randbytes(4096),
        dice.randbytes(1 << 18),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b'{"leave": 9, "stopped": []}\n',
        b"[" * 100_000 + b"\n",
        b"\0" * 64,
        *huge,
        *(each + b"x" * 64 for each in huge),
        pickle.dumps(Boom(proof)),
    ]


def throw(garbage: list[bytes], address: str, port: int) -> None:
    """Sends each piece over a connection of its own: half are closed at once, half stay open while
    the next are sent."""
    with contextlib.ExitStack() as stack:
        for number, piece in enumerate(garbage):
            with contextlib.suppress(OSError):
                sock = socket.create_connection((address, port), timeout=2)
                sock.settimeout(0.2)
                if number % 2:
                    stack.enter_context(sock)
                sock.sendall(piece)
                if not number % 2:
                    sock.close()
