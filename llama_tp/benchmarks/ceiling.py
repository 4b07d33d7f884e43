"""What this machine could do at best for this model: measured bandwidth and matrix rate, hence the
floor of a step.

Decoding reads every weight once a step, and the KV cache of every sequence once; prefill multiplies
every weight with every token. A step can be no faster than the slower of its reading and its
arithmetic (the roofline, Williams et al. 2009). All ranks measure at the same time, as they will
work.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from llama_tp.arch.memory import kv_bytes_per_token, weight_bytes
from llama_tp.arch.shard_map import Shard
from llama_tp.backends.select import select_linears
from llama_tp.native.calls import read_all
from llama_tp.native.library import load
from llama_tp.parallel.collectives import barrier, gather_ints
from llama_tp.parallel.groups import Ranks

REPEATS = 7
PART_BYTES = 1 << 30  # read by one kernel: torch addresses no more than 2 GiB with 32 bits


@dataclass(frozen=True)
class Ceiling:
    """Of one rank, the slowest: bytes/s it reads, FLOP/s it multiplies; bytes and FLOPs that a
    token needs there."""

    read_bytes_per_s: float
    flops_per_s: float
    weight_bytes_per_step: int
    kv_bytes_per_position: int
    flops_per_token: int
    head_flops: int  # of these, the head's, which a prompt needs at its end only
    tp: int

    def decode_s(self, batch: int, context: int) -> float:
        """The floor of a decode step of `batch` sequences with `context` positions each."""
        n_bytes = self.weight_bytes_per_step + batch * context * self.kv_bytes_per_position
        return max(n_bytes / self.read_bytes_per_s, batch * self.flops_per_token / self.flops_per_s)

    def prefill_s(self, n_tokens: int) -> float:
        """The floor of computing n_tokens of prompts at once (attention's products left out)."""
        n_flops = n_tokens * (self.flops_per_token - self.head_flops)
        return max(self.weight_bytes_per_step / self.read_bytes_per_s, n_flops / self.flops_per_s)

    def card(self) -> str:
        """The lines that a benchmark begins with."""
        prefill = self.flops_per_s / (self.flops_per_token - self.head_flops)
        return "\n".join(
            [
                f"ceiling of each of {self.tp} rank(s): reads {self.read_bytes_per_s / 1e9:.1f} "
                "GB/s, multiplies "
                f"{self.flops_per_s / 1e12:.2f} TFLOP/s (both measured now)",
                f"a step reads {self.weight_bytes_per_step / 1e9:.3f} GB of weights there, a token "
                "takes "
                f"{self.flops_per_token / 1e9:.3f} GFLOP: decode is at most "
                f"{1 / self.decode_s(1, 0):.1f} tok/s a sequence, "
                f"prefill {prefill:.0f} tok/s",
            ]
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Probe(Protocol):
    """What differs between machines that are measured: how much it takes to see their memory and
    their multipliers, and how the time of their work is told.

    n_bytes: read at once, far beyond any cache. n_rows, width, n_matrices: of the products, n_rows
        times square matrices.
    """

    @property
    def n_bytes(self) -> int: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def n_matrices(self) -> int: ...

    def times(self, work: Callable[[], object]) -> list[float]:
        """Seconds of REPEATS calls, after one that does not count."""


@dataclass(frozen=True)
class HostProbe:
    """A CPU: the host's clock. Little memory beside a model, since the peak reported includes
    it."""

    n_bytes: int = 1 << 28
    n_rows: int = 512
    width: int = 2048
    n_matrices: int = 4

    def times(self, work: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return times[1:]


class CudaProbe:
    """A GPU: its own events, with all calls queued before anyone waits, so that neither launch nor
    wait counts. 4 GiB, if half of what is free is as much: 256 MiB would take an H100 80 us, a
    launch being some 5, and a fifth of them would lie in its cache.
    """

    n_rows, width, n_matrices = 8192, 8192, 1

    def __init__(self, device: torch.device):
        self.device = device
        self.n_bytes = min(4 << 30, torch.cuda.mem_get_info(device)[0] // 2)

    def times(self, work: Callable[[], object]) -> list[float]:
        work()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
        events[0].record()
        for event in events[1:]:
            work()
            event.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in zip(events, events[1:])]


def probe_of(device: torch.device) -> Probe:
    return CudaProbe(device) if device.type == "cuda" else HostProbe()


def ceiling(shard: Shard, ranks: Ranks, dtype: torch.dtype, together: bool = True) -> Ceiling:
    """Every rank calls it. `together` False leaves the other ranks out (a simulated rank has
    none)."""
    worst = (lambda value: min(gather_ints(int(value), ranks))) if together else int
    if together:
        barrier(ranks)
    probe = probe_of(ranks.device)
    bandwidth = worst(read_rate(ranks.device, probe))
    rate = worst(matrix_rate(ranks.device, dtype, probe))
    item, config = dtype.itemsize, shard.config
    embedding = shard.vocab.width * config.dim * item
    weights = weight_bytes(shard, item) - (0 if config.tied else embedding)
    return Ceiling(
        bandwidth,
        rate,
        weights,
        kv_bytes_per_token(shard, item),
        2 * weights // item,
        2 * embedding // item,
        ranks.tp,
    )


@torch.inference_mode()
def read_rate(device: torch.device, probe: Probe) -> float:
    """Bytes/s that this rank reads from memory with all its threads."""
    block = torch.empty(probe.n_bytes // 4, dtype=torch.int32, device=device).random_()
    library = load() if device.type == "cpu" else None
    if library:
        return probe.n_bytes / statistics.median(probe.times(lambda: read_all(library, block)))
    parts = block.split(PART_BYTES // 4)
    return probe.n_bytes / statistics.median(probe.times(lambda: [part.max() for part in parts]))


@torch.inference_mode()
def matrix_rate(device: torch.device, dtype: torch.dtype, probe: Probe) -> float:
    """FLOP/s of rows times square matrices, the kind of product that prefill is made of. Random
    numbers: a GPU draws less power for zeros and ones, and keeps a higher clock."""
    backend = select_linears(device, dtype)[0]
    shape = probe.width, probe.width
    matrices = [
        backend.linear(torch.randn(shape, device=device).to(dtype)) for _ in range(probe.n_matrices)
    ]
    x = torch.randn(probe.n_rows, probe.width, device=device).to(dtype)
    n_flops = probe.n_matrices * 2 * probe.n_rows * probe.width**2
    return n_flops / statistics.median(probe.times(lambda: [matrix(x) for matrix in matrices]))
