"""What this machine could do at best for this model: measured bandwidth and matrix rate, hence the floor of a step.

Decoding reads every weight once a step, and the KV cache of every sequence once; prefill multiplies every weight with
every token. A step can be no faster than the slower of its reading and its arithmetic (the roofline, Williams et al.
2009). All ranks measure at the same time, as they will work.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from llama_tp.model.kernels import pick
from llama_tp.native.library import load
from llama_tp.parallel.collectives import barrier, gather_ints
from llama_tp.parallel.groups import Ranks
from llama_tp.spec.config import ModelConfig
from llama_tp.spec.memory import kv_bytes_per_token, weight_bytes

PROBE_BYTES = 1 << 28           # far beyond any CPU cache, and little beside a model: the peak memory reported includes it
MATRIX = 2048                   # of the matrix-rate probe: 512 tokens through one such square, several times
REPEATS = 7


@dataclass(frozen=True)
class Ceiling:
    """Of one rank, the slowest: bytes/s it reads, FLOP/s it multiplies; bytes and FLOPs that a token needs there."""

    read_bytes_per_s: float
    flops_per_s: float
    weight_bytes_per_step: int
    kv_bytes_per_position: int
    flops_per_token: int
    head_flops: int                 # of these, the head's, which a prompt needs at its end only
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
        return "\n".join([
            f"ceiling of each of {self.tp} rank(s): reads {self.read_bytes_per_s / 1e9:.1f} GB/s, multiplies "
            f"{self.flops_per_s / 1e12:.2f} TFLOP/s (both measured now)",
            f"a step reads {self.weight_bytes_per_step / 1e9:.3f} GB of weights there, a token takes "
            f"{self.flops_per_token / 1e9:.3f} GFLOP: decode is at most {1 / self.decode_s(1, 0):.1f} tok/s a sequence, "
            f"prefill {prefill:.0f} tok/s"])

    def as_json(self) -> dict:
        return asdict(self)


def ceiling(config: ModelConfig, ranks: Ranks, dtype: torch.dtype, probe: bool = True) -> Ceiling:
    """Every rank calls it. `probe` False leaves the other ranks out (a simulated rank has none)."""
    worst = (lambda value: min(gather_ints(int(value), ranks))) if probe else int
    if probe:
        barrier(ranks)
    bandwidth = worst(read_rate(ranks.device))
    rate = worst(matrix_rate(ranks.device, dtype))
    item = dtype.itemsize
    embedding = config.local_vocab(ranks.tp) * config.dim * item
    weights = weight_bytes(config, ranks.tp, item) - (0 if config.tied else embedding)
    return Ceiling(bandwidth, rate, weights, kv_bytes_per_token(config, ranks.tp, item), 2 * weights // item,
                   2 * embedding // item, ranks.tp)


def read_rate(device: torch.device) -> float:
    """Bytes/s that this rank reads from memory with all its threads."""
    block = torch.ones(PROBE_BYTES // 4, dtype=torch.int32, device=device)
    library = load() if device.type == "cpu" else None
    read = (lambda: library.read_all(block.data_ptr(), PROBE_BYTES // 8)) if library else block.max
    return PROBE_BYTES / median_s(read, device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of 512 rows times a square matrix, the kind of product that prefill is made of."""
    kernels = pick(device, dtype, fixed_bits=False)
    matrices = [kernels.matrix(torch.full((MATRIX, MATRIX), 0.01, dtype=dtype, device=device)) for _ in range(4)]
    x = torch.ones(512, MATRIX, dtype=dtype, device=device)
    return 4 * 2 * 512 * MATRIX**2 / median_s(lambda: [matrix(x) for matrix in matrices], device)


def median_s(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of some calls after one that does not count."""
    times = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
