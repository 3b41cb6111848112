"""Steps of a model in Llama-3-8B's shape, on the stand-in: what makes the host wait, and how much is launched."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.fake_cuda.stand_in import StandIn

pytestmark = pytest.mark.long

WAYS = [f"{graphs}, {overlap}" for graphs in ("graphs", "eager") for overlap in ("overlap", "no overlap")]
SAMPLINGS = ("greedy", "drawn", "filtered", "penalized")
STEPS = [*(f"decode, {sampling}" for sampling in SAMPLINGS), "append", "fresh prompt"]

# What was counted for two layers and five decodes: these numbers may fall, and are lowered then.
LAUNCHES = {
    "graphs, overlap: decode, greedy": 20,
    "graphs, overlap: decode, drawn": 24,
    "graphs, overlap: decode, filtered": 74,
    "graphs, overlap: decode, penalized": 76,
    "graphs, no overlap: decode, greedy": 16,
    "eager, overlap: decode, greedy": 32,
    "graphs, overlap: append": 20,
    "eager, overlap: append": 35,
    "graphs, overlap: fresh prompt": 33,
}
# Of a layer, in the graph of so many decodes: with few rows Triton's kernels do what lies beside the products, too.
NODES = {"llama-3-8b, 1": 6, "llama-3-8b, 16": 6, "llama-3-8b, 24": 10, "qwen3-8b, 16": 7, "qwen3-8b, 24": 10}
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
    its_own = ["PAGEABLE copy pageable > device 24"] if way.startswith("eager") and step.startswith("decode") else []
    assert found["steps"][f"{way}: {step}"]["copies of the host"] == its_own


@pytest.mark.parametrize("step", LAUNCHES)
def test_no_step_launches_more(found: dict[str, Any], step: str) -> None:
    assert found["steps"][step]["launches"] <= LAUNCHES[step]


def test_no_step_waits_for_a_compiler(found: dict[str, Any]) -> None:
    """Triton's kernels are compiled at start, also those of draws, whose shapes the vocabulary gives."""
    assert found["compiled"] == []


@pytest.mark.parametrize("way", WAYS)
def test_fresh_prompts_are_attended_by_fa3(found: dict[str, Any], way: str) -> None:
    """Once in each of the two layers."""
    assert found["steps"][f"{way}: fresh prompt"]["attended by fa3"] == 2


@pytest.mark.parametrize("graph", NODES)
def test_no_graph_has_more_nodes(found: dict[str, Any], graph: str) -> None:
    """Llama-3-8B has 32 layers: 196 of a decode."""
    assert found["nodes"][graph] == {"of a layer": NODES[graph], "besides": NODES_BESIDES}
