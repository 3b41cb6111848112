"""Kernels against the same sums in float64, over random page tables and ragged lengths."""

from __future__ import annotations

import random
from typing import Any

import torch

from miniserve.model import rope
from miniserve.model.rope import RopeConfig
from miniserve.ops import make_ops
from miniserve.ops.decoder import Batch, Sizes
from scripts.gpu.setting import Figure, Figures, Setting
from tests.support.parts import attention_part

LIMIT = {torch.float32: 5e-6, torch.bfloat16: 1.6e-2}
"""Largest error, as a part of the largest value: 4 units in the last place of bf16 (2^-8); 42 of fp32 (2^-23), whose
sums of up to 1,536 products are made in any order."""
ROUNDED = 5e-2
"""The same for the plain torch attention in bf16, which rounds scores and weights too."""
GROUPS = (1, 2, 4, 8)
DIMS = (64, 128)
PAGE = 16
LAYERS = 3
BATCHES = {
    "decode": [(1, context) for context in (1, 16, 17, 100, 333, 1024, 5)],
    "prefill": [(1, 1), (7, 7), (16, 48), (130, 130), (67, 600), (200, 216)],
    "fresh": [(1, 40), (700, 700), (600, 600)],
    "mixed": [(1, 40), (90, 90), (1, 700), (67, 500), (1, 1), (3, 35)],
}
"""(new tokens, tokens with these) of each sequence."""


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest error as a part of the largest value; infinite where something is not a number."""
    error = ((found.double() - wanted).abs().max() / wanted.abs().max()).item()
    return error if error == error else float("inf")


def dtypes(run: Setting) -> list[torch.dtype]:
    """Those that are served here."""
    return sorted({run.half, torch.float32}, key=str)


def short(dtype: torch.dtype) -> str:
    """Its name in a table."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def generator(run: Setting, seed: int) -> torch.Generator:
    """Random numbers made on the device."""
    return torch.Generator(run.device).manual_seed(seed)


def attention(run: Setting, kind: str, window: int = 0) -> Figures:
    """Paged attention over a page-major pool seen at one layer, so that pages lie far apart; and what it stores."""
    for dtype in dtypes(run):
        for dim in DIMS:
            worst, spoilt, kernels = 0.0, 0, ""
            for group in GROUPS:
                error, untouched, kernels = _attend(run, BATCHES[kind], dtype, dim, group, window)
                worst, spoilt = max(worst, error), spoilt + (not untouched)
            if run.cuda and dtype is torch.bfloat16 and not window:  # what torch computes instead says nothing of it
                yield Figure(f"FlashInfer attends heads of {dim}: {kernels}", int(kernels == "flashinfer"), "", "==", 1)
            limit = ROUNDED if dtype is torch.bfloat16 and kernels.startswith("torch") else LIMIT[dtype]
            what = f"{kind} attention" + f" to the last {window} tokens" * bool(window)
            name = f"{what}, {short(dtype)}, head_dim {dim}, groups {', '.join(map(str, GROUPS))} ({kernels})"
            yield Figure(name, worst, "relative error", "<=", limit)
            yield Figure(f"{name}: pools with other bytes than the new keys and values changed", spoilt, "", "==", 0)


def _attend(
    run: Setting, sequences: list[tuple[int, int]], dtype: torch.dtype, dim: int, group: int, window: int
) -> tuple[float, bool, str]:
    """The error of attention, whether the pool holds what it should, and which kernels these are."""
    kv_heads = 2
    heads, device, numbers = kv_heads * group, torch.device(run.device), generator(run, group)
    # The CPU's own kernels keep a pool in another order; tests/test_ops.py knows it.
    native, windows = device.type == "cuda", {0, window}
    ops, kernels = make_ops(
        device, dtype, Sizes(heads, dim, [heads * dim], windows=windows, kv_heads=kv_heads), native=native
    )
    counts = [-(-context // PAGE) for _, context in sequences]
    order = list(range(sum(counts) + 2))
    random.Random(group).shuffle(order)
    pages = [[order.pop() for _ in range(count)] for count in counts]
    shape = (sum(counts) + 2, LAYERS, 2, PAGE, kv_heads, dim)
    kv = torch.randn(shape, generator=numbers, device=device).to(dtype)
    total = sum(new for new, _ in sequences)
    # As the model has them: slices of one matrix.
    qkv = torch.randn(total, heads + 2 * kv_heads, dim, generator=numbers, device=device).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    positions = torch.cat([torch.arange(context - new, context) for new, context in sequences]).to(device)
    last = torch.tensor([new for new, _ in sequences], device=device).cumsum(0) - 1
    batch = Batch(
        torch.zeros_like(positions), positions, last, [n for n, _ in sequences], [c for _, c in sequences], pages
    )
    expected, layer = kv.clone(), group % LAYERS
    start, wanted = 0, torch.zeros(total, heads, dim, dtype=torch.float64, device=device)
    for (new, context), table in zip(sequences, pages, strict=True):
        at = torch.arange(context - new, context, device=device)
        slots = torch.tensor(table, device=device)[at // PAGE], at % PAGE
        rows = slice(start, start + new)
        expected[slots[0], layer, 0, slots[1]], expected[slots[0], layer, 1, slots[1]] = k[rows], v[rows]
        keys, values = expected[table][:, layer].transpose(0, 1).reshape(2, -1, kv_heads, dim)[:, :context].double()
        wanted[rows] = exact(q[rows].double(), keys, values, window)
        start += new
    out = ops.attention(ops.plan(batch, kv), attention_part(layer, dim**-0.5, window), q, k, v)
    run.sync()
    for (_, context), table in zip(sequences, pages, strict=True):
        if after := context % PAGE:  # what comes after the last token may have been cleared
            expected[table[-1], layer, :, after:] = kv[table[-1], layer, :, after:]
    return relative(out.view(total, heads, dim), wanted), torch.equal(kv, expected), kernels


def exact(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int = 0) -> torch.Tensor:
    """Causal attention in plain sums: `q` `[T, H, D]` are the last T of the tokens that `keys` and `values`
    `[context, Hkv, D]` are of. With a `window` each sees so many tokens, itself included."""
    (new, heads, dim), (context, kv_heads, _) = q.shape, keys.shape
    queries = q.view(new, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("nhgd,mhd->hgnm", queries, keys) * dim**-0.5
    at = torch.arange(context, device=q.device)
    past = at[context - new :].unsqueeze(1) - at
    hidden = (past < 0) | (past >= (window or context))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hgnm,mhd->nhgd", weights, values).reshape(new, heads, dim)


def between(run: Setting) -> Figures:
    """Norms, activation and rotary positions: what lies between the matrix products."""
    device = torch.device(run.device)
    for dtype in dtypes(run):
        worst: dict[str, float] = {}
        for dim in DIMS:
            for rows in (1, 7, 300):
                for name, error in _between(run, device, dtype, dim, rows):
                    worst[name] = max(worst.get(name, 0.0), error)
        for name, error in worst.items():
            yield Figure(f"{name}, {short(dtype)}", error, "relative error", "<=", LIMIT[dtype])


def _between(run: Setting, device: torch.device, dtype: torch.dtype, dim: int, rows: int) -> list[tuple[str, float]]:
    width, numbers = 576, generator(run, rows)
    ops, _ = make_ops(device, dtype, Sizes(8, dim, (width,)), native=device.type == "cuda")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers, device=device).to(dtype)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()

    x, weight = normal(rows, width) * 3, normal(width)
    found = [("rms_norm of hidden states", relative(ops.rms_norm(x, weight, 1e-5), norm(x, weight)))]
    qkv = normal(rows, 8, dim)
    heads, scale = qkv[:, :5], normal(dim)
    wanted = norm(heads, scale)
    found.append(("rms_norm of heads", relative(ops.rms_norm(heads, scale, 1e-5), wanted)))
    # Gates far out on both sides: silu is 0 there, or the gate itself.
    far = torch.linspace(-30, 30, 96, device=device, dtype=dtype).unsqueeze(1)
    gates = torch.cat((normal(96, width) * far, normal(96, width))) / width**0.5
    gate, up = (x.double() @ gates.double().T).to(dtype).double().chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * up
    found.append(("gated", relative(ops.gated(gates)(x), wanted)))
    for config in (RopeConfig(10000.0), RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 64)):
        angles = rope.angles(config, dim, 4096)
        positions = torch.randint(4096, (rows,), generator=numbers, device=device)
        cos_sin = ops.rotary(angles, dtype)(positions)
        q, k = qkv[:, :5], qkv[:, 5:7]
        wanted_q, wanted_k = _turn(q, angles[positions.cpu()]), _turn(k, angles[positions.cpu()])
        q, k = ops.rope(q, k, cos_sin)
        found += [
            (f"rope of q, {config.kind}", relative(q, wanted_q)),
            (f"rope of k, {config.kind}", relative(k, wanted_k)),
        ]
        qkv = normal(rows, 8, dim)  # it may have turned in place
    return found


def _turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn each number with the one half a head away."""
    cos, sin = (part.double().unsqueeze(1).to(x.device) for part in (angles.cos(), angles.sin()))
    low, high = x.double().chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def products(run: Setting) -> Figures:
    """Linear layers with bias and residual, and the last matrix."""
    device = torch.device(run.device)
    for dtype in dtypes(run):
        worst = 0.0
        for columns, size in ((64, 576), (208, 1536), (1024, 1024)):
            worst = max(worst, _product(run, device, dtype, columns, size))
        yield Figure(f"linear and head, {short(dtype)}", worst, "relative error", "<=", LIMIT[dtype])


def _product(run: Setting, device: torch.device, dtype: torch.dtype, columns: int, size: int) -> float:
    numbers = generator(run, columns)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers, device=device).to(dtype)

    weight, bias, x, residual = normal(columns, size), normal(columns), normal(200, size), normal(200, columns)
    ops, _ = make_ops(device, dtype, Sizes(8, 64, (size,)))
    plain: Any = ops.linear(weight.clone())
    biased, head = ops.linear(weight.clone(), bias), ops.head(weight.clone())
    product, worst = x.double() @ weight.double().T, 0.0
    for rows in (1, 7, 96, 200):
        some = x[:rows]
        for out, wanted in (
            (plain(some), product[:rows]),
            (plain(some, residual[:rows].clone()), (product + residual)[:rows]),
            (biased(some), (product + bias)[:rows]),
            (biased(some, residual[:rows].clone()), (product + bias + residual)[:rows]),
            (head(some), product[:rows]),
        ):
            worst = max(worst, relative(out, wanted))
    return worst
