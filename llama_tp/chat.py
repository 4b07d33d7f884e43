"""Command: a conversation in the terminal with any OpenAI-compatible server.

What was said, and the slash commands, are in `text.conversation`. Here are `Server`, which streams
an answer, `Plain` and `Markdown`, which show it as it grows, and `talk`, the loop. prompt_toolkit
reads lines, rich draws, httpx talks: all in an extra.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.cli import run
from llama_tp.protocol.events import Events
from llama_tp.text.conversation import Answer, Conversation

try:
    import termios
except ImportError:  # not on Windows, where there is nothing to switch off
    termios = None  # type: ignore[assignment]  # asked for before it is used
try:
    import httpx
    import prompt_toolkit
    import prompt_toolkit.history
    import prompt_toolkit.key_binding
    import rich.console
    import rich.live
    import rich.markdown

    LACKING = None
except ImportError as error:  # said by `main`, once the flags are right
    LACKING = error.name

# All that moves a cursor or sets a title: a model's text may show characters and line breaks, no
# more.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def main(
    *,
    url: str = "http://127.0.0.1:8000",
    model: str | None = None,
    api_key: str | None = None,
    system: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    load: str | None = None,
    markdown: bool = True,
    history_file: str = "~/.llama_tp_history",
    wait: float = 0.0,
) -> None:
    """Talk with a model that a server runs. /help inside lists the commands.

    Examples:
        python -m llama_tp.chat
        python -m llama_tp.chat --url https://host:8000/v1 --system "You are brief."

    Server:
        url: its address, with or without /v1
        model: the model to ask for, its first unless given
        api_key: OPENAI_API_KEY from the environment unless given
        wait: seconds to wait for a server that is starting

    Conversation:
        system: the system message
        temperature: 0 is greedy; the server's own unless given
        max_tokens: most tokens of an answer
        load: go on with a conversation that /save wrote

    Terminal:
        markdown: draw answers as markdown; otherwise, and into a pipe, the text as it is
        history_file: keeps what was typed, for the arrow keys; an empty text keeps nothing
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(
            "--url is not the address of a server",
            f"found {url!r}",
            "write --url http://127.0.0.1:8000",
        )
    if LACKING:
        raise UserError(
            "chat needs httpx, prompt_toolkit and rich",
            f"{LACKING} is not installed",
            "pip install 'llama_tp[chat]'",
        )
    settings = {"temperature": temperature, "max_tokens": max_tokens}
    conversation = Conversation(
        system, {name: value for name, value in settings.items() if value is not None}
    )
    if load:
        conversation.load(load)
    server = Server(url, api_key or os.environ.get("OPENAI_API_KEY"))
    conversation.model = model or server.first_model(wait)
    console = rich.console.Console(highlight=False)
    if sys.stdin.isatty():
        console.print(
            f"{conversation.model} at {url}. /help lists the commands.", style="dim", markup=False
        )
        read: Callable[[], str] = session(history_file).prompt
    else:
        read = iter(_piped()).__next__
    talk(conversation, server, read, console, markdown and console.is_terminal)


class Server:
    """An OpenAI-compatible server at `url`. Raises UserError for what is no URL, and for a key that
    no header can carry."""

    def __init__(self, url: str, api_key: str | None):
        self.root = url.rstrip("/").removesuffix("/v1")
        host = ""
        with contextlib.suppress(httpx.InvalidURL):
            host = httpx.URL(self.root).host
        if not host:
            raise UserError(
                "--url is not the address of a server",
                f"found {url!r}",
                "write --url http://127.0.0.1:8000",
            )
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise UserError(
                "an API key is made of ASCII characters",
                "this one is not",
                "correct --api_key, or OPENAI_API_KEY",
            )
        local = host in ("localhost", "127.0.0.1", "::1")
        self.client = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # no proxy to this machine
            timeout=httpx.Timeout(None, connect=10.0),
            trust_env=not local,
        )

    def first_model(self, wait_s: float) -> str:
        """The name of the server's first model; waits for a server that is not there yet or says
        503. UserError after that."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                reply = self.client.get(f"{self.root}/v1/models", timeout=10.0)
                if reply.status_code != 503:
                    name: str = reply.raise_for_status().json()["data"][0]["id"]
                    return name
                said = "HTTP 503"
            except httpx.TransportError as error:
                said = f"{type(error).__name__}: {error}"
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                found = f"{type(error).__name__}: {error}"[:200]
                raise UserError(
                    f"no OpenAI-compatible server at {self.root}",
                    found,
                    "check --url and --api_key",
                ) from None
            if time.monotonic() > deadline:
                raise UserError(
                    f"no server at {self.root}",
                    said,
                    "start one (python -m llama_tp.serve), or give --url and --wait",
                )
            time.sleep(0.2)

    def stream(self, body: dict[str, Any], answer: Answer) -> Generator[str, None, None]:
        """The pieces of an answer's text as they come; `answer` is kept up to date. UserError when
        the server refuses or fails."""
        sent, events = time.monotonic(), Events()
        try:
            with self.client.stream("POST", f"{self.root}/v1/chat/completions", json=body) as reply:
                if reply.status_code != 200:
                    raise UserError(
                        f"the server says HTTP {reply.status_code}",
                        _message(reply.read()),
                        "/clear forgets the conversation, /set NAME takes a setting back, /retry "
                        "asks again",
                    )
                for data in reply.iter_bytes():
                    for event in events.push(data):
                        yield from self._piece(event, answer, sent)
        except (httpx.HTTPError, ValueError, AttributeError, TypeError) as error:
            raise UserError(
                "the connection to the server broke",
                f"{type(error).__name__}: {error}"[:200],
                "/retry asks again",
            ) from None
        if not events.done and not answer.finish_reason:
            raise UserError("the server broke off", "the answer has no end", "/retry asks again")

    def _piece(self, event: dict[str, Any], answer: Answer, sent: float) -> Iterator[str]:
        if event.get("error"):
            raise UserError(
                "the server failed", _message(json.dumps(event).encode()), "/retry asks again"
            )
        for choice in event.get("choices") or []:
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            text = _CONTROL.sub("", (choice.get("delta") or {}).get("content") or "")
            if text:
                answer.last_s = time.monotonic() - sent
                answer.first_s = answer.first_s or answer.last_s
                answer.n_tokens += 1
                answer.text += text
                yield text
        if usage := event.get("usage"):
            answer.n_tokens, answer.n_prompt = (
                usage.get("completion_tokens", answer.n_tokens),
                usage.get("prompt_tokens", 0),
            )


def _piped() -> list[str]:
    """The lines of a stdin that is no terminal. UserError for what is no text."""
    try:
        return sys.stdin.read().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            "the standard input cannot be read", str(error), "give UTF-8 text"
        ) from None


def _message(data: bytes) -> str:
    """The words of an OpenAI error body, or of any other, as one line."""
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(_CONTROL.sub(" ", text).split())[:300]


def session(history_file: str, **terminal: Any) -> "prompt_toolkit.PromptSession[str]":
    """A prompt at which Enter sends, unless three quotes are open, and Alt-Enter makes a line."""
    keys = prompt_toolkit.key_binding.KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        text = event.current_buffer.text
        if text.startswith('"""') and text.count('"""') < 2:
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return prompt_toolkit.PromptSession(
        "> ",
        multiline=True,
        key_bindings=keys,
        history=_history(history_file),
        prompt_continuation="  ",
        **terminal,
    )


def _history(path: str) -> "prompt_toolkit.history.History":
    """What was typed before; a file that only its owner can read, or memory where there can be
    none."""
    path = os.path.expanduser(path)
    try:
        if path:
            os.close(os.open(path, os.O_CREAT | os.O_APPEND, 0o600))
            return prompt_toolkit.history.FileHistory(path)
    except OSError as error:
        print(f"no history: {path}: {error.strerror}", file=sys.stderr)
    return prompt_toolkit.history.InMemoryHistory()


def talk(
    conversation: Conversation,
    server: Server,
    read: Callable[[], str],
    console: "rich.console.Console",
    markdown: bool,
) -> None:
    """Reads lines until /quit or the end of the input, and answers them. Ctrl-C ends an answer, or
    empties the line."""
    while True:
        try:
            outcome = conversation.take(read())
        except KeyboardInterrupt:
            console.print("Ctrl-D or /quit leaves", style="dim")
            continue
        except (EOFError, StopIteration):
            return
        if outcome.text:
            console.print(outcome.text, style="dim", markup=False)
        if outcome.over:
            return
        if outcome.ask:
            reply(conversation, server, console, markdown)


def reply(
    conversation: Conversation, server: Server, console: "rich.console.Console", markdown: bool
) -> None:
    """Streams the answer to the last message onto the screen and into the conversation, as far as
    it comes."""
    answer, end = Answer(), ""
    with silent_keys(), CtrlC() as ctrl_c:
        view = Markdown(console) if markdown else Plain(console)
        try:
            # closed: the server stops, too
            with contextlib.closing(server.stream(conversation.body(), answer)) as pieces:
                for text in ctrl_c.until_pressed(pieces):
                    view.add(text)
        except KeyboardInterrupt:
            end = "stopped; "
        except UserError as error:
            end = f"{error}\n"
        view.close()
        conversation.answered(answer)
        # a pipe gets answers alone
        notes = console if console.is_terminal else rich.console.Console(stderr=True)
        if end or console.is_terminal:
            end = end + answer.line() if answer.text else end.rstrip("\n; ") or "no text came"
            notes.print(end, style="dim", markup=False, soft_wrap=True)


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Keeps the terminal from echoing keys: rich counts the lines that it goes back, and an echo
    (of ^C, too) would add one. What is typed meanwhile waits for the next prompt."""
    if not (termios and sys.stdin.isatty()):
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    # Ctrl-C is not to empty the output
    silent = [*before[:3], before[3] & ~termios.ECHO | termios.NOFLSH, *before[4:]]
    termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class CtrlC:
    """Ctrl-C raises KeyboardInterrupt while we wait for the next piece, and is remembered while we
    draw: half a drawing would be drawn again."""

    def __init__(self) -> None:
        self.pressed = self.waiting = False

    def __enter__(self) -> "CtrlC":
        self.before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _press(self, *_: object) -> None:
        self.pressed = True
        if self.waiting:
            self.waiting = False  # a second Ctrl-C does not interrupt the closing of the stream
            raise KeyboardInterrupt

    def until_pressed(self, pieces: Iterator[str]) -> Iterator[str]:
        """The pieces; KeyboardInterrupt once Ctrl-C has been pressed."""
        while True:
            try:
                self.waiting = True
                if self.pressed:
                    raise KeyboardInterrupt
                text = next(pieces, None)
            finally:
                self.waiting = False
            if text is None:
                return
            yield text


class Plain:
    """Shows a text as it is."""

    def __init__(self, console: "rich.console.Console"):
        self.console = console

    def add(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()

    def close(self) -> None:
        self.add("\n")


class Markdown:
    """Draws markdown while it is written. Paragraphs that are complete are printed for good; only
    the last one is redrawn, and of it no more than fits: redrawing what has scrolled away would
    repeat it."""

    def __init__(self, console: "rich.console.Console"):
        self.console, self.rest, self.gap = console, "", ""
        self.live = rich.live.Live(console=console, refresh_per_second=12, transient=True)
        self.live.start()

    def add(self, text: str) -> None:
        done, self.rest = finished(self.rest + text)
        if done.strip():
            self.print(done)
        below = [""] if self.gap else []
        self.live.update(
            rich.console.Group(*below, drawn(tail(self.rest, max(3, self.console.height - 5))))
        )

    def close(self) -> None:
        self.live.update("")
        self.live.stop()
        if self.rest.strip():
            self.print(self.rest)

    def print(self, text: str) -> None:
        """Prints paragraphs for good, an empty line below those before."""
        self.console.print(self.gap, drawn(text), sep="", end="")
        self.gap = "\n"


def drawn(text: str) -> "rich.markdown.Markdown":
    """A text as markdown, but each of its lines as a line: rich joins the lines of a paragraph, and
    a model means verse."""
    markdown = rich.markdown.Markdown(text, hyperlinks=False)  # where a link leads stays in sight
    for token in markdown.parsed:
        for part in token.children or ():
            if part.type == "softbreak":
                part.type = "hardbreak"
    return markdown


def finished(text: str) -> tuple[str, str]:
    """(paragraphs that nothing can change any more, the rest): cut behind the last empty line
    outside of a block of code."""
    place = cut = 0
    fence = ""
    for line in text.splitlines(keepends=True):
        place += len(line)
        mark = re.match(r" {0,3}(```+|~~~+)", line)
        if mark and not fence:
            fence = mark[1]
        elif fence and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        elif not fence and line == "\n":
            cut = place
    return text[:cut], text[cut:]


def tail(text: str, n_lines: int) -> str:
    """The last lines of a paragraph, as a block of code still if it is one."""
    lines = text.split("\n")
    if len(lines) <= n_lines:
        return text
    opening = lines[0] + "\n" if re.match(r" {0,3}(```|~~~)", lines[0]) else ""
    return opening + "\n".join(lines[-n_lines:])


if __name__ == "__main__":
    run(main)
