"""The table of engine options, and all that derives from it: flags, help, the ranks' flags, the
Python API, and the page OPTIONS.md, which also lists each environment variable.

`--rewrite` writes the tables of the page anew; read the diff.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import typing
from pathlib import Path
from typing import Annotated

import pytest

from llama_tp import Llama, cli, launch
from llama_tp.arch.errors import UserError
from llama_tp.arch.options import EngineOptions, Help, Range, Without
from llama_tp.serve import words_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "llama_tp/OPTIONS.md"
# What each flag was before there was a table: {command: {flag: [type, default, help]}}.
BEFORE = json.loads((ROOT / "tests/flags.json").read_text())
ENGINE_COMMANDS = ["generate", "batch", "serve", "bench"]
HUNG = (
    "NUMBER seconds after which a step counts as hung: the job ends, a server starts its ranks "
    "again (default 300.0)"
)
AT_ONCE = "INT most sequences computed at once; more wait (default 32)"
# Where one help line for all commands has another text than each had, and where nothing given is
# another value.
CHANGED = {
    ("generate", "max_batch_size"): ["int", 32, AT_ONCE],
    ("generate", "step_timeout"): ["float", 300.0, HUNG],
    ("batch", "max_batch_size"): ["int", 32, AT_ONCE],
    ("batch", "step_timeout"): ["float", 300.0, HUNG],
    ("serve", "max_batch_size"): ["int", 32, AT_ONCE],
    ("serve", "step_timeout"): ["float", 300.0, HUNG],
    ("bench", "ckpt_dir"): ["str", "", "TEXT a checkpoint in either layout"],
    ("bench", "deterministic"): [
        "bool | None",
        None,
        "the same bits at tp 1, 2, 4 and 8 and in any batch; on by default on CPU, where it costs "
        "little",
    ],
}


def main_of(command: str):
    return importlib.import_module(f"llama_tp.{command}").main


def described(main) -> dict[str, list]:
    """Flag -> [type, default, what --help prints about it, on one line]."""
    flags = cli.flags_of(main)
    found: dict[str, list] = {}
    for line in cli.help_text(main, flags).splitlines():
        name = re.match(r" {4}(?:--)?(\w+)", line)
        if name and name[1].lower() in flags:
            flag = flags[name[1].lower()]
            kind = " or ".join(flag.choices) or flag.kind.__name__
            kind = f"{kind}, several" if flag.repeats else kind
            kind = f"{kind} | None" if flag.optional else kind
            default = "required" if flag.required else flag.default
            words = line.strip().removeprefix("--").removeprefix(name[1])
            found[flag.name] = [kind, list(default) if default == () else default, words]
        elif line.startswith(" " * 32):
            found[list(found)[-1]][2] += " " + line
    return {name: [*each[:2], " ".join(each[2].split())] for name, each in found.items()}


@pytest.mark.parametrize("command", BEFORE)
def test_a_flag_that_there_was_is_what_it_was(command):
    """A new flag needs no line in the golden file: the page shows it."""
    now = described(main_of(command))
    assert set(now) >= set(BEFORE[command])
    for name, before in BEFORE[command].items():
        assert now[name] == CHANGED.get((command, name), before), name


MADE_UP = """
    made_up: Annotated[int, Help("Resources", "what a test made up"), Range(1, 9)] = 5
    and_more: Annotated[tuple[str, ...], Help("New", "under a title that no command has")] = ()
"""
DERIVED = """
import inspect
from llama_tp import Llama, batch, bench, cli, generate, serve
from llama_tp.arch.errors import UserError
from llama_tp.arch.options import EngineOptions

own = {
    "generate": [],
    "batch": ["--input", "in", "--output", "out"],
    "serve": [],
    "bench": ["latency"],
}
for command in (generate, batch, serve, bench):
    flags = cli.flags_of(command.main)
    lines = cli.help_text(command.main, flags).splitlines()
    [line] = [line for line in lines if line.startswith("    --made_up")]
    assert line.split() == "--made_up INT what a test made up (default 5)".split(), line
    assert lines[lines.index("New:") + 1].startswith("    --and_more TEXT"), lines
    words = ["--ckpt_dir", "D", "--made_up", "7", *own[command.__name__.split(".")[1]]]
    options = cli.arguments(flags, cli.parse(flags, words))["options"]
    assert isinstance(options, EngineOptions) and options.made_up == 7
    try:
        cli.check_ranges(flags, {"made_up": 10})
    except UserError as error:
        assert "--made_up is out of range" in str(error)
    else:
        raise AssertionError("a range that nobody holds")
flags = cli.flags_of(serve.main)
options = EngineOptions("D", made_up=7, and_more=("a", "b"))
words = serve.words_of(options)
assert "--made_up=7" in words
assert cli.arguments(flags, cli.parse(flags, words))["options"] == options
assert EngineOptions("D").made_up == inspect.signature(Llama.build).parameters["made_up"].default
assert "made_up: what a test made up" in inspect.getdoc(Llama.build)
print("derived")
"""


def test_a_new_row_is_a_flag_everywhere(tmp_path):
    """The package with one more row, and nothing else changed."""
    shutil.copytree(ROOT / "llama_tp", tmp_path / "llama_tp", ignore=lambda *_: {"__pycache__"})
    table = tmp_path / "llama_tp/arch/options.py"
    text = table.read_text()
    place = re.search(r"\n    quiet: [^\n]*(\n    [^\n]*)*\n", text)
    table.write_text(text[: place.end()] + MADE_UP + text[place.end() :])
    done = subprocess.run(
        [sys.executable, "-c", DERIVED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("derived\n", 0), done.stderr


def test_the_ranks_are_given_what_the_server_was():
    options = EngineOptions("D", max_seq_len=512, quiet=True, seed=7, chat_template="hf")
    flags = cli.flags_of(main_of("serve"))
    given = cli.arguments(flags, cli.parse(flags, words_of(options)))
    # the server encodes dialogs itself
    assert given == {"options": dataclasses.replace(options, chat_template="meta")}


def test_build_has_metas_parameters_in_metas_order():
    metas = ["ckpt_dir", "tokenizer_path", "max_seq_len", "max_batch_size"]
    metas += ["model_parallel_size", "seed"]
    assert [*inspect.signature(Llama.build).parameters][:6] == metas
    with pytest.raises(UserError, match="Llama.build has no argument speed - use ckpt_dir, "):
        Llama.build("D", speed=1)


@dataclasses.dataclass(frozen=True)
class Table:
    size: Annotated[int | None, Range(1, 9)] = None
    names: tuple[str, ...] = ()


def test_a_table_and_mains_own_flags_are_kept_apart():
    def main(*, options: Table, shares: Annotated[tuple[float, ...], Range(0, 1)] = ()): ...

    flags = cli.flags_of(main)
    values = cli.parse(flags, ["--size", "9", "--shares", "0", "1"])
    cli.check_ranges(flags, values)
    assert cli.arguments(flags, values) == {"options": Table(size=9), "shares": (0.0, 1.0)}
    assert cli.arguments(flags, {}) == {"options": Table()}
    cli.check_ranges(flags, {"size": None})
    for wrong in ({"size": 0}, {"size": 10}, {"shares": (0.5, 1.5)}):
        with pytest.raises(UserError, match=f"--{[*wrong][0]} is out of range - found"):
            cli.check_ranges(flags, wrong)


def test_what_a_command_goes_without_is_no_flag_of_it():
    def main(*, options: Annotated[Table, Without(("size",))], size: str = "big"): ...
    def twice(*, options: Table, size: str = "big"): ...

    assert cli.flags_of(main)["size"].kind is str
    with pytest.raises(TypeError, match="the flag size is there twice"):
        cli.flags_of(twice)


# The page.


def options_table() -> list[str]:
    """The engine options, as rows of the page."""
    hints = typing.get_type_hints(EngineOptions, include_extras=True)
    rows = ["| option | default | range | meaning | in |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(EngineOptions):
        marks = {type(mark): mark for mark in hints[field.name].__metadata__}
        commands = [
            each
            for each in ENGINE_COMMANDS
            if (flag := cli.flags_of(main_of(each)).get(field.name)) and flag.table
        ]
        where = ", ".join(commands) or "`Llama.build`"
        where = "all four" if commands == ENGINE_COMMANDS else where
        spelt = f"--{field.name}" if commands else field.name
        within = f"{marks[Range].least:,} to {marks[Range].most:,}" if Range in marks else ""
        default = "required" if field.default is dataclasses.MISSING else field.default
        default = "" if default is None else default
        default = ("off", "on")[default] if isinstance(default, bool) else default
        rows.append(f"| `{spelt}` | {default} | {within} | {marks[Help].text} | {where} |")
    return rows


def the_table_alone(*, options: EngineOptions): ...


def flags_table(command: str) -> list[str]:
    """A command's own flags, and the engine options that mean something else there."""
    rows = ["| flag | meaning |", "|---|---|"]
    flags = cli.flags_of(main_of(command))
    common = described(the_table_alone)
    for name, now in described(main_of(command)).items():
        if flags[name].table is None or now != common[name]:
            text = now[2]
            kind, text = re.fullmatch(r"((?:[A-Z]+|[\w|]+\|[\w|]+)(?= )|)(.*)", text).groups()
            kind = f" {kind}".replace("|", " or ") if kind else ""
            spelt = name.upper() if flags[name].bare else f"--{name}"
            rows.append(f"| `{spelt}{kind}` | {text.strip()} |")
    return rows


def launch_table() -> list[str]:
    rows = ["| flag | meaning |", "|---|---|"]
    for each in launch.parser()._actions:
        if each.option_strings and each.dest != "help":
            default = "" if each.default in (None, False) else f" (default {each.default})"
            spelt = " ".join(filter(None, [each.option_strings[0], each.metavar]))
            rows.append(f"| `{spelt}` | {each.help}{default} |")
    return rows


def rendered(page: str) -> str:
    """The page with the tables that the code gives."""

    def table(match: re.Match) -> str:
        name = match[1]
        if name == "engine":
            rows = options_table()
        else:
            rows = launch_table() if name == "launch" else flags_table(name)
        return "\n".join([f"<!-- from the code: {name} -->", "", *rows, ""])

    return re.sub(r"<!-- from the code: (\w+) -->\n(?:\n(?:\|.*\n)+)?", table, page)


def test_the_page_lists_every_flag(request):
    if request.config.getoption("--rewrite"):
        PAGE.write_text(rendered(PAGE.read_text()))
    page = PAGE.read_text()
    assert rendered(page) == page, "write it anew: pytest tests/test_options.py --rewrite"
    listed = set(re.findall(r"<!-- from the code: (\w+) -->", page))
    assert listed == {"engine", "launch", *BEFORE}


# Texts in capitals that name no environment variable.
NO_VARIABLES = re.compile(r"(EMPTY|F8|LONG|SC)_\w+")


def variables_of(sources: dict[str, str]) -> set[str]:
    """The environment variables that Python sources (and shell scripts) name as a whole text."""
    found: set[str] = set()
    for name, source in sources.items():
        if name.endswith(".sh"):
            found |= set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", source)) - {"BASH_SOURCE"}
            continue
        texts = {
            node.value
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        found |= {
            text
            for text in texts
            if re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|RANK|CXX", text)
            and not NO_VARIABLES.fullmatch(text)
        }
    return found


def test_the_page_lists_every_environment_variable():
    paths = [*(ROOT / "llama_tp").rglob("*.py"), *(ROOT / "launch").glob("*.sh")]
    read = variables_of({str(path): path.read_text() for path in paths})
    section = PAGE.read_text().partition("\n## Environment variables\n")[2]
    listed = {
        name
        for row in re.findall(r"^\|(.*?)\|", section, re.MULTILINE)
        for name in re.findall(r"`([A-Z0-9_]+)`", row)
    }
    assert "LLAMA_TP_THREADS" in read and "NPROC" in read
    assert read - listed == set(), "read, and not on the page"
    assert listed - read == set(), "on the page, and read by nobody"


def test_variables_are_found_however_they_are_read():
    python = textwrap.dedent(
        """
        import os
        NAME = "LLAMA_TP_ONE"
        os.environ.get("LLAMA_TP_TWO"), "LLAMA_TP_THREE" in os.environ, os.environ[NAME]
        print("set LLAMA_TP_FOUR to 1")
        """
    )
    shell = ': "${LLAMA_TP_FIVE:=1}"; echo $SIX_SEVEN'
    assert variables_of({"a.py": python, "b.sh": shell}) == {
        "LLAMA_TP_ONE",
        "LLAMA_TP_TWO",
        "LLAMA_TP_THREE",
        "LLAMA_TP_FIVE",
        "SIX_SEVEN",
    }
