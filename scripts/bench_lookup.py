"""Prompt lookup on and off, one stream: tokens a second where a prompt is repeated with an edit, and on free text.

    .venv/bin/python scripts/bench_lookup.py [MODEL] [--rounds 5]

Both engines live in one process; medians and their ratio are printed.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from miniserve.llm import LLM
from miniserve.sampling_params import SamplingParams
from scripts.harness import flags, in_turns, write

TOKENS = 200
EDIT = "Repeat this file exactly, but call the function `area` instead of `size`:\n\n{}\n"
FREE = [
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain how bread is made, step by step.",
    "What should I see in Lisbon in three days?",
]


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    engines = {lookup: LLM(args.model, prompt_lookup=lookup, max_model_len=4096) for lookup in (False, True)}
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    source = "\n".join(Path(__file__).read_text("utf-8").splitlines()[12:40])
    figures = {}
    for name, questions in (("edit", [EDIT.format(source)]), ("free", FREE)):
        chats = [[{"role": "user", "content": question}] for question in questions]

        def measure(lookup: bool, chats: list = chats) -> tuple[float, list[str]]:
            llm = engines[lookup]
            llm.chat(chats[:1], SamplingParams(temperature=0, max_tokens=1), progress=False)  # the prompt's KV
            started = time.perf_counter()
            answers = [llm.chat([chat], params, progress=False)[0].outputs[0] for chat in chats]
            return len(chats) * TOKENS / (time.perf_counter() - started), [answer.text for answer in answers]

        runs = in_turns(engines, args.rounds, measure, warm_up=1)
        without, used = (statistics.median(rate for rate, _ in found) for found in runs.values())
        same = "the same text" if runs[False][-1][1] == runs[True][-1][1] else "ANOTHER TEXT"
        print(f"{name}: {without:.1f} tok/s without, {used:.1f} with prompt lookup: {used / without:.2f}x, {same}")
        figures[name] = {"without_tok_s": without, "lookup_tok_s": used}
    counters = engines[True].engine.counters
    print(f"held: {counters.held_tokens} of {counters.drafted_tokens} drafted tokens")
    write(args.json, figures)


if __name__ == "__main__":
    main()
