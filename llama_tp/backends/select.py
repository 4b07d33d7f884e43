"""Which backend computes what on this machine: the only place that chooses.

It returns what it chose and, for each better one that it did not take, why, for the launch to say
aloud. The order of preference:

| | CPU | CUDA |
|---|---|---|
| attention | C++; torch | FlashAttention; torch |
| products | C++ (not on CPUs with AMX); oneDNN; torch | torch |
| elementwise | C++; torch | torch.compile (not in deterministic mode); torch |
| layers | C++, if all products are; llama.py's loop | llama.py's loop |
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from llama_tp.backends.attention.flash import open_flash
from llama_tp.backends.attention.native import NativeAttention
from llama_tp.backends.attention.tiles import TileAttention
from llama_tp.backends.base import (
    Attention,
    Elementwise,
    EmbeddingLinear,
    LayerRunner,
    LayerShape,
    LayerWeights,
    Linear,
    LinearBackend,
    Peers,
)
from llama_tp.backends.elementwise.compiled import try_compiled
from llama_tp.backends.elementwise.native import NativeElementwise
from llama_tp.backends.layer.native import NativeLayers
from llama_tp.backends.linear.dense import DenseLinears, can_pack
from llama_tp.backends.linear.native import NativeLinears
from llama_tp.native.calls import DTYPES, Functions
from llama_tp.native.library import load

DENSE = DenseLinears()


@dataclass(frozen=True)
class Backends:
    """What was chosen.

    Attributes:
        attention, elementwise: what the model calls.
        linears: best first; a weight goes to the first that takes it, and the last takes any.
        make_layers: (weights of all layers, the last norm's weight) -> what runs them; None: the
            loop in llama.py.
        not_taken: for each better backend that was not chosen, a sentence that says why.
    """

    attention: Attention[Any]
    linears: tuple[LinearBackend, ...]
    elementwise: Elementwise
    make_layers: Callable[[list[LayerWeights], torch.Tensor], LayerRunner] | None = None
    not_taken: tuple[str, ...] = ()

    @property
    def block_size(self) -> int:
        """Slots of a KV block."""
        return self.attention.block_size

    @property
    def name(self) -> str:
        """For people: C++, or torch + FlashAttention."""
        names = (self.linears[0].name, self.attention.name, self.elementwise.name)
        return " + ".join(dict.fromkeys(names))

    def linear(self, weight: torch.Tensor, n_chunks: int = 1) -> Linear:
        """What multiplies with `weight` (out, in), whose memory it may take over."""
        return self._takes(weight, n_chunks).linear(weight, n_chunks)

    def embedding(self, weight: torch.Tensor, tied: bool) -> EmbeddingLinear:
        """What looks up rows of `weight` (V, D). tied: it is multiplied with, too."""
        return (self._takes(weight, 1) if tied else DENSE).embedding(weight)

    def padded_rows(self, n: int) -> int:
        """How many rows a step of n tokens should have: at least n."""
        return self.linears[0].padded_rows(n)

    def _takes(self, weight: torch.Tensor, n_chunks: int) -> LinearBackend:
        return next(each for each in self.linears if each.takes(weight.shape[1], n_chunks))


def select(
    device: torch.device,
    dtype: torch.dtype,
    shape: LayerShape,
    deterministic: bool,
    plain: Elementwise,
    peers: Peers,
) -> Backends:
    """The fastest that this machine has; on CUDA, the fastest that all ranks have, since the driver
    deals out blocks of one size. Every rank calls it.

    Args:
        shape: of a layer on this rank.
        deterministic: whether bits must not depend on the company, the chunking or tp.
        plain: the elementwise arithmetic in torch (model/llama.py).
        peers: the other ranks.
    """
    chosen = select_plain(device, dtype, shape, plain)
    if device.type == "cuda":
        flash = open_flash(shape, dtype, device, deterministic)
        failed = peers.failed(isinstance(flash, str))
        if not isinstance(flash, str) and not failed:
            return replace(chosen, attention=flash)
        why = flash if isinstance(flash, str) else f"rank {failed[0]} cannot use it"
        said = f"attention runs in plain torch, slower: no paged FlashAttention here: {why}"
        return replace(chosen, not_taken=(said,))
    if device.type != "cpu":
        return chosen
    library = load()
    if library is None:
        said = (
            "the C++ parts are not built for this machine: attention runs in plain torch, sums go "
            "through gloo, both slower; to build them: python -m llama_tp.native.build"
        )
        return replace(chosen, not_taken=(said,))
    if dtype not in DTYPES:
        said = f"attention runs in plain torch, slower: the C++ parts do not compute in {dtype}"
        return replace(chosen, not_taken=(said.replace("torch.", ""),))
    functions, linears = Functions(library, dtype), select_linears(device, dtype)
    why_not = no_native_layers(linears, shape, peers)
    said = f"layers run a function at a time, some 2 ms a token slower: {why_not}"
    return Backends(
        NativeAttention(functions, shape),
        linears,
        NativeElementwise(functions),
        None if why_not else partial(NativeLayers, functions, shape, deterministic, peers),
        (said,) if why_not else (),
    )


def select_plain(
    device: torch.device, dtype: torch.dtype, shape: LayerShape, plain: Elementwise
) -> Backends:
    """Plain torch: every device and dtype, and what the others are tested against."""
    return Backends(TileAttention(shape, dtype, device), (DENSE,), plain)


def select_linears(device: torch.device, dtype: torch.dtype) -> tuple[LinearBackend, ...]:
    """The linears of this machine, best first."""
    library = load() if device.type == "cpu" and dtype in DTYPES else None
    functions = Functions(library, dtype) if library else None
    if functions and functions.inputs_together:
        return (NativeLinears(functions), DENSE)
    return (DENSE,)  # on CPUs that multiply whole tiles (AMX) oneDNN does better


def no_native_layers(
    linears: tuple[LinearBackend, ...], shape: LayerShape, peers: Peers
) -> str | None:
    """Why layers cannot be one call of C++ each, given that attention is in C++; None if they
    can."""
    if not isinstance(linears[0], NativeLinears):
        return "the products are oneDNN's, which are faster on this CPU"
    for name, (_, n_in, n_chunks) in shape.linears.items():
        if not linears[0].takes(n_in, n_chunks):
            return f"{name} has {n_in} inputs in {n_chunks} parts, too odd for the C++ products"
    if shape.n_partials > 1:
        return f"a rank holds {shape.n_partials} parts of a sum, and the C++ layer adds one"
    if shape.wo_chunks != shape.w2_chunks:
        return f"wo is in {shape.wo_chunks} parts and w2 in {shape.w2_chunks}, not in as many"
    if peers.tp > 1 and peers.shared_sums is None:
        return "sums over the ranks are not in shared memory"
    return None


def select_compiled(
    chosen: Backends,
    device: torch.device,
    dtype: torch.dtype,
    shape: LayerShape,
    deterministic: bool,
    peers: Peers,
) -> Backends:
    """`chosen`, on CUDA and not in deterministic mode with its elementwise arithmetic compiled: 10
    to 20 s the first time, and so not part of `select`. Every rank calls it."""
    if device.type != "cuda" or deterministic:
        return chosen
    return with_compiled(chosen, device, dtype, shape, peers)


def with_compiled(
    chosen: Backends,
    device: torch.device,
    dtype: torch.dtype,
    shape: LayerShape,
    peers: Peers,
    compiler: Callable[..., Callable[..., Any]] = torch.compile,
) -> Backends:
    """`chosen` with its elementwise arithmetic compiled, if that works on all ranks; if not, the
    first rank on which it does not has the reason."""
    compiled = try_compiled(chosen.elementwise, shape, dtype, device, compiler)
    failed = peers.failed(isinstance(compiled, str))
    if not isinstance(compiled, str):
        return chosen if failed else replace(chosen, elementwise=compiled)
    if failed[0] != peers.rank:
        return chosen
    said = (
        "torch.compile is of no use here, the arithmetic between the products stays plain torch: "
        f"{compiled}"
    )
    return replace(chosen, not_taken=(*chosen.not_taken, said))


def fixes_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this machine can give a row the same bits whatever else is in the
    step."""
    return device.type == "cpu" and (
        can_pack(dtype, device) or (load() is not None and dtype in DTYPES)
    )
