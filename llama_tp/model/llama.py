"""Llama 3 on one rank: all of its mathematics.

The parts and names are those of Meta's llama-models `model.py`; what differs:

* A rank holds some of the heads, of the ffn's columns and of the vocabulary. `wo` and `w2` give
  partial sums, and a layer sums over the ranks twice: each time as one operation "sum over the
  ranks, add the residual, norm".
* wq, wk and wv are one product, and so are w1 and w3.
* The tokens of all sequences of a step lie in one dimension, prefills and decodes together; keys
  and values lie in a paged cache.

A backend may do any of it in another way (llama_tp/backends), with the same numbers within the
dtype's rounding.

Tensor letters are sizes *on this rank*: T tokens in the step, D dim, H query heads, K KV heads, E
head dim, F ffn dim, V vocabulary rows, R rows whose logits are wanted.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from llama_tp.arch.shard_map import Shard
from llama_tp.backends.base import ForwardBatch, LayerRunner, LayerShape, LayerWeights
from llama_tp.backends.kv_cache import KVCache
from llama_tp.backends.select import Backends
from llama_tp.model.linear import (
    ColumnParallelLinear,
    ParallelLinear,
    Partials,
    RowParallelLinear,
    ShardedWeight,
    VocabParallelEmbedding,
)
from llama_tp.model.rope import RotaryTable
from llama_tp.parallel.groups import Ranks

Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin of a step's angles, (T, 1, E/2) fp32 each


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight (arXiv 1910.07467), in fp32 but for the last product, as Meta does. x:
    (T, D), weight: (D,) -> (T, D)."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each pair (2i, 2i + 1) of a head by its position's angle (arXiv 2104.09864). x: (T,
    heads, E); cos, sin: (T, 1, E/2) fp32 -> (T, heads, E) in x's dtype.

    Products and sums are separate operations on purpose: a fused multiply-add rounds differently in
    a vector loop and in its tail, so that bits would depend on how many heads this rank holds.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (T, heads, E/2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]  # (T, heads, E/2) each
    out = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return out.flatten(-2).to(x.dtype)  # (T, heads, E)


def silu_fixed(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), with bits that do not depend on an element's place in the tensor: torch's own
    silu takes another exp in the last elements of a vector loop (fp32: 2% of them differ),
    `torch.exp` takes the same one everywhere."""
    x32 = x.float()
    return (x32 / (1 + torch.exp(-x32))).to(x.dtype)


class TorchElementwise:
    """The arithmetic between the products as the plain backend: every device and dtype.

    fixed_bits: deterministic mode; torch's own silu is faster and less strict.
    """

    name = "torch"

    def __init__(self, fixed_bits: bool = False):
        self.silu: Callable[[torch.Tensor], torch.Tensor] = silu_fixed if fixed_bits else F.silu

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if delta is not None:
            x += delta
        return rms_norm(x, weight, eps)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate(x, cos, sin)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)  # (T, F) each
        return self.silu(gate) * up


class RMSNorm(ShardedWeight):
    """Sums over the ranks, adds the residual, norms."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype, backends: Backends):
        super().__init__((dim,), dtype)
        self.eps, self.elementwise = eps, backends.elementwise

    def __call__(self, x: torch.Tensor, partials: Partials | None) -> torch.Tensor:
        """x (T, D), the residual stream, += the sum of `partials` over the ranks, in place. -> (T,
        D), x normed."""
        delta = None if partials is None else partials.sum_over_ranks()  # (T, D)
        return self.elementwise.add_norm(x, delta, self.weight, self.eps)


class Attention:
    """wo(softmax(q k^T / sqrt(E)) v): grouped-query attention of this rank's heads."""

    def __init__(
        self,
        shape: LayerShape,
        ranks: Ranks,
        dtype: torch.dtype,
        deterministic: bool,
        backends: Backends,
    ):
        D, H, K, E = shape.dim, shape.n_heads, shape.n_kv_heads, shape.head_dim
        n_chunks = shape.wo_chunks
        self.H, self.K, self.E = H, K, E
        self.backend, self.elementwise = backends.attention, backends.elementwise
        self.wqkv = ColumnParallelLinear(D, (H + 2 * K) * E, dtype, backends)
        self.wo = RowParallelLinear(H * E, D, dtype, ranks, backends, n_chunks, deterministic)

    def __call__(
        self, x: torch.Tensor, batch: ForwardBatch, rotary: Rotary, cache: KVCache, layer: int
    ) -> Partials:
        T, H, K, E = len(x), self.H, self.K, self.E
        qkv = self.wqkv(x).view(T, H + 2 * K, E)  # (T, H + 2K, E)
        qk, v = qkv.split((H + K, K), dim=1)  # (T, H + K, E), (T, K, E)
        q, k = self.elementwise.rotate(qk, *rotary).split((H, K), dim=1)  # (T, H, E), (T, K, E)
        self.backend.write(cache, layer, batch.slots, k, v)
        # softmax(q k^T / sqrt(E)) v over the cached positions of a row's sequence, up to its own
        out = self.backend.attend(q, cache, layer, batch.plan)  # (T, H, E)
        return self.wo(out.reshape(T, H * E))  # Partials of (T, D)


class FeedForward:
    """w2(silu(w1 x) * w3 x)."""

    def __init__(
        self,
        shape: LayerShape,
        ranks: Ranks,
        dtype: torch.dtype,
        deterministic: bool,
        backends: Backends,
    ):
        D, n_chunks = shape.dim, shape.w2_chunks
        self.F, self.elementwise = shape.ffn_dim, backends.elementwise
        self.w13 = ColumnParallelLinear(D, 2 * self.F, dtype, backends)
        self.w2 = RowParallelLinear(self.F, D, dtype, ranks, backends, n_chunks, deterministic)

    def __call__(self, x: torch.Tensor) -> Partials:
        gate_up = self.w13(x)  # (T, 2F)
        return self.w2(self.elementwise.silu_mul(gate_up))  # (T, F) -> Partials of (T, D)


class Layer:
    """x + attention(norm(x)), then x + feed_forward(norm(x)). What the last half adds is added by
    the norm that comes next."""

    def __init__(
        self,
        shape: LayerShape,
        ranks: Ranks,
        dtype: torch.dtype,
        deterministic: bool,
        backends: Backends,
    ):
        self.attention_norm = RMSNorm(shape.dim, shape.norm_eps, dtype, backends)
        self.attention = Attention(shape, ranks, dtype, deterministic, backends)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps, dtype, backends)
        self.feed_forward = FeedForward(shape, ranks, dtype, deterministic, backends)

    def __call__(
        self,
        x: torch.Tensor,
        partials: Partials | None,
        batch: ForwardBatch,
        rotary: Rotary,
        cache: KVCache,
        layer: int,
    ) -> Partials:
        """x: (T, D), changed in place; partials: what the layer before adds to it. -> what this one
        adds."""
        h = self.attention_norm(x, partials)  # (T, D)
        partials = self.attention(h, batch, rotary, cache, layer)
        h = self.ffn_norm(x, partials)  # (T, D)
        return self.feed_forward(h)


class Transformer:
    """One rank's model. Its weights are on the meta device until destinations.py fills them.

    Args:
        shard: what this rank holds, and the whole model's sizes.
        ranks: this rank and its peers.
        dtype: of weights and activations.
        n_positions: longest sequence, for the rotary table.
        deterministic: fixed summation order, bits that do not depend on the company, the chunking
            or tp.
        backends: what to compute with.

    Attributes:
        min_rows: fewest rows a step must have for a row's bits not to depend on their number (1: it
            never does, or no promise is made). Known once the weights are loaded.
    """

    def __init__(
        self,
        shard: Shard,
        ranks: Ranks,
        dtype: torch.dtype,
        n_positions: int,
        deterministic: bool,
        backends: Backends,
    ):
        config = shard.config
        self.config, self.ranks, self.dtype = config, ranks, dtype
        self.n_positions, self.deterministic, self.backends = n_positions, deterministic, backends
        D, V = config.dim, shard.vocab.width
        shape = LayerShape.of(shard, deterministic)
        self.tok_embeddings = VocabParallelEmbedding(
            shard.vocab, D, dtype, ranks, backends, config.tied
        )
        self.layers = [
            Layer(shape, ranks, dtype, deterministic, backends) for _ in range(config.n_layers)
        ]
        self.norm = RMSNorm(D, config.norm_eps, dtype, backends)
        self.output: ParallelLinear = (
            self.tok_embeddings if config.tied else ColumnParallelLinear(D, V, dtype, backends)
        )
        self.rotary = RotaryTable(config, n_positions, ranks.device)
        self.min_rows = 1
        self.run_layers: LayerRunner = self.layer_by_layer

    def __call__(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """All tokens of a step through all layers. -> (T, D), normed, ready for `logits`."""
        rotary = self.rotary(batch.positions)
        x = self.tok_embeddings(batch.ids)  # (T, D)
        return self.run_layers(x, batch, rotary, cache)

    def layer_by_layer(
        self, x: torch.Tensor, batch: ForwardBatch, rotary: Rotary, cache: KVCache
    ) -> torch.Tensor:
        """The LayerRunner that shows what every other one does. x: (T, D) -> (T, D), normed."""
        partials = None
        for i, layer in enumerate(self.layers):
            partials = layer(x, partials, batch, rotary, cache, i)
        return self.norm(x, partials)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(R, D) -> (R, V) fp32: this rank's vocabulary rows, padding included."""
        return self.head(x).float()

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """The same in the model's dtype."""
        R = len(x)
        if R < self.min_rows:
            x = F.pad(x, (0, 0, 0, self.min_rows - R))
        return self.output.linear(x)[:R]  # (R, V)

    def padded_rows(self, n: int) -> int:
        """How many rows a step of n tokens is computed with."""
        return max(self.min_rows, self.backends.padded_rows(n))

    def weights_loaded(self) -> None:
        """Called once all weights are there: what runs the layers can now be made of them."""
        layers = [
            LayerWeights(
                layer.attention_norm.weight,
                layer.attention.wqkv.linear,
                layer.attention.wo.linear,
                layer.ffn_norm.weight,
                layer.feed_forward.w13.linear,
                layer.feed_forward.w2.linear,
            )
            for layer in self.layers
        ]
        if self.backends.make_layers:
            self.run_layers = self.backends.make_layers(layers, self.norm.weight)
        if self.deterministic:
            linears = [self.output.linear, *(linear for each in layers for linear in each.linears)]
            self.min_rows = max(linear.min_rows for linear in linears)
