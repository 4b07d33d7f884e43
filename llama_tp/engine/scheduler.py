"""Who computes what in the next step: continuous batching, chunked prefill, prefix reuse,
preemption.

Plain ints; runs on the driver alone and knows neither tensors, ranks nor text. The policy, all of
it:

 1. Sequences are served in order of arrival. At any time the running ones arrived before all
   waiting ones.
 2. A step holds at most `max_step_tokens` tokens: one for each decoding row, then chunks of the
    prompts that are partly computed, then chunks of waiting sequences, each in order of arrival and
    at most `prefill_chunk` tokens long.
 3. A waiting sequence is let in when a row is free, and blocks for all its ids that the prefix
    cache does not hold, and one more for every running sequence: else the newcomer would be the
    next to be thrown out. The first that does not fit holds up those behind it, so none is passed
    by for ever.
 4. A decode that needs a block when none is free takes it from the newest running sequence, which
    goes back to the head of the queue and is computed anew, its output as if it were prompt; tokens
    once sampled never change. The newest itself, having nobody to take from, sits the step out and
    keeps what it has.
 5. A newcomer is let in when every running sequence has got on and the step has a token left for
    it. No more run than a step has tokens (there are no more rows), so the oldest gets on in every
    step, and everything finishes.

`plan()` may be called again before `update()` has told it what the last step sampled, while no
sequence needs the driver to know its last token first (`n_driven`). `in_flight` then holds both
steps, and a sequence that ends meanwhile is dropped from the later one, whose row is computed in
vain. Ranks run steps in the order they were planned, so a block freed by one step may be written by
the next. A sequence that comes back UNDECIDED is dropped from later steps in the same way, and its
last position computed again for the driver to choose, whose tokens are chosen until fewer than one
in `FEW` was UNDECIDED.

A sequence that is `held` keeps its row and blocks, and no step samples a token for it: its prompt
is computed up to the last position. One that comes back LATE has its last position computed again
once it is held no more. Whoever holds a sequence sees to it that it ends.
"""

from collections import deque
from collections.abc import Mapping

from llama_tp.arch.errors import UserError
from llama_tp.engine.blocks import BlockManager
from llama_tp.engine.request import Sequence
from llama_tp.engine.step import (
    FILTERED,
    GATHERED,
    LATE,
    NOT_FINITE,
    UNDECIDED,
    WHOLE,
    Step,
    StepRow,
)

# computing one position in eight twice costs less than holding up every other sequence's steps
FEW = 8


class Scheduler:
    """Plans steps for the sequences it is given.

    Args:
        blocks: the KV cache's books.
        max_rows: most sequences at once (rows on every rank).
        max_step_tokens: most tokens in a step.
        max_seq_len: most ids in a sequence, prompt and output together.
        prefill_chunk: most tokens of one prompt in a step; None: whatever the step holds.
        max_context: how far max_seq_len could be raised: the positions that the model was trained
            for.

    Attributes to read: `max_len`, the longest a sequence can become here (max_seq_len, or all
    blocks together if that is less); `rows`, row -> Sequence or None, as the last plan left it;
    `in_flight`, for every step planned and not yet updated the pair (Step, {row: Sequence}); the
    counters `n_driven` (unfinished sequences whose tokens the driver chooses from all logits, or
    whose form it must follow), `n_preemptions` and `prefix_hit_tokens`.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_rows: int,
        max_step_tokens: int,
        max_seq_len: int,
        prefill_chunk: int | None = None,
        max_context: int | None = None,
    ):
        self.blocks = blocks
        self.max_step_tokens = max_step_tokens
        self.prefill_chunk = prefill_chunk or max_step_tokens
        self.max_seq_len, self.max_context = max_seq_len, max_context or max_seq_len
        self.max_len = min(max_seq_len, blocks.n_blocks * blocks.block_size)
        # also when steps are planned ahead, and a sequence thought to be at its end comes back
        # UNDECIDED
        self.rows: list[Sequence | None] = [None] * min(max_rows, max_step_tokens)
        self.running: list[Sequence] = []  # in order of arrival
        # in order of arrival, all of them after the running ones
        self.waiting: deque[Sequence] = deque()
        self.in_flight: deque[tuple[Step, dict[int, Sequence]]] = deque()
        self.n_steps = 0
        self.n_added = 0
        self.n_driven = 0
        self.n_preemptions = 0
        self.prefix_hit_tokens = 0

    # ----------------------------------------------------------------------------------- in and out

    def check_fits(self, n_prompt: int) -> None:
        """Raises UserError when a prompt of `n_prompt` ids and one token of output can never
        fit."""
        if n_prompt + 1 > self.max_seq_len:
            fits = n_prompt + 1 <= self.max_context
            raise UserError(
                "the prompt is too long",
                f"found {n_prompt} tokens, and max_seq_len {self.max_seq_len} must also hold one "
                "of output",
                f"shorten the prompt or raise --max_seq_len, at most to {self.max_context}"
                if fits
                else f"shorten the prompt: the model was trained for {self.max_context} positions",
            )
        if n_prompt + 1 > self.max_len:
            raise UserError(
                "the prompt does not fit in the KV cache",
                f"found {n_prompt} tokens, and the cache's {self.max_len} must also hold one of "
                "output",
                "shorten the prompt or give the KV cache more memory",
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; those of one request are added one after the other. Raises UserError as
        `check_fits`."""
        self.check_fits(len(sequence.ids))
        max_tokens = sequence.params.max_tokens
        sequence.limit = (
            self.max_len
            if max_tokens is None
            else min(self.max_len, sequence.n_prompt + max_tokens)
        )
        sequence.arrival = self.n_added
        self.n_added += 1
        self.n_driven += sequence.driven
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> list[Sequence]:
        """Finish all sequences of a request with "abort" and return them; none, if it is unknown or
        has finished."""
        aborted = [s for s in (*self.running, *self.waiting) if s.request.id == request_id]
        for sequence in aborted:
            self.finish(sequence, "abort")
        return aborted

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence; its row and blocks are free at once. The engine may name a better reason
        ("stop") for one
        that `update` has just ended with "length"."""
        if sequence.finish_reason is None:
            self.n_driven -= sequence.driven
            if sequence.row is None:
                self.waiting.remove(sequence)
            else:
                self._leave(sequence)
        sequence.finish_reason = reason

    # --------------------------------------------------------------------------------------- a step

    def plan(self) -> Step | None:
        """The next step; None when there is nothing to compute (until `update`, where steps are in
        flight)."""
        n_preemptions, rows = self.n_preemptions, []
        for sequence in list(self.running):
            # a sequence that this loop has preempted decodes no more; one at its limit has its last
            # token in flight
            ready = sequence.decoding and not sequence.held and sequence.n_ids < sequence.limit
            if ready and self._has_block(sequence):
                rows.append(self._row(sequence, 1))
        budget = self.max_step_tokens - len(rows)
        for sequence in self.running:
            if not sequence.decoding and budget:
                budget -= self._chunk(sequence, budget, rows)
        while budget and self.n_preemptions == n_preemptions and self._admit():
            budget -= self._chunk(self.running[-1], budget, rows)
        if not rows:
            return None
        step = Step(self.n_steps, tuple(rows))
        self.n_steps += 1
        self.in_flight.append((step, {row.row: self.in_row(row.row) for row in rows}))
        return step

    def update(self, step: Step, sampled: Mapping[int, int]) -> list[tuple[Sequence, int]]:
        """Take in what the oldest step in flight has computed.

        Args:
            sampled: row -> token id, for every row of the step that samples. NOT_FINITE ends the
                sequence with "abort", alone; UNDECIDED has the position computed again, for the
                driver to choose; LATE, when it is not held.

        Returns the sequences that got a token, or NOT_FINITE, with it. A token is in `ids` already,
        and a sequence that has reached its `limit` (max_tokens, max_seq_len, or the KV cache as a
        whole) is finished with "length": that is decided here and nowhere else. Stop ids and stop
        strings are the engine's to find.
        """
        planned, sequences = self.in_flight.popleft()
        if planned.number != step.number:
            raise RuntimeError(
                f"step {step.number} was updated while step {planned.number} is the oldest in "
                "flight"
            )
        tokens = []
        for row in step.rows:
            sequence = sequences.get(row.row)
            if sequence is None:  # it ended, or was preempted, after this was planned
                continue
            if row.sample:
                token = sampled[row.row]
                if token in (UNDECIDED, LATE):
                    self._again(sequence, row.n - 1, token == UNDECIDED)
                    continue
                tokens.append((sequence, token))
                if token == NOT_FINITE:
                    self.finish(sequence, "abort")
                    continue
                sequence.ids.append(token)
                sequence.n_pending -= 1
                if sequence.n_undecided:
                    self._go(
                        sequence,
                        GATHERED
                        if sequence.n_undecided * FEW > sequence.n_output
                        else sequence.usual_way,
                    )
            self._computed(sequence, row.n)
            if len(sequence.ids) == sequence.limit:
                self.finish(sequence, "length")
        return tokens

    # ------------------------------------------------------------------------------------ the parts

    def _has_block(self, sequence: Sequence) -> bool:
        """Give a decoding sequence the block of its next position, a newer sequence's if need be.
        False: no block."""
        if sequence.n_planned < len(sequence.blocks) * self.blocks.block_size:
            return True
        while not self.blocks.n_free:
            if self.running[-1] is sequence:
                return False
            self._preempt(self.running[-1])
        sequence.blocks += self.blocks.take(1)
        return True

    def _admit(self) -> bool:
        """Let the oldest waiting sequence in, with a row and blocks for all its ids. False: none
        waits, or no room."""
        if not self.waiting or len(self.running) == len(self.rows):
            return False
        sequence = self.waiting[0]
        if self._waits_for_sibling(sequence):
            return False
        hits = []
        if self.blocks.prefix_cache and not sequence.scores_prompt:
            self.blocks.extend_keys(sequence.keys, sequence.ids)
            hits = self.blocks.match(sequence.keys, len(sequence.ids))
        n_fresh = self.blocks.n_for(len(sequence.ids)) - len(hits)
        if not self.blocks.can_take(n_fresh + len(self.running), hits):
            return False
        sequence.blocks = self.blocks.take(n_fresh, hits)
        sequence.n_computed = sequence.n_planned = len(hits) * self.blocks.block_size
        self.prefix_hit_tokens += sequence.n_computed
        sequence.row = self.rows.index(None)
        self.rows[sequence.row] = sequence
        self.running.append(self.waiting.popleft())
        return True

    def _waits_for_sibling(self, sequence: Sequence) -> bool:
        """Samples 1 .. n - 1 of a request come in once sample 0 has computed the prompt, and share
        its blocks."""
        return (
            sequence.index > 0
            and self.blocks.prefix_cache
            and sequence.n_prompt > self.blocks.block_size
            and any(
                other.request is sequence.request
                and other.index == 0
                and other.n_computed < other.n_prompt
                for other in self.running
            )
        )

    def _chunk(self, sequence: Sequence, budget: int, rows: list[StepRow]) -> int:
        """Plan some positions of a prompt, into `rows`. -> how many."""
        n = min(len(sequence.ids) - sequence.held - sequence.n_planned, self.prefill_chunk, budget)
        if n:
            rows.append(self._row(sequence, n))
        return n

    def _row(self, sequence: Sequence, n: int) -> StepRow:
        """Plan the next `n` positions of a running sequence, which has the blocks for them."""
        start, end = sequence.n_planned, sequence.n_planned + n
        way = sequence.way if end == sequence.n_ids else GATHERED
        row = StepRow(
            row=_row_of(sequence),
            start=start,
            n=n,
            ids=() if sequence.decoding else tuple(sequence.ids[start:end]),
            sample=end == sequence.n_ids,
            prompt_logits=sequence.scores_prompt and not sequence.decoding,
            block_start=sequence.n_sent,
            blocks=tuple(sequence.blocks[sequence.n_sent :]),
            way=way,
            draw=sequence.draw() if way in (FILTERED, WHOLE) else None,
            masked=way != GATHERED and sequence.params.form is not None,
        )
        sequence.n_sent = len(sequence.blocks)
        sequence.n_planned = end
        if row.sample:
            sequence.decoding = True
            sequence.n_pending += 1
        return row

    def _computed(self, sequence: Sequence, n: int) -> None:
        """The KV of the next `n` positions is in the cache: offer the blocks that they filled for
        reuse."""
        first_open = sequence.n_computed // self.blocks.block_size
        sequence.n_computed += n
        if self.blocks.prefix_cache:
            self.blocks.extend_keys(sequence.keys, sequence.ids)
            for i in range(first_open, sequence.n_computed // self.blocks.block_size):
                self.blocks.register(sequence.blocks[i], sequence.keys[i])

    def _again(self, sequence: Sequence, n: int, undecided: bool) -> None:
        """Have a sequence's last position computed anew; of the step that did it in vain the n
        positions before count."""
        self._drop(sequence)
        self._computed(sequence, n)
        sequence.n_planned, sequence.n_pending, sequence.decoding = sequence.n_computed, 0, False
        if undecided:
            sequence.n_undecided += 1
            self._go(sequence, GATHERED)

    def _go(self, sequence: Sequence, way: int) -> None:
        self.n_driven -= sequence.driven
        sequence.way = way
        self.n_driven += sequence.driven

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self.n_preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """Take a running sequence's row and blocks."""
        self._drop(sequence)
        self.running.remove(sequence)
        self.rows[_row_of(sequence)] = None
        self.blocks.release(sequence.blocks)
        sequence.leave()

    def _drop(self, sequence: Sequence) -> None:
        """Take a sequence's part in the steps in flight: a token that it samples there is dropped
        unseen, and sampled again (the draw is keyed by position) should the sequence get on."""
        row = _row_of(sequence)
        for _, sequences in self.in_flight:
            if sequences.get(row) is sequence:
                del sequences[row]

    # ------------------------------------------------------------------------------------ the books

    def in_row(self, row: int) -> Sequence:
        """The sequence that has a row. RuntimeError if none has."""
        sequence = self.rows[row]
        if sequence is None:
            raise RuntimeError(f"no sequence has row {row}")
        return sequence

    @property
    def n_running(self) -> int:
        return len(self.running)

    @property
    def n_waiting(self) -> int:
        return len(self.waiting)

    @property
    def n_free_blocks(self) -> int:
        return self.blocks.n_free

    @property
    def kv_use(self) -> float:
        """The part of the KV cache that running sequences hold, 0 to 1; what is merely kept for
        reuse is free."""
        return 1.0 - self.blocks.n_free / self.blocks.n_blocks

    def check_integrity(self) -> None:
        """Raises RuntimeError unless rows, queue and blocks agree with each other."""
        self.blocks.check_integrity(sequence.blocks for sequence in self.running)
        order = [sequence.arrival for sequence in (*self.running, *self.waiting)]
        if order != sorted(set(order)):
            raise RuntimeError(
                f"sequences are out of order, or twice in the queue: arrivals {order}"
            )
        held = {sequence.row: sequence for sequence in self.running}
        if held != {
            row: sequence for row, sequence in enumerate(self.rows) if sequence is not None
        }:
            raise RuntimeError(f"the rows {self.rows} are not those of {self.running}")


def _row_of(sequence: Sequence) -> int:
    """The row of a running sequence. RuntimeError if it waits."""
    if sequence.row is None:
        raise RuntimeError(f"{sequence} has no row")
    return sequence.row
