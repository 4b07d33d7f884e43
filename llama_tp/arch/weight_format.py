"""How a weight lies in a file and on a rank: its tensors, how each is cut, and its bytes.

A weight is an [out, in] matrix (or a vector) of numbers. A format says which tensors stand for it:
one for `Dense`, several where numbers are packed and have scales. Loader, checker and memory
arithmetic ask the format, and multiply nothing by an item size of their own.

A tensor's dimension follows one of the weight's, one unit for every `per` elements: packed words
and the scales of groups have fewer. A rank's part of the weight then takes every unit that it
touches. Where a cut falls inside a group, two ranks hold that group's scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol

from llama_tp.arch.shard_map import Shard
from llama_tp.arch.weights import Part, Weight

# Bytes of an element, by the names that safetensors has for dtypes.
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"BF16": 2, "F16": 2, "I16": 2, "U16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1},
}
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class FormatTensor:
    """One of the tensors that stand for a weight.

    Args:
        suffix: what a file has in the place of the name's last part, "weight".
        dtypes: safetensors' names of those that it may be stored in; the first where it is written.
        dims: for each of its dimensions the weight's that it follows; None for one of size 1.
        per: for each of its dimensions how many of the weight's elements share a unit.
        cast: whether it is held in the activations' dtype, whatever is stored. Else it is held as
            it is stored.
    """

    suffix: str
    dtypes: tuple[str, ...]
    dims: tuple[int | None, ...] = (0, 1)
    per: tuple[int, ...] = (1, 1)
    cast: bool = False

    def shape(self, weight: Weight) -> tuple[int, ...]:
        """Of the whole weight's."""
        return tuple(
            1 if dim is None else -(-weight.shape[dim] // per)
            for dim, per in zip(self.dims, self.per)
        )

    def part(self, weight: Weight, shard: Shard) -> Part:
        """What a rank holds of it, in its own units; all of it if it does not follow the cut."""
        part, shape = weight.part(shard), self.shape(weight)
        if part.dim not in self.dims or part.dim is None:
            return Part(None, 0, shape[0], shape[0])
        dim = self.dims.index(part.dim)
        per = self.per[dim]
        start, stop = part.start // per, -(-part.stop // per)
        end = -(-(part.start + part.width) // per)  # of the padding
        return Part(dim, start, stop, end - start)

    def local_shape(self, weight: Weight, shard: Shard) -> tuple[int, ...]:
        """Shape on that rank, padding included."""
        part = self.part(weight, shard)
        return tuple(part.width if i == part.dim else n for i, n in enumerate(self.shape(weight)))

    def n_read(self, weight: Weight, shard: Shard) -> int:
        """Elements that a rank reads of it."""
        part = self.part(weight, shard)
        return prod(
            part.stop - part.start if i == part.dim else n for i, n in enumerate(self.shape(weight))
        )

    def held_bytes(self, weight: Weight, shard: Shard, item_bytes: int) -> int:
        """What a rank holds of it. item_bytes: of the activations' dtype."""
        size = item_bytes if self.cast else ITEM_BYTES[self.dtypes[0]]
        return size * prod(self.local_shape(weight, shard))


class WeightFormat(Protocol):
    """A way to store weights."""

    @property
    def name(self) -> str:
        """For people, and for the backend that multiplies with it."""
        ...

    def tensors(self, weight: Weight) -> tuple[FormatTensor, ...]:
        """The tensors that stand for `weight`, in the order in which they are read."""


@dataclass(frozen=True)
class Dense:
    """The numbers themselves, in a float dtype. Vectors are always stored this way."""

    name: str = "dense"

    def tensors(self, weight: Weight) -> tuple[FormatTensor, ...]:
        n = len(weight.shape)
        return (FormatTensor("weight", FLOATS, (0, 1)[:n], (1, 1)[:n], cast=True),)


DENSE = Dense()
FormatOf = Callable[[Weight], WeightFormat]  # files may mix formats, weight by weight


def all_dense(weight: Weight) -> WeightFormat:
    """The FormatOf of a checkpoint without anything quantised."""
    return DENSE


def held_bytes(format_of: FormatOf, weight: Weight, shard: Shard, item_bytes: int) -> int:
    """What a rank holds of a weight. item_bytes: of the activations' dtype."""
    tensors = format_of(weight).tensors(weight)
    return sum(tensor.held_bytes(weight, shard, item_bytes) for tensor in tensors)
