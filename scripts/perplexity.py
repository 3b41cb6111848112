#!/usr/bin/env python3
"""What fewer bits cost: the perplexity of a text for several models, or for one model in several formats.

    scripts/perplexity.py --model FOLDER --model FOLDER:int8 --model FOLDER:int4 [--text FILE] [--json FILE]

A model is what `LLM` takes; int8, int4 or a dtype may follow after a colon. The first one is the yardstick: `loss` is
by how much the perplexity of another is higher, with its standard error over the tokens, and `same` the share of tokens
where both find the same next token likeliest. Perplexities count tokens, so all models must have one tokenizer.

Perplexity is exp of the mean negative log-likelihood of a token. The text is cut into windows of --window tokens, and
each begins --stride tokens after the one before. A token counts once, in the first window that holds it, so from the
second window on at least window - stride tokens come before it; the first token of the text does not count. This is the
rule of transformers' "Perplexity of fixed-length models".

Steps of few rows multiply codes of 4 and 8 bits as they are, larger ones round the numbers to bf16 first (CPU, native
kernels). `--max-num-batched-tokens 16` computes the text as decodes are computed.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miniserve.hub.check import check_folder
from miniserve.hub.resolve import resolve
from miniserve.llm import LLM
from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import SIZES
from scripts.harness import flags, write

TEXT = Path(__file__).parent / "data" / "prose.txt"
DTYPES = ("bfloat16", "float16", "float32")
SCORED = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1)


@dataclass(frozen=True)
class Scores:
    """What a model makes of a text: of each token that counts its negative log-likelihood (nats) and the token that was
    the likeliest. `tokens` are all ids of the text, `read_bytes` the weights that each step reads."""

    tokens: list[int]
    read_bytes: int
    losses: np.ndarray
    likeliest: np.ndarray

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean())


def windows(count: int, size: int, stride: int) -> list[tuple[int, int, int]]:
    """Begin and end of each window over `count` tokens, and the first token that counts in it."""
    found = [(0, min(size, count), 1)]
    while (end := found[-1][1]) < count:
        begin = found[-1][0] + stride
        found.append((begin, min(begin + size, count), end))
    return found


def score(spec: str, text: str, size: int, stride: int, batched_tokens: int | None) -> Scores:
    """Compute the text in windows of `size` tokens. Raises `ConfigError`."""
    name, _, form = spec.rpartition(":")
    if form not in SIZES and form not in DTYPES:
        name, form = spec, ""
    settings = {"dtype": form} if form in DTYPES else {"quantization": form or None}
    llm = LLM(name, max_model_len=size + 1, max_num_batched_tokens=batched_tokens, **settings)
    tokens = llm.tokenizer.encode(text)
    cut = windows(len(tokens), size, stride)
    done = llm.generate([tokens[begin:end] for begin, end, _ in cut], SCORED)
    counted = []
    for (begin, _, first), output in zip(cut, done, strict=True):
        assert output.prompt_logprobs is not None
        counted += output.prompt_logprobs[first - begin - 1 :]
    losses = np.array([-entry.logprob for entry in counted])
    likeliest = np.array([entry.top[0][0] for entry in counted])
    return Scores(tokens, _read_bytes(llm, name, form), losses, likeliest)


def _read_bytes(llm: LLM, name: str, form: str) -> int:
    """All weights, without an embedding that is not the head too: a step looks up some of its rows."""
    built = llm._built
    _, head_bits = SIZES.get(form, check_folder(resolve(name).folder, dummy=False).bits)
    if built.model.tie_embeddings and (head_bits is None or built.facts.device != "cpu"):
        return built.facts.weights_bytes
    number_bytes = 4 if built.facts.dtype == "float32" else 2
    return built.facts.weights_bytes - built.model.vocab_size * built.model.hidden_size * number_bytes


def compared(scores: Scores, yardstick: Scores) -> dict[str, float]:
    """A row of the table; `loss` and its standard error `loss_error` are shares of the yardstick's perplexity."""
    worse = scores.losses - yardstick.losses
    ratio = math.exp(worse.mean())
    return {
        "read_mib": scores.read_bytes / 2**20,
        "perplexity": scores.perplexity,
        "loss": ratio - 1,
        "loss_error": ratio * worse.std() / math.sqrt(len(worse)),
        "same": float((scores.likeliest == yardstick.likeliest).mean()),
    }


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--model", action="append", required=True, metavar="MODEL[:FORMAT]", help="repeat it")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, metavar="N")
    args = parser.parse_args(argv)
    if not 0 < args.stride < args.window:
        parser.error("--stride must be at least 1, and less than --window")
    text = args.text.read_text("utf-8")
    found: dict[str, Scores] = {}
    for spec in args.model:
        found[spec] = score(spec, text, args.window, args.stride, args.max_num_batched_tokens)
        if found[spec].tokens != found[args.model[0]].tokens:
            parser.error(f"{spec} and {args.model[0]} cut the text into other tokens: give each a run of its own")
    yardstick = found[args.model[0]]
    if not len(yardstick.losses):
        parser.error(f"{args.text} has no token that another comes before")
    rows = {spec: compared(scores, yardstick) for spec, scores in found.items()}
    print(f"{len(yardstick.losses):,} tokens, windows of {args.window}, stride {args.stride}\n")
    print("| model | MiB a step reads | perplexity | loss | same next token |\n|---|---|---|---|---|")
    for spec, row in rows.items():
        loss = f"{100 * row['loss']:z.2f} % (± {100 * row['loss_error']:.2f})" if row is not rows[args.model[0]] else ""
        numbers = f"{row['read_mib']:.0f} | {row['perplexity']:.3f} | {loss} | {100 * row['same']:.1f} %"
        print(f"| {Path(spec).name} | {numbers} |")
    settings = {name: getattr(args, name) for name in ("window", "stride", "max_num_batched_tokens")}
    write(args.json, {**settings, "tokens": len(yardstick.losses), "models": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
