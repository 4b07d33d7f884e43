"""What a layer computes with, in the two ways there are: torch's, and C++ on CPU.

One seam for what differs between machines: the transformer calls these and nothing else that does.
Both ways give a row the same bits whatever else is in the step, however its prompt was cut and on
however many ranks the heads lie; between the two, results agree within the dtype's rounding. Tensor
letters as in transformer.py.
"""

import ctypes
from array import array
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llama_tp.model.attention import Group, Paged, Span, attend, attend_decodes, plan
from llama_tp.model.flash import PAGE, Heads, PagedAttention, open_paged
from llama_tp.model.kv_cache import KVCache, Slots
from llama_tp.model.matrix import DTYPES, Matrix, NativeMatrix, TorchMatrix, can_pack
from llama_tp.model.rope import Turn, rotate
from llama_tp.native.library import load

AMPERE = (8, 0)  # FlashAttention needs a GPU of this generation or a later one
# positions whose keys and values a captured step may gather in a layer: 256 MiB of an 8B model's
GATHER_LIMIT = 1 << 16


def rounded(n: int) -> int:
    """How many rows a step of n tokens is computed with. oneDNN compiles a kernel for every number
    of rows and keeps a thousand of them, 0.9 MB each (0.9 GB a rank once prompts of all lengths had
    come by): let there be 50 numbers."""
    step = 1 if n <= 8 else 4 if n <= 64 else 16
    return -(-n // step) * step


class TorchKernels:
    """Plain torch: every device and dtype, and what the C++ kernels are tested against.

    fixed_bits: deterministic mode; torch's own silu is faster and less strict.
    """

    name = "torch"
    block_size = 16  # slots a KV block: small enough that short prompts share prefixes
    lacks: str | None = None  # why this GPU does without paged FlashAttention
    rotate = staticmethod(rotate)
    rounded = staticmethod(rounded)

    def __init__(self, fixed_bits: bool = False):
        self.silu = silu_fixed if fixed_bits else F.silu

    def matrix(self, weight: torch.Tensor, n_chunks: int = 1, lookups: bool = False) -> Matrix:
        """What multiplies with `weight` (out, in), whose memory it may take over. See matrix.py for
        n_chunks and lookups."""
        return TorchMatrix(weight, n_chunks, lookups)

    def plan(self, spans: list[Span], n_heads: int, cache: KVCache, n_tokens: int) -> list[Group]:
        """What `attend` needs to know about a step of n_tokens rows, once for all layers."""
        return plan(spans, n_heads, cache.block_size, cache.empty, cache.k.device)

    def plan_decodes(self, table: torch.Tensor, positions: torch.Tensor) -> Paged:
        """The same for one row a sequence, from tensors on the device. table: (B, W) int32;
        positions: (B,) int64."""
        used = positions.to(torch.int32) + 1
        return Paged(
            table, used, torch.arange(len(used) + 1, dtype=torch.int32, device=used.device), 1
        )

    def table_widths(self, n_rows: int, most: int) -> list[int]:
        """How many blocks wide the tables are that `plan_decodes` gets in captured steps of n_rows.
        Here all of them are gathered: contexts of up to 512 positions, 2,048 and so on, as far as
        memory should be spent."""
        widths = [min(most, 32 << shift) for shift in range(0, 2 * most.bit_length(), 2)]
        return [
            width
            for width in sorted(set(widths))
            if n_rows * width * self.block_size <= GATHER_LIMIT
        ]

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """x += delta in place; -> x / rms(x) * weight (arXiv 1910.07467), in fp32 but for the last
        product, as Meta does.
        x, delta: (T, D); weight: (D,)."""
        if delta is not None:
            x += delta
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def rotate_write(
        self, qkv: torch.Tensor, n_heads: int, turn: Turn, slots: Slots, cache: KVCache, layer: int
    ) -> torch.Tensor:
        """Turns queries and keys to their positions and stores keys and values. qkv: (T, H + 2K, E)
        -> (T, H, E)."""
        H, HK = n_heads, (n_heads + qkv.shape[1]) // 2
        qk = self.rotate(qkv[:, :HK], turn)  # (T, H + K, E)
        cache.write(layer, slots, qk[:, H:], qkv[:, HK:])
        return qk[:, :H]

    def attend(
        self, q: torch.Tensor, cache: KVCache, layer: int, plan: list[Group] | Paged
    ) -> torch.Tensor:
        """Softmax attention of every row over its sequence's cached context. q: (T, H, E) -> (T, H,
        E)."""
        return (attend_decodes if isinstance(plan, Paged) else attend)(
            q, *cache.layers[layer], plan
        )

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. (T, 2F) -> (T, F)."""
        gate, up = gate_up.chunk(2, dim=-1)  # (T, F) each
        return self.silu(gate) * up


def silu_fixed(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x) with bits that do not depend on an element's place in the tensor: torch's own
    silu takes another exp in the last elements of a vector loop (fp32: 2% of them differ),
    `torch.exp` takes the same one everywhere."""
    wide = x.float()
    return (wide / (1 + torch.exp(-wide))).to(x.dtype)


class FlashKernels(TorchKernels):
    """On CUDA, with torch's paged FlashAttention (flash.py): prefill and decodes in one call that
    reads the blocks where they lie. Never run on a GPU so far."""

    name = "torch + FlashAttention"
    block_size = PAGE

    def __init__(self, paged: PagedAttention, fixed_bits: bool = False):
        super().__init__(fixed_bits)
        self.paged = paged

    def plan(self, spans: list[Span], n_heads: int, cache: KVCache, n_tokens: int) -> Paged:
        width = max(len(span.blocks) for span in spans)
        tables = [span.blocks + [cache.empty] * (width - len(span.blocks)) for span in spans]
        used, ends = (
            [span.start + span.n for span in spans],
            [0, *(span.row + span.n for span in spans)],
        )
        return Paged.of(tables, used, ends, cache.k.device)

    def table_widths(self, n_rows: int, most: int) -> list[int]:
        return [most]  # beyond a sequence's own blocks nothing is read

    def attend(self, q: torch.Tensor, cache: KVCache, layer: int, plan: Paged) -> torch.Tensor:
        return self.paged(q, *cache.layers[layer], plan)


@dataclass(frozen=True)
class NativePlan:
    """A step's sequences as the C++ side reads them."""

    spans: array  # of int64, four a sequence: row, start, n, where its table begins
    tables: array  # of int32: block tables, one after the other
    complete: bool  # whether the spans cover all rows of the step


class NativeKernels:
    """The C++ kernels (native/kernels.cpp): CPU, fp32 and bf16. Methods as those of
    TorchKernels."""

    name = "C++"
    block_size = 16
    lacks = None

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype):
        self.library, ending = library, DTYPES[dtype]
        self._attend, self._add_norm, self._rotate_write, self._silu_mul = (
            getattr(library, f"{name}_{ending}")
            for name in ("attend", "add_norm", "rotate_write", "silu_mul")
        )
        self._together = getattr(library, f"inputs_together_{ending}")()

    def matrix(self, weight: torch.Tensor, n_chunks: int = 1, lookups: bool = False) -> Matrix:
        if self._together and weight.shape[1] % (n_chunks * self._together) == 0:
            return NativeMatrix(weight, n_chunks, self.library)
        return TorchMatrix(weight, n_chunks, lookups)

    def rounded(self, n: int) -> int:
        return n if self._together else rounded(n)

    def plan(self, spans: list[Span], n_heads: int, cache: KVCache, n_tokens: int) -> NativePlan:
        heads, tables = array("q"), array("i")
        for span in spans:
            heads.extend((span.row, span.start, span.n, len(tables)))
            tables.extend(span.blocks)
        return NativePlan(heads, tables, sum(span.n for span in spans) == n_tokens)

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        self._add_norm(
            x.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            *x.shape,
        )
        return out

    def rotate_write(
        self, qkv: torch.Tensor, n_heads: int, turn: Turn, slots: Slots, cache: KVCache, layer: int
    ) -> torch.Tensor:
        k, v = cache.layers[layer]
        _, K, S, E = k.shape
        self._rotate_write(
            qkv.data_ptr(),
            turn.cos.data_ptr(),
            turn.sin.data_ptr(),
            slots.blocks.data_ptr(),
            slots.offsets.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            len(qkv),
            n_heads,
            K,
            S,
            E,
        )
        return qkv[:, :n_heads]

    def attend(self, q: torch.Tensor, cache: KVCache, layer: int, plan: NativePlan) -> torch.Tensor:
        k, v = cache.layers[layer]
        _, K, S, E = k.shape
        out = (torch.empty if plan.complete else torch.zeros)(q.shape, dtype=q.dtype)
        self._attend(
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            plan.spans.buffer_info()[0],
            len(plan.spans) // 4,
            plan.tables.buffer_info()[0],
            q.shape[1],
            K,
            S,
            E,
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        T, twice = gate_up.shape
        out = gate_up.new_empty((T, twice // 2))
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), T, twice // 2)
        return out


Kernels = TorchKernels | NativeKernels


def pick(
    device: torch.device, dtype: torch.dtype, fixed_bits: bool, heads: Heads | None = None
) -> Kernels:
    """The fastest way there is for this machine. heads: what attention will be asked for; None: it
    will not be."""
    if device.type == "cuda" and heads:
        paged = _paged(device, dtype, fixed_bits, heads)
        if not isinstance(paged, str):
            return FlashKernels(paged, fixed_bits)
        kernels = TorchKernels(fixed_bits)
        kernels.lacks = paged
        return kernels
    library = load() if device.type == "cpu" and dtype in DTYPES else None
    return NativeKernels(library, dtype) if library else TorchKernels(fixed_bits)


def _paged(
    device: torch.device, dtype: torch.dtype, fixed_bits: bool, heads: Heads
) -> PagedAttention | str:
    """Paged FlashAttention on this GPU, or why there is none."""
    if dtype == torch.float32:
        return "it computes in bfloat16 and float16, not in float32"
    capability = torch.cuda.get_device_capability(device)
    if capability < AMPERE:
        return "it takes a GPU of compute capability 8.0, this one has {}.{}".format(*capability)
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler: a second

    return open_paged(varlen_attn, heads, dtype, device, fixed_bits)


def fixes_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this machine can give a row the same bits whatever else is in the
    step."""
    return device.type == "cpu" and (
        can_pack(dtype, device) or (load() is not None and dtype in DTYPES)
    )
