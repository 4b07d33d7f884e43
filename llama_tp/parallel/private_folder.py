"""Folders for sockets and stores that only this user can enter, and that go when the process that
made them has ended.

Each is locked by its process. The kernel drops the lock when that ends in whatever way, so `sweep`
knows what to remove: what a `kill -9` has left behind goes at the next start. (systemd, which
clears /tmp of what is old, heeds such locks too.) No torch.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType

from llama_tp.arch.errors import UserError

PREFIX = "llama_tp-"
MARK = "locked"  # a file in each folder whose lock says whether it is needed


class PrivateFolder:
    """A new folder for this process, mode 0700; `remove` ends it, or the end of the process does.

    Attributes:
        path: where it is.
    """

    def __init__(self) -> None:
        sweep()
        self.path, self._lock, self._pid = tempfile.mkdtemp(prefix=PREFIX), None, os.getpid()
        with contextlib.suppress(OSError):  # a file system without locks: then no sweep may take it
            self._lock = hold(self.path)
            Path(self.path, MARK).touch()
        atexit.register(self.remove)

    def remove(self) -> None:
        """Removes it with all that it holds; safe to call twice, and in a forked child, whose it is
        not."""
        atexit.unregister(self.remove)
        if os.getpid() != self._pid:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def __enter__(self) -> "PrivateFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def check(path: str) -> None:
    """Raises UserError unless `path` is a folder of this user that nobody else may enter."""
    try:
        info = os.lstat(path)
    except (OSError, ValueError) as error:
        found = str(error)
    else:
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o077:
            return
        found = f"mode {stat.filemode(info.st_mode)}, user {info.st_uid}"
    raise UserError(
        f"{path!r} is no private folder of this user",
        found,
        "start the ranks as one user, with the same TMPDIR (python -m llama_tp.launch does)",
    )


def is_held(path: str) -> bool:
    """Whether the process that made the folder still lives."""
    try:
        lock = hold(path)
    except OSError:  # no locks here: nobody can tell
        return True
    if lock is not None:
        os.close(lock)
    return lock is None


def hold(path: str) -> int | None:
    """Locks a folder or a file. -> The descriptor that holds the lock, or None if another process
    has it, or has removed what was there. Raises OSError where nothing is there, or no lock."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file), os.lstat(path)):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(file)
        raise
    os.close(file)
    return None


def sweep() -> None:
    """Removes the folders that processes have left which have ended: nobody holds their lock."""
    for mark in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{MARK}"):
        path = str(mark.parent)
        with contextlib.suppress(OSError, UserError):  # whose it may be, or who else sweeps it
            check(path)
            lock = hold(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def sweep_files(folder: str, prefix: str) -> None:
    """The same for files that hold their own lock: removes those of processes that have ended."""
    for path in Path(folder).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            lock = hold(str(path))
            if lock is not None:
                os.unlink(path)
                os.close(lock)
