"""What was said with a model, and the slash commands that change it. Knows neither terminal nor
server (see chat.py)."""

import difflib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llama_tp.arch.errors import UserError
from llama_tp.arch.regular_file import read_file

HELP = """\
/set              show the settings
/set NAME VALUE   set one, for example /set temperature 0.7; /set NAME takes it back
/system TEXT      the system message; /system shows it, /system - removes it
/clear            forget the conversation, keep settings and system message
/retry            ask the last question again
/save FILE        write the conversation as JSON
/load FILE        go on with a saved one
/stats            tokens and speed so far
/quit             leave (or Ctrl-D)
Enter sends. Alt-Enter, or a message between \"\"\" and \"\"\", makes lines.
Ctrl-C stops an answer. // sends a leading /."""
SETTINGS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "seed": int,
    "stop": str,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
}
ROLES = ("system", "user", "assistant")
MAX_SAVED = 64 << 20  # bytes of a saved conversation


class Outcome(NamedTuple):
    """What a command says, and whether the conversation is to be sent now, or is over."""

    text: str = ""
    ask: bool = False
    over: bool = False


@dataclass
class Answer:
    """One answer as it came. Times in seconds since the question was sent; `n_tokens` as the server
    counts, else the pieces."""

    text: str = ""
    n_tokens: int = 0
    n_prompt: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    finish_reason: str | None = None

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (
            (self.n_tokens - 1) / (self.last_s - self.first_s)
            if self.n_tokens > 1 and self.last_s > self.first_s
            else 0.0
        )

    def line(self) -> str:
        parts = [
            f"{self.n_tokens} tokens",
            f"{self.rate:.1f} tok/s" if self.rate else "",
            f"first after {self.first_s:.2f} s",
            "cut at max_tokens" if self.finish_reason == "length" else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass
class Conversation:
    """What was said, the settings, and the commands that change them. `answers` are for /stats."""

    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    unanswered: str | None = None  # a question whose answer failed, for /retry

    def body(self) -> dict[str, Any]:
        """The request for the next answer."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": self.model,
            "messages": head + self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.settings,
        }

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        self.unanswered = None

    def answered(self, answer: Answer) -> None:
        """An answer, or a part of one; without any text the question is taken back."""
        if answer.text:
            self.messages.append({"role": "assistant", "content": answer.text})
            self.answers.append(answer)
        else:
            self.unanswered = self.messages.pop()["content"]

    def take(self, line: str) -> Outcome:
        """A line that was typed: a message, or a command. Wrong commands are told, none raises."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].strip().partition(" ")
            return self._command(name, rest.strip())
        if line.startswith('"""'):
            line = line.strip().removeprefix('"""').removesuffix('"""').strip("\n")
        line = line.removeprefix("/") if line.startswith("//") else line
        if not line.strip():
            return Outcome()
        self.ask(line)
        return Outcome(ask=True)

    def _command(self, name: str, rest: str) -> Outcome:
        commands: dict[str, Callable[[str], Outcome]] = {
            "help": lambda _: Outcome(HELP),
            "set": self._set,
            "system": self._system,
            "clear": self._clear,
            "save": self._save,
            "load": self._load,
            "retry": self._retry,
            "stats": self._stats,
            "quit": lambda _: Outcome(over=True),
            "exit": lambda _: Outcome(over=True),
        }
        if name not in commands:
            near = difflib.get_close_matches(name, commands, n=1)
            return Outcome(
                f"there is no /{name}; "
                + (f"did you mean /{near[0]}?" if near else "/help lists the commands")
            )
        try:
            return commands[name](rest)
        except UserError as error:
            return Outcome(str(error))

    def _set(self, rest: str) -> Outcome:
        name, _, value = rest.partition(" ")
        if not name:
            return Outcome(
                "\n".join(
                    f"{name} {self.settings.get(name, '(the server decides)')}" for name in SETTINGS
                )
            )
        if name not in SETTINGS:
            return Outcome(f"there is no setting {name}; there are {', '.join(SETTINGS)}")
        if not value:
            self.settings.pop(name, None)
            return Outcome(f"{name}: the server decides")
        try:
            self.settings[name] = _setting(name, value.strip())
        except ValueError:
            return Outcome(
                f"{name} needs a {'whole ' if SETTINGS[name] is int else ''}number, found {value!r}"
            )
        return Outcome(f"{name} {self.settings[name]}")

    def _system(self, rest: str) -> Outcome:
        if rest:
            self.system = None if rest == "-" else rest
        return Outcome(self.system or "there is no system message")

    def _clear(self, _: str) -> Outcome:
        self.messages, self.unanswered = [], None
        return Outcome("forgotten")

    def _retry(self, _: str) -> Outcome:
        if self.unanswered is not None:
            self.ask(self.unanswered)
        elif self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return Outcome(ask=True) if self.messages else Outcome("there is no question to ask again")

    def _stats(self, _: str) -> Outcome:
        n, seconds = (
            sum(one.n_tokens for one in self.answers),
            sum(one.last_s for one in self.answers),
        )
        told = self.answers[-1].line() if self.answers else "none yet"
        return Outcome(
            f"{len(self.answers)} answers, {n} tokens in {seconds:.1f} s\nlast: {told}\n"
            f"conversation: {len(self.messages)} messages"
            + (
                f", {self.answers[-1].n_prompt} tokens of prompt at the last answer"
                if self.answers
                else ""
            )
        )

    def _save(self, rest: str) -> Outcome:
        if not rest:
            return Outcome("/save needs a file")
        asked = [] if self.unanswered is None else [{"role": "user", "content": self.unanswered}]
        messages = self.messages + asked
        try:
            with open(os.path.expanduser(rest), "w", encoding="utf-8") as f:
                json.dump(
                    {"system": self.system, "settings": self.settings, "messages": messages},
                    f,
                    ensure_ascii=False,
                    indent=1,
                )
        except OSError as error:
            return Outcome(f"cannot write {rest}: {error.strerror}")
        return Outcome(f"saved {_counted(len(messages))}")

    def _load(self, rest: str) -> Outcome:
        if not rest:
            return Outcome("/load needs a file")
        self.load(rest)
        if self.unanswered is None:
            return Outcome(f"loaded {_counted(len(self.messages))}")
        return Outcome(f"loaded {_counted(len(self.messages) + 1)}; /retry asks the last question")

    def load(self, path: str) -> None:
        """Goes on with what /save wrote, or with a bare list of messages; a question at its end is
        for /retry. UserError, and no change, for anything else."""
        try:
            found = json.loads(read_file(os.path.expanduser(path), MAX_SAVED).decode("utf-8"))
            found = {"messages": found} if isinstance(found, list) else found
            messages = [
                {"role": one["role"], "content": one["content"]} for one in found["messages"]
            ]
            settings = {
                name: _setting(name, value) for name, value in found.get("settings", {}).items()
            }
            system = found.get("system")
            if not all(
                one["role"] in ROLES and isinstance(one["content"], str) for one in messages
            ):
                raise ValueError("a message is not a role and a text")
            if system is not None and not isinstance(system, str):
                raise ValueError("the system message is no text")
        except (
            UserError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise UserError(
                f"{path} is no saved conversation",
                f"{type(error).__name__}: {error}"[:200],
                "name a file that /save wrote",
            ) from None
        self.unanswered = (
            messages.pop()["content"] if messages and messages[-1]["role"] == "user" else None
        )
        self.messages, self.settings, self.system = messages, settings, system or self.system


def _counted(n: int) -> str:
    return f"{n} message{'s' if n != 1 else ''}"


def _setting(name: str, value: object) -> float | int | str:
    """`value` in the setting's type. ValueError, KeyError or TypeError if it has no place there."""
    found: float | int | str = SETTINGS[name](value)
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{name} {value}")  # JSON cannot say it
    return found
