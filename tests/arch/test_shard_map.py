"""Axes dealt to ranks, evenly and not: every unit is held, and padding stays at the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_tp.arch.config import ModelConfig
from llama_tp.arch.errors import UserError
from llama_tp.arch.memory import kv_bytes_per_token, weight_bytes
from llama_tp.arch.shard_map import Axis, Range, ShardMap
from llama_tp.arch.weights import table

EIGHT = ModelConfig(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=8, ffn_dim=100, vocab_size=77
)
GROUPED = ModelConfig(
    dim=64, n_layers=1, n_heads=16, n_kv_heads=4, head_dim=4, ffn_dim=100, vocab_size=77
)


def made_up(config: ModelConfig, dealt: tuple[int, ...]) -> ShardMap:
    """All three axes in as many leaves, dealt alike."""
    query = Axis(config.n_heads * config.head_dim, dealt)
    return ShardMap(config, query, Axis(config.ffn_dim, dealt), Axis(config.vocab_size, dealt))


@given(st.integers(1, 300), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_deal_holds_every_unit_once(size, dealt):
    axis = Axis(size, tuple(dealt))
    parts = [axis.of(rank) for rank in range(len(dealt))]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(size))
    assert [part.width for part in parts] == [n * axis.leaf for n in dealt]
    assert all(0 <= len(part) <= part.width for part in parts)
    leaves = [leaf for rank in range(len(dealt)) for leaf in axis.leaves(rank)]
    assert leaves == list(range(axis.n_leaves)) and axis.leaf * axis.n_leaves >= size


def test_uneven_parts_of_every_weight_cover_it():
    """3 + 3 + 2 eighths: what each rank holds of each weight, put together, is the weight."""
    shards = made_up(EIGHT, (3, 3, 2)).shards()
    assert [shard.query_heads for shard in shards] == [
        Range(0, 3, 3),
        Range(3, 6, 3),
        Range(6, 8, 2),
    ]
    assert [shard.kv_heads for shard in shards] == [shard.query_heads for shard in shards]
    assert [shard.ffn for shard in shards] == [
        Range(0, 39, 39),
        Range(39, 78, 39),
        Range(78, 100, 26),
    ]
    assert [shard.vocab for shard in shards] == [
        Range(0, 30, 30),
        Range(30, 60, 30),
        Range(60, 77, 20),
    ]
    for weight in table(EIGHT):
        parts = [weight.part(shard) for shard in shards]
        if weight.cut.value is not None:
            covered = [i for part in parts for i in range(part.start, part.stop)]
            assert covered == list(range(weight.shape[weight.cut.value]))


def test_memory_is_that_of_the_rank():
    """Figures by hand: 3 of 8 heads and leaves, then 2 of 8."""
    shards = made_up(EIGHT, (3, 3, 2)).shards()
    D, E, layers = 64, 8, 2
    for shard, n, ffn, vocab in zip(shards, (3, 3, 2), (39, 39, 26), (30, 30, 20)):
        layer = 4 * n * E * D + 3 * ffn * D + 2 * D
        assert weight_bytes(shard, 2) == 2 * (layers * layer + 2 * vocab * D + D)
        assert kv_bytes_per_token(shard, 2) == 2 * 2 * layers * n * E


def test_ranks_above_the_kv_heads_hold_copies():
    shards = ShardMap.even(GROUPED, 8).shards()
    assert [(shard.kv_heads.start, len(shard.kv_heads)) for shard in shards] == [
        (rank * 4 // 8, 1) for rank in range(8)
    ]


def test_even_parts_have_the_leaves_of_tp_1_where_they_can():
    assert [tp for tp in EIGHT.possible_tp() if ShardMap.even(EIGHT, tp).fixes_sums] == [1, 2, 4, 8]
    assert ShardMap.even(EIGHT, 2).shard(1).ffn_leaves == range(4, 8)
    assert made_up(EIGHT, (3, 3, 2)).fixes_sums  # the same leaves, dealt in another way


@pytest.mark.parametrize(
    "dealt, says",
    [((1, 31), "a part of a query head"), ((1, 7, 8), "several KV"), ((3, 13), "several KV")],
)
def test_heads_stay_whole(dealt, says):
    """16 query heads in groups of 4: a rank holds whole groups, or a part of one."""
    with pytest.raises(ValueError, match=says):
        made_up(GROUPED, dealt)
    made_up(GROUPED, (4, 12))
    made_up(GROUPED, (2, 2, 4, 8))


def test_what_heads_do_not_allow_is_refused():
    with pytest.raises(UserError, match=r"3 ranks.*1, 2, 4, 8"):
        ShardMap.even(EIGHT, 3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ShardMap.even(EIGHT, 2).shard(2)
