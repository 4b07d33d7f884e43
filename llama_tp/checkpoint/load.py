"""One rank's tensors out of an opened checkpoint: which part of each weight, and zeros where it is
padded.

The shard is plain data: any rank's load can be run, and tested, in one process without a group.
"""

from collections.abc import Callable, Iterator

import torch

from llama_tp.arch.shard_map import Shard
from llama_tp.arch.weights import Weight, table
from llama_tp.checkpoint.source import Source


def load(
    source: Source,
    shard: Shard,
    into: Callable[[Weight], torch.Tensor],
    progress: Callable[[int], None] | None = None,
) -> Iterator[Weight]:
    """Yields every weight of the table once its destination is filled.

    Args:
        source: the opened checkpoint.
        shard: what this rank holds, of the same config.
        into: gives a weight's destination: the local, padded shape (`weight.local_shape`), any
            float dtype, any device and strides.
        progress: called with stored bytes as they are done; they add up to
            `source.rank_bytes(shard)`.

    Raises UserError when a file is cut short or changes meanwhile.
    """
    try:
        for weight in table(source.config):
            part, out = weight.part(shard), into(weight).detach()
            shape = weight.local_shape(shard)
            if tuple(out.shape) != shape:
                raise ValueError(
                    f"{weight.name}: the destination is {tuple(out.shape)}, not {shape}"
                )
            n = part.stop - part.start
            dim = part.dim or 0
            source.read(weight, part, out.narrow(dim, 0, n), progress)
            out.narrow(dim, n, part.width - n).zero_()
            yield weight
        source.check_unchanged()
    finally:
        source.close()
