"""What kernels work on: a batch, the recurrent state, and the weights of a decoder-only model part by part, prepared by
some `Ops` for their device."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Of a model, what kernels are chosen and planned for: its `heads` of queries, of `head_dim` numbers, as many of
    keys or `kv_heads` of them; the `widths` of the rows that they will see (hidden states, MLP activations, heads
    together), which matrices are multiplied with; those of keys and values in a recurrent state. Scores are multiplied
    with `scale`, else with that of `head_dim`; `windows` are those of the layers, with 0 for those that see all."""

    heads: int
    head_dim: int
    widths: Sequence[int]
    state_dims: tuple[int, ...] = ()
    scale: float | None = None
    windows: Collection[int] = (0,)
    kv_heads: int = 0


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


class Linear(Protocol):
    """A weight prepared for its device."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x` `[T, in]` -> `x @ weight.T + bias (+ residual)` `[T, out]`, perhaps written over `residual`."""


Head = Callable[[Tensor], Tensor]
"""A matrix prepared for its device: `[T, in]` -> float32 `[T, out]`."""


@dataclass(frozen=True)
class Attention:
    """Attention of `heads` queries on `kv_heads` keys and values of `dim` numbers. q, k and v are one matrix; if the
    layer is `gated`, gates of as many heads as q has follow there.

    `index` is its place among the layers with KV in the pool. A query sees the last `window` tokens, itself included;
    0: all. `rope` is its number among the model's rotary tables. Scores are multiplied with `scale`.
    """

    index: int
    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int
    rope: int
    gated: bool
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear


@dataclass(frozen=True)
class DeltaSizes:
    """Of a gated delta net: `k_heads` queries and keys of `k_dim` numbers, `v_heads` values of `v_dim`, as many of
    which in turn share a key; `taps` of the convolution."""

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    taps: int

    @property
    def channels(self) -> int:
        """Numbers of q, k and v of a token."""
        return 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim


@dataclass(frozen=True)
class DeltaNet(DeltaSizes):
    """A gated delta net. `index` is its place among the layers with a state.

    `qkvz` makes queries, keys, values and the gates of the output; `ba` makes, for each head of values, how much is
    learned and how much forgotten. `conv` is `[taps, channels]`, the newest tap last, over q, k and v. `rate`
    (-exp(A_log)) and `bias` are float32 `[v_heads]`.
    """

    index: int
    qkvz: Linear
    ba: Head
    conv: Tensor
    rate: Tensor
    bias: Tensor
    norm: Tensor
    out: Linear


@dataclass(frozen=True)
class Mlp:
    """Gate and up are one matrix, with the gate's activation."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Experts:
    """A mixture: `router` makes a logit for each of the `experts`, which are as `Ops.stack` has made them. The `chosen`
    best of a token are weighed by their softmax, `renormed` to a sum of 1 or not. The `shared` one is for all tokens,
    weighed by the sigmoid of what `shared_gate` makes."""

    chosen: int
    renormed: bool
    router: Head
    experts: Any
    shared: Mlp | None
    shared_gate: Head | None


@dataclass(frozen=True)
class Layer:
    """One layer: `mixer` looks at other tokens, `mlp` at each alone. What either adds to the residual is normed by
    `mixer_norm` and `mlp_norm`, where the model has these."""

    input_norm: Tensor
    mixer: Attention | DeltaNet
    mixer_norm: Tensor | None
    post_norm: Tensor
    mlp: Mlp | Experts
    mlp_norm: Tensor | None


@dataclass(frozen=True)
class Weights:
    """All weights. `embedding` is `[vocab, hidden]`, its rows are multiplied with `scale`; `head` makes logits of
    hidden states; `eps` is that of all norms."""

    embedding: Tensor
    scale: float
    layers: list[Layer]
    norm: Tensor
    eps: float
    head: Head
    num_bytes: int
