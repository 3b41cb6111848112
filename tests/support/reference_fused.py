"""The kernels of `ops/cuda_fused.py` as plain sums in float64: what `CudaOps` takes for that module on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from miniserve.ops.cuda_plan import CudaPlan
from miniserve.ops.decoder import Attention

ROWS = 16
Maybe = torch.Tensor | None


def normed(x: torch.Tensor, weight: Maybe, eps: float) -> torch.Tensor:
    """In float64, over the last dimension."""
    x = x.double()
    return x if weight is None else x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first numbers of each head `[T, heads, dim]` rotate, each with the one as far away as there are angles."""
    size = cos.shape[-1]
    low, high, rest = x.split((size, size, x.shape[-1] - 2 * size), -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), -1)


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    residual: Maybe = None,
    norm: Maybe = None,
    eps: float = 0.0,
    gate: str = "",
) -> torch.Tensor:
    assert 0 < len(x) <= ROWS
    made = normed(x, norm, eps) @ weight.double().T
    if bias is not None:
        made += bias.double()
    if gate:
        gates, ups = made.chunk(2, -1)
        made = (F.silu(gates) if gate == "silu" else F.gelu(gates, approximate="tanh")) * ups
    return made.to(x.dtype) if residual is None else residual.copy_(residual.double() + made)


def queries(x: torch.Tensor, weight: torch.Tensor, bias: Maybe, norm: Maybe, eps: float, *where: Any) -> torch.Tensor:
    made = multiply(x, weight, bias, None, norm, eps)
    heads(made, eps, *where)
    return made


def heads(qkv: torch.Tensor, eps: float, part: Attention, plan: CudaPlan, table: torch.Tensor) -> None:
    assert qkv.is_contiguous()
    assert table.dtype == torch.float32
    every = qkv.view(len(qkv), -1, part.dim)
    q, k, v = every[:, : part.heads + 2 * part.kv_heads].split((part.heads, part.kv_heads, part.kv_heads), 1)
    positions = plan.places["positions"].long()
    cos, sin = table[positions, None].double().chunk(2, -1)
    queries, keys = (turned(normed(x, w, eps), cos, sin).to(qkv.dtype) for x, w in ((q, part.q_norm), (k, part.k_norm)))
    pool = plan.layers[part.index]
    starts, indices = (plan.places[name].long() for name in ("kv_indptr", "kv_indices"))
    size = pool[0].shape[1]
    pages = indices[starts[plan.places["batch_indices"].long()] + positions // size]
    for half, new in zip(pool, (keys, v), strict=True):
        half[pages, positions % size] = new
    q.copy_(queries)
    every[:, part.heads : part.heads + 2 * part.kv_heads] = torch.nan  # what lies there is not to be read again


def draw(weights: torch.Tensor, temperature: Maybe, points: torch.Tensor) -> torch.Tensor:
    assert points.dtype == torch.float64
    assert points.shape == (len(weights), 1)
    if temperature is not None:
        assert temperature.dtype == weights.dtype == torch.float32
        weights = (weights.double() / temperature).softmax(-1)
    sums = weights.double().cumsum(-1)
    return ((sums <= points * sums[:, -1:]).sum(-1, keepdim=True)).minimum((sums < sums[:, -1:]).sum(-1, keepdim=True))
