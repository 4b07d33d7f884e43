"""Numerators of the softmax in fixed point, in torch and in C++ on CPU.

A draw needs sums of exp(logit) over the vocabulary. Sums of floats depend on their order, and so on
how the vocabulary is cut into shards. Sums of integers do not: the same token is drawn at any
number of ranks.
"""

import ctypes

import torch
import torch.nn.functional as F

from llama_tp.native.calls import Numerators
from llama_tp.native.library import load

NUMERATOR_OF_BEST = 2.0**44  # a vocabulary of 2**18 times this fits in an int64
CHUNK = 1024  # tokens a chunk sum; a draw looks at single numerators in one chunk only


class SoftmaxNumerators:
    """Plain torch: any device, and what the C++ code is tested against."""

    def softmax_numerators(
        self, logits: torch.Tensor, temperature: torch.Tensor, best: torch.Tensor
    ) -> torch.Tensor:
        """exp((logit - best) / temperature) in units of 2**-44, rounded down; 0 for minus infinity.

        Args:
            logits: (R, n) fp32, not changed.
            temperature: (R, 1) fp32, above 0.
            best: (R, 1) fp32, the row's highest logit, on whatever shard it lies.

        Returns (R, n) int64; meaningless in a row whose best is not finite.
        """
        return ((logits / temperature - best / temperature).exp() * NUMERATOR_OF_BEST).long()

    def chunk_sums(
        self, logits: torch.Tensor, temperature: torch.Tensor, best: torch.Tensor
    ) -> torch.Tensor:
        """Sums of the numerators of every CHUNK tokens; arguments as of `softmax_numerators`.
        (R, V) -> (R, ceil(V / CHUNK)) int64."""
        numerators = self.softmax_numerators(logits, temperature, best)
        padded = F.pad(numerators, (0, -numerators.shape[1] % CHUNK))
        sums: torch.Tensor = padded.unflatten(1, (-1, CHUNK)).sum(-1)
        return sums


class NativeNumerators(SoftmaxNumerators):
    """The same in C++, on CPU, through native/calls.py, which checks what it is given."""

    def __init__(self, library: ctypes.CDLL):
        self._calls = Numerators(library)

    def softmax_numerators(
        self, logits: torch.Tensor, temperature: torch.Tensor, best: torch.Tensor
    ) -> torch.Tensor:
        return self._calls.softmax_numerators(logits, temperature, best)

    def chunk_sums(
        self, logits: torch.Tensor, temperature: torch.Tensor, best: torch.Tensor
    ) -> torch.Tensor:
        return self._calls.chunk_sums(logits, temperature, best, CHUNK)


def numerators_on(device: torch.device) -> SoftmaxNumerators:
    """The faster of the two that `device` can use."""
    library = load() if device.type == "cpu" else None
    return NativeNumerators(library) if library else SoftmaxNumerators()
