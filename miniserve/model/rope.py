"""Rotary position embedding: the angles. RoFormer (arXiv 2104.09864); scaling as published with Llama 3.1."""

import math

import torch

from miniserve.model.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of numbers, float32 `[head_dim / 2]`."""
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        # Long waves are stretched by `factor`, short ones left alone, those between blended.
        wavelength = 2 * math.pi / inverse
        rotations = rope.original_max_len / wavelength
        blend = ((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return (1 - blend) * inverse / rope.factor + blend * inverse
    return inverse


def angles(rope: RopeConfig, head_dim: int, max_len: int) -> torch.Tensor:
    """Radians by which each pair of numbers is rotated at each position, float32 `[max_len, head_dim / 2]`."""
    return torch.outer(torch.arange(max_len, dtype=torch.float32), inverse_frequencies(rope, head_dim))
