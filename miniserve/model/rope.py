"""Rotary position embedding: what config.json says of it, and the angles. RoFormer (arXiv 2104.09864); scaling as
published with Llama 3.1."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miniserve.config import ConfigError, problem
from miniserve.families import number, whole

PARTIAL = "partial_rotary_factor"
ATTENTIONS = ("full_attention", "sliding_attention")
"""Types of layers that may have rotary positions of their own."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: `theta` and, for Llama 3.1 and later, how low frequencies are stretched. So large a `part` of a
    head rotates, in families that have `PARTIAL`."""

    theta: float
    kind: str = "default"
    """`default`, `linear` or `llama3`."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_len: int = 0
    part: float = 1.0


def angles(rope: RopeConfig, head_dim: int, max_len: int) -> Tensor:
    """Radians by which each pair of numbers is rotated at each position, float32 `[max_len, head_dim / 2]`."""
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        # Long waves are stretched by `factor`, short ones left alone, those between blended.
        rotations = rope.original_max_len / (2 * math.pi / inverse)
        blend = ((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        inverse = (1 - blend) * inverse / rope.factor + blend * inverse
    return torch.outer(torch.arange(max_len, dtype=torch.float32), inverse)


def read(config: dict[str, Any]) -> tuple[RopeConfig, ...]:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before): one for all layers, or a
    second one for those with windows."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if config.get("rope_local_base_freq") is None:
        return (_rope(config, found),)
    local = config | {"rope_theta": number(config, "rope_local_base_freq")}
    if isinstance(found, dict) and ATTENTIONS[0] in found:
        return _rope(config, found[ATTENTIONS[0]]), _rope(local, found.get(ATTENTIONS[1]) or {})
    return _rope(config, found), _rope(local, {})


def _rope(config: dict[str, Any], found: Any) -> RopeConfig:
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise ConfigError(f"The model's rope parameters {found!r:.100} are not supported: one set for all layers is.")
    theta = number(found, "rope_theta", number(config, "rope_theta", 10000.0))
    kind = str(found.get("rope_type") or found.get("type") or "default")
    part = float(number(found, PARTIAL, number(config, PARTIAL, 1.0)))
    if kind in ("default", "dynamic"):  # the latter differs only past the length that the model was made for
        return RopeConfig(theta, part=part)
    if kind not in ("linear", "llama3"):
        raise ConfigError(problem("model.rope_kind", kind=kind))
    if part != 1:
        raise ConfigError(f"The model's partial_rotary_factor {part!r} is not supported beside rope scaling {kind!r}.")
    factor = number(found, "factor")
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    low, high = (number(found, name) for name in ("low_freq_factor", "high_freq_factor"))
    of_old = config if config.get("original_max_position_embeddings") else found
    original = whole(of_old, "original_max_position_embeddings", whole(config, "max_position_embeddings"))
    return RopeConfig(theta, kind, factor, low, high, original)
