"""One decoder-only transformer for all families: which parts its layers have, their configuration says."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from miniserve.model import rope
from miniserve.model.config import ModelConfig
from miniserve.ops import FusedOps, StepOps
from miniserve.ops.decoder import Attention, Batch, DeltaNet, Experts, Head, Mlp, State, Weights
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
        return self.group.gather(made)[:, : self.config.vocab_size].contiguous()

    @property
    def device(self) -> torch.device:
        return self._weights.embedding.device

    @torch.inference_mode()
    def forward(self, batch: Batch, kv: Tensor, state: State | None = None, head: Head | None = None) -> Tensor:
        """Float32 logits `[len(batch.outputs), vocab]`, or instead what a `head` makes of the hidden states
        `[len(batch.outputs), hidden]`. The new tokens' KV is stored in the pool `kv`
        `[page, layer, k/v, slot, kv_head, head_dim]`; the recurrent `state`, if the model has one, goes on by them."""
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
        ops, weights, group, eps = cast(StepOps, self.ops), self._weights, self.group, self._weights.eps
        rotary = [table(positions) for table in self._rotary]
        x = F.embedding(tokens, weights.embedding)  # [T, hidden]
        if weights.scale != 1:
            x *= weights.scale
        for layer in weights.layers:
            mixer, norm = layer.mixer, layer.input_norm
            if isinstance(mixer, Attention):
                mixed = ops.attend(plan, mixer, x, norm, eps, rotary[mixer.rope])  # [T, width]
            else:
                mixed = _recur(mixer, ops.rms_norm(x, norm, eps), ops, plan, eps)  # [T, width]
            if layer is weights.layers[-1] and outputs is not None:
                # No later layer reads the other rows, and of a prompt only the last one's logits are wanted.
                if not len(outputs):  # a piece from the middle of a prompt: its KV is stored, and that is all
                    return self._logits(torch.empty((0, self.config.vocab_size), device=x.device))
                mixed, x = mixed[outputs], x[outputs]  # [outputs, width], [outputs, hidden]
            if layer.mixer_norm is None:
                x = group.sum(layer.mixer.out(mixed, None if group.rank else x))  # [T, hidden]
            else:
                x = x + ops.rms_norm(group.sum(layer.mixer.out(mixed)), layer.mixer_norm, eps)
            mlp, norm = layer.mlp, layer.post_norm
            if layer.mlp_norm is None:
                x = group.sum(_think(mlp, x, norm, None if group.rank else x, ops, eps))  # [T, hidden]
            else:
                x = x + ops.rms_norm(group.sum(_think(mlp, x, norm, None, ops, eps)), layer.mlp_norm, eps)
        return (head or self.head)(ops.rms_norm(x, weights.norm, eps))  # [T, vocab]


def _recur(part: DeltaNet, h: Tensor, ops: StepOps, plan: Any, eps: float) -> Tensor:
    """`h` `[T, hidden]` -> what was read from the state, `[T, v_heads * v_dim]`; the state goes on by T tokens.

    Gated Delta Networks, arXiv 2412.06464: in place of keys and values a state S, `[k_dim, v_dim]` for each head of
    values, forgets by a factor, and learns by how far what it has for a key is from the value:
    S <- a S + k (b (v - a S^T k))^T. A query reads S^T q.
    """
    qkv, z = part.qkvz(h).split((part.channels, part.v_heads * part.v_dim), 1)
    read = ops.delta(plan, part, qkv, part.ba(h))  # [T, v_heads, v_dim]
    normed = ops.rms_norm(read, part.norm, eps).flatten(1)
    return normed * F.silu(z.float()).to(normed.dtype)


def _think(part: Mlp | Experts, x: Tensor, norm: Tensor, residual: Tensor | None, ops: StepOps, eps: float) -> Tensor:
    """`x` `[T, hidden]`, normed with the weights `norm`, -> `[T, hidden]`, with the `residual` added, perhaps in its
    place."""
    if isinstance(part, Mlp):
        return part.down(ops.product(part.gate_up, x, norm, eps), residual)
    h = ops.rms_norm(x, norm, eps)  # [T, hidden]
    odds = part.router(h).softmax(-1)  # [T, experts]
    weights, ids = odds.topk(part.chosen, -1)  # 2 x [T, chosen]
    if part.renormed:
        weights /= weights.sum(-1, keepdim=True)
    out = ops.mixture(part, h, ids, weights)
    if part.shared is not None and part.shared_gate is not None:
        out += part.shared.down(part.shared.gate_up(h)) * part.shared_gate(h).sigmoid().to(h.dtype)
    return out if residual is None else out.add_(residual)
