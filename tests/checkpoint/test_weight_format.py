"""A made-up second weight format, known to this file alone: what a rank reads and holds of it.

Linears are packed, eight numbers of 4 bits in an int32 along the inputs, with a scale for each
group of 32 inputs. Half of the FFN's 104 columns is 52: the cut goes through a word (6.5) and
through a group (1.6). Each rank then holds the word and the scale that it shares.
"""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from llama_tp.arch.config import ModelConfig
from llama_tp.arch.errors import UserError
from llama_tp.arch.memory import weight_bytes
from llama_tp.arch.shard_map import ShardMap
from llama_tp.arch.weight_format import DENSE, FormatTensor, WeightFormat
from llama_tp.arch.weights import Weight, table
from llama_tp.checkpoint.load import load
from llama_tp.checkpoint.source import open_checkpoint
from tests.checkpoint.make import random_weights, write_hf

WORD, GROUP = 8, 32
CONFIG = ModelConfig(
    dim=64, n_layers=1, n_heads=8, n_kv_heads=4, head_dim=16, ffn_dim=104, vocab_size=77
)


@dataclass(frozen=True)
class Packed4:
    name: str = "packed4"

    def tensors(self, weight: Weight) -> tuple[FormatTensor, ...]:
        return (
            FormatTensor("weight_packed", ("I32",), per=(1, WORD)),
            FormatTensor("weight_scale", ("F32",), per=(1, GROUP)),
        )


def format_of(weight: Weight) -> WeightFormat:
    """Linears of layers are packed; norms, embedding and head are not."""
    return Packed4() if weight.name.startswith("layers.") and len(weight.shape) == 2 else DENSE


def unpacked(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Whole words and groups -> the numbers, as many as the words hold. (out, in / 8) int32, (out,
    groups) fp32 -> (out, in) fp32."""
    numbers = (packed.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15  # (out, words, 8)
    numbers = numbers.flatten(1) - 8
    return numbers * scales.repeat_interleave(GROUP, 1)[:, : numbers.shape[1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """-> (a folder in HF's layout, the numbers of each packed weight by Meta's names)."""
    path = tmp_path_factory.mktemp("packed")
    weights = random_weights(CONFIG)
    write_hf(path, CONFIG, weights)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    generator, stored, numbers = torch.Generator().manual_seed(1), {}, {}
    for weight in table(CONFIG):
        name = weight.hf_name.removesuffix("weight")
        if format_of(weight) is DENSE:
            stored[weight.hf_name] = weights[weight.name].contiguous()
            continue
        n_out, n_in = weight.shape
        packed = torch.randint(
            -(2**31), 2**31, (n_out, -(-n_in // WORD)), generator=generator, dtype=torch.int64
        ).int()
        scales = torch.rand(n_out, -(-n_in // GROUP), generator=generator)
        stored |= {f"{name}weight_packed": packed, f"{name}weight_scale": scales}
        numbers[weight.name] = unpacked(packed, scales)[:, :n_in]
    save_file(stored, path / "model.safetensors")
    return path, numbers


def loaded(source, shard) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
    """-> (weight -> suffix -> what the rank holds, bytes read)."""
    held: dict[str, dict[str, torch.Tensor]] = {}
    read = []

    def into(weight, tensor):
        dtype = {"I32": torch.int32, "F32": torch.float32}.get(tensor.dtypes[0], source.dtype)
        out = torch.empty(tensor.local_shape(weight, shard), dtype=dtype)
        return held.setdefault(weight.name, {}).setdefault(tensor.suffix, out)

    for _ in load(source, shard, into, read.append):
        pass
    return held, sum(read)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_rank_holds_every_word_and_group_that_its_part_touches(folder, tp):
    path, numbers = folder
    source = open_checkpoint(str(path), format_of=format_of)
    for shard in ShardMap.even(CONFIG, tp).shards():
        held, n_read = loaded(source, shard)
        for weight in table(CONFIG):
            if format_of(weight) is DENSE:
                continue
            part, mine = weight.part(shard), held[weight.name]
            packed, scales = mine["weight_packed"], mine["weight_scale"]
            if part.dim == 1:  # the first word and group may begin before the part does
                word, group = part.start // WORD, part.start // GROUP
                wide = torch.zeros(len(packed), group * GROUP // WORD, dtype=torch.int32)
                gap = torch.zeros(len(packed), word - wide.shape[1], dtype=torch.int32)
                before = torch.zeros(len(scales), group)
                ours = unpacked(torch.cat([wide, gap, packed], 1), torch.cat([before, scales], 1))[
                    :, part.start : part.stop
                ]
                wanted = numbers[weight.name][:, part.start : part.stop]
            else:
                ours = unpacked(packed, scales)[: part.stop - part.start, : weight.shape[1]]
                wanted = numbers[weight.name][part.start : part.stop]
                if weight.rotary_heads:  # HF's order of rows becomes Meta's
                    heads = wanted.view(-1, 2, CONFIG.head_dim // 2, wanted.shape[1])
                    wanted = heads.transpose(1, 2).reshape(wanted.shape)
            assert torch.equal(ours, wanted), weight.name
        assert n_read == source.rank_bytes(shard)
        n_held = sum(t.nbytes for tensors in held.values() for t in tensors.values())
        assert n_held == weight_bytes(shard, source.dtype.itemsize, format_of)


def test_bytes_by_hand(folder):
    """Rank 0 and rank 1 of tp 2, w2: 52 of 104 columns touch 7 words each, of 13, and 2 groups of
    4 on rank 0, 3 on rank 1."""
    [w2] = [weight for weight in table(CONFIG) if weight.name.endswith("w2.weight")]
    packed, scales = Packed4().tensors(w2)
    first, second = ShardMap.even(CONFIG, 2).shards()
    assert [packed.local_shape(w2, shard) for shard in (first, second)] == [(64, 7), (64, 7)]
    assert [scales.local_shape(w2, shard) for shard in (first, second)] == [(64, 2), (64, 3)]
    assert packed.held_bytes(w2, first, 2) == 64 * 7 * 4 and scales.n_read(w2, second) == 64 * 3


def test_the_planner_asks_the_format():
    """Four bits and the scales instead of sixteen: the linears of a layer take 0.31 of the bytes
    (4 / 16 + 32 / (16 * 32))."""
    shard = ShardMap.even(CONFIG, 1).shard(0)
    rest = 2 * (2 * 77 * 64 + 3 * 64)  # embedding, head, norms in bf16
    dense = weight_bytes(shard, 2) - rest
    packed = weight_bytes(shard, 2, format_of) - rest
    assert 0.31 * dense <= packed <= 0.33 * dense


def test_what_the_format_does_not_store_is_refused_by_name(folder):
    with pytest.raises(UserError, match=r"weights are missing.*q_proj.weight "):
        open_checkpoint(str(folder[0]))  # as if it were dense


def test_a_dtype_that_is_not_the_formats_is_refused(folder, tmp_path):
    from safetensors.torch import load_file

    stored = load_file(folder[0] / "model.safetensors")
    key = next(key for key in stored if key.endswith("weight_packed"))
    stored[key] = stored[key].float()
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder[0] / "config.json").read_text())
    with pytest.raises(UserError, match="weight_packed stored as float32"):
        open_checkpoint(str(tmp_path), format_of=format_of)
