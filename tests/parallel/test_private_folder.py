"""Private folders: nobody else's, gone with their process, and what a kill -9 leaves goes at the
next start."""

import errno
import os
import subprocess
import sys
import tempfile

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.parallel import private_folder
from llama_tp.parallel.private_folder import PrivateFolder, check, is_held, sweep
from tests.ranks import ROOT

HOLDER = """from llama_tp.parallel.private_folder import PrivateFolder
print(PrivateFolder().path, flush=True)
input()"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The folder for temporary files, here and in processes that a test starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def holder():
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def test_a_folder_goes_with_its_process_and_after_a_kill_at_the_next_start(place):
    process, path = holder()
    with process:
        check(path)
        assert os.path.dirname(path) == str(place) and is_held(path)
        process.kill()
    assert os.path.exists(path) and not is_held(path)
    process, other = holder()  # as a next start does
    with process:
        assert not os.path.exists(path) and os.path.exists(other)
        process.stdin.close()
    assert list(place.iterdir()) == []


def test_a_folder_that_is_held_or_not_ours_is_left_alone(place):
    process, path = holder()
    with process:
        (place / "llama_tp-old").mkdir()  # of a version without locks: it may be in use
        (place / "other").mkdir(mode=0o700)
        (place / "other" / "locked").touch()
        (place / "llama_tp-link").symlink_to(place / "other")
        (place / "llama_tp-open").mkdir()
        (place / "llama_tp-open").chmod(0o755)
        (place / "llama_tp-open" / "locked").touch()
        with PrivateFolder() as mine:
            sweep()
            assert {os.path.basename(each) for each in (path, mine.path)} | {
                "llama_tp-old",
                "other",
                "llama_tp-link",
                "llama_tp-open",
            } == set(os.listdir(place))
        process.stdin.close()


def test_a_forked_child_leaves_its_parents_folder(place):
    folder = PrivateFolder()
    if not (child := os.fork()):
        folder.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.path.exists(folder.path) and is_held(folder.path)
    folder.remove()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "make, found",
    [
        (lambda path: None, "No such file"),
        (lambda path: path.touch(), "mode -"),
        (lambda path: path.mkdir(mode=0o755), "drwxr-xr-x"),
        (lambda path: path.symlink_to(path.parent), "mode l"),
    ],
)
def test_what_somebody_else_has_put_there_is_refused(place, make, found):
    make(place / "x")
    with pytest.raises(UserError, match=f"no private folder of this user - .*{found}"):
        check(str(place / "x"))


def test_another_users_folder_is_refused(place, monkeypatch):
    (place / "x").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match="user"):
        check(str(place / "x"))


def test_without_locks_a_folder_is_never_swept(place, monkeypatch):
    """A file system that has none, as some of the network have."""

    def none(file, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(private_folder.fcntl, "flock", none)
    folder = PrivateFolder()
    assert is_held(folder.path)
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    sweep()
    assert os.path.exists(folder.path)
    folder.remove()


def test_files_of_ended_processes_are_swept(place):
    (place / "x-1").touch()
    (place / "x-2").touch()
    held = private_folder.hold(str(place / "x-2"))
    private_folder.sweep_files(str(place), "x-")
    assert os.listdir(place) == ["x-2"]
    os.close(held)
