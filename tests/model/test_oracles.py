"""The one-file reference against others' code, and our model against the reference: fp32, 1e-4
relative."""

import pytest
import torch
import torch.distributed as dist

from llama_tp.arch.config import ModelConfig, RopeScaling
from llama_tp.arch.weights import table
from llama_tp.backends.base import ForwardBatch, Span
from llama_tp.backends.kv_cache import Slots
from llama_tp.model.build import from_weights
from llama_tp.model.rope import frequencies
from llama_tp.parallel.groups import single_rank
from tests import reference
from tests.shapes import SHRUNK

IDS = [(7 * i * i + 3 * i + 1) % 251 for i in range(70)]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("shape", SHRUNK)
def test_reference_equals_transformers(shape):
    transformers = pytest.importorskip("transformers", reason="the oracle is in the test extra")
    config = SHRUNK[shape]
    weights = reference.random_weights(table(config))
    scaling = config.rope_scaling
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tied,
            max_position_embeddings=config.max_context,
        )
    ).eval()
    state = {}
    for weight in table(config):
        value = weights[weight.name]
        if weight.rotary_heads:  # HF turns halves where Meta turns neighbours
            value = (
                value.view(weight.rotary_heads, -1, 2, config.dim)
                .transpose(1, 2)
                .reshape(value.shape)
            )
        state[weight.hf_name] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
    assert relative(reference.logits(weights, config, IDS), expected) < 1e-4


@pytest.fixture
def one_rank_of_fairscale():
    from fairscale.nn.model_parallel import initialize

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize.initialize_model_parallel(1)
    yield
    initialize.destroy_model_parallel()
    dist.destroy_process_group()


# Meta's code fixes the RoPE factor at 8: no 1B
@pytest.mark.parametrize("shape", ["8b", "70b", "405b"])
def test_reference_equals_meta(shape, one_rank_of_fairscale):
    meta = pytest.importorskip(
        "llama_models.llama3.model", reason="llama-models is installed by make setup"
    )
    from llama_models.llama3.args import ModelArgs

    config = SHRUNK[shape]
    weights = reference.random_weights(table(config))
    multiple = 4  # reproduces ffn_dim through Meta's rule
    args = ModelArgs(
        dim=config.dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        multiple_of=multiple,
        ffn_dim_multiplier=config.ffn_dim / int(8 * config.dim / 3) + 1e-6,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        use_scaled_rope=config.rope_scaling is not None,
        max_batch_size=1,
        max_seq_len=128,
    )
    theirs = meta.Transformer(args).float()
    theirs.load_state_dict(weights, strict=True)
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS]), 0)[0].float()
    assert relative(reference.logits(weights, config, IDS), expected) < 1e-4


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shape", SHRUNK)
def test_model_equals_reference(shape, deterministic):
    config = SHRUNK[shape]
    weights = reference.random_weights(table(config))
    model = from_weights(config, single_rank(), torch.float32, 512, weights, deterministic)
    attention = model.backends.attention
    cache = attention.new_cache(config.n_layers, 8)
    table_ = [5, 2, 7, 0, 3]
    flat = torch.tensor([IDS, list(range(len(IDS))), [table_[p // 16] for p in range(len(IDS))]])
    plan = attention.plan([Span(0, 0, len(IDS), table_)], cache, len(IDS))
    with torch.inference_mode():
        ours = model.logits(
            model(ForwardBatch(flat[0], flat[1], Slots(flat[2], flat[1] % 16), plan), cache)
        )
    assert relative(ours, reference.logits(weights, config, IDS)) < 1e-4


def test_rope_numbers():
    """The check values of Llama 3.1 (head dim 128, factor 8) and 3.2 1B (64, 32), computed
    independently in fp64."""

    def config(head_dim, factor):
        return ModelConfig(
            dim=head_dim,
            n_layers=1,
            n_heads=1,
            n_kv_heads=1,
            head_dim=head_dim,
            ffn_dim=8,
            vocab_size=8,
            rope_scaling=RopeScaling(factor),
        )

    big, small = frequencies(config(128, 8.0)), frequencies(config(64, 32.0))
    for i, value in {
        28: 3.211445995e-3,
        29: 2.166570764e-3,
        34: 1.785078128e-4,
        35: 9.556212354e-5,
        63: 3.068925989e-7,
    }.items():
        assert big[i] == pytest.approx(value, rel=1e-6)
    for i, value in {
        15: 1.290547928e-3,
        17: 9.708287803e-5,
        18: 1.946163818e-5,
        31: 9.418306725e-8,
    }.items():
        assert small[i] == pytest.approx(value, rel=1e-6)
