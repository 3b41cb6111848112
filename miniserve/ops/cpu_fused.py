"""A whole model in one call of `cpu.cpp`: a step of a hundred and more kernels whose threads never go to sleep."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from miniserve.ops.cpu_packed import PackedHead, PackedLinear
from miniserve.ops.cpu_structs import MATRICES, NORMS, NativeLayer, NativeModel, NativePlan, Rotary, address
from miniserve.ops.decoder import Weights


class FusedForward:
    """A `Compute` by the kernel `forward`, over weights that `CpuOps` have packed."""

    def __init__(self, forward: Any, weights: Weights, rotary: Rotary, heads: int, eps: float, scale: float) -> None:
        head, gate_up = weights.head, weights.layers[0].gate_up
        assert isinstance(head, PackedHead)
        assert isinstance(gate_up, PackedLinear)
        self._forward = forward
        self._vocab = head.vocab
        layers = (NativeLayer * len(weights.layers))()
        for native, layer in zip(layers, weights.layers, strict=True):
            for name in NORMS:
                setattr(native, name, address(getattr(layer, name)))
            for name in MATRICES:
                setattr(native, name, getattr(layer, name).native)
        self._model = NativeModel(
            hidden=weights.embedding.shape[1],
            inner=gate_up.columns // 2,
            heads=heads,
            layers=len(layers),
            vocab=head.vocab,
            eps=eps,
            scale=scale,
            embedding=weights.embedding.data_ptr(),
            cos=rotary.cos.data_ptr(),
            sin=rotary.sin.data_ptr(),
            norm=weights.norm.data_ptr(),
            head=head.packed.data_ptr(),
            layer=ctypes.addressof(layers),
        )
        self._kept = layers, weights, rotary  # `_model` points into them

    def __call__(
        self, plan: NativePlan, tokens: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor
    ) -> torch.Tensor:
        logits = torch.empty((len(outputs), self._vocab), dtype=torch.float32)
        self._forward(
            ctypes.byref(self._model),
            ctypes.byref(plan.native),
            len(tokens),
            tokens.data_ptr(),
            positions.data_ptr(),
            len(outputs),
            outputs.data_ptr(),
            logits.data_ptr(),
        )
        return logits
