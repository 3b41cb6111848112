"""Attention and its variants: grouped heads, norms of q and k, windows, a gate on the output."""

import torch
from torch import Tensor

from miniserve.model.config import LayerConfig
from miniserve.model.loader import Loader
from miniserve.model.passes import Pass
from miniserve.ops.decoder import Attention


def load(loader: Loader, at: str, layer: LayerConfig, index: int) -> Attention:
    """The attention of a layer whose tensors are named `at`."""
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
