"""Llama on paper: configs from both layouts, the degrees heads allow, parts of weights, the memory sum."""

import json

import pytest

from llama_tp.spec.config import ModelConfig, RopeScaling, as_params, check_launch, ffn_width, from_hf, from_params
from llama_tp.spec.errors import UserError
from llama_tp.spec.memory import Budget, counted, kv_bytes_per_token, weight_bytes
from llama_tp.spec.weights import table

# Meta's own params.json of each size; what the model card and the HF config say of them stands in the tests.
META = {
    "3-8B": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256, ffn_dim_multiplier=1.3, multiple_of=1024,
                 norm_eps=1e-5, rope_theta=500000.0),
    "3.1-70B": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, vocab_size=128256, ffn_dim_multiplier=1.3,
                    multiple_of=4096, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True),
    "3.1-405B": dict(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, vocab_size=128256, ffn_dim_multiplier=1.2,
                     multiple_of=4096, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True),
    "3.2-1B": dict(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, vocab_size=128256, ffn_dim_multiplier=1.5, multiple_of=256,
                   norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True),
    "3.2-3B": dict(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, vocab_size=128256, ffn_dim_multiplier=1.0, multiple_of=256,
                   norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True),
}


@pytest.mark.parametrize("n, text", [(8_030_261_248, "8.03 B"), (3_726_848, "3.73 M"), (12_345, "12.35 K"), (999, "999"), (0, "0")])
def test_parameters_are_counted_in_the_unit_that_fits(n, text):
    assert counted(n) == text


@pytest.mark.parametrize("name, ffn, n_params, kv_bytes, factor", [
    ("3-8B", 14336, 8_030_261_248, 131_072, None),
    ("3.1-70B", 28672, 70_553_706_496, 327_680, 8.0),
    ("3.1-405B", 53248, 405_853_388_800, 516_096, 8.0),
    ("3.2-1B", 8192, 1_235_814_400 + 128256 * 2048, 32_768, 32.0),      # untied on paper: the source finds the tie
    ("3.2-3B", 8192, 3_212_749_824 + 128256 * 3072, 114_688, 32.0),
])
def test_published_sizes(name, ffn, n_params, kv_bytes, factor):
    config = from_params(META[name])
    assert (config.ffn_dim, config.n_params) == (ffn, n_params)
    assert kv_bytes_per_token(config, 1, 2) == kv_bytes
    assert (config.rope_scaling.factor if config.rope_scaling else None) == factor
    assert bool(config.notes) == (factor is not None)                   # an inferred factor is said aloud
    assert weight_bytes(config, 1, 2) == 2 * n_params
    assert from_params({"model": META[name], "other": 1}) == config


def test_weights_per_rank():
    gib = 1 << 30
    for name, tp, expected in (("3-8B", 8, 1.87), ("3.1-70B", 8, 16.43), ("3.1-405B", 8, 94.5), ("3.1-405B", 16, 47.75)):
        assert weight_bytes(from_params(META[name]), tp, 2) / gib == pytest.approx(expected, abs=0.01)


def test_possible_degrees():
    assert from_params(META["3-8B"]).possible_tp() == [1, 2, 4, 8, 16, 32]
    assert from_params(META["3.2-3B"]).possible_tp() == [1, 2, 4, 8, 24]
    with pytest.raises(UserError, match="3 ranks.*8 KV heads.*1, 2, 4, 8, 16, 32"):
        from_params(META["3-8B"]).check_tp(3)


HF = dict(model_type="llama", hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
          intermediate_size=8192, vocab_size=128256, rms_norm_eps=1e-5, max_position_embeddings=131072, tie_word_embeddings=True)
LLAMA3 = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


@pytest.mark.parametrize("spelling", [
    {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {"rope_theta": 500000, "rope_scaling": {"type": "llama3", **LLAMA3}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
])
def test_spellings_of_rope_scaling(spelling):
    config = from_hf({**HF, **spelling})
    assert config.rope_scaling == RopeScaling(32.0) and config.rope_theta == 500000.0 and config.tied
    assert config.n_params == 1_235_814_400


@pytest.mark.parametrize("change, says", [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"attention_bias": True}, "biases"), ({"mlp_bias": True}, "biases"), ({"model_type": "qwen2"}, "qwen2"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised"), ({"hidden_size": 0}, "hidden_size"),
    ({"num_key_value_heads": 5}, "KV heads"), ({"hidden_act": "gelu"}, "silu"), ({"auto_map": {"x": "y"}}, "code"),
])
def test_refused_hf_configs(change, says):
    with pytest.raises(UserError, match=says):
        from_hf({**HF, **change})


@pytest.mark.parametrize("change, says", [
    ({"dim": "4096"}, "dim"), ({"dim": True}, "dim"), ({"n_heads": 30}, "heads"), ({"n_layers": None}, "n_layers"),
    ({"quantization_args": {"scheme": "int4"}}, "quantised"), ({"norm_eps": float("nan")}, "norm_eps"),
    ({"vocab_size": -1}, "vocab_size"),
])
def test_refused_params(change, says):
    with pytest.raises(UserError, match=says):
        from_params({**META["3-8B"], **change})


def test_params_round_trip():
    config = ModelConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=20, ffn_dim=100, vocab_size=77,
                         rope_scaling=RopeScaling(8.0), max_context=99)
    assert from_params(as_params(config)) == config


def test_parts_cover_every_weight_once():
    """The ranks' parts put together are the whole weight, and padding is at the end; KV heads above n_kv_heads repeat."""
    config = ModelConfig(dim=64, n_layers=1, n_heads=16, n_kv_heads=4, head_dim=4, ffn_dim=100, vocab_size=77)
    for tp in config.possible_tp():
        for weight in table(config):
            parts = [weight.part(config, rank, tp) for rank in range(tp)]
            assert len({part.width for part in parts}) == 1
            if weight.cut.value is None:
                continue
            covered = [i for part in parts for i in range(part.start, part.stop)]
            whole = list(range(weight.shape[weight.cut.value]))
            if weight.kind == "kv_heads" and tp > 4:
                assert [part.start // 4 for part in parts] == [rank * 4 // tp for rank in range(tp)]
            else:
                assert covered == whole


def test_memory_sum():
    budget = Budget(free=100, weights=60, workspace=20, kv_per_block=2)
    assert budget.n_blocks(wanted=50, least=5, block_size=16) == 10
    assert budget.n_blocks(wanted=7, least=5, block_size=16) == 7
    with pytest.raises(UserError, match="weights.*KV cache.*workspace.*free"):
        budget.n_blocks(wanted=50, least=11, block_size=16)


def test_check_launch_reads_json_alone(tmp_path):

    (tmp_path / "params.json").write_text("﻿" + json.dumps(META["3-8B"]), encoding="utf-8")
    check_launch(str(tmp_path), 8)
    with pytest.raises(UserError, match="3 ranks"):
        check_launch(str(tmp_path), 3)
    check_launch(str(tmp_path / "absent"), 3)                           # left for open_checkpoint to explain


def test_ffn_rule_truncates_twice():
    assert ffn_width(4096, None, 256) == 11008
    assert ffn_width(100, 1.3, 1) == 345                                # int(1.3 * int(800 / 3)) = int(1.3 * 266)
