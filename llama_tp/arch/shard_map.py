"""Which query heads, KV heads, FFN columns and vocabulary rows each rank holds.

Three axes are dealt to the ranks, each by itself: the columns of the query heads (KV heads follow
from them), the FFN columns and the vocabulary rows. An axis is cut into leaves of one width, the
last padded with zeros where the width does not divide, and a rank holds a run of leaves. The leaves
of the first two axes are the K-chunks of the row-parallel products (wo and w2). Their partial sums
are added as one binary tree over all leaves, so no deal changes a bit of a sum.

`ShardMap.even` deals equal parts, which is what runs today. Nothing outside this module may assume
that parts are equal, or that a rank's place on the map is its rank among all processes.
"""

from dataclasses import dataclass
from functools import cached_property

from llama_tp.arch.config import DETERMINISTIC_CHUNKS, ModelConfig
from llama_tp.arch.summation import subtrees


@dataclass(frozen=True)
class Range:
    """Units [start, stop) of an axis. `width` >= stop - start units are held; the rest is zeros."""

    start: int
    stop: int
    width: int

    def __len__(self) -> int:
        return self.stop - self.start

    def times(self, n: int) -> "Range":
        """The same in units that are n to one of these: heads to columns."""
        return Range(self.start * n, self.stop * n, self.width * n)


@dataclass(frozen=True)
class Axis:
    """One axis and how its leaves are dealt.

    Args:
        size: units on the axis (columns, rows).
        dealt: how many leaves each rank holds, in rank order.
    """

    size: int
    dealt: tuple[int, ...]

    @property
    def n_leaves(self) -> int:
        return sum(self.dealt)

    @property
    def leaf(self) -> int:
        """Units of a leaf, padding included."""
        return -(-self.size // self.n_leaves)

    def leaves(self, rank: int) -> range:
        """The leaves that `rank` holds."""
        first = sum(self.dealt[:rank])
        return range(first, first + self.dealt[rank])

    @cached_property
    def subtrees(self) -> list[list[range]]:
        """For each rank, its leaves as subtrees of a sum over all leaves (arch.summation)."""
        return [subtrees(self.leaves(rank), self.n_leaves) for rank in range(len(self.dealt))]

    @cached_property
    def n_partials(self) -> int:
        """Partial sums of the rank that has most; 1 where every rank holds one subtree."""
        return max(map(len, self.subtrees))

    def of(self, rank: int) -> Range:
        """The units that `rank` holds."""
        leaves = self.leaves(rank)
        start, stop = (min(leaf * self.leaf, self.size) for leaf in (leaves.start, leaves.stop))
        return Range(start, stop, len(leaves) * self.leaf)


@dataclass(frozen=True)
class ShardMap:
    """How a model is dealt to `n_ranks` ranks.

    Args:
        config: the whole model's sizes.
        query: the columns of all query heads (n_heads * head_dim), which are wo's inputs.
        ffn: the FFN columns, which are w2's inputs.
        vocab: the rows of embedding and head.

    Raises ValueError if a rank would hold a part of a head, or query heads of several KV heads
    without holding all of each.
    """

    config: ModelConfig
    query: Axis
    ffn: Axis
    vocab: Axis

    def __post_init__(self) -> None:
        group = self.config.n_heads // self.config.n_kv_heads * self.config.head_dim
        for rank in range(self.n_ranks):
            part = self.query.of(rank)
            if part.start % self.config.head_dim or part.stop % self.config.head_dim:
                raise ValueError(f"rank {rank} would hold a part of a query head: {part}")
            whole_groups = part.start % group == part.stop % group == 0
            if not whole_groups and part.start // group != (part.stop - 1) // group:
                raise ValueError(f"rank {rank} would hold parts of several KV heads: {part}")

    @classmethod
    def even(cls, config: ModelConfig, n_ranks: int) -> "ShardMap":
        """Equal parts. Raises UserError naming the possible degrees if the heads do not allow
        `n_ranks`."""
        config.check_tp(n_ranks)
        chunks = config.n_chunks(n_ranks) // n_ranks
        return cls(
            config,
            query=Axis(config.n_heads * config.head_dim, (chunks,) * n_ranks),
            ffn=Axis(config.ffn_dim, (chunks,) * n_ranks),
            vocab=Axis(config.vocab_size, (1,) * n_ranks),
        )

    @property
    def n_ranks(self) -> int:
        return len(self.query.dealt)

    @property
    def fixes_sums(self) -> bool:
        """Whether the leaves are the ones of tp 1, so that sums have its bits."""
        return self.query.n_leaves == self.ffn.n_leaves == DETERMINISTIC_CHUNKS

    def shard(self, rank: int) -> "Shard":
        """What `rank` holds."""
        if not 0 <= rank < self.n_ranks:
            raise ValueError(f"rank {rank} of {self.n_ranks} ranks")
        return Shard(self, rank)

    def shards(self) -> "list[Shard]":
        """All of them, in rank order."""
        return [Shard(self, rank) for rank in range(self.n_ranks)]


@dataclass(frozen=True)
class Shard:
    """What one rank holds. All sizes are this rank's own."""

    map: ShardMap
    rank: int

    @property
    def config(self) -> ModelConfig:
        return self.map.config

    @cached_property
    def query_heads(self) -> Range:
        columns, width = self.map.query.of(self.rank), self.config.head_dim
        return Range(columns.start // width, columns.stop // width, len(columns) // width)

    @cached_property
    def kv_heads(self) -> Range:
        """The KV heads that its query heads read. Ranks that share a KV head hold a copy each."""
        group = self.config.n_heads // self.config.n_kv_heads
        start, stop = self.query_heads.start // group, -(-self.query_heads.stop // group)
        return Range(start, stop, stop - start)

    @cached_property
    def ffn(self) -> Range:
        return self.map.ffn.of(self.rank)

    @cached_property
    def vocab(self) -> Range:
        return self.map.vocab.of(self.rank)

    @property
    def query_leaves(self) -> range:
        """The K-chunks of wo that this rank multiplies with, of all ranks' `map.query.n_leaves`."""
        return self.map.query.leaves(self.rank)

    @property
    def ffn_leaves(self) -> range:
        """The K-chunks of w2 likewise."""
        return self.map.ffn.leaves(self.rank)

    @property
    def n_partials(self) -> int:
        """Partial sums of the rank that has most of them, the same on every rank."""
        return max(self.map.query.n_partials, self.map.ffn.n_partials)
