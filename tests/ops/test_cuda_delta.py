"""The delta rule's kernels in Triton's interpreter, on a CPU; they are compiled on a GPU alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from types import ModuleType
from typing import Any

import pytest
import torch

from miniserve.ops.decoder import DeltaNet, State
from miniserve.ops.torch_ops import TorchOps
from tests.support import reference_flashinfer
from tests.support.triton import interpreted

PLAIN: Any = TorchOps(torch.device("cpu")).head(torch.zeros(1, 1))
"""Matrices that are not multiplied with here."""


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("3.7"):
        from miniserve.ops import cuda_delta

        yield cuda_delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 4, 32, 32, 4), (1, 3, 24, 40, 3)], ids=str)
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [2, 20, 1, 5]], ids=str)
def test_kernels_equal_the_reference(kernels, lengths: list[int], sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Decodes and prompts, in slots in any order, of which no other is touched; two rows on one slot end as well."""
    torch.manual_seed(sum(lengths))
    k_heads, v_heads, k_dim, v_dim, taps = sizes
    channels = 2 * k_heads * k_dim + v_heads * v_dim
    part = DeltaNet(
        index=1,
        k_heads=k_heads,
        v_heads=v_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        taps=taps,
        qkvz=PLAIN,
        ba=PLAIN,
        conv=torch.randn(taps, channels).to(dtype),
        rate=-torch.rand(v_heads),
        bias=torch.randn(v_heads),
        norm=torch.ones(v_dim),
        out=PLAIN,
    )
    count, rows = len(lengths), sum(lengths)
    first = State(torch.randn(6, 3, taps - 1, channels).to(dtype), torch.randn(6, 3, v_heads, k_dim, v_dim))
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    slots = torch.randperm(6)[:count].int()
    qkv = torch.randn(rows, channels + 8).to(dtype)[:, :channels]  # z follows in each row
    ba = torch.randn(rows, 2 * v_heads).to(dtype)
    found = []
    for delta in (kernels.delta, reference_flashinfer.delta):
        state = State(first.conv.clone(), first.delta.clone())
        found.append((delta(state, slots, starts, part, qkv, ba), state.delta, state.conv))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.03}
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, **close)
    others = [slot for slot in range(6) if slot not in slots.tolist()]
    assert torch.equal(found[0][1][others], first.delta[others])
    kernels.delta(first, torch.zeros_like(slots), starts, part, qkv, ba)
    assert bool(first.delta[0].isfinite().all())
