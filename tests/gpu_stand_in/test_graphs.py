"""Graphs of every preset whose kernels are here are recorded, and nothing meanwhile is against the rules of that."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.fake_cuda.stand_in import StandIn

pytestmark = pytest.mark.long

DENSE = ("llama-3-8b", "llama-3.1-8b", "mistral-7b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b", "smollm2-135m")
"""Those with heads of 64 or 128."""


@pytest.fixture(scope="module")
def found(stand_in: StandIn) -> dict[str, Any]:
    result = stand_in.run("graphs", *DENSE)
    assert not result.problems
    return result.found


@pytest.mark.parametrize("preset", DENSE)
def test_graphs_of_a_preset_are_recorded(found: dict[str, Any], preset: str) -> None:
    assert found[preset]["sizes"] == [1, 4, 24, 80]
