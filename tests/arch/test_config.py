"""Llama on paper: configs from both layouts, the degrees heads allow, parts of weights, the memory
sum."""

import json
import os
from dataclasses import fields

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_tp.arch.config import (
    ModelConfig,
    RopeScaling,
    as_params,
    check_launch,
    ffn_width,
    from_hf,
    from_params,
    with_rope_factor,
)
from llama_tp.arch.errors import UserError
from llama_tp.arch.memory import Budget, counted, kv_bytes_per_token, weight_bytes
from llama_tp.arch.shard_map import ShardMap
from llama_tp.arch.weights import table
from tests.examples import examples

# Meta's own params.json of each size; what the model card and the HF config say of them stands in
# the tests.
META = {
    "3-8B": dict(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=128256,
        ffn_dim_multiplier=1.3,
        multiple_of=1024,
        norm_eps=1e-5,
        rope_theta=500000.0,
    ),
    "3.1-70B": dict(
        dim=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        vocab_size=128256,
        ffn_dim_multiplier=1.3,
        multiple_of=4096,
        norm_eps=1e-5,
        rope_theta=500000.0,
        use_scaled_rope=True,
    ),
    "3.1-405B": dict(
        dim=16384,
        n_layers=126,
        n_heads=128,
        n_kv_heads=8,
        vocab_size=128256,
        ffn_dim_multiplier=1.2,
        multiple_of=4096,
        norm_eps=1e-5,
        rope_theta=500000.0,
        use_scaled_rope=True,
    ),
    "3.2-1B": dict(
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=128256,
        ffn_dim_multiplier=1.5,
        multiple_of=256,
        norm_eps=1e-5,
        rope_theta=500000.0,
        use_scaled_rope=True,
    ),
    "3.2-3B": dict(
        dim=3072,
        n_layers=28,
        n_heads=24,
        n_kv_heads=8,
        vocab_size=128256,
        ffn_dim_multiplier=1.0,
        multiple_of=256,
        norm_eps=1e-5,
        rope_theta=500000.0,
        use_scaled_rope=True,
    ),
}


@pytest.mark.parametrize(
    "n, text",
    [(8_030_261_248, "8.03 B"), (3_726_848, "3.73 M"), (12_345, "12.35 K"), (999, "999"), (0, "0")],
)
def test_parameters_are_counted_in_the_unit_that_fits(n, text):
    assert counted(n) == text


@pytest.mark.parametrize(
    "name, ffn, n_params, kv_bytes, factor",
    [
        ("3-8B", 14336, 8_030_261_248, 131_072, None),
        ("3.1-70B", 28672, 70_553_706_496, 327_680, 8.0),
        ("3.1-405B", 53248, 405_853_388_800, 516_096, 8.0),
        # untied on paper: the source finds the tie
        ("3.2-1B", 8192, 1_235_814_400 + 128256 * 2048, 32_768, 32.0),
        ("3.2-3B", 8192, 3_212_749_824 + 128256 * 3072, 114_688, 32.0),
    ],
)
def test_published_sizes(name, ffn, n_params, kv_bytes, factor):
    config = from_params(META[name])
    assert (config.ffn_dim, config.n_params) == (ffn, n_params)
    assert kv_bytes_per_token(ShardMap.even(config, 1).shard(0), 2) == kv_bytes
    assert (config.rope_scaling.factor if config.rope_scaling else None) == factor
    assert bool(config.notes) == (factor is not None)  # an inferred factor is said aloud
    assert weight_bytes(ShardMap.even(config, 1).shard(0), 2) == 2 * n_params
    assert from_params({"model": META[name], "other": 1}) == config


def test_weights_per_rank():
    gib = 1 << 30
    for name, tp, expected in (
        ("3-8B", 8, 1.87),
        ("3.1-70B", 8, 16.43),
        ("3.1-405B", 8, 94.5),
        ("3.1-405B", 16, 47.75),
    ):
        assert weight_bytes(
            ShardMap.even(from_params(META[name]), tp).shard(0), 2
        ) / gib == pytest.approx(expected, abs=0.01)


def test_possible_degrees():
    assert from_params(META["3-8B"]).possible_tp() == [1, 2, 4, 8, 16, 32]
    assert from_params(META["3.2-3B"]).possible_tp() == [1, 2, 4, 8, 24]
    with pytest.raises(UserError, match="3 ranks.*8 KV heads.*1, 2, 4, 8, 16, 32"):
        from_params(META["3-8B"]).check_tp(3)


HF = dict(
    model_type="llama",
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=8192,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
LLAMA3 = dict(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    ],
)
def test_spellings_of_rope_scaling(spelling):
    config = from_hf({**HF, **spelling})
    assert (
        config.rope_scaling == RopeScaling(32.0) and config.rope_theta == 500000.0 and config.tied
    )
    assert config.n_params == 1_235_814_400


@pytest.mark.parametrize(
    "change, says",
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_key_value_heads": 5}, "KV heads"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"auto_map": {"x": "y"}}, "code"),
    ],
)
def test_refused_hf_configs(change, says):
    with pytest.raises(UserError, match=says):
        from_hf({**HF, **change})


@pytest.mark.parametrize(
    "change, says",
    [
        ({"dim": "4096"}, "dim"),
        ({"dim": True}, "dim"),
        ({"n_heads": 30}, "heads"),
        ({"n_layers": None}, "n_layers"),
        ({"quantization_args": {"scheme": "int4"}}, "quantised"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_refused_params(change, says):
    with pytest.raises(UserError, match=says):
        from_params({**META["3-8B"], **change})


HUGE = 10**400  # as an int; no float holds it
NOT_A_SIZE = ("16", [1], {"a": 1}, -16, 0, 0.5, True, HUGE, float("inf"), float("nan"))
NOT_A_NUMBER = ("1.0", [1], {}, -1, True, HUGE, float("inf"), float("nan"))


@pytest.mark.parametrize("value", NOT_A_SIZE, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize(
    "key",
    [
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "ffn_dim",
        "multiple_of",
        "vocab_size",
        "max_context",
    ],
)
def test_sizes_in_params_are_checked(key, value):
    with pytest.raises(
        UserError, match=f"params.json: {key} must be a whole number from 1 to [0-9,]+ - found "
    ):
        from_params({**META["3-8B"], key: value})


@pytest.mark.parametrize("value", NOT_A_SIZE, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ],
)
def test_sizes_in_an_hf_config_are_checked(key, value):
    with pytest.raises(
        UserError, match=f"config.json: {key} must be a whole number from 1 to [0-9,]+ - found "
    ):
        from_hf({**HF, key: value})


@pytest.mark.parametrize(
    "read, base, key, value",
    [
        *[
            (from_params, META["3.1-70B"], key, value)
            for key in ("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scaling_factor")
            for value in NOT_A_NUMBER
        ],
        *[
            (from_hf, HF, key, value)
            for key in ("rms_norm_eps", "rope_theta")
            for value in NOT_A_NUMBER
        ],
        *[
            (from_hf, HF, key, value)
            for key in ("rope_scaling", "rope_parameters")
            for value in ("llama3", [1], 5, True, [], "")
        ],
        *[
            (from_hf, HF, "rope_scaling", {"rope_type": "llama3", **LLAMA3, key: value})
            for key in LLAMA3
            for value in NOT_A_NUMBER
        ],
        *[
            (from_hf, HF, "rope_scaling", {"rope_type": value})
            for value in (5, ["llama3"], {"llama3": 1})
        ],
        *[(from_hf, HF, "tie_word_embeddings", value) for value in ("false", 1, [True])],
        *[(from_params, META["3.1-70B"], "use_scaled_rope", value) for value in ("false", 1)],
        *[(from_hf, HF, "model_type", value) for value in ("x" * 10**6, ["llama"], None)],
        (from_hf, HF, "hidden_act", ["silu"]),
        (from_hf, HF, "quantization_config", "x" * 10**6),
        (from_params, META["3-8B"], "lora_args", ["x" * 99] * 999),
    ],
)
def test_other_values_are_checked_and_shown_in_short(read, base, key, value):
    with pytest.raises(UserError, match=key) as caught:
        read({**base, key: value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "read, base, change, says",
    [
        (from_params, META["3-8B"], {"n_layers": 10**5}, "n_layers .*found 100000"),
        (from_hf, HF, {"num_hidden_layers": 10**5}, "num_hidden_layers .*found 100000"),
        (
            from_params,
            META["3-8B"],
            {"dim": 1 << 18, "ffn_dim_multiplier": 1000},
            "no FFN is so wide",
        ),
        (
            from_hf,
            HF,
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "above low_freq_factor",
        ),
        (from_hf, HF, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (from_hf, HF, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_no_llama_can_have(read, base, change, says):
    with pytest.raises(UserError, match=says):
        read({**base, **change})


def test_a_rope_factor_by_flag_is_checked_too():
    config = from_params(META["3.1-70B"])
    assert (
        with_rope_factor(config, 32).rope_scaling == RopeScaling(32.0)
        and with_rope_factor(config, None) == config
    )
    for factor in (0.0, -1.0, float("nan"), 1e300, "x", True):
        with pytest.raises(
            UserError, match="--rope_factor must be a number from 1e-06 to 1e[+]06 - found"
        ):
            with_rope_factor(config, factor)


def test_null_and_unknown_keys_are_harmless():
    strange = {
        "head_dim": None,
        "rope_scaling": None,
        "rope_parameters": None,
        "torch_dtype": "bfloat16",
        "dtype": HUGE,
        "architectures": ["x"],
        "num_key_value_heads": None,
        "bos_token_id": float("nan"),
        "quantization_config": None,
    }
    assert from_hf({**HF, **strange}) == from_hf({**HF, "num_key_value_heads": 32})
    params = from_params(
        {
            **META["3-8B"],
            "head_dim": None,
            "ffn_dim": None,
            "rope_scaling_factor": None,
            "extra": HUGE,
        }
    )
    assert params.ffn_dim == 14336 and params.notes == (
        "params.json: keys without a meaning here were ignored: extra",
    )
    assert (
        len(from_params({**META["3-8B"], **{f"\x1b{i}" * 99: i for i in range(10**4)}}).notes[0])
        < 1500
    )


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 300)
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["llama3", "default", "llama", 64, 1.0, 8192, HUGE])
)
NAMES = st.text(max_size=9) | st.sampled_from(["rope_type", "type", "factor", "rope_theta", "dim"])
ANY = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
META_KEYS = (
    *META["3.1-405B"],
    "head_dim",
    "ffn_dim",
    "max_context",
    "rope_scaling_factor",
    "model",
    "lora_args",
    "x",
)
HF_KEYS = (
    *HF,
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "hidden_act",
    "attention_bias",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "x",
)


def of_file(value):
    """A value after it has been in a JSON file."""
    return json.loads(json.dumps(value))


@settings(max_examples=examples(300), deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(META_KEYS), ANY, max_size=4),
    name=st.sampled_from(sorted(META)),
)
@example(changes={"ffn_dim": 1}, name="3-8B")
def test_any_params_give_a_config_or_one_error(changes, name):
    is_a_config_or_one_error(from_params, of_file({**META[name], **changes}))


@settings(max_examples=examples(300), deadline=None)
@given(changes=st.dictionaries(st.sampled_from(HF_KEYS), ANY, max_size=4))
def test_any_hf_config_gives_a_config_or_one_error(changes):
    is_a_config_or_one_error(from_hf, of_file({**HF, **changes}))


def is_a_config_or_one_error(read, raw):
    try:
        config = read(raw)
    except UserError as error:
        assert len(str(error)) < 1500 and error.what
        return
    sizes = [getattr(config, each.name) for each in fields(config) if each.type is int]
    assert len(sizes) == 9 and all(type(size) is int and size > 0 for size in sizes)
    assert type(config.norm_eps) is type(config.rope_theta) is float and type(config.tied) is bool
    # odd FFNs are padded
    assert (
        weight_bytes(ShardMap.even(config, 1).shard(0), 2) >= 2 * config.n_params
        and config.possible_tp()[0] == 1
    )
    assert from_params(as_params(config)).dim == config.dim


@settings(max_examples=examples(150), deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(HF_KEYS), ANY, max_size=2),
    rope=st.dictionaries(
        st.sampled_from([*LLAMA3, "rope_theta"]),
        st.integers(1, 9) | st.floats(1, 9) | st.none(),
        max_size=3,
    ),
    where=st.sampled_from(["rope_scaling", "rope_parameters"]),
)
@example(changes={"rope_scaling": {}}, rope={"rope_theta": 1.0}, where="rope_parameters")
def test_what_is_taken_means_the_same_to_transformers(changes, rope, where):
    """What both accept has the same numbers in both. transformers refuses null and whole floats
    where the field takes them, and accepts sizes below 1 and widths that no heads fit into."""
    transformers = pytest.importorskip(
        "transformers", reason="the oracle for config.json; `make setup` installs it"
    )
    raw = of_file(
        {
            **HF,
            where: {
                "rope_type": "llama3",
                **LLAMA3,
                **{k: v for k, v in rope.items() if v is not None},
            },
            **changes,
        }
    )
    try:
        ours = from_hf(raw)
    except UserError:
        return
    try:
        theirs = transformers.LlamaConfig(
            **{key: value for key, value in raw.items() if key != "model_type"}
        )
    # strict dataclasses raise errors of huggingface_hub's own, rope's are KeyErrors
    except Exception as refusal:
        assert (
            "null" in json.dumps(raw) or "Field" in str(refusal) or isinstance(refusal, KeyError)
        ), refusal
        return
    assert (
        ours.dim,
        ours.n_layers,
        ours.n_heads,
        ours.n_kv_heads,
        ours.head_dim,
        ours.ffn_dim,
        ours.vocab_size,
        ours.max_context,
        ours.tied,
        ours.norm_eps,
    ) == (
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
        theirs.intermediate_size,
        theirs.vocab_size,
        theirs.max_position_embeddings,
        theirs.tie_word_embeddings,
        theirs.rms_norm_eps,
    )
    said, scaling = theirs.rope_parameters, ours.rope_scaling
    if said["rope_theta"] is not None:
        assert ours.rope_theta == said["rope_theta"]
    assert (scaling is None) == (said["rope_type"] in ("default", None))
    if scaling:
        assert (
            scaling.factor,
            scaling.low_freq_factor,
            scaling.high_freq_factor,
            scaling.original_context,
        ) == (
            said["factor"],
            said["low_freq_factor"],
            said["high_freq_factor"],
            said["original_max_position_embeddings"],
        )


@pytest.mark.parametrize(
    "name", ["config.json", "params.json", "original/params.json", "original/mp16/params.json"]
)
@pytest.mark.parametrize(
    "what, says",
    [
        ("fifo", "pipe"),
        ("zero", "device"),
        ("huge", "n.*layers must be a whole number"),
        ("junk", "not valid JSON"),
    ],
)
def test_check_launch_refuses_a_file_that_cannot_be_read(tmp_path, name, what, says):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    {
        "fifo": lambda: os.mkfifo(path),
        "zero": lambda: path.symlink_to("/dev/zero"),
        "junk": lambda: path.write_text("{"),
        "huge": lambda: path.write_text(
            json.dumps(
                {**META["3-8B"], "n_layers": HUGE}
                if "params" in name
                else {**HF, "num_hidden_layers": HUGE}
            )
        ),
    }[what]()
    with pytest.raises(UserError, match=says) as caught:
        check_launch(str(tmp_path), 1)
    assert str(path) in str(caught.value)


def test_check_launch_takes_metas_files_where_config_json_is_of_no_use(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "params.json").write_text(json.dumps(META["3-8B"]))
    check_launch(str(tmp_path), 8)
    with pytest.raises(UserError, match="3 ranks"):
        check_launch(str(tmp_path), 3)


def test_params_round_trip():
    config = ModelConfig(
        dim=64,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        head_dim=20,
        ffn_dim=100,
        vocab_size=77,
        rope_scaling=RopeScaling(8.0),
        max_context=99,
    )
    assert from_params(as_params(config)) == config


def test_parts_cover_every_weight_once():
    """The ranks' parts put together are the whole weight, and padding is at the end; KV heads above
    n_kv_heads repeat."""
    config = ModelConfig(
        dim=64, n_layers=1, n_heads=16, n_kv_heads=4, head_dim=4, ffn_dim=100, vocab_size=77
    )
    for tp in config.possible_tp():
        for weight in table(config):
            parts = [weight.part(shard) for shard in ShardMap.even(config, tp).shards()]
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
    check_launch(str(tmp_path / "absent"), 3)  # left for open_checkpoint to explain


def test_ffn_rule_truncates_twice():
    assert ffn_width(4096, None, 256) == 11008
    assert ffn_width(100, 1.3, 1) == 345  # int(1.3 * int(800 / 3)) = int(1.3 * 266)
