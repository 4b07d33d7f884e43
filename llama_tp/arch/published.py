"""The published sizes of Llama 3, for plans and benchmarks without a checkpoint. Source: the
models' params.json."""

from functools import partial

from llama_tp.arch.config import ModelConfig, RopeScaling

_large = partial(ModelConfig, vocab_size=128256, rope_scaling=RopeScaling(8.0), max_context=131072)
_small = partial(_large, rope_scaling=RopeScaling(32.0), tied=True)

PUBLISHED = {
    "1B": _small(dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, ffn_dim=8192),
    "3B": _small(dim=3072, n_layers=28, n_heads=24, n_kv_heads=8, head_dim=128, ffn_dim=8192),
    "8B": _large(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, ffn_dim=14336),
    "70B": _large(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, head_dim=128, ffn_dim=28672),
    "405B": _large(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, head_dim=128, ffn_dim=53248),
}
