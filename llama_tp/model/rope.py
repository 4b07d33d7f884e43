"""Rotary positions: the angles, and their cosines and sines in a table.

Sources: RoFormer (arXiv 2104.09864); Llama 3.1's scaling as in llama-models
    `model.py::apply_scaling`. The rotation itself is llama.rotate.
"""

import math

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


class RotaryTable:
    """cos and sin of every angle up to `n_positions`, (n_positions, E/2) fp32 each.

    They are computed in fp64: a bf16 angle is off by whole turns, and an fp32 one by 0.06 rad at a
    position of one million.
    """

    def __init__(self, config: ModelConfig, n_positions: int, device: torch.device):
        positions = torch.arange(n_positions, dtype=torch.float64)
        # (positions, E/2)
        angles = torch.outer(positions, torch.tensor(frequencies(config), dtype=torch.float64))
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of a step's positions, for all its layers. positions: (T,) int64 -> (T, 1,
        E/2) fp32 each."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
