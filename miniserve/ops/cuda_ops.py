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

from miniserve.ops import torch_ops
from miniserve.ops.cuda_plan import FRESH, CudaPlan, CudaPlanner
from miniserve.ops.decoder import Attention, Batch, DeltaNet, Experts, Head, Linear, Mlp, Sizes
from miniserve.ops.native import NoKernels
from miniserve.ops.quantized import Weight, dense
from miniserve.ops.steps import Steps, passed

HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class Product:
    """The kernels `fused`, if any, for few rows; for others cuBLAS. Both add the residual where it is."""

    weight: Tensor
    turned: Tensor
    bias: Tensor | None
    fused: Any

    def __call__(self, x: Tensor, residual: Tensor | None = None, *more: Any) -> Tensor:
        """`more`, as `cuda_fused.multiply` takes it, is for few rows alone."""
        if few(self.fused, x):
            return self.fused.multiply(x, self.weight, self.bias, residual, *more)
        if residual is None:
            return F.linear(x, self.weight, self.bias)
        out = residual.addmm_(x, self.turned)
        return out if self.bias is None else out.add_(self.bias)


@dataclass(frozen=True)
class Gated:
    """A product of gates and what they let through."""

    product: Product
    act: Callable[..., Tensor]
    name: str

    def __call__(self, x: Tensor, residual: Tensor | None = None, *norm: Any) -> Tensor:
        if few(self.product.fused, x):
            return self.product(x, None, *(norm or (None, 0.0)), self.name)
        return self.act(input=self.product(x))


@dataclass(frozen=True)
class Stacked:
    """The experts `ids`: `gate_up` `[experts, hidden, 2 * I]`, `down` `[experts, I, hidden]`, by columns."""

    gate_up: Tensor
    down: Tensor
    act: Callable[..., Tensor]
    ids: Tensor


def few(fused: Any, x: Tensor) -> bool:
    """Whether there are kernels of `cuda_fused`, and these are no more rows than they are for."""
    return fused is not None and len(x) <= fused.ROWS


class CudaOps(CudaPlanner, Steps):
    """`Ops` of one GPU, with plans for CUDA graphs besides. `kernels` is the module flashinfer, `triton` the kernel
    `delta` and the module `cuda_fused`, which has to be tried out; tests put reference math there."""

    layout = "slot, kv_head, head_dim"

    def __init__(
        self, device: torch.device, dtype: torch.dtype, sizes: Sizes, kernels: Any = None, triton: Any = (None, None)
    ) -> None:
        """Raises `NoKernels` where FlashInfer is missing or has none for this dtype or these heads."""
        super().__init__(kernels or _flashinfer(device, dtype, sizes.head_dim), device, dtype, sizes)
        self._delta, self._fused = triton
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
        self.records_mixtures = device.type != "cuda" or (hopper and dtype is torch.bfloat16)

    def try_out(self) -> str:
        """Compute a little: the name of all kernels, and which are left out and why, so that FlashAttention-2 takes all
        prompts, or a layer more kernels. Raises `NoKernels` with FlashInfer's reason: it has compiled one for these
        heads neither before nor now."""
        found = "flashinfer"
        try:
            self._try()
        except Exception as error:  # of a compiler, a loader or CUDA
            raise NoKernels(f"FlashInfer cannot attend here ({error})") from error
        try:
            if self._fresh:
                self._try(FRESH)
        except Exception as error:
            self._fresh, found = {}, f"{found}, long prompts without fa3: {said(error)}"
        try:
            self._fused = importlib.import_module("miniserve.ops.cuda_fused")
            self._try()
        except Exception as error:
            self._fused, found = None, f"{found}, slower without triton: {said(error)}"
        return found

    def _try(self, length: int = 4) -> None:
        """What layers with this model's heads make of a decode and a prompt of so many tokens."""
        numbers = partial(torch.zeros, dtype=self._dtype, device=self._device)
        sizes = self._heads, self._kv_heads, self._dim, self.scale
        count, pages = length + 1, 1 + -(-length // 16)
        rows, kv = torch.zeros(count, dtype=torch.int64, device=self._device), numbers(pages, 1, 2, 16, *sizes[1:3])
        plan = self.plan(Batch(rows, rows, rows[:0], [1, length], [1, length], [[0], [*range(1, pages)]]), kv)
        x, norm = numbers(count, 64), numbers(self._dim)
        cos_sin = self.rotary(numbers(1, self._dim // 2).float(), kv.dtype)
        matrix = numbers((self._heads + 2 * self._kv_heads) * self._dim, 64)
        linear = self.linear(matrix)
        for window in plan.decode:
            for scale in (None, norm):
                part = Attention(0, *sizes, window, 0, False, linear, scale, scale, linear)
                self.attend(plan, part, x, x[0], 1e-6, cos_sin(rows))
        linear(x, numbers(count, len(matrix)))
        point = torch.zeros(1, 1, dtype=torch.float64, device=self._device)
        self.draw(self.draw(x[:1].float(), point.float() + 1, point).float(), None, point)
        self.product(self.gated(matrix), x, x[0], 1e-6).tolist()  # waits

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Product:
        plain = dense(weight, self._dtype)
        return Product(plain, plain.t(), bias, self._fused)

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
        return Gated(self.linear(weight, bias), act, activation)

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

    def draw(self, weights: Tensor, temperature: Tensor | None, points: Tensor) -> Tensor:
        return (self._fused or torch_ops).draw(weights, temperature, points)

    def product(self, linear: Any, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        return linear(x, None, norm, eps) if self._norms(x) else super().product(linear, x, norm, eps)

    def _norms(self, x: Tensor) -> bool:
        """Whether a product can norm first: before the factor of a row is known, its numbers could overflow fp16."""
        return few(self._fused, x) and self._dtype is not torch.float16

    def attend(self, plan: CudaPlan, part: Attention, x: Tensor, norm: Tensor, eps: float, cos_sin: Any) -> Tensor:
        if self._fused is None or plan.fresh:  # it leaves no keys in a row
            return super().attend(plan, part, x, norm, eps, cos_sin)
        if part.q_norm is None and self._norms(x):
            product = cast(Product, part.qkv)
            made = self._fused.queries(x, product.weight, product.bias, norm, eps, part, plan, cos_sin[1])
        else:
            made = self.product(part.qkv, x, norm, eps)
            self._fused.heads(made, eps, part, plan, cos_sin[1])
        every = made.view(len(x), -1, part.dim)
        return passed(part, self._found(plan, part, every[:, : part.heads], {}), every)

    def attention(self, plan: CudaPlan, part: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new = {"append_key": k, "append_value": v, "paged_kv_cache": plan.layers[part.index]}
        self._fi.page.append_paged_kv_cache(**new, **plan.places, kv_layout="NHD")
        return self._found(plan, part, q, {"k": k[plan.decodes :], "v": v[plan.decodes :]})

    def _found(self, plan: CudaPlan, part: Attention, q: Tensor, new: dict[str, Tensor]) -> Tensor:
        """What queries find among the keys and values that are stored, or among the `new` ones of fresh prompts."""
        assert part.scale == self.scale, "what was planned for"
        pages = plan.layers[part.index]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if plan.decode:
            plan.decode[part.window].run(q=q[: plan.decodes], paged_kv_cache=pages, out=out[: plan.decodes])
        if plan.prefill:
            known = new if plan.fresh else {"paged_kv_cache": pages}
            plan.prefill[part.window].run(q=q[plan.decodes :], **known, out=out[plan.decodes :])
        return out


def said(error: Exception) -> str:
    """What an error says, on one line of a banner."""
    return " ".join(str(error).split())[:300]


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
