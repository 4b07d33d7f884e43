"""A batch job's output file: whole lines in the input's order, which survive any end of the process
that writes them.

Line i answers line i of the input. What is done is a prefix, so a job continues after the last
whole line. The file NAME.job beside it records what the answers depend on; an output with another
record is not touched. One process writes at a time.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.batch_job.lines import has_failed

LOCK_WAIT_S = 30.0  # the ranks of a job whose launcher was killed take a moment to leave
RESUME = "make room, then run the same command again: it goes on from there"


class Journal:
    """The output file, open for appending and locked against another job that would write it too.

    Raises UserError if it cannot be opened, or is locked for longer than LOCK_WAIT_S.
    """

    def __init__(self, path: Path):
        self.path = path
        self.n_lines = 0
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                fix = "name a file in a folder you may write to"
                raise UserError(
                    f"--output {path} cannot be written", str(error.strerror), fix
                ) from None
            if self._locked():
                if os.path.exists(path) and os.path.samestat(os.fstat(self._fd), os.stat(path)):
                    break  # else it was replaced or removed while we waited
            os.close(self._fd)
            if time.monotonic() > deadline:
                raise UserError(
                    f"--output {path} is being written by another process",
                    "",
                    "wait for it, or name another file",
                )
            time.sleep(0.2)
        self._size = os.fstat(self._fd).st_size

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # a file system without locks: nobody is kept out
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True

    @property
    def is_empty(self) -> bool:
        return self._size == 0

    def recover(self, beginnings: Iterable[bytes]) -> int:
        """Counts the whole lines, which must begin as given, and cuts a last one that is torn. ->
        how many of them failed.

        Raises UserError for a file that holds anything else."""
        n_failed = good = self.n_lines = 0
        last = b""
        begins = iter(beginnings)
        with open(os.dup(self._fd), "rb") as f:
            f.seek(0)
            for line in f:
                expected = next(begins, None)
                if b"\0" in line:  # room that a crashed machine gave the file and never filled
                    break
                fits = expected is not None and line[: len(expected)] == expected[: len(line)]
                if fits and not line.endswith(b"\n"):  # torn
                    break
                if expected is None or not (fits and line.endswith(b"}\n")):  # no crash leaves this
                    raise UserError(
                        f"--output {self.path} is not what this job has written",
                        f"line {self.n_lines + 1} does not answer that line of the input",
                        "name another --output, or move the file away",
                    )
                n_failed += has_failed(line, expected)
                good += len(line)
                self.n_lines += 1
                last = line
        if last and not _is_json(last):  # torn, and something else has been written behind it
            raise UserError(
                f"--output {self.path} is not what this job has written",
                f"line {self.n_lines} is no JSON",
                "cut it off, name another --output, or move the file away",
            )
        if good < self._size:
            os.ftruncate(self._fd, good)
            os.fsync(self._fd)
            self._size = good
        return n_failed

    def append(self, lines: list[bytes]) -> None:
        """Writes lines, one write each, and has them on the disk when it returns. Raises UserError
        when the disk does not take them; the file then ends after the last whole line."""
        if not lines:
            return
        try:
            for line in lines:
                n = 0
                while n < len(line):  # once; a disk that is nearly full takes a part, then says so
                    n += os.pwrite(self._fd, line[n:] if n else line, self._size + n)
                self._size += len(line)
                self.n_lines += 1
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
                os.fsync(self._fd)
            found = f"{error.strerror}, after {self.n_lines} whole lines"
            raise UserError(f"--output {self.path} cannot be written", found, RESUME) from None

    def lines(self) -> Iterator[bytes]:
        """The file's lines from its beginning."""
        with open(self.path, "rb") as f:
            yield from f

    def close(self) -> None:
        os.close(self._fd)

    def discard(self) -> None:
        """Removes the file if nothing has been written to it."""
        if self.is_empty:
            os.unlink(self.path)

    def becomes(self, path: Path) -> None:
        """Puts this file in the place of another, at once. Raises UserError when the disk does not
        take it."""
        try:
            os.replace(self.path, path)
        except OSError as error:
            raise UserError(
                f"{path} cannot be replaced by {self.path}", str(error.strerror), RESUME
            ) from None
        _sync_folder(path)


def read_job(path: Path) -> dict[str, Any] | None:
    """What stands in a job's sidecar; None if there is none. Raises UserError for one that cannot
    be read."""
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and isinstance(found.get("made_of"), dict):
            return found
        raise ValueError("it is no job's description")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        fix = "move it away, with the output beside it, to begin anew"
        raise UserError(f"{path} cannot be read", str(error)[:200], fix) from None


def write_job(path: Path, job: dict[str, Any]) -> None:
    """Writes a sidecar: all of it or nothing. Raises UserError when the disk does not take it."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            f.write(json.dumps(job, indent=1, sort_keys=True).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        _sync_folder(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{path} cannot be written", str(error.strerror), RESUME) from None


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two jobs are made of that is not the same, in words."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
            found += [f"{key} was {a.get(key)} and is {b.get(key)}" for key in keys]
        elif a != b:
            found.append(f"the {name} is another")
    return found


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _sync_folder(path: Path) -> None:
    """Makes a rename last: a new name is on the disk when its folder is."""
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
