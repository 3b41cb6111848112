"""Choices that only a device can settle: how the pool lies, which cores a decode is computed with, and from which
length on FlashAttention-3 pays for prompts without a cached prefix."""

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
PROMPTS = (512, 1024, 2048, 8192)


def check(run: Setting) -> Figures:
    """A layer's decode of 64 sequences of 1k tokens, and its prompts, in each way: nothing is judged."""
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
                    taken = layer_seconds(run, kv, heads, [1] * count, [context] * count)
                what = f"{lies} pool, {heads} query heads, {cores} cores"
                yield Figure(f"{what}: a layer", taken * 1e6, "us")
                yield Figure(f"{what}: share of the bandwidth", read / taken / bandwidth)
        if page_major:
            for length in (16, 64) if run.small else PROMPTS:
                for kernel, least in (("FA2 on pages", length + 1), ("FA3 on new keys", 1)):
                    with patch.object(cuda_plan, "FRESH", least):
                        taken = layer_seconds(run, kv, HEADS[0], [length], [length])
                    yield Figure(f"a prompt of {length} with {kernel}: a layer", taken * 1e6, "us")
        del kv
        run.release()


def pool(run: Setting, pages: int, layers: int, page_major: bool) -> torch.Tensor:
    """`[page, layer, k/v, slot, kv_head, head_dim]`, in memory as served or with all pages of a layer together."""
    rest = 2, PAGE, KV_HEADS, DIM
    if page_major:
        return torch.zeros((pages, layers, *rest), dtype=run.half, device=run.device)
    return torch.zeros((layers, pages, *rest), dtype=run.half, device=run.device).transpose(0, 1)


def layer_seconds(run: Setting, kv: torch.Tensor, heads: int, lengths: list[int], contexts: list[int]) -> float:
    """What attention of one layer takes, with what it stores, in a row of all layers."""
    device = torch.device(run.device)
    ops, _ = make_ops(device, run.half, Sizes(heads, DIM, [heads * DIM], kv_heads=KV_HEADS), native=run.cuda)
    order = list(range(len(kv)))
    random.Random(0).shuffle(order)
    each = len(order) // len(lengths)
    tables = [order[i * each : (i + 1) * each] for i in range(len(lengths))]
    ends = zip(lengths, contexts, strict=True)
    positions = torch.cat([torch.arange(end - length, end) for length, end in ends]).to(device)
    plan = ops.plan(Batch(positions, positions, positions, lengths, contexts, tables), kv)
    q = torch.randn(len(positions), heads, DIM, device=device).to(run.half)
    k, v = torch.randn(2, len(positions), KV_HEADS, DIM, device=device).to(run.half)
    parts = [attention_part(layer, DIM**-0.5) for layer in range(kv.shape[1])]
    return seconds(lambda: [ops.attention(plan, part, q, k, v) for part in parts], run, 5) / len(parts)
