"""The few kernels a model needs, behind one small interface. `make_ops` picks the implementation for a device."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from miniserve.ops.decoder import Batch, DeltaNet, Experts, Head, Linear, Mlp, Sizes, State, Weights
from miniserve.ops.group import Group
from miniserve.ops.native import NoKernels
from miniserve.ops.quantized import Weight
from miniserve.ops.steps import Steps
from miniserve.ops.torch_ops import TorchOps

DRAFT_ROWS = 12
"""As many as a sequence and its draft may fill. A step takes little longer with them than with one row, since all
weights are read anyway: the native kernels compute them in two rounds, and a GPU is bound by memory up to far more."""
Compute = Callable[[Any, Tensor, Tensor, Tensor, bool], Tensor]
"""A plan, tokens, positions, and the rows that are wanted -> their logits, or their hidden states if so asked."""


class Ops(Protocol):
    """Kernels over one KV pool: those that both `StepOps` and `FusedOps` have. T is the number of new tokens in the
    batch, H and Hkv are heads, D the head's size."""

    layout: str
    """The order of the numbers in each half, keys or values, of a layer of a page. Only these kernels read them, but
    workers that exchange pages must agree."""

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        """Prepare `weight` `[out, in]`; the result may hold a copy of its own, in another layout. One of 4 or 8 bits is
        computed with as it is (`CpuOps`), or dequantized to the dtype that these `Ops` are for."""

    def head(self, weight: Weight) -> Head:
        """Prepare a matrix of any number of rows, like the last one, `[vocab, hidden]`: the result makes float32 logits
        of `[rows, hidden]`."""

    def rotary(self, angles: Tensor, dtype: torch.dtype) -> Any:
        """Prepare the angles of all positions, float32 `[positions, D / 2]` (radians, `model/rope.py`). The result of
        `StepOps` makes `cos_sin` for the positions `[T]` of a batch."""

    def gated(self, weight: Weight, bias: Tensor | None = None, activation: str = "silu") -> Linear:
        """Prepare `[2 * I, in]`, of which the first half are gates: the result makes activation(gate) * up, `[T, I]`.
        The `activation` is `silu` or `gelu_tanh`."""

    def stack(self, experts: list[Mlp]) -> Any:
        """The experts of a layer as a mixture wants them: it becomes `Experts.experts`."""

    def filter(self, probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor | None, Tensor]:
        """Candidates of `probs` `[n, vocab]`: (ids, weights); the weight of one that is filtered out is 0. Without ids
        the weights are those of the whole vocabulary, else of `ids` `[n, candidates]`.

        The filters are columns `[n, 1]`, top_k int32 and the others float32. What top_p counts in is what the other two
        leave; the likeliest always stays.
        """

    def draw(self, weights: Tensor, temperature: Tensor | None, points: Tensor) -> Tensor:
        """Index of the first weight of each row `[n, any]` at which the running sum passes `points` (float64 `[n, 1]`,
        0 to 1) of the row's total: `[n, 1]`. With a `temperature`, float32 `[n, 1]`, the weights are given as logits.
        None that is zero is ever drawn."""

    def plan(self, batch: Batch, kv: Tensor, state: State | None = None) -> Any:
        """What attention needs to know of a batch, worked out once for all layers. `kv` is the pool
        `[page, layer, k/v, slot, kv_head, head_dim]`, the last three in this order or in that of `layout`."""


class StepOps(Ops, Steps, Protocol):
    """`Ops` with a call for each operation, or for a few together."""

    def mixture(self, part: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What the experts `ids` make of each row of `x` `[T, hidden]`, added up with their `weights`, both
        `[T, chosen]`; the shared expert is not among them."""

    def delta(self, plan: Any, part: DeltaNet, qkv: Tensor, ba: Tensor) -> Tensor:
        """The convolution of `qkv` `[T, channels]`, and the delta rule with `ba` `[T, 2 * v_heads]`: what is read from
        the state, `[T, v_heads, v_dim]`. The state goes on by the new tokens (`ops/delta.py`)."""


@runtime_checkable
class FusedOps(Ops, Protocol):
    """`Ops` with the whole model in one call."""

    def fuse(self, weights: Weights, rotary: list[Any], group: Group) -> Compute:
        """The same as `model.Transformer.compute` makes of `StepOps`, up to the logits of this rank of the `group`.
        These `Ops` have prepared `weights` and `rotary`."""


def make_ops(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sizes,
    page_tokens: int = 16,
    *,
    native: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[StepOps | FusedOps, str]:
    """The implementation for `device`, for pages of `page_tokens`, and its name or why it is a slower one. Without
    `native` it is plain torch. `progress` gets a line if kernels have to be compiled first."""
    if not native:
        return TorchOps(device, dtype), "torch"
    try:
        if device.type == "cuda":
            from miniserve.ops.cuda_ops import CudaOps

            made = CudaOps(device, dtype, sizes)
            return made, made.try_out()
        from miniserve.ops.cpu_ops import CpuOps

        return CpuOps(dtype, sizes, page_tokens, progress), "native"
    except NoKernels as reason:
        return TorchOps(device, dtype), f"torch, slower than native ones: {reason}"
