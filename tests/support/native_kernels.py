"""The kernels of `cpu.cpp` one by one, as the model in one call takes them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from miniserve.model.transformer import Transformer
from miniserve.ops.cpu_ops import CpuOps, NativePlan, Structs
from miniserve.ops.decoder import Attention, DeltaNet, Experts
from miniserve.ops.steps import Steps
from miniserve.ops.torch_ops import rotary_tables


class NativeKernels(CpuOps, Steps):
    """`StepOps` over what some `CpuOps` prepare."""

    fuse = None

    def __init__(self, prepared: CpuOps) -> None:
        vars(self).update(vars(prepared))

    def rotary(self, angles: torch.Tensor, dtype: torch.dtype) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
        tables = rotary_tables(angles, dtype)
        return lambda positions: (positions, *tables)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        group, size = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
        of = x.data_ptr(), x.stride(0), x.shape[0], group, size
        self._kernel("rms_norm")(*of, weight.data_ptr(), eps, out.data_ptr())
        return out

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos_sin: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tables = [table.data_ptr() for table in cos_sin]
        for x in (q, k):
            self._kernel("rope")(x.data_ptr(), x.stride(0), *x.shape, cos_sin[1].shape[1], *tables)
        return q, k

    def mixture(self, part: Experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        structs, out = Structs(), torch.empty_like(x)
        ids, weights = ids.int(), weights.float().contiguous()
        of = structs.experts(part), x.data_ptr(), len(x)
        self._kernel("mixture")(*of, ids.data_ptr(), weights.data_ptr(), out.data_ptr())
        return out

    def delta(self, plan: NativePlan, part: DeltaNet, qkv: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
        structs, ba = Structs(), ba.float()
        out = torch.empty((len(qkv), part.v_heads, part.v_dim), dtype=qkv.dtype)
        of = structs.delta(part), ctypes.byref(plan.native), len(qkv)
        self._kernel("delta")(*of, qkv.data_ptr(), qkv.stride(0), ba.data_ptr(), out.data_ptr())
        return out

    def attention(
        self,
        plan: NativePlan,
        part: Attention,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        inputs = [number for x in (q, k, v) for number in (x.data_ptr(), x.stride(0))]
        of = ctypes.byref(plan.native), part.index, q.shape[1], part.scale, part.window
        self._kernel("attention")(*of, *inputs, out.data_ptr())
        return out


def op_by_op(model: Transformer) -> Transformer:
    """The same, with a call for each operation."""
    assert isinstance(model.ops, CpuOps)
    positions = len(model._rotary[0][0])
    return Transformer(model.config, model._weights, NativeKernels(model.ops), positions, model.group)
