"""Files of a checkpoint's folder, opened with suspicion: regular files only, and the size is looked
at before the content.

Nothing here may block or fill the memory, whatever somebody put into the folder: a FIFO, a link to
/dev/zero, a sparse file of a terabyte. Every complaint names the file and says what to do.
"""

import os
import stat

from llama_tp.arch.errors import UserError

AGAIN = "download it again (`hf download ORG/NAME`, or `llama download` for Meta's own files)"
_HEAD_BYTES = 512  # enough to tell a git-lfs pointer (about 130 bytes) and a web page from weights


def open_regular(path: str) -> int:
    """A file descriptor of `path`, which must be a readable, non-empty regular file that holds what
    its name says.

    `stat` comes before `open`, which has side effects on devices. O_NONBLOCK changes nothing for a
    regular file, and keeps a FIFO that took its place in between from blocking for ever. Raises
    UserError for a missing file, a dangling or looping link (naming both ends), a folder, a FIFO, a
    device, a file one may not read, 0 bytes, a git-lfs pointer, a web page.
    """
    try:
        _check_kind(path, os.stat(path))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if os.path.islink(path):
            raise UserError(
                f"{path} is a link to a file that is not there",
                f"it points to {os.readlink(path)}",
                "an interrupted download leaves such links: " + AGAIN,
            ) from None
        raise UserError(f"{path} is not there", "", AGAIN) from None
    except PermissionError:
        raise UserError(
            f"{path} cannot be read",
            f"permission denied to uid {os.geteuid()}",
            "allow it (`chmod a+r`, and `a+x` on its folders) or run as its owner",
        ) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened", str(error.strerror), "check the link or the mount"
        ) from error
    except ValueError as error:  # a NUL in the name
        raise UserError(
            "a file's name cannot be used", f"{path[:80]!r}: {error}", "give another path"
        ) from error
    try:
        info = os.fstat(fd)
        _check_kind(path, info)
        _refuse_impostor(path, info.st_size, os.pread(fd, _HEAD_BYTES, 0))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_kind(path: str, info: os.stat_result) -> None:
    if stat.S_ISDIR(info.st_mode):
        raise UserError(
            f"{path} must be a file", "found a folder", "move the folder away and " + AGAIN
        )
    if not stat.S_ISREG(info.st_mode):
        raise UserError(
            f"{path} must be a regular file",
            "found a pipe, socket or device",
            "put the real file in its place",
        )


def _refuse_impostor(path: str, size: int, head: bytes) -> None:
    if size == 0:
        raise UserError(f"{path} is empty", "0 bytes", AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a git-lfs pointer, not the file itself",
            f"{size} bytes",
            "run `git lfs pull` in its folder",
        )
    if (
        head.lstrip(b"\xef\xbb\xbf \t\r\n")[:9]
        .lower()
        .startswith((b"<!doctype", b"<html", b"<head", b"<?xml"))
    ):
        raise UserError(
            f"{path} is a web page, not the file itself",
            f"{size} bytes that begin with {head[:15]!r}",
            "the download was refused: accept the model's licence, set HF_TOKEN, and " + AGAIN,
        )


def read_file(path: str, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; UserError for a larger one, before it
    is read."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(
                f"{path} is too large for what its name says",
                f"{size:,} bytes, at most {most:,} are read",
                "put the real file in its place, or " + AGAIN,
            )
        try:
            return file.read(most)  # never more, should it grow meanwhile
        except OSError as error:
            raise UserError(
                f"{path} cannot be read", str(error.strerror), "check the disk or the mount"
            ) from error


def list_folder(path: str) -> list[str]:
    """Sorted names in a folder, without dot files (`._consolidated.00.pth` is what macOS leaves on
    foreign disks)."""
    try:
        return sorted(name for name in os.listdir(path) if not name.startswith("."))
    except PermissionError:
        raise UserError(
            f"{path} cannot be read",
            f"permission denied to uid {os.geteuid()}",
            "allow it (`chmod a+rx`) or run as its owner",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(
            f"{path} is not a folder that can be read",
            getattr(error, "strerror", str(error)),
            "point --ckpt_dir at the checkpoint's folder",
        ) from error
