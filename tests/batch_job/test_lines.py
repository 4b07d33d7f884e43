"""One line of a batch in, one out: shapes, defaults, and that nothing in the answer comes from the
moment."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_tp.batch_job import lines
from llama_tp.batch_job.lines import (
    answer,
    beginning,
    created_of,
    custom_id_of,
    has_failed,
    lines_of,
    order_of,
    read_line,
    refusal,
)
from llama_tp.protocol.defaults import SamplingDefaults
from llama_tp.protocol.errors import RequestError
from tests.protocol.served import MODEL, USER

KEY, OTHER = b"k" * 32, b"o" * 32
OPENAI = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": USER, "model": "gpt"},
}


def read(data: dict, number: int = 7):
    return read_line(json.dumps(data).encode(), number)


def test_lines_of_both_shapes():
    line = read(OPENAI)
    assert (line.custom_id, line.kind, line.plain) == ("a", "chat", False) and line.data == OPENAI[
        "body"
    ]
    assert read(OPENAI | {"url": "/v1/completions"}).kind == "completion"
    plain = read({"prompt": "x", "temperature": 0})
    assert (plain.custom_id, plain.kind, plain.plain) == ("line-7", "completion", True)
    assert plain.data == {"prompt": "x", "temperature": 0}
    assert read({"messages": USER, "custom_id": "b"}).custom_id == "b"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"method": "GET"}, "method must be"),
        ({"url": "file:///etc/passwd"}, "url must be one of"),
        ({"url": ["x"]}, "url must be"),
        ({"url": "http://127.0.0.1/v1/completions"}, "url must be"),
        ({"body": []}, "body must be"),
        ({"odd": 1}, "odd is not supported"),
        ({"custom_id": ""}, "custom_id must be"),
        ({"custom_id": 5}, "custom_id must be"),
        ({"custom_id": "x" * 513}, "custom_id must be"),
        ({"custom_id": None}, "custom_id must be"),
    ],
)
def test_lines_that_are_refused(changes, said):
    with pytest.raises(RequestError, match=said):
        read(OPENAI | changes)


@pytest.mark.parametrize(
    "raw, said",
    [
        (b"{}", "prompt or messages"),
        (b'{"prompt": "x", "messages": []}', "prompt or messages"),
        (b'{"a"', "not JSON"),
        (b"5", "object"),
        (b'{"prompt": "x", "custom_id": 5}', "custom_id must be"),
        (b'{"url": "/v1/completions"}', "custom_id must be"),
    ],
)
def test_raw_lines_that_are_refused(raw, said):
    with pytest.raises(RequestError, match=said):
        read_line(raw, 1)


def test_what_a_line_does_not_say():
    def params(data, **defaults):
        return order_of(read(data), MODEL, SamplingDefaults(flags=defaults), KEY).requests[0].params

    for data, expected in [
        ({"prompt": "x"}, (0.6, 0.9, 256)),
        ({"messages": USER}, (0.6, 0.9, 256)),
        (OPENAI, (1, 1, None)),
        (OPENAI | {"url": "/v1/completions", "body": {"prompt": "x"}}, (1, 1, 16)),
    ]:
        found = params(data)
        assert (found.temperature, found.top_p, found.max_tokens) == expected
        found = params(data, temperature=0.1, top_p=0.2, max_tokens=3)
        assert (found.temperature, found.top_p, found.max_tokens) == (0.1, 0.2, 3)
    body = {"messages": USER, "temperature": 0, "top_p": 0.5, "max_completion_tokens": 9}
    for data in (body, OPENAI | {"body": body}):
        found = params(data, temperature=0.1, top_p=0.2, max_tokens=3)
        assert (found.temperature, found.top_p, found.max_tokens) == (0, 0.5, 9)


def test_what_the_models_own_file_says_for_lines_that_do_not():
    def params(data):
        file = {"temperature": 0.7, "top_k": 5, "max_tokens": 50}
        return (
            order_of(read(data), MODEL, SamplingDefaults(file, {"temperature": 0.1}), KEY)
            .requests[0]
            .params
        )

    for data, expected in [
        ({"prompt": "x"}, (0.1, 0.9, 5, 256)),
        ({"messages": USER}, (0.1, 0.9, 5, 50)),
        (OPENAI, (0.1, 1, 5, 50)),
        (OPENAI | {"url": "/v1/completions", "body": {"prompt": "x", "top_k": 2}}, (0.1, 1, 2, 16)),
    ]:
        found = params(data)
        assert (found.temperature, found.top_p, found.top_k, found.max_tokens) == expected


def test_ids_and_seeds_follow_from_the_job_and_the_custom_id_alone():
    def made(data, key, number=7):
        order = order_of(read(data, number), MODEL, SamplingDefaults(), key)
        return order.id, order.requests[0].params.seed

    assert (
        made(OPENAI, KEY)
        == made(OPENAI, KEY, 8)
        == made(OPENAI | {"body": {"messages": USER, "n": 2}}, KEY)
    )
    others = [
        made(OPENAI, KEY),
        made(OPENAI, OTHER),
        made(OPENAI | {"custom_id": "b"}, KEY),
        made({"prompt": "x"}, KEY),
    ]
    assert len({one for one, _ in others}) == len({seed for _, seed in others}) == 4
    assert all(0 <= seed < 2**63 for _, seed in others)
    assert made(OPENAI | {"body": {"messages": USER, "seed": 5}}, KEY)[1] == 5
    assert created_of(KEY) == created_of(KEY) != created_of(OTHER) and 0 <= created_of(KEY) < 2**31


def test_a_stream_makes_no_sense_in_a_file():
    with pytest.raises(RequestError, match="stream is not supported"):
        order_of(
            read(OPENAI | {"body": {"messages": USER, "stream": True}}),
            MODEL,
            SamplingDefaults(),
            KEY,
        )


@given(
    st.text(min_size=1, max_size=20),
    st.dictionaries(st.text(), st.text() | st.floats(allow_nan=False, allow_infinity=False)),
)
def test_an_answer_is_one_line_that_begins_as_it_must(custom_id, body):
    custom_id = custom_id.encode("utf-8", "replace").decode()
    body = json.loads(json.dumps(body, ensure_ascii=True).replace("\\ud", "\\u0d"))
    line, failed = (
        answer(custom_id, KEY, body),
        refusal(custom_id, KEY, RequestError("no", status=500)),
    )
    for text in (line, failed):
        assert (
            text.startswith(beginning(custom_id, KEY))
            and text.endswith(b"}\n")
            and text.count(b"\n") == 1
        )
        assert json.loads(text)["custom_id"] == custom_id
    assert json.loads(line)["response"]["body"] == body and json.loads(line)["error"] is None
    assert json.loads(failed)["response"]["status_code"] == 500
    assert json.loads(failed)["error"] == {"code": "server_error", "message": "no"}
    begins = beginning(custom_id, KEY)
    assert (
        has_failed(failed, begins)
        and not has_failed(line, begins)
        and not beginning(custom_id, OTHER) == begins
    )


def test_lines_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "in"
    path.write_bytes(b"a\r\n\n  \nb\x85\xe2\x80\xa8c\nd")  # only \n ends a line
    assert list(lines_of(path)) == [(1, b"a"), (4, b"b\x85\xe2\x80\xa8c"), (5, b"d")]
    assert list(lines_of(path, 1)) == [(4, b"b\x85\xe2\x80\xa8c"), (5, b"d")]
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    path.write_bytes(b"x" * 5000 + b"\nshort\n" + b"y" * 11)
    assert [(number, len(raw)) for number, raw in lines_of(path)] == [(1, 11), (2, 5), (3, 11)]
    with pytest.raises(RequestError, match="too long"):
        read_line(b"x" * 11, 1)
    assert custom_id_of(b"x" * 11, 3) == "line-3"


def test_the_name_of_any_line():
    for raw, name in [
        (b'{"custom_id": "a"}', "a"),
        (b'{"custom_id": 5}', "line-9"),
        (b"x", "line-9"),
        (b"[]", "line-9"),
    ]:
        assert custom_id_of(raw, 9) == name
