"""Collectives through shared memory, for CPU ranks that are all on one host: a sum of a few KB in
microseconds where gloo's sockets take 200 and, on cores that fall asleep between steps, some
milliseconds (native/shared.cpp).

`SharedMemoryCommunicator` is one channel: its operations must be called in the same order on all
its ranks. `open_communicators` agrees with the other ranks whether there is one; where there is
none, collectives use gloo.
"""

import ctypes
import fcntl
import mmap
import os
import tempfile

import torch
import torch.distributed as dist

from llama_tp.native.calls import DTYPES, Place, SharedMemory
from llama_tp.native.library import MAX_RANKS, load
from llama_tp.parallel import private_folder

FOLDER, PREFIX = "/dev/shm", "llama_tp-ranks-"
FOREVER_S = 1e9


class SharedMemoryCommunicator:
    """One channel between tp ranks in a mapped file. Errors: RuntimeError when the others do not
    come in
    time; ValueError for a tensor that is not contiguous or not on CPU."""

    in_tree_order = True  # sums are those of collectives.tree_add

    def __init__(
        self,
        library: ctypes.CDLL,
        memory: mmap.mmap,
        offset: int,
        rank: int,
        tp: int,
        timeout_s: float,
    ):
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory, offset))
        self._memory, self._collectives, self.tp = memory, SharedMemory(library), tp
        self.place = Place(base, tp, rank, timeout_s)

    @property
    def late(self) -> str:
        """What to say when an operation was not in time."""
        return f"the other ranks did not come to a collective within {self.place.timeout_s:g} s"

    def sums(self, x: torch.Tensor) -> bool:
        """Whether `sum` can take x."""
        return x.dtype in DTYPES and x.is_contiguous()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sums x over the ranks in place: in fp32, as collectives.tree_add does, the same bits on
        every rank."""
        return self._in_time(self._collectives.sum(self.place, x), x)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x (contiguous) in rank order: (tp, *x.shape)."""
        out = x.new_empty((self.tp, *x.shape))
        return self._in_time(self._collectives.gather(self.place, x, out), out)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrites x (contiguous) with the driver's, which does not wait for the workers."""
        return self._in_time(self._collectives.broadcast(self.place, x), x)

    def _in_time(self, in_time: bool, result: torch.Tensor) -> torch.Tensor:
        if not in_time:
            raise RuntimeError(self.late)
        return result


def open_communicators(
    rank: int, tp: int, timeout_s: float, store: dist.Store, control: dist.ProcessGroup
) -> tuple[SharedMemoryCommunicator, SharedMemoryCommunicator] | None:
    """Every rank of one host calls it once. -> (the communicator for tensors, the communicator for
    control
    messages, whose waits do not run out), or None on all ranks if any of them cannot: not built, no
    /dev/shm, no space there."""
    memory = None
    # torchrun's store outlives a restart
    key = f"llama_tp/shared/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    library = load() if tp <= MAX_RANKS and os.environ.get("LLAMA_TP_SHARED") != "0" else None
    n_bytes = 2 * library.shared_bytes(tp) if library else 0
    if rank == 0:
        file, path = _create(n_bytes) if library else (None, "")
        store.set(key, path)
    else:
        path, file = store.get(key).decode(), None
    try:
        if path and library:
            file = os.open(path, os.O_RDWR) if file is None else file
            memory = mmap.mmap(file, n_bytes)
    except OSError:
        pass  # said below by None, and by whoever built the ranks
    if file is not None:
        os.close(file)
    all_have = torch.tensor([memory is not None], dtype=torch.int64)
    dist.all_reduce(all_have, dist.ReduceOp.MIN, group=control)
    if rank == 0 and path:
        os.unlink(path)  # all have it open, or will not use it: nothing is left behind
    if library is None or memory is None or not all_have.item():
        return None
    return (
        SharedMemoryCommunicator(library, memory, 0, rank, tp, timeout_s),
        SharedMemoryCommunicator(library, memory, n_bytes // 2, rank, tp, FOREVER_S),
    )


def _create(n_bytes: int) -> tuple[int | None, str]:
    """A file of zeros that only this user may open, its pages reserved: writing to a full /dev/shm
    would be a SIGBUS."""
    try:
        private_folder.sweep_files(FOLDER, PREFIX)
        file, path = tempfile.mkstemp(prefix=PREFIX, dir=FOLDER)
    except OSError:
        return None, ""
    try:
        # the mapping keeps it: a sweep elsewhere sees that it is needed
        fcntl.flock(file, fcntl.LOCK_EX)
        os.posix_fallocate(file, 0, n_bytes)
    except OSError:
        os.close(file)
        os.unlink(path)
        return None, ""
    return file, path
