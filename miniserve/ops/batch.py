"""What one forward pass works on."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """New tokens of several sequences, one after the other. Sequence `i` brings `lengths[i]` tokens, the last of its
    `contexts[i]` tokens so far; its KV lies in `pages[i]`, in order, with room for the new tokens.

    `tokens` and `positions` are int64 `[T]` with T = sum(lengths); `outputs` (int64) are the rows whose logits are
    wanted. All are on the model's device.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    outputs: torch.Tensor
    lengths: list[int]
    contexts: list[int]
    pages: list[list[int]]
