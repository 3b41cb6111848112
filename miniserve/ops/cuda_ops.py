"""FlashInfer's kernels behind the `Ops` interface, for bf16 and fp16 on CUDA: those that serve vLLM and SGLang too.

The pool stays page-major: a layer of it is a strided view, whose strides these kernels read from the tensor.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from miniserve.ops.cuda_plan import CudaPlan, CudaPlanner
from miniserve.ops.decoder import Attention, DeltaNet, Experts, Head, Linear, Mlp, Sizes
from miniserve.ops.native import NoKernels
from miniserve.ops.quantized import Weight, dense

HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class Product:
    """cuBLAS, which adds the residual where it is: that is the add of a fused add and norm."""

    weight: Tensor
    turned: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return F.linear(x, self.weight, self.bias)
        out = residual.addmm_(x, self.turned)
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True)
class Gated:
    """A product of gates and what they let through."""

    product: Product
    act: Callable[..., Tensor]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.act(input=self.product(x))


@dataclass(frozen=True)
class Stacked:
    """The experts `ids`: `gate_up` `[experts, hidden, 2 * I]`, `down` `[experts, I, hidden]`, by columns."""

    gate_up: Tensor
    down: Tensor
    act: Callable[..., Tensor]
    ids: Tensor


class CudaOps(CudaPlanner):
    """`Ops` of one GPU, with plans for CUDA graphs besides. `kernels` is the module flashinfer; tests put reference
    math there, as they do for the kernel `delta`."""

    layout = "slot, kv_head, head_dim"

    def __init__(
        self, device: torch.device, dtype: torch.dtype, sizes: Sizes, kernels: Any = None, delta: Any = None
    ) -> None:
        """Raises `NoKernels` where FlashInfer is missing or has none for this dtype or these heads."""
        super().__init__(kernels or _flashinfer(device, dtype, sizes.head_dim), device, dtype, sizes)
        self._delta = delta
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
        self.records_mixtures = device.type != "cuda" or (hopper and dtype is torch.bfloat16)

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Product:
        plain = dense(weight, self._dtype)
        return Product(plain, plain.t(), bias)

    def head(self, weight: Weight) -> Head:
        """On a GPU the sums of the product are float32, and never rounded to 16 bits."""
        plain = dense(weight, self._dtype)
        if self._pinned:
            return partial(torch.mm, mat2=plain.t(), out_dtype=torch.float32)
        return lambda x: F.linear(x, plain).float()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return self._fi.norm.rmsnorm(input=x, weight=weight, eps=eps, out=out)

    def rotary(self, angles: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Any]:
        """The kernel looks the positions up itself: cosines, then sines, in float32 `[positions, R]`."""
        table = torch.cat((angles.cos(), angles.sin()), -1).to(self._device)
        return lambda positions: (positions, table)

    def rope(self, q: Tensor, k: Tensor, cos_sin: Any) -> tuple[Tensor, Tensor]:
        positions, table = cos_sin
        self._fi.rope.apply_rope_with_cos_sin_cache_inplace(
            positions=positions,
            query=q.view(q.shape[0], -1),
            key=k.view(k.shape[0], -1),
            head_size=self._dim,
            cos_sin_cache=table,
            is_neox=True,
        )
        return q, k

    def gated(self, weight: Weight, bias: Tensor | None = None, activation: str = "silu") -> Linear:
        act = self._fi.activation.silu_and_mul if activation == "silu" else self._fi.activation.gelu_tanh_and_mul
        return Gated(self.linear(weight, bias), act)

    def stack(self, experts: list[Mlp]) -> Stacked:
        gates = [cast(Gated, expert.gate_up) for expert in experts]
        gate_up = torch.stack([gate.product.weight for gate in gates])
        down = torch.stack([cast(Product, expert.down).weight for expert in experts])
        ids = torch.arange(len(experts), device=self._device)
        return Stacked(gate_up.mT, down.mT, gates[0].act, ids)

    def mixture(self, part: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Two products over the rows of all experts, in the order of these. How many each has the device alone knows,
        so that the host need not wait, and a graph can be recorded."""
        stacked: Stacked = part.experts
        chosen, order = ids.flatten().sort(stable=True)  # 2 x [T * chosen]
        ends = torch.searchsorted(chosen, stacked.ids, right=True, out_int32=True)  # [experts]
        made = F.grouped_mm(x[order // part.chosen], stacked.gate_up, offs=ends)
        made = F.grouped_mm(stacked.act(input=made), stacked.down, offs=ends)  # [T * chosen, hidden]
        found = torch.empty_like(made).index_copy_(0, order, made).view(*ids.shape, -1)
        return torch.bmm(weights.to(x.dtype).unsqueeze(1), found).squeeze(1)

    def delta(self, plan: CudaPlan, part: DeltaNet, qkv: Tensor, ba: Tensor) -> Tensor:
        assert plan.state is not None
        if self._delta is None:
            self._delta = importlib.import_module("miniserve.ops.cuda_delta").delta
        return self._delta(plan.state, plan.slots, plan.starts, part, qkv, ba)

    def filter(self, probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[None, Tensor]:
        """Weights of the whole vocabulary: nothing is sorted, and the host does not wait."""
        kept = torch.where(probs >= min_p * probs.amax(-1, keepdim=True), probs, 0.0)
        kept = self._fi.sampling.top_k_renorm_probs(probs=kept, top_k=top_k.squeeze(1))
        # Without `is_deterministic` it adds floats up in any order, and a token at the edge may come or go.
        kept = self._fi.sampling.top_p_renorm_probs(probs=kept, top_p=top_p.squeeze(1), is_deterministic=True)
        return None, kept

    def attention(self, plan: CudaPlan, part: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert part.scale == self.scale, "what was planned for"
        pages = plan.layers[part.index]
        new = {"append_key": k, "append_value": v, "paged_kv_cache": pages}
        self._fi.page.append_paged_kv_cache(**new, **plan.places, kv_layout="NHD")
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if plan.decode:
            plan.decode[part.window].run(q=q[: plan.decodes], paged_kv_cache=pages, out=out[: plan.decodes])
        if plan.prefill:
            plan.prefill[part.window].run(q=q[plan.decodes :], paged_kv_cache=pages, out=out[plan.decodes :])
        return out


def _flashinfer(device: torch.device, dtype: torch.dtype, head_dim: int) -> Any:
    """The module. Raises `NoKernels`."""
    if dtype not in (torch.bfloat16, torch.float16) or head_dim not in HEAD_DIMS:
        raise NoKernels(f"FlashInfer has no kernels for {str(dtype).removeprefix('torch.')} heads of {head_dim}")
    # This process asks the device, not flashinfer's import in a way of its own; and it takes FlashInfer's plain CUDA
    # norms, not those that need another package (cutlass-dsl).
    major, minor = torch.cuda.get_device_capability(device)
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}{'a' if major >= 9 else ''}")
    os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise NoKernels(f"flashinfer-python is not installed ({error}): pip install 'miniserve[cuda]'") from error
