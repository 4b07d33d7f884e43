"""The library's functions for tensors: dtype, shape, contiguity and device are checked before a
pointer leaves Python.

A tensor that does not fit is a ValueError that names the function's argument, what it must be and
what it is. A check costs 0.4 us a tensor; what stays from step to step (the weights of LayerArgs,
the KV cache) is checked once. Values are not checked: block ids, offsets and spans must lie inside
the tensors that they point into. Token ids are, in C++.

Tensor letters as in native.h: T tokens in the step, D dim, H query heads, K KV heads, E head dim, F
ffn dim, N KV blocks, S slots a block.
"""

import ctypes
from array import array
from ctypes import addressof
from typing import NamedTuple

import torch

from llama_tp.native.library import DTYPE_NAMES, WIDTH
from llama_tp.native.structs import SPAN_INTS, LayerArgs, StepArgs

DTYPES = dict(zip((torch.float32, torch.bfloat16), DTYPE_NAMES))  # -> how its functions' names end
GROUP = 16  # slots that attention reads together; a KV block is a multiple of them


class Place(NamedTuple):
    """A rank's place at one channel of shared memory, as shared.cpp takes it.

    Attributes:
        base: address of shared_bytes(tp) bytes, all zero before the first call.
        timeout_s: seconds to wait for the other ranks.
    """

    base: int | None
    tp: int
    rank: int
    timeout_s: float


ALONE = Place(None, 1, 0, 0.0)


def require(name: str, x: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Raises ValueError unless x is a contiguous CPU tensor of this dtype and shape."""
    if x.dtype is not dtype or x.shape != shape or not x.is_contiguous() or not x.is_cpu:
        raise ValueError(_wrong(name, x, dtype, shape, "contiguous"))


def require_rows(name: str, x: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
    """The same for x whose rows x[i] are contiguous, with any positive stride between them. Shape
    (R, n) or (T, heads, E)."""
    strides = x.stride()
    fits = x.dtype is dtype and x.shape == shape and x.is_cpu and strides[-1] == 1
    row = shape[1] if len(shape) == 2 else shape[1] * shape[2]
    if len(shape) == 3:
        fits = fits and strides[1] == shape[2]
    if not fits or (strides[0] < row and shape[0] > 1):
        raise ValueError(_wrong(name, x, dtype, shape, "with contiguous rows"))


def _wrong(
    name: str, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], layout: str
) -> str:
    is_now = f"{x.dtype} {tuple(x.shape)}, strides {x.stride()}, on {x.device}"
    return f"{name} must be {dtype} {shape}, {layout}, on cpu; it is {is_now}"


def sizes(name: str, x: torch.Tensor, letters: str) -> torch.Size:
    """x's shape. Raises ValueError unless it has as many dimensions as there are letters."""
    if x.dim() != len(letters):
        raise ValueError(f"{name} must be ({', '.join(letters)}); it is {tuple(x.shape)}")
    return x.shape


def padded(n_out: int) -> int:
    """Rows that a packed weight with n_out outputs has."""
    return -(-n_out // WIDTH) * WIDTH


class Functions:
    """The library's functions for activations of one dtype.

    Raises ValueError for a dtype that they do not compute in.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype):
        if dtype not in DTYPES:
            raise ValueError(f"the C++ parts compute in float32 and bfloat16, not in {dtype}")
        self.dtype, ending = dtype, DTYPES[dtype]
        self._attend = getattr(library, f"attend_{ending}")
        self._add_norm = getattr(library, f"add_norm_{ending}")
        self._rotate = getattr(library, f"rotate_{ending}")
        self._write_kv = getattr(library, f"write_kv_{ending}")
        self._silu_mul = getattr(library, f"silu_mul_{ending}")
        self._pack = getattr(library, f"pack_{ending}")
        self._take_rows = getattr(library, f"take_rows_{ending}")
        self._product = getattr(library, f"product_{ending}")
        self._layer = getattr(library, f"layer_{ending}")
        self.inputs_together: int = getattr(library, f"inputs_together_{ending}")()

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        spans: "array[int]",
        tables: "array[int]",
        complete: bool,
    ) -> torch.Tensor:
        """Softmax attention of every row over its sequence's cached context.

        Args:
            q: (T, H, E), with any stride between rows.
            k_cache, v_cache: one layer's cache, (N, K, S, E) in the order of kernels.cpp.
            spans: int64, SPAN_INTS a sequence.
            tables: int32, the block tables that spans point into.
            complete: whether the spans cover all T rows; other rows are zero.

        Returns (T, H, E).
        """
        T, H, E = sizes("q", q, "THE")
        require_rows("q", q, self.dtype, T, H, E)
        _, K, S, _ = self._require_cache(k_cache, v_cache, E)
        if H % K:
            raise ValueError(f"{H} query heads are not a multiple of {K} KV heads")
        n_spans = _count_spans(spans, tables)
        out = (torch.empty if complete else torch.zeros)((T, H, E), dtype=self.dtype)
        self._attend(
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            spans.buffer_info()[0],
            n_spans,
            tables.buffer_info()[0],
            H,
            K,
            S,
            E,
        )
        return out

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: torch.Tensor,
        offsets: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> None:
        """Writes keys and values, (T, K, E) with any stride between rows, to slot offsets[t] of
        block blocks[t] of a layer's cache. blocks, offsets: (T,) int64; caches: (N, K, S, E)."""
        T, K, E = sizes("k", k, "TKE")
        require_rows("k", k, self.dtype, T, K, E)
        require_rows("v", v, self.dtype, T, K, E)
        require("blocks", blocks, torch.int64, T)
        require("offsets", offsets, torch.int64, T)
        N, _, S, _ = self._require_cache(k_cache, v_cache, E)
        require("k_cache", k_cache, self.dtype, N, K, S, E)
        self._write_kv(
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            blocks.data_ptr(),
            offsets.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            T,
            K,
            S,
            E,
        )

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """x += delta in place, if there is one; -> x / rms(x) * weight. x, delta: (T, D); weight:
        (D,) -> (T, D)."""
        T, D = sizes("x", x, "TD")
        require("x", x, self.dtype, T, D)
        require("weight", weight, self.dtype, D)
        if delta is not None:
            require("delta", delta, self.dtype, T, D)
        out = torch.empty_like(x)
        self._add_norm(
            x.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            T,
            D,
        )
        return out

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotates each pair (2i, 2i + 1) in place. x: (T, heads, E), with any stride between rows;
        cos, sin: (T, 1, E / 2) fp32."""
        T, heads, E = sizes("x", x, "THE")
        half = E // 2
        require_rows("x", x, self.dtype, T, heads, 2 * half)
        require("cos", cos, torch.float32, T, 1, half)
        require("sin", sin, torch.float32, T, 1, half)
        self._rotate(x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), T, heads, E)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. (T, 2F), gates first -> (T, F)."""
        T, twice = sizes("gate_up", gate_up, "TF")
        F = twice // 2
        require("gate_up", gate_up, self.dtype, T, 2 * F)
        out = torch.empty((T, F), dtype=self.dtype)
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), T, F)
        return out

    def pack(self, weight: torch.Tensor) -> None:
        """Lays a weight (out, in) out for `product`, in place. out: a multiple of WIDTH; in: a
        multiple of inputs_together."""
        n_out, n_in = sizes("weight", weight, "NK")
        require("weight", weight, self.dtype, padded(n_out), n_in)
        self._require_inputs(n_in, 1)
        self._pack(weight.data_ptr(), n_out, n_in)

    def product(
        self, x: torch.Tensor, weight: torch.Tensor, n_out: int, n_chunks: int = 1
    ) -> torch.Tensor:
        """x W^T, summed in n_chunks equal parts of the inputs. x: (T, in); weight: packed,
        (padded(n_out), in) -> (T, n_out) in x's dtype."""
        out = self._new_product(x, weight, n_out, n_chunks, self.dtype)
        pointers = x.data_ptr(), weight.data_ptr(), None, out.data_ptr()
        self._product(*pointers, len(x), x.shape[1], n_out, n_chunks)
        return out

    def partial_sums(
        self, x: torch.Tensor, weight: torch.Tensor, n_out: int, n_chunks: int = 1
    ) -> torch.Tensor:
        """The sums of `product` as they are, not rounded: (T, n_out) fp32."""
        out = self._new_product(x, weight, n_out, n_chunks, torch.float32)
        pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr(), None
        self._product(*pointers, len(x), x.shape[1], n_out, n_chunks)
        return out

    def embedding(self, weight: torch.Tensor, ids: torch.Tensor, n_out: int) -> torch.Tensor:
        """Rows of a packed weight (padded(n_out), in) as they were before: (T,) int64 -> (T, in).
        Raises IndexError for an id that is not in [0, n_out)."""
        (T,), (_, n_in) = sizes("ids", ids, "T"), sizes("weight", weight, "NK")
        require("weight", weight, self.dtype, padded(n_out), n_in)
        require("ids", ids, torch.int64, T)
        self._require_inputs(n_in, 1)
        out = torch.empty((T, n_in), dtype=self.dtype)
        pointers = weight.data_ptr(), ids.data_ptr(), out.data_ptr()
        if not self._take_rows(*pointers, T, n_out, n_in):
            raise IndexError(f"a token id is not below {n_out}")
        return out

    def _new_product(
        self, x: torch.Tensor, weight: torch.Tensor, n_out: int, n_chunks: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Checks a product's arguments; -> memory for its result."""
        T, n_in = sizes("x", x, "TK")
        require("x", x, self.dtype, T, n_in)
        require("weight", weight, self.dtype, padded(n_out), n_in)
        self._require_inputs(n_in, n_chunks)
        return torch.empty((T, n_out), dtype=dtype)

    def _require_inputs(self, n_in: int, n_chunks: int) -> None:
        if n_in % (n_chunks * max(1, self.inputs_together)):
            raise ValueError(
                f"{n_in} inputs are not {n_chunks} chunks of multiples of {self.inputs_together}"
            )

    def _require_cache(self, k: torch.Tensor, v: torch.Tensor, E: int) -> torch.Size:
        """-> (N, K, S, E), the shape of both."""
        N, K, S, _ = sizes("k_cache", k, "NKSE")
        require("k_cache", k, self.dtype, N, K, S, E)
        require("v_cache", v, self.dtype, N, K, S, E)
        if S % GROUP:
            raise ValueError(f"a KV block has {S} slots, not a multiple of {GROUP}")
        return k.shape


def _count_spans(spans: "array[int]", tables: "array[int]") -> int:
    if spans.typecode != "q" or len(spans) % SPAN_INTS or tables.typecode != "i":
        raise ValueError(
            f"spans must be {SPAN_INTS} int64 ('q') a sequence and tables int32 ('i'); they are "
            f"{len(spans)} '{spans.typecode}' and '{tables.typecode}'"
        )
    return len(spans) // SPAN_INTS


class LayerTensors(NamedTuple):
    """The weights of a layer on one rank. The norms are (D,); the others packed, (padded(out),
    in)."""

    attention_norm: torch.Tensor
    wqkv: torch.Tensor  # out (H + 2K) E, in D
    wo: torch.Tensor  # out D, in H E
    ffn_norm: torch.Tensor
    w13: torch.Tensor  # out 2F, in D
    w2: torch.Tensor  # out D, in F


class LayerSizes(NamedTuple):
    """The sizes of every layer on one rank.

    Attributes:
        n_chunks: parts of the inputs of wo and w2, each summed by itself.
        fp32_sums: whether fp32 partial sums are added over the ranks, or sums rounded to the dtype.
    """

    H: int
    K: int
    E: int
    F: int
    eps: float
    n_chunks: int = 1
    fp32_sums: bool = False


KVLayers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, (N, K, S, E)


class Layers:
    """All layers of a step, one call of C++ each.

    The weights are checked here, a cache when it first comes, and of a step what is new in it: a
    layer's call costs 12 us of Python with cold caches, and checks would come on top.

    Raises ValueError for tensors that do not fit the sizes.
    """

    def __init__(
        self,
        functions: Functions,
        layers: list[LayerTensors],
        sizes: LayerSizes,
        place: Place = ALONE,
    ):
        self._functions, self._sizes, self._call = functions, sizes, functions._layer
        self._layers = layers  # keeps what the pointers point to
        self._dim = len(layers[0].ffn_norm)
        self._args = [self._layer_args(layer, place) for layer in layers]
        self._addresses = [addressof(args) for args in self._args]
        self._cache: KVLayers | None = None
        self._cache_addresses: list[tuple[int, int]] = []
        self._block_size = 0

    def step(
        self,
        n_tokens: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        blocks: torch.Tensor,
        offsets: torch.Tensor,
        spans: "array[int]",
        tables: "array[int]",
        complete: bool,
    ) -> StepArgs:
        """What a step of T rows keeps from layer to layer. cos, sin: (T, 1, E / 2) fp32; blocks,
        offsets: (T,) int64; the rest as in `Functions.attend`."""
        half = self._sizes.E // 2
        require("cos", cos, torch.float32, n_tokens, 1, half)
        require("sin", sin, torch.float32, n_tokens, 1, half)
        require("blocks", blocks, torch.int64, n_tokens)
        require("offsets", offsets, torch.int64, n_tokens)
        step = StepArgs(
            n_tokens,
            0,  # S: the cache's
            cos.data_ptr(),
            sin.data_ptr(),
            blocks.data_ptr(),
            offsets.data_ptr(),
            spans.buffer_info()[0],
            _count_spans(spans, tables),
            tables.buffer_info()[0],
            complete,
        )
        step.owners = (cos, sin, blocks, offsets, spans, tables)
        return step

    def __call__(self, x: torch.Tensor, step: StepArgs, cache: KVLayers) -> torch.Tensor | None:
        """x (T, D) through all layers -> what is to be added to it, (T, D); x itself is
        overwritten. cache: its list must not be changed while it is used here. None if the other
        ranks did not come to a sum in time."""
        require("x", x, self._functions.dtype, step.T, self._dim)
        if cache is not self._cache:
            self._take_cache(cache)
        step.S, delta = self._block_size, torch.empty_like(x)
        step_address, x_address, delta_address = addressof(step), x.data_ptr(), delta.data_ptr()
        has_delta = False
        for layer, (k, v) in zip(self._addresses, self._cache_addresses):
            if not self._call(layer, step_address, x_address, delta_address, has_delta, k, v):
                return None
            has_delta = True
        return delta

    def _take_cache(self, cache: KVLayers) -> None:
        if len(cache) != len(self._layers):
            raise ValueError(f"the cache has {len(cache)} layers, not {len(self._layers)}")
        N, _, S, _ = sizes("k_cache", cache[0][0], "NKSE")
        for k, v in cache:
            self._functions._require_cache(k, v, self._sizes.E)
            require("k_cache", k, self._functions.dtype, N, self._sizes.K, S, self._sizes.E)
        self._cache, self._block_size = cache, S
        self._cache_addresses = [(k.data_ptr(), v.data_ptr()) for k, v in cache]

    def _layer_args(self, layer: LayerTensors, place: Place) -> LayerArgs:
        H, K, E, F, eps, n_chunks, fp32_sums = self._sizes
        D, dtype = self._dim, self._functions.dtype
        require("attention_norm", layer.attention_norm, dtype, D)
        require("wqkv", layer.wqkv, dtype, padded((H + 2 * K) * E), D)
        require("wo", layer.wo, dtype, padded(D), H * E)
        require("ffn_norm", layer.ffn_norm, dtype, D)
        require("w13", layer.w13, dtype, padded(2 * F), D)
        require("w2", layer.w2, dtype, padded(D), F)
        for n_in in (H * E, F):
            self._functions._require_inputs(n_in, n_chunks)
        if H % K or (place.tp > 1) != (place.base is not None):
            raise ValueError(f"{H} query heads for {K} KV heads at {place}")
        pointers = (tensor.data_ptr() for tensor in layer)
        return LayerArgs(
            *pointers,
            D,
            H,
            K,
            E,
            F,
            n_chunks,
            eps,
            place.base,
            place.tp,
            place.rank,
            fp32_sums,
            place.timeout_s,
        )


class Numerators:
    """Softmax numerators of logits, as integers (see sampling/numerators.py)."""

    def __init__(self, library: ctypes.CDLL):
        self._softmax_numerators, self._chunk_sums = library.softmax_numerators, library.chunk_sums

    def softmax_numerators(
        self, logits: torch.Tensor, temperature: torch.Tensor, best: torch.Tensor
    ) -> torch.Tensor:
        """logits: (R, n) fp32, with any stride between rows; others: (R, 1) fp32 -> (R, n)
        int64."""
        R, n = self._require(logits, temperature, best)
        out = torch.empty((R, n), dtype=torch.int64)
        pointers = temperature.data_ptr(), best.data_ptr(), out.data_ptr()
        self._softmax_numerators(logits.data_ptr(), logits.stride(0), *pointers, R, n)
        return out

    def chunk_sums(
        self, logits: torch.Tensor, temperature: torch.Tensor, best: torch.Tensor, size: int
    ) -> torch.Tensor:
        """Sums of the numerators of every `size` tokens: (R, V) -> (R, ceil(V / size)) int64."""
        R, V = self._require(logits, temperature, best)
        out = torch.empty((R, -(-V // size)), dtype=torch.int64)
        pointers = temperature.data_ptr(), best.data_ptr(), out.data_ptr()
        self._chunk_sums(logits.data_ptr(), logits.stride(0), *pointers, R, V, size)
        return out

    def _require(
        self, logits: torch.Tensor, temperature: torch.Tensor, best: torch.Tensor
    ) -> tuple[int, int]:
        R, n = sizes("logits", logits, "RV")
        require_rows("logits", logits, torch.float32, R, n)
        require("temperature", temperature, torch.float32, R, 1)
        require("best", best, torch.float32, R, 1)
        return R, n


class SharedMemory:
    """Collectives through shared memory. Each returns False if the other ranks do not come in
    time."""

    def __init__(self, library: ctypes.CDLL):
        self._sum = {dtype: getattr(library, f"shared_sum_{DTYPES[dtype]}") for dtype in DTYPES}
        self._gather, self._broadcast = library.shared_gather, library.shared_broadcast

    def sum(self, place: Place, x: torch.Tensor) -> bool:
        """x = the sum over the ranks, as one binary tree. x: fp32 or bf16 of any shape."""
        if x.dtype not in self._sum:
            raise ValueError(f"sums are of float32 and bfloat16, not of {x.dtype}")
        require("x", x, x.dtype, *x.shape)
        return bool(self._sum[x.dtype](*place, x.data_ptr(), x.numel()))

    def gather(self, place: Place, x: torch.Tensor, out: torch.Tensor) -> bool:
        """Every rank's x -> out (tp, *x.shape), in rank order. x: of any shape and dtype."""
        require("x", x, x.dtype, *x.shape)
        require("out", out, x.dtype, place.tp, *x.shape)
        return bool(self._gather(*place, x.data_ptr(), out.data_ptr(), x.nbytes))

    def broadcast(self, place: Place, x: torch.Tensor) -> bool:
        """Rank 0's x -> x on every rank. x: of any shape and dtype, the same on all ranks."""
        require("x", x, x.dtype, *x.shape)
        return bool(self._broadcast(*place, x.data_ptr(), x.nbytes))


def read_all(library: ctypes.CDLL, x: torch.Tensor) -> int:
    """Reads all memory of x as fast as the threads can; -> a checksum. x: (n,) int32 on CPU, n a
    multiple of 1024."""
    (n,) = sizes("x", x, "N")
    require("x", x, torch.int32, n)
    if n % 1024:
        raise ValueError(f"x has {n} elements, not a multiple of 1024")
    return int(library.read_all(x.data_ptr(), x.nbytes // 8))
