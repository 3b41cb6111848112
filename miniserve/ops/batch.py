"""What one forward pass works on, and the sizes that kernels are chosen for."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Of a model, what kernels are chosen and planned for: its `heads` of queries, of `head_dim` numbers; the `widths`
    of the rows that they will see (hidden states, MLP activations, heads together), which matrices are multiplied with;
    those of keys and values in a recurrent state. Scores are multiplied with `scale`, else with that of `head_dim`;
    `windows` are those of the layers, with 0 for those that see all tokens."""

    heads: int
    head_dim: int
    widths: Sequence[int]
    state_dims: tuple[int, ...] = ()
    scale: float | None = None
    windows: Collection[int] = (0,)


@dataclass(frozen=True)
class Batch:
    """New tokens of several sequences, one after the other. Sequence `i` brings `lengths[i]` tokens, the last of its
    `contexts[i]` tokens so far; its KV lies in `pages[i]`, in order, with room for the new tokens, and its recurrent
    state, if the model has one, in slot `slots[i]`.

    `tokens` and `positions` are int64 `[T]` with T = sum(lengths); `outputs` (int64) are the rows whose logits are
    wanted. All are on the model's device.
    """

    tokens: Tensor
    positions: Tensor
    outputs: Tensor
    lengths: list[int]
    contexts: list[int]
    pages: list[list[int]]
    slots: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class State:
    """The recurrent state of all sequences, by slot and layer: `conv` `[slot, layer, taps - 1, channels]` are the last
    inputs of the convolution, the newest last; `delta` float32 `[slot, layer, v_head, k_dim, v_dim]` is what the delta
    rule has learned."""

    conv: Tensor
    delta: Tensor
