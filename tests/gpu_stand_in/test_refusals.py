"""The stand-in itself: it complains of what a device would refuse, and is as late as a device may be."""

from __future__ import annotations

import pytest

from tests.support.fake_cuda.stand_in import StandIn

pytestmark = pytest.mark.long


def test_it_complains(stand_in: StandIn) -> None:
    result = stand_in.run("refusals")
    found = result.found
    assert found["fine"] == 0
    assert all(found[name] for name in ("grid", "block", "empty", "shared"))
    assert found["recorded"] == ""
    assert "CUDA error" in found["waited"]
    assert found["too early"] == [-1] * 8
    assert found["after waiting"] == [0] * 8
    assert found["allocations"] == ["CUDA out of memory", ""]
    assert "cudaErrorLaunchFailure" in found["launch"]
    assert "cudaErrorLaunchFailure" in found["ever after"]
    wanted = ["no device launches"] * 3 + [
        "too much shared memory",
        "while a graph is recorded",
        "pinned memory was written",
    ]
    assert [problem[: len(begin)] for problem, begin in zip(result.problems, wanted, strict=True)] == wanted
