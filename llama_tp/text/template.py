"""A conversation as token ids, by the `chat_template` that a Hugging Face folder brings along.

The template is jinja2 (an extra, 3.1.6 or newer: older sandboxes leak) and comes from the model's
folder. It is rendered in jinja2's sandbox, where it can reach no Python, with limits on time and on
the size of what it makes: they end mistakes and plain bombs with a message. They are no wall
against an author who looks for the gap in them, who could as well have spoilt the weights.

What transformers' `apply_chat_template` gives is what is given here, with one difference: special
tokens are read out of what the template writes, never out of messages and tools, so that a user's
"<|eot_id|>" stays plain text. Nothing is put before the template's text: a second BOS cannot
happen.
"""

import datetime
import functools
import hashlib
import json
import operator
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar

from llama_tp.arch.errors import UserError
from llama_tp.arch.json_file import read_json
from llama_tp.arch.regular_file import read_file
from llama_tp.text.chat_format import check_dialog
from llama_tp.text.token_table import Tokenizer, well_formed

MAX_TEMPLATE = 1 << 18  # characters of source
MAX_SIZE = 1 << 22  # characters or items of anything that it makes
MAX_S = 2.0
T = TypeVar("T")
Jinja = Any  # jinja2 is an extra, so the names of its types are not known here
_MARK = "\ud800"  # a lone surrogate: no well-formed text holds it
_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")  # a tag that only training uses


def open_template(
    ckpt_dir: str, tokenizer: Tokenizer, now: datetime.datetime | None = None
) -> "ChatTemplate":
    """The template of a folder, for `tokenizer`; `now` as in ChatTemplate. Raises as
    `find_template`."""
    source, tool_source, tokens = find_template(ckpt_dir)
    return ChatTemplate(source, tokenizer, tool_source, tokens, now)


def find_template(ckpt_dir: str) -> tuple[str, str | None, dict[str, str]]:
    """(source, source for dialogs with tools if that is another, bos_token and so on) of a folder's
    template: chat_template.jinja and additional_chat_templates/tool_use.jinja, else chat_template
    in tokenizer_config.json. UserError if it has none, if it is broken, or if jinja2 is missing;
    needs no tokenizer, and is quick."""
    config, sources = _read(ckpt_dir)
    source, tool_source = sources.get("default"), sources.get("tool_use")
    if not isinstance(source, str) or not isinstance(tool_source, str | None):
        raise UserError(
            f"{ckpt_dir} has no chat template",
            "neither chat_template.jinja nor chat_template in tokenizer_config.json",
            "name a Hugging Face folder that has one, or leave out --chat_template hf",
        )
    for each in filter(None, (source, tool_source)):
        _compiled(each)
    return (
        source,
        tool_source,
        {
            name: _spelling(config.get(name))
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        },
    )


def _read(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A folder's tokenizer_config.json, and its templates by name."""
    where = os.path.join(folder, "tokenizer_config.json")
    config = read_json(where) if os.path.lexists(where) else {}
    named = config.get("chat_template")
    if isinstance(named, list):
        named = {
            one["name"]: one["template"]
            for one in named
            if isinstance(one, dict) and isinstance(one.get("name"), str) and "template" in one
        }
    paths = {
        "default": os.path.join(folder, "chat_template.jinja"),
        "tool_use": os.path.join(folder, "additional_chat_templates", "tool_use.jinja"),
    }
    found = {name: _source(path) for name, path in paths.items() if os.path.lexists(path)}
    return config, found or (named if isinstance(named, dict) else {"default": named})


def _source(path: str) -> str:
    try:
        return read_file(path, 4 * MAX_TEMPLATE).decode("utf-8")
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read", str(error), "download it again, or use --chat_template meta"
        ) from None


class ChatTemplate:
    """Encodes dialogs for `tokenizer` as `source` says; does for an HF folder what ChatFormat does
    for all.

    Args:
        source: the template; tool_source: another one for dialogs with tools.
        tokens: bos_token and so on, as the template calls them.
        now: the time for templates that ask for it; the moment of each dialog unless given (a batch
            job must repeat itself).

    Raises UserError for a template that does not compile.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        tool_source: str | None = None,
        tokens: Mapping[str, str] | None = None,
        now: datetime.datetime | None = None,
    ):
        self.tokenizer = tokenizer
        self._sources = (source, tool_source)
        self._template = _compiled(source)
        self._tool_template = self._template if tool_source is None else _compiled(tool_source)
        self._words = frozenset(re.findall(r"\w+", f"{source} {tool_source or ''}"))
        self._tokens, self._now = dict(tokens or {}), now
        names = sorted(tokenizer.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def encode_dialog(
        self,
        messages: Sequence[Mapping[str, Any]],
        strip: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation, with ChatFormat's arguments. UserError for what is no list of
        messages, and where the template refuses the dialog (its own words) or goes over a limit."""
        check_dialog(messages)
        messages = [_as_templates_expect(message, strip) for message in messages]
        messages, tools = (_guarded(value, self._special) for value in (messages, tools))
        text = self._render(
            messages, tools, add_generation_prompt, self._now or datetime.datetime.now()
        )
        ids, end = [], 0
        for special in self._special.finditer(text):
            ids += self.tokenizer.encode(text[end : special.start()].replace(_MARK, ""))
            ids.append(self.tokenizer.special_id(special[0]))
            end = special.end()
        return ids + self.tokenizer.encode(text[end:].replace(_MARK, ""))

    def reads(self, name: str) -> bool:
        """Whether the template mentions `name`: then a value for it could change what is
        written."""
        return name in self._words

    def digest(self) -> str:
        """Of all that the ids follow from, beside the dialog, the tokenizer and the time."""
        return hashlib.sha256(
            repr((self._sources, sorted(self._tokens.items()))).encode()
        ).hexdigest()

    def _render(
        self, messages: object, tools: object, add_generation_prompt: bool, now: datetime.datetime
    ) -> str:
        template = self._tool_template if tools else self._template
        deadline = time.monotonic() + MAX_S

        # called for each line that runs, also in a loop that writes nothing
        def watch(frame: FrameType, event: str, arg: Any) -> Any:
            if time.monotonic() > deadline:
                raise _Limit(f"it took more than {MAX_S:g} s")
            return watch

        before = sys.gettrace()
        sys.settrace(watch)
        try:
            text: str = template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=now.strftime,
                **self._tokens,
            )
            return text
        except _Limit as limit:
            raise UserError(
                "the chat template goes too far", str(limit), "use --chat_template meta"
            ) from None
        except Exception as error:  # whatever its author wrote: TypeError, jinja2's own errors, ...
            raise UserError(
                "the chat template refuses these messages",
                f"{type(error).__name__}: {error}"[:300],
                "change the messages, or use --chat_template meta",
            ) from None
        finally:
            sys.settrace(before)


class _Limit(Exception):
    """A template goes over a limit."""


def _compiled(source: str) -> Jinja:
    """The template in its sandbox. UserError if it does not compile."""
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError:
        raise UserError(
            "a chat template needs jinja2", "it is not installed", "pip install 'llama_tp[hf]'"
        ) from None
    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise UserError(
            "a chat template needs jinja2 3.1.6 or newer",
            f"found {jinja2.__version__}",
            "pip install --upgrade jinja2",
        )
    if len(source) > MAX_TEMPLATE:
        raise UserError(
            "the chat template is too long",
            f"{len(source):,} characters",
            f"the most is {MAX_TEMPLATE:,}",
        )
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: object) -> NoReturn:
        raise jinja2.TemplateError(str(message))

    class Namespace(jinja2.utils.Namespace):  # jinja2's own sets attributes of any name
        def __setitem__(self, name: Any, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name}")
            super().__setitem__(name, value)

    def namespace(**attributes: Any) -> Namespace:
        made = Namespace()
        for name, value in attributes.items():
            made[name] = value
        return made

    environment.globals = {
        "raise_exception": refuse,
        "namespace": namespace,
        "range": environment.globals["range"],
        "dict": lambda *pairs, **named: dict(*pairs, **named),
    }
    _limit(environment)
    source = _GENERATION.sub(
        lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", source
    )
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise UserError(
            "the chat template is broken",
            f"{error}"[:300],
            "download it again, or use --chat_template meta",
        ) from None
    template.root_render_func.__globals__["str_join"] = environment.concat  # what ~ compiles to
    return template


def _limit(environment: Jinja) -> None:
    """Puts a size check around each operator, filter and call of a sandbox."""
    checked = {"+": operator.add, "*": operator.mul, "**": operator.pow, "%": operator.mod}
    environment.intercepted_binops = frozenset(checked)
    environment.binop_table.update(
        {sign: functools.partial(_operate, sign, function) for sign, function in checked.items()}
    )
    environment.concat = lambda pieces: _sized("".join(_within(map(str, pieces))))
    environment.filters = {
        name: _modest(function) for name, function in environment.filters.items()
    }
    environment.filters["tojson"] = _modest(_to_json)
    call = environment.call
    environment.call = lambda context, function, *args, **named: _sized(
        call(context, function, *_modestly(args), **named)
    )


def _operate(sign: str, function: Callable[..., Any], left: Any, right: Any) -> Any:
    if sign == "*":
        for many, n in ((left, right), (right, left)):
            if (
                isinstance(many, (str, list, tuple))
                and isinstance(n, int)
                and len(many) * n > MAX_SIZE
            ):
                raise _Limit(f"it makes something of {len(many) * n:,} characters or items")
    if sign in ("*", "**") and all(isinstance(one, int) for one in (left, right)):
        if left.bit_length() * (right if sign == "**" else 1) + right.bit_length() > MAX_SIZE:
            raise _Limit("it makes a number with too many digits")
    if sign == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\*|[0-9]{5})", left):
        raise _Limit("it makes a very wide text")
    return _sized(function(left, right))


def _modest(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which takes no huge numbers and gives nothing huge."""

    @functools.wraps(function)
    def limited(*args: Any, **named: Any) -> Any:
        return _sized(function(*_modestly(args), **dict(zip(named, _modestly(named.values())))))

    return limited


def _modestly(values: Iterable[Any]) -> list[Any]:
    values = list(values)
    if any(isinstance(value, int) and abs(value) > MAX_SIZE for value in values):
        raise _Limit("it asks for something huge")
    return values


def _sized(value: T) -> T:
    if isinstance(value, (str, list, tuple, dict)) and len(value) > MAX_SIZE:
        raise _Limit(f"it makes something of {len(value):,} characters or items")
    return value


def _within(pieces: Iterable[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_SIZE:
            raise _Limit(f"it writes more than {MAX_SIZE:,} characters")
        yield piece


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: jinja2's own escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _spelling(token: str | dict[str, Any] | None) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _as_templates_expect(message: Mapping[str, Any], strip: bool) -> dict[str, Any]:
    """An OpenAI message with arguments as objects where they are JSON: templates write them with
    tojson."""
    message = dict(message)
    message["content"] = message["content"] or ""
    if strip:
        message["content"] = message["content"].strip()
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)  # templates ask whether the key is there
        return message
    message["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
    return message


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    try:
        function["arguments"] = json.loads(function["arguments"] or "{}")
    # an object already, or broken by the model: as it is
    except (TypeError, ValueError, RecursionError):
        pass
    return {**call, "function": function}


def _guarded(value: Any, special: re.Pattern[str]) -> Any:
    """`value` with the mark inside each spelling of a special token, and nowhere else, in whatever
    texts it holds."""
    if isinstance(value, str):
        return special.sub(lambda name: name[0][:1] + _MARK + name[0][1:], well_formed(value))
    if isinstance(value, Mapping):
        return {_guarded(key, special): _guarded(one, special) for key, one in value.items()}
    return [_guarded(one, special) for one in value] if isinstance(value, (list, tuple)) else value
