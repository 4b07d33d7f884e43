"""Tensors as they lie in files, and how a rectangle of one comes into memory. The same for .pth and
.safetensors.

Both formats keep a tensor's elements uncompressed and in place, so a tensor is a file, an offset, a
dtype, a shape and strides. Which rectangle is wanted, and of which weight, is the caller's
business.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from llama_tp.checkpoint.files import Files

# what is read between two calls of progress; also the size of the staging buffer
BAND_BYTES = 16 << 20
# column cuts at least a page wide are read row by row, narrower ones with whole rows
SEGMENT_BYTES = 4096


# By the names that safetensors has for them. Others than those that can run are known too, so that
# a refusal can name what was found.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file. Element (r, c) lies at byte `offset` + (r * stride[0] + c * stride[1])
    * itemsize."""

    path: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements

    @property
    def n_bytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n

    def rows(self, start: int, stop: int) -> "Stored":
        """Rows [start, stop) as a tensor of its own."""
        offset = self.offset + start * self.stride[0] * self.dtype.itemsize
        return replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))

    def matrix(self) -> "Stored":
        """The same elements with two dimensions: a vector is one row."""
        if len(self.shape) == 2:
            return self
        return replace(self, shape=(1, *self.shape), stride=(self.shape[0], *self.stride))

    def readable(self) -> bool:
        """Whether `read_box` can read it: a vector or matrix whose rows, or whose columns, lie in
        one piece."""
        return (
            len(self.shape) in (1, 2) and 1 in self.stride and all(step > 0 for step in self.stride)
        )


@dataclass(frozen=True)
class ShardFile:
    """All tensors of one model-parallel shard by their names in the file, and what to call the
    shard in a message."""

    path: str
    tensors: dict[str, Stored]


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides of `shape`."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    # also where a dimension of 1 has an odd stride
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


class BoxReader:
    """Reads rectangles of stored matrices, a band of rows at a time, through one small buffer where
    one is needed."""

    def __init__(self, files: Files):
        self._files = files
        self._buffer: torch.Tensor | None = None

    def _staging(self, n_bytes: int, pinned: bool) -> torch.Tensor:
        """(n_bytes,) uint8 on the CPU, reused; page-locked when it feeds a GPU."""
        if (
            self._buffer is None
            or len(self._buffer) < n_bytes
            or (pinned and not self._buffer.is_pinned())
        ):
            self._buffer = torch.empty(
                max(n_bytes, BAND_BYTES), dtype=torch.uint8, pin_memory=pinned
            )
        return self._buffer[:n_bytes]

    def read(
        self,
        stored: Stored,
        rows: tuple[int, int],
        cols: tuple[int, int],
        out: torch.Tensor,
        head_dim: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Copies stored[rows, cols] into `out`, casting where the dtypes differ.

        Args:
            stored: two-dimensional, `readable`.
            rows, cols: half-open ranges.
            out: (rows, cols) of any dtype, device and strides.
            head_dim: where > 0, rows go from HF's rotary order (halves) to Meta's (neighbouring
                pairs) within each head of so many rows; `rows` then covers whole heads.
            progress: called with the stored bytes that each band brought.
        """
        if stored.stride[1] != 1:  # saved as a transposed view
            stored = replace(stored, shape=stored.shape[::-1], stride=stored.stride[::-1])
            rows, cols, out = cols, rows, out.t()
        n_rows, n_cols, item, pitch = (
            rows[1] - rows[0],
            cols[1] - cols[0],
            stored.dtype.itemsize,
            stored.stride[0],
        )
        if n_rows * n_cols == 0:
            return
        by_row = n_cols != pitch and n_cols * item >= SEGMENT_BYTES
        # elements that a row takes up once it is read
        width = n_cols if n_cols == pitch or by_row else pitch
        height = max(1, BAND_BYTES // (width * item))
        height = max(head_dim, height - height % head_dim) if head_dim else height
        for r in range(0, n_rows, height):
            k = min(height, n_rows - r)
            band = out.detach()[r : r + k]  # (k, n_cols)
            start = stored.offset + ((rows[0] + r) * pitch + cols[0]) * item
            if (
                width == n_cols
                and not head_dim
                and band.is_contiguous()
                and band.dtype == stored.dtype
                and band.device.type == "cpu"
            ):
                self._fill(stored.path, start, _bytes_of(band), k if by_row else 1, pitch * item)
            else:
                raw = self._staging(k * width * item, band.is_cuda)
                # Whole rows are read only up to the last wanted column of the last row: the file
                # may end there.
                n_bytes = ((k - 1) * width + n_cols) * item
                self._fill(
                    stored.path, start, _bytes_of(raw)[:n_bytes], k if by_row else 1, pitch * item
                )
                found = raw.view(stored.dtype).view(k, width)[:, :n_cols]  # (k, n_cols)
                if head_dim:
                    # (heads, E/2, 2, n_cols)
                    found = found.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)
                    band = band.unflatten(0, (-1, head_dim // 2, 2))  # (heads, E/2, 2, n_cols)
                band.copy_(found)
            if progress:
                progress(k * n_cols * item)

    def _fill(self, path: str, offset: int, memory: memoryview, n_runs: int, step: int) -> None:
        """Fills `memory` with `n_runs` equal runs of the file that begin `step` bytes apart."""
        run = len(memory) // n_runs
        for i in range(n_runs):
            self._files.fill(path, offset + i * step, memory[i * run : (i + 1) * run])

    def same(self, a: Stored, b: Stored) -> bool:
        """Whether two stored matrices hold the same bits. Stops at the first band that differs."""
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        if a == b:
            return True
        n_rows, n_cols = a.shape
        height = max(1, BAND_BYTES // (n_cols * a.dtype.itemsize))
        ours, theirs = (torch.empty(min(height, n_rows), n_cols, dtype=a.dtype) for _ in range(2))
        for r in range(0, n_rows, height):
            k = min(height, n_rows - r)
            self.read(a, (r, r + k), (0, n_cols), ours[:k])
            self.read(b, (r, r + k), (0, n_cols), theirs[:k])
            if not torch.equal(ours[:k].view(torch.uint8), theirs[:k].view(torch.uint8)):
                return False
        return True
