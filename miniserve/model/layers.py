"""The parts that a layer may have: how each is loaded, and what it makes of a batch."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miniserve.model.config import LayerConfig
from miniserve.model.loader import Loader
from miniserve.ops import StepOps
from miniserve.ops.decoder import Attention, DeltaNet, Experts, Mlp


@dataclass(frozen=True)
class Pass:
    """What all layers share in one pass over a batch: `plan` is that of `ops`, `rotary` has cos and sin of the batch's
    positions by rotary table, `eps` is that of norms."""

    ops: StepOps
    plan: Any
    rotary: list[Any]
    eps: float


def load_attention(loader: Loader, at: str, layer: LayerConfig, index: int) -> Attention:
    """The attention of a layer whose tensors are named `at`: grouped heads, perhaps norms of q and k, a window, a gate
    on the output."""
    config = loader.config
    q, kv, hidden = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.hidden_size
    gated, order = config.family.gated, None
    if gated:
        # In the files each head's gate follows on its queries; here all gates come last.
        heads = torch.arange(2 * q).view(config.heads, 2, -1)
        order = torch.cat((heads[:, 0].flatten(), torch.arange(2 * q, 2 * q + 2 * kv), heads[:, 1].flatten()))
    rows = {f"{at}q_proj": q * (1 + gated), f"{at}k_proj": kv, f"{at}v_proj": kv}
    norms = [
        loader.norm(f"{at}{name}_norm.weight", config.head_dim) if config.family.qk_norm else None for name in "qk"
    ]
    return Attention(
        index=index,
        heads=config.heads,
        kv_heads=config.kv_heads,
        dim=config.head_dim,
        scale=config.attention_scale,
        window=layer.window,
        rope=layer.rope,
        gated=gated,
        qkv=loader.linear(rows, hidden, config.qkv_bias, order=order),
        q_norm=norms[0],
        k_norm=norms[1],
        out=loader.linear({f"{at}o_proj": hidden}, q, config.output_bias),
    )


def attend(part: Attention, h: Tensor, now: Pass) -> Tensor:
    """`h` `[T, hidden]` -> what the heads found, `[T, heads * dim]`; stores keys and values on the way."""
    ops, heads, kv_heads, dim = now.ops, part.heads, part.kv_heads, part.dim
    every = part.qkv(h).view(len(h), -1, dim)  # [T, heads + 2 * kv_heads (+ heads), dim]
    q, k, v = every[:, : heads + 2 * kv_heads].split(
        (heads, kv_heads, kv_heads), 1
    )  # [T, heads, dim], 2 x [T, kv_heads, dim]
    if part.q_norm is not None and part.k_norm is not None:
        q = ops.rms_norm(q, part.q_norm, now.eps)
        k = ops.rms_norm(k, part.k_norm, now.eps)
    q, k = ops.rope(q, k, now.rotary[part.rope])
    found = ops.attention(now.plan, part, q, k, v).flatten(1)  # [T, heads * dim]
    return found * every[:, -heads:].flatten(1).sigmoid() if part.gated else found


def load_delta_net(loader: Loader, at: str, index: int) -> DeltaNet:
    """The delta net of a layer whose tensors are named `at`."""
    sizes, hidden = loader.config.delta, loader.config.hidden_size
    assert sizes is not None
    values = sizes.v_heads * sizes.v_dim
    if loader.has(f"{at}in_proj_qkvz"):
        # One group of rows for each head of keys: what belongs to it and to its heads of values.
        shared = sizes.v_heads // sizes.k_heads
        parts = sizes.k_dim, sizes.k_dim, shared * sizes.v_dim, shared * sizes.v_dim
        qkvz = loader.linear(
            {f"{at}in_proj_qkvz": sizes.channels + values}, hidden, order=_by_kind(sizes.k_heads, *parts)
        )
        order = _by_kind(sizes.k_heads, shared, shared)
        ba = loader.plain({f"{at}in_proj_ba": 2 * sizes.v_heads}, hidden, order)
    else:
        qkvz = loader.linear({f"{at}in_proj_qkv": sizes.channels, f"{at}in_proj_z": values}, hidden)
        ba = loader.plain({f"{at}in_proj_b": sizes.v_heads, f"{at}in_proj_a": sizes.v_heads}, hidden)
    conv = loader.get(f"{at}conv1d.weight", sizes.channels, 1, sizes.taps)
    return DeltaNet(
        **vars(sizes),
        index=index,
        qkvz=qkvz,
        ba=ba,
        conv=conv.squeeze(1).t().contiguous(),
        rate=-loader.get(f"{at}A_log", sizes.v_heads, exact=True).exp(),
        bias=loader.get(f"{at}dt_bias", sizes.v_heads, exact=True),
        norm=loader.get(f"{at}norm.weight", sizes.v_dim),
        out=loader.linear({f"{at}out_proj": hidden}, values),
    )


def _by_kind(groups: int, *sizes: int) -> Tensor:
    """The order that brings together what each of `groups` groups of rows has first, second and so on: so many rows of
    each kind."""
    rows = torch.arange(groups * sum(sizes)).view(groups, -1)
    return torch.cat([kind.flatten() for kind in rows.split(sizes, 1)])


def recur(part: DeltaNet, h: Tensor, now: Pass) -> Tensor:
    """`h` `[T, hidden]` -> what was read from the state, `[T, v_heads * v_dim]`; the state goes on by T tokens.

    Gated Delta Networks, arXiv 2412.06464: in place of keys and values a state S, `[k_dim, v_dim]` for each head of
    values, forgets by a factor, and learns by how far what it has for a key is from the value:
    S <- a S + k (b (v - a S^T k))^T. A query reads S^T q.
    """
    qkv, z = part.qkvz(h).split((part.channels, part.v_heads * part.v_dim), 1)
    read = now.ops.delta(now.plan, part, qkv, part.ba(h))  # [T, v_heads, v_dim]
    normed = now.ops.rms_norm(read, part.norm, now.eps).flatten(1)
    return normed * F.silu(z.float()).to(normed.dtype)


def load_mlp(loader: Loader, at: str, layer: LayerConfig) -> Mlp | Experts:
    """The MLP, or the experts of which a few work on a token, of the layer whose tensors are named `at`."""
    config = loader.config
    sizes = config.experts if layer.experts else None
    if sizes is None:
        names = [f"{at}mlp.{name}_proj" for name in ("gate", "up", "down")]
        return _mlp(loader, names, config.intermediate_size, bias=config.mlp_bias)
    router, where, *parts = config.family.experts
    # transformers and newer files have all experts in one tensor, older files each by itself.
    together = f"{at}mlp.experts.gate_up_proj", f"{at}mlp.experts.down_proj"
    if loader.has(together[0]):
        gate_up = loader.dense(loader.read(together[0], sizes.count, 2 * sizes.inner, config.hidden_size))
        down = loader.dense(loader.read(together[1], sizes.count, config.hidden_size, sizes.inner))
        experts = [
            Mlp(loader.prepared([up], None, gated=config.activation), loader.prepared([back], None))
            for up, back in zip(gate_up, down, strict=True)
        ]
    else:
        named = ([f"{at}{where}.{i}.{part}" for part in parts] for i in range(sizes.count))
        experts = [_mlp(loader, names, sizes.inner) for names in named]
    inner, shared = sizes.shared_inner, [f"{at}mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    return Experts(
        chosen=sizes.chosen,
        renormed=sizes.renormed,
        router=loader.plain({at + router: sizes.count}, config.hidden_size),
        experts=loader.ops.stack(experts),
        shared=_mlp(loader, shared, inner) if inner else None,
        shared_gate=loader.plain({f"{at}mlp.shared_expert_gate": 1}, config.hidden_size) if inner else None,
    )


def _mlp(loader: Loader, names: list[str], inner: int, bias: bool = False) -> Mlp:
    (gate, up, down), config = names, loader.config
    return Mlp(
        loader.linear({gate: inner, up: inner}, config.hidden_size, bias, gated=config.activation),
        loader.linear({down: config.hidden_size}, inner, bias),
    )


def think(part: Mlp | Experts, h: Tensor, residual: Tensor | None, now: Pass) -> Tensor:
    """`h` `[T, hidden]` -> `[T, hidden]`, with the `residual` added, perhaps in its place."""
    if isinstance(part, Mlp):
        return part.down(part.gate_up(h), residual)
    odds = part.router(h).softmax(-1)  # [T, experts]
    weights, ids = odds.topk(part.chosen, -1)  # 2 x [T, chosen]
    if part.renormed:
        weights /= weights.sum(-1, keepdim=True)
    out = now.ops.mixture(part, h, ids, weights)
    if part.shared is not None and part.shared_gate is not None:
        out += part.shared.down(part.shared.gate_up(h)) * part.shared_gate(h).sigmoid().to(h.dtype)
    return out if residual is None else out.add_(residual)
