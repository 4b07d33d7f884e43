"""Who listens where: on one machine nothing of ours beyond the loopback but the API, and strangers'
words change nothing."""

import base64
import os
import pickle
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.listeners import Boom, Lookout, beyond_loopback, garbage, listeners, throw, tree
from tests.ranks import ROOT, command, free_port, torchrun
from tests.servers import serving

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
DEMO = str(ROOT / "checkpoints" / "demo")
GENERATE = [
    "-m",
    "llama_tp.generate",
    "--ckpt_dir",
    DEMO,
    "--prompt",
    "ROMEO:",
    "--temperature",
    "0",
    "--device",
    "cpu",
    "--ignore_eos",
    "--max_seq_len",
    "400",
]
RANK = """import time
from llama_tp.parallel.groups import init_ranks
from llama_tp.parallel.health import Watch
ranks = init_ranks("cpu", timeout_s=60)
Watch(ranks)
print("running", flush=True)
time.sleep(600)
"""


@pytest.fixture
def waiting(tmp_path) -> list[str]:
    """A script whose ranks have all that ours have, and wait."""
    (tmp_path / "rank.py").write_text(RANK)
    return [str(tmp_path / "rank.py")]


def test_a_server_listens_at_its_api_and_on_the_loopback_and_garbage_changes_nothing(tmp_path):
    with (
        serving("--nproc_per_node", "2", "--host", "0.0.0.0", ready=False) as server,
        Lookout(server.process.pid) as lookout,
    ):
        server.wait_listening()
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        server.wait_ready()
        body = {"prompt": "ROMEO:", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
        calm, ranks = server.post("/v1/completions", body)[1]["choices"], server.ranks()
        api = int(server.url.rpartition(":")[2])
        assert {(pid, port) for pid, _, port in beyond_loopback(lookout.found)} == {
            (server.process.pid, api)
        }
        inside = {each for each in listeners(tree(server.process.pid)) if each[2] != api}
        # gloo's and health's; none is torchrun's
        assert {pid for pid, _, _ in inside} == set(ranks)
        for _, address, port in inside:
            throw(garbage(tmp_path / "proof"), address, port)
        assert (
            server.post("/v1/completions", body)[1]["choices"] == calm and server.ranks() == ranks
        )
        assert "starting them again" not in server.stderr and not (tmp_path / "proof").exists()


def test_ranks_of_a_command_listen_on_the_loopback_and_garbage_at_any_time_changes_nothing(
    tmp_path,
):
    """Garbage from the first listener on, while the ranks still look for each other. One rank alone
    writes the same text."""
    thrown, proof = set(), tmp_path / "proof"
    alone = command("generate", *GENERATE[2:], code=0)
    with torchrun(2, GENERATE) as job:
        while job.process.poll() is None:
            found = listeners(tree(job.process.pid))
            assert not beyond_loopback(found) and job.process.pid not in {
                pid for pid, _, _ in found
            }
            for each in found - thrown:
                throw(garbage(proof), *each[1:])
            thrown |= found
            time.sleep(0.02)
        assert thrown and not proof.exists()
        if job.process.returncode == 0:
            assert job.stdout == alone.stdout and len(job.stdout) > 500
        else:
            assert (
                len([line for line in job.stderr.splitlines() if line.startswith("error: ")]) == 1
            ), job.stderr


def test_of_a_static_torchrun_only_its_own_store_is_open_and_holds_nothing_of_ours(waiting):
    """It unpickles nothing, so no warning is said."""
    port = free_port()
    with torchrun(
        2, waiting, options=["--master_port", str(port)], module="torch.distributed.run"
    ) as job:
        job.wait_for("running", where="stdout")
        assert {
            (pid, port) for pid, _, port in beyond_loopback(listeners(tree(job.process.pid)))
        } == {(job.process.pid, port)}
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        ours = {
            key: store.get(key).decode() for key in store.list_keys() if "torchelastic" not in key
        }
        assert list(ours) == ["/llama_tp/folder0"] or list(ours) == ["llama_tp/folder0"]
        [folder] = ours.values()
        assert os.stat(folder).st_mode & 0o777 == 0o700 and os.path.exists(f"{folder}/ranks0")
        assert "warning" not in job.stderr
        job.process.send_signal(signal.SIGTERM)
        job.wait(30)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            [],
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(TORCH < (2, 13), reason="a static rendezvous in older torch"),
            ],
        ),
        pytest.param(["--standalone"], marks=pytest.mark.slow),
    ],
    ids=["bare", "standalone"],
)
def test_torchrun_runs_what_strangers_send_and_is_warned_of(options, waiting, tmp_path):
    """The hole that `llama_tp.launch` does not have: torch's agent unpickles what anybody writes
    into its store."""
    with torchrun(2, waiting, options=options, module="torch.distributed.run") as job:
        job.wait_for("running", where="stdout")
        warnings = [line for line in job.stderr.splitlines() if "warning: " in line]
        assert len(warnings) == 1 and "python -m llama_tp.launch --nproc_per_node 2" in warnings[0]
        for _, _, port in listeners([job.process.pid]):
            store = dist.TCPStore("127.0.0.1", port, is_master=False)
            for key in store.list_keys():
                if re.search(r"torch\.rendezvous\.[\w-]+$", key):
                    store.set(
                        key.removeprefix("/"),
                        base64.b64encode(pickle.dumps(Boom(tmp_path / "proof"))).decode(),
                    )
        deadline = time.monotonic() + 30
        while not (tmp_path / "proof").exists():
            assert time.monotonic() < deadline, "torch has closed the hole: the warning can go"
            time.sleep(0.1)
