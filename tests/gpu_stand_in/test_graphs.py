"""Graphs of every preset whose kernels are here are recorded, and nothing meanwhile is against the rules of that."""

from __future__ import annotations

from typing import Any

import pytest

from miniserve.worker.graphs import LADDER
from tests.support.fake_cuda.stand_in import StandIn

pytestmark = pytest.mark.long

HEADS_OF_64_OR_128 = (
    "llama-3-8b",
    "llama-3.1-8b",
    "mistral-7b",
    "mixtral-8x7b",
    "qwen2.5-7b",
    "qwen3-0.6b",
    "qwen3-30b-a3b",
    "qwen3-8b",
    "qwen3-coder-30b-a3b",
    "smollm2-135m",
)
PRESETS = (*HEADS_OF_64_OR_128, "qwen3-next-80b-a3b")
"""The last one is changed to have them: its recurrent layers are what is recorded here."""


@pytest.fixture(scope="module")
def found(stand_in: StandIn) -> dict[str, Any]:
    result = stand_in.run("graphs", *PRESETS)
    assert not result.problems
    return result.found


@pytest.mark.parametrize("preset", PRESETS)
def test_graphs_of_a_preset_are_recorded(found: dict[str, Any], preset: str) -> None:
    assert found[preset]["sizes"] == [size for size in LADDER if size <= 128]
