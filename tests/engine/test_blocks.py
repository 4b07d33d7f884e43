"""The block books: allocation, reuse, eviction, and a random walk beside a plain model of what they
should say."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llama_tp.engine.blocks import BlockManager, block_key
from tests.examples import examples

IDS = list(range(10, 26))


def keys_of(ids, block_size=4):
    keys = []
    BlockManager(1, block_size).extend_keys(keys, ids)
    return keys


def filled(blocks, ids):
    """Take blocks for `ids`, as a sequence would, register the full ones; returns its table."""
    table = blocks.take(blocks.n_for(len(ids)))
    for block, key in zip(table, keys_of(ids, blocks.block_size)):
        blocks.register(block, key)
    return table


def test_take_and_release():
    blocks = BlockManager(4, 4)
    table = blocks.take(3)
    assert table == [0, 1, 2] and blocks.n_free == 1
    blocks.check_integrity([table])
    blocks.release(table)
    assert blocks.n_free == 4
    blocks.check_integrity()


def test_taking_what_is_not_there_raises():
    blocks = BlockManager(2, 4)
    assert blocks.can_take(2, []) and not blocks.can_take(3, [])
    with pytest.raises(KeyError):
        blocks.take(3)


def test_keys_stand_for_the_whole_prefix():
    keys = keys_of(IDS)
    assert len(keys) == 4 and len(set(keys)) == 4 and all(len(key) == 32 for key in keys)
    assert keys_of(IDS[:7]) == keys[:1]  # only full blocks have a key
    assert keys_of([99] + IDS[1:])[3] != keys[3]  # a change far to the left shows
    assert keys[1] == block_key(keys[0], IDS[4:8]) != block_key(b"", IDS[4:8])
    assert block_key(b"", [1, 256]) != block_key(b"", [256, 1])
    again = keys[:2]
    BlockManager(1, 4).extend_keys(again, IDS)
    assert again == keys


def test_released_blocks_are_found_again():
    blocks = BlockManager(6, 4)
    table = filled(blocks, IDS)
    blocks.release(table)
    assert blocks.n_free == 6
    hits = blocks.match(keys_of(IDS + [1]), 17)
    assert hits == table
    assert blocks.take(1, hits) == table + [4] and blocks.n_free == 1


def test_at_least_one_token_is_left_to_compute():
    blocks = BlockManager(6, 4)
    table = filled(blocks, IDS)
    assert blocks.match(keys_of(IDS), 16) == table[:3]
    assert blocks.match(keys_of(IDS[:4]), 4) == []
    assert blocks.match(keys_of(IDS[:4]), 5) == table[:1]
    assert blocks.match(keys_of(IDS[:1]), 1) == []


def test_a_prefix_ends_at_the_first_difference():
    blocks = BlockManager(8, 4)
    table = filled(blocks, IDS)
    other = IDS[:8] + [77] + IDS[9:]
    assert blocks.match(keys_of(other), 16) == table[:2]
    assert blocks.match(keys_of(IDS[4:]), 12) == []  # same ids at another place: no hit


def test_held_blocks_are_shared():
    blocks = BlockManager(6, 4)
    table = filled(blocks, IDS)
    second = blocks.take(1, blocks.match(keys_of(IDS), 16))
    assert second[:3] == table[:3] and second[3] not in table
    blocks.check_integrity([table, second])
    blocks.release(table)
    assert blocks.n_free == 2  # the last of `table`, and one never used
    blocks.check_integrity([second])
    blocks.release(second)
    blocks.check_integrity()


def test_free_hits_count_against_the_free_blocks():
    blocks = BlockManager(4, 4)
    blocks.release(filled(blocks, IDS))
    hits = blocks.match(keys_of(IDS), 16)
    assert len(hits) == 3 and blocks.can_take(1, hits) and not blocks.can_take(2, hits)
    held = filled(blocks, [1, 2, 3, 4])
    assert blocks.match(keys_of(IDS), 16) == hits  # the tail was evicted, not the head
    assert not blocks.can_take(1, hits)
    blocks.release(held)


def test_eviction_takes_the_worthless_then_the_oldest_then_the_tail_of_a_chain():
    blocks = BlockManager(6, 4)
    old, new, partial = filled(blocks, IDS[:8]), filled(blocks, [1] * 8), blocks.take(2)
    for table in (old, new, partial):
        blocks.release(table)
    assert blocks.take(2) == partial
    assert blocks.take(4) == [old[1], old[0], new[1], new[0]]


def test_use_makes_a_block_young_again():
    blocks = BlockManager(4, 4)
    first, second = filled(blocks, IDS[:4]), filled(blocks, [1] * 4)
    blocks.take(2)
    blocks.release(first)
    blocks.release(second)
    blocks.release(blocks.take(0, first))
    assert blocks.take(1) == second


def test_a_taken_block_is_not_found_by_its_old_key():
    blocks = BlockManager(1, 4)
    blocks.release(filled(blocks, IDS[:4]))
    assert blocks.match(keys_of(IDS), 16) == [0]
    blocks.take(1)
    assert blocks.match(keys_of(IDS), 16) == []


def test_the_first_of_two_equal_blocks_is_kept():
    blocks = BlockManager(4, 4)
    first, second = filled(blocks, IDS[:4]), filled(blocks, IDS[:4])
    assert blocks.match(keys_of(IDS), 16) == first
    blocks.check_integrity([first, second])
    blocks.release(first)
    blocks.release(second)
    assert blocks.take(3)[0] == second[0] and blocks.match(keys_of(IDS), 16) == first


def test_without_prefix_cache_nothing_is_found():
    blocks = BlockManager(4, 4, prefix_cache=False)
    blocks.release(filled(blocks, IDS))
    assert blocks.match(keys_of(IDS), 16) == []
    blocks.check_integrity()


@pytest.mark.parametrize(
    "damage",
    [
        lambda blocks, table: blocks.n_holders.__setitem__(0, 2),
        lambda blocks, table: table.pop(),
        lambda blocks, table: blocks._free.popitem(),
        lambda blocks, table: blocks._free.__setitem__(table[0], None),
        lambda blocks, table: blocks._block_of.clear(),
        lambda blocks, table: blocks._key_of.__setitem__(3, b"x"),
    ],
)
def test_the_integrity_check_sees_damage(damage):
    blocks = BlockManager(4, 4)
    table = filled(blocks, IDS[:8])
    blocks.check_integrity([table])
    damage(blocks, table)
    with pytest.raises(RuntimeError):
        blocks.check_integrity([table])


class Walk(RuleBasedStateMachine):
    """Random holders beside a model that records what every block holds: (prefix of ids) or
    nothing."""

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(7, 2)
        self.tables: list[list[int]] = []
        # block -> all ids up to its end, once registered
        self.contents: dict[int, tuple[int, ...]] = {}

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def take(self, ids):
        keys = keys_of(ids, 2)
        hits = self.blocks.match(keys, len(ids))
        assert len(hits) * 2 < len(ids)
        for i, block in enumerate(hits):
            assert self.contents[block] == tuple(ids[: 2 * i + 2])
        n_fresh = self.blocks.n_for(len(ids)) - len(hits)
        if not self.blocks.can_take(n_fresh, hits):
            n_idle = len({*hits} - {block for table in self.tables for block in table})
            assert n_fresh + n_idle > self.blocks.n_free  # it refuses only what does not fit
            return
        table = self.blocks.take(n_fresh, hits)
        assert table[: len(hits)] == hits and not {*table[len(hits) :]} & {
            b for other in self.tables for b in other
        }
        for i, block in enumerate(table[len(hits) :], len(hits)):
            self.contents.pop(block, None)
            if i < len(keys):
                self.blocks.register(block, keys[i])
                self.contents[block] = tuple(ids[: 2 * i + 2])
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        self.blocks.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def balanced(self):
        self.blocks.check_integrity(self.tables)
        assert self.blocks.n_free == 7 - len({block for table in self.tables for block in table})

    def teardown(self):
        for table in self.tables:
            self.blocks.release(table)
        self.blocks.check_integrity()


Walk.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=40, deadline=None)
TestWalk = Walk.TestCase
