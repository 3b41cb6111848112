"""The few kernels a model needs, behind one small interface. `make_ops` picks the implementation for a device."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from miniserve.ops.batch import Batch


class Linear(Protocol):
    """A weight prepared for its device."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[T, in]` -> `x @ weight.T + bias (+ residual)` `[T, out]`."""
        ...


class Ops(Protocol):
    """Kernels over one KV pool. T is the number of new tokens in the batch, H and Hkv are heads, D the head's size."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """Prepare `weight` `[out, in]`; the result may hold a copy of its own, in another layout."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm over the last dimension."""
        ...

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turn `x` `[T, H, D]` by the angles in `cos`, `sin` `[T, 1, D]` (see `model.rope`)."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`[T, 2 * I]` -> silu(first half) * second half, `[T, I]`."""
        ...

    def plan(self, batch: Batch, kv: torch.Tensor) -> Any:
        """What attention needs to know of a batch, worked out once for all layers.

        `kv` is the pool `[page, layer, k/v, slot, kv_head, head_dim]`.
        """
        ...

    def attention(
        self, plan: Any, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store the new tokens' `k`, `v` `[T, Hkv, D]` in the pool, then attend causally: `q` -> `[T, H, D]`."""
        ...


def make_ops(device: torch.device) -> Ops:
    """The implementation for `device`."""
    from miniserve.ops.torch_ops import TorchOps

    return TorchOps(device)
