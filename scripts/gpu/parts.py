"""The kernels of newer families: experts, and the delta rule with its convolution, against the torch kernels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from miniserve.ops import make_ops
from miniserve.ops.decoder import Batch, DeltaNet, Experts, Mlp, Sizes, State
from miniserve.ops.delta import delta
from miniserve.ops.torch_ops import TorchOps
from scripts.gpu.kernels import LIMIT, dtypes, generator, relative, short
from scripts.gpu.setting import Figure, Figures, Setting

EXPERTS, CHOSEN, HIDDEN, INNER = 16, 4, 512, 256
LENGTHS = [[1], [1] * 9, [1, 1, 130, 1, 3, 700]]
"""Of new tokens in a step: decodes, and prompts among them."""


def experts(run: Setting) -> Figures:
    """A mixture of a few rows and of many."""
    device = torch.device(run.device)
    for dtype in dtypes(run):
        ops, _ = make_ops(device, dtype, Sizes(8, 64, [HIDDEN, INNER]), native=run.cuda)
        exact, numbers, worst = TorchOps(device, torch.float64), generator(run, 1), 0.0

        def normal(*shape: int, by: torch.Generator = numbers, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, generator=by, device=device).to(dtype)

        matrices = [(normal(2 * INNER, HIDDEN) / 16, normal(HIDDEN, INNER) / 16) for _ in range(EXPERTS)]
        single = [Mlp(ops.gated(up), ops.linear(down)) for up, down in matrices]
        true = [Mlp(exact.gated(up.double()), exact.linear(down.double())) for up, down in matrices]
        router = ops.head(normal(EXPERTS, HIDDEN))
        part = Experts(CHOSEN, True, router, ops.stack(single), None, None)
        for rows in (1, 7, 300):
            x = normal(rows, HIDDEN)
            weights, ids = router(x).float().softmax(-1).topk(CHOSEN)
            found = ops.mixture(part, x, ids, weights)
            wanted = exact.mixture(Experts(CHOSEN, True, router, true, None, None), x.double(), ids, weights)
            worst = max(worst, relative(found, wanted))
        yield Figure(f"mixture, {short(dtype)}", worst, "relative error", "<=", LIMIT[dtype])


def state(run: Setting) -> Figures:
    """The convolution and the delta rule: what is read, and the state that is left."""
    device, sizes = torch.device(run.device), (4, 8, 128, 128, 4)
    k_heads, v_heads, k_dim, v_dim, taps = sizes
    channels = 2 * k_heads * k_dim + v_heads * v_dim
    nothing: Any = None
    for dtype in dtypes(run):
        ops, _ = make_ops(device, dtype, Sizes(8, 64, [HIDDEN]), native=run.cuda)
        numbers, worst = generator(run, 2), [0.0, 0.0, 0.0]

        def normal(*shape: int, by: torch.Generator = numbers) -> torch.Tensor:
            return torch.randn(shape, generator=by, device=device)

        conv, rate, bias = normal(taps, channels).to(dtype), -normal(v_heads).exp(), normal(v_heads)
        norm = normal(v_dim).to(dtype)
        part = DeltaNet(k_heads, v_heads, k_dim, v_dim, taps, 1, nothing, nothing, conv, rate, bias, norm, nothing)
        for lengths in LENGTHS:
            slots, rows = torch.randperm(len(lengths) + 1).tolist()[1:], sum(lengths)
            before = State(
                normal(len(lengths) + 1, 2, taps - 1, channels).to(dtype),
                normal(len(lengths) + 1, 2, v_heads, k_dim, v_dim),
            )
            qkv, ba = normal(rows, channels + 64).to(dtype)[:, :channels], normal(rows, 2 * v_heads).to(dtype)
            found, wanted = (State(before.conv.clone(), before.delta.clone()) for _ in range(2))
            empty = torch.zeros(rows, dtype=torch.int64, device=device)
            pool = torch.zeros(len(lengths), 1, 2, 1024, 1, 64, dtype=dtype, device=device)
            pages = [[i] for i in range(len(lengths))]
            plan = ops.plan(Batch(empty, empty, empty, lengths, lengths, pages, slots), pool, found)
            read = ops.delta(plan, part, qkv, ba)
            starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
            exact = delta(wanted, list(zip(slots, (slice(*e) for e in pairwise(starts)), strict=True)), part, qkv, ba)
            pairs = (read, exact), (found.delta, wanted.delta), (found.conv, wanted.conv)
            worst = [max(w, relative(got, true.double())) for w, (got, true) in zip(worst, pairs, strict=True)]
        for name, error in zip(("read from the state", "state", "last inputs"), worst, strict=True):
            yield Figure(f"delta rule, {name}, {short(dtype)}", error, "relative error", "<=", 2 * LIMIT[dtype])
