"""One decoder-only transformer for Llama 2/3, Qwen2, Qwen3 and Mistral: they differ in biases and norms only."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from miniserve.model import rope
from miniserve.model.config import ModelConfig
from miniserve.ops import Ops
from miniserve.ops.batch import Batch
from miniserve.ops.decoder import Weights

Head = Callable[[torch.Tensor], torch.Tensor] | None


class Transformer:
    """The model on one device: a batch of new tokens in, logits of the wanted rows out."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, max_len: int) -> None:
        self.config = config
        self.ops = ops
        self.head = weights.head
        self._weights = weights
        self._scale = config.head_dim**-0.5
        self._rotary = ops.rotary(rope.angles(config.rope, config.head_dim, max_len), weights.embedding.dtype)
        self._fused = ops.fuse(weights, self._rotary, config.heads, config.norm_eps, self._scale)

    @property
    def device(self) -> torch.device:
        return self._weights.embedding.device

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: torch.Tensor, head: Head = None) -> torch.Tensor:
        """Run `batch` over the KV pool `kv` `[page, layer, k/v, slot, kv_head, head_dim]`, storing the new tokens' KV.

        Returns float32 logits `[len(batch.outputs), vocab]`, or what a `head` makes of the hidden states
        `[len(batch.outputs), hidden]` instead.
        """
        new = self.ops.plan(batch, kv), batch.tokens, batch.positions, batch.outputs
        return self._fused(*new) if head is None and self._fused is not None else self.compute(*new, head)

    @torch.inference_mode()
    def compute(
        self, plan: Any, tokens: torch.Tensor, positions: torch.Tensor, outputs: torch.Tensor | None, head: Head = None
    ) -> torch.Tensor:
        """The part of `forward` that the device does: nothing in here looks at a value, so it can be recorded as a CUDA
        graph. Without `outputs` the logits of all rows are wanted.

        In the shapes T is the number of new tokens, of which the last layer keeps the wanted rows; qkv_heads is
        heads + 2 * kv_heads.
        """
        config, ops, weights = self.config, self.ops, self._weights
        heads, kv_heads, dim = config.heads, config.kv_heads, config.head_dim
        cos_sin = self._rotary(positions)
        x = F.embedding(tokens, weights.embedding)  # [T, hidden]
        for index, layer in enumerate(weights.layers):
            h = ops.rms_norm(x, layer.input_norm, config.norm_eps)  # [T, hidden]
            qkv = layer.qkv(h).view(-1, heads + 2 * kv_heads, dim)  # [T, qkv_heads, dim]
            q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)  # [T, heads, dim], 2 x [T, kv_heads, dim]
            if layer.q_norm is not None and layer.k_norm is not None:
                q = ops.rms_norm(q, layer.q_norm, config.norm_eps)
                k = ops.rms_norm(k, layer.k_norm, config.norm_eps)
            q, k = ops.rope(q, k, cos_sin)
            attended = ops.attention(plan, index, q, k, v, self._scale).flatten(1)  # [T, heads * dim]
            if index == config.layers - 1 and outputs is not None:
                # No later layer reads the other rows, and of a prompt only the last one's logits are wanted.
                if not len(outputs):  # a piece from the middle of a prompt: its KV is stored, and that is all
                    return torch.empty((0, config.vocab_size), device=x.device)
                attended, x = attended[outputs], x[outputs]  # [outputs, heads * dim], [outputs, hidden]
            x = layer.out(attended, x)  # [T, hidden]
            h = ops.rms_norm(x, layer.post_norm, config.norm_eps)  # [T, hidden]
            x = layer.down(layer.gate_up(h), x)  # [T, intermediate] -> [T, hidden]
        return (head or self.head)(ops.rms_norm(x, weights.norm, config.norm_eps))  # [T, vocab]
