"""Prompt lookup on and off, one stream: tokens a second where a prompt is repeated with an edit, and on free text.

    .venv/bin/python scripts/bench_lookup.py [MODEL] [--rounds 5]

Both engines live in one process and take turns, round by round; medians and the ratio of the medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from miniserve.llm import LLM
from miniserve.sampling_params import SamplingParams

TOKENS = 200
EDIT = "Repeat this file exactly, but call the function `area` instead of `size`:\n\n{}\n"
FREE = [
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain how bread is made, step by step.",
    "What should I see in Lisbon in three days?",
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    engines = {lookup: LLM(args.model, prompt_lookup=lookup, max_model_len=4096) for lookup in (False, True)}
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    source = "\n".join(Path(__file__).read_text("utf-8").splitlines()[12:40])
    for name, questions in (("edit", [EDIT.format(source)]), ("free", FREE)):
        rates: dict[bool, list[float]] = {False: [], True: []}
        texts: dict[bool, list[str]] = {}
        for _ in range(args.rounds + 1):
            for lookup, llm in engines.items():
                chats = [[{"role": "user", "content": question}] for question in questions]
                llm.chat(chats[:1], SamplingParams(temperature=0, max_tokens=1), progress=False)  # the prompt's KV
                started = time.perf_counter()
                answers = [llm.chat([chat], params, progress=False)[0].outputs[0] for chat in chats]
                rates[lookup].append(len(questions) * TOKENS / (time.perf_counter() - started))
                texts[lookup] = [answer.text for answer in answers]
        without, used = (statistics.median(rates[lookup][1:]) for lookup in (False, True))
        same = "the same text" if texts[False] == texts[True] else "ANOTHER TEXT"
        print(f"{name}: {without:.1f} tok/s without, {used:.1f} with prompt lookup: {used / without:.2f}x, {same}")
    counters = engines[True].engine.counters
    print(f"held: {counters.held_tokens} of {counters.drafted_tokens} drafted tokens")


if __name__ == "__main__":
    main()
