"""The gated delta rule and its short convolution in plain torch: the reference for `model/transformer.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from miniserve.ops.decoder import DeltaNet, State

BLOCK = 64
"""Tokens that are computed together: within a block by matrix products, from block to block through the state."""


def delta(state: State, pieces: list[tuple[int, slice]], part: DeltaNet, qkv: Tensor, ba: Tensor) -> Tensor:
    """`Ops.delta`, sequence by sequence, each in blocks of tokens: `pieces` has the slot and the rows of each."""
    learned, rates = ba.float().chunk(2, -1)  # 2 x [T, v_heads]
    log_decay = part.rate * F.softplus(rates + part.bias)
    out = torch.empty((len(qkv), part.v_heads, part.v_dim), dtype=qkv.dtype, device=qkv.device)
    for slot, rows in pieces:
        mixed = F.silu(short_convolution(qkv[rows], part.conv, state.conv[slot, part.index]))
        q, k, v = mixed.float().split((part.k_heads * part.k_dim,) * 2 + (part.v_heads * part.v_dim,), -1)
        q, k = (x.view(len(x), part.k_heads, part.k_dim) for x in (q, k))
        v = v.view(len(v), part.v_heads, part.v_dim)
        memory = state.delta[slot, part.index]
        out[rows] = delta_rule(q, k, v, log_decay[rows], learned[rows].sigmoid(), memory).to(out.dtype)
    return out


def short_convolution(x: Tensor, taps: Tensor, past: Tensor) -> Tensor:
    """Each channel of `x` `[T, channels]` is weighed with its last values by `taps` `[taps, channels]`. `past`
    `[taps - 1, channels]` are the values before, and goes on by T tokens."""
    every = torch.cat((past, x))
    past.copy_(every[len(x) :])
    weighed = [tap * every[i : i + len(x)].float() for i, tap in enumerate(taps.float())]
    return sum(weighed[1:], weighed[0]).to(x.dtype)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, learned: Tensor, state: Tensor) -> Tensor:
    """What `q` reads, `[T, v_heads, v_dim]`, after each token was learned; `state` `[v_heads, k_dim, v_dim]` goes on.

    `q` and `k` are `[T, k_heads, k_dim]` before their norm, `v` `[T, v_heads, v_dim]`; `log_decay` (0 and below) and
    `learned` (0 to 1) are `[T, v_heads]`. All float32. In a block what each token has to learn depends on those before
    it: a triangular system (arXiv 2406.06484, with decay 2412.06464).
    """
    shared = v.shape[1] // k.shape[1]
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    q, k = (x.repeat_interleave(shared, 1).transpose(0, 1) for x in (q, k))  # [v_heads, T, k_dim]
    v, log_decay, learned = v.transpose(0, 1), log_decay.t(), learned.t().unsqueeze(-1)
    found = []
    for block in torch.arange(q.shape[1]).split(BLOCK):
        at = slice(int(block[0]), int(block[-1]) + 1)
        qs, ks, lr = q[:, at], k[:, at], learned[:, at]
        total = log_decay[:, at].cumsum(-1).unsqueeze(-1)  # [v_heads, B, 1]
        between = (total - total.mT).exp().tril()  # decay from token j to token i, [v_heads, B, B]
        system = (ks @ ks.mT * between * lr).tril(-1)
        new = lr * (v[:, at] - total.exp() * (ks @ state))
        new = torch.linalg.solve_triangular(system, new, upper=False, unitriangular=True)  # [v_heads, B, v_dim]
        found.append(total.exp() * (qs @ state) + (qs @ ks.mT * between) @ new)
        last = total[:, -1:]
        state.copy_(last.exp() * state + (ks * (last - total).exp()).mT @ new)
    return torch.cat(found, 1).transpose(0, 1)
