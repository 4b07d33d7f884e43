"""Plain files, opened with suspicion and read by position. Knows nothing of tensors or checkpoint layouts.

Weights are read with `preadv` straight into their destination, never through a mapping: mapped pages count into a
process's peak memory, and a file that shrinks under a mapping kills the process with SIGBUS, whereas a short read is
an error that can be named. Every complaint about a file names it and says what to do.
"""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor, wait

from llama_tp.spec.errors import UserError

AGAIN = "download it again (`hf download ORG/NAME`, or `llama download` for Meta's own files)"
READERS = 4                     # threads that read one long run together
PART_BYTES = 4 << 20            # what is worth a thread's while
_HEAD_BYTES = 512               # enough to tell a git-lfs pointer (about 130 bytes) and a web page from weights


def open_regular(path: str) -> int:
    """A file descriptor of `path`, which must be a readable, non-empty regular file that holds what its name says.

    `stat` comes before `open`: opening a FIFO blocks for ever. Raises UserError for a missing file, a dangling or
    looping link (naming both ends), a folder, a FIFO, a file one may not read, 0 bytes, a git-lfs pointer, a web page.
    """
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise UserError(f"{path} must be a file", "found a folder", "move the folder away and " + AGAIN)
        if not stat.S_ISREG(info.st_mode):
            raise UserError(f"{path} must be a regular file", "found a pipe, socket or device",
                            "put the real file in its place")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if os.path.islink(path):
            raise UserError(f"{path} is a link to a file that is not there", f"it points to {os.readlink(path)}",
                            "an interrupted download leaves such links: " + AGAIN) from None
        raise UserError(f"{path} is not there", "", AGAIN) from None
    except PermissionError:
        raise UserError(f"{path} cannot be read", f"permission denied to uid {os.geteuid()}",
                        "allow it (`chmod a+r`, and `a+x` on its folders) or run as its owner") from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened", str(error.strerror), "check the link or the mount") from error
    try:
        _refuse_impostor(path, info.st_size, os.pread(fd, _HEAD_BYTES, 0))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_impostor(path: str, size: int, head: bytes) -> None:
    if size == 0:
        raise UserError(f"{path} is empty", "0 bytes", AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the file itself", f"{size} bytes",
                        "run `git lfs pull` in its folder")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower().startswith((b"<!doctype", b"<html", b"<head")):
        raise UserError(f"{path} is a web page, not the file itself", f"{size} bytes that begin with {head[:15]!r}",
                        "the download was refused: accept the model's licence, set HF_TOKEN, and " + AGAIN)


def list_folder(path: str) -> list[str]:
    """Sorted names in a folder, without dot files (`._consolidated.00.pth` is what macOS leaves on foreign disks)."""
    try:
        return sorted(name for name in os.listdir(path) if not name.startswith("."))
    except PermissionError:
        raise UserError(f"{path} cannot be read", f"permission denied to uid {os.geteuid()}",
                        "allow it (`chmod a+rx`) or run as its owner") from None
    except OSError as error:
        raise UserError(f"{path} is not a folder that can be read", str(error.strerror),
                        "point --ckpt_dir at the checkpoint's folder") from error


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """For `json.loads(object_pairs_hook=)`: a key given twice is an error, where plain JSON readers keep the last."""
    found: dict = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands there twice")
        found[key] = value
    return found


def read_json(path: str) -> dict:
    """The JSON object in a small text file; a byte order mark and CRLF are accepted, anything else odd a UserError."""
    fd = open_regular(path)
    with open(fd, "rb") as file:
        raw = file.read()
    try:
        found = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON", str(error), "correct it or " + AGAIN) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a JSON object", f"found a {type(found).__name__}", "correct it or " + AGAIN)
    return found


class Files:
    """The weight files of one checkpoint: opened when first needed, kept open until `close`, watched for changes.

    A file's size and time of change are noted with `watch` when its header is read; a file that differs later, when
    its data is read or when loading ends, is a UserError: some of the weights would be of another model.
    """

    def __init__(self):
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
            raise UserError(f"{path} changed while the checkpoint was being loaded",
                            f"{self._noted[path][0]} bytes before, {os.fstat(fd).st_size} now",
                            "let the copy or download finish, then start again")

    def fill(self, path: str, offset: int, memory: memoryview) -> None:
        """Reads len(memory) bytes from byte `offset` of the file into `memory`; long runs in several parts at once, since one
        thread alone does not keep a fast disk busy."""
        fd = self._fds.get(path)
        if fd is None:
            fd = self._fds[path] = open_regular(path)
            self._unchanged(path, fd)
        if len(memory) < 2 * PART_BYTES:
            _read(fd, path, offset, memory)
            return
        part = max(PART_BYTES, -(-len(memory) // READERS))
        self._readers = self._readers or ThreadPoolExecutor(READERS, "llama_tp read")
        reads = [self._readers.submit(_read, fd, path, offset + at, memory[at:at + part]) for at in range(0, len(memory), part)]
        wait(reads)                                         # all of them, also when one fails: they write to `memory`
        for read in reads:
            read.result()

    def check_unchanged(self) -> None:
        """Raises UserError if a file that was read has been written to since its header was read."""
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
            raise UserError(f"{path} cannot be read at byte {offset + done}", str(error.strerror),
                            "check the disk or the mount, or " + AGAIN) from error
        if n == 0:
            raise UserError(f"{path} is shorter than when it was opened", f"it ends before byte {offset + len(memory)}",
                            "let the copy or download finish, then start again")
        done += n
