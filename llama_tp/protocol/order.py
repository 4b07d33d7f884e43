"""From a checked body to an Order: requests that the engine can run as they are, and how their
answers are to look.

All that can be known without a model's weights is decided here (text to ids, lengths, ids outside
the vocabulary), so that `Engine.submit` has nothing left to refuse.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llama_tp.arch.errors import UserError, short
from llama_tp.engine.request import MAX_SAMPLES, Request, SamplingParams
from llama_tp.protocol.errors import RequestError, invalid, unsupported
from llama_tp.protocol.fields import Body, ChatBody, CompletionBody
from llama_tp.protocol.forms import read_form
from llama_tp.protocol.messages import dialog_of
from llama_tp.protocol.tools import Tools, read_tools
from llama_tp.text.chat_format import ChatFormat, DialogEncoder
from llama_tp.text.token_table import Tokenizer

# SamplingParams' names, where clients have others.
_CLIENTS_NAMES = {"stop_ids": "stop_token_ids", "logprobs": "top_logprobs"}
MAX_SEED = 2**63


@dataclass(frozen=True)
class Limits:
    """What one request may ask for: it is refused before anything is allocated for it."""

    max_n: int = MAX_SAMPLES
    max_prompts: int = 1024  # in one completions request
    max_samples: int = 2048  # prompts times n
    max_stop: int = 16  # stop strings


@dataclass(frozen=True)
class ServedModel:
    """What of a model a request is held against.

    Args:
        name: as the replies say it.
        max_seq_len: longest sequence, prompt and output; the scheduler's `max_len` where that is
            less.
        n_vocab: ids that may be sent: the tokenizer's, as far as the embedding goes. The runner's
            `n_vocab`.
        chat: what encodes dialogs, if it is not the Llama 3 chat format.
        aliases: other names that it is listed under.
        strict_name: a request for any other name is refused. Else every name will do, as there is
            one model: clients have theirs built in ("dummy", "tgi", "gpt-4o").
    """

    name: str
    tokenizer: Tokenizer
    max_seq_len: int
    n_vocab: int
    limits: Limits = Limits()
    chat: DialogEncoder | None = None
    aliases: tuple[str, ...] = ()
    strict_name: bool = False
    special_names: dict[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "special_names", {i: name for name, i in self.tokenizer.specials.items()}
        )

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def check_name(self, wanted: str | None) -> None:
        """Raises RequestError for a name that is not served."""
        if self.strict_name and wanted is not None and wanted not in self.names:
            raise no_model(wanted, self.names)


def no_model(wanted: str, names: tuple[str, ...]) -> RequestError:
    """The refusal of a name that is not served."""
    return RequestError(
        "no such model",
        f"found {wanted[:80]!r}",
        f"this server has {' and '.join(map(repr, names))}"[:200],
        param="model",
        code="model_not_found",
        status=404,
    )


@dataclass(frozen=True)
class Order:
    """What was asked, ready to run: `requests[i]` is prompt i; sample j of it is choice `i * n + j`
    of the reply.

    Attributes:
        id: of the reply; that of request i is "{id}-{i}".
        echo: texts of the prompts, if they go in front of the samples' texts.
        logprobs: None: not asked for; else how many of the likeliest tokens to show beside each.
        hides_output: only the prompt is wanted (max_tokens 0): the one token that the engine writes
            is dropped.
        end_ids: a sample that ends in one of these has met its end, though the engine was told to
            go on. Only where one token is written and scored: the engine shows no stop ids, and
            those who score count on an entry for each token.
        include_usage, continuous_usage: the counts in a last chunk, or in all.
        with_ids: token ids beside the texts.
        tools: what the model was told that it may call; its text is searched for calls.
        form_field: the field that asked for the form of the answers, if one did (requests'
            params.form).
    """

    kind: Literal["chat", "completion"]
    id: str
    requests: tuple[Request, ...]
    stream: bool = False
    echo: tuple[str, ...] | None = None
    logprobs: int | None = None
    hides_output: bool = False
    end_ids: frozenset[int] = frozenset()
    include_usage: bool = False
    continuous_usage: bool = False
    with_ids: bool = False
    tools: Tools | None = None
    form_field: str = ""

    @property
    def n(self) -> int:
        return self.requests[0].params.n

    @property
    def n_choices(self) -> int:
        return self.n * len(self.requests)


def prepare(
    body: ChatBody | CompletionBody, model: ServedModel, id: str, seed: int | None = None
) -> Order:
    """The order of a checked body. `seed` is used if the body brings none: prompt i gets seed + i.

    Raises RequestError for what `model` cannot run: another model, too long, too many, ids outside
    the vocabulary, no chat format.
    """
    model.check_name(body.model)
    _check_counts(body, model.limits)
    common: dict[str, Any] = dict(
        id=id,
        stream=body.stream,
        include_usage=body.stream_options.include_usage,
        continuous_usage=body.stream_options.continuous_usage_stats,
        with_ids=body.return_token_ids,
    )
    if isinstance(body, ChatBody):
        return _chat(body, model, seed, common)
    return _completion(body, model, seed, common)


def _chat(body: ChatBody, model: ServedModel, seed: int | None, common: dict[str, Any]) -> Order:
    tools = read_tools(body)
    for name in ("add_special_tokens", "echo"):
        if getattr(body, name):
            raise unsupported(name, "found true", "leave it out")
    _check_template_fields(body, model)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid(
            "top_logprobs", "top_logprobs needs logprobs", "logprobs is not true", "set logprobs"
        )
    wanted = (body.top_logprobs or 0) if body.logprobs else None
    max_tokens = (
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    )
    form_field, form = read_form(body, tools) or ("", None)
    params = _params(body, model, max_tokens=max_tokens, logprobs=wanted, form=form)
    request = _request(
        "messages", common["id"], 0, _chat_ids(body, model, tools), _seeded(params, seed, 0), model
    )
    return Order(
        "chat", requests=(request,), logprobs=wanted, tools=tools, form_field=form_field, **common
    )


def _check_template_fields(body: ChatBody, model: ServedModel) -> None:
    """Refuses what is meant for the chat template and would change what it writes; what no template
    asks for changes nothing."""
    reads = ChatFormat.reads if model.chat is None else model.chat.reads
    if body.reasoning_effort is not None and reads("reasoning_effort"):
        raise unsupported(
            "reasoning_effort",
            f"found {body.reasoning_effort[:80]!r}",
            "the chat template reads it: leave it out",
        )
    for name, value in body.chat_template_kwargs.items():
        if value is not None and reads(name):
            raise unsupported(
                f"chat_template_kwargs.{name[:64]}",
                f"found {short(value)}",
                "the chat format is the server's own: leave it out",
            )


def _chat_ids(body: ChatBody, model: ServedModel, tools: Tools | None) -> list[int]:
    if body.continue_final_message and (
        body.add_generation_prompt and "add_generation_prompt" in body.model_fields_set
    ):
        raise invalid(
            "continue_final_message",
            "continue_final_message excludes add_generation_prompt",
            "both are true",
            "set one of them",
        )
    if body.continue_final_message and model.chat is not None:
        raise unsupported(
            "continue_final_message",
            "found true, and a chat template of the model's own",
            "leave it out",
        )
    ids = encode(
        model,
        body.messages,
        body.add_generation_prompt and not body.continue_final_message,
        None if tools is None else list(tools.offered),
    )
    # without the id that ends the last message
    return ids[:-1] if body.continue_final_message else ids


def encode(
    model: ServedModel,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """The ids of a conversation in the model's chat format. Raises RequestError."""
    dialog = dialog_of(messages)
    try:
        return (model.chat or ChatFormat(model.tokenizer)).encode_dialog(
            dialog, add_generation_prompt=add_generation_prompt, tools=tools
        )
    except UserError as error:
        raise invalid("messages", error.what, error.found, error.fix) from None
    except RecursionError:  # of a schema, or of a call's arguments
        raise invalid(
            "messages", "messages or tools are nested too deeply", "", "send a flatter schema"
        ) from None


def _completion(
    body: CompletionBody, model: ServedModel, seed: int | None, common: dict[str, Any]
) -> Order:
    if body.best_of not in (None, body.n):
        raise unsupported("best_of", f"found best_of {body.best_of} and n {body.n}", "leave it out")
    hides_output = body.max_tokens == 0
    scores = body.echo and body.logprobs is not None
    scores_one = scores and body.max_tokens <= 1 and not body.min_tokens and not body.ignore_eos
    form_field, form = read_form(body, None) or ("", None)
    params = _params(
        body,
        model,
        max_tokens=body.max_tokens or 1,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if scores else None,
        form=form,
    )
    scores_one = scores_one and form is None
    end_ids = (
        frozenset((*model.tokenizer.stop_ids, *params.stop_ids)) if scores_one else frozenset()
    )
    if scores_one:
        params = replace(params, ignore_eos=True, stop_ids=())
    prompts = _prompts(body.prompt, model.limits)
    requests, texts = [], []
    for i, prompt in enumerate(prompts):
        ids = (
            model.tokenizer.encode(prompt, bos=body.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
        )
        requests.append(_request("prompt", common["id"], i, ids, _seeded(params, seed, i), model))
        if body.echo:
            texts.append(prompt if isinstance(prompt, str) else model.tokenizer.decode(ids))
    if len(requests) * body.n > model.limits.max_samples:
        raise invalid(
            "n",
            "prompt times n is too many samples",
            f"found {len(requests)} prompts and n {body.n}",
            f"ask for at most {model.limits.max_samples} in one request",
        )
    return Order(
        "completion",
        requests=tuple(requests),
        echo=tuple(texts) if body.echo else None,
        logprobs=body.logprobs,
        hides_output=hides_output,
        end_ids=end_ids,
        form_field=form_field,
        **common,
    )


def _prompts(prompt: object, limits: Limits) -> list[str | list[int]]:
    """The prompts of a completions body: a text, a list of token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise _wrong_prompt(
            f"found {type(prompt).__name__}" if prompt != [] else "found an empty list"
        )
    if type(prompt[0]) is int:
        return [prompt]
    if len(prompt) > limits.max_prompts:
        raise invalid(
            "prompt",
            "prompt holds too many prompts",
            f"found {len(prompt)}",
            f"send at most {limits.max_prompts} in one request",
        )
    for i, each in enumerate(prompt):
        if not isinstance(each, (str, list)) or not isinstance(each, type(prompt[0])) or each == []:
            raise _wrong_prompt(f"found {short(each)} at place {i}")
    return prompt


def _wrong_prompt(found: str) -> RequestError:
    return invalid(
        "prompt",
        "prompt has a wrong value",
        found,
        "send a text, token ids, a list of texts, or a list of lists of token ids",
    )


def _check_counts(body: Body, limits: Limits) -> None:
    if body.n > limits.max_n:
        raise invalid("n", "n is too large", f"found {body.n}", f"ask for at most {limits.max_n}")
    if isinstance(body.stop, list) and len(body.stop) > limits.max_stop:
        raise invalid(
            "stop",
            "stop holds too many strings",
            f"found {len(body.stop)}",
            f"send at most {limits.max_stop}",
        )


def _params(body: ChatBody | CompletionBody, model: ServedModel, **others: Any) -> SamplingParams:
    names = (
        "n",
        "temperature",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "stop",
        "top_k",
        "min_p",
        "repetition_penalty",
        "min_tokens",
        "ignore_eos",
    )
    try:
        params = SamplingParams(
            **{name: getattr(body, name) for name in names},
            stop_ids=body.stop_token_ids,
            logit_bias=_biases(body.logit_bias),
            **others,
        )
        params.check(model.n_vocab)
    except UserError as error:
        raise _named(error, body) from None
    return params


def _biases(pairs: dict[str, float]) -> dict[int, float]:
    wrong = [key for key in pairs if not (key.isascii() and key.isdigit() and len(key) < 20)]
    if wrong:
        raise UserError(
            "logit_bias needs token ids as keys",
            f"found {wrong[0][:80]!r}",
            'write e.g. {"128009": -100}',
        )
    return {int(key): bias for key, bias in pairs.items()}


def _named(error: UserError, body: Body) -> RequestError:
    """SamplingParams' refusal in the words of the client's request."""
    name = error.what.split()[0]
    theirs = _CLIENTS_NAMES.get(name, name)
    if name == "logprobs" and isinstance(body, CompletionBody):
        theirs = name
    if name == "max_tokens" and getattr(body, "max_completion_tokens", None) is not None:
        theirs = "max_completion_tokens"
    return RequestError(
        error.what.replace(name, theirs, 1),
        error.found,
        error.fix,
        param=theirs if theirs in type(body).model_fields else None,
        code="invalid_value",
    )


def _seeded(params: SamplingParams, seed: int | None, i: int) -> SamplingParams:
    return (
        params
        if params.seed is not None or seed is None
        else replace(params, seed=(seed + i) % MAX_SEED)
    )


def _request(
    param: str, id: str, i: int, ids: list[int], params: SamplingParams, model: ServedModel
) -> Request:
    if len(ids) + 1 > model.max_seq_len:
        found = (
            f"found {len(ids)} tokens, and the context of {model.max_seq_len} must also hold "
            "one of output"
        )
        raise RequestError(
            "the prompt is too long",
            found,
            "shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )
    try:
        request = Request(f"{id}-{i}", ids, params)
        request.check(model.n_vocab)
    except UserError as error:
        raise invalid(param, error.what, error.found, error.fix) from None
    return request
