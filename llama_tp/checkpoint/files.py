"""The weight files of a checkpoint, read by position. Knows nothing of tensors or checkpoint
layouts.

Weights are read with `preadv` straight into their destination, never through a mapping: mapped
pages count into a process's peak memory, and a file that shrinks under a mapping kills the process
with SIGBUS, whereas a short read is an error that can be named. Every complaint about a file names
it and says what to do.
"""

import os
from concurrent.futures import ThreadPoolExecutor, wait

from llama_tp.arch.errors import UserError
from llama_tp.arch.regular_file import AGAIN, open_regular

READERS = 4  # threads that read one long run together
PART_BYTES = 4 << 20  # what is worth a thread's while


class Files:
    """The weight files of one checkpoint: opened when first needed, kept open until `close`,
    watched for changes.

    A file's size and time of change are noted with `watch` when its header is read; a file that
    differs later, when its data is read or when loading ends, is a UserError: some of the weights
    would be of another model.
    """

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self._noted: dict[str, tuple[int, int]] = {}
        self._readers: ThreadPoolExecutor | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every watched file, by path."""
        return {path: size for path, (size, _) in self._noted.items()}

    def watch(self, path: str, fd: int) -> None:
        self._noted[path] = self._mark(fd)

    @staticmethod
    def _mark(fd: int) -> tuple[int, int]:
        info = os.fstat(fd)
        return info.st_size, info.st_mtime_ns

    def _unchanged(self, path: str, fd: int) -> None:
        if self._mark(fd) != self._noted[path]:
            raise UserError(
                f"{path} changed while the checkpoint was being loaded",
                f"{self._noted[path][0]} bytes before, {os.fstat(fd).st_size} now",
                "let the copy or download finish, then start again",
            )

    def fill(self, path: str, offset: int, memory: memoryview) -> None:
        """Reads len(memory) bytes from byte `offset` of the file into `memory`; long runs in
        several parts at once, since one thread alone does not keep a fast disk busy."""
        fd = self._fds.get(path)
        if fd is None:
            fd = self._fds[path] = open_regular(path)
            self._unchanged(path, fd)
        if len(memory) < 2 * PART_BYTES:
            _read(fd, path, offset, memory)
            return
        part = max(PART_BYTES, -(-len(memory) // READERS))
        self._readers = self._readers or ThreadPoolExecutor(READERS, "llama_tp read")
        reads = [
            self._readers.submit(_read, fd, path, offset + at, memory[at : at + part])
            for at in range(0, len(memory), part)
        ]
        wait(reads)  # all of them, also when one fails: they write to `memory`
        for read in reads:
            read.result()

    def check_unchanged(self) -> None:
        """Raises UserError if a file that was read has been written to since its header was
        read."""
        for path, fd in self._fds.items():
            self._unchanged(path, fd)

    def close(self) -> None:
        """Closes every file; a later read opens what it needs again."""
        if self._readers:
            self._readers.shutdown()
            self._readers = None
        while self._fds:
            os.close(self._fds.popitem()[1])


def _read(fd: int, path: str, offset: int, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        try:
            n = os.preadv(fd, [memory[done:]], offset + done)
        except OSError as error:
            raise UserError(
                f"{path} cannot be read at byte {offset + done}",
                str(error.strerror),
                "check the disk or the mount, or " + AGAIN,
            ) from error
        if n == 0:
            raise UserError(
                f"{path} is shorter than when it was opened",
                f"it ends before byte {offset + len(memory)}",
                "let the copy or download finish, then start again",
            )
        done += n
