"""The paged KV cache of one rank: its own KV heads only, in blocks that sequences own through block
tables. What lies inside a block is the attention backend's."""

import math

import numpy as np
import torch


class KVCache:
    """Keys and values of all layers, each (L, N, *block_shape): layer, block, and what lies inside
    a block, which the attention backend that made the cache decides.

    Two blocks more than the `n_blocks` that sequences may own are kept: `trash`, which padding rows
    of a step write to, and `empty`, which nobody writes to and attention reads where a block table
    is padded (its zeros, weighted with zero, stay zero).
    """

    def __init__(
        self,
        n_layers: int,
        n_blocks: int,
        block_size: int,
        block_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (n_layers, n_blocks + 2, *block_shape)
        self.n_blocks, self.block_size = n_blocks, block_size
        self.trash, self.empty = n_blocks, n_blocks + 1
        self.k, self.v = zeros(shape, dtype, device), zeros(shape, dtype, device)
        # indexing a tensor takes longer than adding to it
        self.layers = list(zip(self.k.unbind(), self.v.unbind()))

    def clear(self, blocks: torch.Tensor) -> None:
        """Zeroes blocks that a new owner takes over. Attention multiplies unwritten slots by zero
        weights: without this, a NaN left behind by a failed request would reach its successor (0 *
        NaN is NaN). blocks: (n,) int64."""
        self.k[:, blocks] = 0
        self.v[:, blocks] = 0


class Slots:
    """Where each of a step's T tokens is stored: block ids and offsets, (T,) int64 each."""

    def __init__(self, blocks: torch.Tensor, offsets: torch.Tensor):
        self.blocks, self.offsets = blocks, offsets


def on_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device; on CUDA by way of pinned memory, so that the host does not wait
    for what the device still has to do."""
    return (
        x.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else x.to(device, non_blocking=True)
    )


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose pages, on CPU, are not touched before they are used: numpy's zeros is calloc,
    torch's is a memset, which would make a large, mostly idle cache resident at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8))
        .view(dtype)
        .view(shape)
    )
