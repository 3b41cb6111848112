"""A layer's products and what lies beside them, with few rows and with many, against the torch kernels in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from miniserve.ops import make_ops
from miniserve.ops.decoder import Attention, Batch, Sizes
from miniserve.ops.torch_ops import TorchOps
from scripts.gpu.kernels import LIMIT, ROUNDED, dtypes, generator, relative, short
from scripts.gpu.setting import Figure, Figures, Setting

HEADS, KV_HEADS, DIM, HIDDEN, INNER, EPS = 8, 2, 128, 512, 768, 1e-5
ROWS = (1, 7, 16, 40)
"""Up to 16 the kernels of `ops/cuda_fused.py` multiply."""


def check(run: Setting) -> Figures:
    """From a norm to what attention finds, with and without norms of q and k, gates and a bias, of whole heads that
    rotate and of parts; from a norm to gated activations; and a product added to the residual."""
    for dtype in dtypes(run):
        worst: dict[str, float] = {}
        for rows, plain, rotary in product(ROWS, (True, False), (DIM, 32)):
            for name, error in _layer(run, dtype, rows, plain, rotary).items():
                worst[name] = max(worst.get(name, 0.0), error)
        for name, error in worst.items():
            # Attention of rounded queries and keys: as where torch rounds its scores.
            limit = ROUNDED if name == "attended" and dtype is torch.bfloat16 else LIMIT[dtype]
            yield Figure(f"layer, {name}, {short(dtype)}", error, "relative error", "<=", limit)


def _layer(run: Setting, dtype: torch.dtype, rows: int, plain: bool, rotary: int) -> dict[str, float]:
    """The largest error of each part. A layer that is not `plain` norms q and k and gates what it has attended."""
    device, numbers = torch.device(run.device), generator(run, rows)
    ops, _ = make_ops(device, dtype, Sizes(HEADS, DIM, [HIDDEN, INNER], kv_heads=KV_HEADS), native=run.cuda)
    every: list[tuple[Any, Any]] = [(ops, dtype), (TorchOps(device, torch.float64), torch.float64)]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers, device=device).to(dtype)

    width = (HEADS * (1 if plain else 2) + 2 * KV_HEADS) * DIM
    x, norm, bias, qkv, out = (
        normal(rows, HIDDEN),
        normal(HIDDEN),
        normal(width),
        normal(width, HIDDEN),
        normal(HIDDEN, INNER),
    )
    gates, inner, q_norm, k_norm = normal(2 * INNER, HIDDEN) / 16, normal(rows, INNER), normal(DIM), normal(DIM)
    kv, contexts = normal(2 * rows, 3, 2, 16, KV_HEADS, DIM), [1 + 13 * row % 32 for row in range(rows)]
    positions = torch.tensor(contexts, device=device) - 1
    batch = Batch(
        positions, positions, positions, [1] * rows, contexts, [[2 * row + 1, 2 * row] for row in range(rows)]
    )
    angles = torch.rand(32, rotary // 2, generator=numbers, device=device) * 6
    found: list[list[torch.Tensor]] = []
    for some, of in every:
        weight, pool = [matrix.to(of) for matrix in (x, norm)], kv.to(of)
        norms = (None, None) if plain else (q_norm.to(of), k_norm.to(of))
        linear = some.linear(qkv.to(of) / 16, bias.to(of))
        part = Attention(1, HEADS, KV_HEADS, DIM, DIM**-0.5, 0, 0, not plain, linear, *norms, linear)
        cos_sin = some.rotary(angles.to(of) if of is torch.float64 else angles, of)(positions)
        attended = some.attend(some.plan(batch, pool), part, *weight, EPS, cos_sin)
        gated = some.product(some.gated(gates.to(of)), *weight, EPS)
        found.append([attended, pool, gated, some.linear(out.to(of))(inner.to(of), x.to(of, copy=True))])
    names = "attended", "keys and values", "gated", "added to the residual"
    return {name: relative(got, true) for name, got, true in zip(names, *found, strict=True)}
