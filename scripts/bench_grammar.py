"""What one constrained request costs the 15 beside it: the time of a step of 16 decodes, with and without it.

.venv/bin/python scripts/bench_grammar.py [MODEL] [--steps 60]
"""

from __future__ import annotations

import statistics
from itertools import chain, count

from miniserve.llm import LLM
from miniserve.sampling_params import Grammar, SamplingParams
from miniserve.text.grammar import json_grammar
from miniserve.worker.sequence import Sequence
from scripts.harness import flags, in_turns, write

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
    parser = flags(__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=0, help="1 where others use the cores too")
    args = parser.parse_args()
    llm = LLM(args.model, max_model_len=1024, kv_cache_memory="256MiB", threads=args.threads)
    number = count()

    def measure(constrained: bool) -> list[float]:
        return round_of(llm, next(number), WANTED if constrained else None, args.steps)

    runs = in_turns((False, True), args.rounds, measure, warm_up=1)
    steps = {name: list(chain.from_iterable(found)) for name, found in runs.items()}
    free, bound = (1e3 * statistics.median(seconds) for seconds in steps.values())
    cost = 100 * (bound / free - 1)
    print(f"a step of 16 decodes: {free:.2f} ms without, {bound:.2f} ms with one constrained: {cost:+.1f} %")
    print(f"({len(steps[False])} and {len(steps[True])} steps, {args.rounds} rounds each, medians)")
    write(args.json, {"free_ms": free, "constrained_ms": bound})


if __name__ == "__main__":
    main()
