#!/usr/bin/env python3
"""Ten turns of an agent on a hybrid model: what each turn computes, with snapshots of recurrent state and without.

  scripts/bench_snapshots.py --model qwen3.5-0.8b --first 600 --new 150 --json FILE.json

The weights are random, so texts mean nothing. The template is one that drops earlier reasoning: a prompt is the last
one, the end of the answer before, and what is new; the answer's beginning, its reasoning, is gone. Without snapshots
each turn computes its whole prompt, as servers do that cannot cut a recurrent state.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from miniserve.cluster.messages import Keep
from miniserve.config import EngineConfig, format_bytes
from miniserve.hub.resolve import resolve
from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import build
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence

REASONING, SPOKEN = 24, 24
"""Tokens of an answer that the next prompt leaves out, and that it keeps."""


def conversation(engine: Engine, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The turns of one conversation, one after the other."""
    pick, turns = random.Random(1), []
    prompt = pick.choices(range(1000, 9000), k=args.first)
    params = SamplingParams(temperature=0, max_tokens=REASONING + SPOKEN, ignore_eos=True)
    for number in range(args.turns):
        sequence = Sequence(f"t{number}", prompt, params, 0, b"root", keep=Keep("agent", gap=10.0))
        engine.add(sequence)
        began, first = time.perf_counter(), 0.0
        while engine.find(sequence.turn):
            engine.admit()
            engine.step()
            if not first and sequence.num_outputs:
                first = time.perf_counter() - began
        assert engine.snapshots is not None
        kept = engine.pool.snapshot_pages // engine.snapshots.slots.pages
        computed = len(prompt) - (sequence.cached or 0)
        turns.append({"prompt": len(prompt), "computed": computed, "ttft": first, "snapshots": kept})
        answer = sequence.tokens[sequence.given :]
        prompt = prompt + answer[REASONING:] + pick.choices(range(1000, 9000), k=args.new)
    return turns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3.5-0.8b")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--first", type=int, default=600, help="tokens of the first prompt")
    parser.add_argument("--new", type=int, default=150, help="tokens that each later prompt adds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = resolve(args.model, load_format="dummy").folder
    config = EngineConfig(model=str(folder), load_format="dummy", max_num_seqs=4, max_model_len=8192)
    made = build(config)
    engine = made.engine
    assert engine.snapshots is not None, "the model has no recurrent state"
    size = engine.snapshots.slots.pages * made.memory.shape.bytes
    found = {"with": conversation(engine, args)}
    engine.reset()
    engine.snapshots.find = lambda sequence, most, now: (0, [], [])  # type: ignore[method-assign]
    found["without"] = conversation(engine, args)
    facts = made.facts
    print(
        f"{args.model}, {facts.dtype}, {facts.kernels} kernels, {facts.threads} threads; "
        f"a snapshot: {format_bytes(size)}"
    )
    print(
        f"{'turn':>4} {'prompt':>7} | {'computed':>8} {'TTFT, s':>8} {'snapshots':>9} | {'computed':>8} {'TTFT, s':>8}"
    )
    for number, (on, off) in enumerate(zip(found["with"], found["without"], strict=True), 1):
        print(
            f"{number:4} {on['prompt']:7} | {on['computed']:8} {on['ttft']:8.2f} {on['snapshots']:9} |"
            f" {off['computed']:8} {off['ttft']:8.2f}"
        )
    later = [statistics.median(turn["ttft"] for turn in found[name][1:]) for name in ("with", "without")]
    print(f"median TTFT of later turns: {later[0]:.2f} s with snapshots, {later[1]:.2f} s without")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "snapshot_bytes": size, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
