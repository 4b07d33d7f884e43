"""A checkpoint on disk, opened: which layout, which model, where every weight lies, and how a part
of one is read.

Headers only until `read`. Knows stored shards and a part of a weight; which rank wants which part,
and what becomes of it, is decided above. All ranks open the same folder and come to the same
decisions, from the files alone.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd

import torch

from llama_tp.arch.config import META_FOLDERS, ModelConfig, folded, with_rope_factor
from llama_tp.arch.errors import UserError
from llama_tp.arch.regular_file import AGAIN, list_folder
from llama_tp.arch.shard_map import Shard
from llama_tp.arch.weight_format import FormatOf, FormatTensor, all_dense
from llama_tp.arch.weights import Cut, Part, Weight, table
from llama_tp.checkpoint.check import check, key_of
from llama_tp.checkpoint.files import Files
from llama_tp.checkpoint.hf import has_safetensors, open_hf
from llama_tp.checkpoint.hub import fetch
from llama_tp.checkpoint.meta import open_meta, shard_names
from llama_tp.checkpoint.stored import BoxReader, ShardFile, Stored

_MOST_KV_HEADS = 8  # of any Llama 3; more in a file may be copies
# widths that only Llama 3.1 and later have: their RoPE is always scaled
_LONG_CONTEXT_DIMS = (2048, 3072, 16384)


@dataclass(frozen=True)
class Piece:
    """A stored matrix and where it lies in the whole weight; `copies` must hold the same bits."""

    stored: Stored
    row: int
    col: int
    copies: tuple[Stored, ...] = ()


class Source:
    """An opened checkpoint. `config` is the model's, with duplicate KV heads folded and tied
    embeddings recognised.

    Attributes:
        folder: where the weight files are.
        layout: "meta" or "hf".
        dtype: torch dtype in which most of the weights are stored.
        notes: decisions that the user should hear about, one sentence each.
        n_shards: model-parallel shards stored (1 for HF).
        n_bytes: all weights as stored, each once.
        format_of: how each weight is stored.
    """

    def __init__(
        self,
        folder: str,
        layout: str,
        config: ModelConfig,
        shards: tuple[ShardFile, ...],
        files: Files,
        format_of: FormatOf = all_dense,
    ):
        self.folder, self.layout, self.n_shards = folder, layout, len(shards)
        self._shards, self._files, self._reader = shards, files, BoxReader(files)
        self.format_of = format_of
        head = next(w for w in table(replace(config, tied=False)) if w.name == "output.weight")
        has_head = key_of(head, layout) in shards[0].tensors
        said_tied = config.tied
        config = replace(config, tied=said_tied and not has_head)
        check(config, layout, shards, format_of)
        self.config = config
        if has_head and self._same_stored("tok_embeddings.weight", "output.weight"):
            self.config = replace(config, tied=True)
        repeat = self._kv_repeat()
        if repeat > 1:
            self.config = folded(self.config, repeat)
        dtypes: Counter[torch.dtype] = Counter()  # of tensors that are numbers, and no more
        self.n_bytes = 0
        for weight in table(self.config):
            for tensor in format_of(weight).tensors(weight):
                for piece in self.pieces(weight, tensor):
                    self.n_bytes += piece.stored.n_bytes
                    if tensor.cast:
                        dtypes[piece.stored.dtype] += piece.stored.n_bytes
        self.dtype = dtypes.most_common(1)[0][0]
        self.notes = self.config.notes + tuple(_remarks(self.config, dtypes, said_tied))

    # ---------------------------------------------------------------------------- where weights lie

    def _stored(self, weight: Weight, suffix: str = "weight") -> list[Stored]:
        """One of the weight's tensors in every shard, as matrices."""
        key = key_of(weight, self.layout, suffix)
        return [shard.tensors[key].matrix() for shard in self._shards]

    def _weight(self, name: str) -> Weight:
        return next(weight for weight in table(self.config) if weight.name == name)

    def pieces(self, weight: Weight, tensor: FormatTensor) -> list[Piece]:
        """The stored matrices that together are one of the weight's tensors."""
        stored = self._stored(weight, tensor.suffix)
        if weight.cut is Cut.WHOLE:
            return [Piece(stored[0], 0, 0)]  # norms are in every shard; the first one's counts
        if weight.kind == "kv_heads" and self.config.kv_repeat > 1:
            heads, n, width = self._heads(weight), self.config.kv_repeat, self.config.head_dim
            return [
                Piece(heads[i], i // n * width, 0, tuple(heads[i + 1 : i + n]))
                for i in range(0, len(heads), n)
            ]
        # Cut along the columns if a shard's rows are narrower than the weight's (also the embedding
        # of Llama 1 and 2).
        by_columns = stored[0].shape[1] != tensor.shape(weight)[-1]
        height, width = stored[0].shape
        return [
            Piece(s, 0, i * width) if by_columns else Piece(s, i * height, 0)
            for i, s in enumerate(stored)
        ]

    def _heads(self, weight: Weight) -> list[Stored]:
        """Every stored KV head of wk or wv, in order; shards hold whole heads."""
        E = self.config.head_dim
        return [s.rows(r, r + E) for s in self._stored(weight) for r in range(0, s.shape[0], E)]

    def _same_stored(self, one: str, other: str) -> bool:
        """Whether two weights are the same bits in every shard (a band is read if they differ, all
        if not)."""
        pairs = zip(self._stored(self._weight(one)), self._stored(self._weight(other)), strict=True)
        return all(self._reader.same(a, b) for a, b in pairs)

    def _kv_repeat(self) -> int:
        """How often each KV head of layer 0 is stored in a row: 2 in Meta's 16-shard 405B and its
        first HF export (formats.md 1.4), else 1. Other layers are compared when they are read."""
        config, n_rows = self.config, self.config.n_kv_heads * self.config.head_dim
        if config.n_kv_heads <= _MOST_KV_HEADS or n_rows // self.n_shards % config.head_dim:
            return 1
        repeat = 0
        for name in ("layers.0.attention.wk.weight", "layers.0.attention.wv.weight"):
            run, heads = 1, self._heads(self._weight(name))
            for before, head in pairwise(heads):
                if self._reader.same(before, head):
                    run += 1
                    continue
                repeat, run = gcd(repeat, run), 1
                if repeat == 1:
                    return 1
            repeat = gcd(repeat, run)
        return repeat

    # -------------------------------------------------------------------------------------- reading

    def read(
        self,
        weight: Weight,
        tensor: FormatTensor,
        part: Part,
        out: torch.Tensor,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Reads [part.start, part.stop) of dimension part.dim of one of a weight's tensors into
        `out`, which has that part's shape (no padding) and any dtype, device and strides. Only the
        bytes of the part are read (column cuts narrower than a page: whole rows). `progress` is
        called with stored bytes as they are done."""
        (top, bottom), (left, right) = _box(tensor.shape(weight), part)
        out = out if out.dim() == 2 else out.unsqueeze(0)  # (rows, cols)
        permuted = self.config.head_dim if weight.rotary_heads and self.layout == "hf" else 0
        for piece in self.pieces(weight, tensor):
            n_rows, n_cols = piece.stored.shape
            r0, r1 = max(top, piece.row), min(bottom, piece.row + n_rows)
            c0, c1 = max(left, piece.col), min(right, piece.col + n_cols)
            if r0 >= r1 or c0 >= c1:
                continue
            for copy in piece.copies:
                if not self._reader.same(piece.stored, copy):
                    raise UserError(
                        f"{copy.path}: {weight.name} differs between KV heads that are copies in "
                        "layer 0",
                        f"layer 0 stores each of its {self.config.n_kv_heads} KV heads "
                        f"{self.config.kv_repeat} times",
                        AGAIN,
                    )
            self._reader.read(
                piece.stored,
                (r0 - piece.row, r1 - piece.row),
                (c0 - piece.col, c1 - piece.col),
                out[r0 - top : r1 - top, c0 - left : c1 - left],
                permuted,
                progress,
            )

    def rank_bytes(self, shard: Shard) -> int:
        """Stored bytes that a rank reads: what `progress` adds up to."""
        total = 0
        for weight in table(self.config):
            for tensor in self.format_of(weight).tensors(weight):
                itemsize = self.pieces(weight, tensor)[0].stored.dtype.itemsize
                total += tensor.n_read(weight, shard) * itemsize
        return total

    def weight_files(self) -> list[str]:
        """Names of the files that hold the weights; others may lie beside them."""
        return sorted(map(os.path.basename, self._files.sizes))

    def check_unchanged(self) -> None:
        """Raises UserError if a file changed while it was being read."""
        self._files.check_unchanged()

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        self._files.close()

    def digest(self) -> bytes:
        """32 bytes over config, file names, sizes and headers: equal on nodes that see the same
        checkpoint."""
        state = hashlib.sha256(repr((self.layout, replace(self.config, notes=()))).encode())
        for path, size in sorted(self._files.sizes.items()):
            state.update(repr((os.path.basename(path), size)).encode())
        for shard in self._shards:
            for key, s in sorted(shard.tensors.items()):
                state.update(
                    repr(
                        (key, os.path.basename(s.path), s.offset, s.dtype, s.shape, s.stride)
                    ).encode()
                )
        return state.digest()


def _box(shape: tuple[int, ...], part: Part) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns of a part, as half-open ranges of a tensor as a matrix (a vector is one
    row)."""
    ranges = [
        (part.start, part.stop) if dim == part.dim else (0, size) for dim, size in enumerate(shape)
    ]
    return (ranges[0], ranges[1]) if len(ranges) == 2 else ((0, 1), ranges[0])


def _remarks(config: ModelConfig, dtypes: Counter[torch.dtype], said_tied: bool) -> Iterator[str]:
    """What is odd but not wrong about a checkpoint."""
    if len(dtypes) > 1:
        yield "weights are stored in several dtypes: " + ", ".join(
            str(d).removeprefix("torch.") for d in dtypes
        )
    if said_tied and not config.tied:
        yield (
            "the config ties the head to the embedding, but the files hold a head of its own, "
            "which is used"
        )
    if (
        config.rope_scaling is None
        and config.dim in _LONG_CONTEXT_DIMS
        and config.vocab_size == 128256
    ):
        yield (
            "this looks like Llama 3.1 or later, but the config does not scale RoPE: "
            "long texts may go wrong"
        )


# ------------------------------------------------------------------------------------------ opening


def open_checkpoint(
    path: str, rope_factor: float | None = None, format_of: FormatOf = all_dense
) -> Source:
    """Opens the checkpoint in a folder, or that of a hub name which `hub.fetch` has downloaded
    before.

    Safetensors win over Meta's files in the same folder, unless they cannot be used; Meta's files
    are also looked for in `original/`, `original/mp8/` and `original/mp16/`. `rope_factor` replaces
    the factor of a scaled RoPE. `format_of` says how weights are stored. Raises UserError for
    everything that is wrong with the files (headers only are read, and what tells copies from
    others).
    """
    folder = fetch(os.fspath(path), cached_only=True)
    found = _layouts(folder)
    if not found:
        names = list_folder(folder)
        seen = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(
            f"{folder} holds no checkpoint",
            "looked for config.json with *.safetensors, and params.json with consolidated.NN.pth "
            "there and in "
            f"{', '.join(META_FOLDERS[1:])}; found {seen or 'nothing'}",
            "point --ckpt_dir at a folder in Meta's or Hugging Face's layout (.bin and .gguf files "
            "are not read)",
        )
    failures: list[UserError] = []
    for layout, where in found:
        try:
            source = _open(layout, where, rope_factor, format_of)
        except UserError as error:
            failures.append(error)
            continue
        if failures:
            source.notes += (
                f"{where}: Meta's files used, as the safetensors cannot be: {failures[0]}",
            )
        elif layout == "hf" and ("meta", folder) in found:
            source.notes += (f"{folder} holds a model in both layouts: the safetensors are used",)
        return source
    raise failures[0]


def _layouts(folder: str) -> list[tuple[str, str]]:
    """(layout, folder) of every model that can be seen in a folder, in the order of preference."""
    found = [("hf", folder)] if has_safetensors(folder) else []
    for name in META_FOLDERS:
        where = os.path.join(folder, name) if name else folder
        if (not name or os.path.isdir(where)) and shard_names(where):
            found.append(("meta", where))
            break
    return found


def _open(layout: str, folder: str, rope_factor: float | None, format_of: FormatOf) -> Source:
    files = Files()
    try:
        config, shards = (open_hf if layout == "hf" else open_meta)(folder, files)
        config = with_rope_factor(config, rope_factor)
        return Source(folder, layout, config, shards, files, format_of)
    finally:
        files.close()
