"""Where ranks first find each other: the launcher's environment, and the key-value store that
follows from it.

The store holds gloo's addresses, NCCL's id and health's secret. On one machine it is a file in a
private folder, which nobody else reads: of `llama_tp.launch`, or of rank 0, and then the folder's
path is all that goes into torchrun's own store, which is open to the network. Without torchrun it
is a TCP store at the loopback, and between machines one that listens at the master's address alone.
Refuses to know what ranks tell each other.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from llama_tp.arch.errors import UserError
from llama_tp.parallel import private_folder
from llama_tp.parallel.json_lines import listen

AGENT_TIMEOUT_S = 30
# ranks that miss others speak one after the other: the first word ends the job, so there is one
TURN_S = 0.5


@dataclass(frozen=True)
class Launch:
    """What the launcher's environment says; no torch in it, so that it can be tested with a
    dict."""

    rank: int
    world: int
    local_rank: int
    local_size: int
    n_nodes: int
    master: str
    port: int


def read_launch(env: Mapping[str, str]) -> Launch | None:
    """Reads torchrun's variables, else Slurm's; None if this is a plain process (one rank).

    Raises:
        UserError: if a variable is missing, or not a number.
    """

    def number(name: str, default: int | None = None) -> int:
        text = env.get(name, "" if default is None else str(default))
        if not text.isdigit():
            raise UserError(
                f"the launcher's environment variable {name} is not a number",
                repr(text) if text else "it is not set",
                "start the ranks with llama_tp.launch, torchrun or srun, or plain python for one "
                "rank",
            )
        return int(text)

    if "RANK" in env:
        world = number("WORLD_SIZE")
        local_size = number("LOCAL_WORLD_SIZE", world)
        if "MASTER_ADDR" not in env:
            raise UserError(
                "RANK is set but MASTER_ADDR is not",
                "",
                "start the ranks with llama_tp.launch, or unset RANK",
            )
        return Launch(
            number("RANK"),
            world,
            number("LOCAL_RANK", number("RANK") % local_size),
            local_size,
            -(-world // local_size),
            env["MASTER_ADDR"],
            number("MASTER_PORT"),
        )
    if "SLURM_PROCID" in env and number("SLURM_NTASKS", 1) > 1:
        world = number("SLURM_NTASKS")
        n_nodes = number("SLURM_STEP_NUM_NODES", number("SLURM_NNODES", 1))
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        # Any port will do as long as all tasks of the step agree and two jobs on a node differ.
        port = number("MASTER_PORT", 20000 + number("SLURM_JOB_ID", 0) % 20000)
        return Launch(
            number("SLURM_PROCID"),
            world,
            number("SLURM_LOCALID"),
            -(-world // n_nodes),
            n_nodes,
            env.get("MASTER_ADDR", first_host(nodes)),
            port,
        )
    return None


def first_host(nodes: str) -> str:
    """The first name in Slurm's short form: "gpu[003-010,12],cpu1" -> "gpu003"."""
    first = re.findall(r"^[^,\[]*(?:\[[^]]*\])?[^,]*", nodes)[0]  # may be empty, but it matches
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first)


def open_store(launch: Launch, timeout_s: float) -> dist.Store:
    """The store of this launch; every rank opens it once.

    Raises:
        UserError: the launcher is out of reach, or rank 0 has not come within `timeout_s`.
    """
    timeout, folder = timedelta(seconds=timeout_s), given_folder()
    agent: dist.Store | None = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        agent = agent_store(launch, timeout)
        if launch.rank == 0 and runs_code(agent):
            safe = (
                "give torchrun --master_addr and --master_port in place of --rdzv_backend"
                if launch.n_nodes > 1
                else "start the ranks with python -m llama_tp.launch --nproc_per_node "
                f"{launch.world}"
            )
            print(
                "warning: torchrun listens on all interfaces, and runs the code that anyone sends "
                "it -",
                safe,
                file=sys.stderr,
            )
    if folder is None and agent is not None and launch.n_nodes == 1:
        folder = told_folder(launch, agent, timeout)
    if launch.n_nodes > 1 or folder is None:
        host = launch.master if launch.n_nodes > 1 else "127.0.0.1"
        # torchrun has the port itself
        store = tcp_store(launch, host, launch.port + (agent is not None), timeout)
    else:
        private_folder.check(folder)
        if not private_folder.is_held(folder):
            raise UserError(
                f"what started rank {launch.rank} has been killed", folder, "start it again"
            )
        store = dist.FileStore(os.path.join(folder, f"ranks{restart()}"))
    store.set_timeout(timeout)
    return store


def agent_store(launch: Launch, timeout: timedelta) -> dist.Store:
    """The store that torchrun has at the master's port. It is open to the network: nothing of ours
    may go into it."""
    try:
        # It is there before its ranks are. If torchrun has been killed meanwhile, torch would go on
        # knocking until the timeout; a refused connection says so at once.
        socket.create_connection((launch.master, launch.port), timeout=AGENT_TIMEOUT_S).close()
        return dist.TCPStore(launch.master, launch.port, is_master=False, timeout=timeout)
    except (OSError, RuntimeError) as error:
        raise unreachable(launch, launch.master, launch.port, error) from error


def runs_code(agent: dist.Store) -> bool:
    """Whether torchrun meets its other agents in a TCP store: it unpickles what it finds there. In
    a static rendezvous (--master_port, or an older torch) the one store is for both, and the agent
    has put its plain numbers into it."""
    return not agent.check([f"{os.environ['TORCHELASTIC_RUN_ID']}/torchelastic/role_info/0"])


def given_folder() -> str | None:
    """The folder of `llama_tp.launch`, if that has started us: a torchrun inside a rank of ours
    inherits the variable as well."""
    path = os.environ.get("LLAMA_TP_FOLDER", "")
    return (
        path if path and os.environ.get("TORCHELASTIC_RUN_ID") == os.path.basename(path) else None
    )


def told_folder(launch: Launch, agent: dist.Store, timeout: timedelta) -> str:
    """The path of a private folder that rank 0 makes, which goes with its process, and tells in
    torchrun's store, whose answers may take `timeout`."""
    key = f"llama_tp/folder{restart()}"
    if launch.rank == 0:
        agent.set(key, private_folder.PrivateFolder().path)
    try:
        return str(agent.get(key), errors="replace")
    except RuntimeError as error:
        raise absent([0], launch, timeout) from error


def tcp_store(launch: Launch, host: str, port: int, timeout: timedelta) -> dist.Store:
    """A TCP store of our own, in rank 0, that listens at `host` alone."""
    if launch.rank == 0:
        try:
            file = listen(host, launch.n_nodes, port).detach()
        except OSError as error:
            raise UserError(
                f"rank 0 cannot listen at {host}:{port}", str(error), "choose another --master_port"
            ) from error
        return dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=file,
        )
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timeout)
    except RuntimeError as error:
        raise unreachable(launch, host, port, error) from error


def roll_call(store: dist.Store, launch: Launch, timeout_s: float) -> None:
    """Waits until every rank has called this. Raises UserError that names those who have not in
    time."""
    keys = [f"llama_tp/here/{rank}" for rank in range(launch.world)]
    store.set(keys[launch.rank], "")
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if missing:  # or the last has come at this very moment
            raise absent(missing, launch, timedelta(seconds=timeout_s)) from error


def absent(missing: list[int], launch: Launch, timeout: timedelta) -> UserError:
    """What to say of ranks that have not come; returns when it is this rank's turn to say it."""
    time.sleep(TURN_S * launch.rank)
    named = (
        f"rank {missing[0]} has"
        if len(missing) == 1
        else f"ranks {', '.join(map(str, missing))} have"
    )
    return UserError(
        f"{named} not come within {timeout.total_seconds():g} s",
        "stopped, or still starting, or out of reach",
        "end that process and start again; --load_timeout sets how long to wait",
    )


def unconnected(launch: Launch, error: Exception) -> UserError:
    """What to say where ranks that have found each other cannot connect; returns when it is this
    rank's turn to say it."""
    time.sleep(TURN_S * launch.rank)
    return UserError(
        f"rank {launch.rank} cannot connect to the others",
        str(error).split("\n")[0][:200],
        "another rank has ended, or a stranger has disturbed them: start again",
    )


def unreachable(launch: Launch, host: str, port: int, error: Exception) -> UserError:
    """What to say where a store does not answer; torch's messages go on with a trace of its C++."""
    return UserError(
        f"rank {launch.rank} does not reach the launch's store at {host}:{port}",
        str(error).split("\n")[0],
        "check that torchrun and rank 0 still run, and that every node can reach that address",
    )


def restart() -> str:
    """Torchrun's number of this start: its store outlives a restart of the ranks."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
