"""Rotary positions: cos and sin tables, and turning neighbouring pairs (Meta's layout) by them.

Sources: RoFormer (arXiv 2104.09864); Llama 3.1's scaling as in llama-models
    `model.py::apply_scaling`.
"""

import math
from typing import NamedTuple

import torch

from llama_tp.arch.config import ModelConfig, RopeScaling


def scaled(f: float, s: RopeScaling) -> float:
    """One frequency (radians per position) after Llama 3.1's scaling: short wavelengths stay, long
    ones are divided."""
    wavelength = 2 * math.pi / f
    if wavelength < s.original_context / s.high_freq_factor:
        return f
    if wavelength > s.original_context / s.low_freq_factor:
        return f / s.factor
    keep = (s.original_context / wavelength - s.low_freq_factor) / (
        s.high_freq_factor - s.low_freq_factor
    )
    return (1 - keep) * f / s.factor + keep * f


def frequencies(config: ModelConfig) -> list[float]:
    """The E/2 angular frequencies, in double precision."""
    plain = [config.rope_theta ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)]
    return [scaled(f, config.rope_scaling) for f in plain] if config.rope_scaling else plain


class Turn(NamedTuple):
    """cos and sin of a step's angles, (T, 1, E/2) fp32 each."""

    cos: torch.Tensor
    sin: torch.Tensor


class Rope:
    """cos and sin of every angle up to `n_positions`, fp32, built in fp64 (a bf16 angle is off by
    whole turns, and
    an fp32 one by 0.06 rad at a position of one million)."""

    def __init__(self, config: ModelConfig, n_positions: int, device: torch.device):
        positions = torch.arange(n_positions, dtype=torch.float64)
        # (positions, E/2)
        angles = torch.outer(positions, torch.tensor(frequencies(config), dtype=torch.float64))
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def at(self, positions: torch.Tensor) -> Turn:
        """The angles of a step, once for all its layers. positions: (T,) int64."""
        return Turn(self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1))


def rotate(x: torch.Tensor, turn: Turn) -> torch.Tensor:
    """Turns each pair (2i, 2i+1) of the last dimension. x: (T, heads, E) any dtype -> same shape
    and dtype.

    Products and sums are separate operations on purpose: a fused multiply-add rounds differently in
    a vector loop and in its tail, so that bits would depend on how many heads this rank holds.
    """
    cos, sin = turn
    pairs = x.float().unflatten(-1, (-1, 2))  # (T, heads, E/2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    out = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return out.flatten(-2).to(x.dtype)  # (T, heads, E)
