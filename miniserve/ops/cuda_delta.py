"""The gated delta rule and its short convolution in Triton: for the decodes and the prompts of a step at once.

Each sequence is walked from its first new token to its last, so that a decode reads and writes its state once, and
nothing looks at a number on the host: a CUDA graph can be recorded. `ops/delta.py` says what is computed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from miniserve.ops.decoder import DeltaNet, State

ROWS, CHANNELS = tl.constexpr(8), tl.constexpr(128)
"""Of the convolution, what a program computes at a time."""
COLUMNS = tl.constexpr(16)
"""Columns of a head's state that a program keeps in registers, of all rows: in those of one warp, which need not wait
for others when it adds up a column."""


def delta(state: State, slots: Tensor, starts: Tensor, part: DeltaNet, qkv: Tensor, ba: Tensor) -> Tensor:
    """`Ops.delta` for sequences with rows `starts[i]` to `starts[i + 1]` and their state in slot `slots[i]`, both int32
    on the device."""
    past, memory = state.conv[:, part.index], state.delta[:, part.index]
    mixed = torch.empty((len(qkv), part.channels), dtype=qkv.dtype, device=qkv.device)
    out = torch.empty((len(qkv), part.v_heads, part.v_dim), dtype=qkv.dtype, device=qkv.device)
    strides, sizes = (qkv.stride(0), past.stride(0)), (part.channels, len(part.conv))
    _convolve[(len(slots), triton.cdiv(part.channels, CHANNELS.value))](
        slots, starts, qkv, part.conv, past, mixed, *strides, *sizes
    )
    numbers, sizes = (memory.stride(0), part.k_heads), (part.k_dim, part.v_dim)
    _learn[(len(slots), part.v_heads, triton.cdiv(part.v_dim, COLUMNS.value))](
        slots, starts, mixed, ba, part.rate, part.bias, memory, out, *numbers, *sizes, num_warps=1
    )
    return out


# Views into the numbers of a plan begin anywhere: kernels would be compiled anew for each alignment.
@triton.jit(do_not_specialize_on_alignment=["slots", "starts"])
def _convolve(slots, starts, x, taps, past, out, x_stride, past_stride, channels: tl.constexpr, TAPS: tl.constexpr):
    """A program for `CHANNELS` channels of a sequence: silu of the convolution, then the past goes on."""
    sequence = tl.program_id(0)
    cols = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = cols < channels
    first = tl.load(starts + sequence).to(tl.int64)
    count = (tl.load(starts + sequence + 1) - first).to(tl.int32)
    x += first * x_stride + cols
    out += first * channels + cols
    past += tl.load(slots + sequence).to(tl.int64) * past_stride + cols
    for begin in range(0, count, ROWS):
        rows = begin + tl.arange(0, ROWS).to(tl.int64)
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        for tap in tl.static_range(TAPS):
            at = (rows + (tap - TAPS + 1))[:, None]  # below 0 it is in the past
            new = tl.load(x + at * x_stride, (at >= 0) & (at < count) & inside, 0.0)
            old = tl.load(past + (at + TAPS - 1) * channels, (at < 0) & inside, 0.0)
            total += (new + old).to(tl.float32) * tl.load(taps + tap * channels + cols, inside, 0.0).to(tl.float32)
        made = total * tl.sigmoid(total)
        tl.store(out + rows[:, None] * channels, made, (rows[:, None] < count) & inside)
    tl.debug_barrier()  # all of the program have read the past
    for tap in tl.static_range(TAPS - 1):
        at = count + (tap - TAPS + 1)
        new = tl.load(x + at.to(tl.int64) * x_stride, cols < tl.where(at >= 0, channels, 0), 0.0)
        old = tl.load(past + (at + TAPS - 1) * channels, cols < tl.where(at < 0, channels, 0), 0.0)
        tl.debug_barrier()
        tl.store(past + tap * channels, new + old, inside)


@triton.jit(do_not_specialize_on_alignment=["slots", "starts"])
def _learn(
    slots, starts, qkv, ba, rate, bias, state, out, state_stride, k_heads, K_DIM: tl.constexpr, V_DIM: tl.constexpr
):
    """A program for `COLUMNS` numbers of a value in a head of a sequence."""
    sequence, head, v_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    keys, cols = tl.arange(0, triton.next_power_of_2(K_DIM)), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    known, inside = keys < K_DIM, cols < V_DIM
    both = known[:, None] & inside
    first = tl.load(starts + sequence).to(tl.int64)
    count = (tl.load(starts + sequence + 1) - first).to(tl.int32)
    channels = 2 * k_heads * K_DIM + v_heads * V_DIM
    q = qkv + first * channels + head // (v_heads // k_heads) * K_DIM + keys
    v = qkv + first * channels + 2 * k_heads * K_DIM + head * V_DIM + cols
    ba += first * 2 * v_heads + head
    out += (first * v_heads + head) * V_DIM + cols
    state += tl.load(slots + sequence).to(tl.int64) * state_stride + head * K_DIM * V_DIM
    state += keys[:, None] * V_DIM + cols
    memory = tl.load(state, both, 0.0)
    head_rate, head_bias = tl.load(rate + head), tl.load(bias + head)
    for _ in range(count):
        query = tl.load(q, known, 0.0).to(tl.float32)
        key = tl.load(q + k_heads * K_DIM, known, 0.0).to(tl.float32)
        query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6) * K_DIM**-0.5
        key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
        learned = tl.sigmoid(tl.load(ba).to(tl.float32))
        pace = tl.load(ba + v_heads).to(tl.float32) + head_bias
        pace = tl.where(pace > 20.0, pace, tl.log(1.0 + tl.exp(pace)))  # softplus
        memory *= tl.exp(head_rate * pace)
        change = learned * (tl.load(v, inside, 0.0).to(tl.float32) - tl.sum(memory * key[:, None], 0))
        memory += key[:, None] * change
        tl.store(out, tl.sum(memory * query[:, None], 0), inside)
        q, v, ba, out = q + channels, v + channels, ba + 2 * v_heads, out + v_heads * V_DIM
    tl.store(state, memory, both)
