"""One decoder-only transformer for all families: which parts its layers have, their configuration says."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from miniserve.model import rope
from miniserve.model.config import ModelConfig
from miniserve.model.layers import Pass, attend, recur, think
from miniserve.ops import FusedOps, StepOps
from miniserve.ops.decoder import Attention, Batch, Head, State, Weights
from miniserve.ops.group import Group


class Transformer:
    """The model on one device: a batch of new tokens in, logits of the wanted rows out."""

    def __init__(
        self, config: ModelConfig, weights: Weights, ops: StepOps | FusedOps, max_len: int, group: Group | None = None
    ) -> None:
        """`weights` may be those of one rank of a `group`, which all make the same calls."""
        self.config = config
        self.ops = ops
        self.group = group or Group()
        self._weights = weights
        tables = [rope.angles(kind, config.rotary_dim, max_len) for kind in config.ropes]
        self._rotary = [ops.rotary(table, weights.embedding.dtype) for table in tables]
        self._fused = ops.fuse(weights, self._rotary, self.group) if isinstance(ops, FusedOps) else None

    def head(self, hidden: Tensor) -> Tensor:
        """The float32 logits `[rows, vocab]` of hidden states `[rows, hidden]`; of several ranks only the first has
        them."""
        return self._logits(self._weights.head(hidden))

    def _logits(self, made: Tensor) -> Tensor:
        """From what each rank has made."""
        return self.group.gather(made)[:, : self.config.vocab_size]

    @property
    def device(self) -> torch.device:
        return self._weights.embedding.device

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: Tensor, state: State | None = None, head: Head | None = None) -> Tensor:
        """Run `batch` over the KV pool `kv` `[page, layer, k/v, slot, kv_head, head_dim]`, storing the new tokens' KV,
        and over the recurrent `state`, which goes on by them, where the model has one.

        Returns float32 logits `[len(batch.outputs), vocab]`, or what a `head` makes of the hidden states
        `[len(batch.outputs), hidden]` instead.
        """
        new = self.ops.plan(batch, kv, state), batch.tokens, batch.positions, batch.outputs
        if self._fused is None:
            return self.compute(*new, head)
        made = self._fused(*new, head is not None)
        return self._logits(made) if head is None else head(made)

    @torch.inference_mode()
    def compute(
        self, plan: Any, tokens: Tensor, positions: Tensor, outputs: Tensor | None, head: Head | None = None
    ) -> Tensor:
        """The part of `forward` that the device does: nothing in here looks at a value, so it can be recorded as a CUDA
        graph. Without `outputs` the logits of all rows are wanted.

        In the shapes T is the number of new tokens, of which the last layer keeps the wanted rows. What the ranks of a
        group make of a layer is added up, the residual in the first one's.
        """
        ops, weights, group = cast(StepOps, self.ops), self._weights, self.group
        now = Pass(ops, plan, [table(positions) for table in self._rotary], weights.eps)
        x = F.embedding(tokens, weights.embedding)  # [T, hidden]
        if weights.scale != 1:
            x *= weights.scale
        for layer in weights.layers:
            h = ops.rms_norm(x, layer.input_norm, weights.eps)  # [T, hidden]
            if isinstance(layer.mixer, Attention):
                mixed = attend(layer.mixer, h, now)  # [T, width]
            else:
                mixed = recur(layer.mixer, h, now)  # [T, width]
            if layer is weights.layers[-1] and outputs is not None:
                # No later layer reads the other rows, and of a prompt only the last one's logits are wanted.
                if not len(outputs):  # a piece from the middle of a prompt: its KV is stored, and that is all
                    return self._logits(torch.empty((0, self.config.vocab_size), device=x.device))
                mixed, x = mixed[outputs], x[outputs]  # [outputs, width], [outputs, hidden]
            if layer.mixer_norm is None:
                x = group.sum(layer.mixer.out(mixed, None if group.rank else x))  # [T, hidden]
            else:
                x = x + ops.rms_norm(group.sum(layer.mixer.out(mixed)), layer.mixer_norm, weights.eps)
            h = ops.rms_norm(x, layer.post_norm, weights.eps)  # [T, hidden]
            if layer.mlp_norm is None:
                x = group.sum(think(layer.mlp, h, None if group.rank else x, now))  # [T, hidden]
            else:
                x = x + ops.rms_norm(group.sum(think(layer.mlp, h, None, now)), layer.mlp_norm, weights.eps)
        return (head or self.head)(ops.rms_norm(x, weights.norm, weights.eps))  # [T, vocab]
