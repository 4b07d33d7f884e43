"""Meta's layout: params.json beside consolidated.00.pth ... consolidated.NN.pth, one a
model-parallel shard.

Finds where every tensor of a .pth lies without reading its data: a .pth is a zip whose records are
stored uncompressed, one record a storage, and a pickle that says which tensor views which record.
That pickle is the one place in this package where code could hide; `state_dict` reads it as data.
"""

import io
import os
import re
import struct
import zipfile
from math import prod
from typing import Any

from llama_tp.arch.config import ModelConfig, from_params
from llama_tp.arch.errors import UserError, short
from llama_tp.arch.json_file import key_name, read_json
from llama_tp.arch.regular_file import AGAIN, list_folder, open_regular
from llama_tp.arch.weights import table
from llama_tp.checkpoint.files import Files
from llama_tp.checkpoint.state_dict import BadPickle, View, read_pickle
from llama_tp.checkpoint.stored import ShardFile, Stored, contiguous

SHARD_NAME = re.compile(r"consolidated\.(\d\d)\.pth")
_SAFE = (
    "use this model's safetensors files, or the original .pth files from Meta; "
    "load this one in no other way"
)
_ZIP_MAGIC = b"PK\x03\x04"
# What torch.save needs for a weight, times four: 110 bytes of the zip's directory, 120 bytes and 32
# steps of the pickle.
DIRECTORY_BYTES, PICKLE_BYTES, STEPS = 512, 512, 128
_LOCAL_HEADER = 30  # bytes of a zip local header before its name (PKZIP APPNOTE 4.3.7)


def shard_names(folder: str) -> list[str]:
    """Names of the files in `folder` that are Meta's weight shards; nothing else that ends in .pth
    counts."""
    return [name for name in list_folder(folder) if SHARD_NAME.fullmatch(name)]


def open_meta(folder: str, files: Files) -> tuple[ModelConfig, tuple[ShardFile, ...]]:
    """The config as params.json has it, and every shard's tensors. Reads headers only.

    Raises UserError for missing or doubtful files; whether the tensors are those of the config is
    not judged here.
    """
    names = shard_names(folder)
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(names))]
    if names != wanted:
        absent = sorted(set(wanted) - set(names))
        raise UserError(
            f"{folder}: shards must be numbered without a gap",
            f"found {', '.join(names)}; {', '.join(absent)} is missing",
            AGAIN,
        )
    where = os.path.join(folder, "params.json")
    raw = read_json(where)
    n_weights = len(table(from_params(raw, 1, where)))
    shards = tuple(_open_shard(os.path.join(folder, name), files, n_weights) for name in names)
    return from_params(raw, _vocabulary(raw, shards), where), shards


def _vocabulary(raw: dict[str, Any], shards: tuple[ShardFile, ...]) -> int | None:
    """Rows of the whole embedding, from the shards: Llama 3 cuts its rows, Llama 1 and 2 its
    columns."""
    nested = raw.get("model")
    dim = (nested if isinstance(nested, dict) else raw).get("dim")
    stored = shards[0].tensors.get("tok_embeddings.weight")
    if stored is None or len(stored.shape) != 2:
        return None
    return stored.shape[0] * len(shards) if stored.shape[1] == dim else stored.shape[0]


def _open_shard(path: str, files: Files, n_weights: int) -> ShardFile:
    """A shard's tensors. What is read of it is bounded by what a model of `n_weights` weights can
    need, several times over."""
    with _Frugal(io.FileIO(open_regular(path))) as file:
        file.most = DIRECTORY_BYTES * (n_weights + 64)
        files.watch(path, file.fileno())
        if file.read(4) != _ZIP_MAGIC:
            raise UserError(
                f"{path} is not a zip-format .pth file",
                "it was saved by torch < 1.6, or is no checkpoint at all",
                f'save it again as a plain state dict where you trust it: python -c "import torch; '
                f"f = '{os.path.basename(path)}'; torch.save(torch.load(f, weights_only=True), "
                'f)"',
            )
        pickled, records = _records(path, file, PICKLE_BYTES * (n_weights + 1024))
    try:
        found = read_pickle(pickled, STEPS * (n_weights + 64))
    except BadPickle as error:
        raise UserError(
            f"{path} holds something else than plain tensors, and was not loaded", str(error), _SAFE
        ) from None
    if type(found) is not dict:
        raise UserError(
            f"{path} must hold a dict of tensors", f"found a {type(found).__name__}", _SAFE
        )
    return ShardFile(
        path, {str(name): _stored(path, name, value, records) for name, value in found.items()}
    )


class _Frugal(io.BufferedReader):
    """A file that refuses long reads: zipfile asks for a whole directory at once, and makes an
    object of each entry."""

    most = 1 << 16

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > self.most:
            raise zipfile.BadZipFile(f"{size:,} bytes of it would be its directory or pickle")
        return super().read(size)


def _records(path: str, file: _Frugal, most: int) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(data.pkl, {key of a storage: (where its bytes begin, how many there are)}) of the zip.
    Refuses TorchScript and compressed records, names that stand there twice, and a pickle of more
    than `most` bytes."""
    size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            leaves = {entry.filename.split("/", 1)[-1]: entry for entry in entries}
            if "constants.pkl" in leaves:
                raise UserError(
                    f"{path} is a TorchScript program",
                    "found constants.pkl in it",
                    "use the model's plain state dict, or its safetensors files",
                )
            if any(
                entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
                for entry in entries
            ):
                raise UserError(
                    f"{path} has compressed records", "torch.save never writes them", AGAIN
                )
            if len(leaves) < len(entries):
                raise zipfile.BadZipFile("a name stands in its directory twice")
            small = {name: leaves[name] for name in ("data.pkl", "byteorder") if name in leaves}
            if "data.pkl" not in small or sum(entry.file_size for entry in small.values()) > most:
                raise zipfile.BadZipFile("it has no data.pkl of a plausible size")
            file.most = most
            if "byteorder" in small and archive.read(small["byteorder"]) == b"big":
                raise UserError(
                    f"{path} was written on a big-endian machine",
                    "byteorder is big",
                    "save it again on a little-endian one",
                )
            pickled = archive.read(small["data.pkl"])
    except (
        zipfile.BadZipFile,
        EOFError,
        ValueError,
        RuntimeError,
        OSError,
        struct.error,
        OverflowError,
    ) as error:
        raise UserError(
            f"{path} is cut short or damaged", f"{size} bytes; {str(error)[:200]}", AGAIN
        ) from error
    records = {
        leaf.removeprefix("data/"): (_data_offset(path, file.fileno(), entry), entry.file_size)
        for leaf, entry in leaves.items()
        if leaf.startswith("data/")
    }
    return pickled, records


def _data_offset(path: str, fd: int, entry: zipfile.ZipInfo) -> int:
    """Where a record's data begins: the local header has lengths of its own, as torch pads it to
    align the data."""
    header = os.pread(fd, _LOCAL_HEADER, entry.header_offset)
    if len(header) < _LOCAL_HEADER or header[:4] != _ZIP_MAGIC:
        raise UserError(
            f"{path} is damaged",
            f"no record at byte {entry.header_offset}, where its directory has "
            f"{key_name(entry.filename)}",
            AGAIN,
        )
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = entry.header_offset + _LOCAL_HEADER + name + extra
    if start + entry.file_size > os.fstat(fd).st_size:
        raise UserError(
            f"{path} is cut short",
            f"{key_name(entry.filename)} would end at byte {start + entry.file_size}, the file "
            f"at {os.fstat(fd).st_size}",
            AGAIN,
        )
    return start


def _stored(
    path: str, name: str | int, view: object, records: dict[str, tuple[int, int]]
) -> Stored:
    """The place of one tensor, checked against the zip's directory."""
    name = key_name(str(name)[:100])
    if not isinstance(view, View):
        raise UserError(
            f"{path}: {name} is not a plain tensor", f"found a {type(view).__name__}", _SAFE
        )
    record, n_bytes = records.get(view.storage.key, (0, -1))
    n, itemsize = prod(view.shape), view.dtype.itemsize
    last = (
        view.offset
        + sum((size - 1) * step for size, step in zip(view.shape, view.stride, strict=True))
        + 1
    )
    if view.storage.n_bytes != n_bytes or (n and last * itemsize > n_bytes):
        raise UserError(
            f"{path}: {name} lies outside of its record",
            f"shape {short(view.shape)}, the record "
            f"{key_name(view.storage.key)} has {max(n_bytes, 0)} bytes, not {view.storage.n_bytes}",
            AGAIN,
        )
    rows = contiguous(view.shape)  # a dimension of 1 may have any stride
    in_a_row = not n or all(
        size == 1 or step == plain
        for size, step, plain in zip(view.shape, view.stride, rows, strict=True)
    )
    return Stored(
        path,
        record + view.offset * itemsize,
        view.dtype,
        view.shape,
        rows if in_a_row else view.stride,
    )
