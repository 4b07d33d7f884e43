"""The store of a launch: who can read it, where it listens, and what is said when ranks do not
come."""

import os
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from llama_tp.arch.errors import UserError
from llama_tp.parallel import rendezvous
from llama_tp.parallel.groups import listen_on_loopback
from llama_tp.parallel.json_lines import listen
from llama_tp.parallel.private_folder import PrivateFolder
from llama_tp.parallel.rendezvous import Launch, given_folder, open_store, roll_call, tcp_store
from tests.listeners import listeners
from tests.ranks import free_port

ONE = Launch(0, 2, 0, 2, 1, "127.0.0.1", 0)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No launcher."""
    for name in (
        "LLAMA_TP_FOLDER",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RESTART_COUNT",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def agent(monkeypatch):
    """torchrun's store of a static rendezvous, as ranks find it; -> (store, launch of rank 0)."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("none/torchelastic/role_info/0", "{}")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    return store, replace(ONE, port=store.port)


def test_the_launchers_folder_holds_the_store(monkeypatch, tmp_path):
    with PrivateFolder() as folder:
        monkeypatch.setenv("LLAMA_TP_FOLDER", folder.path)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", os.path.basename(folder.path))
        before = listeners([os.getpid()])
        first, second = open_store(ONE, 5), open_store(replace(ONE, rank=1), 5)
        first.set("a", "b")
        assert second.get("a") == b"b" and listeners([os.getpid()]) == before
        # what the ranks before have left there is not read
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert not open_store(ONE, 5).check(["a"])
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of a torchrun inside a rank")
        assert given_folder() is None


def test_a_launcher_that_has_been_killed_is_noticed(monkeypatch):
    with PrivateFolder() as folder:
        monkeypatch.setenv("LLAMA_TP_FOLDER", folder.path)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", os.path.basename(folder.path))
        os.close(folder._lock)
        folder._lock = None
        with pytest.raises(UserError, match="what started rank 0 has been killed"):
            open_store(ONE, 5)


def test_torchruns_store_is_told_the_way_and_nothing_else(agent, capfd):
    store, launch = agent
    first, second = open_store(launch, 5), open_store(replace(launch, rank=1), 5)
    first.set("secret", "x")
    assert second.get("secret") == b"x" and not store.check(["secret"]) and store.num_keys() == 2
    assert store.get("llama_tp/folder0").startswith(b"/") and capfd.readouterr().err == ""


@pytest.mark.parametrize("told", ["/", "/tmp", "relative", "\0", "/proc/self/root"])
def test_a_way_that_somebody_else_tells_is_refused(told, agent):
    store, launch = agent
    store.set("llama_tp/folder0", told)
    with pytest.raises(UserError, match="no private folder of this user"):
        open_store(replace(launch, rank=1), 5)


def test_a_torchrun_that_unpickles_is_warned_of_once(agent, capfd):
    store, launch = agent
    store.delete_key("none/torchelastic/role_info/0")
    open_store(launch, 5), open_store(replace(launch, rank=1), 5)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "python -m llama_tp.launch --nproc_per_node 2" in said


def test_between_machines_the_store_listens_at_the_masters_address_alone():
    launch = replace(ONE, n_nodes=2, port=free_port())
    before = listeners([os.getpid()])
    first = tcp_store(launch, "127.0.0.1", launch.port, timedelta(seconds=5))
    assert {each[1:] for each in listeners([os.getpid()]) - before} == {("127.0.0.1", launch.port)}
    second = tcp_store(replace(launch, rank=1), "127.0.0.1", launch.port, timedelta(seconds=5))
    first.set("a", "b")
    assert second.get("a") == b"b"


def test_a_port_that_is_taken_and_a_master_that_is_not_there():
    with listen("127.0.0.1", 1) as sock:
        launch = replace(ONE, port=sock.getsockname()[1])
        with pytest.raises(
            UserError,
            match=f"listen at 127.0.0.1:{launch.port} - .*in use.* - choose another --master_port",
        ):
            open_store(launch, 5)
    with pytest.raises(UserError, match="rank 1 does not reach the launch's store at 127.0.0.1"):
        open_store(replace(launch, rank=1, port=free_port()), 1)


def test_ranks_that_have_not_come_are_named(tmp_path, monkeypatch):
    store, waits = dist.FileStore(str(tmp_path / "store")), []
    monkeypatch.setattr(rendezvous.time, "sleep", waits.append)
    with pytest.raises(UserError, match="ranks 1, 2 have not come within 0.2 s.*--load_timeout"):
        roll_call(store, replace(ONE, world=3), 0.2)
    with pytest.raises(UserError, match="rank 1 has not come"):
        roll_call(store, replace(ONE, rank=2, world=3), 0.2)
    assert waits[0] < waits[1]  # one after the other, so that one is heard
    started = time.monotonic()
    roll_call(store, replace(ONE, rank=1, world=3), 30)
    assert time.monotonic() - started < 20


def test_gloo_and_nccl_stay_on_the_loopback(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    listen_on_loopback()
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=" + os.environ["GLOO_SOCKET_IFNAME"]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")  # a wish of the user's stands
    listen_on_loopback()
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth0"
