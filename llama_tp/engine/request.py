"""What a caller asks for (SamplingParams, Request) and the driver's book about each sample of it
(Sequence).

Knows no tensors, no scheduling and no text: token ids in, token ids out. Everything a caller can
get wrong is refused here, so that the rooms behind may trust every number: NaN, infinities, bools
in the place of ints, ids that the vocabulary does not have. A value that slips through would end
the step of everybody (vLLM CVE-2026-44223).
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

from llama_tp.arch.errors import UserError, short
from llama_tp.engine.step import FILTERED, GATHERED, GREEDY, WHOLE, Draw
from llama_tp.text.grammar import Form

# for token counts and ids: anything larger is a mistake, and int32 tensors hold it
MAX_COUNT = 2**31 - 1
MAX_SAMPLES = 128  # OpenAI's bound for n
# of a stop string: the end of the text is held against all that they can begin with, at every token
MAX_STOP_CHARS = 1000
MAX_STOP_IDS = 1000
MAX_LOGPROBS = 20  # OpenAI's bound for top_logprobs, vLLM's default
MIN_TEMPERATURE = 1e-6  # below it, fp32 logits divided by it overflow; 0 means greedy


def _refuse(name: str, rule: str, value: object, fix: str = "correct the value") -> UserError:
    return UserError(
        f"{name} must be {rule}", f"found {short(value)} ({type(value).__name__})", fix
    )


def _whole(name: str, value: object, low: int, high: int = MAX_COUNT) -> int:
    """`value` as a plain int in [low, high]; takes numpy's ints too, refuses bools and floats."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= value <= high:
        raise _refuse(name, f"a whole number from {low} to {high}", value)
    return int(value)


def _real(name: str, value: object, low: float, high: float) -> float:
    """`value` as a finite float in [low, high]; refuses bools, NaN and infinities."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:
        raise _refuse(name, f"a number from {low:g} to {high:g}", value)
    return float(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, "true or false", value)
    return value


def _optional_whole(name: str, value: object, low: int, high: int = MAX_COUNT) -> int | None:
    return None if value is None else _whole(name, value, low, high)


def _stop_strings(value: object) -> tuple[str, ...]:
    """None, one string or several, as a tuple of non-empty strings."""
    value = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise _refuse("stop", "a string or a list of strings", value)
    value = tuple(value)
    for one in value:
        if not isinstance(one, str) or not one:
            raise _refuse("stop", "made of strings that are not empty", one)
        if len(one) > MAX_STOP_CHARS:
            raise UserError(
                f"stop must be made of strings of at most {MAX_STOP_CHARS:,} characters",
                f"found one of {len(one):,}",
                "give a shorter one: its beginning",
            )
    return value


def _ids(name: str, value: object) -> tuple[int, ...]:
    value = () if value is None else value
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise _refuse(name, "a list of token ids", value)
    # plain ints, all but always, skip the slow check: a prompt may hold a million
    return tuple(
        one if type(one) is int and 0 <= one <= MAX_COUNT else _whole(name, one, 0) for one in value
    )


def _stop_ids(value: object) -> tuple[int, ...]:
    ids = tuple(dict.fromkeys(_ids("stop_ids", value)))
    if len(ids) > MAX_STOP_IDS:
        raise UserError(
            f"stop_ids must hold at most {MAX_STOP_IDS:,} ids", f"found {len(ids):,}", "give fewer"
        )
    return ids


def _biases(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _refuse("logit_bias", "a mapping from token id to bias", value)
    return {
        _whole("logit_bias (key)", key, 0): _real("logit_bias", bias, -100.0, 100.0)
        for key, bias in value.items()
    } or None


def _check_vocabulary(name: str, ids: Iterable[int], n_vocab: int) -> None:
    """An id outside the embedding is a device assert on CUDA, which poisons the process: refuse it
    on the host."""
    outside = [one for one in ids if not 0 <= one < n_vocab]
    if outside:
        raise UserError(
            f"{name} holds ids outside the vocabulary",
            f"found {outside[:5]}; ids run from 0 to {n_vocab - 1}",
            "use ids of this model's tokenizer",
        )


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end. Checked and normalised when
    built.

    Args:
        max_tokens: most tokens to generate, >= 1; None: as many as the context holds.
        min_tokens: before this many tokens no stop id is sampled and no stop string heeded.
        temperature: 0 is greedy; else 1e-6 to 100. The default, like top_p's, is Meta's.
        top_p: in (0, 1]: the smallest set of tokens that holds this much probability.
        top_k: only the k likeliest tokens; 0 (or vLLM's -1) is off.
        min_p: in [0, 1]: only tokens at least this fraction as likely as the likeliest.
        repetition_penalty: 0.01 to 100, 1 is off; divides (multiplies) positive (negative) logits
            of tokens that the prompt or the completion holds.
        presence_penalty, frequency_penalty: -2 to 2, subtracted once, or for each time, a token is
          in the completion.
        logit_bias: token id -> -100 to 100, added to the logits.
        seed: int64; None: the engine's seed and the request's index.
        n: samples of the same prompt, 1 to 128.
        stop: strings that end a completion, each of 1,000 characters at most; one string, or
            several.
        stop_ids: token ids that end a completion, besides the tokenizer's own.
        ignore_eos: the tokenizer's stop ids do not end a completion; those of `stop_ids` still do.
        logprobs: None is off; k gives the chosen token's logprob and those of the k <= 20
            likeliest. They are those of the raw logits, normalised over all rows of the
            checkpoint's embedding, also those that no token id stands for.
        prompt_logprobs: the same for every token of the prompt but the first.
        form: what the completion must look like (text/grammar.py); not with min_tokens or
            ignore_eos.

    Raises UserError naming the field.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    form: Form | None = None

    def __post_init__(self):
        temperature = _real("temperature", self.temperature, 0.0, 100.0)
        if 0.0 < temperature < MIN_TEMPERATURE:
            raise _refuse(
                "temperature", f"0 or at least {MIN_TEMPERATURE:g}", temperature, "use 0 for greedy"
            )
        top_p = _real("top_p", self.top_p, 0.0, 1.0)
        if top_p == 0.0:
            raise _refuse("top_p", "above 0, and at most 1", top_p, "use temperature 0 for greedy")
        checked = dict(
            max_tokens=_optional_whole("max_tokens", self.max_tokens, 1),
            min_tokens=_whole("min_tokens", self.min_tokens, 0),
            temperature=temperature,
            top_p=top_p,
            top_k=max(0, _whole("top_k", self.top_k, -1)),
            min_p=_real("min_p", self.min_p, 0.0, 1.0),
            repetition_penalty=_real("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            presence_penalty=_real("presence_penalty", self.presence_penalty, -2.0, 2.0),
            frequency_penalty=_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            logit_bias=_biases(self.logit_bias),
            seed=_optional_whole("seed", self.seed, -(2**63), 2**63 - 1),
            n=_whole("n", self.n, 1, MAX_SAMPLES),
            stop=_stop_strings(self.stop),
            stop_ids=_stop_ids(self.stop_ids),
            ignore_eos=_flag("ignore_eos", self.ignore_eos),
            logprobs=_optional_whole("logprobs", self.logprobs, 0, MAX_LOGPROBS),
            prompt_logprobs=_optional_whole(
                "prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS
            ),
        )
        for name, value in checked.items():
            # the only write to a frozen instance: its own birth
            object.__setattr__(self, name, value)
        if self.form is not None and not isinstance(self.form, Form):
            raise _refuse("form", "a Form of llama_tp.text.grammar", self.form)
        if self.form is not None and (self.min_tokens or self.ignore_eos):
            raise UserError(
                "a form decides where the completion ends",
                f"found min_tokens {self.min_tokens}, ignore_eos {self.ignore_eos}",
                "leave min_tokens and ignore_eos out",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(
                "min_tokens must not exceed max_tokens",
                f"found min_tokens {self.min_tokens} and max_tokens {self.max_tokens}",
                "lower min_tokens",
            )

    def check(self, n_vocab: int) -> None:
        """Raises UserError for ids in `logit_bias` or `stop_ids` that a vocabulary of `n_vocab`
        does not have."""
        _check_vocabulary("logit_bias", self.logit_bias or (), n_vocab)
        _check_vocabulary("stop_ids", self.stop_ids, n_vocab)


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

    def __post_init__(self):
        if not isinstance(self.id, str) or not self.id:
            raise _refuse("a request's id", "a string that is not empty", self.id)
        if not isinstance(self.params, SamplingParams):
            raise _refuse("a request's params", "a SamplingParams", self.params)
        object.__setattr__(self, "prompt_ids", list(_ids("the prompt", self.prompt_ids)))
        if not self.prompt_ids:
            raise UserError(
                "the prompt is empty", "found no token ids", "begin it with BOS at least"
            )
        outputs = tuple(None if ids is None else _ids("an output", ids) for ids in self.outputs)
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
        _check_vocabulary("the prompt", self.prompt_ids, n_vocab)
        for ids in self.outputs:
            _check_vocabulary("an output", ids or (), n_vocab)
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
        self.usual_way = way(request.params)
        # GATHERED for a while where filters could not decide on the shards
        self.way = self.usual_way
        self.n_undecided = 0  # how often that was
        self.ids = [*request.prompt_ids, *(request.outputs[index] if request.outputs else ())]
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
    def driven(self) -> bool:
        """The driver must know its last token before the next can be sampled."""
        return self.way == GATHERED or self.params.form is not None

    @property
    def n_ids(self) -> int:
        """Length once the steps in flight have run."""
        return len(self.ids) + self.n_pending

    def draw(self) -> Draw:
        """For the token that follows the steps in flight."""
        p = self.params
        return Draw(
            _bits(p.temperature),
            p.top_k,
            _bits(p.top_p),
            _bits(p.min_p),
            random53(self.seed, self.index, self.n_ids),
        )

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


def way(params: SamplingParams) -> int:
    """How a request's tokens may be sampled (StepRow.way). What changes single logits, or asks for
    their logarithms, needs all of them in one place."""
    if (
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.min_tokens
        or params.logprobs is not None
    ):
        return GATHERED
    if params.temperature == 0:
        return GREEDY
    return FILTERED if params.top_k or params.top_p < 1 or params.min_p > 0 else WHOLE


def random53(seed: int, index: int, position: int) -> int:
    """The draw of one sample at one position, 0 <= draw < 2**53: a hash, the same on every
    machine."""
    key = f"{seed}/{index}/{position}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11


def _bits(value: float) -> int:
    """A non-negative double as an int64 of the same bits."""
    return int.from_bytes(struct.pack(">d", value), "big")
