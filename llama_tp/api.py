"""The Python face: `Llama.build(...)`, with the calls and results of Meta's llama3 package, and a
modern set beside them.

Every rank runs the same script and makes the same calls; each gets the driver's results
(engine/calls.py). Scripts written for Meta's repository run with only their import line changed.
"""

import atexit
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ParamSpec, TypeVar, cast, get_type_hints

from llama_tp.arch.config import check_launch
from llama_tp.arch.errors import UserError
from llama_tp.arch.options import EngineOptions, args_doc, names
from llama_tp.engine.build import build
from llama_tp.engine.calls import Calls
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import SamplingParams
from llama_tp.engine.session import Sample, chat_encoder, run
from llama_tp.text.chat_format import ChatFormat, Dialog
from llama_tp.text.template import ChatTemplate

Prompt = str | list[int]
Fields = ParamSpec("Fields")
T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """One sample of one prompt.

    `tokens` are the output's ids without the stop id; `logprobs` has one dict a token ({"token",
    "logprob", "top": [[id, logprob], ...]}) if asked for; `prompt_logprobs` the same for the
    prompt, None for its first token. `finish_reason` is None while a stream still grows, then
    "stop", "length" or "abort" (with `error`).
    """

    text: str
    tokens: list[int]
    finish_reason: str | None = None
    logprobs: list[dict[str, Any]] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    index: int = 0
    error: str | None = None


def _called_with_the_fields_of(
    options: Callable[Fields, EngineOptions],
) -> Callable[[Callable[[EngineOptions], T]], Callable[Fields, T]]:
    """Lets a function of EngineOptions be called with their fields, by place or by name."""

    def with_fields(function: Callable[[EngineOptions], T]) -> Callable[Fields, T]:
        @functools.wraps(function)
        def call(*args: Fields.args, **kwargs: Fields.kwargs) -> T:
            if unknown := set(kwargs) - set(names()):
                raise UserError(
                    f"{function.__qualname__} has no argument {', '.join(sorted(unknown))}",
                    "",
                    f"use {', '.join(names())}",
                )
            return function(options(*args, **kwargs))

        # what help(Llama.build) shows: the fields, without the table's marks
        signature, types = inspect.signature(EngineOptions), get_type_hints(EngineOptions)
        vars(call)["__signature__"] = signature.replace(
            parameters=[
                each.replace(annotation=types[name]) for name, each in signature.parameters.items()
            ],
            return_annotation=inspect.signature(function).return_annotation,
        )
        call.__doc__ = f"{inspect.getdoc(function)}\n\n{args_doc()}"
        return call

    return with_fields


class Llama:
    """A loaded model. Build it with `Llama.build` on every rank."""

    def __init__(self, engine: Engine, ckpt_dir: str = "", chat_template: str = "meta"):
        self.engine, self.tokenizer = engine, engine.tokenizer
        self._template = (ckpt_dir, chat_template)
        self._calls = Calls(engine)

    @staticmethod
    @_called_with_the_fields_of(EngineOptions)
    def build(options: EngineOptions) -> "Llama":
        """Loads this rank's shard. On workers stdout is quiet from here on, so that scripts print
        once.

        The parameters are the engine options (arch/options.py), first the six of Meta's
        `Llama.build`, in its order.

        Raises UserError on a single rank; under torchrun an error ends the whole job with one
        message.
        """
        check_launch(options.ckpt_dir, int(os.environ.get("WORLD_SIZE", 1)))
        engine = build(options)
        if not engine.is_driver:
            sys.stdout = open(os.devnull, "w")
        atexit.register(engine.close)
        return Llama(engine, options.ckpt_dir, options.chat_template)

    def close(self) -> None:
        """Leaves the job; also done when the script ends."""
        self.engine.close()

    # -------------------------------------------------------------------------------- Meta's llama3

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continues prompts of token ids. -> (ids of each output, logprobs of the same or None).

        Ids end before the first stop id; with echo they begin with the prompt (whose first logprob
        is 0.0, as Meta's). UserError for an output that was aborted, since Meta's results have no
        place for that.
        """
        wanted = 0 if logprobs else None
        params = SamplingParams(
            max_tokens=max_gen_len,
            temperature=temperature,
            top_p=_meta_top_p(top_p),
            logprobs=wanted,
            prompt_logprobs=wanted if echo else None,
        )
        outputs = self._complete(
            "generate",
            lambda: [("", list(ids)) for ids in prompt_tokens],
            [params] * len(prompt_tokens),
        )
        for number, out in enumerate(outputs, start=1):
            if out.error:
                raise UserError(
                    f"prompt {number} could not be completed",
                    out.error,
                    "complete() returns the others",
                )
        tokens = [
            (list(ids) if echo else []) + out.tokens for ids, out in zip(prompt_tokens, outputs)
        ]
        if not logprobs:
            return tokens, None
        values = [
            [
                each["logprob"] if each else 0.0
                for each in (out.prompt_logprobs or []) + (out.logprobs or [])
            ]
            for out in outputs
        ]
        return tokens, values

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[dict[str, Any]]:
        """Continues texts. -> [{"generation": text}], with "tokens" (their texts) and "logprobs" if
        asked for."""
        ids = [self.tokenizer.encode(prompt, bos=True) for prompt in prompts]
        tokens, values = self.generate(
            ids, self._length(max_gen_len), temperature, top_p, logprobs, echo
        )
        texts = [self.tokenizer.decode(each) for each in tokens]
        if values is None:
            return [{"generation": text} for text in texts]
        return [
            {
                "generation": text,
                "tokens": [self.tokenizer.decode([t]) for t in each],
                "logprobs": numbers,
            }
            for text, each, numbers in zip(texts, tokens, values)
        ]

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[dict[str, Any]]:
        """Answers dialogs; contents are stripped, as llama3 did. -> [{"generation": {"role":
        "assistant", "content"}}], with "tokens" (their texts) and "logprobs" if asked for."""
        ids = [self._chat.encode_dialog(dialog, strip=True) for dialog in dialogs]
        tokens, values = self.generate(ids, self._length(max_gen_len), temperature, top_p, logprobs)
        answers: list[dict[str, Any]] = [
            {"generation": {"role": "assistant", "content": self.tokenizer.decode(each)}}
            for each in tokens
        ]
        if values is not None:
            for answer, each, numbers in zip(answers, tokens, values):
                answer |= {
                    "tokens": [self.tokenizer.decode([t]) for t in each],
                    "logprobs": numbers,
                }
        return answers

    @functools.cached_property
    def _chat(self) -> ChatFormat | ChatTemplate:
        return chat_encoder(self.engine, *self._template)

    def _length(self, max_gen_len: int | None) -> int:
        return max_gen_len or self.engine.scheduler.max_seq_len - 1

    # ------------------------------------------------------------------------------ the modern face

    def complete(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Completion | list[Completion]:
        """Continues one prompt (text, or token ids taken as they are) or several.

        params: one for all, or one a prompt. -> a Completion for one prompt with n = 1, else a
        list, prompt by prompt and sample by sample.
        """
        one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        # no type says that a list of ids is one prompt, and a list of lists several
        several = cast(list[Prompt], [prompts] if one else list(prompts))
        each = _params(params, len(several))
        out = self._complete(
            "complete", lambda: [self._encoded(prompt) for prompt in several], each
        )
        return out[0] if one and len(out) == 1 else out

    def chat(
        self,
        messages: Dialog | Sequence[Dialog],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Completion | list[Completion]:
        """Answers one conversation (a list of {"role", "content"}) or several. Results as
        `complete`."""
        one = bool(messages) and isinstance(messages[0], dict)
        dialogs = cast(list[Dialog], [messages] if one else list(messages))
        each = _params(params, len(dialogs))
        out = self._complete(
            "chat", lambda: [("", self._chat.encode_dialog(dialog)) for dialog in dialogs], each
        )
        return out[0] if one and len(out) == 1 else out

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Completion]:
        """Yields the completion of one prompt as it grows; the last has a finish_reason. Samples
        come one after the
        other if params.n > 1."""

        def work() -> Iterator[dict[str, Any]]:
            return map(
                _as_dict, run(self.engine, [self._encoded(prompt)], [params or SamplingParams()])
            )

        for item in self._calls.stream("stream", work):
            yield _completion(item)

    def _encoded(self, prompt: Prompt) -> tuple[str, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt, bos=True)
        return "", list(prompt)

    def _complete(
        self,
        name: str,
        prompts: Callable[[], list[tuple[str, list[int]]]],
        params: list[SamplingParams],
    ) -> list[Completion]:
        def work() -> list[dict[str, Any]]:
            return [
                _as_dict(sample)
                for sample in run(self.engine, prompts(), params)
                if sample.finish_reason
            ]

        items = cast(list[object], self._calls.call(name, work))  # JSON, as the driver sent it
        return [_completion(item) for item in items]


def _meta_top_p(top_p: float) -> float:
    """Meta's top_p 0 keeps the likeliest token only; ours must be above 0, and any tiny value does
    the same."""
    return top_p if top_p > 0 else 1e-9


def _params(
    params: SamplingParams | Sequence[SamplingParams] | None, n: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if len(params) != n:
        raise UserError(
            "params must be one SamplingParams, or one a prompt",
            f"found {len(params)} for {n} prompts",
            "match them",
        )
    return list(params)


def _completion(item: object) -> Completion:
    """What `_as_dict` made of a sample, from the driver."""
    return Completion(**cast(dict[str, Any], item))


def _as_dict(sample: Sample) -> dict[str, Any]:
    return {
        "text": sample.text,
        "tokens": list(sample.tokens),
        "finish_reason": sample.finish_reason,
        "index": sample.index,
        "logprobs": [asdict(each) for each in sample.logprobs] or None,
        "error": sample.error,
        "prompt_logprobs": sample.prompt_logprobs
        and [each and asdict(each) for each in sample.prompt_logprobs],
    }
