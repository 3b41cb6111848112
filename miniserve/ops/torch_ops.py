"""The reference kernels, in plain torch: for tests, and for devices without native ones.

Paged attention without a kernel of its own: the pages of a sequence are gathered with one `index_select` into
contiguous keys and values. A gather reads each byte once more, which is small beside the matrix products that follow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from miniserve.ops.decoder import Attention, Batch, DeltaNet, Experts, Head, Linear, Mlp, State
from miniserve.ops.delta import delta
from miniserve.ops.quantized import Weight, dense

SORTED = 1024
"""Candidates that are sorted at first: nearly always enough for top_k, top_p and min_p, and far fewer than a
vocabulary."""


CosSin = tuple[Tensor, Tensor]
"""cos and sin for each token of a batch, `[T, 1, R]`, where R of a head's numbers rotate."""


def dense_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.linear(x, weight, bias)
        return out if residual is None else out.add_(residual)

    return product


def onednn_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A bf16 matrix product by oneDNN with the weight packed once, in blocks as its kernels want them.

    F.linear packs anew in each call, which costs a decode step more than the product itself. These are the operators
    that torch.compile's CPU backend emits for frozen weights.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 128)  # rows it may expect
    pointwise = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return pointwise(x, packed, bias, "none", [], None)
        return pointwise.binary(x, residual, packed, bias, "add")

    return product


@dataclass(frozen=True)
class Together:
    """Sequences that attend together, B of `new` tokens each, padded to the longest context."""

    queries: Tensor | None
    """Rows in the batch, int64 `[B * new]`; None where they are all rows in their order."""
    rows: Tensor
    """Per layer, the pool's rows of all keys' pages and then all values' pages, int64 `[layer, 2 * B * pages]`."""
    keys: int
    """Keys that are looked at: the longest context."""
    ends: Tensor
    """Of each query the tokens up to itself, int64 `[B, new, 1]`."""
    equal: bool
    """Whether all queries have all keys before them."""

    def mask(self, window: int, group: int, dtype: torch.dtype) -> Tensor | None:
        """Added to the scores `[B, 1, group * new, keys]` of a `group` of heads: 0, or -inf for keys after a query or,
        if that is not 0, out of its last `window` tokens; None where all keys are seen."""
        if self.equal and not 0 < window < self.keys:
            return None
        at = torch.arange(self.keys, device=self.ends.device)
        hidden = (at >= self.ends) | (at < self.ends - (window or self.keys))
        return torch.where(hidden, -torch.inf, 0.0).to(dtype).repeat(1, group, 1).unsqueeze(1)


@dataclass(frozen=True)
class Plan:
    """A batch, as the pool is addressed: the pool is seen as rows of one layer's keys (or values) of one page."""

    slots: Tensor
    """Per layer, where the new keys and then the new values go, counted in slots: int64 `[layer, 2 * T]`."""
    opened: Tensor | None
    """Per layer, the rows of pages that get their first token but are not filled: int64 `[layer, rows]`."""
    by_page: Tensor
    by_slot: Tensor
    together: list[Together]
    state: State | None
    pieces: list[tuple[int, slice]]
    """The slot of each sequence, if it has one, and its rows in the batch."""


def filter_sorted(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """`Ops.filter`: the candidates in falling order. A few are sorted first, and all only if that was too few."""
    vocab = probs.shape[1]
    for width in (min(SORTED, vocab), vocab):
        weights, ids = probs.topk(width)
        keep = weights >= min_p * weights[:, :1]
        keep &= torch.arange(width, device=probs.device) < top_k
        kept = weights * keep
        # With the rest of the vocabulary out of sight, its mass counts too unless the other two filters end before.
        total = torch.where(keep[:, -1:], probs.sum(-1, keepdim=True), kept.sum(-1, keepdim=True))
        before = kept.cumsum(-1) - kept
        keep &= (before < top_p * total) | (top_p >= 1)
        if width == vocab or not bool(keep[:, -1].any()):
            break
    return ids, weights * keep


class TorchOps:
    """`Ops` of any dtype on any device. Weights of 4 and 8 bits are dequantized to `dtype`."""

    layout = "slot, kv_head, head_dim"
    draft_rows = 12
    """As with the native kernels (`CpuOps`), which compute 12 rows in two rounds."""

    filter = staticmethod(filter_sorted)

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._device = device
        self._dtype = dtype

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        weight = dense(weight, self._dtype)
        packed = weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and native_bf16()
        return onednn_linear(weight, bias) if packed else dense_linear(weight, bias)

    def head(self, weight: Weight) -> Head:
        """In 16 bits the logits are rounded before they become float32."""
        product = self.linear(weight)
        return lambda x: product(x).float()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The layer norm of (x, -x), whose mean is zero and whose variance is the mean square of x. On a CPU layer norm
        is one kernel, where F.rms_norm is nine (a decode step of 16 sequences: 48.2 -> 46.5 ms)."""
        size = x.shape[-1]
        return F.layer_norm(torch.cat((x, -x), -1), (2 * size,), None, None, eps)[..., :size] * weight

    def rotary(self, angles: Tensor, dtype: torch.dtype) -> Callable[[Tensor], CosSin]:
        cos, sin = (table.unsqueeze(1) for table in rotary_tables(angles.to(self._device), dtype))
        return lambda positions: (cos[positions], sin[positions])

    def rope(self, q: Tensor, k: Tensor, cos_sin: CosSin) -> tuple[Tensor, Tensor]:
        """Rotate pairs of numbers half a head apart: a roll brings each to its partner."""
        cos, sin = cos_sin  # each [T, 1, R]
        size = cos.shape[-1]

        def turned(x: Tensor) -> Tensor:
            part = x[..., :size]
            part = torch.addcmul(part * cos, part.roll(size // 2, -1), sin)
            return part if size == x.shape[-1] else torch.cat((part, x[..., size:]), -1)

        return turned(q), turned(k)

    def gated(self, weight: Weight, bias: Tensor | None = None, activation: str = "silu") -> Linear:
        product = self.linear(weight, bias)
        act = F.silu if activation == "silu" else partial(F.gelu, approximate="tanh")

        def activated(x: Tensor, residual: Tensor | None = None) -> Tensor:
            gate, up = product(x).chunk(2, -1)
            return act(gate).mul_(up)

        return activated

    def stack(self, experts: list[Mlp]) -> list[Mlp]:
        return experts

    def mixture(self, part: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The tokens of one expert after the other's. What experts add to a token is rounded each time."""
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            rows, place = torch.where(ids == expert)
            mlp = part.experts[expert]
            made = mlp.down(mlp.gate_up(x[rows])) * weights[rows, place, None]
            out.index_add_(0, rows, made.to(x.dtype))
        return out

    def delta(self, plan: Plan, part: DeltaNet, qkv: Tensor, ba: Tensor) -> Tensor:
        assert plan.state is not None
        return delta(plan.state, plan.pieces, part, qkv, ba)

    def plan(self, batch: Batch, kv: Tensor, state: State | None = None) -> Plan:
        """Work out all indices into the pool. Decodes are grouped by power-of-two context lengths, since a group is
        padded to its longest; a prompt's piece is a group by itself."""
        layers, size = kv.shape[1], kv.shape[3]
        by_page = kv.view(-1, size, *kv.shape[4:])
        layer_rows = torch.arange(layers, device=self._device).unsqueeze(1) * 2

        def rows(pages: list[int]) -> Tensor:
            keys = layer_rows + torch.tensor(pages, device=self._device) * (layers * 2)
            return torch.cat((keys, keys + 1), 1)

        slots: list[int] = []
        opened: list[int] = []
        groups: dict[int, list[int]] = {}
        starts = [0, *accumulate(batch.lengths)]
        for i, (length, context, pages) in enumerate(zip(batch.lengths, batch.contexts, batch.pages, strict=True)):
            slots += [pages[p // size] * (layers * 2 * size) + p % size for p in range(context - length, context)]
            used = -(-context // size)
            if 0 < context % size <= length:
                opened.append(pages[used - 1])
            groups.setdefault(used.bit_length() if length == 1 else -i, []).append(i)
        first = layer_rows * size + torch.tensor(slots, device=self._device)
        slot_rows = torch.cat((first, first + size), 1)
        opened_rows = rows(opened) if opened else None
        pieces = [(slot, slice(*ends)) for slot, ends in zip(batch.slots, pairwise(starts), strict=False)]
        plan = Plan(slot_rows, opened_rows, by_page, kv.view(-1, *kv.shape[4:]), [], state, pieces)
        for members in groups.values():
            contexts, new = [batch.contexts[i] for i in members], batch.lengths[members[0]]
            longest = max(contexts)
            width = -(-longest // size)
            padded = [(batch.pages[i] + [batch.pages[i][0]] * width)[:width] for i in members]
            back = torch.arange(new - 1, -1, -1, device=self._device)
            ends = (torch.tensor(contexts, device=self._device).unsqueeze(1) - back).unsqueeze(2)
            queries = None
            if len(groups) > 1:
                firsts = torch.tensor([starts[i + 1] for i in members], device=self._device).unsqueeze(1)
                queries = (firsts - 1 - back).flatten()
            every = rows([p for pages in padded for p in pages])
            plan.together.append(Together(queries, every, longest, ends, new == 1 and min(contexts) == longest))
        return plan

    def attention(self, plan: Plan, part: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store, gather, attend. Query heads that share a key head are handled as more queries of that head: in the
        shapes, group is the number of query heads per key head."""
        count, layer = k.shape[0], part.index
        if plan.opened is not None:
            # Numbers of an earlier sequence could be NaN, which no mask makes harmless.
            plan.by_page.index_fill_(0, plan.opened[layer], 0)
        plan.by_slot.index_copy_(0, plan.slots[layer, :count], k)
        plan.by_slot.index_copy_(0, plan.slots[layer, count:], v)
        kv_heads, dim = k.shape[1:]
        group = q.shape[1] // kv_heads
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # [T, heads, dim]
        for those in plan.together:
            asking = q if those.queries is None else q.index_select(0, those.queries)  # [B * new, heads, dim]
            size, new = those.ends.shape[:2]
            gathered = plan.by_page.index_select(0, those.rows[layer])  # [2 * B * pages, slots, kv_heads, dim]
            keys, values = (
                x[:, : those.keys].transpose(1, 2)  # [B, kv_heads, keys, dim]
                for x in gathered.view(2, size, -1, kv_heads, dim)
            )
            folded = asking.view(size, new, kv_heads, group, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
            mask = those.mask(part.window, group if new > 1 else 1, q.dtype)
            attended = F.scaled_dot_product_attention(folded, keys, values, mask, scale=part.scale)
            attended = attended.unflatten(2, (group, new)).permute(0, 3, 1, 2, 4).reshape(asking.shape)
            if those.queries is None:
                return attended
            out.index_copy_(0, those.queries, attended)
        return out


def rotary_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of `angles` `[positions, D / 2]` in `dtype`, as `[positions, D]`. The first half of sin is negated:
    x * cos + roll(x, D / 2) * sin is the rotation."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; elsewhere bf16 is slower than fp32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any(
        torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")
    )
