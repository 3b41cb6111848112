"""The reference kernels, in plain torch: for tests, and for devices without native ones. Attention gathers the pages of
a sequence into contiguous keys and values, which costs little beside the matrix products that follow."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from miniserve.ops.decoder import Attention, Batch, DeltaNet, Experts, Head, Linear, Mlp, State
from miniserve.ops.delta import delta
from miniserve.ops.quantized import Weight, dense
from miniserve.ops.steps import Steps

BLOCK = 512
"""Weights of a vocabulary that are added up together, to draw one of them."""
SORTED = 1024
"""Candidates that are sorted at first: nearly always enough for top_k, top_p and min_p."""
CosSin = tuple[Tensor, Tensor]
"""cos and sin for each token of a batch, `[T, 1, R]`, where R of a head's numbers rotate."""


def dense_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = F.linear(x, weight, bias)
        return out if residual is None else out.add_(residual)

    return product


def onednn_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A bf16 matrix product by oneDNN with the weight packed once: F.linear packs anew in each call, which costs a
    decode step more than the product itself. torch.compile's CPU backend emits these operators for frozen weights."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 128)  # rows it may expect
    pointwise = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return pointwise(x, packed, bias, "none", [], None)
        return pointwise.binary(x, residual, packed, bias, "add")

    return product


@dataclass(frozen=True)
class Piece:
    """The tokens that one sequence has in a batch: their `rows` there, and the `slot` of its state, if it has one. So
    many tokens are its `context`; per layer, `pages` are the rows of all their keys and then of all their values, int64
    `[layer, 2 * pages]`."""

    rows: slice
    slot: int
    context: int
    pages: Tensor

    def mask(self, window: int) -> Tensor | None:
        """Whether a token sees a key, `[new, context]`: those up to itself, with a `window` above 0 the last so many of
        these. None where all are seen."""
        new = self.rows.stop - self.rows.start
        if new == 1 and not 0 < window < self.context:
            return None
        at = torch.arange(self.context, device=self.pages.device)
        back = at[-new:].unsqueeze(1) - at
        return (back >= 0) & (back < (window or self.context))


@dataclass(frozen=True)
class Plan:
    """Where a batch reads and writes in the pool: `by_slot` is all of it slot by slot, and in `by_page` a row is the
    slots of the keys (or values) of one page."""

    slots: Tensor
    """Per layer, where the new keys and then the new values go, counted in slots: int64 `[layer, 2 * T]`."""
    by_page: Tensor
    by_slot: Tensor
    state: State | None
    pieces: list[Piece]


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


def draw(weights: Tensor, temperature: Tensor | None, points: Tensor) -> Tensor:
    """`Ops.draw`. Among many weights it looks in the sums of blocks, and then in a block: running sums of a whole
    vocabulary take far longer."""
    if temperature is not None:
        weights = ((weights - weights.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if weights.shape[1] <= 16 * BLOCK:
        sums = weights.double().cumsum(-1)
        return _passed(sums, points * sums[:, -1:])
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, BLOCK)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    at = points * ends[:, -1:]
    block = _passed(ends, at)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1).double().cumsum(-1)
    return block * BLOCK + _passed(inside, at - F.pad(ends, (1, 0)).gather(1, block))


def _passed(sums: Tensor, at: Tensor) -> Tensor:
    """Where running `sums` pass `at`, `[n, 1]`; rounding may put that past the last weight that is not zero. 0 where
    the sums are no numbers."""
    last = (sums < sums[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(sums, at, right=True), last)


class TorchOps(Steps):
    """`Ops` of any dtype on any device. Weights of 4 and 8 bits are dequantized to `dtype`."""

    layout = "slot, kv_head, head_dim"

    filter = staticmethod(filter_sorted)
    draw = staticmethod(draw)

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
        return F.rms_norm(x, x.shape[-1:], weight, eps)

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
        return delta(plan.state, [(piece.slot, piece.rows) for piece in plan.pieces], part, qkv, ba)

    def plan(self, batch: Batch, kv: Tensor, state: State | None = None) -> Plan:
        """Work out all indices into the pool."""
        layers, size = kv.shape[1], kv.shape[3]
        layer_rows = torch.arange(layers, device=self._device).unsqueeze(1) * 2
        slots: list[int] = []
        pieces = []
        for i, (length, context, pages) in enumerate(zip(batch.lengths, batch.contexts, batch.pages, strict=True)):
            start = len(slots)
            slots += [pages[p // size] * (layers * 2 * size) + p % size for p in range(context - length, context)]
            keys = layer_rows + torch.tensor(pages[: -(-context // size)], device=self._device) * (layers * 2)
            slot = batch.slots[i] if batch.slots else 0
            pieces.append(Piece(slice(start, len(slots)), slot, context, torch.cat((keys, keys + 1), 1)))
        first = layer_rows * size + torch.tensor(slots, device=self._device)
        by_page, by_slot = kv.view(-1, size, *kv.shape[4:]), kv.view(-1, *kv.shape[4:])
        return Plan(torch.cat((first, first + size), 1), by_page, by_slot, state, pieces)

    def attention(self, plan: Plan, part: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store, gather, attend, one sequence after the other. Query heads that share a key head are handled as more
        queries of that head: in the shapes, group is the number of query heads per key head."""
        plan.by_slot.index_copy_(0, plan.slots[part.index], torch.cat((k, v)))
        kv_heads, dim = k.shape[1:]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # [T, heads, dim]
        for piece in plan.pieces:
            gathered = plan.by_page.index_select(0, piece.pages[part.index])  # [2 * pages, slots, kv_heads, dim]
            found = gathered.view(2, 1, -1, kv_heads, dim)[:, :, : piece.context].transpose(2, 3)
            keys, values = found  # each [1, kv_heads, context, dim]
            asking = q[piece.rows].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, group, new, dim]
            mask = piece.mask(part.window)
            mask = None if mask is None else mask.repeat(asking.shape[1], 1)  # [group * new, context]
            folded = asking.flatten(1, 2).unsqueeze(0)
            attended = F.scaled_dot_product_attention(folded, keys, values, mask, scale=part.scale)
            out[piece.rows] = attended.view(asking.shape).permute(2, 0, 1, 3).flatten(1, 2)
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
