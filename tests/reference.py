"""A plain Llama in one file, for tests: no tensor parallelism, no cache, no batch, nothing shared
with the package.

Written from the papers and from Meta's model card: RMSNorm (arXiv 1910.07467), rotary positions on
neighbouring pairs (arXiv 2104.09864) with Llama 3.1's frequency scaling, grouped-query attention
(arXiv 2305.13245), SwiGLU. Slow on purpose; every line is checked in turn against transformers and
llama-models (tests/model/test_oracles.py).
"""

import math

import torch


def frequencies(config) -> torch.Tensor:
    """(E/2,) radians per position, double precision."""
    out = []
    for i in range(config.head_dim // 2):
        f = config.rope_theta ** (-2.0 * i / config.head_dim)
        s = config.rope_scaling
        if s is not None:
            wavelength = 2 * math.pi / f
            if wavelength > s.original_context / s.low_freq_factor:
                f /= s.factor
            elif wavelength >= s.original_context / s.high_freq_factor:
                mix = (s.original_context / wavelength - s.low_freq_factor) / (
                    s.high_freq_factor - s.low_freq_factor
                )
                f = (1 - mix) * f / s.factor + mix * f
        out.append(f)
    return torch.tensor(out, dtype=torch.float64)


def rotate(x: torch.Tensor, config) -> torch.Tensor:
    """x: (T, heads, E), positions 0..T-1."""
    angle = torch.outer(torch.arange(len(x), dtype=torch.float64), frequencies(config))  # (T, E/2)
    cos, sin = angle.cos().to(torch.float32)[:, None], angle.sin().to(torch.float32)[:, None]
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def logits(weights: dict[str, torch.Tensor], config, ids: list[int]) -> torch.Tensor:
    """(T, V) fp32 logits for every position of `ids`; `weights` has Meta's names and whole
    shapes."""
    E, H, K = config.head_dim, config.n_heads, config.n_kv_heads
    T = len(ids)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = weights["tok_embeddings.weight"][torch.tensor(ids)]
    for i in range(config.n_layers):
        w = lambda name: weights[f"layers.{i}.{name}.weight"]  # noqa: E731, B023
        h = norm(x, w("attention_norm"), config.norm_eps)
        q = rotate((h @ w("attention.wq").T).view(T, H, E), config)
        k = rotate((h @ w("attention.wk").T).view(T, K, E), config)
        v = (h @ w("attention.wv").T).view(T, K, E)
        heads = []
        for head in range(H):
            kv = head * K // H
            scores = (q[:, head].float() @ k[:, kv].float().T) / math.sqrt(E)
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, kv].float())
        attended = torch.stack(heads, dim=1).reshape(T, H * E).to(x.dtype)
        x = x + attended @ w("attention.wo").T
        h = norm(x, w("ffn_norm"), config.norm_eps)
        gate = torch.nn.functional.silu(h @ w("feed_forward.w1").T)
        x = x + (gate * (h @ w("feed_forward.w3").T)) @ w("feed_forward.w2").T
    x = norm(x, weights["norm.weight"], config.norm_eps)
    return (x @ weights["tok_embeddings.weight" if config.tied else "output.weight"].T).float()


def greedy(weights: dict[str, torch.Tensor], config, ids: list[int], n: int) -> list[int]:
    """The n ids that follow `ids`, each from a full forward pass over everything so far."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(logits(weights, config, ids)[-1].argmax()))
    return ids[-n:]


def random_weights(table, seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Random weights for the rows of a weight table, scaled so that logits stay finite and greedy
    paths wander: matrices ~ 1/sqrt(fan-in), norms near 1, embeddings ~ 1."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for weight in table:
        noise = torch.randn(weight.shape, generator=generator)
        if len(weight.shape) == 1:
            value = 1 + 0.1 * noise
        elif weight.kind == "vocab":
            value = noise * (1.0 if "embed" in weight.name else 2.0 * weight.shape[1] ** -0.5)
        else:
            value = noise * weight.shape[1] ** -0.5
        out[weight.name] = value.to(dtype)
    return out
