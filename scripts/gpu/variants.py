"""Choices that only a device can settle: how the pool lies, and which cores a decode is computed with."""

from __future__ import annotations

import random
from unittest.mock import patch

import torch

from miniserve.ops import cuda_plan, make_ops
from miniserve.ops.decoder import Batch, Sizes
from scripts.gpu import ceilings
from scripts.gpu.common import drop_engine, seconds
from scripts.gpu.setting import Figure, Figures, Setting
from tests.support.parts import attention_part

KV_HEADS, DIM, PAGE = 8, 128, 16
HEADS = (32, 16)
"""Of queries: groups of 4, as Llama-3-8B has them, and of 2, as Qwen3-0.6B."""


def check(run: Setting) -> Figures:
    """A layer's decode of 64 sequences of 1k tokens, in each way: nothing is judged."""
    drop_engine(run)
    layers, count, context = (2, 4, 40) if run.small else (32, 64, 1024)
    read = count * context * 2 * KV_HEADS * DIM * run.half.itemsize
    bandwidth = ceilings.measured(run).bandwidth
    for page_major in (True, False) if run.cuda else (True,):  # torch's kernels need the pool that is served
        lies = "page-major" if page_major else "layer-major"
        kv = pool(run, count * -(-context // PAGE), layers, page_major)
        for heads in HEADS:
            for cores, least in (("tensor", 1), ("CUDA", heads + 1)):
                with patch.object(cuda_plan, "TENSOR_CORE_GROUP", least):
                    taken = decode_seconds(run, kv, heads, count, context)
                what = f"{lies} pool, {heads} query heads, {cores} cores"
                yield Figure(f"{what}: a layer", taken * 1e6, "us")
                yield Figure(f"{what}: share of the bandwidth", read / taken / bandwidth)
        del kv
        run.release()


def pool(run: Setting, pages: int, layers: int, page_major: bool) -> torch.Tensor:
    """`[page, layer, k/v, slot, kv_head, head_dim]`, in memory as served or with all pages of a layer together."""
    rest = 2, PAGE, KV_HEADS, DIM
    if page_major:
        return torch.zeros((pages, layers, *rest), dtype=run.half, device=run.device)
    return torch.zeros((layers, pages, *rest), dtype=run.half, device=run.device).transpose(0, 1)


def decode_seconds(run: Setting, kv: torch.Tensor, heads: int, count: int, context: int) -> float:
    """What attention of one layer takes, with what it stores, in a row of all layers."""
    device = torch.device(run.device)
    ops, _ = make_ops(device, run.half, Sizes(heads, DIM, [heads * DIM], kv_heads=KV_HEADS), native=run.cuda)
    order = list(range(len(kv)))
    random.Random(0).shuffle(order)
    each = len(order) // count
    tables = [order[i * each : (i + 1) * each] for i in range(count)]
    rows = torch.arange(count, device=device)
    batch = Batch(rows, torch.full_like(rows, context - 1), rows, [1] * count, [context] * count, tables)
    plan = ops.plan(batch, kv)
    q = torch.randn(count, heads, DIM, device=device).to(run.half)
    k, v = torch.randn(2, count, KV_HEADS, DIM, device=device).to(run.half)
    parts = [attention_part(layer, DIM**-0.5) for layer in range(kv.shape[1])]
    return seconds(lambda: [ops.attention(plan, part, q, k, v) for part in parts], run, 5) / len(parts)
