"""Rectangles out of files against torch's own slicing: any strides, dtypes, band heights and
segment widths."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_tp.checkpoint import stored as room
from llama_tp.checkpoint.files import Files
from llama_tp.checkpoint.stored import BoxReader, Stored
from tests.checkpoint.make import halves_from_pairs

torch.set_num_threads(1)


def on_disk(
    path, storage: torch.Tensor, view: torch.Tensor, files: Files, before: int = 6
) -> Stored:
    """`storage` in a file after a few other bytes, and the place of one view of it."""
    path.write_bytes(b"x" * before + storage.flatten().view(torch.uint8).numpy().tobytes())
    with open(path, "rb") as file:
        files.watch(str(path), file.fileno())
    offset = before + view.storage_offset() * view.dtype.itemsize
    return Stored(str(path), offset, view.dtype, tuple(view.shape), tuple(view.stride()))


@st.composite
def boxes(draw):
    rows, cols = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    r0, c0 = draw(st.integers(0, rows)), draw(st.integers(0, cols))
    return rows, cols, (r0, draw(st.integers(r0, rows))), (c0, draw(st.integers(c0, cols)))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    boxes(),
    st.sampled_from(["plain", "transposed", "columns of a wider one", "one row of many"]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sampled_from([2, 60, 400, 1 << 20]),
    st.sampled_from([1, 20, 4096]),
    st.booleans(),
)
def test_any_box_of_any_view(
    tmp_path, monkeypatch, box, kind, dtype, wanted, band, segment, packed
):
    rows, cols, (r0, r1), (c0, c1) = box
    monkeypatch.setattr(room, "BAND_BYTES", band)
    monkeypatch.setattr(room, "SEGMENT_BYTES", segment)
    whole = torch.randn(rows, cols).to(dtype)
    if kind == "plain":
        storage = view = whole
    elif kind == "transposed":
        storage = whole.t().contiguous()
        view = storage.t()
    elif kind == "columns of a wider one":
        storage = torch.cat(
            [torch.randn(rows, 3).to(dtype), whole, torch.randn(rows, 2).to(dtype)], dim=1
        )
        view = storage[:, 3 : 3 + cols]
    else:
        storage = torch.cat([torch.randn(2, cols).to(dtype), whole])
        view = storage[2:]
    files, seen = Files(), []
    place = on_disk(tmp_path / "f", storage, view, files)
    if not place.readable():  # a single row or column can have any stride; meta.py makes them plain
        place = on_disk(tmp_path / "f", whole, whole, files)
    out = torch.full((r1 - r0, (c1 - c0) * (1 if packed else 2)), float("nan"), dtype=wanted)
    out = out if packed else out[:, ::2]
    BoxReader(files).read(place, (r0, r1), (c0, c1), out, progress=seen.append)
    files.close()
    assert torch.equal(out, whole[r0:r1, c0:c1].to(wanted))
    assert sum(seen) == (r1 - r0) * (c1 - c0) * dtype.itemsize


@pytest.mark.parametrize("band", [16, 1000, 1 << 20])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_hf_rows_are_turned_within_heads(tmp_path, monkeypatch, band, wanted):
    monkeypatch.setattr(room, "BAND_BYTES", band)
    meta = torch.randn(6 * 8, 10).bfloat16()
    hf, files = halves_from_pairs(meta, 8), Files()
    place = on_disk(tmp_path / "f", hf, hf, files)
    out = torch.empty(3 * 8, 10, dtype=wanted)
    BoxReader(files).read(place, (16, 40), (0, 10), out, head_dim=8)
    assert torch.equal(out, meta[16:40].to(wanted))


def test_a_column_cut_reads_its_own_bytes_where_its_rows_are_a_page_wide(tmp_path, monkeypatch):
    whole, files, asked = torch.randn(12, 8192).bfloat16(), Files(), []
    place = on_disk(tmp_path / "f", whole, whole, files)
    fill = files.fill

    def counted(path, offset, memory):
        asked.append(len(memory))
        fill(path, offset, memory)

    monkeypatch.setattr(files, "fill", counted)
    for n, bytes_read in ((2048, 12 * 2048 * 2), (1024, (11 * 8192 + 1024) * 2)):
        asked.clear()
        out = torch.empty(12, n, dtype=torch.bfloat16)
        BoxReader(files).read(place, (0, 12), (4096, 4096 + n), out)
        assert torch.equal(out, whole[:, 4096 : 4096 + n]) and sum(asked) == bytes_read


def test_same_compares_bits_and_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "BAND_BYTES", 64)
    files = Files()
    a = torch.randn(30, 8)
    a[3, 3] = float("nan")
    b, c = a.clone(), a.clone()
    c[2, 0] += 1
    here, there, other = (
        on_disk(tmp_path / name, t, t, files) for name, t in (("a", a), ("b", b), ("c", c))
    )
    reader = BoxReader(files)
    assert (
        reader.same(here, there)
        and not reader.same(here, other)
        and not reader.same(here, here.rows(0, 4))
    )
    reads = []
    monkeypatch.setattr(reader, "read", lambda *args: reads.append(args))
    assert reader.same(here, here) and not reads
