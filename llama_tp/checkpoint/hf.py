"""Hugging Face's layout: config.json beside one or many .safetensors files, with or without an
index.

Reads the headers itself, because the safetensors library lets a key stand twice (the last wins) and
says neither file nor fix. Format: u64 little-endian header length, JSON header, data
(huggingface/safetensors README, "Format").
"""

import json
import os
import re
from math import prod

import torch

from llama_tp.arch.config import ModelConfig, from_hf
from llama_tp.arch.errors import UserError, short
from llama_tp.arch.json_file import key_name, read_json, unique_keys
from llama_tp.arch.regular_file import AGAIN, list_folder, open_regular
from llama_tp.arch.weights import table
from llama_tp.checkpoint.files import Files
from llama_tp.checkpoint.stored import DTYPES, ShardFile, Stored, contiguous

INDEX_NAME = "model.safetensors.index.json"
# For each weight of the model; 125 bytes and one tensor is what it needs. Quantised files have up
# to five tensors a weight, and are to be refused by name. The library's own limit, 100 MB, takes
# seconds and gigabytes where the JSON is made for that.
HEADER_BYTES, TENSORS = 1024, 10
METADATA_BYTES = 1 << 20
_MOST_DIMS = 8
_OF_N = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def has_safetensors(folder: str) -> bool:
    """Whether the folder has, or by its index should have, safetensors files."""
    return any(
        name.endswith((".safetensors", ".safetensors.index.json")) for name in list_folder(folder)
    )


def open_hf(folder: str, files: Files) -> tuple[ModelConfig, tuple[ShardFile, ...]]:
    """The config as config.json has it, and one ShardFile with the tensors of all files. Reads
    headers only.

    Raises UserError for missing or doubtful files; whether the tensors are those of the config is
    not judged here.
    """
    where = os.path.join(folder, "config.json")
    config = from_hf(read_json(where), where)
    n_weights = len(table(config))
    index = os.path.join(folder, INDEX_NAME)
    if os.path.lexists(index):
        placed = _weight_map(index)
        names = sorted(set(placed.values()))
    else:
        placed, names = {}, _without_index(folder)
    tensors: dict[str, Stored] = {}
    for name in names:
        path = os.path.join(folder, name)
        for key, stored in read_header(path, files, n_weights).items():
            if key in tensors:
                raise UserError(
                    f"{key_name(key)} is in two files",
                    f"{tensors[key].path} and {path}",
                    "remove the file that does not belong to this model, or " + AGAIN,
                )
            tensors[key] = stored
        if len(tensors) > TENSORS * n_weights:
            raise UserError(
                f"{folder} has {len(tensors):,} tensors and more",
                f"the model of its config has {n_weights:,}",
                f"the config does not belong to these files: {AGAIN}",
            )
    for key, name in placed.items():
        if key not in tensors or os.path.basename(tensors[key].path) != name:
            raise UserError(
                f"{key_name(key)} is not in the file that {index} names for it",
                os.path.join(folder, name),
                AGAIN,
            )
    return config, (
        ShardFile(os.path.join(folder, names[0]) if len(names) == 1 else folder, tensors),
    )


def _weight_map(index: str) -> dict[str, str]:
    """{key: file name} of an index, all files there and inside the folder."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index} has no weight_map", f"found {type(found).__name__}", AGAIN)
    for key, name in found.items():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise UserError(
                f"{index}: weight_map must name files of its own folder",
                f"{key_name(key)} is in {short(name)}",
                "do not use this checkpoint, or " + AGAIN,
            )
    folder = os.path.dirname(index)
    names = sorted(set(found.values()))
    absent = [name for name in names if not os.path.lexists(os.path.join(folder, name))]
    if absent:
        raise UserError(
            f"{len(absent)} of the {len(names)} files in {index} are missing",
            ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else ""),
            AGAIN,
        )
    return found


def _without_index(folder: str) -> list[str]:
    """Names of the safetensors files of a folder that has no index: model.safetensors, else all of
    them."""
    names = [name for name in list_folder(folder) if name.endswith(".safetensors")]
    if "model.safetensors" in names:
        return ["model.safetensors"]
    for prefix, n in sorted(
        {numbered.group(1, 3) for numbered in map(_OF_N.fullmatch, names) if numbered}
    ):
        series = {f"{prefix}-{i:05d}-of-{n}.safetensors" for i in range(1, int(n) + 1)}
        absent = sorted(series - set(names))
        if absent:
            raise UserError(
                f"{folder}: {len(absent)} of {len(series)} safetensors files are missing",
                ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else ""),
                AGAIN,
            )
    return names


def read_header(path: str, files: Files, n_weights: int) -> dict[str, Stored]:
    """{key: Stored} of one safetensors file, every number in its header checked against the file's
    length. The header may be several times as long as that of a whole model of `n_weights` weights,
    and is looked at before it is read."""
    with open(open_regular(path), "rb") as file:
        files.watch(path, file.fileno())
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{path} is cut short or not a safetensors file",
                f"its header would be {length} bytes long, the file is {size}",
                AGAIN,
            )
        most = HEADER_BYTES * n_weights + METADATA_BYTES
        if length > most:
            raise UserError(
                f"{path} has a header that does not belong to this model",
                f"it is {length:,} bytes long, for a model of {n_weights:,} weights at most "
                f"{most:,} are read",
                f"the config does not belong to these files: {AGAIN}",
            )
        raw = file.read(length)
    try:
        if not raw.startswith(b"{"):
            raise ValueError(f"it begins with {raw[:8]!r}")
        header = json.loads(raw.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a damaged header", str(error), AGAIN) from error
    notes = header.pop("__metadata__", None)
    if notes is not None and not (
        isinstance(notes, dict) and all(isinstance(note, str) for note in notes.values())
    ):
        raise UserError(
            f"{path} has a damaged header",
            f"__metadata__ must hold texts, found {short(notes)}",
            AGAIN,
        )
    start = 8 + length
    spans = []
    tensors = {}
    for key, entry in header.items():
        dtype, shape, (begin, end) = _entry(path, key, entry)
        tensors[key] = Stored(path, start + begin, dtype, shape, contiguous(shape))
        spans.append((begin, end, key))
    _check_spans(path, sorted(spans), size - start)
    return tensors


def _entry(
    path: str, key: str, entry: object
) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and span of one header entry that agree with each other."""

    def bad(found: str) -> UserError:
        return UserError(f"{path}: the header's entry for {key_name(key)} is damaged", found, AGAIN)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise bad(f"found {short(entry)}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"unknown dtype {short(dtype)}")
    for name, numbers in (("shape", shape), ("data_offsets", span)):
        if (
            not isinstance(numbers, list)
            or len(numbers) > _MOST_DIMS
            or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers)
        ):
            raise bad(f"{name} is {short(numbers)}")
    if len(span) != 2 or prod(shape) * DTYPES[dtype].itemsize != span[1] - span[0]:
        raise bad(f"shape {shape} of {dtype} does not fill bytes {span}")
    return DTYPES[dtype], tuple(shape), (span[0], span[1])


def _check_spans(path: str, spans: list[tuple[int, int, str]], n_bytes: int) -> None:
    """The tensors must cover the data without overlap or hole, and end where the file ends."""
    reached = 0
    for begin, end, key in spans:
        if begin != reached:
            raise UserError(
                f"{path}: the header is damaged at {key_name(key)}",
                f"it {'overlaps' if begin < reached else 'leaves a hole'}: begins at byte {begin} "
                "of the "
                f"data, the one before ends at {reached}",
                AGAIN,
            )
        reached = end
    if reached != n_bytes:
        raise UserError(
            f"{path} is cut short"
            if reached > n_bytes
            else f"{path} has bytes that belong to no tensor",
            f"its tensors take {reached} bytes, {n_bytes} are there"
            f"{f'; {key_name(spans[-1][2])} is not whole' if reached > n_bytes else ''}",
            AGAIN,
        )
