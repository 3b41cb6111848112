"""The weights of a dense decoder-only model, prepared by some `Ops` for their device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch


class Linear(Protocol):
    """A weight prepared for its device."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[T, in]` -> `x @ weight.T + bias (+ residual)` `[T, out]`, perhaps written over `residual`."""


@dataclass(frozen=True)
class Layer:
    """The weights of one layer. q, k and v are one matrix, gate and up another, with the gate's activation."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """All weights. `embedding` is `[vocab, hidden]`; `head` makes float32 logits of hidden states."""

    embedding: torch.Tensor
    layers: list[Layer]
    norm: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]
    num_bytes: int
