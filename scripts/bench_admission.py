"""How long `Engine.admit` takes in each step while prompts wait that share 30,000 tokens.

    .venv/bin/python scripts/bench_admission.py [--json FILE]

One process, a made-up model, the real engine. "shared": one of 256 such prompts is being computed, the others wait for
its pages. "full": the shared pages are cached, but a stream holds so much that the first of the prompts does not fit.
"""

from __future__ import annotations

import statistics
import sys
import time

from miniserve.kv.eviction import make_order
from miniserve.kv.pages import PagePool
from miniserve.sampling_params import SamplingParams
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import Launched, Work
from scripts.harness import flags, write

PAGE, SHARED, PROMPTS, STEPS = 16, 30_000, 256, 14


class Model:
    """Always says 1."""

    eos: frozenset[int] = frozenset()

    def launch(self, batch: list[Work]) -> Launched:
        sampled = [(1, None) for work in batch if work.samples]
        return lambda: sampled


def engine(pages: int) -> Engine:
    return Engine(
        Model(),
        PagePool(pages, make_order("expected")),
        page_tokens=PAGE,
        max_num_batched_tokens=2048,
        max_num_seqs=PROMPTS,
        max_model_len=SHARED + 1024,
    )


def add(made: Engine, turn: str, tokens: list[int], outputs: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True)
    made.add(Sequence(turn, tokens, params, 0, b""))


def measure(made: Engine) -> dict[str, float]:
    """Milliseconds of `admit` over some steps that admit nothing."""
    took = []
    made.admit()
    for _ in range(STEPS):
        made.step()
        running, started = len(made.running), time.perf_counter()
        made.admit()
        took.append((time.perf_counter() - started) * 1e3)
        assert len(made.running) == running
    return {"median_ms": statistics.median(took), "max_ms": max(took)}


def main() -> int:
    args = flags(__doc__).parse_args()
    text = list(range(SHARED))
    shared = engine(8192)
    for n in range(PROMPTS):
        add(shared, f"t{n}", [*text, n], 8)
    full = engine(3000)
    add(full, "first", text, 1)
    while not full.pool.num_cached:
        full.admit()
        full.step()
    add(full, "stream", [7] * 20_000, 400)
    for n in range(PROMPTS):
        add(full, f"t{n}", [*text, *[n] * 900], 8)
    results = {"shared": measure(shared), "full": measure(full)}
    for name, row in results.items():
        print(f"{name:<8} {row['median_ms']:>8.3f} ms median, {row['max_ms']:>8.3f} ms at most")
    write(args.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
