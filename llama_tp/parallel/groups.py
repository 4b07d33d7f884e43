"""Who am I: this process's rank, its device, and the process groups it shares with the others.

Starts `torch.distributed` on the store of the launch (rendezvous), fills in fairscale's
model-parallel groups and hands everything on as one frozen `Ranks`, which callers pass along;
nothing here is kept in a global of ours. Refuses to know: what is computed (model), what is sent
(collectives) and whether the others are still alive (health).
"""

import contextlib
import ctypes
import functools
import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale_groups

from llama_tp.arch.errors import UserError
from llama_tp.parallel.one_shot import open_one_shot
from llama_tp.parallel.rendezvous import open_store, read_launch, roll_call, unconnected
from llama_tp.parallel.shared_memory import open_communicators

# Workers wait for the next step on the control group while a user thinks: that wait must never run
# out by itself.
CONTROL_TIMEOUT = timedelta(days=365)
CLOSE_TIMEOUT_S = 20
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class CollectiveCounters:
    """What this rank has done so far; health compares it between ranks to find the one that lags
    behind."""

    collectives: int = 0
    watches: int = 0


class Communicator(Protocol):
    """What does the collectives of a group where there is something faster than the group. All
    ranks must call the same operations in the same order.

    Attributes:
        in_tree_order: `sum` adds in the order of collectives.tree_add.
    """

    @property
    def in_tree_order(self) -> bool: ...

    def sums(self, x: torch.Tensor) -> bool:
        """Whether `sum` can take x."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sums x over the ranks, in place."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x (contiguous) in rank order: (tp, *x.shape)."""

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrites x (contiguous) with the driver's."""


@dataclass(frozen=True)
class Ranks:
    """This rank among its peers.

    Attributes:
        rank: 0 <= rank < tp; rank 0 is the driver, the others are workers.
        tp: how many ranks share the model.
        device: where this rank computes.
        group: the model group (nccl on CUDA, gloo on CPU); None with a single rank that was not
            launched.
        control: gloo group for CPU tensors that tell ranks what to do; waits in it practically
            never time out.
        local_rank, local_size: place and number of ranks on this node.
        n_nodes: how many nodes there are.
        master: host name or address of the driver, for sockets of our own.
        store: the key-value store of the launch, or None.
        communicator, control_communicator: shared memory that does the work of `group` and
            `control`, where the ranks have one; for sums over NVLink, `communicator` alone.
        counters: counts that change; the only mutable part.
    """

    rank: int
    tp: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    local_rank: int = 0
    local_size: int = 1
    n_nodes: int = 1
    master: str = "127.0.0.1"
    store: dist.Store | None = None
    communicator: Communicator | None = None
    control_communicator: Communicator | None = None
    counters: CollectiveCounters = field(default_factory=CollectiveCounters, compare=False)

    @property
    def is_driver(self) -> bool:
        return self.rank == 0


def init_ranks(
    device: str | torch.device | None = None,
    model_parallel_size: int | None = None,
    timeout_s: float = 600,
    start_timeout_s: float | None = None,
    store: dist.Store | None = None,
) -> Ranks:
    """Joins the other ranks of this launch; every rank calls it once, and `close` at the end.

    Args:
        device: "cpu", "cuda" or a torch device; None takes CUDA if there is any.
        model_parallel_size: what the caller expects; must be the number of ranks.
        timeout_s: longest wait for the others in each collective of the model group. Let it be
            longer than health's step timeout, so that health can name the culprit before the
            collective gives up.
        start_timeout_s: longest wait for the others to come, if it is another one.
        store: of this launch, if it is open already.

    Raises:
        UserError: wrong launch, no such device, or other ranks that do not come.
    """
    launch = read_launch(os.environ)
    world = launch.world if launch else 1
    if model_parallel_size not in (None, world):
        raise UserError(
            f"model_parallel_size is {model_parallel_size}",
            f"{world} rank(s) were started",
            f"start it with python -m llama_tp.launch --nproc_per_node {model_parallel_size}, or "
            "leave the size out",
        )
    if launch is None:
        return single_rank(pick_device(device, 0))
    where = pick_device(device, launch.local_rank)
    set_threads(launch.local_size)
    if where.type == "cpu":
        pin(launch.local_rank, launch.local_size)
    end_with_launcher()
    if launch.n_nodes == 1:
        listen_on_loopback()
    timeout = timedelta(seconds=timeout_s)
    start_timeout_s = start_timeout_s or timeout_s
    store = store or open_store(launch, start_timeout_s)
    roll_call(store, launch, start_timeout_s)
    store.set_timeout(timeout)
    try:
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=dist.PrefixStore("llama_tp", store),
            rank=launch.rank,
            world_size=launch.world,
            timeout=timeout,
        )
        # it announces itself on stdout
        with groups_get(timeout), contextlib.redirect_stdout(io.StringIO()):
            fairscale_groups.initialize_model_parallel(launch.world)
        control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    except RuntimeError as error:  # a rank that has died, or a stranger at gloo's port
        raise unconnected(launch, error) from error
    group = fairscale_groups.get_model_parallel_group()
    communicator: Communicator | None = None
    control_communicator: Communicator | None = None
    if where.type == "cpu" and launch.n_nodes == 1 < launch.world:
        both = open_communicators(launch.rank, launch.world, timeout_s, store, control)
        communicator, control_communicator = both or (None, None)
    if where.type == "cuda" and launch.n_nodes == 1 < launch.world:
        communicator = open_one_shot(group, control, launch.rank, launch.world, where)
    return Ranks(
        launch.rank,
        launch.world,
        where,
        group,
        control,
        launch.local_rank,
        launch.local_size,
        launch.n_nodes,
        launch.master,
        store,
        communicator,
        control_communicator,
    )


def single_rank(device: str | torch.device = "cpu") -> Ranks:
    """One rank by itself, without any process group: plain `python -m`, and tests."""
    return Ranks(0, 1, torch.device(device))


def close(ranks: Ranks) -> None:
    """Takes the groups down, in bounded time; safe to call twice, and with a single rank. Captured
    graphs must be gone: NCCL waits for them (pytorch #115388)."""
    if ranks.group is None or not dist.is_initialized():
        return
    fairscale_groups.destroy_model_parallel()

    def destroy() -> None:
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)  # what still runs uses the communicators
        dist.destroy_process_group()

    # Both wait for work that a vanished rank never joins; the process is about to end, so leave
    # them behind.
    worker = threading.Thread(target=destroy, daemon=True)
    worker.start()
    worker.join(CLOSE_TIMEOUT_S)


def pick_device(wanted: str | torch.device | None, local_rank: int) -> torch.device:
    """The device of this rank: `wanted`, with the local rank as index of a bare "cuda"; made
    current if CUDA."""
    device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    n_gpus = torch.cuda.device_count()
    index = local_rank if device.index is None else device.index
    if index >= n_gpus:
        raise UserError(
            f"local rank {local_rank} has no GPU",
            f"this node shows {n_gpus}",
            "start one rank a GPU (--nproc_per_node), or pass --device cpu",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def end_with_launcher() -> None:
    """Has Linux send SIGTERM when torchrun dies: it starts each rank in a session of its own and,
    killed, leaves them behind. Elsewhere health notices, once it watches."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def set_threads(local_size: int) -> None:
    """Divides the cores among the ranks of this node; without a launcher torch's own choice stays.

    torchrun sets OMP_NUM_THREADS=1 when the user has not (and `serve` does, or torchrun would warn
    of it), which then looks like the user's own wish: it is ignored, and LLAMA_TP_THREADS is the
    way to choose.
    """
    wanted = os.environ.get("LLAMA_TP_THREADS", "")
    if wanted and not (wanted.isdigit() and int(wanted) > 0):
        raise UserError(
            "LLAMA_TP_THREADS is not a number of threads",
            repr(wanted),
            "set it to 1 or more, or unset it",
        )
    if wanted:
        torch.set_num_threads(int(wanted))
    elif local_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        # Slurm binds each task to its own CPUs if it was asked for some: then what we may use is
        # ours alone.
        alone = "SLURM_CPUS_PER_TASK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
        torch.set_num_threads(max(1, usable_cores() // (1 if alone else local_size)))


def pin(local_rank: int, local_size: int) -> None:
    """Gives each rank of this node CPUs of its own, where there are enough; LLAMA_TP_PIN=0 leaves
    them to the kernel.

    Linux moves processes that wake each other through a socket onto one core: two ranks on two
    cores took 5.0 s for a prompt of 128 and 21 new tokens of the 1B shape without this, and 3.4 s
    with it.
    """
    if (
        os.environ.get("LLAMA_TP_PIN") == "0"
        or "SLURM_CPUS_PER_TASK" in os.environ
        or not hasattr(os, "sched_setaffinity")
    ):
        return
    cpus = sorted(os.sched_getaffinity(0))
    share = len(cpus) // local_size
    if share and local_size > 1:
        os.sched_setaffinity(0, cpus[local_rank * share : (local_rank + 1) * share])


def usable_cores() -> int:
    """Physical cores that this process may use: its CPU affinity, hyperthreads counted once, and
    the cgroup's quota."""
    cpus = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else cpu)
    limit = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2 in a container: "200000 100000" or "max ..."
    quota = limit.read_text().split() if limit.exists() else ["max"]
    return (
        len(cores) if quota[0] == "max" else max(1, min(len(cores), int(quota[0]) // int(quota[1])))
    )


def listen_on_loopback() -> None:
    """Keeps the unauthenticated sockets of gloo and NCCL on the loopback interface when all ranks
    are on this machine."""
    names = [name for _, name in socket.if_nameindex()]
    for name in ("lo", "lo0"):
        if name in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            # without =, a name is only its beginning
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


@contextlib.contextmanager
def groups_get(timeout: timedelta) -> Iterator[None]:
    """Gives groups made inside the block our timeout: fairscale 0.4.13 asks for none and would get
    torch's 30 min."""
    new_group = dist.new_group
    dist.new_group = functools.partial(new_group, timeout=timeout)
    try:
        yield
    finally:
        dist.new_group = new_group
