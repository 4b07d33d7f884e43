"""What a caller asks of sampling (SamplingParams), what of it travels to the ranks (SamplingMode,
Draw), and the logprobs that come back.

Knows no tensors. Everything a caller can get wrong is refused here, so that the rooms behind may
trust every number: NaN, infinities, bools in the place of ints, ids that the vocabulary does not
have. A value that slips through would end the step of everybody (vLLM CVE-2026-44223).

One more filter, such as typical_p, takes three files: this one (field, check, Draw, mode_of),
filters.py (its rule in `filter_probs`) and protocol/fields.py (its name in a request's body). One
more penalty takes the same three, with its rule in `adjusted`.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral, Real
from typing import NamedTuple, cast

from llama_tp.arch.errors import UserError, short
from llama_tp.text.grammar import Form

# for token counts and ids: anything larger is a mistake, and int32 tensors hold it
MAX_COUNT = 2**31 - 1
MAX_SAMPLES = 128  # OpenAI's bound for n
# of a stop string: the end of the text is held against all that they can begin with, at every token
MAX_STOP_CHARS = 1000
MAX_STOP_IDS = 1000
MAX_LOGPROBS = 20  # OpenAI's bound for top_logprobs, vLLM's default
MIN_TEMPERATURE = 1e-6  # below it, fp32 logits divided by it overflow; 0 means greedy


def refused(name: str, rule: str, value: object, fix: str = "correct the value") -> UserError:
    return UserError(
        f"{name} must be {rule}", f"found {short(value)} ({type(value).__name__})", fix
    )


def _whole(name: str, value: object, low: int, high: int = MAX_COUNT) -> int:
    """`value` as a plain int in [low, high]; takes numpy's ints too, refuses bools and floats."""
    number = cast(int, value)  # mypy: numbers.Integral does not compare with int
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= number <= high:
        raise refused(name, f"a whole number from {low} to {high}", value)
    return int(value)


def _real(name: str, value: object, low: float, high: float) -> float:
    """`value` as a finite float in [low, high]; refuses bools, NaN and infinities."""
    number = cast(float, value)  # not float(value): an int of 400 digits has none
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= number <= high:
        raise refused(name, f"a number from {low:g} to {high:g}", value)
    return float(value)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise refused(name, "true or false", value)
    return value


def _optional_whole(name: str, value: object, low: int, high: int = MAX_COUNT) -> int | None:
    return None if value is None else _whole(name, value, low, high)


def _stop_strings(value: object) -> tuple[str, ...]:
    """None, one string or several, as a tuple of non-empty strings."""
    value = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping)):
        raise refused("stop", "a string or a list of strings", value)
    value = tuple(value)
    for one in value:
        if not isinstance(one, str) or not one:
            raise refused("stop", "made of strings that are not empty", one)
        if len(one) > MAX_STOP_CHARS:
            raise UserError(
                f"stop must be made of strings of at most {MAX_STOP_CHARS:,} characters",
                f"found one of {len(one):,}",
                "give a shorter one: its beginning",
            )
    return value


def token_ids(name: str, value: object) -> tuple[int, ...]:
    value = () if value is None else value
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise refused(name, "a list of token ids", value)
    # plain ints, all but always, skip the slow check: a prompt may hold a million
    return tuple(
        one if type(one) is int and 0 <= one <= MAX_COUNT else _whole(name, one, 0) for one in value
    )


def _stop_ids(value: object) -> tuple[int, ...]:
    ids = tuple(dict.fromkeys(token_ids("stop_ids", value)))
    if len(ids) > MAX_STOP_IDS:
        raise UserError(
            f"stop_ids must hold at most {MAX_STOP_IDS:,} ids", f"found {len(ids):,}", "give fewer"
        )
    return ids


def _biases(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise refused("logit_bias", "a mapping from token id to bias", value)
    return {
        _whole("logit_bias (key)", key, 0): _real("logit_bias", bias, -100.0, 100.0)
        for key, bias in value.items()
    } or None


def check_vocabulary(name: str, ids: Iterable[int], n_vocab: int) -> None:
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

    def __post_init__(self) -> None:
        temperature = _real("temperature", self.temperature, 0.0, 100.0)
        if 0.0 < temperature < MIN_TEMPERATURE:
            raise refused(
                "temperature", f"0 or at least {MIN_TEMPERATURE:g}", temperature, "use 0 for greedy"
            )
        top_p = _real("top_p", self.top_p, 0.0, 1.0)
        if top_p == 0.0:
            raise refused("top_p", "above 0, and at most 1", top_p, "use temperature 0 for greedy")
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
            raise refused("form", "a Form of llama_tp.text.grammar", self.form)
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
        check_vocabulary("logit_bias", self.logit_bias or (), n_vocab)
        check_vocabulary("stop_ids", self.stop_ids, n_vocab)


class SamplingMode(IntEnum):
    """Where and how the tokens of a row are chosen. All but GATHERED choose on the shards of the
    vocabulary, without the driver.

    GATHERED: the driver chooses from all logits.
    GREEDY: the most likely token.
    TOP_K_TOP_P: a draw behind top_k, top_p or min_p, from the best few of each shard.
    UNFILTERED: a draw from the whole distribution.
    """

    GATHERED = 0
    GREEDY = 1
    TOP_K_TOP_P = 2
    UNFILTERED = 3


DRAWN_MODES = (SamplingMode.TOP_K_TOP_P, SamplingMode.UNFILTERED)  # those with a Draw
# These stand where a sampled id would.
NOT_FINITE = -1  # the row's logits hold NaN or infinity
SHORTLIST_TOO_SHORT = -2  # the best few do not show where the filters cut: all logits are needed


class Draw(NamedTuple):
    """What a draw needs besides logits, as ints that travel in a step: floats as the bits of a
    double, `u` (uniform in [0, 1)) times 2**53. filters.py's `unpacked` reads them."""

    temperature: int
    top_k: int
    top_p: int
    min_p: int
    u: int

    @classmethod
    def of(cls, params: "SamplingParams", u: int = 0) -> "Draw":
        """What `params` say, and the draw."""
        return cls(
            _bits(params.temperature), params.top_k, _bits(params.top_p), _bits(params.min_p), u
        )

    def at(self, u: int) -> "Draw":
        """The same with another draw."""
        return Draw(*self[:-1], u)


def mode_of(params: SamplingParams) -> SamplingMode:
    """The mode of a request. What changes single logits, or asks for logprobs, needs all logits in
    one place."""
    if (
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.min_tokens
        or params.logprobs is not None
    ):
        return SamplingMode.GATHERED
    return drawn_mode(params)


def drawn_mode(params: SamplingParams) -> SamplingMode:
    """How a request's tokens are chosen once penalties are applied: never GATHERED."""
    if params.temperature == 0:
        return SamplingMode.GREEDY
    filters = params.top_k or params.top_p < 1 or params.min_p > 0
    return SamplingMode.TOP_K_TOP_P if filters else SamplingMode.UNFILTERED


def random53(seed: int, index: int, position: int) -> int:
    """The draw of one sample at one position (0 is the prompt's first), 0 <= draw < 2**53: a hash,
    the same on every machine. No generator is involved, so rows may be computed in any order."""
    key = f"{seed}/{index}/{position}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11


def _bits(value: float) -> int:
    """A non-negative double as an int64 of the same bits."""
    return int.from_bytes(struct.pack(">d", value), "big")


# Draws a greedy row's token where others of the step are drawn: top_k 1.
GREEDY_DRAW = Draw(_bits(1.0), 1, _bits(1.0), _bits(0.0), 0)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of one token and of the most likely alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
