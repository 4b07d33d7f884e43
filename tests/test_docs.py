"""What the documents say is there: links lead somewhere, flags exist, examples run."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llama_tp import cli
from llama_tp.text.tokenizer import open_tokenizer
from tests.ranks import torchrun
from tests.servers import serving

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [
    "",
    "checkpoints",
    "launch",
    "llama_tp",
    "llama_tp/benchmarks",
    "llama_tp/server",
    "tests",
]
DOCS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
COMMANDS = sorted(
    p.stem for p in (ROOT / "llama_tp").glob("*.py") if "\n    run(main)" in p.read_text()
)
OTHERS = {
    "nproc_per_node",
    "nnodes",
    "node_rank",
    "rdzv_id",
    "rdzv_backend",
    "rdzv_endpoint",
    "standalone",
    "max_restarts",
    "master_addr",
    "master_port",
    "n",  # torchrun's
    "include",
    "local_dir",  # hf download's
    "slow",
    "rewrite",
    "dry_run",
    "help",
    "quick",
}  # pytest's here, single_node.sh's, everybody's, parity.py's


def flags_of(name: str) -> dict:
    return cli.flags_of(importlib.import_module(f"llama_tp.{name}").main)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_that_are_named_exist(path):
    known = OTHERS | {
        prefix + flag for name in COMMANDS for flag in flags_of(name) for prefix in ("", "no_")
    }
    if path.parent.name == "checkpoints":
        known |= set(
            re.findall(
                r'add_argument\(\s*"--(\w+)"', (ROOT / "checkpoints/train_demo.py").read_text()
            )
        )
    named = {
        word.replace("-", "_")
        for word in re.findall(r"(?<![\w-])--([a-z][\w-]*)", path.read_text())
    }
    assert not named - known


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCS:
        named = set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", path.read_text(), re.MULTILINE))
        assert named <= targets, f"{path}: {named - targets}"


def commands_in(path: Path) -> list[str]:
    """The words after "-m llama_tp.NAME" of each command line in a document or a docstring."""
    text = path.read_text().replace("\\\\\n", " ").replace("\\\n", " ")
    text = re.sub(
        r"-m llama_tp\.launch(?: --(?:nnodes|nproc_per_node|master_\w+|node_rank) \S+)+ +(?=[a-z])",
        "-m llama_tp.",
        text,
    )
    return re.findall(
        r"-m llama_tp\.(\w+)((?: +--\w[\w-]*(?:[ =](?:\"[^\"]*\"|[^-\s`][^\s`]*))?)+)", text
    )


def test_command_lines_are_accepted():
    found = [
        line for path in [*DOCS, *(ROOT / "llama_tp").glob("*.py")] for line in commands_in(path)
    ]
    assert len(found) >= 4
    for name, words in found:
        if name in COMMANDS:
            cli.parse(flags_of(name), shlex.split(words))


def samples() -> list[tuple[str, list[str], str]]:
    """(where, flags of generate, what it printed) of each block that begins "    $ ... generate"."""  # noqa: E501
    found, block = (
        [],
        re.compile(
            r"^    \$ \S+ (?:-m llama_tp\.)?generate (.+)\n((?: {4}.*\n|\n)+)", re.MULTILINE
        ),
    )
    for path in DOCS:
        for words, text in block.findall(path.read_text()):
            found.append(
                (str(path.relative_to(ROOT)), shlex.split(words), textwrap.dedent(text).strip())
            )
    return found


def test_sample_outputs_are_what_the_commands_print():
    """In fp32, where every machine writes the same. They differ in --max_gen_len alone, so that one
    job answers for all."""
    n_tokens = {}
    for where, words, text in samples():
        place = words.index("--max_gen_len")
        n_tokens[where, text] = int(words[place + 1])
        common = words[:place] + words[place + 2 :]
        assert (
            "float32" in common
            and "--echo" in common
            and common == samples()[0][1][:place] + samples()[0][1][place + 2 :]
        )
    assert {where for where, _ in n_tokens} == {"README.md", "checkpoints/README.md"}
    with torchrun(
        2,
        [
            "-m",
            "llama_tp.generate",
            *common,
            "--max_gen_len",
            str(max(n_tokens.values())),
            "--json",
        ],
    ) as job:
        assert job.wait() == 0, job.stderr
        line = json.loads(job.stdout)
    tokenizer = open_tokenizer(None, str(ROOT / "checkpoints/demo"))
    n_prompt = len(line["tokens"]) - max(n_tokens.values())
    for (where, text), n in n_tokens.items():
        assert tokenizer.decode(line["tokens"][: n_prompt + n]).strip() == text, where


def test_the_python_example_runs():
    section = (ROOT / "README.md").read_text().partition("\n## Python\n")[2]
    [example] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("length") + done.stdout.count("stop") >= 2


@pytest.mark.skipif(not shutil.which("curl"), reason="the tour shows curl")
def test_the_quick_tour_runs(tmp_path):
    """Every block of it, in its order, beside nothing but the demo model; only the server's port is
    another."""
    section = (
        (ROOT / "README.md").read_text().partition("\n## A quick tour\n")[2].partition("\n## ")[0]
    )
    blocks = re.findall(
        r"```python\n((?:(?!```)[^\n]*\n)*)```|((?:^ {4}[^\n]+\n)+)", section, re.MULTILINE
    )
    assert len(blocks) >= 7
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with serving("--nproc_per_node", "2") as server:
        for python, shell in blocks:
            for text in [python] if python else shell.splitlines():
                if "-m llama_tp.serve " in text:  # it runs already
                    continue
                text = text.strip().replace("http://127.0.0.1:8000", server.url)
                done = subprocess.run(
                    [sys.executable, "-c", text] if python else ["bash", "-c", text],
                    cwd=tmp_path,
                    env=env,
                    input="Who are you?\n/quit\n",
                    capture_output=True,
                    encoding="utf-8",
                    timeout=100,
                )
                assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
                assert len(done.stdout) > 10 or "printf" in text or " batch " in text, text
                assert '"error"' not in done.stdout, done.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
