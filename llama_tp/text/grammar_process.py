"""The processes in which forms are compiled and followed: python -m llama_tp.text.grammar_process,
with a socket as stdin.

llguidance has no limit of time that holds, and what runs in it cannot be stopped. So it runs in
processes that can be killed. The first is a fork server: it reads the tokenizer once (0.3 to 0.9
s), never sees a form, and forks a worker in 1 to 5 ms whenever it is sent the end of a socket. A
worker follows one form at a time, all samples of a request, with limits of CPU time and memory that
the kernel enforces. It has one thread, no torch, and dies with the fork server, which dies with its
parent.

Frames on a worker's socket are 4 bytes of length and a body. To the worker, JSON:

    {"form": [kind, source], "outputs": [[sample, [ids]], ...], "try": bool}    a form, and what its samples have written so far
    {"tokens": [[sample, token], ...]}                                          what they have written since

From the worker, a letter and a rest: h and its process id, once; then for each sample of a message
one of m, the sample and its mask, or e and JSON, [sample, what, found, fix]. The sample is -1 where
all of them have failed.
"""  # noqa: E501

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from llama_tp.arch.errors import UserError
from llama_tp.text.grammar import Constraint, Form, Grammars
from llama_tp.text.tokenizer import open_tokenizer

MEMORY_BYTES = 256 << 20  # beside what the fork server has: an honest form takes up to 50 MB
LENGTH = struct.Struct("<I")
# of an answer with a mask; eight bytes, so that its words are aligned
HEAD = struct.Struct("<c3xI")
ALL = -1  # stands for a sample
PR_SET_PDEATHSIG = 1


class Frames:
    """Frames over a socket, which waits or does not wait as it was told before it came here."""

    def __init__(self, sock: socket.socket):
        self.sock, self._in = sock, bytearray()

    def read(self) -> list[bytearray] | None:
        """The frames that are there, once the socket has something to read; None when the peer has
        gone."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self._in += data
        frames, at = [], 0
        while len(self._in) >= at + LENGTH.size:
            end = at + LENGTH.size + LENGTH.unpack_from(self._in, at)[0]
            if len(self._in) < end:
                break
            frames.append(self._in[at + LENGTH.size : end])
            at = end
        del self._in[:at]
        return frames


def frame(body: bytes) -> bytes:
    return LENGTH.pack(len(body)) + body


class Worker:
    """The state of one: the form that it follows, and how far each sample has come."""

    def __init__(self, grammars: Grammars, n_bytes: np.ndarray):
        self._grammars, self._n_bytes = grammars, n_bytes
        self._samples: dict[int, Constraint] = {}

    def answers(self, message: dict[str, Any]) -> Iterator[bytes]:
        """A frame's body for each sample that the message is about."""
        if "form" in message:
            self._samples.clear()
            try:
                first = self._grammars.start(Form(*message["form"]))
            except UserError as error:
                yield _error(ALL, error)
                return
            for sample, ids in message["outputs"]:
                self._samples[sample] = first.fork()
                yield self._answer(sample, ids, message["try"])
        else:
            for sample, token in message["tokens"]:
                yield self._answer(sample, [token])

    def _answer(self, sample: int, ids: list[int], is_trial: bool = False) -> bytes:
        constraint = self._samples[sample]
        try:
            for token in ids:
                constraint.advance(token)
            words = constraint.mask()
            if is_trial:
                self._try(constraint, words)
        except UserError as error:
            return _error(sample, error)
        return HEAD.pack(b"m", sample) + words.tobytes()

    def _try(self, constraint: Constraint, words: np.ndarray) -> None:
        """Follows the form for one more token, some of those that it allows: llguidance finds out
        late that a form is beyond its own limits, and the mask before has then promised what it
        does not keep."""
        ids = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        ids = ids[self._n_bytes[ids] > 0]  # no stop ids: these end it
        for token in {ids[0], ids[-1], ids[self._n_bytes[ids].argmax()]} if len(ids) else ():
            other = constraint.fork()
            other.advance(int(token))
            other.mask()


def _error(sample: int, error: UserError) -> bytes:
    return b"e" + json.dumps([sample, error.what, error.found, error.fix]).encode()


def work(sock: socket.socket, grammars: Grammars, n_bytes: np.ndarray, cpu_s: float) -> None:
    """Serves one socket to its end. SIGPROF, which nobody handles, ends the process at the limit of
    CPU time: also inside llguidance."""
    worker, frames = Worker(grammars, n_bytes), Frames(sock)
    sock.sendall(frame(b"h" + str(os.getpid()).encode()))
    while (bodies := frames.read()) is not None:
        for body in bodies:
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            for answer in worker.answers(json.loads(body)):
                sock.sendall(frame(answer))
            signal.setitimer(signal.ITIMER_PROF, 0)


def become_worker() -> None:
    """Limits of this process, which has just been forked."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    with open("/proc/self/statm") as f:
        n_pages = int(f.read().split()[0])
    most = n_pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # many at their limit may be too much: these end first, not a rank
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)  # the fork server's socket
    os.dup2(nowhere, 2)  # Rust's last words when memory ends


def main() -> None:
    """The fork server. The first message on stdin, JSON, is [tokenizer's path or null, folder,
    limit of CPU seconds]; each further one brings a socket, and says how nice its worker is to
    be."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that have ended need no burial
    control = socket.socket(fileno=os.dup(0))
    tokenizer_path, folder, cpu_s = json.loads(control.recv(1 << 16))
    tokenizer = open_tokenizer(tokenizer_path, folder)
    grammars = Grammars(tokenizer)
    n_bytes = np.array(
        [
            0 if i in tokenizer.stop_ids else len(tokenizer.token_bytes(i))
            for i in range(tokenizer.n_vocab)
        ]
    )
    n_bytes = np.pad(n_bytes, (0, -tokenizer.n_vocab % 32))
    gc.freeze()  # a collection would copy the pages that all share
    while True:
        data, files, _, _ = socket.recv_fds(control, 16, 1)
        if not data:
            return
        [file] = files
        if not os.fork():
            control.close()
            become_worker()
            os.nice(int(data))
            with socket.socket(fileno=file) as sock, contextlib.suppress(OSError):
                work(sock, grammars, n_bytes, cpu_s)
            os._exit(0)
        os.close(file)


if __name__ == "__main__":
    main()
