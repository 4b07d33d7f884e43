"""Headers of safetensors files, against the library's own reader: sound ones, and with bytes
changed."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from llama_tp.arch.errors import UserError
from llama_tp.checkpoint.files import Files
from llama_tp.checkpoint.hf import METADATA_BYTES, read_header
from tests.examples import examples

FILE = save(
    {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.arange(4).to(torch.bfloat16),
        "c": torch.ones(1, 2, 1).half(),
    },
    {"format": "pt"},
)
(LENGTH,) = struct.unpack("<Q", FILE[:8])
HEADER, DATA = FILE[8 : 8 + LENGTH], FILE[8 + LENGTH :]


def ours(path) -> dict:
    found = read_header(str(path), Files(), 3)
    data = path.read_bytes()
    return {
        key: (s.dtype, s.shape, data[s.offset : s.offset + s.n_bytes]) for key, s in found.items()
    }


def theirs(path) -> dict:
    with safe_open(path, "pt") as file:
        return {
            key: (
                t.dtype,
                tuple(t.shape),
                t.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
            )
            for key in file.keys()
            for t in [file.get_tensor(key)]
        }


def is_read_as_the_library_reads_it(path, raw: bytes) -> None:
    """Also: the library refuses no file that is taken here."""
    path.write_bytes(raw)
    try:
        found = ours(path)
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 700
        return
    try:
        assert found == theirs(path), raw
    except SafetensorError as refusal:
        pytest.fail(f"{refusal}: {raw}")


BYTE = st.tuples(
    st.integers(0, LENGTH - 1), st.integers(0, 255) | st.sampled_from(b'0123456789[]{},":FBU "')
)


@settings(max_examples=examples(300), deadline=None, derandomize=True)
@given(
    changes=st.lists(BYTE, max_size=2),
    at=st.integers(0, LENGTH),
    cut=st.integers(0, 4),
    kept=st.booleans(),
)
def test_a_changed_header_is_refused_or_read_as_the_library_reads_it(
    tmp_path_factory, changes, at, cut, kept
):
    header = bytearray(HEADER)
    for place, byte in changes:
        header[place] = byte
    del header[at : at + cut]
    raw = struct.pack("<Q", LENGTH if kept else len(header)) + header + DATA
    is_read_as_the_library_reads_it(tmp_path_factory.getbasetemp() / "changed.safetensors", raw)


SMALL = st.integers(0, 30) | st.sampled_from([-1, 1.0, True, None, "2", 2**63, 10**400, [2]])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "U8", "F8_E4M3", "bf16", "", 5]),
        "shape": st.lists(SMALL, max_size=3),
    },
    optional={
        "data_offsets": st.lists(SMALL, max_size=3)
        | st.tuples(st.sampled_from([0, 8, 24]), st.sampled_from([8, 24, 28])),
        "extra": SMALL,
    },
)


@settings(max_examples=examples(300), deadline=None, derandomize=True)
@given(
    entries=st.dictionaries(
        st.text(max_size=3) | st.just("__metadata__"), ENTRY | SMALL, max_size=3
    ),
    n=st.integers(0, 40),
)
def test_any_header_is_refused_or_read_as_the_library_reads_it(tmp_path_factory, entries, n):
    header = json.dumps(entries).encode()
    is_read_as_the_library_reads_it(
        tmp_path_factory.getbasetemp() / "any.safetensors",
        struct.pack("<Q", len(header)) + header + DATA[:n],
    )


def test_a_header_may_hold_metadata_and_no_more_than_a_model_needs(tmp_path):
    path, entries = tmp_path / "a.safetensors", json.loads(HEADER)
    for n, good in ((METADATA_BYTES - 1000, True), (METADATA_BYTES + 4000, False)):
        header = json.dumps(entries | {"__metadata__": {"notes": "x" * n}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + DATA)
        assert theirs(path)
        if good:
            assert ours(path) == theirs(path)
        else:
            with pytest.raises(UserError, match="header that does not belong"):
                ours(path)
