"""The events of a streamed reply: any cutting of its bytes, any text in them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_tp.protocol.events import Events

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4)


@given(
    texts=TEXTS,
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    ascii=st.booleans(),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_any_cutting_gives_the_same_events(texts, end, ascii, cuts):
    wanted = [{"text": text} for text in texts]
    lines = [
        ": ping",
        "",
        *(f"data: {json.dumps(one, ensure_ascii=ascii)}{end}event: x{end}" for one in wanted),
        "data:[DONE]",
        "",
    ]
    data = end.join(lines).encode()
    bounds = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    events, found = Events(), []
    for start, stop in zip(bounds, bounds[1:]):
        found += events.push(data[start:stop])
    assert found == wanted and events.done


@pytest.mark.parametrize(
    "data", [b"data: {\n", b"data: 3\n", b"data: \xff\n", b"data: " + b"[" * 100_000 + b"\n"]
)
def test_what_is_no_event_is_an_error(data):
    with pytest.raises(ValueError):
        Events().push(data)


def test_an_event_counts_once_its_line_has_ended():
    events = Events()
    assert (
        events.push(b'data: {"a": 1}') == []
        and events.push(b"\n") == [{"a": 1}]
        and not events.done
    )
