"""The pickle of a .pth, read as data, against torch.load(weights_only=True): sound files, files
with bytes changed, and attacks."""

import collections
import io
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.arch.errors import UserError
from llama_tp.checkpoint.files import Files
from llama_tp.checkpoint.meta import _open_shard
from llama_tp.checkpoint.state_dict import BadPickle, View, read_pickle
from tests.examples import examples

STEPS = 10_000
BASE = torch.arange(24.0).view(4, 6)


def with_attribute(tensor):
    tensor.is_model_parallel = True  # as fairscale marks its parameters
    return tensor


MODULE = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
STATES = {
    "dict": {
        "a": BASE.bfloat16(),
        "b": BASE[0].half(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
    },
    "state dict of a module": MODULE.state_dict(),
    "parameters": dict(MODULE.named_parameters())
    | {"marked": with_attribute(torch.nn.Parameter(BASE.clone()))},
    "a tensor with an attribute": {"a": with_attribute(BASE.clone())},
    "views of one storage": {
        "rows": BASE[1:3],
        "columns": BASE[:, 2:4],
        "turned": BASE.t(),
        "one": BASE[:, :1].t(),
        "all": BASE,
        "none": BASE[:0],
    },
    "wide": {"a": torch.zeros(1, 64).expand(32, 64)},
    "other dtypes": {
        str(dtype): torch.arange(3).to(dtype)
        for dtype in (
            torch.float64,
            torch.int8,
            torch.uint8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
            torch.uint16,
            torch.complex64,
            torch.complex128,
        )
    },
    "ordered": collections.OrderedDict((f"layers.{i}", torch.zeros(i)) for i in range(40)),
}


def as_we_read_it(path) -> dict[str, torch.Tensor]:
    """The tensors at the places where we see them."""
    data = path.read_bytes()
    return {
        name: tensor_at(data, each)
        for name, each in _open_shard(str(path), Files(), 64).tensors.items()
    }


def tensor_at(data: bytes, s) -> torch.Tensor:
    if 0 in s.shape:
        return torch.empty(s.shape, dtype=s.dtype)
    n_bytes = (
        1 + sum((size - 1) * step for size, step in zip(s.shape, s.stride))
    ) * s.dtype.itemsize
    return torch.frombuffer(
        bytearray(data[s.offset : s.offset + n_bytes]), dtype=s.dtype
    ).as_strided(s.shape, s.stride)


def same(ours: dict, theirs: dict) -> bool:
    def bits(tensor):
        return (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.detach().contiguous().view(-1).view(torch.uint8).tolist(),
        )

    return list(ours) == list(theirs) and all(
        bits(ours[name]) == bits(theirs[name]) for name in ours
    )


@pytest.mark.parametrize("name", STATES)
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path, name):
    torch.save(STATES[name], tmp_path / "a.pth")
    theirs = torch.load(tmp_path / "a.pth", weights_only=True)
    assert theirs and same(as_we_read_it(tmp_path / "a.pth"), theirs)


def saved(state) -> tuple[bytes, bytes]:
    """(a whole .pth, its pickle)"""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue(), zipfile.ZipFile(file).read("archive/data.pkl")


FILE, PICKLE = saved(
    {
        "a": BASE.bfloat16(),
        "b": BASE[1:3],
        "c": BASE.t(),
        "p": torch.nn.Parameter(torch.ones(2)),
        "f": torch.zeros(3).to(torch.float8_e4m3fn),
    }
)


def with_pickle(raw: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(FILE)) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            new.writestr(
                entry.filename, raw if entry.filename.endswith("data.pkl") else old.read(entry)
            )
    return file.getvalue()


BYTE = st.tuples(
    st.integers(0, len(PICKLE) - 1),
    st.integers(0, 255) | st.sampled_from(b"K(t)}uRQqhX\x85\x86\x88\x89N0."),
)


@settings(max_examples=examples(300), deadline=None, derandomize=True)
@given(
    changes=st.lists(BYTE, min_size=1, max_size=2),
    at=st.integers(0, len(PICKLE)),
    cut=st.integers(0, 3),
)
def test_a_changed_pickle_is_refused_or_read_as_torch_reads_it(tmp_path_factory, changes, at, cut):
    """Also: torch refuses no file that is taken here."""
    raw = bytearray(PICKLE)
    for place, byte in changes:
        raw[place] = byte
    del raw[at : at + cut]
    path = tmp_path_factory.getbasetemp() / "changed.pth"
    path.write_bytes(with_pickle(bytes(raw)))
    try:
        ours = as_we_read_it(path)
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 700
        return
    assert same(ours, torch.load(path, map_location="cpu", weights_only=True)), raw


@settings(max_examples=examples(200), deadline=None)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, len(FILE) - 1) | st.integers(len(FILE) - 700, len(FILE) - 1),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=2,
    ),
    cut=st.sampled_from([0, 0, 1, 50, 3000]),
)
def test_a_changed_file_is_read_or_refused_in_one_error(tmp_path_factory, changes, cut):
    """The zip's own structures, mostly: torch's reader does not look at all of them."""
    raw = bytearray(FILE)
    for place, byte in changes:
        raw[place] = byte
    path = tmp_path_factory.getbasetemp() / "changed.pth"
    path.write_bytes(raw[: len(raw) - cut])
    try:
        as_we_read_it(path)
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 700


PAIRS = b")q\x00" + b"h\x00\x86q\x00" * 32  # () and 32 times the pair of the last with itself
ATTACKS = {
    "a key of nested pairs": (b"\x80\x02}" + PAIRS + b"Ns.", "a key must be a text, found a tuple"),
    "a shape of nested pairs": (
        PICKLE.replace(b"K\x04K\x06\x86q", b"K\x04" + PAIRS + b"\x86q", 1),
        "has the shape",
    ),
    "a call with nested pairs": (
        b"\x80\x02ccollections\nOrderedDict\n" + PAIRS + b"R.",
        "calls collections.OrderedDict",
    ),
    "a key that is a list": (b"\x80\x02}]Ns.", "a key must be a text, found a list"),
    "a key that is a number with a point": (b"\x80\x02}G" + bytes(8) + b"Ns.", "found a float"),
    "a key twice": (
        b"\x80\x02}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.",
        "'a' stands there twice",
    ),
    "a terabyte of zeros": (
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R.",
        "bytearray",
    ),
    "a counter": (b"\x80\x02ccollections\nCounter\n)R.", "collections.Counter"),
    "a million steps": (b"\x80\x02" + b"N" * 10**6 + b".", "more than 10,000 steps"),
    "a long list": (b"\x80\x02](" + b"N" * 10**6 + b"e.", "more than 10,000 steps"),
    "no end": (b"\x80\x02N", "not end|exhausted"),
    "nothing": (b"", "not end|exhausted"),
    "an empty stack": (b"\x80\x02.", "damaged"),
    "a tuple of nothing": (b"\x80\x02\x86.", "damaged"),
    "a mark that is not there": (b"\x80\x02t.", "damaged"),
    "what is not remembered": (b"\x80\x02h\x05.", "damaged"),
    "a text as long as nothing": (b"\x80\x02X\xff\xff\xff\xffabc.", "damaged"),
    "code": (b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.", "posix.system"),
    "code of protocol 0": (b"cposix\nsystem\n(S'id'\ntR.", "posix.system"),
    "code by instance": (b"(S'id'\niposix\nsystem\n.", "operation"),
    "a name of another protocol": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "operation"),
    "a control character": (b"\x80\x02c\x1b[31m\nsystem\n.", r"\\x1b"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_at_once(name):
    raw, says = ATTACKS[name]
    with pytest.raises(BadPickle, match=says) as caught:
        read_pickle(raw, STEPS)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def test_a_negated_tensor_is_refused(tmp_path):
    """Its elements are to be negated when they are read, which nobody would do here."""
    torch.save({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="negated"):
        as_we_read_it(tmp_path / "a.pth")


def test_views_say_where_they_lie():
    found = read_pickle(PICKLE, STEPS)
    assert all(isinstance(view, View) for view in found.values())
    assert (found["b"].offset, found["b"].shape, found["c"].stride) == (6, (2, 6), (1, 6))
    assert found["b"].storage == found["c"].storage and found["f"].dtype == torch.float8_e4m3fn
