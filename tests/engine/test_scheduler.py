"""The scheduler's policy, sentence by sentence, and random schedules on ranks that check every
position they read.

`FakeRanks` does what ranks do with a Step and nothing more: block tables by row, one cell of KV for
each slot, "what the row sampled last". A cell holds the digest of *all* ids up to its position,
read from the cell before it as attention reads its context, so a block that is stale, overwritten,
or hit for another prefix shows as a wrong digest. The token sampled is a function of that digest,
so a completion must equal what `alone` says, whatever the schedule was.
"""

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_tp.arch.errors import UserError
from llama_tp.engine.blocks import BlockManager
from llama_tp.engine.request import Request, SamplingParams, Sequence
from llama_tp.engine.scheduler import Scheduler
from llama_tp.engine.step import GATHERED, UNDECIDED, Step
from tests.examples import examples

N_VOCAB = 3  # few ids, so that prefixes often agree


def digest(before, token):
    return hash((before, token))  # of ints: the same in every process


def sampled_token(context, index):
    return hash((context, index)) % N_VOCAB


def alone(prompt, index, n):
    """The ids of prompt and `n` sampled tokens, by the definition and without any cache."""
    ids, context = list(prompt), 0
    for token in prompt:
        context = digest(context, token)
    for _ in range(n):
        ids.append(sampled_token(context, index))
        context = digest(context, ids[-1])
    return ids


class FakeRanks:
    """Every rank's memory. Runs encoded steps, in order; checks all that a rank could check."""

    def __init__(self, n_blocks, block_size, max_rows):
        self.block_size = block_size
        self.cells = [[None] * block_size for _ in range(n_blocks)]
        self.tables = [[] for _ in range(max_rows)]
        self.n_done = [0] * max_rows  # positions of the row in the cache
        self.last = [None] * max_rows
        self.undecided = set()  # rows whose last position may come again
        self.n_computed_tokens = 0

    def cell(self, row, position):
        return self.cells[self.tables[row][position // self.block_size]][position % self.block_size]

    def run(self, ints, index_of):
        """Runs one step. index_of: row -> sample index, what params would tell. Returns row ->
        sampled token."""
        step = Step.decode(ints)
        assert step.encode() == ints
        for r in step.rows:
            if r.fresh:
                assert not r.decodes and r.start % self.block_size == 0
                self.n_done[r.row], self.last[r.row] = r.start, None
                self.undecided.discard(r.row)
            if r.row in self.undecided and not r.decodes:
                assert r.n == 1 and r.start < self.n_done[r.row]
                self.n_done[r.row] = r.start
                self.undecided.discard(r.row)
            assert r.start == self.n_done[r.row]  # every position once, none left out
            assert r.block_start == (0 if r.fresh else len(self.tables[r.row]))
            self.tables[r.row][r.block_start :] = r.blocks
            assert len(set(self.tables[r.row])) == len(self.tables[r.row])
            assert r.start + r.n <= len(self.tables[r.row]) * self.block_size
        # what precedes each row must stand in the cache before this step: none may read what
        # another row is writing
        contexts = [self.cell(r.row, r.start - 1) if r.start else 0 for r in step.rows]
        written, sampled = set(), {}
        for r, context in zip(step.rows, contexts):
            ids = [self.last[r.row]] if r.decodes else r.ids
            assert len(ids) == r.n and None not in ids
            for position, token in enumerate(ids, r.start):
                context = digest(context, token)
                block, slot = (
                    self.tables[r.row][position // self.block_size],
                    position % self.block_size,
                )
                assert (block, slot) not in written
                written.add((block, slot))
                self.cells[block][slot] = context
            self.n_done[r.row] += r.n
            self.n_computed_tokens += r.n
            if r.sample:
                sampled[r.row] = self.last[r.row] = sampled_token(context, index_of.get(r.row, 0))
        return sampled

    def check_context(self, row, ids):
        """The row's whole context, in its blocks, is exactly `ids`."""
        assert self.n_done[row] == len(ids)
        context = 0
        for position, token in enumerate(ids):
            context = digest(context, token)
            assert self.cell(row, position) == context, (
                f"row {row}: position {position} holds another context"
            )


class World:
    """Scheduler and fake ranks, with up to `depth` steps in flight (1: plan, run, update; 2:
    planned one ahead)."""

    def __init__(
        self,
        n_blocks=16,
        block_size=4,
        max_rows=4,
        max_step_tokens=64,
        max_seq_len=64,
        prefill_chunk=None,
        prefix_cache=True,
        depth=1,
        undecided=0,
    ):
        self.blocks = BlockManager(n_blocks, block_size, prefix_cache)
        self.scheduler = Scheduler(
            self.blocks, max_rows, max_step_tokens, max_seq_len, prefill_chunk
        )
        self.ranks = FakeRanks(n_blocks, block_size, max_rows)
        # undecided: every so manyth token on the shards
        self.depth, self.undecided = depth, undecided
        self.n_on_shards = 0
        self.sequences = []
        self.steps = []

    def add(self, prompt, n=1, **fields):
        request = Request(f"r{len(self.sequences)}", prompt, SamplingParams(n=n, **fields))
        added = [Sequence(request, index) for index in range(n)]
        for sequence in added:
            self.scheduler.add(sequence)
            self.sequences.append(sequence)
        return added[0] if n == 1 else added

    def plan(self):
        preempted_before = self.scheduler.n_preemptions
        waiting_before = list(self.scheduler.waiting)
        step = self.scheduler.plan()
        self.scheduler.check_integrity()
        if step is None:
            return None
        self.steps.append(step)
        live = self.scheduler.in_flight[-1][1]
        assert [r.row for r in step.rows] == list(live) and set(live) <= set(
            range(len(self.scheduler.rows))
        )
        assert 0 < step.n_tokens <= self.scheduler.max_step_tokens
        assert self.scheduler.n_running <= self.scheduler.max_step_tokens
        assert all(r.n <= self.scheduler.prefill_chunk for r in step.rows)
        kinds = [r.decodes for r in step.rows]
        assert kinds == sorted(kinds, reverse=True)  # decode rows first
        for group in (True, False):
            arrivals = [live[r.row].arrival for r in step.rows if r.decodes is group]
            assert arrivals == sorted(arrivals)
        # nobody is let in while somebody is thrown out
        if self.scheduler.n_preemptions > preempted_before:
            assert not any(live[r.row] in waiting_before for r in step.rows)
        for r in step.rows:  # nobody writes to a block that others read
            table = live[r.row].blocks
            for i in range(
                r.start // self.blocks.block_size, (r.start + r.n - 1) // self.blocks.block_size + 1
            ):
                assert self.blocks.n_holders[table[i]] == 1
        return step

    def run_oldest(self, stops=lambda sequence: False):
        """The oldest step in flight runs on the ranks; the scheduler hears of it."""
        step, live = self.scheduler.in_flight[0]
        live = dict(live)  # those of its rows that still matter
        index_of = {row: sequence.index for row, sequence in live.items()}
        sampled = self.ranks.run(step.encode(), index_of)
        assert set(sampled) == {r.row for r in step.rows if r.sample}
        tables = {row: self.ranks.tables[row] for row in live}
        for r in step.rows:
            if r.row in live:
                sequence = live[r.row]
                truth = alone(sequence.request.prompt_ids, sequence.index, sequence.n_output + 1)
                self.ranks.check_context(r.row, truth[: r.start + r.n])
                assert (
                    tables[r.row][: len(sequence.blocks)] == sequence.blocks[: len(tables[r.row])]
                )
                # >: planned before the last token was known
                assert r.sample == (r.start + r.n >= len(sequence.ids))
        for r in step.rows:
            if r.sample and r.row in live and r.way != GATHERED and self.undecided:
                self.n_on_shards += 1
                if self.n_on_shards % self.undecided == 0:
                    sampled[r.row] = UNDECIDED
                    self.ranks.undecided.add(r.row)
        tokens = self.scheduler.update(step, sampled)
        assert [sequence for sequence, _ in tokens] == [
            live[r.row]
            for r in step.rows
            if r.sample and r.row in live and sampled[r.row] != UNDECIDED
        ]
        assert self.scheduler.n_driven == sum(
            s.way == GATHERED for s in (*self.scheduler.running, *self.scheduler.waiting)
        )
        for sequence, token in tokens:
            assert sequence.ids[-1] == token
            if stops(sequence):
                self.scheduler.finish(sequence, "stop")
        self.scheduler.check_integrity()
        return tokens

    def step(self, stops=lambda sequence: False):
        """One turn of an engine's loop. Returns the step planned, if any."""
        step = self.plan()
        if self.scheduler.in_flight and (
            step is None or len(self.scheduler.in_flight) == self.depth
        ):
            self.run_oldest(stops)
        return step

    def finish(self, most_steps=10_000, stops=lambda sequence: False):
        for _ in range(most_steps):
            if not (
                self.scheduler.n_running or self.scheduler.n_waiting or self.scheduler.in_flight
            ):
                break
            if self.step(stops) is None:
                assert len(self.scheduler.in_flight) < self.depth
        else:
            raise AssertionError(f"unfinished after {most_steps} steps")
        self.check_end()

    def check_end(self):
        self.blocks.check_integrity()
        assert self.blocks.n_free == self.blocks.n_blocks and self.scheduler.kv_use == 0.0
        for sequence in self.sequences:
            assert sequence.finish_reason and sequence.row is None and not sequence.blocks
            assert sequence.ids == alone(
                sequence.request.prompt_ids, sequence.index, sequence.n_output
            )
            if sequence.finish_reason == "length":
                assert len(sequence.ids) == sequence.limit


def shape(step):
    """A step in short: (row, tokens, "d"ecode or "p"refill, samples)."""
    return [(r.row, r.n, "d" if r.decodes else "p", r.sample) for r in step.rows]


# ------------------------------------------------------------------------------------- one sequence


def test_a_prompt_is_computed_and_then_decoded():
    world = World()
    sequence = world.add([1, 2, 0], max_tokens=3)
    assert world.scheduler.n_waiting == 1
    first = world.step()
    assert (
        first.number == 0
        and first.rows[0].ids == (1, 2, 0)
        and first.rows[0].fresh
        and first.rows[0].blocks == (0,)
    )
    assert world.scheduler.n_running == 1 and sequence.n_computed == 3 and sequence.n_output == 1
    assert world.scheduler.kv_use == 1 / 16 and world.scheduler.n_free_blocks == 15
    second = world.step()
    assert (
        second.number == 1
        and shape(second) == [(0, 1, "d", True)]
        and second.rows[0][:4] == (0, 3, 1, ())
    )
    third = world.step()
    # position 4 opens a block
    assert third.rows[0].block_start == 1 and third.rows[0].blocks == (1,)
    assert sequence.finish_reason == "length" and sequence.n_output == 3
    assert world.scheduler.plan() is None
    world.check_end()


def test_a_plan_of_nothing_is_none():
    assert World().scheduler.plan() is None


@pytest.mark.parametrize(
    "fields, n_output",
    [(dict(max_tokens=5), 5), (dict(max_tokens=1), 1), (dict(), 61), (dict(max_tokens=1000), 61)],
)
def test_length_is_max_tokens_or_max_seq_len(fields, n_output):
    world = World(n_blocks=32)
    sequence = world.add([1, 2, 0], **fields)
    world.finish()
    assert sequence.finish_reason == "length" and sequence.n_output == n_output


def test_length_is_the_whole_cache_when_that_is_less():
    world = World(n_blocks=3, max_seq_len=1000)
    sequence = world.add([1, 2, 0])
    world.finish()
    assert (
        len(sequence.ids) == 12
        and sequence.finish_reason == "length"
        and world.scheduler.n_preemptions == 0
    )


def test_a_prompt_that_cannot_fit_is_refused_with_both_numbers():
    scheduler = World(n_blocks=5, block_size=4, max_seq_len=16).scheduler
    scheduler.check_fits(15)
    with pytest.raises(UserError, match="16.*max_seq_len 16"):
        scheduler.check_fits(16)
    scheduler = World(n_blocks=3, block_size=4, max_seq_len=16).scheduler
    scheduler.check_fits(11)
    with pytest.raises(UserError, match="KV cache.*12.*12"):
        scheduler.check_fits(12)
    with pytest.raises(UserError):
        scheduler.add(Sequence(Request("long", [1] * 12)))
    assert scheduler.n_waiting == 0 and scheduler.plan() is None


def test_a_prompt_that_is_too_long_is_told_what_would_help():
    def told(max_context):
        with pytest.raises(UserError) as info:
            Scheduler(BlockManager(8, 4, True), 2, 16, 16, max_context=max_context).check_fits(20)
        return info.value

    more = told(32)
    assert (
        more.fix == "shorten the prompt or raise --max_seq_len, at most to 32"
        and "max_seq_len 16" in more.found
    )
    for max_context in (16, 20):  # 20 would not hold it either
        none = told(max_context)
        assert (
            "raise" not in none.fix
            and "shorten the prompt" in none.fix
            and f"trained for {max_context} positions" in none.fix
        )


def test_stop_frees_row_and_blocks_at_once():
    world = World()
    sequence = world.add([1, 2, 0])
    world.step()
    world.scheduler.finish(sequence, "stop")
    assert sequence.row is None and world.blocks.n_free == 16 and world.scheduler.rows == [None] * 4
    assert sequence.finish_reason == "stop" and sequence.n_output == 1
    world.check_end()


def test_a_stop_in_the_last_token_overrides_length():
    world = World()
    sequence = world.add([1, 2, 0], max_tokens=1)
    world.step(stops=lambda _: True)
    assert sequence.finish_reason == "stop"
    world.check_end()


def test_a_negative_token_ends_its_sequence_alone_and_its_blocks_are_not_reused():
    world = World()
    bad, good = world.add([1] * 8), world.add([2, 0], max_tokens=4)
    step = world.plan()
    sampled = world.ranks.run(step.encode(), {})
    sampled[bad.row] = -1
    assert world.scheduler.update(step, sampled) == [(bad, -1), (good, good.ids[-1])]
    assert bad.finish_reason == "abort" and bad.n_output == 0 and bad.row is None
    again = world.add([1] * 8, max_tokens=1)
    world.finish()
    assert world.scheduler.prefix_hit_tokens == 0 and again.n_output == 1 and good.n_output == 4


# ------------------------------------------------------------------------------------------ budgets


def test_chunked_prefill_keeps_the_budget():
    world = World(max_step_tokens=5)
    sequence = world.add([1] * 12, max_tokens=2)
    shapes = [shape(world.step()) for _ in range(4)]
    assert shapes == [
        [(0, 5, "p", False)],
        [(0, 5, "p", False)],
        [(0, 2, "p", True)],
        [(0, 1, "d", True)],
    ]
    assert sequence.n_output == 2


def test_prefill_chunk_bounds_one_prompt_and_leaves_room_for_others():
    world = World(max_step_tokens=10, prefill_chunk=4, prefix_cache=False)
    world.add([1] * 9), world.add([2] * 9), world.add([0] * 9)
    assert shape(world.step()) == [(0, 4, "p", False), (1, 4, "p", False), (2, 2, "p", False)]
    assert shape(world.step()) == [(0, 4, "p", False), (1, 4, "p", False), (2, 2, "p", False)]
    assert shape(world.step()) == [(0, 1, "p", True), (1, 1, "p", True), (2, 4, "p", False)]
    assert shape(world.step()) == [(0, 1, "d", True), (1, 1, "d", True), (2, 1, "p", True)]


def test_decodes_come_before_partly_computed_before_waiting():
    world = World(max_step_tokens=6)
    world.add([1, 2])
    world.step()
    world.add([0] * 8), world.add([2] * 3)
    assert shape(world.step()) == [(0, 1, "d", True), (1, 5, "p", False)]
    assert shape(world.step()) == [(0, 1, "d", True), (1, 3, "p", True), (2, 2, "p", False)]
    assert shape(world.step()) == [(0, 1, "d", True), (1, 1, "d", True), (2, 1, "p", True)]


def test_a_budget_below_the_rows_serves_the_oldest_and_still_finishes():
    world = World(max_step_tokens=2)
    order = [world.add([i % 3, 1], max_tokens=4) for i in range(4)]
    ends = []
    while world.scheduler.n_running or world.scheduler.n_waiting:
        world.step()
        ends += [s for s in order if s.finish_reason and s not in ends]
    assert ends == order
    world.check_end()


def test_rows_bound_the_running_and_are_used_again():
    world = World(max_rows=2)
    first, second, third = (world.add([i, 1], max_tokens=2 + i) for i in range(3))
    world.step()
    assert (world.scheduler.n_running, world.scheduler.n_waiting) == (2, 1) and third.row is None
    world.step()
    assert first.finish_reason
    assert shape(world.step()) == [(1, 1, "d", True), (0, 2, "p", True)] and third.row == 0


def test_the_first_that_does_not_fit_holds_up_those_behind():
    world = World(n_blocks=6, prefix_cache=False)
    world.add([1] * 12)
    world.step()
    long, short = world.add([2] * 12), world.add([0])
    world.step()
    assert list(world.scheduler.waiting) == [long, short]
    world.finish()


def test_a_newcomer_leaves_a_block_for_every_running_sequence():
    world = World(n_blocks=4, prefix_cache=False, max_seq_len=16)
    world.add([1] * 4, max_tokens=8)
    world.step()
    newcomer = world.add([2] * 8, max_tokens=1)  # needs two blocks, and two are free:
    for _ in range(6):
        world.step()
        assert newcomer.row is None  # but one of them will be the other's third
    world.finish()
    assert world.scheduler.n_preemptions == 0


# --------------------------------------------------------------------------------------- preemption


def test_the_newest_is_preempted_and_its_tokens_stay():
    world = World(n_blocks=6, max_seq_len=24)
    old, new = world.add([1] * 6, max_tokens=14), world.add([2] * 6, max_tokens=14)
    later = world.add([0], max_tokens=1)
    kept = None
    while world.scheduler.n_preemptions == 0:
        before = list(new.ids)
        step = world.step()
        kept = before
    assert new.row is None and new.ids == kept and new.n_computed == 0 and new.n_output > 0
    assert list(world.scheduler.waiting)[:1] == [new]  # the head of the queue
    assert all(r.row == old.row for r in step.rows)  # and nobody is let in by that step
    world.finish()
    assert (old.n_output, new.n_output, later.n_output) == (14, 14, 1)


def test_output_is_recomputed_as_prompt_with_explicit_ids():
    world = World(n_blocks=6, max_seq_len=24, prefix_cache=False)
    world.add([1] * 6, max_tokens=14)
    new = world.add([2] * 6, max_tokens=14)
    while world.scheduler.n_preemptions == 0:
        world.step()
    kept = list(new.ids)
    while new.row is None:
        step = world.step()
    row = step.rows[-1]
    assert row.fresh and row.ids == tuple(kept) and row.start == 0 and row.sample
    world.finish()


def test_a_preempted_sequence_finds_its_own_blocks_again():
    world = World(n_blocks=6, max_seq_len=24)
    world.add([1] * 6, max_tokens=14)
    new = world.add([2] * 6, max_tokens=14)
    while world.scheduler.n_preemptions == 0:
        world.step()
    assert new.row is None and world.scheduler.prefix_hit_tokens == 0
    while new.row is None:
        step = world.step()
    assert step.rows[-1].start == world.scheduler.prefix_hit_tokens > 0
    world.finish()


def test_the_newest_itself_sits_out_instead_of_being_preempted():
    world = World(n_blocks=5, max_seq_len=20, prefix_cache=False)
    world.add([1] * 5, max_tokens=8)  # has 3 blocks from step 4 on, and ends with step 7
    new = world.add([2] * 3, max_tokens=8)  # has 2 blocks, and wants its third in step 6
    assert [len(world.step().rows) for _ in range(9)] == [2, 2, 2, 2, 2, 2, 1, 1, 1]
    assert new.n_computed == 9 and world.scheduler.n_preemptions == 0
    assert world.steps[7].rows[0].row == 0 and world.steps[8].rows[0].row == 1
    world.finish()
    assert new.n_output == 8


# ------------------------------------------------------------------------------------- prefix reuse


def test_a_second_request_computes_only_what_is_new():
    world = World()
    world.add([1] * 9, max_tokens=1)
    world.finish()
    second = world.add([1] * 9 + [2], max_tokens=1)
    row = world.step().rows[0]
    assert (row.start, row.ids, row.block_start, row.blocks[:2]) == (8, (1, 2), 0, (0, 1))
    assert world.scheduler.prefix_hit_tokens == 8 and second.n_output == 1
    world.check_end()


def test_the_whole_prompt_is_never_a_hit():
    world = World()
    for _ in range(2):
        world.add([1] * 8, max_tokens=1)
        world.finish()
    assert world.scheduler.prefix_hit_tokens == 4


def test_output_is_reused_in_a_conversation():
    world = World()
    first = world.add([1] * 5, max_tokens=8)
    world.finish()
    world.add(first.ids + [2] * 3, max_tokens=1)
    world.finish()
    assert world.scheduler.prefix_hit_tokens == 12  # of 13 ids the last was never computed


def test_blocks_are_offered_only_once_they_are_computed():
    world = World(max_step_tokens=64)
    world.add([1] * 9), world.add([1] * 9)  # in one step: neither can use the other's
    world.step()
    assert world.scheduler.prefix_hit_tokens == 0
    world.add([1] * 9)
    world.step()
    assert world.scheduler.prefix_hit_tokens == 8
    world.finish()


def test_prompt_logprobs_skip_prefix_hits():
    world = World(max_step_tokens=7)
    world.add([1] * 9, max_tokens=1)
    world.finish()
    asking = world.add([1] * 9, max_tokens=2, prompt_logprobs=0)
    rows = [world.step().rows[0] for _ in range(3)]
    assert [(r.start, r.n, r.prompt_logits) for r in rows] == [
        (0, 7, True),
        (7, 2, True),
        (9, 1, False),
    ]
    assert world.scheduler.prefix_hit_tokens == 0 and asking.finish_reason == "length"


def test_a_recomputed_prompt_is_not_scored_again():
    world = World(n_blocks=6, max_seq_len=24, prefix_cache=False)
    world.add([1] * 6, max_tokens=14)
    world.add([2] * 6, max_tokens=14, prompt_logprobs=1)
    world.finish()
    assert world.scheduler.n_preemptions > 0
    assert sum(r.prompt_logits for step in world.steps for r in step.rows) == 1


def test_samples_share_the_prompt():
    world = World(max_rows=8)
    first, *others = world.add([1] * 9, n=4, max_tokens=3)
    assert len(world.step().rows) == 1
    step = world.step()
    assert shape(step) == [(0, 1, "d", True)] + [(i, 1, "p", True) for i in (1, 2, 3)]
    assert all(r.start == 8 and r.blocks[:2] == tuple(first.blocks[:2]) for r in step.rows[1:])
    world.finish()
    assert [s.n_output for s in [first, *others]] == [3] * 4
    assert world.scheduler.prefix_hit_tokens == 24
    assert len({tuple(s.ids) for s in [first, *others]}) > 1  # samples differ


def test_only_the_first_sample_scores_the_prompt():
    world = World(max_rows=8)
    world.add([1] * 9, n=3, max_tokens=2, prompt_logprobs=0)
    world.finish()
    assert [r.prompt_logits for step in world.steps for r in step.rows if not r.decodes] == [
        True,
        False,
        False,
    ]
    assert world.scheduler.prefix_hit_tokens == 16


def test_samples_of_a_short_prompt_start_together():
    world = World()
    world.add([1, 2], n=3, max_tokens=1)
    assert len(world.step().rows) == 3


# ------------------------------------------------------------------------------------------- aborts


def test_abort_ends_all_samples_wherever_they_are():
    world = World(max_rows=2)
    sequences = world.add([1, 2], n=3)
    other = world.add([0], max_tokens=1)
    world.step()
    assert (
        world.scheduler.abort("r0") == sequences
        and [s.finish_reason for s in sequences] == ["abort"] * 3
    )
    assert world.scheduler.abort("r0") == [] and world.scheduler.abort("never") == []
    assert world.scheduler.n_running == 0 and world.blocks.n_free == 16
    world.finish()
    assert other.finish_reason == "length"


def test_an_update_out_of_order_is_a_bug():
    world = World(depth=2)
    world.add([1, 2])
    first, second = world.plan(), world.plan()
    assert second.rows[0].decodes
    with pytest.raises(RuntimeError, match="step 1"):
        world.scheduler.update(second, {0: 1})
    assert first.number == 0


# ------------------------------------------------------------------------------------ planned ahead


def test_steps_planned_ahead_give_the_same_tokens():
    ahead, plain = World(depth=2), World(depth=1)
    for world in (ahead, plain):
        world.add([1, 2, 0], max_tokens=9)
        world.finish()
    assert ahead.sequences[0].ids == plain.sequences[0].ids
    # and no step in vain
    assert [shape(step) for step in ahead.steps] == [shape(step) for step in plain.steps]


def test_a_stop_drops_the_row_planned_ahead():
    world = World(depth=2)
    sequence = world.add([1, 2, 0])
    world.plan(), world.plan()
    world.run_oldest(stops=lambda _: True)
    assert sequence.n_output == 1 and sequence.finish_reason == "stop" and world.blocks.n_free == 16
    successor = world.add([2] * 7, max_tokens=2)
    world.plan()
    # row and block of the one still in flight
    assert successor.row == 0 and successor.blocks[0] == 0
    assert world.run_oldest() == []
    world.finish()
    assert successor.n_output == 2


@pytest.mark.parametrize("depth", [1, 2])
def test_an_undecided_position_is_computed_again_for_the_driver_to_choose(depth):
    world = World(depth=depth, undecided=2)
    sequence = world.add([1, 2, 0], max_tokens=6)
    assert world.scheduler.n_driven == 0
    world.finish()
    rows = [step.rows[0] for step in world.steps]
    # the second token, as input known to all
    again = [row for row in rows if row.ids and row.start == 3]
    assert [(row.n, row.way, row.ids) for row in again] == [(1, GATHERED, (sequence.ids[3],))]
    assert [row.way for row in rows if row.sample][-3:] == [
        GATHERED
    ] * 3 and world.scheduler.n_driven == 0


def test_the_driver_chooses_no_longer_once_few_were_undecided():
    world = World(undecided=9)
    world.add([1, 2, 0], max_tokens=24)
    world.finish()
    ways = [step.rows[0].way for step in world.steps]
    # the 9th on the shards is UNDECIDED, and one in nine is few; so is the 9th after it, the 18th
    # token
    assert [i for i, way in enumerate(ways) if way == GATHERED] == [
        9,
        19,
    ] and world.scheduler.n_driven == 0


# --------------------------------------------------------------------------------- random schedules

PROMPT = st.one_of(
    st.lists(st.integers(0, N_VOCAB - 1), min_size=1, max_size=20),
    st.builds(
        lambda n, tail: [1] * n + tail,
        st.integers(1, 16),
        st.lists(st.integers(0, N_VOCAB - 1), max_size=3),
    ),
)

EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            PROMPT,
            st.integers(1, 3),
            st.one_of(st.none(), st.integers(1, 12)),
            st.booleans(),
            st.one_of(st.none(), st.integers(1, 6)),
        ),
        st.tuples(st.just("abort"), st.integers(0, 50)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=30,
)

WORLD = st.fixed_dictionaries(
    dict(
        n_blocks=st.integers(2, 14),
        block_size=st.integers(1, 5),
        max_rows=st.integers(1, 6),
        max_step_tokens=st.integers(1, 24),
        max_seq_len=st.integers(2, 40),
        prefill_chunk=st.one_of(st.none(), st.integers(1, 6)),
        prefix_cache=st.booleans(),
        depth=st.integers(1, 3),
        undecided=st.sampled_from([0, 1, 2, 5]),
    )
)


def run_schedule(fields, events):
    """Plays the events, then lets everything finish. World checks each step; returns the world."""
    world, stop_after = World(**fields), {}

    def stops(sequence):
        return stop_after.get(sequence.request.id) == sequence.n_output

    for event, *details in events:
        if event == "add":
            prompt, n, max_tokens, scored, stop = details
            if len(prompt) + 1 > world.scheduler.max_len:
                with pytest.raises(UserError):
                    world.scheduler.check_fits(len(prompt))
                continue
            added = world.add(
                prompt, n, max_tokens=max_tokens, prompt_logprobs=0 if scored else None
            )
            stop_after[(added if n == 1 else added[0]).request.id] = stop
        elif event == "abort" and world.sequences:
            world.scheduler.abort(world.sequences[details[0] % len(world.sequences)].request.id)
            world.scheduler.check_integrity()
        elif event == "step":
            for _ in range(details[0]):
                world.step(stops)
    world.finish(stops=stops)
    for sequence in world.sequences:
        stop = stop_after[sequence.request.id]
        n_most = sequence.limit - sequence.n_prompt
        if sequence.finish_reason == "stop":
            assert sequence.n_output == stop <= n_most
        elif sequence.finish_reason == "length":
            assert sequence.n_output == n_most and (stop is None or stop > n_most)
    return world


# its last token, on its way when the next sequence could come in, is UNDECIDED: two to decode in
# steps of one token
@example(
    dict(
        n_blocks=3,
        block_size=5,
        max_rows=2,
        max_step_tokens=1,
        max_seq_len=6,
        prefill_chunk=None,
        prefix_cache=False,
        depth=2,
        undecided=5,
    ),
    [("add", [1], 2, None, False, None)],
)
@settings(max_examples=examples(600), deadline=None)
@given(WORLD, EVENTS)
def test_random_schedules(fields, events):
    run_schedule(fields, events)


@settings(max_examples=examples(300), deadline=None)
@given(
    st.integers(3, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(PROMPT, min_size=2, max_size=6),
)
def test_crowded_schedules(n_blocks, block_size, depth, prompts):
    """Everything at once into a cache that holds hardly one: preemption is the rule here."""
    fields = dict(
        n_blocks=n_blocks, block_size=block_size, depth=depth, max_rows=6, max_step_tokens=16
    )
    run_schedule(fields, [("add", prompt, 1, None, False, None) for prompt in prompts])


@settings(max_examples=100, deadline=None)
@given(WORLD, EVENTS)
def test_the_same_events_give_the_same_steps(fields, events):
    assert run_schedule(fields, events).steps == run_schedule(fields, events).steps


def test_crowded_schedules_do_preempt_and_hit():
    """The random worlds would prove little if nothing happened in them: one by hand, with its
    counters."""
    world = World(n_blocks=8, block_size=2, max_rows=6, max_step_tokens=16, depth=2)
    for i in range(8):
        world.add([1] * 4 + [i % 3], max_tokens=9)
    world.finish()
    assert world.scheduler.n_preemptions >= 3 and world.scheduler.prefix_hit_tokens >= 20


def test_the_oldest_gets_on_in_every_step():
    world = World(n_blocks=6, block_size=2, max_rows=4, max_step_tokens=4, prefill_chunk=2)
    oldest = world.add([1] * 5, max_tokens=6)
    progress = []
    while oldest.finish_reason is None:
        world.add([2, 0, 2], max_tokens=3)  # one newcomer a step, for ever
        world.step()
        progress.append(len(oldest.ids) + oldest.n_computed)
    assert all(before < after for before, after in pairwise(progress[:-1]))
    world.finish()


# ----------------------------------------------------------------------------------------- no torch


def test_the_plan_needs_no_torch():
    code = (
        "import sys; import llama_tp.engine.request, llama_tp.engine.blocks, "
        "llama_tp.engine.scheduler, "
        "llama_tp.engine.step; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
