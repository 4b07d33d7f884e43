"""Forms that an answer must have (JSON, a JSON schema, a regex, a grammar, a tool call) -> which
tokens may come next.

llguidance (an extra) does the work: it walks the vocabulary's bytes along a parser, without the
GIL. A `Form` is checked text that can travel; `Grammars` belongs to a tokenizer and turns forms
into a `Constraint`, the state of one sample. Masks are bits: token i may come if bit i % 32 of word
i // 32 is set; the padding of an embedding has none. Stop ids are allowed where the form is
complete, other special tokens never. Where the form leaves one text only, the mask asks for the
tokenizer's own spelling of it.

JSON is written compactly, with one blank or none behind , and : and none elsewhere. Free blanks let
a model that is pushed off its way write them for ever. Llama's own JSON has the blank, as
json.dumps writes it; xgrammar's fixed format has it too, llguidance's has none. Either forces
tokens on a model that has learnt the other, so both may come, and a text has at most one blank for
each , and :.

What a client sends can be slow: llguidance's limits bound a grammar's size and not its time. What
repeats too much is refused here (`repetition`). Compile what strangers send in a process with
limits (`grammar_pool`). References in a schema to other documents are not followed. Knows no
sampling.
"""

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_tp.arch.errors import UserError
from llama_tp.text.call_grammar import BUILT_IN
from llama_tp.text.repetition import check_regex, check_schema, checked_lark
from llama_tp.text.token_table import Tokenizer

MAX_SOURCE = 1 << 16  # characters of a schema, regex or grammar
MAX_TOOLS = 128  # OpenAI's bound
MAX_CALLS = 32  # in one answer that has to call: a model that cannot end would go on to max_tokens
# regexes
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# Models have learnt these, too. Any: llguidance's JsonCompileOptions, which only its stubs have.
_JSON_OPTIONS: Any = {**_COMPACT, "lenient": False, "json_allow_general_unicode_escapes": True}


@dataclass(frozen=True)
class Form:
    """What an answer must look like: `kind` is "json" (`source`: a schema), "regex" or "lark". Made
    by the functions below."""

    kind: str
    source: str


def json_object() -> Form:
    """Any JSON object: response_format json_object."""
    return Form("json", '{"type": "object"}')


def json_schema(schema: object) -> Form:
    """JSON that a schema allows: response_format json_schema. UserError unless `schema` is an
    object of bearable size."""
    # x-guidance: the client's own options of llguidance, blanks included
    if isinstance(schema, Mapping):
        schema = {key: value for key, value in schema.items() if key != "x-guidance"}
    source = _source("the JSON schema", _json(schema))
    check_schema(schema)
    return Form("json", source)


def regex(pattern: object) -> Form:
    """Text that a whole regex matches (Rust's syntax: no look-around, no back-references)."""
    source = _source("the regex", pattern)
    check_regex(source)
    return Form("regex", source)


def lark(grammar: object) -> Form:
    """Text of a grammar in llguidance's variant of Lark, with a rule `start`; the JSON in it is
    compact unless it says otherwise."""
    return Form("lark", checked_lark(_source("the grammar", grammar), _COMPACT))


def tool_call(
    tools: Sequence[Mapping[str, Any]],
    name: str | None = None,
    parallel: bool = True,
    or_text: bool = False,
) -> Form:
    """A call of one of an OpenAI request's `tools`, or of the one called `name`, as JSON that
    `tool_calls` reads; several with ; between them if `parallel`. For tool_choice required, or a
    named one; `or_text`: or else a text that does not begin like a call, for strict tools that may
    be left alone. UserError if there is no such tool."""
    rules: list[str] = []
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, Mapping):
            function = {"name": tool.get("type")}
        if name in (None, function.get("name")):
            schema = function.get("parameters") or _parameters_of_built_in(function.get("name"))
            if isinstance(schema, Mapping):
                # arguments are, whether or not the schema says it
                schema = {"type": "object", **schema}
            head = json.dumps(
                f'{{"name": {json.dumps(function.get("name"))}, "parameters": ', ensure_ascii=False
            )
            rules.append(f'call_{len(rules)}: {head} %json {_json(schema, _JSON_OPTIONS)} "}}"')
    if not rules or len(rules) > MAX_TOOLS:
        found = f"found {len(rules)}" + (f" called {name!r}" if name else "")
        raise UserError(
            f"a tool must be called, out of 1 to {MAX_TOOLS}", found, "correct tools or tool_choice"
        )
    calls = " | ".join(f"call_{i}" for i in range(len(rules)))
    start = f'call ("; " call){{0,{MAX_CALLS - 1}}}' if parallel else "call"
    start = f"start: {start} | text\ntext: /([^{{\\[<](?s:.*))?/" if or_text else f"start: {start}"
    return lark("\n".join([start, f"call: {calls}", *rules]))


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raises UserError where no form can be followed: without llguidance, or with a tokenizer that
    cannot end an answer."""
    if importlib.util.find_spec("llguidance") is None:
        raise UserError(
            "structured output needs llguidance",
            "it is not installed",
            "pip install 'llama_tp[serve]'",
        )
    if not tokenizer.stop_ids:
        raise UserError(
            "structured output needs a token that ends an answer",
            "this tokenizer has none",
            "check --tokenizer_path",
        )


class Grammars:
    """Forms for one tokenizer. Building it reads the whole vocabulary (0.3 s for Llama 3's): keep
    it.

    Raises UserError without llguidance, and for a tokenizer that cannot end an answer.
    """

    def __init__(self, tokenizer: Tokenizer):
        check_tokenizer(tokenizer)
        import llguidance

        self.n_vocab, self.stop_ids = tokenizer.n_vocab, tokenizer.stop_ids
        self._matcher = llguidance.LLMatcher
        self._limits = llguidance.LLParserLimits(
            verbose_errors=False, precompute_large_lexemes=False
        )
        vocabulary = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        self._tokenizer = llguidance.LLTokenizer(
            vocabulary, n_vocab=tokenizer.n_vocab, eos_token=list(tokenizer.stop_ids)
        )

    def start(self, form: Form, ids: Iterable[int] = ()) -> "Constraint":
        """The state of a sample that has written `ids` so far. UserError for a form that llguidance
        does not take, and why."""
        try:
            if form.kind == "json":
                grammar = self._matcher.grammar_from_json_schema(
                    form.source, overrides=_JSON_OPTIONS
                )
            else:
                make = {
                    "regex": self._matcher.grammar_from_regex,
                    "lark": self._matcher.grammar_from_lark,
                }[form.kind]
                grammar = make(form.source)
        except ValueError as error:
            raise _refused(str(error)) from None
        matcher = self._matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        constraint = Constraint(matcher, self.n_vocab)
        for token in ids:
            constraint.advance(token)
        return constraint


class Constraint:
    """What one sample may write next."""

    def __init__(self, matcher: Any, n_vocab: int):  # an llguidance.LLMatcher
        self._matcher, self._n_words = matcher, (n_vocab + 31) // 32

    @property
    def complete(self) -> bool:
        """The text so far has the form: it may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def ended(self) -> bool:
        """Nothing but a stop id can follow."""
        return bool(self._matcher.is_stopped())

    def mask(self) -> np.ndarray:
        """(n_words,) uint32, one bit a token. UserError if finding it is too much work, or if
        nothing can follow."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._n_words]
        if self._matcher.is_error() or not words.any():
            raise UserError(
                "the form of the answer cannot be kept",
                _told(self._matcher.get_error() or "no token can follow"),
                "make the schema, regex or grammar simpler",
            )
        return words

    def advance(self, token: int) -> None:
        """The sample has written `token`. UserError if it was not allowed."""
        if not self._matcher.consume_token(token):
            raise UserError(
                "the form of the answer is broken",
                f"token {token}: {_told(self._matcher.get_error())}",
                "sample only what the mask allows",
            )

    def fork(self) -> "Constraint":
        """The same state once more, for another sample of the same prompt."""
        other = object.__new__(Constraint)
        other._matcher, other._n_words = self._matcher.deep_copy(), self._n_words
        return other


class _Vocabulary:
    """A tokenizer as llguidance wants to see one."""

    def __init__(self, tokenizer: Tokenizer):
        names = {i: name for name, i in tokenizer.specials.items()}
        n_bytes = (tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab))
        # An id without bytes is never text: it gets a name and counts as special.
        self.tokens = [
            data or names.get(i, f"<|nothing_{i}|>").encode() for i, data in enumerate(n_bytes)
        ]
        self.special_token_ids = [
            i for i in range(tokenizer.n_vocab) if not tokenizer.token_bytes(i)
        ]
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.stop_ids[0]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _parameters_of_built_in(name: object) -> dict[str, Any]:
    if name not in BUILT_IN:
        return {"type": "object"}
    key = "code" if name == "code_interpreter" else "query"
    return {
        "type": "object",
        "properties": {key: {"type": "string"}},
        "required": [key],
        "additionalProperties": False,
    }


def _json(schema: object, options: dict[str, Any] | None = None) -> str:
    """A schema as text, with llguidance's options inside where it cannot be given them beside.
    UserError for what is none."""
    try:
        if not isinstance(schema, Mapping):
            raise TypeError(f"a {type(schema).__name__}")
        return json.dumps({**schema, "x-guidance": options} if options else schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            "a JSON schema must be an object",
            f"found {error}"[:200],
            'write {"type": "object", "properties": {...}}',
        ) from None


def _source(what: str, text: object) -> str:
    if not isinstance(text, str) or not text:
        raise UserError(
            f"{what} must be a text that is not empty",
            f"found {text!r}"[:80],
            "correct it, or leave it out",
        )
    if len(text) > MAX_SOURCE:
        raise UserError(
            f"{what} is too long", f"{len(text):,} characters", f"the most is {MAX_SOURCE:,}"
        )
    return text


def _refused(error: str) -> UserError:
    return UserError(
        "the form of the answer is not understood",
        _told(error),
        "see llguidance's pages on JSON schema, regex and Lark",
    )


def _told(error: str) -> str:
    """llguidance's words on one line, without the state it dumps."""
    return " ".join(error.replace("<non-verbose/>", "").split())[:300]
