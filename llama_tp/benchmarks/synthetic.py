"""Engines without a checkpoint: a published size with random weights, on the ranks there are or as
one rank of more.

A simulated rank holds its real share of every weight and does its real work, alone. What it would
say to the others goes to `FakeCommunicator`, which answers at once and counts: so the time measured
is that rank's computing, and a whole step is that time plus the collectives', which must come from
elsewhere. A prediction, never a measurement of tp ranks.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from llama_tp.arch.config import ModelConfig
from llama_tp.arch.options import STEP_TOKENS
from llama_tp.arch.shard_map import ShardMap
from llama_tp.arch.weight_format import DENSE
from llama_tp.arch.weights import table
from llama_tp.engine.build import assemble, compiled
from llama_tp.engine.engine import Engine
from llama_tp.model.build import choose_backends
from llama_tp.model.destinations import Destinations
from llama_tp.model.llama import Transformer
from llama_tp.parallel.groups import Ranks
from llama_tp.parallel.health import Watch
from llama_tp.text.token_table import Tokenizer


class FakeCommunicator:
    """A SharedMemoryCommunicator whose other ranks hold the same as this one; counts each
    collective's bytes."""

    in_tree_order = True

    def __init__(self, tp: int):
        self.tp = tp
        self.calls: Counter[tuple[str, int]] = Counter()  # by (collective, bytes)

    def sums(self, x: torch.Tensor) -> bool:
        return True

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        self.calls["sum", x.nbytes] += 1
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.calls["gather", x.nbytes] += 1
        return x.unsqueeze(0).expand(self.tp, *x.shape)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        self.calls["broadcast", x.nbytes] += 1
        return x


def simulated(tp: int, device: torch.device) -> Ranks:
    """The driver of tp ranks that do not exist. Its communicator's `calls` tell what would have
    been
    sent."""
    return Ranks(
        0, tp, device, communicator=FakeCommunicator(tp), control_communicator=FakeCommunicator(tp)
    )


def engine_of(
    config: ModelConfig,
    ranks: Ranks,
    dtype: torch.dtype,
    n_positions: int,
    max_rows: int,
    deterministic: bool,
    watch: Watch,
) -> Engine:
    """This rank's engine with random weights, scaled so that activations keep their size through
    the layers."""
    shard = ShardMap.even(config, ranks.tp).shard(ranks.rank)
    backends = choose_backends(shard, ranks, dtype, deterministic)
    backends = compiled(backends, shard, ranks, dtype, deterministic)
    model = Transformer(shard, ranks, dtype, n_positions, deterministic, backends)
    destinations = Destinations(model)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(ranks.rank)).to(
        ranks.device
    )
    for weight in table(config):
        [tensor] = DENSE.tensors(weight)
        view = destinations.view(weight, tensor)
        if view.dim() == 1:
            view.fill_(1)
        else:  # the same million numbers over and over: as good as fresh ones for timing
            scaled = (noise * (weight.shape[1] ** -0.5)).to(dtype)
            for row in view.view(-1).split(len(noise)) if view.is_contiguous() else view:
                row.copy_(scaled[: len(row)])
        destinations.mark_loaded(weight)
    n_blocks = max_rows * -(-n_positions // backends.block_size)
    cache = backends.attention.new_cache(config.n_layers, n_blocks)
    letters = Tokenizer([b"x"] * config.vocab_size, {}, None, (), lambda text: [0] * len(text))
    return assemble(
        model,
        cache,
        max_rows,
        STEP_TOKENS[ranks.device.type],
        letters,
        watch,
        prefix_cache=False,
        seed=1,
    )


def message_table(ranks: Ranks, n_steps: int) -> list[dict[str, Any]]:
    """What a simulated rank would have sent in each step, on average. ValueError for a real
    one."""
    if not isinstance(ranks.communicator, FakeCommunicator):
        raise ValueError("only the messages of simulated ranks are counted")
    return [
        {"collective": kind, "bytes": n_bytes, "a step": f"{n / max(1, n_steps):.1f}"}
        for (kind, n_bytes), n in sorted(ranks.communicator.calls.items())
    ]


def shrunk(config: ModelConfig, n_layers: int | None) -> ModelConfig:
    """The same model with fewer layers, for machines that cannot hold it."""
    return replace(config, n_layers=n_layers) if n_layers else config
