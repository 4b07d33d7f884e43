"""Bad checkpoints (reliability.md, section c): each is one UserError that names the file or key and
what to do.

One list of damages done to two sound tiny checkpoints. Opening reads headers only, so all of this
is refused before any weight is read.
"""

import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import threading
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_tp.arch.errors import UserError
from llama_tp.arch.shard_map import ShardMap
from llama_tp.batch_job.job import sampled_digest
from llama_tp.checkpoint.load import load
from llama_tp.checkpoint.source import open_checkpoint
from tests.checkpoint.make import GQA, random_weights, write_hf, write_meta

torch.set_num_threads(1)


def load_shard(source, rank: int, tp: int):
    """The steps of one rank's load."""
    shard = ShardMap.even(source.config, tp).shard(rank)
    return load(
        source, shard, lambda weight, tensor: torch.empty(tensor.local_shape(weight, shard))
    )


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
HTML = b"\n<!DOCTYPE html><html><head><title>Log in</title></head></html>"
AGAIN = "download it again"
ONE, TWO, INDEX = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)
P0, P1 = "consolidated.00.pth", "consolidated.01.pth"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp("sound")
    weights = random_weights(GQA)
    return {
        "meta": write_meta(root / "meta", GQA, weights, 2),
        "hf": write_hf(root / "hf", GQA, weights, 2),
    }


# --------------------------------------------------------------------------------- how to do damage


def written(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncated(name, keep):
    """keep: bytes kept, or lost if negative."""
    return lambda folder: os.truncate(
        folder / name, keep if keep >= 0 else (folder / name).stat().st_size + keep
    )


def removed(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def edited_json(name, edit):
    def damage(folder):
        found = json.loads((folder / name).read_text())
        found = edit(found) or found
        (folder / name).write_text(json.dumps(found))

    return damage


def params(**changes):
    return edited_json("params.json", lambda found: found | changes)


def hf_config(**changes):
    return edited_json("config.json", lambda found: found | changes)


def edited_header(edit, name=ONE):
    """`edit` gets the header's dict and returns it, or the header's raw bytes."""

    def damage(folder):
        raw = (folder / name).read_bytes()
        (n,) = struct.unpack("<Q", raw[:8])
        header = edit(json.loads(raw[8 : 8 + n]))
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + n :])

    return damage


def entry(change):
    """A change of the entry that lies first in the data, in place."""

    def edit(header):
        key = min(
            (k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"]
        )
        change(header[key])
        return header

    return edited_header(edit)


def twice(header):
    text = json.dumps(header)
    first = next(k for k in header if k != "__metadata__")
    return (text[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}}}").encode()


def overlapping(header):
    a, b = sorted(
        (k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"]
    )[:2]
    n = header[b]["data_offsets"][1] - header[b]["data_offsets"][0]
    at = header[a]["data_offsets"][0]
    header[b]["data_offsets"] = [at, at + n]
    return header


def with_tensors(name, change):
    """Rewrites a safetensors or .pth file with other tensors."""

    def damage(folder):
        path = folder / name
        if name.endswith(".pth"):
            tensors = torch.load(path, weights_only=True)
            torch.save(change(tensors) or tensors, path)
        else:
            tensors = {key: w.clone() for key, w in load_file(path).items()}
            save_file(change(tensors) or tensors, path)

    return damage


def replaced(name, make):
    """`make(folder)` puts something else in the place of a file."""

    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


def dangling(path: Path):
    path.symlink_to("../../blobs/0123abcd")


def looping(path: Path):
    path.symlink_to(path.name)


class Touch:
    """Unpickled without care it makes the file `sentinel` in the current folder."""

    def __reduce__(self):
        return os.system, ("touch sentinel",)


def malicious_zip(folder):
    tensors = torch.load(folder / P1, weights_only=True)
    torch.save(tensors | {"norm.weight": Touch()}, folder / P1)


def malicious_legacy(folder):
    torch.save({"norm.weight": Touch()}, folder / P1, _use_new_zipfile_serialization=False)


def malicious_plain(folder):
    (folder / P1).write_bytes(pickle.dumps(Touch()))


def torchscript(folder):
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / P1)


def rezipped(folder, compression=zipfile.ZIP_DEFLATED, edit=lambda name, data: data):
    raw = io.BytesIO((folder / P1).read_bytes())
    with zipfile.ZipFile(raw) as old, zipfile.ZipFile(folder / P1, "w", compression) as new:
        for item in old.infolist():
            new.writestr(item.filename, edit(item.filename, old.read(item)), compression)


def big_endian(folder):
    rezipped(
        folder,
        zipfile.ZIP_STORED,
        lambda name, data: b"big" if name.endswith("byteorder") else data,
    )


def with_pickle(raw):
    """Another pickle in the place of that of shard 1."""
    return lambda folder: rezipped(
        folder, zipfile.ZIP_STORED, lambda name, data: raw if name.endswith("data.pkl") else data
    )


def key_of_nested_pairs(deep=32):
    """A key that takes 2^32 steps to hash: a pair of the same pair, and so on, 32 deep."""
    return with_pickle(b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * deep + b"Ns.")


def record_twice(folder):
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(folder / P1, "a", zipfile.ZIP_STORED) as archive,
    ):
        warnings.simplefilter("ignore")
        archive.writestr("consolidated.01/data/0", b"x" * 64)


def directory_of(n):
    """A zip whose directory has n entries, all of one local header."""

    def damage(folder):
        local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 0, 0, 1, 0) + b"a"
        entry = (
            struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
            + b"a"
        )
        end = struct.pack(
            "<4s4H2LH", b"PK\5\6", 0, 0, n & 0xFFFF, n & 0xFFFF, n * len(entry), len(local), 0
        )
        (folder / P1).write_bytes(local + entry * n + end)

    return damage


def record_beyond_the_end(folder):
    """The zip's directory says that a record is two gigabytes long."""
    raw = bytearray((folder / P1).read_bytes())
    at = raw.rindex(b"consolidated.01/data/0") - 46  # where its entry in the directory begins
    raw[at + 20 : at + 28] = struct.pack("<2L", 0x7FFFFFFF, 0x7FFFFFFF)
    (folder / P1).write_bytes(raw)


def many_keys(n):
    more = {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(n)}
    return edited_header(lambda header: header | more)


def record_cut_short(folder):
    """A zip in good order, one of whose records is shorter than the pickle says."""
    rezipped(
        folder,
        zipfile.ZIP_STORED,
        lambda name, data: data[:-8] if name.endswith("data/0") else data,
    )


def other_model(folder):
    """Shard 1 of a model twice as wide in a folder of this one."""
    c = GQA.__class__(**{**{k: getattr(GQA, k) for k in GQA.__dataclass_fields__}, "dim": 128})
    other = write_meta(folder / "other", c, random_weights(c), 2)
    shutil.move(other / P1, folder / P1)
    shutil.rmtree(other)


def drop(key):
    return lambda tensors: {k: w for k, w in tensors.items() if k != key}


def put(key, value):
    return lambda tensors: tensors | {key: value}


WQ = "layers.1.attention.wq.weight"
NORM, HF_V = "norm.weight", "model.layers.1.self_attn.v_proj.weight"  # HF_V lies in TWO
Z = torch.zeros

DAMAGE = [
    # ----- any file
    *[
        (f"{layout}: {what} {name}", layout, written(name, data), [name, say])
        for layout, names in (("meta", (P1, "params.json")), ("hf", (TWO, "config.json", INDEX)))
        for name in names
        for what, data, say in (
            ("empty", b"", AGAIN),
            ("lfs", LFS, "git lfs pull"),
            ("html", HTML, "HF_TOKEN"),
        )
    ],
    *[
        (f"{layout}: {make.__name__} {name}", layout, replaced(name, make), [name, *say])
        for layout, name in (("meta", P1), ("hf", TWO), ("hf", "config.json"))
        for make, say in (
            (dangling, ["blobs/0123abcd", "hf download"]),
            (looping, ["symbolic links"]),
            (Path.mkdir, ["folder"]),
            (os.mkfifo, ["pipe"]),
        )
    ],
    *[
        (f"{layout}: {what} {name}", layout, written(name, data), [name, say])
        for layout, name in (("meta", "params.json"), ("hf", "config.json"), ("hf", INDEX))
        for what, data, say in (
            ("array", b"[1, 2]", "object"),
            ("comment", b"{} // x", "not valid JSON"),
            ("not utf-8", b'{"a": "\xff"}', "not valid JSON"),
            ("deep", b"[" * 100000, "not valid JSON"),
            ("cut", b'{"dim": 1', "not valid JSON"),
        )
    ],
    # ----- Meta's layout
    ("meta: truncated", "meta", truncated(P1, -100), [P1, "cut short", AGAIN]),
    ("meta: half", "meta", truncated(P1, 5000), [P1, "cut short", AGAIN]),
    ("meta: not a zip", "meta", written(P1, b"x" * 100), [P1, "zip"]),
    (
        "meta: legacy .pth",
        "meta",
        lambda f: torch.save({NORM: Z(1)}, f / P1, _use_new_zipfile_serialization=False),
        [P1, r"torch\.save\(torch\.load\(f, weights_only=True"],
    ),
    ("meta: torchscript", "meta", torchscript, [P1, "TorchScript", "state dict"]),
    ("meta: malicious", "meta", malicious_zip, [P1, "posix.system", "safetensors"]),
    ("meta: malicious legacy", "meta", malicious_legacy, [P1, "zip"]),
    ("meta: malicious pickle", "meta", malicious_plain, [P1, "zip"]),
    ("meta: compressed", "meta", rezipped, [P1, "compressed", AGAIN]),
    ("meta: big-endian", "meta", big_endian, [P1, "big-endian"]),
    ("meta: record cut short", "meta", record_cut_short, [P1, "outside of its record", AGAIN]),
    (
        "meta: key of nested pairs",
        "meta",
        key_of_nested_pairs(),
        [P1, "key must be a text, found a tuple", "safetensors"],
    ),
    (
        "meta: bytearray of a terabyte",
        "meta",
        with_pickle(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\1\x85R."),
        [P1, "builtins.bytearray"],
    ),
    (
        "meta: a million steps",
        "meta",
        with_pickle(b"\x80\x02](" + b"N" * 500_000 + b"e."),
        [P1, "steps"],
    ),
    (
        "meta: a pickle of 20 MB",
        "meta",
        with_pickle(b"\x80\x02" + bytes(20_000_000)),
        [P1, "plausible size", AGAIN],
    ),
    (
        "meta: a dict in itself",
        "meta",
        with_pickle(b"\x80\x02}q\0X\1\0\0\0ah\0s."),
        [P1, "a is not a plain tensor", "dict"],
    ),
    (
        "meta: a key of control characters",
        "meta",
        with_pickle(b"\x80\x02}X\5\0\0\0\x1b[31mNs."),
        [P1, r"'\\x1b\[31m'"],
    ),
    (
        "meta: a million records",
        "meta",
        directory_of(1_000_000),
        [P1, "damaged", "47,000,000 bytes", AGAIN],
    ),
    ("meta: a record twice", "meta", record_twice, [P1, "twice", AGAIN]),
    (
        "meta: a record beyond the end",
        "meta",
        record_beyond_the_end,
        [P1, "cut short", "data/0 would end at byte 2147"],
    ),
    *[
        (
            f"meta: n_layers of {n:.0e}",
            "meta",
            params(n_layers=n),
            ["params.json", "n_layers", "to 1,024"],
        )
        for n in (10**5, 10**9, 10**300)
    ],
    (
        "meta: n_layers of 10^400",
        "meta",
        params(n_layers=10**400),
        ["params.json", "n_layers", "found 1000"],
    ),
    (
        "meta: n_layers of 1000",
        "meta",
        params(n_layers=1000),
        ["missing", r"layers\.2\.", "in all"],
    ),
    ("meta: a head of -16", "meta", params(head_dim=-16), ["params.json", "head_dim", "-16"]),
    ("meta: not a dict", "meta", lambda f: torch.save([Z(1)], f / P1), [P1, "dict"]),
    (
        "meta: a nested dict",
        "meta",
        with_tensors(P1, put("model", {"a": Z(1)})),
        [P1, "model", "plain tensor"],
    ),
    (
        "meta: a sparse tensor",
        "meta",
        with_tensors(P1, put(NORM, Z(64).to_sparse())),
        [P1, "plain tensor"],
    ),
    (
        "meta: not a tensor",
        "meta",
        with_tensors(P1, put(NORM, [1.0] * 64)),
        [P1, NORM, "found a list"],
    ),
    (
        "meta: gap",
        "meta",
        lambda f: (f / P1).rename(f / "consolidated.02.pth"),
        [r"01\.pth is missing", AGAIN],
    ),
    ("meta: half of the shards", "meta", removed(P1), [P0, "shapes", "1 shard", "in all"]),
    (
        "meta: one shard twice",
        "meta",
        lambda f: [shutil.copy(f / P0, f / f"consolidated.0{i}.pth") for i in (2, 3)],
        ["4 shards", r"tok_embeddings\.weight|attention"],
    ),
    ("meta: shard of another model", "meta", other_model, [P1, "shapes", "two models"]),
    (
        "meta: no params.json",
        "meta",
        removed("params.json"),
        ["params.json is not there", "download"],
    ),
    (
        "meta: missing param",
        "meta",
        edited_json("params.json", lambda p: {k: v for k, v in p.items() if k != "dim"}),
        ["params.json", "'dim'"],
    ),
    ("meta: wrong type", "meta", params(n_heads="16"), ["params.json", "n_heads"]),
    ("meta: heads do not divide", "meta", params(n_kv_heads=5), ["params.json", "5 KV"]),
    (
        "meta: more layers than there are",
        "meta",
        params(n_layers=3),
        ["18 of the model's weights are missing", r"layers\.2\.", P0],
    ),
    ("meta: fewer layers", "meta", params(n_layers=1), ["18 tensors are none", r"layers\.1\."]),
    ("meta: missing key", "meta", with_tensors(P1, drop(WQ)), [P1, WQ, "missing"]),
    (
        "meta: extra key",
        "meta",
        with_tensors(P1, put("layers.0.attention.wq.bias", Z(4))),
        [P1, "wq.bias", "biases"],
    ),
    (
        "meta: misshapen",
        "meta",
        with_tensors(P1, put(WQ, Z(32, 60).bfloat16())),
        [P1, WQ, r"\[32, 60\], not \[32, 64\]"],
    ),
    (
        "meta: int8",
        "meta",
        with_tensors(P1, put(WQ, Z(32, 64).to(torch.int8))),
        [P1, WQ, "int8", "bf16"],
    ),
    (
        "meta: fp8",
        "meta",
        with_tensors(P1, put(WQ, Z(32, 64).to(torch.float8_e4m3fn))),
        [P1, WQ, "float8_e4m3fn"],
    ),
    ("meta: fp64", "meta", with_tensors(P1, put(WQ, Z(32, 64).double())), [P1, WQ, "float64"]),
    (
        "meta: scattered view",
        "meta",
        with_tensors(P1, put(WQ, Z(64, 128).bfloat16()[::2, ::2])),
        [P1, WQ, "contig"],
    ),
    (
        "meta: expanded view",
        "meta",
        with_tensors(P1, put(WQ, Z(1, 64).bfloat16().expand(32, 64))),
        [P1, WQ, "contig"],
    ),
    # ----- HF's layout
    ("hf: truncated", "hf", truncated(TWO, -1), [TWO, "cut short", "bytes", AGAIN]),
    ("hf: header truncated", "hf", truncated(TWO, 50), [TWO, "cut short", AGAIN]),
    ("hf: 5 bytes", "hf", truncated(TWO, 5), [TWO, "cut short"]),
    (
        "hf: header of 2^62 bytes",
        "hf",
        written(ONE, struct.pack("<Q", 1 << 62) + b"{}" * 50),
        [ONE, str(1 << 62)],
    ),
    (
        "hf: trailing junk",
        "hf",
        lambda f: (f / ONE).open("ab").write(b"junk"),
        [ONE, "belong to no tensor", AGAIN],
    ),
    (
        "hf: junk after the header",
        "hf",
        edited_header(lambda h: json.dumps(h).encode() + b" x"),
        [ONE, "damaged"],
    ),
    (
        "hf: byte order mark",
        "hf",
        edited_header(lambda h: b"\xef\xbb\xbf" + json.dumps(h).encode()),
        [ONE, "damaged"],
    ),
    ("hf: header is an array", "hf", edited_header(lambda h: b"[]"), [ONE, "damaged header"]),
    (
        "hf: header too deep",
        "hf",
        edited_header(lambda h: b'{"a":' * 100000),
        [ONE, "damaged header"],
    ),
    ("hf: key twice in a header", "hf", edited_header(twice), [ONE, "twice", AGAIN]),
    ("hf: entry is no object", "hf", edited_header(lambda h: h | {"x": 5}), [ONE, "entry for x"]),
    (
        "hf: 100,000 keys",
        "hf",
        many_keys(100_000),
        [ONE, "header that does not belong", "at most 1,0[0-9,]+ are read"],
    ),
    ("hf: 2,000 keys", "hf", many_keys(2000), [r"2,0\d\d tensors and more", "has 21 -"]),
    (
        "hf: a header of lists",
        "hf",
        edited_header(lambda h: b'{"a":[' + b"[]," * 400_000 + b"[]]}"),
        [ONE, "header"],
    ),
    (
        "hf: a key of a megabyte",
        "hf",
        edited_header(lambda h: h | {"\x1b[31m" * 10**5: 5}),
        [ONE, r"entry for '\\x1b"],
    ),
    (
        "hf: a shape of 10,000 numbers",
        "hf",
        entry(lambda e: e.update(shape=[10**4000] * 50)),
        [ONE, "shape"],
    ),
    ("hf: a size of 10^4000", "hf", entry(lambda e: e.update(shape=[10**4000])), [ONE, "shape is"]),
    (
        "hf: 10^5 layers",
        "hf",
        hf_config(num_hidden_layers=10**5),
        ["config.json", "num_hidden_layers", "to 1,024"],
    ),
    (
        "hf: 10^400 layers",
        "hf",
        hf_config(num_hidden_layers=10**400),
        ["config.json", "num_hidden_layers", "found 1000"],
    ),
    ("hf: head_dim is a text", "hf", hf_config(head_dim="16"), ["config.json", "head_dim", "'16'"]),
    *[
        (
            f"hf: {name} is /dev/zero",
            "hf",
            replaced(name, lambda path: path.symlink_to("/dev/zero")),
            [name, "device"],
        )
        for name in ("config.json", INDEX, TWO)
    ],
    (
        "hf: an index of a terabyte",
        "hf",
        lambda f: os.truncate(f / INDEX, 1 << 40),
        [INDEX, "too large"],
    ),
    (
        "hf: 99,999 files",
        "hf",
        lambda f: [(f / INDEX).unlink(), (f / ONE).rename(f / "a-00001-of-99999.safetensors")],
        ["99998 of 99999 safetensors files are missing"],
    ),
    ("hf: overlap", "hf", edited_header(overlapping), [ONE, "overlaps"]),
    (
        "hf: hole",
        "hf",
        entry(lambda e: e.update(shape=[1], dtype="BF16", data_offsets=[0, 2])),
        [ONE, "hole"],
    ),
    (
        "hf: offsets past the end",
        "hf",
        entry(lambda e: e.update(shape=[1 << 40], dtype="U8", data_offsets=[0, 1 << 40])),
        [ONE, "overlaps|cut short"],
    ),
    ("hf: unknown dtype", "hf", entry(lambda e: e.update(dtype="F4")), [ONE, "unknown dtype 'F4'"]),
    (
        "hf: dtype is no string",
        "hf",
        entry(lambda e: e.update(dtype=["BF16"])),
        [ONE, "unknown dtype"],
    ),
    (
        "hf: shape and span differ",
        "hf",
        entry(lambda e: e.update(shape=[1, 2, 3])),
        [ONE, "does not fill"],
    ),
    ("hf: negative shape", "hf", entry(lambda e: e.update(shape=[-1, -64])), [ONE, "shape"]),
    (
        "hf: overflowing shape",
        "hf",
        entry(lambda e: e.update(shape=[1 << 62, 1 << 62])),
        [ONE, "does not fill"],
    ),
    ("hf: true for a size", "hf", entry(lambda e: e.update(shape=[True])), [ONE, "shape"]),
    (
        "hf: three offsets",
        "hf",
        entry(lambda e: e.update(data_offsets=[0, 1, 2])),
        [ONE, "does not fill"],
    ),
    (
        "hf: backward offsets",
        "hf",
        entry(lambda e: e.update(data_offsets=[5, 1])),
        [ONE, "does not fill"],
    ),
    ("hf: key in two files", "hf", with_tensors(ONE, put(HF_V, Z(32, 64))), [HF_V, ONE, TWO]),
    (
        "hf: key not in its file",
        "hf",
        edited_json(INDEX, lambda i: i["weight_map"].update({HF_V: ONE})),
        [HF_V, ONE, INDEX],
    ),
    ("hf: key in no file", "hf", with_tensors(TWO, drop(HF_V)), [HF_V, TWO, INDEX]),
    ("hf: file of the index missing", "hf", removed(TWO), [TWO, INDEX, "1 of the 2 files", AGAIN]),
    ("hf: no index, file missing", "hf", removed(TWO, INDEX), [TWO, "1 of 2", AGAIN]),
    ("hf: no weight_map", "hf", written(INDEX, b"{}"), [INDEX, "weight_map"]),
    *[
        (
            f"hf: weight_map names {bad!r}",
            "hf",
            edited_json(INDEX, lambda i, bad=bad: i["weight_map"].update({HF_V: bad})),
            [INDEX, "own folder", HF_V],
        )
        for bad in ("../../x.safetensors", "/etc/passwd", "a\\b", "..", "", 5)
    ],
    ("hf: no config.json", "hf", removed("config.json"), ["config.json is not there", "download"]),
    ("hf: another architecture", "hf", hf_config(model_type="mistral"), ["config.json", "mistral"]),
    (
        "hf: quantised",
        "hf",
        hf_config(quantization_config={"quant_method": "awq"}),
        ["config.json", "awq"],
    ),
    ("hf: code in the folder", "hf", hf_config(auto_map={"AutoModel": "x.Y"}), ["auto_map"]),
    ("hf: unknown rope", "hf", hf_config(rope_scaling={"type": "yarn"}), ["config.json", "yarn"]),
    (
        "hf: key in the file only",
        "hf",
        with_tensors(ONE, put("model.layers.0.self_attn.q_proj.bias", Z(64))),
        [ONE, "q_proj.bias", "biases"],
    ),
    (
        "hf: key missing in both",
        "hf",
        lambda f: (
            with_tensors(TWO, drop(HF_V))(f),
            edited_json(INDEX, lambda i: i["weight_map"].pop(HF_V) and None)(f),
        ),
        [HF_V, "1 of the model's weights are missing", AGAIN],
    ),
    (
        "hf: more layers than there are",
        "hf",
        hf_config(num_hidden_layers=3),
        ["9 of the model's weights are missing", r"model\.layers\.2", "9 in all"],
    ),
    (
        "hf: misshapen",
        "hf",
        hf_config(intermediate_size=100),
        [r"\[96, 64\], not \[100, 64\]", "mlp"],
    ),
    *[
        (
            f"hf: {name}",
            "hf",
            lambda f, dtype=dtype: [
                with_tensors(n, lambda t: {k: w.to(dtype) for k, w in t.items()})(f)
                for n in (ONE, TWO)
            ],
            [ONE, name, "bf16"],
        )
        for name, dtype in (
            ("float8_e4m3fn", torch.float8_e4m3fn),
            ("int8", torch.int8),
            ("float64", torch.float64),
        )
    ],
]


@pytest.fixture
def soon():
    """Ends a test that would go on for ever: opening takes milliseconds, this a minute."""

    def ring(*_):
        raise TimeoutError("it did not end within a minute")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "layout, damage, says", [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE]
)
def test_damage_is_one_clear_error(sound, tmp_path, monkeypatch, layout, damage, says):
    folder = tmp_path / "ckpt"
    shutil.copytree(sound[layout], folder)
    damage(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    for pattern in says:
        re.search(pattern, message) or pytest.fail(f"{pattern!r} is not in: {message}")
    assert caught.value.fix and len(message) < 1500 and "weights_only=False" not in message
    assert not (tmp_path / "sentinel").exists() and not (folder / "sentinel").exists()


def test_the_sentinel_works(tmp_path, monkeypatch):
    """The malicious files are malicious: a careless reader is caught."""
    monkeypatch.chdir(tmp_path)
    torch.save({"norm.weight": Touch()}, tmp_path / P1)
    torch.load(tmp_path / P1, weights_only=False)
    assert (tmp_path / "sentinel").exists()


@pytest.mark.usefixtures("soon")
def test_what_lies_beside_the_weights_is_not_opened(sound, tmp_path):
    shutil.copytree(sound["hf"], tmp_path / "ckpt")
    for name in ("training_args.pth", "other.safetensors", "optimizer.pth"):
        os.mkfifo(tmp_path / "ckpt" / name)
    source = open_checkpoint(tmp_path / "ckpt")
    assert source.weight_files() == [ONE, TWO] and len(run(source)) == 21
    assert sampled_digest(source.folder, source.weight_files(), b"") == sampled_digest(
        str(sound["hf"]), [TWO, ONE], b""
    )


@pytest.mark.parametrize(
    "names",
    [(), ("pytorch_model.bin", "config.json"), ("model.gguf",), ("optimizer.pth", "params.json")],
)
def test_a_folder_without_a_checkpoint_says_what_it_looked_for_and_found(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UserError) as caught:
        open_checkpoint(tmp_path)
    message = str(caught.value)
    assert (
        "consolidated.NN.pth" in message
        and "*.safetensors" in message
        and "original/mp16" in message
    )
    assert all(name in message for name in names) and (names or "found nothing" in message)


def test_a_path_that_is_not_there_or_is_a_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="Not a directory"):
        open_checkpoint(tmp_path / "file")


@pytest.mark.parametrize("name", [P1, ""], ids=["shard", "folder"])
def test_permission_denied(sound, tmp_path, monkeypatch, name):
    """The system call refuses, as it does for those who are not root (tests may run as root, whom
    nothing stops)."""
    folder = tmp_path / "ckpt"
    shutil.copytree(sound["meta"], folder)
    really = {"open": os.open, "listdir": os.listdir}

    def refusing(call):
        def refuse(path, *args, **kwargs):
            if os.fspath(path) == str(folder / name):
                raise PermissionError(13, "Permission denied")
            return really[call](path, *args, **kwargs)

        return refuse

    monkeypatch.setattr(os, "open", refusing("open"))
    monkeypatch.setattr(os, "listdir", refusing("listdir"))
    with pytest.raises(
        UserError, match=rf"{name or 'ckpt'} cannot be read - permission denied .*chmod"
    ):
        open_checkpoint(folder)


# ---------------------------------------------------------------- files that change while one loads


def run(source, rank=0, tp=1):
    return [w.name for w in load_shard(source, rank, tp)]


@pytest.mark.parametrize("layout, name", [("meta", P1), ("hf", TWO)])
def test_a_file_that_shrank_after_it_was_opened(sound, tmp_path, layout, name):
    folder = tmp_path / "ckpt"
    shutil.copytree(sound[layout], folder)
    source = open_checkpoint(folder)
    os.truncate(folder / name, 10_000)
    with pytest.raises(UserError, match=f"{name} changed while"):
        run(source)


@pytest.mark.parametrize("layout, name", [("meta", P0), ("hf", ONE)])
def test_a_file_that_shrinks_while_it_is_read(sound, tmp_path, layout, name):
    folder = tmp_path / "ckpt"
    shutil.copytree(sound[layout], folder)
    source = open_checkpoint(folder)
    steps = load_shard(source, 0, 1)
    [next(steps) for _ in range(3)]  # files are open by now
    os.truncate(folder / name, 10_000)
    with pytest.raises(UserError, match=f"{name} is shorter"):
        list(steps)


def test_a_file_that_is_rewritten_while_it_is_read(sound, tmp_path):
    folder = tmp_path / "ckpt"
    shutil.copytree(sound["meta"], folder)
    source = open_checkpoint(folder)
    steps = load_shard(source, 0, 1)
    next(steps)
    os.utime(folder / P0, ns=(1, 1))
    with pytest.raises(UserError, match=f"{P0} changed while"):
        list(steps)


def test_no_file_stays_open(sound, tmp_path):
    def n_open():
        return len(os.listdir("/proc/self/fd"))

    before = n_open()
    sources = [open_checkpoint(folder) for folder in sound.values()]
    for source in sources:
        run(source)
        steps = load_shard(source, 0, 2)
        next(steps)
        steps.close()  # given up half-way
    for damage in (truncated(P1, -100), malicious_zip):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        shutil.copytree(sound["meta"], folder)
        damage(folder)
        with pytest.raises(UserError):
            open_checkpoint(folder)
    assert n_open() == before


def test_a_fifo_does_not_block(sound, tmp_path):
    folder = tmp_path / "ckpt"
    shutil.copytree(sound["hf"], folder)
    (folder / ONE).unlink()
    os.mkfifo(folder / ONE)
    failed = []

    def attempt():
        with pytest.raises(UserError):
            open_checkpoint(folder)
        failed.append(True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert failed == [True]
