"""What reaches the device in single steps of a model in Llama-3-8B's shape, and what makes the host wait."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from triton import knobs

from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import Built
from scripts.gpu.common import add
from tests.gpu_stand_in.programs.common import begin, end, engine, fresh, tokens_come
from tests.support.fake_cuda.device import logged
from tests.support.fake_cuda.log import Line, Log

LAYERS = 2
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=4000, ignore_eos=True),
    "drawn": SamplingParams(temperature=0.6, max_tokens=4000, ignore_eos=True, seed=1),
    "filtered": SamplingParams(
        temperature=0.6, top_p=0.9, top_k=50, min_p=0.01, logprobs=3, max_tokens=4000, ignore_eos=True, seed=1
    ),
    "penalized": SamplingParams(
        temperature=0.0,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        logit_bias={5: 1.0},
        max_tokens=4000,
        ignore_eos=True,
    ),
}


def model_begins(lines: list[Line]) -> tuple[int, int]:
    """The line and the number of the operation with which the model of a step begins: a graph, or its first norm."""
    model = "graph", "RMSNorm"
    operations = [(at, line) for at, line in enumerate(lines) if line.kind == "L"]
    return next((at, line.number) for at, line in operations if any(name in line.what for name in model))


def seen(before: Log, log: Log) -> dict[str, Any]:
    """What one step's `log` holds, after that of the step `before`. Waits for the model of the step before, in the time
    until this one's is launched, and waits for this one's model."""
    operations, waits = log.of("L"), log.of("S")
    at, launched = model_begins(log.lines)
    running = model_begins(before.lines)[1] if before.lines else launched
    early, late = ([line for line in part if line.kind == "S"] for part in (log.lines[:at], log.lines[at:]))
    assert len(early) + len(late) == len(waits)
    return {
        "launches": len(operations),
        "copies of the host": [line.what for line in operations if line.what.startswith(("PAGEABLE", "WAITING"))],
        "memory": [line.what for line in log.of("M")],
        "waits before the launch": [wait.what for wait in early if wait.clock.get(0, 0) >= running],
        "waits after the launch": [wait.what for wait in late if wait.clock.get(0, 0) >= launched],
    }


def steps(built: Built) -> Iterator[tuple[str, dict[str, Any]]]:
    """Decodes with each way of sampling, then an append of 67 tokens to 16k that are cached, and a prompt of 2,000 of
    which nothing is."""
    running = built.engine
    for name, params in SAMPLINGS.items():
        turns = [f"{name} {i}" for i in range(5)]
        begin(running, turns, fresh(5, 300, seed=len(name)), params)
        for _ in range(20):
            tokens_come(running)
        with logged() as before:
            tokens_come(running)
        with logged() as log:
            tokens_come(running)
        yield f"decode, {name}", seen(before, log)
        end(running, turns)
    history = fresh(1, 16384, seed=7)[0]
    for repeat in range(3):
        turn = f"append {repeat}"
        add(running, turn, history + fresh(1, 67, seed=repeat)[0], SAMPLINGS["greedy"])
        running.admit()
        while running.find(turn).to_launch > 67:  # type: ignore[union-attr]
            running.step()
        with logged() as log:
            running.step()
        tokens_come(running)
        end(running, [turn])
    yield "append", seen(Log(), log)
    for repeat in range(2):  # the first one takes memory
        add(running, "fresh", fresh(1, 2000, seed=100 + repeat)[0], SAMPLINGS["greedy"])
        running.admit()
        with logged() as log:
            running.step()
        tokens_come(running)
        end(running, ["fresh"])
    attended = sum("PrefillWithKVCacheKernel" in line.what and "Ragged" in line.what for line in log.of("L"))
    yield "fresh prompt", seen(Log(), log) | {"attended by fa3": attended}


def nodes_of_a_graph(preset: str, layers: int, size: int) -> int:
    """Nodes of the graph of so many decodes, which is recorded first."""
    with logged() as log:
        engine(preset, layers, max_model_len=2048, max_num_seqs=size)
    # Each ends with the copy of its logits.
    return next(at for at, line in enumerate(log.of("C"), 1) if line.what.startswith("copy"))


def main() -> None:
    found: dict[str, Any] = {}
    compiled: list[str] = []
    for eager in (False, True):
        for overlap in (True, False):
            # Its own context is 8,192 tokens; the length changes nothing else of its shape.
            shape, way = {"max_position_embeddings": 40960}, {"enforce_eager": eager, "async_scheduling": overlap}
            built = engine("llama-3-8b", LAYERS, shape, max_model_len=20480, **way)
            name = f"{'eager' if eager else 'graphs'}, {'overlap' if overlap else 'no overlap'}"
            knobs.runtime.jit_post_compile_hook = lambda repr, **more: compiled.append(repr)
            found |= {f"{name}: {step}": what for step, what in steps(built)}
            knobs.runtime.jit_post_compile_hook = None
            del built
    nodes = {}
    for preset, size in (("llama-3-8b", 1), ("llama-3-8b", 16), ("llama-3-8b", 24), ("qwen3-8b", 16), ("qwen3-8b", 24)):
        few, more = (nodes_of_a_graph(preset, layers, size) for layers in (2, 4))
        nodes[f"{preset}, {size}"] = {"of a layer": (more - few) / 2, "besides": 2 * few - more}
    print(json.dumps({"steps": found, "nodes": nodes, "compiled": compiled}))


if __name__ == "__main__":
    main()
