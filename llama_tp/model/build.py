"""From a config and the ranks to a model: its backends, and weights that are in memory already."""

from functools import partial

import torch

from llama_tp.arch.config import ModelConfig
from llama_tp.arch.shard_map import Shard, ShardMap
from llama_tp.arch.weight_format import DENSE
from llama_tp.arch.weights import table
from llama_tp.backends.base import LayerShape, Peers
from llama_tp.backends.select import Backends, select, select_compiled, select_plain
from llama_tp.model.destinations import Destinations
from llama_tp.model.llama import TorchElementwise, Transformer
from llama_tp.parallel.collectives import which_ranks
from llama_tp.parallel.groups import Ranks
from llama_tp.parallel.shared_memory import SharedMemoryCommunicator


def peers_of(ranks: Ranks) -> Peers:
    """The ranks as the backends see them."""
    communicator = ranks.communicator

    def count(n: int) -> None:
        ranks.counters.collectives += n

    return Peers(
        ranks.rank,
        ranks.tp,
        partial(which_ranks, ranks=ranks),
        communicator if isinstance(communicator, SharedMemoryCommunicator) else None,
        count,
    )


def choose_backends(
    shard: Shard, ranks: Ranks, dtype: torch.dtype, deterministic: bool
) -> Backends:
    """The fastest backends that all ranks have. Every rank calls it."""
    shape = LayerShape.of(shard, deterministic)
    plain = TorchElementwise(deterministic)
    return select(ranks.device, dtype, shape, deterministic, plain, peers_of(ranks))


def compile_backends(
    chosen: Backends, shard: Shard, ranks: Ranks, dtype: torch.dtype, deterministic: bool
) -> Backends:
    """`chosen` with what is worth compiling compiled: seconds, on CUDA alone. Every rank calls
    it."""
    shape = LayerShape.of(shard, deterministic)
    return select_compiled(chosen, ranks.device, dtype, shape, deterministic, peers_of(ranks))


def plain_backends(
    shard: Shard, ranks: Ranks, dtype: torch.dtype, deterministic: bool = False
) -> Backends:
    """Plain torch, whatever the machine has (tests)."""
    shape = LayerShape.of(shard, deterministic)
    return select_plain(ranks.device, dtype, shape, TorchElementwise(deterministic))


def from_weights(
    config: ModelConfig,
    ranks: Ranks,
    dtype: torch.dtype,
    n_positions: int,
    weights: dict[str, torch.Tensor],
    deterministic: bool = False,
    backends: Backends | None = None,
) -> Transformer:
    """A model filled from whole weights in memory (tests, and models made up on the spot).

    Args:
        weights: Meta's names, whole shapes; each rank keeps its own part, zero-padded as the loader
            would.
        backends: the fastest that there are unless given.
    """
    shard = ShardMap.even(config, ranks.tp).shard(ranks.rank)
    backends = backends or choose_backends(shard, ranks, dtype, deterministic)
    model = Transformer(shard, ranks, dtype, n_positions, deterministic, backends)
    destinations = Destinations(model)
    for weight in table(config):
        [tensor] = DENSE.tensors(weight)
        part, view = weight.part(shard), destinations.view(weight, tensor)
        view.zero_()
        if part.dim is None:
            view.copy_(weights[weight.name])
        else:
            n = part.stop - part.start
            view.narrow(part.dim, 0, n).copy_(weights[weight.name].narrow(part.dim, part.start, n))
        destinations.mark_loaded(weight)
    return model
