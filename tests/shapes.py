"""The proportions of the Llama 3 family, shrunk until a test can afford them."""

from llama_tp.arch.config import ModelConfig, RopeScaling

# Real: 1B 2048 wide, 32/8 heads of 64, tied, factor 32; 8B 4096, 32/8 of 128, FFN x 3.5; 70B 8192,
# 64/8, FFN x 3.5; 405B 16384, 128/8, FFN x 3.25. Shrunk 16 to 64 times in width, heads per group
# and head parity kept.
SHRUNK = {
    "1b": ModelConfig(
        dim=128,
        n_layers=3,
        n_heads=32,
        n_kv_heads=8,
        head_dim=4,
        ffn_dim=512,
        vocab_size=264,
        tied=True,
        rope_scaling=RopeScaling(32.0),
        max_context=131072,
    ),
    "8b": ModelConfig(
        dim=128,
        n_layers=3,
        n_heads=32,
        n_kv_heads=8,
        head_dim=4,
        ffn_dim=448,
        vocab_size=264,
        rope_scaling=RopeScaling(8.0),
        max_context=131072,
    ),
    "70b": ModelConfig(
        dim=256, n_layers=2, n_heads=64, n_kv_heads=8, head_dim=4, ffn_dim=896, vocab_size=264
    ),
    "405b": ModelConfig(
        dim=256,
        n_layers=2,
        n_heads=128,
        n_kv_heads=8,
        head_dim=2,
        ffn_dim=832,
        vocab_size=264,
        rope_scaling=RopeScaling(8.0),
        max_context=131072,
    ),
    # heads as wide as real ones: the attention kernel multiplies 32 dimensions at a time
    "wide": ModelConfig(
        dim=128, n_layers=2, n_heads=16, n_kv_heads=8, head_dim=32, ffn_dim=320, vocab_size=264
    ),
    "mha": ModelConfig(
        dim=96,
        n_layers=2,
        n_heads=8,
        n_kv_heads=8,
        head_dim=16,
        ffn_dim=200,
        vocab_size=271,
        rope_theta=10000.0,
    ),
}
