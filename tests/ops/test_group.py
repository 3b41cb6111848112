"""Sums over ranks: every rank gets the same bits, those of a sum in order in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.ops.group import PIECE, SharedGroup, make_group
from tests.support.ranks import region

pytestmark = pytest.mark.usefixtures("compiled_kernels")

CPU = torch.device("cpu")


def on_each(ranks: int, work) -> list:
    """What `work(group)` gives on each rank, all at the same time."""
    with region() as path, ThreadPoolExecutor(ranks) as pool:
        return [*pool.map(lambda rank: work(SharedGroup(path, rank, ranks)), range(ranks))]


@settings(max_examples=40)
@given(
    st.integers(2, 4),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3000)), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 1000),
)
def test_sums(ranks: int, shapes: list[tuple[int, int]], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    made = [[torch.randn(shape, generator=generator).to(dtype) for shape in shapes] for _ in range(ranks)]
    found = on_each(ranks, lambda group: [group.sum(x.clone()) for x in made[group.rank]])
    for i in range(len(shapes)):
        wanted = made[0][i].float()
        for other in made[1:]:
            wanted = wanted + other[i].float()
        for rank in range(ranks):
            assert torch.equal(found[rank][i], wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_a_piece(dtype: torch.dtype) -> None:
    """Several rounds, by all threads."""
    count = 3 * PIECE // dtype.itemsize + 17
    made = [torch.randn(count).to(dtype) for _ in range(3)]
    found = on_each(3, lambda group: group.sum(made[group.rank].clone()))
    wanted = ((made[0].float() + made[1].float()) + made[2].float()).to(dtype)
    assert all(torch.equal(x, wanted) for x in found)


@settings(max_examples=20)
@given(st.integers(2, 4), st.integers(0, 9), st.integers(1, 200_000), st.integers(0, 5))
def test_rows_come_side_by_side(ranks: int, rows: int, width: int, more: int) -> None:
    rows = min(rows, 1_000_000 // width)
    made = [torch.randn(rows, width) for _ in range(ranks)]

    def work(group: SharedGroup) -> torch.Tensor:
        for _ in range(more):
            group.sum(torch.ones(3))
        return group.gather(made[group.rank].clone())

    found = on_each(ranks, work)
    assert torch.equal(found[0], torch.cat(made, 1))


def test_one_rank_is_alone() -> None:
    group, x = make_group(CPU, None, 1), torch.ones(2, 3)
    assert (group.rank, group.ranks, group.address) == (0, 1, None)
    assert group.sum(x) is x
    assert group.gather(x) is x


GLOO = """
import sys, torch
from miniserve.ops.group import TorchGroup
rank, path = int(sys.argv[1]), sys.argv[2]
group = TorchGroup(path, rank, 2, torch.device("cpu"))
for dtype in (torch.float32, torch.bfloat16):
    assert group.sum(torch.full((3, 5), rank + 1.0, dtype=dtype)).tolist() == [[3.0] * 5] * 3
found = group.gather(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + 10 * rank)
assert rank or found.tolist() == [[1, 2, 11, 12], [3, 4, 13, 14]], found
assert group.gather(torch.empty(0, 7)).shape[0] == 0
"""


def test_without_a_compiler_gloo_does_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-c", GLOO]
    each = [subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], env=os.environ) for rank in range(2)]
    assert [process.wait(60) for process in each] == [0, 0]
