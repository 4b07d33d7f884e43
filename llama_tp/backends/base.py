"""The protocols of the backends, and the records that they are given.

Each protocol has one plain implementation that runs everywhere, and faster ones that give the same
numbers within the dtype's rounding. Whatever is chosen, a row's bits do not depend on the other
rows of the step, on how its prompt was cut into chunks, or on how many ranks share the heads (on
CUDA, and where compiled, no such promise is made).

Tensor letters are sizes on this rank: T tokens in the step, B sequences, D dim, H query heads, K KV
heads, E head dim, F ffn dim, N KV blocks, S slots a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from llama_tp.arch.shard_map import Shard
from llama_tp.backends.kv_cache import KVCache, Slots
from llama_tp.native.calls import Place

Plan = TypeVar("Plan")


class LayerShape(NamedTuple):
    """Sizes of a layer on one rank.

    wo_chunks, w2_chunks: K-chunks of the row-parallel products on this rank (1 unless
    deterministic). n_partials: most partial sums that any rank has of such a product.
    """

    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float
    wo_chunks: int
    w2_chunks: int
    n_partials: int = 1

    @classmethod
    def of(cls, shard: Shard, deterministic: bool) -> "LayerShape":
        """The shape of what `shard` holds."""
        return cls(
            shard.config.dim,
            len(shard.query_heads),
            len(shard.kv_heads),
            shard.config.head_dim,
            shard.ffn.width,
            shard.config.norm_eps,
            len(shard.query_leaves) if deterministic else 1,
            len(shard.ffn_leaves) if deterministic else 1,
            shard.n_partials if deterministic else 1,
        )

    @property
    def linears(self) -> dict[str, tuple[int, int, int]]:
        """(out, in, K-chunks) of each product of a layer."""
        D, H, K, E, F, _, wo_chunks, w2_chunks, _ = self
        return {
            "wqkv": ((H + 2 * K) * E, D, 1),
            "wo": (D, H * E, wo_chunks),
            "w13": (2 * F, D, 1),
            "w2": (D, F, w2_chunks),
        }


class Span(NamedTuple):
    """Consecutive tokens of one sequence in a step: rows [row, row + n) of the step are positions
    [start, start + n) of the sequence."""

    row: int
    start: int
    n: int
    blocks: list[int]  # the sequence's block table, at least up to position start + n - 1


class Attention(Protocol[Plan]):
    """Attention over the paged KV cache.

    It owns the layout of the cache, and the plan of a step: `plan` makes one, `attend` reads it,
    and nobody else looks inside.

    Attributes:
        name: for people.
        block_size: S, slots a KV block.
    """

    name: str
    block_size: int

    def new_cache(self, n_layers: int, n_blocks: int, block_size: int | None = None) -> KVCache:
        """An empty cache in this backend's layout. block_size: another than the attribute, for
        tests."""

    def plan(self, spans: list[Span], cache: KVCache, n_tokens: int) -> Plan:
        """What `attend` must know about a step of `n_tokens` rows, made once for all layers. Rows
        that are in no span are padding."""

    def plan_decodes(self, table: torch.Tensor, positions: torch.Tensor) -> Plan:
        """The plan of a step with one row for each of B sequences, from tensors on the device, so
        that a CUDA graph can hold it. table: (B, W) int32 block ids, padded with the empty block;
        positions: (B,) int64."""

    def table_widths(self, n_rows: int, most: int) -> list[int]:
        """The widths W, in blocks, for which decodes of `n_rows` rows should be captured, from
        small to large. most: the width that holds the longest sequence."""

    def write(
        self, cache: KVCache, layer: int, slots: Slots, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Stores this step's keys and values, (T, K, E) each with any stride between rows."""

    def attend(self, q: torch.Tensor, cache: KVCache, layer: int, plan: Plan) -> torch.Tensor:
        """softmax(q k^T / sqrt(E)) v of every row, over its sequence's cached positions up to and
        including its own. q: (T, H, E), rotated, with any stride between rows -> (T, H, E) in q's
        dtype; rows of padding hold zeros or anything finite."""


class Linear(Protocol):
    """One rank's cut of an (out, in) weight. It multiplies, and nothing else.

    Attributes:
        min_rows: from this many rows on, a row's bits depend neither on the number of rows nor on
            how many of the weight's rows this rank holds. Fewer rows are padded by the caller.
    """

    min_rows: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) -> (T, out), x W^T in x's dtype."""

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        """The same sums in fp32, to be added to those of other ranks. (T, in) -> (T, out) fp32."""


class EmbeddingLinear(Linear, Protocol):
    """A Linear whose weight is the embedding as well."""

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight: (T,) int64 -> (T, in). Raises IndexError for an id outside."""


class LinearBackend(Protocol):
    """Makes Linears of weights.

    Attributes:
        name: for people.
    """

    name: str

    def takes(self, n_in: int, n_chunks: int) -> bool:
        """Whether it can make a Linear with so many inputs in so many K-chunks."""

    def linear(self, weight: torch.Tensor, n_chunks: int = 1) -> Linear:
        """What multiplies with `weight` (out, in), whose memory it may take over. n_chunks: parts
        of the inputs, summed in fp32 as one binary tree (arch.summation)."""

    def embedding(self, weight: torch.Tensor) -> EmbeddingLinear:
        """The same for a weight whose rows are looked up, too."""

    def padded_rows(self, n: int) -> int:
        """How many rows a step of n tokens should have: at least n."""


class Elementwise(Protocol):
    """The arithmetic between the products. The plain one is model/llama.py's.

    Attributes:
        name: for people.
    """

    name: str

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """x += delta in place, if there is one; -> the RMS norm of x. x, delta: (T, D); weight:
        (D,) -> (T, D)."""

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotates each pair (2i, 2i + 1) of a head by its position's angle; may do so in place. x:
        (T, heads, E) with any stride between rows; cos, sin: (T, 1, E/2) fp32 -> (T, heads, E)."""

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. (T, 2F), gates first -> (T, F)."""


@dataclass(frozen=True)
class ForwardBatch:
    """What one forward pass computes: T tokens of any sequences, where they are stored and what
    they attend to."""

    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64
    slots: Slots
    plan: Any  # the attention backend's own


class LayerWeights(NamedTuple):
    """One layer as a layer runner needs it. The norms are (D,), the rest Linears."""

    attention_norm: torch.Tensor
    wqkv: Linear
    wo: Linear
    ffn_norm: torch.Tensor
    w13: Linear
    w2: Linear

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.wqkv, self.wo, self.w13, self.w2


class LayerRunner(Protocol):
    """All layers of a step, and the norm behind the last. The plain one is the loop in
    model/llama.py."""

    def __call__(
        self,
        x: torch.Tensor,
        batch: ForwardBatch,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: KVCache,
    ) -> torch.Tensor:
        """x: (T, D) embeddings, which it may overwrite; rotary: cos and sin, (T, 1, E/2) fp32 each
        -> (T, D), normed. Raises RuntimeError when the other ranks do not come to a sum in
        time."""


class SharedSums(Protocol):
    """Sums over the ranks in memory that all of them have mapped, for C++ that sums between two
    products (parallel.shared_memory has one).

    Attributes:
        place: this rank's, as native/shared.cpp takes it.
        late: what to say when the other ranks did not come.
    """

    @property
    def place(self) -> Place: ...

    @property
    def late(self) -> str: ...


@dataclass(frozen=True)
class Peers:
    """What the backends are handed of the other ranks.

    Attributes:
        rank, tp: which of how many that share the model.
        failed: every rank calls it with whether something failed there; -> the ranks on which it
            did.
        shared_sums: None where sums go another way.
        count_collectives: is told of sums that were made without the parallel package.
    """

    rank: int
    tp: int
    failed: Callable[[bool], list[int]]
    shared_sums: SharedSums | None
    count_collectives: Callable[[int], None]
