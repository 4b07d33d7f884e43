"""Runs a command: every flag is checked before anything heavy is imported, and bad input ends in
one clear line.

A command is a module whose top is light (no torch) with one function

    def main(
        *,
        options: EngineOptions,
        prompt: str = "",
        n_samples: Annotated[int, Range(1, 100)] = 1,
    ):
        '''One line that says what it does.

        Model:

        Prompts:
            prompt: the text to continue.
            n_samples: how many times.
        '''

    if __name__ == "__main__":
        run(main)

whose annotations are the types of its flags, and whose docstring is its --help: a line `name:
text`, indented under a title, documents --name. Known types: str, int, float, bool, Literal of
texts, each also `| None`, and list[...] or tuple[..., ...] for a flag with several values (--flag A
B, or --flag A --flag B); `Annotated` with a Range bounds a number. A parameter in front of the `*`
is a word without a flag (`bench latency`); it is spelt --name too.

A parameter whose type is a table of options (arch/options.py) gives the command a flag for each of
its fields, but for those that `Without` names. The table's help stands under the title that it
names, here Model; where the command means something else, a line of its docstring says so.

Why not fire alone: it runs `main` first and complains about a misspelt flag afterwards, on every
rank, after the load; it turns `--prompt 123` into an int, and `--prompt -` into nothing. So the
words are read here, and fire is left to call `main` with the values found. This module knows no
command and no option by name, and nothing of torch or the engine.
"""

import dataclasses
import difflib
import inspect
import math
import os
import re
import shutil
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable

import fire

from llama_tp.arch.errors import UserError, mark_told
from llama_tp.arch.options import PYTHON_ONLY, Help, Range, Without

Main = Callable[..., None]

# torchrun ends every rank when the first one leaves, so a worker that fails waits this long: if the
# driver has failed too, it gets to say why, and torchrun ends the worker before the time is up. If
# not, the worker speaks.
DRIVER_SPEAKS_FIRST_S = 3.0

USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes: bad flags, a UserError out of main, Ctrl-C

SWITCH_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_FLAG_LINE = re.compile(r" {4}(\w+): +(.*)")
# Kind -> (its name in --help, what a value must be, as an error says it).
KINDS = {
    str: ("TEXT", "a text"),
    int: ("INT", "a whole number, such as 8"),
    float: ("NUMBER", "a number, such as 0.6"),
    bool: ("", "true or false"),
}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a command, as `main` or a table of options declares it."""

    name: str
    kind: type  # str, int, float or bool
    choices: tuple[str, ...] = ()  # the texts allowed; () = any
    repeats: bool = False  # has several values, arrives as a tuple
    optional: bool = False  # None is a value
    bare: bool = False  # may stand without its name
    default: object = inspect.Parameter.empty
    help: Help | None = None  # the table's; None: main's docstring has it
    range: Range | None = None  # of a number
    parameter: str = ""  # of main, which gets the value, or the table that the option is in
    table: type | None = None

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def value(self, text: str) -> typing.Any:
        """What `text` means for this flag; UserError when it means nothing."""
        if self.optional and self.kind is not str and text.lower() == "none":
            return None
        need = f"one of {', '.join(self.choices)}" if self.choices else KINDS[self.kind][1]
        refusal = UserError(
            f"--{self.name} needs {need}", f"found {text!r}", "--help lists the flags"
        )
        if self.choices and text not in self.choices:
            raise refusal
        try:
            value = SWITCH_WORDS[text.lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError):
            raise refusal from None
        if self.kind is float and not math.isfinite(value):
            raise refusal
        return value


def run(main: Main, argv: list[str] | None = None) -> None:
    """Check `argv` (default: the process's own) against `main`, call it, and turn UserError into
    one line and a code.

    Returns when `main` has; else leaves the process: 0 after --help, 2 for bad flags, 1 for a
    UserError out of `main`, 130 for Ctrl-C. Any other exception is our bug and keeps its traceback.
    Under torchrun the driver speaks for all; a worker only about what happened to it alone.
    """
    argv = sys.argv[1:] if argv is None else argv
    flags = flags_of(main)
    try:
        values = parse(flags, argv)
    except UserError as error:
        _leave(error, USAGE)
    if values is None:
        if _is_driver():
            print(help_text(main, flags))
        sys.exit(0)
    try:
        check_ranges(flags, values)
        given = arguments(flags, values)
        # fire sees only the names: each value is handed over as it was read here, never guessed
        # from its text again.
        fire.decorators.SetParseFns(
            **{name: lambda _, value=value: value for name, value in given.items()}
        )(main)
        fire.Fire(
            main,
            command=[f"--{name}=" for name in given],
            name=_command(),
            serialize=lambda _: None,
        )
    except UserError as error:
        _leave(error, FAILURE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def flags_of(main: Main) -> dict[str, Flag]:
    """The flags that `main` declares, by name, those of its table in the table's order. TypeError
    for an annotation that no flag can have, and for a name that is there twice (our bugs)."""
    hints = typing.get_type_hints(main, include_extras=True)
    flags: dict[str, Flag] = {}
    for name, parameter in inspect.signature(main).parameters.items():
        table, marks = _unwrapped(hints[name])
        if isinstance(table, type) and dataclasses.is_dataclass(table):
            without = [each for mark in marks if isinstance(mark, Without) for each in mark.names]
            found = [flag for flag in _options_of(table, name) if flag.name not in without]
        else:
            bare = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            flag = _flag(f"{main.__module__}.main", name, hints[name], parameter.default)
            found = [dataclasses.replace(flag, bare=bare, parameter=name)]
        if twice := [flag.name for flag in found if flag.name in flags]:
            raise TypeError(f"{main.__module__}.main: the flag {twice[0]} is there twice")
        flags |= {flag.name: flag for flag in found}
    return flags


def _options_of(table: type, parameter: str) -> list[Flag]:
    """The flags of a table of options, which main gets as `parameter`."""
    hints = typing.get_type_hints(table, include_extras=True)
    flags = []
    for field in dataclasses.fields(table):
        if PYTHON_ONLY not in _unwrapped(hints[field.name])[1]:
            default = field.default
            if default is dataclasses.MISSING:
                default = inspect.Parameter.empty
            flag = _flag(table.__qualname__, field.name, hints[field.name], default)
            flags.append(dataclasses.replace(flag, parameter=parameter, table=table))
    return flags


def _flag(where: str, name: str, hint: object, default: object) -> Flag:
    """The flag that an annotation declares. TypeError for one that no flag can have."""
    kind, marks = _unwrapped(hint)
    found: dict[str, typing.Any] = {}
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not types.NoneType]
        kind, found["optional"] = kinds[0], True
    if typing.get_origin(kind) in (list, tuple):
        kind, found["repeats"] = typing.get_args(kind)[0], True
    if typing.get_origin(kind) is typing.Literal:
        kind, found["choices"] = str, typing.get_args(kind)
    if kind not in KINDS:
        raise TypeError(f"{where}: no flag can have the type {hint} of {name}")
    for mark in marks:
        if isinstance(mark, (Help, Range)):
            found["help" if isinstance(mark, Help) else "range"] = mark
    return Flag(name, kind, default=default, **found)


def _unwrapped(hint: typing.Any) -> tuple[typing.Any, tuple[object, ...]]:
    """An annotation without `Annotated`, and the marks that stood in it."""
    # before 3.11, get_type_hints wraps one whose default is None in another Optional
    inner = [each for each in typing.get_args(hint) if each is not types.NoneType]
    if len(inner) == 1 and typing.get_origin(inner[0]) is typing.Annotated:
        hint = inner[0]
    if typing.get_origin(hint) is typing.Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def arguments(flags: dict[str, Flag], values: dict[str, object]) -> dict[str, object]:
    """The values as `main` takes them: those of options together in their table."""
    tables = {flag.parameter: flag.table for flag in flags.values() if flag.table is not None}
    own = {name: value for name, value in values.items() if flags[name].table is None}
    return own | {
        parameter: table(
            **{name: value for name, value in values.items() if flags[name].parameter == parameter}
        )
        for parameter, table in tables.items()
    }


def check_ranges(flags: dict[str, Flag], values: dict[str, object]) -> None:
    """Raises UserError for a number outside its flag's range; None is not given, and inside."""
    for name, value in values.items():
        within = flags[name].range
        for each in value if isinstance(value, tuple) else (value,):
            if within and each is not None and not within.least <= each <= within.most:
                raise UserError(
                    f"--{name} is out of range",
                    f"found {each}",
                    f"give a number from {within.least} to {within.most}",
                )


def parse(flags: dict[str, Flag], argv: list[str]) -> dict[str, object] | None:
    """The values that `argv` gives to `flags`, by name, in the types `main` asks for; None when it
    asks for help.

    Accepts --a_b and --a-b, `--flag value` and `--flag=value`, a bare --switch and --no_switch.

    Raises:
        UserError: a word that is no flag, a flag without value or given twice, a wrong value, a
            missing flag.
    """
    values: dict[str, typing.Any] = {}
    words = list(argv)
    previous = None  # the flag before, to explain a word that stands where a flag should
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            return None
        if not re.match(r"-+[A-Za-z]", word):
            bare = next(
                (flag for flag in flags.values() if flag.bare and flag.name not in values), None
            )
            if bare is None:
                raise _stray_word(word, previous, values, flags)
            values[bare.name] = bare.value(word)
            continue
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        off = (
            name not in flags
            and name.startswith("no_")
            and name[3:] in flags
            and flags[name[3:]].kind is bool
        )
        flag = flags.get(name[3:] if off else name)
        if flag is None or not word.startswith("--"):
            raise _unknown(word.partition("=")[0], name, flags)
        if off and equals:
            raise UserError(
                f"--{name} takes no value", f"found {text!r}", f"write --{name} or --{flag.name}"
            )
        value = flag.value("false" if off else text if equals else _next_text(flag, words))
        if flag.repeats:
            value = (*values.get(flag.name, ()), value)
            is_open = not equals and not any(
                each.bare and each.name not in values for each in flags.values()
            )
            # --flag A B, as argparse has it
            while is_open and words and not words[0].startswith("-"):
                value = (*value, flag.value(words.pop(0)))
        elif flag.name in values:
            raise UserError(
                f"--{flag.name} is given twice",
                f"{values[flag.name]!r} and {value!r}",
                "keep one of them",
            )
        values[flag.name] = value
        previous = flag
    missing = [
        f"{flag.name.upper()} ({', '.join(flag.choices)})" if flag.bare else f"--{flag.name}"
        for flag in flags.values()
        if flag.required and flag.name not in values
    ]
    if missing:
        raise UserError(f"missing {', '.join(missing)}", "", "--help lists the flags")
    return values


def _next_text(flag: Flag, words: list[str]) -> str:
    """Takes the text of `flag` from the words that follow it."""
    # a bare switch is true; no other word can stand after one, so a word is its value
    if flag.kind is bool:
        return words.pop(0) if words and not words[0].startswith("-") else "true"
    if not words or words[0].startswith("--"):
        found = f"found {words[0]} next" if words else "found the end of the line"
        raise UserError(
            f"--{flag.name} needs a value",
            found,
            f"a value that begins with -- is written --{flag.name}=VALUE",
        )
    return words.pop(0)


def _unknown(word: str, name: str, flags: dict[str, Flag]) -> UserError:
    near = difflib.get_close_matches(name, flags, n=1)
    return UserError(
        f"unknown flag {word}", f"did you mean --{near[0]}?" if near else "", "--help lists them"
    )


def _stray_word(
    word: str,
    previous: Flag | None,
    values: dict[str, typing.Any],
    flags: dict[str, Flag],
) -> UserError:
    if likely := [name for name in _likely_flags(word) if name in flags and name not in values]:
        fix = f"did you mean --{likely[0]} {word}?"
    elif "prompt" in flags and "prompt" not in values:
        fix = f'did you mean --prompt "{word}"?'
    elif previous is not None and previous.kind is str:
        given = values[previous.name][-1] if previous.repeats else values[previous.name]
        fix = f'a text of several words needs quotes: --{previous.name} "{given} {word} ..."'
    else:
        fix = "values are given with their flag: --flag value; --help lists them"
    return UserError("a word without a flag", f"found {word!r}", fix)


def _likely_flags(word: str) -> tuple[str, ...]:
    """Names of flags, of any command, whose value looks like `word`: folder or name on the hub,
    file, address."""
    if os.path.isfile(word):
        return "input", "prompts_file", "load"
    if os.path.isdir(word) or re.fullmatch(r"[\w.-]+/[\w.-]+", word):
        return ("ckpt_dir",)
    return ("url",) if word.startswith(("http://", "https://")) else ()


def check_can_be_written(flag: str, path: str) -> None:
    """Raises UserError for a file that --flag names in a folder that is not there."""
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise UserError(
            f"--{flag} {path} cannot be written",
            "there is no such folder",
            "make it, or correct the name",
        )


def help_text(main: Main, flags: dict[str, Flag]) -> str:
    """`main`'s docstring, with each line that documents a flag turned into `--flag TYPE  text
    (default)`, and the options of its table under their titles."""
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    documented = inspect.cleandoc(main.__doc__ or "").splitlines()
    own = {m[1] for m in map(_FLAG_LINE.match, documented) if m}
    for title, new in _table_lines(flags, own).items():
        documented = _put_under(title, new, documented)
    lines: list[str] = []
    entries: dict[int, tuple[Flag, str]] = {}  # the place of a flag's line -> it, and its text
    for line in documented:
        match, last = _FLAG_LINE.match(line), len(lines) - 1
        if match and match[1] in flags:
            entries[len(lines)] = flags[match[1]], match[2]
            lines.append("")
        elif last in entries and line.startswith(" " * 8):
            entries[last] = entries[last][0], f"{entries[last][1]} {line.strip()}"
        else:
            lines.append(line)
    for place, (flag, text) in entries.items():
        lines[place] = _help_entry(flag, text, width)
    words = [" " + name.upper() for name, flag in flags.items() if flag.bare]
    return "\n".join([f"{_command()}{''.join(words)} [flags]", "", *lines])


def _table_lines(flags: dict[str, Flag], documented: set[str]) -> dict[str, list[str]]:
    """Title -> lines of a docstring for the flags that main's own has none for."""
    lines: dict[str, list[str]] = {}
    for name, flag in flags.items():
        if name not in documented:
            title, text = (flag.help.title, flag.help.text) if flag.help else ("Other flags", "")
            lines.setdefault(title, []).append(f"    {name}: {text}")
    return lines


def _put_under(title: str, new: list[str], lines: list[str]) -> list[str]:
    """The lines of a docstring with new ones first under a title, which is added if it is not
    there."""
    if f"{title}:" not in lines:
        return [*lines, "", f"{title}:", *new]
    place = lines.index(f"{title}:") + 1
    return [*lines[:place], *new, *lines[place:]]


def _help_entry(flag: Flag, text: str, width: int) -> str:
    kind = "|".join(flag.choices) or KINDS[flag.kind][0]
    if flag.required:
        text += " (required)"
    elif flag.kind is bool and flag.default:
        text += f" (on by default; --no_{flag.name})"
    elif flag.default not in (None, "", (), False):
        text += f" (default {flag.default})"
    if flag.repeats:
        text += " (several values: A B, or given several times)"
    name = f"    {flag.name.upper() if flag.bare else '--' + flag.name} {kind}".rstrip()
    column = 32
    first = name.ljust(column) if len(name) < column - 1 else name + "  "
    text = text.strip() or "(not documented)"
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=" " * column)


def _leave(error: UserError, code: int) -> typing.NoReturn:
    """Say `error` in one line and leave the process; a worker speaks only if torchrun has not ended
    it by then."""
    who = "error"
    if not _is_driver():
        time.sleep(DRIVER_SPEAKS_FIRST_S)
        who = f"[rank {_rank()}] error"
    # all ranks have the same flags: the driver's word about them is enough
    if _is_driver() or code != USAGE:
        print(f"{who}:", " ".join(str(error).splitlines()), file=sys.stderr, flush=True)
        mark_told()
    sys.exit(code)


def _is_driver() -> bool:
    return _rank() == "0"


def _rank() -> str:
    """This process's rank as torchrun or Slurm numbers it; without them there is one rank, the
    driver."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def _command() -> str:
    """How this process was started, as a person would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else os.path.basename(sys.argv[0])
