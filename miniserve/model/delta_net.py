"""The gated delta net: a layer that keeps a state of fixed size in place of keys and values.

Gated Delta Networks, arXiv 2412.06464: a state S, `[k_dim, v_dim]` for each head of values, forgets by a factor, and
learns by how far what it has for a key is from the value: S <- a S + k (b (v - a S^T k))^T. A query reads S^T q.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from miniserve.model.loader import Loader
from miniserve.model.passes import Pass
from miniserve.ops.decoder import DeltaNet


def load(loader: Loader, at: str, index: int) -> DeltaNet:
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
    """`h` `[T, hidden]` -> what was read from the state, `[T, v_heads * v_dim]`; the state goes on by T tokens."""
    qkv, z = part.qkvz(h).split((part.channels, part.v_heads * part.v_dim), 1)
    read = now.ops.delta(now.plan, part, qkv, part.ba(h))  # [T, v_heads, v_dim]
    normed = now.ops.rms_norm(read, part.norm, now.eps).flatten(1)
    return normed * F.silu(z.float()).to(normed.dtype)
