"""The launch scripts: valid shell, the right number of ranks, every word passed on."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.suffix in (".sh", ".sbatch"))


@pytest.fixture
def single_node(tmp_path):
    """Runs single_node.sh in a bare environment whose nvidia-smi and nproc give the wanted answers."""
    def run(*words, gpus=0, cores=4, **env):
        stubs = {"nvidia-smi": "\n".join(f"echo 'GPU {i}: a GPU'" for i in range(gpus)) or "exit 9",
                 "nproc": f"echo {cores}", "torchrun": 'printf "<%s>" "$LLAMA_TP_THREADS" "$@"'}
        for name, body in stubs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        return subprocess.run([LAUNCH / "single_node.sh", *words], capture_output=True, text=True, timeout=20,
                              env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **env})
    return run


def ranks_and_threads(done):
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:4] == [words[0], words[1], "torchrun", "--standalone"]
    return int(words[words.index("--nproc_per_node") + 1]), int(words[0].removeprefix("LLAMA_TP_THREADS="))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_shell(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", script], check=True, timeout=60, cwd=LAUNCH.parent)


@pytest.mark.parametrize("gpus, env, ranks", [
    (8, {}, 8), (1, {}, 1), (8, {"NPROC": "4"}, 4), (8, {"CUDA_VISIBLE_DEVICES": "0,3"}, 2),
    (8, {"CUDA_VISIBLE_DEVICES": "GPU-8f"}, 1), (0, {"NPROC": "3"}, 3),
])
def test_one_rank_a_gpu(single_node, gpus, env, ranks):
    assert ranks_and_threads(single_node("--dry-run", "generate", gpus=gpus, **env))[0] == ranks


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_do_not_count(single_node, hidden):
    assert ranks_and_threads(single_node("--dry-run", "generate", gpus=8, cores=2, CUDA_VISIBLE_DEVICES=hidden))[0] <= 2


def test_cpu_ranks_and_threads_fit_the_cores(single_node):
    for cores in (1, 2, 6, 64):
        ranks, threads = ranks_and_threads(single_node("--dry-run", "generate", cores=cores))
        assert ranks in (1, 2, 4, 8) and ranks * threads <= cores
    assert ranks_and_threads(single_node("--dry-run", "generate", cores=2, NPROC="8")) == (8, 1)


def test_threads_can_be_chosen(single_node):
    done = single_node("--dry-run", "generate", LLAMA_TP_THREADS="3")
    assert done.stdout.startswith("LLAMA_TP_THREADS=3 OMP_NUM_THREADS=3 torchrun")


def test_every_word_is_passed_on(single_node):
    words = ["--prompt", "two words, 'quotes' and $HOME", "--stop", "", "--echo"]
    done = single_node("generate", *words, NPROC="2", LLAMA_TP_THREADS="1")
    line = ["1", "--standalone", "--nproc_per_node", "2", "-m", "llama_tp.generate", *words]
    assert (done.returncode, done.stdout) == (0, "".join(f"<{word}>" for word in line))


@pytest.mark.parametrize("words, env, said", [
    ([], {}, "usage:"), (["--ckpt_dir", "D"], {}, "usage:"), (["generate"], {"NPROC": "many"}, "NPROC is not a number"),
])
def test_a_wrong_call_is_refused(single_node, words, env, said):
    done = single_node(*words, **env)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""
