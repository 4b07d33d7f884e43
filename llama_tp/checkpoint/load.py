"""One rank's tensors out of an opened checkpoint: which part of each weight, and zeros where it is
padded.

The shard is plain data: any rank's load can be run, and tested, in one process without a group.
"""

from collections.abc import Callable, Iterator

import torch

from llama_tp.arch.shard_map import Shard
from llama_tp.arch.weight_format import FormatTensor
from llama_tp.arch.weights import Weight, table
from llama_tp.checkpoint.source import Source


def load(
    source: Source,
    shard: Shard,
    into: Callable[[Weight, FormatTensor], torch.Tensor],
    progress: Callable[[int], None] | None = None,
) -> Iterator[Weight]:
    """Yields every weight of the table once its destination is filled.

    Args:
        source: the opened checkpoint.
        shard: what this rank holds, of the same config.
        into: gives the destination of one of a weight's tensors: the local, padded shape
            (`tensor.local_shape`), any device and strides; in any float dtype for a tensor that is
            cast, else in the one that it is stored in.
        progress: called with stored bytes as they are done; they add up to
            `source.rank_bytes(shard)`.

    Raises UserError when a file is cut short or changes meanwhile.
    """
    try:
        for weight in table(source.config):
            for tensor in source.format_of(weight).tensors(weight):
                part, out = tensor.part(weight, shard), into(weight, tensor).detach()
                shape = tensor.local_shape(weight, shard)
                if tuple(out.shape) != shape:
                    raise ValueError(
                        f"{weight.name}: the destination of {tensor.suffix} is {tuple(out.shape)}, "
                        f"not {shape}"
                    )
                n, dim = part.stop - part.start, part.dim or 0
                source.read(weight, tensor, part, out.narrow(dim, 0, n), progress)
                out.narrow(dim, n, part.width - n).zero_()
            yield weight
        source.check_unchanged()
    finally:
        source.close()
