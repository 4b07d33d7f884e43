"""How a process ends when its job has failed: last words, then out. Refuses to know why (diagnosis)
and when (health)."""

import contextlib
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn

from llama_tp.arch.errors import mark_told
from llama_tp.parallel import log

WRITE_S = 2.0  # for last words: a terminal or pipe that nobody reads must not keep the process


def kill_here(stopped: list[tuple[int, str]]) -> None:
    """Ends processes (pid, host) that do not answer, if they are on this host (Linux).

    Two containers may share a host name and still count processes apart: hence only what runs our
    own command line.
    """
    for pid, host in stopped:
        if pid and host == socket.gethostname() and pid != os.getpid():
            with contextlib.suppress(OSError):
                if (
                    Path(f"/proc/{pid}/cmdline").read_bytes()
                    == Path("/proc/self/cmdline").read_bytes()
                ):
                    os.kill(pid, signal.SIGKILL)


def leave(code: int, text: str) -> NoReturn:
    """Ends this process at once: no collective, no teardown, no exit handlers, any of which may
    hang."""

    def last_words() -> None:
        sys.stdout.flush()
        if text:
            log.write(f"error: {text}\n")
            mark_told()

    speaker = threading.Thread(target=last_words, daemon=True)
    speaker.start()
    speaker.join(WRITE_S)
    os._exit(code)
