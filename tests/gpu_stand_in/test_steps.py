"""Steps of a model in Llama-3-8B's shape, on the stand-in: what makes the host wait, and how much is launched."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.fake_cuda.stand_in import StandIn

pytestmark = pytest.mark.long

WAYS = [f"{graphs}, {overlap}" for graphs in ("graphs", "eager") for overlap in ("overlap", "no overlap")]
SAMPLINGS = ("greedy", "drawn", "filtered", "penalized")
STEPS = [*(f"decode, {sampling}" for sampling in SAMPLINGS), "append"]

# What was counted for two layers and five decodes: these numbers may fall, and are lowered then.
LAUNCHES = {
    "graphs, overlap: decode, greedy": 20,
    "graphs, overlap: decode, drawn": 36,
    "graphs, overlap: decode, filtered": 82,
    "graphs, overlap: decode, penalized": 76,
    "graphs, no overlap: decode, greedy": 16,
    "eager, overlap: decode, greedy": 42,
    "graphs, overlap: append": 39,
}
NODES_OF_A_LAYER = 11
NODES_BESIDES = 4


@pytest.fixture(scope="module")
def found(stand_in: StandIn) -> dict[str, Any]:
    result = stand_in.run("steps")
    assert not result.problems, "of recording graphs, of launches, of pinned memory"
    return result.found


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("way", WAYS)
def test_the_host_waits_for_nothing_that_runs(found: dict[str, Any], way: str, step: str) -> None:
    """Of the step before only its results are waited for, once the next one is launched. Memory is neither taken nor
    given back."""
    seen = found["steps"][f"{way}: {step}"]
    assert seen["memory"] == []
    assert seen["waits before the launch"] == []
    if ", overlap" in way:
        assert seen["waits after the launch"] == []


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("way", WAYS)
def test_all_copies_go_by_pinned_memory(found: dict[str, Any], way: str, step: str) -> None:
    """But for FlashInfer's own `[0, 1, ... decodes]` in an eager decode: 6 numbers for 5 of them."""
    its_own = ["PAGEABLE copy pageable > device 24"] if way.startswith("eager") and step != "append" else []
    assert found["steps"][f"{way}: {step}"]["copies of the host"] == its_own


@pytest.mark.parametrize("step", LAUNCHES)
def test_no_step_launches_more(found: dict[str, Any], step: str) -> None:
    assert found["steps"][step]["launches"] <= LAUNCHES[step]


def test_no_graph_has_more_nodes(found: dict[str, Any]) -> None:
    assert found["nodes of a layer"] <= NODES_OF_A_LAYER
    assert found["nodes besides"] <= NODES_BESIDES
