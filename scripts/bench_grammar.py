"""What one constrained request costs the 15 beside it: the time of a step of 16 decodes, with and without it.

`python scripts/bench_grammar.py [MODEL] [--steps N]`. Rounds with and without take turns, so that a noisy machine is
noisy for both; the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics

from miniserve.llm import LLM
from miniserve.sampling_params import Grammar, SamplingParams
from miniserve.text.grammar import json_grammar
from miniserve.worker.sequence import Sequence

ITEM = {"type": "object", "properties": {"name": {"type": "string"}, "size": {"type": "integer"}}, "required": ["name"]}
WANTED = json_grammar({"type": "array", "items": ITEM, "minItems": 100_000})
"""Never ends within the measurement."""


def round_of(llm: LLM, number: int, wanted: Grammar | None, steps: int) -> list[float]:
    """Seconds of each step of 16 decodes, one of which follows `wanted`."""
    for i in range(16):
        params = SamplingParams(
            temperature=0.8, max_tokens=steps + 8, ignore_eos=True, grammar=wanted if i == 0 else None
        )
        llm.engine.add(Sequence(f"{number}.{i}", [100 + i] * 16, params, number * 16 + i, b""))
    seconds = []
    while llm.engine.waiting or llm.engine.has_work:
        llm.engine.admit()
        took = llm.engine.step().time
        if took is not None and took.decodes == 16:
            seconds.append(took.seconds)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=None, help="1 where others use the cores too")
    args = parser.parse_args()
    llm = LLM(args.model, max_model_len=1024, kv_cache_memory="256MiB", threads=args.threads or 0)
    free: list[float] = []
    bound: list[float] = []
    for number in range(2 * args.rounds + 2):
        found = round_of(llm, number, WANTED if number % 2 else None, args.steps)
        if number >= 2:
            (bound if number % 2 else free).extend(found)
    a, b = statistics.median(free) * 1000, statistics.median(bound) * 1000
    print(f"a step of 16 decodes: {a:.2f} ms without, {b:.2f} ms with one constrained: {100 * (b / a - 1):+.1f} %")
    print(f"({len(free)} and {len(bound)} steps, {args.rounds} rounds each, medians)")


if __name__ == "__main__":
    main()
