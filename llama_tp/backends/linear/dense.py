"""Products in torch: every device and dtype; on CPU by oneDNN, with packed weights, where it can.

From `min_rows` rows on, a row's bits depend neither on the number of rows, nor on how many of the
weight's rows this rank holds, nor on threads. That was measured (torch 2.13, AVX512-BF16; 2 to 512
rows, 32 to 8192 inputs, fp32 and bf16, 1 and 2 threads), and tests/backends/test_linear.py checks
it on the machine that runs it. Each K-chunk is a product of its own, rounded to the dtype before it
is added (bf16: rms error 3.6e-3 against 1.7e-3 for one product).
"""

import torch
import torch.nn.functional as F

from llama_tp.arch.summation import tree_add

PACKED_MIN_ROWS = 2  # oneDNN's products with a single row take another path
PLAIN_MIN_ROWS = 16  # the same for plain products (MKL: row bits settle at 4 to 12 rows)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has oneDNN's packed linear for the dtype: it reads weights at 95-100% of
    the memory bandwidth where plain `F.linear` in bf16 reaches 45-67%."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class DenseLinear:
    """A Linear by torch's products.

    Args:
        weight: (out, in).
        n_chunks: parts of the inputs.
        embeds: whether `embedding` will be called, which a packed weight cannot answer.
    """

    def __init__(self, weight: torch.Tensor, n_chunks: int = 1, embeds: bool = False):
        packable = can_pack(weight.dtype, weight.device)
        self.packed = packable and not embeds
        settled = packable and (self.packed or weight.dtype == torch.bfloat16)
        self.min_rows = PACKED_MIN_ROWS if settled else PLAIN_MIN_ROWS
        self.chunks = [chunk.contiguous() for chunk in weight.chunk(n_chunks, dim=1)]
        if self.packed:
            # the batch-size hint (1) asks for the layout that suits decode; larger batches read it
            # as well
            reorder = torch.ops.mkldnn._reorder_linear_weight
            self.chunks = [reorder(chunk, 1) for chunk in self.chunks]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.chunks) == 1:
            return self._times(x, self.chunks[0])
        return self.partial_sums(x).to(x.dtype)

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        parts = zip(x.chunk(len(self.chunks), dim=1), self.chunks)
        return tree_add([self._times(part.contiguous(), chunk).float() for part, chunk in parts])

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.chunks[0])

    def _times(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            return y
        return F.linear(x, weight)


class DenseLinears:
    """The LinearBackend that takes every weight."""

    name = "torch"

    def takes(self, n_in: int, n_chunks: int) -> bool:
        return True

    def linear(self, weight: torch.Tensor, n_chunks: int = 1) -> DenseLinear:
        return DenseLinear(weight, n_chunks)

    def embedding(self, weight: torch.Tensor) -> DenseLinear:
        return DenseLinear(weight, embeds=True)

    def padded_rows(self, n: int) -> int:
        """oneDNN compiles a kernel for every number of rows and keeps a thousand of them, 0.9 MB
        each (0.9 GB a rank once prompts of all lengths had come by). With these there are 50."""
        step = 1 if n <= 8 else 4 if n <= 64 else 16
        return -(-n // step) * step
