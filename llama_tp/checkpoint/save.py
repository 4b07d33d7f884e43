"""Whole weights to a checkpoint folder in Meta's or HF's layout. A folder under its final name is
always complete.

Takes Meta's names and order of rows, as the rest of the package has them; HF's names and its order
of the q and k rows are made here. Everything is written to a sibling folder, the config last, and
renamed when it is on the disk.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save_file

from llama_tp.arch.config import ModelConfig, RopeScaling, as_params
from llama_tp.arch.errors import UserError
from llama_tp.arch.weights import Cut, Weight, table


def save_meta(
    folder: str, config: ModelConfig, weights: Mapping[str, torch.Tensor], mp: int = 1
) -> None:
    """Writes params.json and `mp` files consolidated.NN.pth.

    Args:
        folder: must not exist or be empty.
        weights: {Meta's name: whole tensor} of every weight of `table(config)`, all in one dtype.
        mp: model-parallel shards; must divide what they cut. With more shards than KV heads each
            head is stored several times in a row and counted so in params.json, as in Meta's
            16-shard 405B.
    """
    scaling = config.rope_scaling
    if scaling and scaling != RopeScaling(scaling.factor):  # Meta's file names at most the factor
        raise UserError(
            "params.json cannot say this RoPE scaling", f"it is {scaling}", "save in HF's layout"
        )
    copies = max(1, mp // config.n_kv_heads)
    with _completed(folder, _size(config, weights)) as partial:
        for i in range(mp):
            shard = {
                weight.name: _shard(weight, weights[weight.name], i, mp, copies, config.head_dim)
                for weight in table(config)
            }
            if config.tied:
                # one record in the file, as in Meta's 1B
                shard["output.weight"] = shard["tok_embeddings.weight"]
            torch.save(shard, os.path.join(partial, f"consolidated.{i:02d}.pth"))
        params = as_params(config)
        _write_json(
            os.path.join(partial, "params.json"),
            params | {"n_kv_heads": params["n_kv_heads"] * copies},
        )


def _shard(
    weight: Weight, whole: torch.Tensor, i: int, mp: int, copies: int, head_dim: int
) -> torch.Tensor:
    """Shard i of mp of a weight, in memory of its own (torch.save would write all that a view's
    storage holds)."""
    if weight.cut is Cut.WHOLE:
        return whole.contiguous()
    if weight.kind == "kv_heads" and copies > 1:
        whole = whole.unflatten(0, (-1, head_dim)).repeat_interleave(copies, 0).flatten(0, 1)
    dim = weight.cut.value
    if whole.shape[dim] % mp:
        raise UserError(
            f"{weight.name} cannot be stored in {mp} equal shards",
            f"its size is {list(whole.shape)}",
            "store fewer shards: any number of ranks can load them",
        )
    return whole.chunk(mp, dim)[i].clone(memory_format=torch.contiguous_format)


def save_hf(
    folder: str, config: ModelConfig, weights: Mapping[str, torch.Tensor], shards: int = 1
) -> None:
    """Writes config.json and `shards` safetensors files, several with an index. The rest is as in
    `save_meta`."""
    rows = table(config)
    if not 1 <= shards <= len(rows):
        raise UserError(
            f"{len(rows)} weights cannot be stored in {shards} files", "", "ask for fewer files"
        )
    with _completed(folder, _size(config, weights)) as partial:
        weight_map: dict[str, str] = {}
        for i in range(shards):
            name = (
                "model.safetensors"
                if shards == 1
                else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            )
            tensors = {
                weight.hf_name: _as_hf(weight, weights[weight.name], config)
                for weight in rows[i::shards]
            }
            weight_map |= dict.fromkeys(tensors, name)
            save_file(tensors, os.path.join(partial, name), metadata={"format": "pt"})
        if shards > 1:
            total = sum(weights[weight.name].nbytes for weight in rows)
            _write_json(
                os.path.join(partial, "model.safetensors.index.json"),
                {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
            )
        _write_json(
            os.path.join(partial, "config.json"), _hf_config(config, weights["norm.weight"].dtype)
        )


def _as_hf(weight: Weight, whole: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    if weight.rotary_heads:  # neighbouring pairs -> halves, within each head
        pairs = whole.unflatten(0, (-1, config.head_dim // 2, 2))
        whole = pairs.transpose(1, 2).flatten(0, 2)
    return whole.contiguous()


def _hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
    }


def _size(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> int:
    """Bytes of the weights; UserError if one is missing or has another shape than the config gives
    it."""
    total = 0
    for weight in table(config):
        found = weights.get(weight.name)
        if found is None or tuple(found.shape) != weight.shape:
            shape = "nothing" if found is None else list(found.shape)
            raise UserError(
                f"{weight.name} cannot be saved",
                f"found {shape}, the config needs {list(weight.shape)}",
                "save all weights of one model with its own config",
            )
        total += found.nbytes
    return total


def _write_json(path: str, what: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(what, file, indent=2, allow_nan=False)
        file.write("\n")


@contextmanager
def _completed(folder: str, n_bytes: int) -> Iterator[str]:
    """A new sibling folder to write into, which takes the final name only when all of it is on the
    disk."""
    folder = os.path.abspath(folder)
    if os.path.lexists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(
            f"{folder} exists and is not an empty folder",
            "",
            "name a new folder, or remove that one",
        )
    parent = os.path.dirname(folder)
    partial = f"{folder}.partial-{os.urandom(4).hex()}"
    try:
        os.makedirs(parent, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if n_bytes > free:
            raise UserError(
                f"{parent} has no room for this checkpoint",
                f"{n_bytes} bytes needed, {free} free",
                "free some space or name a folder on another disk",
            )
        os.mkdir(partial)
        yield partial
        for name in [*os.listdir(partial), "."]:
            _sync(os.path.join(partial, name))
        os.replace(partial, folder)  # an empty folder of that name gives way
        _sync(parent)
    except OSError as error:
        raise UserError(
            f"{folder} could not be written", str(error), "check the disk's space and rights"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
