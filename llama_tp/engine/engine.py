"""The loop: requests in, tokens and text out. The driver plans, every rank runs, the driver reads
the choices.

`submit` and `step` are the driver's; workers sit in `follow`. The engine knows no sockets, files or
terminals, and nothing of how it was built (build.py) or of who calls it (calls.py).
"""

import contextlib
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from llama_tp.arch.errors import UserError
from llama_tp.engine.delta import Delta, TokenLogprobs
from llama_tp.engine.masks import Masks
from llama_tp.engine.request import Request, Sequence
from llama_tp.engine.runner import Judge, Runner, Sampled
from llama_tp.engine.sampler import choose, score
from llama_tp.engine.scheduler import Scheduler
from llama_tp.engine.step import LATE, NOT_FINITE, Step, StepRow
from llama_tp.parallel.collectives import recv_ints, send_ints, share_words
from llama_tp.parallel.groups import Ranks, close
from llama_tp.parallel.health import Watch
from llama_tp.text.grammar_pool import GrammarPool
from llama_tp.text.stream import TextStream
from llama_tp.text.token_table import Tokenizer

# with nothing to compute but samples whose masks are late: until the caller may look around
IDLE_S = 0.05
BYE = -1  # a message whose first int is negative is not a step: the driver has ended


@dataclass
class Stats:
    """Sums since the engine was built; times are wall seconds on the driver.

    A step with any prompt tokens counts as prefill, the others as decode.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_s: float = 0.0
    # of both, what the driver spent outside the model: scheduling, sending, text
    driver_s: float = 0.0
    n_requests: int = 0
    first_token_s: float = 0.0  # from the first submit to the first token of all


@dataclass
class _Track:
    """The engine's own book about one sequence: its text so far, its prompt's logprobs by position
    (None: not wanted, or handed over)."""

    stream: TextStream
    prompt_logprobs: dict[int, TokenLogprobs] | None = None


class Engine:
    """One rank's engine.

    Args:
        runner: this rank's model and cache.
        scheduler: the driver's policy; workers have one too and never ask it.
        tokenizer: for stop ids and text.
        watch: liveness, told what this rank is busy with.
        seed: for requests that bring none.
        n_ahead: steps planned and sent while the one before still runs, 0 or 1: worth it where
            running is not waiting (CUDA).
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        ranks: Ranks,
        watch: Watch,
        seed: int = 1,
        n_ahead: int = 0,
    ):
        self.runner, self.scheduler, self.tokenizer = runner, scheduler, tokenizer
        self.ranks, self.watch, self.seed, self.n_ahead = ranks, watch, seed, n_ahead
        self.stats, self.n_steps, self.dismissed = Stats(), 0, False
        self._tracks: dict[Sequence, _Track] = {}
        self._running: deque[tuple[Step, Sampled]] = deque()
        # of the tokens that the driver has chosen in the step that runs
        self._logprobs: dict[Sequence, TokenLogprobs] = {}
        self._masks: Masks | None = None  # from the first request with a form on
        self._late: set[Sequence] = set()  # of the step that runs: those whose masks had not come
        self._judge = Judge(self._choose, self._score)

    @property
    def is_driver(self) -> bool:
        return self.ranks.is_driver

    @property
    def has_work(self) -> bool:
        return bool(self._tracks)

    # --------------------------------------------------------------------------------------- driver

    def check(self, request: Request) -> None:
        """Raises UserError if the request can never run: ids outside the vocabulary, a prompt too
        long, a form that cannot be followed, which may take seconds to find out."""
        self._check_ids(request)
        if request.params.form:
            self._forms().pool.try_form(request.params.form)

    def _check_ids(self, request: Request) -> None:
        request.check(self.runner.n_vocab)
        self.scheduler.check_fits(len(request.prompt_ids) + request.n_written)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises UserError, and queues nothing, if it can never run; whether its
        form can be followed its deltas tell."""
        self._check_ids(request)
        if any(sequence.request.id == request.id for sequence in self._tracks):
            raise UserError(
                "a request's id must be its own",
                f"{request.id!r} is still running",
                "give it another id",
            )
        seed = request.params.seed
        if seed is None:
            seed = (self.seed << 32) + self.stats.n_requests
        masks = self._forms() if request.params.form else None
        sequences = [
            Sequence(request, index, seed)
            for index in range(request.params.n)
            if not request.outputs or request.outputs[index] is not None
        ]
        tracks = [
            (sequence, _Track(self._stream(sequence), {} if sequence.scores_prompt else None))
            for sequence in sequences
        ]
        if not self.stats.n_requests:
            self._first_submit = time.perf_counter()
        self.stats.n_requests += 1
        for sequence, track in tracks:
            self.scheduler.add(sequence)
            self._tracks[sequence] = track
        if masks:
            masks.begin(request, sequences)

    def _forms(self) -> Masks:
        """Made for the first form: a process of its own reads the vocabulary. Raises UserError
        where forms cannot be followed."""
        self._masks = self._masks or Masks(GrammarPool(self.tokenizer), len(self.scheduler.rows))
        return self._masks

    def _stream(self, sequence: Sequence) -> TextStream:
        """The text of a sequence, up to what it had written before it came here; the same as if it
        had been written here."""
        params = sequence.params
        stream = TextStream(self.tokenizer, () if params.min_tokens else params.stop)
        for n_output, token in enumerate(sequence.output_ids, start=1):
            stream.push([token])
            if n_output == params.min_tokens:
                stream.set_stop_strings(params.stop)
        return stream

    def abort(self, request_id: str) -> list[Delta]:
        """Ends a request; its blocks are free at once. Nothing happens if it is unknown."""
        return [self._finished(sequence) for sequence in self.scheduler.abort(request_id)]

    def step(self) -> list[Delta]:
        """One step of whatever is queued, on all ranks. -> what every sequence gained; [] when
        there is no work.

        With n_ahead, the step after it is planned and sent before this one's tokens are read. Where
        the driver chooses tokens itself or follows a form nothing is planned ahead: it needs the
        very tokens that would still be missing.
        """
        started, run_s = time.perf_counter(), 0.0
        if self._masks:
            self._masks.look()
        n_ahead = 0 if self.scheduler.n_driven else self.n_ahead
        while len(self._running) <= n_ahead and (step := self.scheduler.plan()):
            run_s += self._launch(step)
        if not self._running:
            if self.has_work:  # all of it waits for masks
                self._forms().look(IDLE_S)
            return self._end_forms()
        step, read = self._running.popleft()
        reading = time.perf_counter()
        with self.watch.busy(f"step {step.number}"):
            sampled = dict(read())
            for sequence in self._late:
                if sequence.row is not None:
                    sampled[sequence.row] = LATE
        run_s += time.perf_counter() - reading
        deltas = [
            self._gained(sequence, token)
            for sequence, token in self.scheduler.update(step, sampled)
        ]
        deltas += self._end_forms()
        while self._running and not self.has_work:  # what was planned ahead is computed in vain
            step_ahead, read = self._running.popleft()
            self.scheduler.update(step_ahead, read())
        seconds = time.perf_counter() - started
        self._count(step, seconds)
        self.stats.driver_s += seconds - run_s
        if deltas and not self.stats.first_token_s:
            self.stats.first_token_s = time.perf_counter() - self._first_submit
        return deltas

    def _end_forms(self) -> list[Delta]:
        """Ends the samples whose forms cannot be kept, and asks for the next masks of the
        others."""
        if not self._masks:
            return []
        failures = [
            (sequence, error)
            for sequence, error in self._masks.failures()
            if sequence in self._tracks
        ]
        for sequence, _ in failures:
            self.scheduler.finish(sequence, "abort")
        self._masks.ask()
        return [
            self._finished(sequence, error=str(error), refused=(error.what, error.found, error.fix))
            for sequence, error in failures
        ]

    def _launch(self, step: Step) -> float:
        """Driver: has all ranks run a step. -> seconds that the model took, on CPU; on CUDA, to be
        set going."""
        send_ints(step.encode(), self.ranks)
        self._logprobs.clear()
        self._late.clear()
        started = time.perf_counter()
        self._running.append((step, self._run(step, self._judge)))
        return time.perf_counter() - started - self.runner.planning_s

    def _run(self, step: Step, judge: Judge | None) -> Sampled:
        self.n_steps = step.number
        with self.watch.busy(f"step {step.number}"):
            return self.runner.run(step, judge, lambda: self._share_masks(step))

    def _share_masks(self, step: Step) -> torch.Tensor:
        """(masked rows, words) int32 on every rank: the driver's. A row whose mask is late may
        write anything: it is not used."""
        words = torch.full(
            (sum(row.masked for row in step.rows), -(-self.tokenizer.n_vocab // 32)),
            -1,
            dtype=torch.int32,
        )
        if self.is_driver:
            masks = self._masks_of(
                [self.scheduler.in_row(row.row) for row in step.rows if row.masked],
                len(words) == len(step.rows),
            )
            for place, mask in zip(words, masks):
                if mask is not None:
                    place.copy_(mask)
        return share_words(words, self.ranks)

    def _masks_of(self, sequences: list[Sequence], alone: bool) -> list[torch.Tensor | None]:
        """alone: the step has no other rows. -> for each which tokens may come ((words,) int32
        bits, sampler.allowed); None without a form, and of one that is late."""
        formed = [sequence for sequence in sequences if sequence.params.form]
        if not formed:
            return [None] * len(sequences)
        followed = self._forms()
        followed.wait(formed, alone and len(formed) == len(sequences))
        masks = {sequence: followed.get(sequence) for sequence in formed}
        self._late |= {sequence for sequence, mask in masks.items() if mask is None}
        return [
            None if (mask := masks.get(sequence)) is None else torch.from_numpy(mask.view(np.int32))
            for sequence in sequences
        ]

    def _choose(self, rows: list[StepRow], logits: torch.Tensor) -> list[int]:
        sequences = [self.scheduler.in_row(row.row) for row in rows]
        masks = self._masks_of(sequences, alone=False)
        choices = choose(sequences, logits, self.tokenizer.stop_ids, masks, self.runner.n_vocab)
        self._logprobs.update(
            (sequence, choice.logprobs)
            for sequence, choice in zip(sequences, choices)
            if choice.logprobs
        )
        return [NOT_FINITE if choice.token is None else choice.token for choice in choices]

    def _score(self, row: StepRow, first: int, logits: torch.Tensor) -> None:
        """Prompt logprobs: the logits at position p are those of the token at p + 1."""
        sequence = self.scheduler.in_row(row.row)
        n_top, known = sequence.params.prompt_logprobs, self._tracks[sequence].prompt_logprobs
        if n_top is None or known is None:  # not wanted, or handed over
            return
        targets = sequence.ids[first + 1 : min(first + 1 + len(logits), sequence.n_prompt)]
        scores = score(logits[: len(targets)], targets, n_top, self.runner.n_vocab)
        known.update(enumerate(scores, start=first + 1))

    def _gained(self, sequence: Sequence, token: int) -> Delta:
        """The delta of a sequence that has just sampled, and the decision whether it ends here."""
        track, params = self._tracks[sequence], sequence.params
        if token == NOT_FINITE:
            return self._finished(
                sequence,
                error="the model's logits are not finite (NaN or inf): weights or dtype are at "
                "fault, try --dtype float32",
            )
        if token in params.stop_ids or (token in self.tokenizer.stop_ids and not params.ignore_eos):
            self.scheduler.finish(sequence, "stop")
            return self._finished(sequence)
        if params.form and not sequence.finish_reason:
            self._forms().sampled(sequence, token)
        text = track.stream.push([token])
        if sequence.n_output == params.min_tokens:
            track.stream.set_stop_strings(params.stop)
        if track.stream.stopped:
            self.scheduler.finish(sequence, "stop")
        logprobs = (self._logprobs[sequence],) if params.logprobs is not None else ()
        if sequence.finish_reason:
            return self._finished(sequence, (token,), text, logprobs)
        return Delta(
            sequence.request.id,
            sequence.index,
            (token,),
            text,
            logprobs,
            prompt_logprobs=self._prompt_logprobs(sequence),
        )

    def _finished(
        self,
        sequence: Sequence,
        ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprobs, ...] = (),
        error: str | None = None,
        refused: tuple[str, str, str] | None = None,
    ) -> Delta:
        prompt_logprobs = self._prompt_logprobs(sequence)
        track = self._tracks.pop(sequence)
        if sequence.params.form:
            self._forms().end(sequence)
        return Delta(
            sequence.request.id,
            sequence.index,
            ids,
            text + track.stream.finish(),
            logprobs,
            sequence.finish_reason,
            error,
            prompt_logprobs,
            refused,
        )

    def _prompt_logprobs(self, sequence: Sequence) -> tuple[TokenLogprobs | None, ...] | None:
        """Handed over once: with sample 0's first delta."""
        track = self._tracks[sequence]
        scores, track.prompt_logprobs = track.prompt_logprobs, None
        return (
            None
            if scores is None
            else tuple(scores.get(position) for position in range(sequence.n_prompt))
        )

    def _count(self, step: Step, seconds: float) -> None:
        n_prompt = sum(row.n for row in step.rows if not row.decodes)
        if n_prompt:
            self.stats.prefill_tokens += n_prompt
            self.stats.prefill_s += seconds
        else:
            self.stats.decode_steps += 1
            self.stats.decode_tokens += len(step.rows)
            self.stats.decode_s += seconds

    def dismiss(self) -> None:
        """Driver: ends the workers' `follow`, and the processes that follow forms. A worker that
        has left already needs no word."""
        if not self.dismissed and self.is_driver:
            with contextlib.suppress(RuntimeError):
                send_ints([BYE], self.ranks)
        if self._masks:
            self._masks.close()
        self.dismissed = True

    def close(self) -> None:
        """Dismisses the workers, stops watching and takes down this rank's part of the groups. Safe
        to call twice."""
        self.dismiss()
        self.watch.close()
        self.runner.release()
        close(self.ranks)

    # -------------------------------------------------------------------------------------- workers

    def follow(self) -> list[int]:
        """Worker: runs the driver's steps until it sends another message, which is returned."""
        while True:
            ints = recv_ints(self.ranks)
            if ints[0] < 0:
                return ints
            self._run(Step.decode(ints), None)
