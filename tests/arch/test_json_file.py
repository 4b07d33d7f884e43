"""The reader of small files: what it opens, what it refuses before it reads, and each kind of
value."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_tp.arch.errors import UserError, short
from llama_tp.arch.json_file import MAX_JSON, Fields, key_name, read_json
from llama_tp.arch.regular_file import list_folder, open_regular, read_file


def sparse(path):
    with open(path, "wb") as file:
        file.write(b"{")
        file.truncate(1 << 40)


STRANGE = {
    "fifo": (os.mkfifo, "pipe"),
    "link to /dev/zero": (lambda path: path.symlink_to("/dev/zero"), "device"),
    "folder": (os.mkdir, "folder"),
    "a terabyte": (sparse, r"too large.*1,099,511,627,776 bytes"),
    "one byte too many": (lambda path: path.write_bytes(b"{" + b" " * MAX_JSON), "too large"),
    "two keys alike": (lambda path: path.write_text('{"a": 1, "a": 2}'), "'a' stands there twice"),
    "too many digits": (lambda path: path.write_text(f'{{"a": 1{"0" * 5000}}}'), "digit"),
    "nothing": (lambda path: None, "not there"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_small_json_file(tmp_path, name):
    make, says = STRANGE[name]
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match=says) as caught:
        read_json(str(tmp_path / "config.json"))
    assert "config.json" in str(caught.value) and caught.value.fix


def test_a_fifo_that_takes_the_place_of_a_file_does_not_block(tmp_path, monkeypatch):
    """Between stat and open: the file is looked at again once it is open."""
    path, stat = str(tmp_path / "config.json"), os.stat
    os.mkfifo(path)
    monkeypatch.setattr(
        os, "stat", lambda name, **options: stat(__file__ if name == path else name, **options)
    )
    with pytest.raises(UserError, match="pipe"):
        open_regular(path)


def test_a_file_is_never_read_beyond_its_limit(tmp_path, monkeypatch):
    """It may grow after its size was looked at."""
    (tmp_path / "a").write_bytes(b"x" * 100)
    fstat = os.fstat
    monkeypatch.setattr(
        os, "fstat", lambda fd: os.stat_result((*fstat(fd)[:6], 10, *fstat(fd)[7:]))
    )
    assert read_file(str(tmp_path / "a"), 10) == b"x" * 10


def test_a_name_with_a_nul_in_it():
    for call in (open_regular, list_folder):
        with pytest.raises(UserError):
            call("a\0b")


WHOLE = [
    ("whole", {"least": 1, "most": 100}, value, value is not True and value in (1, 8.0, 100))
    for value in (
        1,
        8.0,
        100,
        0,
        -16,
        101,
        0.5,
        True,
        "16",
        [1],
        {},
        10**400,
        1e400,
        float("nan"),
        -float("inf"),
    )
]
NUMBER = [
    ("number", {"least": 0.5, "most": 100}, value, value is not True and value in (1, 0.5, 100.0))
    for value in (1, 0.5, 100.0, 0.4, 100.1, True, "1", [1], 10**400, float("inf"), float("nan"))
]
OTHERS = [
    ("flag", {}, True, True),
    ("flag", {}, False, True),
    ("flag", {}, "false", False),
    ("flag", {}, 1, False),
    ("text", {}, "a", True),
    ("text", {}, 5, False),
    ("text", {}, ["a"], False),
]


@pytest.mark.parametrize(
    "kind, bounds, value, good", [*WHOLE, *NUMBER, *OTHERS], ids=lambda value: short(value)
)
def test_values_of_each_kind(kind, bounds, value, good):
    fields = Fields({"n_layers": value}, "params.json")
    if good:
        found = getattr(fields, kind)("n_layers", **bounds)
        assert found == value and type(found) is {"whole": int, "number": float}.get(
            kind, type(value)
        )
        return
    with pytest.raises(
        UserError, match="^params.json: n_layers must be .* - found .* - correct"
    ) as caught:
        getattr(fields, kind)("n_layers", **bounds)
    assert len(caught.value.found) < 90


def test_absent_and_null_are_the_default_or_an_error():
    for raw in ({}, {"a": None}):
        fields = Fields(raw, "x.json")
        assert fields.whole("a", None, most=5) is None and fields.whole("a", 77, most=5) == 77
        assert (
            fields.number("a", 2, least=0, most=1) == 2
            and fields.flag("a") is False
            and fields.text("a", None) is None
        )
        assert fields.object("a").raw == {}
        with pytest.raises(UserError, match="x.json lacks the key 'a'"):
            fields.whole("a", most=5)
    assert Fields({"a": {"b": 1}}, "x.json").object("a").whole("b", most=1) == 1
    with pytest.raises(
        UserError, match=r"x\.json: a: b must be a whole number from 1 to 3 - found 'x'"
    ):
        Fields({"a": {"b": "x"}}, "x.json").object("a").whole("b", most=3)
    with pytest.raises(UserError, match="a must be an object - found"):
        Fields({"a": [1]}, "x.json").object("a")


def test_a_list_of_keys_stays_short():
    with pytest.raises(UserError) as caught:
        Fields({f"{i}\x1b[31m" * 50: 1 for i in range(10**5)}, "x.json").text("a")
    assert len(str(caught.value)) < 3000 and "\x1b" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(value=JSON)
def test_a_value_is_shown_in_80_printable_characters(value):
    assert (
        len(short(value)) <= 80
        and short(value).isprintable()
        and key_name(str(value)).isprintable()
    )


@given(found=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, min_size=1))
def test_what_json_writes_is_read(found, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + json.dumps(found).replace("\n", "\r\n").encode())
        assert repr(read_json(str(path))) == repr(json.loads(json.dumps(found)))
