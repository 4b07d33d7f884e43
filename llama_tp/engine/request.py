"""A request (Request) and the driver's book about each sample of it (Sequence).

Knows no tensors, no scheduling and no text: token ids in, token ids out. A caller's mistakes are
refused here and in sampling/params.py.
"""

from dataclasses import dataclass, field

from llama_tp.arch.errors import UserError
from llama_tp.sampling.params import (
    Draw,
    SamplingMode,
    SamplingParams,
    check_vocabulary,
    mode_of,
    random53,
    refused,
    token_ids,
)

_GATHERED = SamplingMode.GATHERED


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt and how to continue it. `prompt_ids` must hold at least one id (BOS, for an empty
    text).

    `outputs` is for a request that was interrupted: for each of its n samples the ids it had
    written, from which it goes on as if nothing had happened, or None if it had finished. It needs
    the seed of its first run.
    """

    id: str
    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    outputs: tuple[tuple[int, ...] | None, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise refused("a request's id", "a string that is not empty", self.id)
        if not isinstance(self.params, SamplingParams):
            raise refused("a request's params", "a SamplingParams", self.params)
        object.__setattr__(self, "prompt_ids", list(token_ids("the prompt", self.prompt_ids)))
        if not self.prompt_ids:
            raise UserError(
                "the prompt is empty", "found no token ids", "begin it with BOS at least"
            )
        outputs = tuple(
            None if ids is None else token_ids("an output", ids) for ids in self.outputs
        )
        if outputs and len(outputs) != self.params.n:
            raise UserError(
                "there must be an output for each sample",
                f"found {len(outputs)}, and n is {self.params.n}",
                "give as many, None for those that have finished",
            )
        object.__setattr__(self, "outputs", outputs)
        if self.params.max_tokens is not None and self.n_written >= self.params.max_tokens:
            raise UserError(
                "an output already has max_tokens",
                f"found {self.n_written} tokens, and max_tokens {self.params.max_tokens}",
                "give None for a sample that has finished",
            )

    @property
    def n_written(self) -> int:
        """Length of the longest output it goes on from."""
        return max((len(ids) for ids in self.outputs if ids), default=0)

    def check(self, n_vocab: int) -> None:
        """Raises UserError for ids of the prompt or the params that a vocabulary of `n_vocab` does
        not have."""
        check_vocabulary("the prompt", self.prompt_ids, n_vocab)
        for ids in self.outputs:
            check_vocabulary("an output", ids or (), n_vocab)
        self.params.check(n_vocab)


class Sequence:
    """The driver's book about one sample of a request; the scheduler writes it, the engine reads
    it.

    `ids` is the prompt and then the output. While a sequence runs it has a `row` (the same on every
    rank) and the `blocks` of its KV cache, the first `n_sent` of which the ranks have been told. A
    preemption takes both and sets the counts back to 0; `ids` stays, so that the output is
    recomputed as if it were prompt.

    `n_computed` positions have their KV in the cache. `n_planned` will have, once the steps in
    flight have run, and `n_pending` of the tokens that those steps sample are not in `ids` yet.
    Without steps planned ahead the engine sees n_planned == n_computed and n_pending == 0 between
    steps.
    """

    def __init__(self, request: Request, index: int = 0, seed: int = 1):
        self.request = request
        self.params = request.params
        self.index = index  # which of the request's n samples
        self.seed = seed  # resolved: the request's own or the engine's
        self.usual_mode = mode_of(request.params)
        self.mode = self.usual_mode  # GATHERED for a while after SHORTLIST_TOO_SHORT
        self.n_too_short = 0  # how often a shortlist was
        self._draw = Draw.of(request.params)
        written = request.outputs[index] if request.outputs else None
        self.ids = [*request.prompt_ids, *(written or ())]
        self.n_prompt = len(request.prompt_ids)
        self.arrival = -1  # order of arrival, given by Scheduler.add
        self.limit = 0  # most ids it may hold, prompt included; by Scheduler.add
        self.held = False  # what it may write next is not known yet (masks): no token is sampled
        self.finish_reason: str | None = None  # None | "stop" | "length" | "abort"
        # of the full blocks of `ids`, see blocks.py; survive preemption
        self.keys: list[bytes] = []
        self.leave()

    def leave(self) -> None:
        """Forget everything about the cache: the state of a sequence without a row."""
        self.row: int | None = None
        self.blocks: list[int] = []
        self.n_sent = self.n_computed = self.n_planned = self.n_pending = 0
        self.decoding = False  # its last token is what its row sampled last

    @property
    def needs_driver(self) -> bool:
        """The driver must know its last token before the next can be sampled."""
        return self.mode == _GATHERED or self.params.form is not None

    @property
    def n_ids(self) -> int:
        """Length once the steps in flight have run."""
        return len(self.ids) + self.n_pending

    def draw(self) -> Draw:
        """For the token that follows the steps in flight."""
        return self._draw.at(random53(self.seed, self.index, self.n_ids))

    @property
    def n_output(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.ids[self.n_prompt :]

    @property
    def scores_prompt(self) -> bool:
        """The prompt's logits are still wanted: once a request (sample 0), and not again when
        output is recomputed."""
        return self.params.prompt_logprobs is not None and self.index == 0 and self.n_output == 0

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.id!r}, index={self.index}, row={self.row}, "
            f"prompt={self.n_prompt}, "
            f"output={self.n_output}, computed={self.n_computed}, finish={self.finish_reason})"
        )
