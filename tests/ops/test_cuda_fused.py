"""The fused kernels in Triton's interpreter, on a CPU, against float64, and compiled for an H200."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from miniserve.ops.cuda_ops import CudaOps
from miniserve.ops.decoder import Attention, Sizes
from scripts.gpu import layers
from scripts.gpu.setting import Setting
from tests.support.reference_flashinfer import reference
from tests.support.triton import interpreted

ROOT = Path(__file__).parents[2]
BF16, FP16 = torch.bfloat16, torch.float16
LIMIT = {BF16: 1.6e-2, FP16: 2e-3}
"""Largest error as a part of the largest value: docs/gpu.md's for bf16, whose steps are 8 times those of fp16."""
EPS = 1e-5


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted() as patch:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        from miniserve.ops import cuda_fused

        dot = InterpreterBuilder.create_dot

        def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            """Its own takes the bits of a bf16 number for an integer."""
            a, b = (TensorHandle(wide(x.data), tl.float32) if x.dtype.is_bf16() else x for x in (a, b))
            return dot(self, a, b, *rest)

        patch.setattr(InterpreterBuilder, "create_dot", widened)
        yield cuda_fused


def wide(bits: Any) -> Any:
    """bf16 numbers as float32."""
    return (bits.astype("uint32") << 16).view("float32")


def normal(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= LIMIT[found.dtype]


def normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    x = x.double()
    return x if weight is None else x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def rounded(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Normed, with the product of both rounded before the factor of a row is known, as a tile wants it."""
    if weight is None:
        return x.double()
    return (x * weight).double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("columns", "size"), [(32, 32), (64, 576), (33, 160), (208, 1536)])
def test_products(kernels, columns: int, size: int, dtype: torch.dtype) -> None:
    """Of any widths, with and without norm, bias and residual."""
    torch.manual_seed(columns)
    weight, norm = normal(columns, size + 8, dtype=dtype)[:, :size], normal(size, dtype=dtype)
    bias = normal(columns, dtype=dtype)
    for rows, has_norm, biased, added in product((1, 5, 16), *[(False, True)] * 3):
        x, residual = normal(rows, size, dtype=dtype), normal(rows, columns, dtype=dtype)
        scale = norm if has_norm else None
        wanted = normed(x, scale) @ weight.double().T + biased * bias.double() + added * residual.double()
        into = residual.clone() if added else None
        found = kernels.multiply(x, weight, bias if biased else None, into, scale, EPS)
        close(found, wanted)
        assert not added or found is into


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("columns", "size"), [(32, 32), (61, 160), (96, 576)])
def test_gates(kernels, columns: int, size: int, dtype: torch.dtype) -> None:
    """Gates far out on both sides: silu is 0 there, or the gate itself."""
    torch.manual_seed(columns)
    far = torch.cat((torch.linspace(-30, 30, columns), torch.ones(columns))).unsqueeze(1)
    weight, norm = (normal(2 * columns, size) * far / size**0.5).to(dtype), normal(size, dtype=dtype)
    bias = normal(2 * columns, dtype=dtype)
    for rows, gelu, has_norm, biased in product((1, 3, 16), *[(False, True)] * 3):
        x = normal(rows, size, dtype=dtype)
        scale = norm if has_norm else None
        gates, ups = (rounded(x, scale) @ weight.double().T + biased * bias.double()).chunk(2, -1)
        passed = F.gelu(gates, approximate="tanh") if gelu else F.silu(gates)
        name = "gelu_tanh" if gelu else "silu"
        close(kernels.multiply(x, weight, bias if biased else None, None, scale, EPS, name), passed * ups)


def attention(heads: int, kv_heads: int, dim: int, gated: bool, norms: list[torch.Tensor] | None) -> Attention:
    nothing: Any = None
    q_norm, k_norm = norms or (None, None)
    return Attention(1, heads, kv_heads, dim, dim**-0.5, 0, 0, gated, nothing, q_norm, k_norm, nothing)


HEADS = [(4, 2, 64, 64), (3, 1, 64, 16), (2, 2, 128, 128), (2, 1, 256, 64)]
"""Of q, of k and v, numbers of a head, and how many rotate."""


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotary"), HEADS)
def test_heads(kernels, heads: int, kv_heads: int, dim: int, rotary: int, gated: bool, dtype: torch.dtype) -> None:
    """Queries, and what lies in the pool: after a product with norm and bias, and with norms of q and k for any number
    of rows. No other byte of the pool has changed."""
    torch.manual_seed(heads)
    page, layers, size = 4, 3, 96
    width = (heads * (1 + gated) + 2 * kv_heads) * dim
    angles = torch.rand(40, rotary // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), -1)
    weight, norm, bias = normal(width, size, dtype=dtype) / 8, normal(size, dtype=dtype), normal(width, dtype=dtype)
    for lengths, whole in product(([1], [1] * 7, [1, 1, 5, 2], [1] * 16, [1, 20, 3]), (False, True)):
        rows = sum(lengths)
        if rows > kernels.ROWS and not whole:
            continue
        norms = [normal(dim, dtype=dtype) for _ in range(2)] if whole else None
        part = attention(heads, kv_heads, dim, gated, norms)
        contexts = [length + random.Random(rows).randrange(15) for length in lengths]
        counts = [-(-context // page) for context in contexts]
        starts = torch.tensor([0, *counts]).cumsum(0)
        indices = torch.randperm(sum(counts) + 2)[: sum(counts)]
        sequences = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        positions = torch.cat([torch.arange(c - n, c) for n, c in zip(lengths, contexts, strict=True)])
        places = {"positions": positions, "batch_indices": sequences, "kv_indptr": starts, "kv_indices": indices}
        kv = normal(sum(counts) + 2, layers, 2, page, kv_heads, dim, dtype=dtype)
        plan: Any = SimpleNamespace(
            layers=[(kv[:, layer, 0], kv[:, layer, 1]) for layer in range(layers)],
            places={name: numbers.int() for name, numbers in places.items()},
        )
        x = normal(rows, size, dtype=dtype)
        expected = kv.clone()
        if whole:
            found = (x @ weight.T).to(dtype)
            made = found.double()
            kernels.heads(found, EPS, part, plan, table)
        else:
            found = kernels.queries(x, weight, bias, norm, EPS, part, plan, table)
            made = normed(x, norm) @ weight.double().T + bias.double()
        every = made.view(rows, -1, dim)
        q, k, v, gates = every.split((heads, kv_heads, kv_heads, heads * gated), 1)
        if norms:
            q, k = normed(q, norms[0]), normed(k, norms[1])
        q, k = (turned(part, angles[positions]) for part in (q, k))
        mine = found.view(rows, -1, dim)
        close(mine[:, :heads], q)
        if gated:
            close(mine[:, -heads:], gates)
        slots = indices[starts[sequences] + positions // page], positions % page
        close(kv[slots[0], 1, 0, slots[1]], k)
        close(kv[slots[0], 1, 1, slots[1]], v)
        for half in (0, 1):
            expected[slots[0], 1, half, slots[1]] = kv[slots[0], 1, half, slots[1]]
        assert torch.equal(kv, expected)


def test_a_row_begins_behind_the_first_two_billion_numbers(kernels) -> None:
    """As those of a prompt of 200,000 tokens do in a large model. The memory between rows is never touched."""
    rows, dim, stride = kernels.ROWS + 1, 64, 2**31 // kernels.ROWS + 64
    qkv = torch.empty(rows * stride, dtype=FP16).as_strided((rows, 3 * dim), (stride, 1))
    qkv.copy_(normal(rows, 3 * dim))
    kv, values = torch.zeros(rows, 1, 2, 1, 1, dim, dtype=FP16), qkv[:, 2 * dim :].clone()
    each = torch.arange(rows + 1).int()
    places = {"positions": each[:rows] * 0, "batch_indices": each[:rows], "kv_indptr": each, "kv_indices": each[:rows]}
    plan: Any = SimpleNamespace(layers=[(kv[:, 0, 0], kv[:, 0, 1])] * 2, places=places)
    kernels.heads(qkv, EPS, attention(1, 1, dim, False, None), plan, torch.ones(1, dim))
    assert torch.equal(kv[:, 0, 1, 0, 0], values)


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """The first numbers of each head rotate, each with the one half of them away."""
    size = 2 * angles.shape[1]
    cos, sin = angles.double().cos().unsqueeze(1), angles.double().sin().unsqueeze(1)
    low, high = x[..., :size].chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, x[..., size:]), -1)


def test_layers_as_a_model_calls_them(kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a GPU, with these kernels behind `CudaOps`: few rows and more than they multiply."""

    def make_ops(device: Any, dtype: torch.dtype, sizes: Sizes, **more: Any) -> tuple[CudaOps, str]:
        return CudaOps(device, dtype, sizes, reference(), (None, kernels)), ""

    monkeypatch.setattr(layers, "make_ops", make_ops)
    monkeypatch.setattr(layers, "ROWS", (3, 17))
    figures = list(layers.check(Setting("cpu", True, tmp_path)))
    assert len(figures) == 8
    assert not [figure for figure in figures if not figure.ok]


@pytest.mark.parametrize("vocab", [5, 1024, 3000, 20011])
@pytest.mark.parametrize("temperature", [None, 0.2, 1.0, 30.0])
def test_draws(kernels: ModuleType, vocab: int, temperature: float | None) -> None:
    """Each point falls into the weight that is drawn, of all that are not ruled out; what shares the batch is the
    same to a row."""
    torch.manual_seed(vocab)
    logits = torch.randn(12, vocab) * 3
    logits[torch.rand(12, vocab) < 0.3] = -torch.inf
    logits[:, vocab // 2] = 1.0
    logits[0, : vocab // 2] = logits[1, vocab // 2 + 1 :] = -torch.inf  # whole blocks of them
    points = torch.rand(12, 1, dtype=torch.float64)
    points[2:4] = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64)
    scale = temperature or 1.0
    weights = ((logits.double() - logits.double().amax(-1, keepdim=True)) / scale).exp()
    given = weights.float() if temperature is None else logits
    column = None if temperature is None else torch.full((12, 1), temperature)
    drawn = kernels.draw(given, column, points)
    ends = weights.cumsum(-1)
    total, slack = ends[:, -1:], 1e-5 * ends[:, -1:]
    assert bool((weights.gather(1, drawn) > 0).all())
    assert bool((ends.gather(1, drawn) + slack >= points * total).all())
    assert bool((ends.gather(1, drawn) - weights.gather(1, drawn) - slack <= points * total).all())
    for row in range(12):
        alone = kernels.draw(given[row : row + 1], None if column is None else column[:1], points[row : row + 1])
        assert alone.item() == drawn[row].item()


@pytest.mark.slow
def test_compiled_for_an_h200_nothing_spills(tmp_path: Path) -> None:
    """Three programs fit on a multiprocessor, of 227 KiB, and all that streams is copied 16 bytes at a time."""
    pytest.importorskip("triton.backends.nvidia", reason="triton is not installed (it comes with torch for CUDA)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.compiled"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 76
    for name, needs in found.items():
        assert needs["spilt"] == 0, name
        assert needs["registers"] <= 65536 // (3 * 128), name
        assert needs["shared"] <= 227 * 1024 // 3, name
        assert needs["wide"] or name.startswith(("heads", "sums", "draws")), name
