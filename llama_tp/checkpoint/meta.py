"""Meta's layout: params.json beside consolidated.00.pth ... consolidated.NN.pth, one a model-parallel shard.

Finds where every tensor of a .pth lies without reading its data: a .pth is a zip whose records are stored
uncompressed, one record a storage, and a pickle that says which tensor views which record. That pickle is the one
place in this package where code could hide; it is only ever read by torch's restricted unpickler.
"""

import os
import re
import zipfile

import torch

from llama_tp.checkpoint.files import Files
from llama_tp.checkpoint.stored import Shard, Stored, contiguous
from llama_tp.spec.config import ModelConfig, from_params
from llama_tp.spec.errors import UserError
from llama_tp.spec.json_file import read_json
from llama_tp.spec.regular_file import AGAIN, list_folder, open_regular

SHARD_NAME = re.compile(r"consolidated\.(\d\d)\.pth")
_SAFE = "use this model's safetensors files, or the original .pth files from Meta; load this one in no other way"
_ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = 30              # bytes of a zip local header before its name (PKZIP APPNOTE 4.3.7)


def shard_names(folder: str) -> list[str]:
    """Names of the files in `folder` that are Meta's weight shards; nothing else that ends in .pth counts."""
    return [name for name in list_folder(folder) if SHARD_NAME.fullmatch(name)]


def open_meta(folder: str, files: Files) -> tuple[ModelConfig, tuple[Shard, ...]]:
    """The config as params.json has it, and every shard's tensors. Reads headers only.

    Raises UserError for missing or doubtful files; whether the tensors are those of the config is not judged here.
    """
    names = shard_names(folder)
    wanted = [f"consolidated.{i:02d}.pth" for i in range(len(names))]
    if names != wanted:
        absent = sorted(set(wanted) - set(names))
        raise UserError(f"{folder}: shards must be numbered without a gap",
                        f"found {', '.join(names)}; {', '.join(absent)} is missing", AGAIN)
    params = os.path.join(folder, "params.json")
    raw = read_json(params)
    shards = tuple(_open_shard(os.path.join(folder, name), files) for name in names)
    return from_params(raw, _vocabulary(raw, shards), params), shards


def _vocabulary(raw: dict, shards: tuple[Shard, ...]) -> int | None:
    """Rows of the whole embedding, from the shards: Llama 3 cuts its rows, Llama 1 and 2 its columns."""
    nested = raw.get("model")
    dim = (nested if isinstance(nested, dict) else raw).get("dim")
    stored = shards[0].tensors.get("tok_embeddings.weight")
    if stored is None or len(stored.shape) != 2:
        return None
    return stored.shape[0] * len(shards) if stored.shape[1] == dim else stored.shape[0]


def _open_shard(path: str, files: Files) -> Shard:
    with open(open_regular(path), "rb") as file:
        files.watch(path, file.fileno())
        if file.read(4) != _ZIP_MAGIC:
            raise UserError(f"{path} is not a zip-format .pth file",
                            "it was saved by torch < 1.6, or is no checkpoint at all",
                            f"save it again as a plain state dict where you trust it: python -c \"import torch; "
                            f"f = '{os.path.basename(path)}'; torch.save(torch.load(f, weights_only=True), f)\"")
        records = _records(path, file)
        file.seek(0)
        try:
            # map_location "meta" reads no data and leaves each storage's place in the file in `_checkpoint_offset`
            # (torch.serialization's documented way to read storages from elsewhere; the same in torch 2.11 and 2.13).
            found = torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # the unpickler meets hostile bytes; whatever it raises means the same to the user
            raise UserError(f"{path} holds something else than plain tensors, and was not loaded",
                            _reason(error), _SAFE) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold a dict of tensors", f"found a {type(found).__name__}", _SAFE)
    return Shard(path, {str(name): _stored(path, str(name), value, records) for name, value in found.items()})


def _reason(error: Exception) -> str:
    """What torch says without its paragraphs of advice, one of which is to switch the protection off."""
    text = str(error)
    named = re.search(r"GLOBAL (\S+)", text)
    if named:
        return f"it asks to run {named[1]}"
    return f"{type(error).__name__}: {text.split('WeightsUnpickler error:')[-1].strip()[:150]}"


def _records(path: str, file) -> dict[int, int]:
    """{offset of a record's data: its bytes} of all records in the zip. Refuses TorchScript and compressed records."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            leaves = {entry.filename.split("/", 1)[-1]: entry for entry in entries}
            if "constants.pkl" in leaves:
                raise UserError(f"{path} is a TorchScript program", "found constants.pkl in it",
                                "use the model's plain state dict, or its safetensors files")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{path} has compressed records", "torch.save never writes them", AGAIN)
            if "byteorder" in leaves and archive.read(leaves["byteorder"]) == b"big":
                raise UserError(f"{path} was written on a big-endian machine", "byteorder is big",
                                "save it again on a little-endian one")
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path} is cut short or damaged", f"{os.fstat(file.fileno()).st_size} bytes; {error}",
                        AGAIN) from error
    return {_data_offset(path, file.fileno(), entry): entry.file_size for entry in entries}


def _data_offset(path: str, fd: int, entry: zipfile.ZipInfo) -> int:
    """Where a record's data begins: the local header has lengths of its own, as torch pads it to align the data."""
    header = os.pread(fd, _LOCAL_HEADER, entry.header_offset)
    if len(header) < _LOCAL_HEADER or header[:4] != _ZIP_MAGIC:
        raise UserError(f"{path} is damaged", f"no record at byte {entry.header_offset}, where its directory has "
                        f"{entry.filename}", AGAIN)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return entry.header_offset + _LOCAL_HEADER + name + extra


def _stored(path: str, name: str, value, records: dict[int, int]) -> Stored:
    """The place of one tensor, checked against the zip's directory."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
        raise UserError(f"{path}: {name} is not a plain tensor", f"found a {type(value).__name__}", _SAFE)
    record = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    shape, stride = tuple(value.shape), tuple(value.stride())
    if value.is_contiguous():
        stride = contiguous(shape)
    last = value.storage_offset() + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    if value.numel() and (record not in records or last * value.dtype.itemsize > records[record]):
        raise UserError(f"{path}: {name} lies outside of its record", f"record at byte {record}, shape {shape}", AGAIN)
    return Stored(path, (record or 0) + value.storage_offset() * value.dtype.itemsize, value.dtype, shape, stride)
