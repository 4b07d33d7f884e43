"""Tiny checkpoints in both layouts, written with torch.save and safetensors alone, and what each
rank must get.

An oracle: names, shapes, cuts and HF's order of rows are spelt out here once more, by hand, from
the formats; nothing of llama_tp.checkpoint is used, and of arch only the sizes of a config.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama_tp.arch.config import ModelConfig

GQA = ModelConfig(
    dim=64, n_layers=2, n_heads=16, n_kv_heads=8, head_dim=4, ffn_dim=96, vocab_size=128
)
RAGGED = ModelConfig(
    dim=64, n_layers=2, n_heads=16, n_kv_heads=8, head_dim=8, ffn_dim=100, vocab_size=132
)
THREES = ModelConfig(
    dim=48, n_layers=1, n_heads=6, n_kv_heads=3, head_dim=8, ffn_dim=72, vocab_size=129
)


def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    found = {
        "tok_embeddings.weight": (c.vocab_size, c.dim),
        "norm.weight": (c.dim,),
        "output.weight": (c.vocab_size, c.dim),
    }
    for i in range(c.n_layers):
        p = f"layers.{i}."
        found |= {
            p + "attention_norm.weight": (c.dim,),
            p + "ffn_norm.weight": (c.dim,),
            p + "attention.wq.weight": (c.n_heads * c.head_dim, c.dim),
            p + "attention.wk.weight": (c.n_kv_heads * c.head_dim, c.dim),
            p + "attention.wv.weight": (c.n_kv_heads * c.head_dim, c.dim),
            p + "attention.wo.weight": (c.dim, c.n_heads * c.head_dim),
            p + "feed_forward.w1.weight": (c.ffn_dim, c.dim),
            p + "feed_forward.w3.weight": (c.ffn_dim, c.dim),
            p + "feed_forward.w2.weight": (c.dim, c.ffn_dim),
        }
    return found


def random_weights(c: ModelConfig, dtype=torch.bfloat16, seed=0) -> dict[str, torch.Tensor]:
    """Whole weights under Meta's names."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes(c).items()}


def cut_dim(name: str) -> int | None:
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(("wo.weight", "w2.weight")) else 0


def params_of(c: ModelConfig, **more) -> dict:
    found = {
        "dim": c.dim,
        "n_layers": c.n_layers,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "ffn_dim": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "max_context": c.max_context,
    }
    return found | more


def hf_config_of(c: ModelConfig, **more) -> dict:
    found = {
        "model_type": "llama",
        "hidden_size": c.dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_context,
        "tie_word_embeddings": c.tied,
    }
    return found | more


def meta_shard(weights: dict, i: int, mp: int, embedding_dim: int = 0) -> dict:
    out = {}
    for name, whole in weights.items():
        dim = embedding_dim if name == "tok_embeddings.weight" else cut_dim(name)
        if dim is None:
            out[name] = whole.clone()
        else:
            n = whole.shape[dim] // mp
            assert n * mp == whole.shape[dim]
            out[name] = (
                whole[i * n : (i + 1) * n] if dim == 0 else whole[:, i * n : (i + 1) * n]
            ).clone()
    return out


def write_meta(
    folder: Path, c: ModelConfig, weights: dict, mp: int, embedding_dim: int = 0, **params
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params_of(c, **params)))
    for i in range(mp):
        torch.save(meta_shard(weights, i, mp, embedding_dim), folder / f"consolidated.{i:02d}.pth")
    return folder


HF_NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def hf_name(name: str) -> str:
    top = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in top:
        return top[name]
    _, i, rest = name.split(".", 2)
    return f"model.layers.{i}.{HF_NAMES[rest.removesuffix('.weight')]}.weight"


def halves_from_pairs(whole: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows in HF's order: half j, element i of a head is Meta's row 2 i + j (formats.md 1.6), one
    row at a time."""
    order = [
        h * head_dim + 2 * i + j
        for h in range(len(whole) // head_dim)
        for j in (0, 1)
        for i in range(head_dim // 2)
    ]
    return torch.stack([whole[r] for r in order])


def hf_tensors(c: ModelConfig, weights: dict) -> dict:
    turned = {
        name: halves_from_pairs(w, c.head_dim) if ".wq." in name or ".wk." in name else w.clone()
        for name, w in weights.items()
        if not (c.tied and name == "output.weight")
    }
    return {hf_name(name): w for name, w in turned.items()}


def write_hf(
    folder: Path,
    c: ModelConfig,
    weights: dict,
    n_files: int = 1,
    index: bool | None = None,
    **config,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config_of(c, **config)))
    tensors = hf_tensors(c, weights)
    names = sorted(tensors)
    placed = {}
    for i in range(n_files):
        file = (
            "model.safetensors"
            if n_files == 1
            else f"model-{i + 1:05d}-of-{n_files:05d}.safetensors"
        )
        mine = {name: tensors[name] for name in names[i::n_files]}
        placed |= dict.fromkeys(mine, file)
        save_file(mine, folder / file)
    if index if index is not None else n_files > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": placed})
        )
    return folder


def expected(name: str, whole: torch.Tensor, c: ModelConfig, rank: int, tp: int) -> torch.Tensor:
    """What rank `rank` of `tp` must hold: its slice, and zeros up to the width that all ranks
    share."""
    dim = cut_dim(name)
    if dim is None:
        return whole
    if ".wk." in name or ".wv." in name:
        n = max(1, c.n_kv_heads // tp)
        first = rank * c.n_kv_heads // tp
        return whole.view(c.n_kv_heads, c.head_dim, c.dim)[first : first + n].reshape(
            n * c.head_dim, c.dim
        )
    width = whole.shape[dim] // tp
    if "feed_forward" in name:
        chunks = 8 if 8 % tp == 0 and c.n_heads * c.head_dim % 8 == 0 else tp
        width = -(-c.ffn_dim // chunks) * (chunks // tp)
    if name in ("tok_embeddings.weight", "output.weight"):
        width = -(-c.vocab_size // tp)
    padded = torch.zeros(
        *(width * tp if d == dim else n for d, n in enumerate(whole.shape)), dtype=whole.dtype
    )
    padded.narrow(dim, 0, whole.shape[dim]).copy_(whole)
    return padded.narrow(dim, rank * width, width)
