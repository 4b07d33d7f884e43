"""`llama-tp NAME` is `python -m llama_tp.NAME`, and finds it without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from llama_tp.__main__ import COMMANDS, USAGE, help_text

ROOT = Path(__file__).resolve().parents[1]


def llama_tp(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama_tp", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_command_is_listed():
    files = {
        path.stem
        for path in (ROOT / "llama_tp").glob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text()
    }
    assert files - {"__main__"} == set(COMMANDS)
    assert all(f"\n    {name} " in help_text() for name in COMMANDS)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help(words):
    done = llama_tp(*words)
    assert (done.returncode, done.stdout, done.stderr) == (0, help_text() + "\n", "")


@pytest.mark.parametrize(
    "word, hint",
    [
        ("genrate", "did you mean generate?"),
        ("server", "did you mean serve?"),
        ("xyzzy", "llama-tp --help lists the commands"),
        ("--prompt", "llama-tp --help lists the commands"),
    ],
)
def test_a_wrong_command_is_one_line(word, hint):
    done = llama_tp(word)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr == f"error: there is no such command - found {word!r} - {hint}\n"


def test_the_words_behind_a_command_are_its_own():
    ours = llama_tp("generate", "--ckpt_dir", "checkpoints/demo", "--temprature", "1")
    theirs = subprocess.run(
        [sys.executable, "-m", "llama_tp.generate", "--ckpt_dir", "checkpoints/demo"]
        + ["--temprature", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr)
    assert ours.returncode == USAGE and "temperature" in ours.stderr


def test_nothing_heavy_is_imported():
    code = "import llama_tp.__main__, sys; print({'torch', 'fire', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
