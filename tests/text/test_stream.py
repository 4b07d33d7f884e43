"""The stream against a naive oracle that sees the whole text at once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_tp.arch.errors import UserError
from llama_tp.text.stream import TextStream
from tests.examples import examples


def oracle(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text before the stop string that is complete first, found by trying every end of the text."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def chunks_of(ids, cuts):
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in zip(edges, edges[1:])]


def check(tokenizer, ids, cuts, stops):
    text, stopped = oracle(tokenizer.decode(ids), stops)
    stream = TextStream(tokenizer, stops)
    out = ""
    for chunk in chunks_of(ids, cuts):
        out += stream.push(chunk)
        assert text.startswith(out)  # never half a character, never a piece of the stop string
    out += stream.finish()
    assert (out, stream.stopped) == (text, stopped)
    assert stream.push([0]) == "" if stopped else True


LETTERS = st.text(alphabet="abc日😀é\ufffd", max_size=40)
STOPS = st.lists(st.text(alphabet="abc日😀é\ufffd", min_size=1, max_size=4), max_size=3)
CUTS = st.lists(st.integers(0, 200), max_size=60)


@settings(max_examples=examples(600), deadline=None)
@given(text=LETTERS | st.text(max_size=40), cuts=CUTS, stops=STOPS)
@example(text="abcd", cuts=[1, 2, 3], stops=["abcd", "bc"])
@example(text="aab", cuts=[1, 2], stops=["ab", "b"])
def test_texts(text, cuts, stops, tiny):
    check(tiny, tiny.encode(text), cuts, stops)


@settings(max_examples=examples(600), deadline=None)
@given(data=st.data(), cuts=CUTS, stops=STOPS)
def test_any_ids(data, cuts, stops, tiny):
    """Ids as a random model samples them: broken characters, specials in between."""
    odd = [i for i in range(tiny.n_vocab) if tiny.token_bytes(i)[:1] >= b"\x80"] + [
        tiny.bos_id,
        *tiny.encode("abc"),
    ]
    check(
        tiny,
        data.draw(st.lists(st.sampled_from(odd) | st.integers(0, tiny.n_vocab - 1), max_size=40)),
        cuts,
        stops,
    )


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200), cuts=CUTS)
def test_stop_strings_cut_out_of_the_text(text, cuts, meta):
    stops = [text[cut % (len(text) + 1) :][:3] for cut in cuts[:3]]
    check(meta, meta.encode(text), cuts, [s for s in stops if s])


def one_by_one(tokenizer, text, stop=()):
    stream = TextStream(tokenizer, stop)
    return [stream.push([i]) for i in tokenizer.encode(text)] + [stream.finish()], stream.stopped


def test_a_character_over_two_tokens(tiny):
    assert [tiny.token_bytes(i) for i in tiny.encode("😀")] == [b"\xf0\x9f\x98", b"\x80"]
    assert one_by_one(tiny, "😀!") == (["", "😀", "!", ""], None)


def test_half_a_character_at_the_end(tiny):
    stream = TextStream(tiny)
    assert [stream.push(tiny.encode("a😀")[:-1]), stream.finish(), stream.finish()] == [
        "a",
        "\ufffd",
        "",
    ]


def test_a_token_with_the_stop_string_in_its_middle(tiny):
    assert tiny.decode(tiny.encode("xSTOPy")[:1]) == "xSTOPy"
    assert one_by_one(tiny, "abxSTOPy the", "STOP") == (["ab", "x", "", ""], "STOP")


def test_text_that_only_began_like_the_stop_string(tiny):
    assert one_by_one(tiny, "a\n\nb", ["\n\n\n"]) == (["a", "", "\n\nb", ""], None)
    assert one_by_one(tiny, "a\n\n", ["\n\n\n"]) == (["a", "", "\n\n"], None)


def test_nothing_to_stop_at_holds_nothing(tiny):
    assert one_by_one(tiny, "hello the") == (["hello", " the", ""], None)


def test_what_is_kept_does_not_grow(tiny):
    stream = TextStream(tiny, ["STOP", "\n\n\n"])
    for _ in range(1000):
        stream.push(tiny.encode("the STO\n\n world S"))
        assert len(stream._held) <= 3


def test_empty_stop_string(tiny):
    with pytest.raises(UserError, match="must not be empty"):
        TextStream(tiny, ["a", ""])


def test_stop_strings_heeded_later(tiny):
    """As for min_tokens: what has gone out stays out, what comes is watched."""
    stream = TextStream(tiny)
    out = stream.push(tiny.encode("STOP ST"))
    stream.set_stop_strings(["STOP"])
    out += stream.push(tiny.encode("OP STO")) + stream.push(tiny.encode("P the")) + stream.finish()
    assert (out, stream.stopped) == ("STOP STOP ", "STOP")
    with pytest.raises(UserError, match="must not be empty"):
        stream.set_stop_strings("")
