"""The launch scripts and the launcher: the right number of ranks, every word passed on, failures in
one line."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_tp import launch
from tests.listeners import beyond_loopback, listeners, tree
from tests.test_chat import Terminal

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch"))


@pytest.fixture
def single_node(tmp_path):
    """Runs single_node.sh in a bare environment whose nvidia-smi and nproc give the wanted
    answers."""

    def run(*words, gpus=0, cores=4, **env):
        stubs = {
            "nvidia-smi": "\n".join(f"echo 'GPU {i}: a GPU'" for i in range(gpus)) or "exit 9",
            "nproc": f"echo {cores}",
            "python3": '[ "$1" = -c ] || printf "<%s>" "$LLAMA_TP_THREADS" "$@"',
        }
        for name, body in stubs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        return subprocess.run(
            [LAUNCH / "single_node.sh", *words],
            capture_output=True,
            text=True,
            timeout=20,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **env},
        )

    return run


def ranks_and_threads(done):
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[2:5] == ["python3", "-m", "llama_tp.launch"]
    return int(words[words.index("--nproc_per_node") + 1]), int(
        words[0].removeprefix("LLAMA_TP_THREADS=")
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_shell(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", script], check=True, timeout=60, cwd=LAUNCH.parent)


@pytest.mark.parametrize(
    "gpus, env, ranks",
    [
        (8, {}, 8),
        (1, {}, 1),
        (8, {"NPROC": "4"}, 4),
        (8, {"CUDA_VISIBLE_DEVICES": "0,3"}, 2),
        (8, {"CUDA_VISIBLE_DEVICES": "GPU-8f"}, 1),
        (0, {"NPROC": "3"}, 3),
    ],
)
def test_one_rank_a_gpu(single_node, gpus, env, ranks):
    assert ranks_and_threads(single_node("--dry-run", "generate", gpus=gpus, **env))[0] == ranks


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_do_not_count(single_node, hidden):
    assert (
        ranks_and_threads(
            single_node("--dry-run", "generate", gpus=8, cores=2, CUDA_VISIBLE_DEVICES=hidden)
        )[0]
        <= 2
    )


def test_cpu_ranks_and_threads_fit_the_cores(single_node):
    for cores in (1, 2, 6, 64):
        ranks, threads = ranks_and_threads(single_node("--dry-run", "generate", cores=cores))
        assert ranks in (1, 2, 4, 8) and ranks * threads <= cores
    assert ranks_and_threads(single_node("--dry-run", "generate", cores=2, NPROC="8")) == (8, 1)


def test_threads_can_be_chosen(single_node):
    done = single_node("--dry-run", "generate", LLAMA_TP_THREADS="3")
    assert done.stdout.startswith("LLAMA_TP_THREADS=3 OMP_NUM_THREADS=3 python3")


def test_every_word_is_passed_on(single_node):
    words = ["--prompt", "two words, 'quotes' and $HOME", "--stop", "", "--echo"]
    done = single_node("generate", *words, NPROC="2", LLAMA_TP_THREADS="1")
    line = ["1", "-m", "llama_tp.launch", "--nproc_per_node", "2", "generate", *words]
    assert (done.returncode, done.stdout) == (0, "".join(f"<{word}>" for word in line))


@pytest.mark.parametrize(
    "words, env, said",
    [
        ([], {}, "usage:"),
        (["--ckpt_dir", "D"], {}, "usage:"),
        (["generate"], {"NPROC": "many"}, "NPROC is not a number"),
    ],
)
def test_a_wrong_call_is_refused(single_node, words, env, said):
    done = single_node(*words, **env)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""


def test_make_starts_ranks_the_safe_way():
    """What is written there, without running it."""
    for target, words in [
        ("demo", ["launch/single_node.sh generate", "--echo"]),
        ("chat", ["launch/chat.sh --ckpt_dir"]),
        ("bench", ["-m llama_tp.launch --nproc_per_node $n bench"]),
    ]:
        done = subprocess.run(
            ["make", "-n", target], cwd=LAUNCH.parent, capture_output=True, text=True, timeout=20
        )
        assert done.returncode == 0 and all(each in done.stdout for each in words)
        assert "torchrun" not in done.stdout and "2>/dev/null" not in done.stdout


# The launcher itself.


def launched(*words, **more):
    return subprocess.run(
        [sys.executable, "-m", "llama_tp.launch", *words],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        timeout=100,
        **more,
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["genrate", "--ckpt_dir", "D"],
            "'genrate' is no command for ranks - these are: generate, batch, bench, serve",
        ),
        (["chat"], "python -m llama_tp.chat"),
        ([], "COMMAND"),
        (["--nproc_per_node", "0", "generate"], "--nproc_per_node is out of range - found 0"),
        (["--nproc_per_node", "two", "generate"], "invalid int value: 'two'"),
        (["--standalone", "generate"], "--standalone"),
        (["--nnodes", "2", "generate"], "--master_addr is not given"),
        (
            ["--nnodes", "2", "--node_rank", "2", "generate"],
            "--node_rank is out of range - found 2 of 2",
        ),
    ],
)
def test_a_launch_that_cannot_be_is_one_line(words, said):
    done = launched(*words)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and said in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_the_launcher_knows_every_command():
    commands = {
        path.stem
        for path in (LAUNCH.parent / "llama_tp").glob("*.py")
        if "\n    run(main)" in path.read_text()
    }
    assert {*launch.RANKS, "serve", "chat"} == commands


def test_serve_is_started_without_ranks():
    """It starts them itself, as many as it is told, or as the launcher is."""
    for words, n in (["serve"], 3), (["serve", "--nproc_per_node", "5"], 5):
        done = launched("--nproc_per_node", "3", *words, "--ckpt_dir", "checkpoints/demo")
        assert done.returncode == 1 and f"{n} ranks" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "script, code, said",
    [
        ("raise SystemExit(7 * int(rank))", 7, ""),
        (
            "int(rank) and os.kill(os.getpid(), 9) or time.sleep(60)",
            1,
            "error: rank 1 (pid {pid}) was ended by SIGKILL - often the",
        ),
        ("int(rank) and int('a bug') or time.sleep(60)", 1, "Traceback (most recent call last)"),
    ],
)
def test_a_rank_that_fails_is_told_of_once_and_not_in_35_lines(script, code, said, tmp_path):
    file = tmp_path / "rank.py"
    file.write_text(
        "import os, time\nrank = os.environ['RANK']\nif rank == '1':\n    print(os.getpid(), "
        f"flush=True)\n{script}\n"
    )
    done = launched("--nproc_per_node", "2", str(file), env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == code
    assert said.format(pid=done.stdout.strip()) in done.stderr and done.stderr.count("\n") <= 6
    assert "torch" not in done.stderr and list(tmp_path.iterdir()) == [file]


# Server and client together, as `make chat` starts them.


def chatting(*words):
    """A terminal in which launch/chat.sh runs, with this Python first on its path."""
    start = (
        "import os, sys; os.environ['PATH'] = os.path.dirname(sys.executable) + ':' + "
        "os.environ['PATH']; "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    return Terminal("-c", start, str(LAUNCH / "chat.sh"), *words)


def test_ctrl_c_stops_the_answer_and_not_the_server():
    terminal = chatting(
        "--ckpt_dir",
        "checkpoints/demo",
        "--device",
        "cpu",
        "--",
        "--history_file",
        "",
        "--temperature",
        "0.9",
    )
    try:
        # the screen is not blank for the seconds that it takes
        terminal.expect("loading its model", within_s=20)
        terminal.expect("demo at http://127.0.0.1:")
        port = int(re.match(r"\d+", terminal.said)[0])
        terminal.expect(">")
        terminal.send("tell me a long story\r")
        time.sleep(0.3)
        terminal.send("\x03")
        terminal.expect(">")
        terminal.send("/set max_tokens 5\r")
        terminal.send("and again\r")
        terminal.expect("\n")
        terminal.send("/stats\r")
        terminal.expect("answers")
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            pass
        found = listeners(tree(terminal.process.pid))
        assert port in {each[2] for each in found} and not beyond_loopback(found)
        terminal.send("/quit\r")
        terminal.process.wait(40)
        with pytest.raises(OSError):  # it has ended with its client
            socket.create_connection(("127.0.0.1", port), timeout=10)
    finally:
        terminal.process.terminate()
        terminal.process.wait(40)


def test_a_server_that_cannot_start_is_one_line_and_no_wait():
    done = subprocess.run(
        [LAUNCH / "chat.sh", "--ckpt_dir", "checkpoints/none"],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    lines = done.stderr.splitlines()
    assert (
        done.returncode == 1
        and len(lines) == 2
        and lines[1].startswith("error: --ckpt_dir checkpoints/none is no folder")
    )
