"""Triton kernels for steps of few rows: products together with what lies before and after them, heads made ready for
attention; and for draws of any number of rows.

A decode of a few sequences reads all weights and does little else: what counts is that these stream in, and that few
kernels wait for one another. A program multiplies all rows of x with some columns (rows of the weight): neighbours, or
pairs of a gate and its up, or of two numbers of a head that rotate together. Sums are float32 and rounded once.
"""

from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniserve.ops.cuda_plan import CudaPlan
from miniserve.ops.decoder import Attention

ROWS = 16
"""The most that are multiplied here: a tile of tensor cores has so many."""
TILE, STEP = tl.constexpr(ROWS), tl.constexpr(8192)
"""Rows, and numbers of a weight, that a program takes at a time: 16 KiB, of which `STAGES` are on the way."""
STAGES = 4
WIDE = 8192
"""So many rows of a weight are enough for a GPU full of programs of 64; of fewer each takes 32."""
BLOCK = 1024
"""Weights of a vocabulary that are added up together, to draw one of them."""
VIEWS = ["positions", "sequences", "starts", "indices"]
"""Views into the numbers of a plan begin anywhere: kernels would be compiled anew for each alignment."""
Shape = namedtuple("Shape", "heads kv_heads dim rotary page_tokens page values")
"""Of a layer's attention and of its keys in the pool, where values are so many numbers further."""
Maybe = Tensor | None


def multiply(
    x: Tensor, weight: Tensor, bias: Maybe, residual: Maybe = None, norm: Maybe = None, eps: float = 0.0, gate: str = ""
) -> Tensor:
    """`x` `[rows, in]`, normed with the weights `norm` if there are any, times `weight` `[out, in]`, plus bias: a new
    tensor, or added to `residual` `[rows, out]`. With a `gate`, `silu` or `gelu_tanh`, the first half of the columns
    makes gates of the others: `[rows, out / 2]`."""
    width, columns = _width(weight), len(weight) // (1 + bool(gate))
    out = x.new_empty(len(x), columns) if residual is None else residual
    tensors, sizes = (x, weight, bias, norm, eps, residual, out), (len(x), columns, weight.stride(0), x.shape[1], width)
    _product[(triton.cdiv(len(weight), width),)](*tensors, *sizes, gate, num_stages=STAGES)
    return out


def queries(x: Tensor, weight: Tensor, bias: Maybe, norm: Maybe, eps: float, part: Attention, *where: Any) -> Tensor:
    """A product as `multiply` makes it, `[rows, heads of q, k, v (and gates) * dim]`, with queries and keys rotated;
    keys and values are stored `where` `heads` says, and are not in the result."""
    out, (views, shape) = x.new_empty(len(x), len(weight)), _places(part, *where)
    width, sizes = _width(weight), (len(x), weight.stride(0), x.shape[1])
    _queries[(len(weight) // width,)](x, weight, bias, norm, eps, out, *views, *sizes, width, shape, num_stages=STAGES)
    return out


def heads(qkv: Tensor, eps: float, part: Attention, *where: Any) -> None:
    """Norm queries and keys of any number of rows, if the layer does so, and rotate them; store keys and values. `qkv`
    is as `queries` makes it, with the new queries in it. `where` is a plan, and the cosines and then sines of each
    position, float32 `[positions, R]`."""
    views, shape = _places(part, *where)
    grid = triton.cdiv(len(qkv), ROWS), shape.heads + 2 * shape.kv_heads
    _heads[grid](qkv, part.q_norm, part.k_norm, eps, *views, len(qkv), qkv.stride(0), shape)


def draw(weights: Tensor, temperature: Maybe, points: Tensor) -> Tensor:
    """`Ops.draw`: all weights are read once, for the sums of blocks, and then those of one block of each row."""
    rows, width = weights.shape
    blocks = triton.cdiv(width, BLOCK)
    sums, tops = points.new_empty(rows, blocks), weights.new_empty(rows, blocks)
    out, sizes = points.new_empty(rows, 1, dtype=torch.int64), (width, weights.stride(0), blocks, BLOCK)
    _sum_blocks[(blocks, rows)](weights, temperature, sums, tops, *sizes)
    _pick[(rows,)](weights, temperature, points, sums, tops, out, *sizes, triton.next_power_of_2(blocks))
    return out


def _width(weight: Tensor) -> int:
    """How many rows of a weight a program takes."""
    return 64 if len(weight) >= WIDE else 32


def _places(part: Attention, plan: CudaPlan, table: Tensor) -> tuple[tuple[Tensor, ...], Shape]:
    keys, values = plan.layers[part.index]
    views = (plan.places[name] for name in ("positions", "batch_indices", "kv_indptr", "kv_indices"))
    sizes = table.shape[1], keys.shape[1], keys.stride(0), values.storage_offset() - keys.storage_offset()
    return (table, *views, keys), Shape(part.heads, part.kv_heads, part.dim, *sizes)


@triton.jit
def _sums(x, weight, bias, norm, eps, column, rows, stride, K: tl.constexpr, N: tl.constexpr):
    """Rows of K numbers with N columns: float32 `[TILE, N]`. The norm's factor of a row is known once all has been
    seen of it."""
    size: tl.constexpr = STEP // N
    row, at = tl.arange(0, TILE)[:, None], tl.arange(0, size)
    x += row * K + at
    weight += column.to(tl.int64) * stride + at[:, None]
    made = tl.zeros((TILE, N), tl.float32)
    squares = tl.zeros((TILE,), tl.float32)
    for begin in range(0, K, size):
        known = at < K - begin
        some = tl.load(x + begin, (row < rows) & known, 0.0)
        if norm is not None:
            wide = some.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            some = (wide * tl.load(norm + begin + at, known, 0.0).to(tl.float32)).to(some.dtype)
        made = tl.dot(some, tl.load(weight + begin, known[:, None], 0.0), made)
    if norm is not None:
        made *= tl.rsqrt(squares / K + eps)[:, None]
    return made if bias is None else made + tl.load(bias + column)


@triton.jit(do_not_specialize=["rows"])
def _product(
    x, weight, bias, norm, eps, plus, out, rows, columns, stride, K: tl.constexpr, N: tl.constexpr, GATE: tl.constexpr
):
    at = tl.program_id(0) * N + tl.arange(0, N)
    column = tl.minimum(at, columns - 1) if GATE == "" else tl.minimum(at // 2, columns - 1) + at % 2 * columns
    made = _sums(x, weight, bias, norm, eps, column, rows, stride, K, N)
    if GATE != "":  # a gate and its up take turns
        gates, ups = made.reshape(TILE, N // 2, 2).split()
        cubed = gates + 0.044715 * gates * gates * gates  # tanh(y) = 2 sigmoid(2 y) - 1
        made = gates * tl.sigmoid(gates if GATE == "silu" else 1.5957691216057308 * cubed) * ups
        at = tl.program_id(0) * (N // 2) + tl.arange(0, N // 2)
    row = tl.arange(0, TILE)[:, None]
    inside = (row < rows) & (at < columns)
    if plus is not None:
        made += tl.load(plus + row * columns + at, inside, 0.0)
    tl.store(out + row * columns + at, made, inside)


@triton.jit
def _number(pair, half, shape: tl.constexpr):
    """Which number of a head is that of a pair: first come those that rotate together, then those left over."""
    turn: tl.constexpr = shape.rotary // 2
    rest: tl.constexpr = (shape.dim - shape.rotary) // 2
    return tl.where(pair < turn, pair + half * turn, pair + turn + half * rest)


@triton.jit
def _place(low, high, pair, head, row, rows, out, width, table, positions, sequences, starts, indices, pool, shape):
    """Pairs of a head, 2 x float32 `[rows, pairs]`: of a query or key they rotate; those of keys and values go to the
    pool, the others to `out`."""
    inside = row < rows
    position = tl.load(positions + row, inside, 0)
    if head < shape.heads + shape.kv_heads:
        turned = inside[:, None] & (pair < shape.rotary // 2)
        angle = table + position[:, None] * shape.rotary + pair
        cos, sin = tl.load(angle, turned, 1.0), tl.load(angle + shape.rotary // 2, turned, 0.0)
        low, high = low * cos - high * sin, high * cos + low * sin
    if (head >= shape.heads) & (head < shape.heads + 2 * shape.kv_heads):
        start = tl.load(starts + tl.load(sequences + row, inside, 0), inside, 0)
        page = tl.load(indices + start + position // shape.page_tokens, inside, 0).to(tl.int64)
        slot = position % shape.page_tokens * shape.kv_heads + (head - shape.heads) % shape.kv_heads
        at = pool + page * shape.page + slot * shape.dim
        at += tl.where(head < shape.heads + shape.kv_heads, 0, shape.values)
    else:
        at = out + row * width + head * shape.dim
    tl.store(at[:, None] + _number(pair, 0, shape), low, inside[:, None])
    tl.store(at[:, None] + _number(pair, 1, shape), high, inside[:, None])


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=VIEWS)
def _queries(
    x, weight, bias, norm, eps, out, table, positions, sequences, starts, indices, pool, rows, stride, K: tl.constexpr,
    N: tl.constexpr, shape: tl.constexpr
):  # fmt: skip
    first, order = tl.program_id(0) * (N // 2), tl.arange(0, N)
    head, first = first // (shape.dim // 2), first % (shape.dim // 2)
    column = head * shape.dim + _number(first + order // 2, order % 2, shape)
    made = _sums(x, weight, bias, norm, eps, column, rows, stride, K, N)
    low, high = made.reshape(TILE, N // 2, 2).split()
    pair, row, width = first + tl.arange(0, N // 2), tl.arange(0, TILE), tl.num_programs(0) * N
    _place(low, high, pair, head, row, rows, out, width, table, positions, sequences, starts, indices, pool, shape)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=VIEWS)
def _heads(
    qkv, q_norm, k_norm, eps, table, positions, sequences, starts, indices, pool, rows, width, shape: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # a long prompt has more than 2**31 numbers
    head, pair = tl.program_id(1), tl.arange(0, shape.dim // 2)
    first, second = _number(pair, 0, shape), _number(pair, 1, shape)
    at = qkv + row[:, None] * width + head * shape.dim
    low = tl.load(at + first, (row < rows)[:, None], 0.0).to(tl.float32)
    high = tl.load(at + second, (row < rows)[:, None], 0.0).to(tl.float32)
    if q_norm is not None and head < shape.heads + shape.kv_heads:
        norm = q_norm if head < shape.heads else k_norm
        factor = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / shape.dim + eps)[:, None]
        low, high = low * factor * tl.load(norm + first), high * factor * tl.load(norm + second)
    _place(low, high, pair, head, row, rows, qkv, width, table, positions, sequences, starts, indices, pool, shape)


@triton.jit
def _block(x, temperature, row, block, width, stride, BLOCK: tl.constexpr):
    """The weights of a block, float64, and the largest logit, against which they are exponents of e."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    x += row.to(tl.int64) * stride + at
    if temperature is None:
        top = 0.0
        weights = tl.load(x, at < width, 0.0)
    else:
        logits = tl.load(x, at < width, float("-inf"))
        top = tl.max(logits, 0)
        weights = tl.exp((logits - tl.maximum(top, -1e38)) / tl.load(temperature + row))
    return weights.to(tl.float64), top


@triton.jit
def _sum_blocks(x, temperature, sums, tops, width, stride, blocks, BLOCK: tl.constexpr):
    block, row = tl.program_id(0), tl.program_id(1)
    weights, top = _block(x, temperature, row, block, width, stride, BLOCK)
    tl.store(sums + row * blocks + block, tl.sum(weights, 0))
    tl.store(tops + row * blocks + block, top)


@triton.jit
def _pick(x, temperature, points, sums, tops, out, width, stride, blocks, BLOCK: tl.constexpr, MOST: tl.constexpr):
    row, block = tl.program_id(0), tl.arange(0, MOST)
    weights = tl.load(sums + row * blocks + block, block < blocks, 0.0)
    scale = tl.full((MOST,), 1.0, tl.float64)
    if temperature is not None:
        top = tl.load(tops + row * blocks + block, block < blocks, float("-inf"))
        scale = tl.exp((top - tl.max(top, 0)) / tl.load(temperature + row)).to(tl.float64)
    sums = tl.cumsum(weights * scale, 0)
    at = tl.load(points + row) * tl.max(sums, 0)
    found = _passed(sums, at)
    # What lies before the block, in the block's own scale.
    at = (at - tl.max(tl.where(block < found, sums, 0.0), 0)) / tl.sum(tl.where(block == found, scale, 0.0), 0)
    weights, _ = _block(x, temperature, row, found, width, stride, BLOCK)
    tl.store(out + row, (found * BLOCK + _passed(tl.cumsum(weights, 0), at)).to(tl.int64))


@triton.jit
def _passed(sums, at):
    """Where running sums pass `at`; rounding may put that past the last weight that is not zero."""
    last = tl.sum((sums < tl.max(sums, 0)).to(tl.int32), 0)
    return tl.minimum(tl.sum((sums <= at).to(tl.int32), 0), last)
