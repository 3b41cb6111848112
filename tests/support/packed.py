"""Checkpoints as AutoAWQ, GPTQ, compressed-tensors and FP8 tools write them, number by number, and what they mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.support.gguf_files import tensors_of

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""The tensors by the ends of their names, and the weight that they mean."""


def quantized(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool
) -> tuple[np.ndarray, torch.Tensor, np.ndarray, torch.Tensor]:
    """Codes `[out, in]`, scales and zero points `[out, groups]`, and the numbers they mean: (code - zero) * scale.

    Scales have 6 bits, so that a product with a zero point is exact in fp16, as the engine keeps it."""
    groups = weight.view(len(weight), -1, group)
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        scales = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
    else:
        scales = (high - low) / top
    fraction, exponent = torch.frexp(scales.clamp(min=1e-4))
    scales = torch.ldexp((fraction * 64).ceil() / 64, exponent)
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-low / scales).round().clamp(0, top)
    codes = ((groups / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, top)
    meant = ((codes - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).view(weight.shape)
    return codes.view(weight.shape).long().numpy(), scales, zeros.long().numpy(), meant


def words(numbers: np.ndarray, bits: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Rows of numbers in int32, one at a time; `order` is where in a word each of its numbers goes."""
    each = 32 // bits
    rows = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % each)))
    made = np.zeros((len(rows), rows.shape[1] // each), dtype=np.uint32)
    for column in range(rows.shape[1]):
        at = order[column % each] if order else column % each
        made[:, column // each] |= rows[:, column].astype(np.uint32) << np.uint32(bits * at)
    return torch.from_numpy(made.view(np.int32))


def awq(weight: torch.Tensor, bits: int = 4, group: int = 32, symmetric: bool = False) -> Packed:
    codes, scales, zeros, meant = quantized(weight, bits, group, symmetric)
    # Columns 0, 2, 4, 6, 1, 3, 5, 7 stand in a word from its lowest bits on.
    order = tuple((0, 2, 4, 6, 1, 3, 5, 7).index(column) for column in range(8))
    packed = {"qweight": words(codes.T, 4, order), "qzeros": words(zeros.T, 4, order), "scales": scales.t().half()}
    return packed, meant


def gptq(weight: torch.Tensor, bits: int = 4, group: int = 32, symmetric: bool = True, less: int = 1) -> Packed:
    codes, scales, zeros, meant = quantized(weight, bits, group, symmetric)
    return {
        "qweight": words(codes, bits).t(),
        "qzeros": words((zeros.T - less) % 2**bits, bits),
        "scales": scales.t().half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
    }, meant


def compressed(weight: torch.Tensor, bits: int = 4, group: int = 32, symmetric: bool = True) -> Packed:
    codes, scales, zeros, meant = quantized(weight, bits, group or weight.shape[1], symmetric)
    packed = {
        "weight_packed": words(codes, bits),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return packed | ({} if symmetric else {"weight_zero_point": words(zeros.T, bits).t()}), meant


def fp8(weight: torch.Tensor, how: str = "tensor") -> Packed:
    blocks = torch.ones(weight.shape)
    if how == "tensor":
        scales = weight.abs().amax() / 448
        blocks *= scales
    elif how == "channel":
        scales = weight.abs().amax(1, keepdim=True) / 448
        blocks *= scales
    else:
        scales = torch.ones(-(-len(weight) // 128), -(-weight.shape[1] // 128))
        for i in range(len(scales)):
            for j in range(scales.shape[1]):
                place = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scales[i, j] = weight[place].abs().amax() / 448
                blocks[place] = scales[i, j]
    stored = (weight / blocks).to(torch.float8_e4m3fn)
    name = "weight_scale_inv" if how == "block" else "weight_scale"
    return {"weight": stored, name: scales}, stored.float() * blocks


def write_packed(
    folder: Path,
    out: Path,
    pack: Callable[[torch.Tensor], Packed],
    says: dict[str, Any],
    plain: Path,
    only: str | tuple[str, ...] = "_proj.weight",
) -> Path:
    """The model in `folder` with packed matrices (those whose names end in `only`), `says` being its
    `quantization_config`; the same numbers in fp32 become a model in `plain`. Returns `out`."""
    packed, numbers = {}, {}
    for name, tensor in tensors_of(folder).items():
        if name.endswith(only):
            parts, numbers[name] = pack(tensor)
            packed |= {f"{name.removesuffix('weight')}{part}": each.contiguous() for part, each in parts.items()}
        else:
            packed[name] = numbers[name] = tensor
    for to, tensors in ((out, packed), (plain, numbers)):
        shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": says}))
    return out
