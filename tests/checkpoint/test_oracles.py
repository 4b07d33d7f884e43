"""HF folders as transformers writes and reads them, and the rotary order of rows as its attention
uses it."""

from dataclasses import replace

import pytest
import torch

from llama_tp.arch.config import RopeScaling
from llama_tp.checkpoint.save import save_hf, save_meta
from llama_tp.checkpoint.source import open_checkpoint
from tests.checkpoint.make import GQA, halves_from_pairs, hf_name, random_weights
from tests.checkpoint.test_load import assert_all_ranks, loaded

transformers = pytest.importorskip(
    "transformers", reason="the oracle for HF folders; `make setup` installs it"
)
torch.set_num_threads(1)

CASES = {
    "gqa": GQA,
    "tied, scaled rope, own head_dim": replace(
        GQA, tied=True, head_dim=8, rope_scaling=RopeScaling(32.0), max_context=131072
    ),
    "mha": replace(GQA, n_kv_heads=16, rope_theta=10000.0),
}


def theirs(c):
    scaling = c.rope_scaling and {
        "rope_type": "llama3",
        "factor": c.rope_scaling.factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=c.dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            intermediate_size=c.ffn_dim,
            vocab_size=c.vocab_size,
            rms_norm_eps=c.norm_eps,
            max_position_embeddings=c.max_context,
            tie_word_embeddings=c.tied,
            rope_parameters={"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})},
        )
    ).to(torch.bfloat16)


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("name", CASES)
def test_what_transformers_saves_is_loaded(tmp_path, name, shard_size):
    c = CASES[name]
    model = theirs(c)
    with torch.no_grad():
        for p in model.parameters():  # its norms begin as ones
            p.normal_()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "60KB")
    source = open_checkpoint(tmp_path)
    assert source.config == c and source.dtype == torch.bfloat16
    state = model.state_dict()
    want = {}
    for ours in random_weights(c):
        if ours != "output.weight" or not c.tied:
            want[ours] = state[hf_name(ours)]
            if ".wq." in ours or ".wk." in ours:
                got = loaded(source, 0, 1)[ours]
                assert torch.equal(halves_from_pairs(got, c.head_dim), want[ours])
                want[ours] = got
    assert_all_ranks(source, c, want, (1, 2, 16))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_we_save(tmp_path, name, shards):
    c = CASES[name]
    weights = random_weights(c)
    if c.tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    save_hf(tmp_path / "ours", c, weights, shards)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_theta"] == c.rope_theta
    assert model.config.rope_parameters.get("factor") == (
        c.rope_scaling.factor if c.rope_scaling else None
    )
    for ours, parameter in model.state_dict().items():
        whole = weights[{hf_name(n): n for n in weights}[ours]]
        turned = (
            halves_from_pairs(whole, c.head_dim) if "q_proj" in ours or "k_proj" in ours else whole
        )
        assert torch.equal(parameter, turned), ours
    assert open_checkpoint(tmp_path / "ours").config == c


def test_rotating_pairs_of_our_rows_equals_rotating_halves_of_theirs(tmp_path):
    """q . k after rotation, theirs on the stored rows (transformers), ours on the loaded rows
    (complex numbers)."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    model = theirs(replace(GQA, n_layers=1)).float()
    model.save_pretrained(tmp_path)
    got = loaded(open_checkpoint(tmp_path), 0, 1)
    T, E, x = 7, GQA.head_dim, torch.randn(7, GQA.dim)
    attention, kv = model.model.layers[0].self_attn, GQA.n_kv_heads
    q, k = (
        (x @ p.weight.t()).view(1, T, -1, E).transpose(1, 2)
        for p in (attention.q_proj, attention.k_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(model.config)(x, torch.arange(T)[None]))
    scores = q[0, :kv] @ k[0].transpose(1, 2)  # (K, T, T)

    angle = torch.outer(torch.arange(T), GQA.rope_theta ** (-torch.arange(0, E, 2) / E))  # (T, E/2)
    turn = torch.polar(torch.ones(T, E // 2), angle)

    def rotated(weight):
        pairs = (x @ weight.t()).view(T, -1, E // 2, 2)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turn[:, None])
        return turned.flatten(2).transpose(0, 1)  # (heads, T, E)

    wq, wk = (got[f"layers.0.attention.{name}.weight"] for name in ("wq", "wk"))
    ours = rotated(wq)[:kv] @ rotated(wk).transpose(1, 2)  # (K, T, T)
    torch.testing.assert_close(ours, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mp", [1, 2, 8])
def test_meta_files_we_save_are_plain_and_hold_the_same_weights(tmp_path, mp):
    weights = random_weights(GQA)
    save_meta(tmp_path / "ours", GQA, weights, mp)
    shards = [
        torch.load(tmp_path / "ours" / f"consolidated.{i:02d}.pth", weights_only=True)
        for i in range(mp)
    ]
    joined = torch.cat([s["layers.1.attention.wo.weight"] for s in shards], dim=1)
    assert torch.equal(joined, weights["layers.1.attention.wo.weight"])
    assert torch.equal(torch.cat([s["output.weight"] for s in shards]), weights["output.weight"])
    assert_all_ranks(open_checkpoint(tmp_path / "ours"), GQA, weights, (1, 4, 16))
