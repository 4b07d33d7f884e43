"""The chat client: its commands without a terminal, its answers from a fake server, its keys
through a pipe and in a real pty."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("httpx")
pytest.importorskip("prompt_toolkit")
pytest.importorskip("rich")

import prompt_toolkit.application
import prompt_toolkit.input
import prompt_toolkit.output
import rich.console

try:
    import pyte
except ImportError:
    pyte = None

from llama_tp.arch.errors import UserError
from llama_tp.chat import Markdown, Server, drawn, finished, reply, session, tail, talk
from llama_tp.text.conversation import SETTINGS, Answer, Conversation
from tests.fake_openai import FakeServer
from tests.ranks import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]


def talked(*turns) -> Conversation:
    """A conversation of questions and answers in turn."""
    conversation = Conversation(model="m")
    for question, answer in zip(turns[::2], turns[1::2]):
        assert conversation.take(question).ask
        conversation.answered(Answer(answer, n_tokens=3, n_prompt=9, first_s=0.5, last_s=1.5))
    return conversation


# What was said, and the commands.


def test_a_conversation_grows_into_the_next_request():
    conversation = talked("hi", "hello")
    assert conversation.take("/system Be brief.").text == "Be brief."
    conversation.take("/set temperature 0.5")
    assert conversation.take("and?").ask
    assert conversation.body() == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "and?"},
        ],
    }


@pytest.mark.parametrize(
    "line, message",
    [
        ("plain", "plain"),
        ("//etc/hosts", "/etc/hosts"),
        ('"""one\ntwo"""', "one\ntwo"),
        ('"""\none\n\ntwo\n"""\n', "one\n\ntwo"),
        (" /help", " /help"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_what_is_sent(line, message):
    conversation = Conversation()
    assert conversation.take(line).ask and conversation.messages == [
        {"role": "user", "content": message}
    ]


@pytest.mark.parametrize(
    "line, says",
    [
        ("/help", "/retry"),
        ("/set", "temperature (the server decides)"),
        ("/set temperature 0.7", "temperature 0.7"),
        ("/set max_tokens 5", "max_tokens 5"),
        ("/set max_tokens x", "needs a whole number, found 'x'"),
        ("/set speed 3", "there is no setting"),
        ("/set temperature nan", "needs a number, found 'nan'"),
        ("/set top_p", "top_p: the server decides"),
        ("/system", "there is no system message"),
        ("/clear", "forgotten"),
        ("/retry", "no question to ask"),
        ("/stats", "0 answers"),
        ("/save", "needs a file"),
        ("/load", "needs a file"),
        ("/load /nowhere/at.all", "no saved conversation"),
        ("/save /nowhere/at.all", "cannot write"),
        ("/hlep", "did you mean /help?"),
        ("/", "there is no /"),
        ("", ""),
        ("  \n", ""),
    ],
)
def test_commands_tell_and_send_nothing(line, says):
    conversation = Conversation()
    outcome = conversation.take(line)
    assert (
        says in outcome.text
        and not outcome.ask
        and not outcome.over
        and conversation.messages == []
    )


def test_settings_are_set_and_taken_back():
    conversation = Conversation()
    conversation.take("/set seed 7")
    conversation.take("/set stop END")
    assert (
        conversation.settings == {"seed": 7, "stop": "END"}
        and "seed 7" in conversation.take("/set").text
    )
    conversation.take("/set seed")
    assert conversation.settings == {"stop": "END"}
    assert conversation.take("/quit").over and conversation.take("/exit").over


def test_retry():
    conversation = talked("one", "1", "two", "2")
    assert conversation.take("/retry").ask
    assert [one["content"] for one in conversation.messages] == ["one", "1", "two"]
    conversation.answered(Answer())  # nothing came: the question is taken back, and kept for /retry
    assert [one["content"] for one in conversation.messages] == ["one", "1"]
    assert conversation.take("/retry").ask and conversation.messages[-1]["content"] == "two"
    conversation.answered(Answer("a part"))
    assert conversation.messages[-1] == {"role": "assistant", "content": "a part"}
    conversation.take("/retry")
    conversation.answered(Answer())
    conversation.take("three")
    conversation.answered(Answer("3"))
    # the last one, not "two"
    assert conversation.take("/retry").ask and conversation.messages[-1]["content"] == "three"


def test_clear_keeps_settings_and_system():
    conversation = talked("one", "1")
    conversation.take("/system s")
    conversation.take("/set top_k 3")
    conversation.take("/clear")
    assert (
        conversation.body()["messages"] == [{"role": "system", "content": "s"}]
        and conversation.body()["top_k"] == 3
    )


def test_stats():
    told = talked("one", "1", "two", "2").take("/stats").text
    assert (
        "2 answers, 6 tokens in 3.0 s" in told
        and "2.0 tok/s" in told
        and "4 messages, 9 tokens of prompt" in told
    )
    assert Answer("x", n_tokens=1, first_s=1.0, last_s=1.0).line() == "1 tokens, first after 1.00 s"
    assert "cut at max_tokens" in Answer("x", finish_reason="length").line()


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text(max_size=8), max_size=4),
    system=st.none() | st.text(min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_saved_and_loaded_is_the_same(texts, system, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "c.json"
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    conversation = Conversation(
        system,
        {"seed": seed},
        messages=[
            {"role": role, "content": text} for text in texts for role in ("user", "assistant")
        ],
    )
    assert conversation.take(f"/save {path}").text == f"saved {2 * len(texts)} messages"
    other = Conversation(
        "another" if system else None, messages=[{"role": "user", "content": "old"}]
    )
    assert other.take(f"/load {path}").text == f"loaded {2 * len(texts)} messages"
    assert other.body() == conversation.body()


def test_a_question_whose_answer_never_came_is_saved_and_asked_again(tmp_path):
    """A connection that breaks takes nothing of what a person has written."""
    conversation = talked("one", "1")
    conversation.take("two")
    conversation.answered(Answer())
    assert conversation.take(f"/save {tmp_path}/c").text == "saved 3 messages"
    assert [one["content"] for one in json.loads((tmp_path / "c").read_text())["messages"]] == [
        "one",
        "1",
        "two",
    ]
    other = Conversation(model="m")
    assert (
        other.take(f"/load {tmp_path}/c").text == "loaded 3 messages; /retry asks the last question"
    )
    other.take("/retry")
    assert [one["content"] for one in other.messages] == ["one", "1", "two"]
    first = Conversation()
    first.take("hello?")
    first.answered(Answer())
    assert first.take(f"/save {tmp_path}/c").text == "saved 1 message"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "3",
        "[3]",
        '[{"role": "user"}]',
        '[{"role": "root", "content": "x"}]',
        '{"messages": 3}',
        '[{"role": "user", "content": 3}]',
        '{"messages": [], "settings": {"magic": 1}}',
        '{"messages": [], "settings": {"seed": Infinity}}',
        "[" * 100_000,
        '{"messages": [], "system": 3}',
        '{"messages": [], "settings": {"seed": []}}',
    ],
)
def test_what_is_no_saved_conversation_changes_nothing(text, tmp_path):
    (tmp_path / "c.json").write_text(text)
    conversation = talked("one", "1")
    before = conversation.body()
    assert "no saved conversation" in conversation.take(f"/load {tmp_path / 'c.json'}").text
    os.mkfifo(tmp_path / "fifo")
    for strange in (tmp_path / "fifo", "/dev/zero"):  # not waited for, nor read for ever
        assert "no saved conversation" in conversation.take(f"/load {strange}").text
    assert conversation.body() == before


NAMES = st.sampled_from(["set", "system", "clear", "retry", "stats", "help", "load", "nonsense"])
RESTS = st.sampled_from(["", " ", " x", " seed 1", " seed", " temperature nan", " -", " \n"])
LINES = st.text(max_size=30) | st.tuples(NAMES, RESTS).map(lambda pair: f"/{pair[0]}{pair[1]}")


@given(lines=st.lists(LINES, max_size=6))
def test_no_line_raises_and_questions_and_answers_alternate(lines):
    conversation = Conversation(model="m")
    for i, line in enumerate(lines):
        if conversation.take(line).ask:
            assert conversation.messages[-1]["role"] == "user"
            conversation.answered(Answer("a" * (i % 2)))
        json.dumps(conversation.body())
        assert [one["role"] for one in conversation.messages] == ["user", "assistant"] * (
            len(conversation.messages) // 2
        )
        assert set(conversation.settings) <= set(SETTINGS)


# Answers of a server.


@pytest.fixture
def screen():
    return rich.console.Console(
        file=io.StringIO(), force_terminal=True, width=60, height=20, color_system=None
    )


def shown(console) -> str:
    return console.file.getvalue()


def test_an_answer_streams_and_is_counted():
    with FakeServer(first_s=0.02, gap_s=0.01) as fake:
        answer, server = Answer(), Server(fake.url + "/v1/", "key")
        assert server.first_model(0) == "fake-1"
        assert list(server.stream({"messages": []}, answer)) == ["one ", "two ", "three ", "four"]
    assert fake.requests[0][1]["Authorization"] == "Bearer key"
    assert (answer.text, answer.n_tokens, answer.n_prompt, answer.finish_reason) == (
        "one two three four",
        4,
        7,
        "stop",
    )
    assert 0.02 <= answer.first_s <= answer.last_s and answer.last_s >= 0.05
    assert answer.rate == pytest.approx(3 / (answer.last_s - answer.first_s))


def test_what_could_drive_a_terminal_is_left_out():
    with FakeServer(pieces=["a\x1b]0;title\x07\x1b[2J\r\x9b1mb", "\x1b", "\tc\n"]) as fake:
        assert list(Server(fake.url, None).stream({}, Answer())) == ["a]0;title[2J1mb", "\tc\n"]
    with (
        FakeServer(refusal=(400, "bad\x1b[2J\nthing")) as fake,
        pytest.raises(UserError, match=r"HTTP 400 - bad \[2J thing"),
    ):
        list(Server(fake.url, None).stream({}, Answer()))


def test_any_text_comes_through():
    """U+2028 and its kin end lines for Python, and for httpx's iter_lines; JSON holds them as they
    are."""
    pieces = ["a\u2028b", "\u2029", "c\x85d", "é\U0001f600"]
    with FakeServer(pieces=pieces) as fake:
        assert list(Server(fake.url, None).stream({}, Answer())) == [
            "a\u2028b",
            "\u2029",
            "cd",
            "é\U0001f600",
        ]


def test_an_answer_without_its_end_is_told(screen):
    with FakeServer(ending="cut") as fake:
        conversation = Conversation(model="m")
        conversation.take("hello?")
        reply(conversation, Server(fake.url, None), screen, markdown=False)
    assert conversation.messages[-1]["content"] == "one two " and "the server broke off" in shown(
        screen
    )


def test_a_failing_answer_keeps_its_part_or_gives_the_question_back(screen):
    with FakeServer(ending="error") as fake:
        conversation = Conversation(model="m")
        conversation.take("hello?")
        reply(conversation, Server(fake.url, None), screen, markdown=False)
    assert conversation.messages[-1] == {"role": "assistant", "content": "one two "}
    assert "one two" in shown(screen) and "the server failed - a rank died" in shown(screen)
    conversation.take("again?")
    reply(conversation, Server(fake.url, None), screen, markdown=True)  # it is gone by now
    assert len(conversation.messages) == 2 and conversation.unanswered == "again?"
    assert "connection to the server broke" in shown(screen)


@pytest.mark.parametrize("ending", ["whole", "error"])
def test_ctrl_c_never_cuts_a_drawing_in_two(ending):
    """However often it is pressed while something is drawn, the notes below the answer included."""

    class Pressing(io.StringIO):
        def write(self, text):
            os.kill(os.getpid(), signal.SIGINT)
            return super().write(text)

    console = rich.console.Console(file=Pressing(), force_terminal=True, color_system=None)
    with FakeServer(pieces=["one "] * 2, ending=ending) as fake:
        conversation = Conversation(model="m")
        conversation.take("hello?")
        reply(conversation, Server(fake.url, None), console, markdown=False)
    assert (
        shown(console).startswith("one \nstopped; ")
        and conversation.messages[-1]["content"] == "one "
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "url, key, says",
    [
        ("http://", None, "--url is not the address"),
        ("http://[::1", None, "--url is not the address"),
        ("http://host", "k\u00e9y", "API key"),
        ("http://host", "a\nb", "API key"),
    ],
)
def test_addresses_and_keys_that_cannot_be_are_refused_in_words(url, key, says):
    with pytest.raises(UserError, match=says):
        Server(url, key)


def test_the_server_is_waited_for_and_named_when_it_does_not_come():
    with FakeServer() as fake:
        url = fake.url
        with pytest.raises(UserError, match="no OpenAI-compatible server at .*/wrong"):
            Server(url + "/wrong", None).first_model(5)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"no server at {url}.*llama_tp.serve"):
        Server(url, None).first_model(0.5)
    assert time.monotonic() - started >= 0.5


# Markdown as it grows.

MARKDOWN = st.lists(
    st.sampled_from(
        ["a", "\n", "\n\n", "```", "```py\n", "~~~\n", "- x", "1. y\n", "# t\n", " ", "é"]
    ),
    max_size=20,
).map("".join)


@given(text=MARKDOWN, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_paragraphs_are_cut_at_the_same_places_however_they_come(text, cuts):
    done, rest = finished(text)
    assert done + rest == text and (not done or done.endswith("\n"))
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces, held = "", ""
    for start, end in zip(bounds, bounds[1:]):
        more, held = finished(held + text[start:end])
        pieces += more
    assert (pieces, held) == (done, rest)


def test_a_block_of_code_is_never_cut():
    assert finished("a\n\n```py\nx\n\ny\n") == ("a\n\n", "```py\nx\n\ny\n")
    assert finished("```py\nx\n\ny\n```\n\nb") == ("```py\nx\n\ny\n```\n\n", "b")
    assert (
        tail("```py\n1\n2\n3\n4", 2) == "```py\n3\n4"
        and tail("1\n2\n3", 2) == "2\n3"
        and tail("1\n2", 2) == "1\n2"
    )


def test_markdown_is_drawn_once(screen):
    view = Markdown(screen)
    for piece in [
        "# Ti",
        "tle\n\nSome **bo",
        "ld** text\n\n",
        "```\ncode\n",
        "\nmore\n```\n",
        "\n- [link](http://x.y)",
    ]:
        view.add(piece)
    view.close()
    last = shown(screen).split("\x1b[1A\x1b[2K")[-1]  # behind the last redrawing
    assert (
        "http://x.y" in last
        and "**" not in shown(screen)
        and "```" not in shown(screen).split("more")[-1]
    )


def test_each_line_of_a_text_stays_a_line(screen):
    screen.print(drawn("Two lines\nof *verse*\n\n- one\n  two\n- three\n\n```\nx\n```"))
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in shown(screen).splitlines()]
    assert [line for line in lines if line] == [
        "Two lines",
        "of verse",
        "\u2022 one",
        "two",
        "\u2022 three",
        "x",
    ]


# Keys.


@contextlib.contextmanager
def typed(keys: str, history=""):
    """A prompt that reads these keys."""
    with prompt_toolkit.input.create_pipe_input() as pipe:
        pipe.send_text(keys)
        yield session(history, input=pipe, output=prompt_toolkit.output.DummyOutput())


@pytest.mark.parametrize(
    "keys, lines",
    [
        ("hello\rworld\r", ["hello", "world"]),
        ("one\x1b\rtwo\r", ["one\ntwo"]),
        ('"""one\rtwo"""\rthree\r', ['"""one\ntwo"""', "three"]),
        ("\x1b[200~pasted\nlines\x1b[201~\r", ["pasted\nlines"]),
    ],
)
def test_keys(keys, lines):
    with typed(keys) as prompt:
        assert [prompt.prompt() for _ in lines] == lines


def test_talk_answers_until_the_end(screen):
    with FakeServer() as fake, typed("hi\r\x03/set seed 3\rmore\r\x04") as prompt:
        conversation = Conversation(model="m")
        talk(conversation, Server(fake.url, None), prompt.prompt, screen, markdown=True)
    assert [one["content"] for one in conversation.messages] == [
        "hi",
        "one two three four",
        "more",
        "one two three four",
    ]
    assert (
        fake.requests[1][2]["seed"] == 3
        and "seed 3" in shown(screen)
        and "Ctrl-D or /quit leaves" in shown(screen)
    )
    assert shown(screen).count("tok/s, first after") == 2


def test_history_is_kept_for_its_owner_alone(tmp_path):
    path = tmp_path / "history"
    with typed("secret\r", str(path)) as prompt:
        prompt.prompt()
    assert path.stat().st_mode & 0o777 == 0o600 and "secret" in path.read_text()
    with typed("\x1b[A\r", str(path)) as prompt:
        assert prompt.prompt() == "secret"
    with typed("x\r", str(tmp_path / "no" / "folder")) as prompt:
        assert prompt.prompt() == "x"


# The whole program.


def test_into_a_pipe_comes_nothing_but_answers(tmp_path):
    with FakeServer() as fake:
        done = subprocess.run(
            [sys.executable, "-m", "llama_tp.chat", "--url", fake.url, "--history_file", ""],
            cwd=ROOT,
            text=True,
            input="hi\nyou\n",
            capture_output=True,
            timeout=60,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, "one two three four\n" * 2, "")
    assert len(fake.requests[1][2]["messages"]) == 3


def test_beside_the_answers_errors_are_told_on_stderr():
    words = [sys.executable, "-m", "llama_tp.chat", "--history_file", "", "--url"]
    with FakeServer(refusal=(400, "the prompt is too long"), n_good=1) as fake:
        done = subprocess.run(
            [*words, fake.url],
            cwd=ROOT,
            text=True,
            input="a\u2028b\nmore",
            capture_output=True,
            timeout=60,
        )
    assert fake.requests[0][2]["messages"] == [{"role": "user", "content": "a\u2028b"}]
    assert done.stdout == "one two three four\n\n" and "0 tokens" not in done.stderr
    assert "HTTP 400 - the prompt is too long - /clear forgets the conversation" in done.stderr
    with FakeServer() as fake:
        done = subprocess.run(
            [*words, fake.url],
            cwd=ROOT,
            input=b"\xff\n",
            capture_output=True,
            timeout=60,
            env={**os.environ, "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"},
        )
    assert done.returncode == 1 and done.stderr.startswith(
        b"error: the standard input cannot be read"
    )


def _as_a_shell_starts_it() -> None:
    """In the child: the terminal is its own, and SIGINT is heard, to which a job in the background
    would be deaf."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program in a pty."""

    def __init__(self, *words: str):
        self.master, slave = pty.openpty()
        self.screen = pyte.Screen(80, 24) if pyte else None
        self.stream = pyte.ByteStream(self.screen) if pyte else None
        environ = {
            **os.environ,
            "TERM": "xterm",
            "COLUMNS": "80",
            "LINES": "24",
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environ,
            start_new_session=True,
            preexec_fn=_as_a_shell_starts_it,
        )
        os.close(slave)
        self.said = ""

    def expect(self, text: str, within_s: float = PATIENCE_S) -> None:
        """Reads until `text` was said, and forgets up to there."""
        deadline = time.monotonic() + within_s
        while text not in self.said:
            assert time.monotonic() < deadline, f"no {text!r} in {self.said!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # a pty whose program has ended
                    data = os.read(self.master, 65536)
                    self.said += data.decode(errors="replace")
                    if self.stream:
                        self.stream.feed(data)
        self.said = self.said.split(text, 1)[1]

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def seen(self, below: str) -> list[str]:
        """The lines that a person sees, below the one that begins so."""
        lines = [line.rstrip() for line in self.screen.display]
        return lines[[line.startswith(below) for line in lines].index(True) + 1 :]


VERSE = [
    "Two lines of verse ",
    "stand here,\n",
    "and **not** one of prose, however ",
    "wide the terminal.\n",
    "\n",
    "A second ",
    "paragraph ",
    "comes ",
    "word ",
    "by ",
    "word, ",
]
DRAWN = [
    "Two lines of verse stand here,",
    "and not one of prose, however wide the terminal.",
    "",
    "A second paragraph comes word by word,",
]


@pytest.mark.skipif(not pyte, reason="shows what a person sees: pyte, in llama_tp[test]")
@pytest.mark.parametrize(
    "keys, n_more, end",
    [
        ("", 0, "11 tokens"),
        ("typed ahead", 0, "11 tokens"),
        ("\x03", 300, "stopped; "),
        ("\x03\x03", 300, "stopped; "),
    ],
)
def test_a_person_sees_the_answer_once_in_its_lines(keys, n_more, end):
    """Whatever is typed meanwhile. Rich counts the lines that it goes back, so an echo in between
    would repeat one."""
    typed = keys if keys.isprintable() else ""
    with FakeServer(pieces=[*VERSE, *["on "] * n_more], gap_s=0.05) as fake:
        terminal = Terminal("-m", "llama_tp.chat", "--url", fake.url, "--history_file", "")
        try:
            terminal.expect("fake-1 at http")
            terminal.expect(">")
            terminal.send("tell me\r")
            terminal.expect("word, on" if n_more else "paragraph")
            terminal.send(keys)
            terminal.expect(end)
            terminal.expect(typed or ">")
            lines = terminal.seen("> tell me")
            terminal.send("\x15/quit\r")  # Ctrl-U: what was typed is not to be sent
            assert terminal.process.wait(PATIENCE_S) == 0
        finally:
            terminal.process.kill()
    place = [line.startswith(end) for line in lines].index(True)
    assert lines[:3] == DRAWN[:3] and " ".join(lines[3:place]).replace(" on", "") == DRAWN[3]
    assert lines[place + 1] == f"> {typed}".rstrip()


def test_in_a_terminal_ctrl_c_stops_the_answer_and_not_the_program():
    words = [f"word{i} " for i in range(400)]
    with FakeServer(pieces=words, gap_s=0.05) as fake:
        terminal = Terminal("-m", "llama_tp.chat", "--url", fake.url, "--history_file", "")
        try:
            terminal.expect("fake-1 at http")
            terminal.expect(">")
            terminal.send("tell me\r")
            terminal.expect("word3")
            # it would disturb the drawing
            assert not termios.tcgetattr(terminal.master)[3] & termios.ECHO
            terminal.send("\x03")
            terminal.expect("stopped; ")
            terminal.expect(">")
            terminal.send("/stats\r")
            terminal.expect("1 answers")
            terminal.send("/quit\r")
            assert terminal.process.wait(PATIENCE_S) == 0
        finally:
            terminal.process.kill()
        deadline = time.monotonic() + PATIENCE_S
        while not fake.n_broken and time.monotonic() < deadline:
            time.sleep(0.05)
        assert fake.n_broken == 1  # the server was told, too
