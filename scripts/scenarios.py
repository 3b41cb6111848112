"""Four scenarios for one server: prefill, decode, streams side by side, a second turn.

They ask what a user of one conversation sees, so that servers can be compared (scripts/bench_peers.py). Every prompt is
a chat of random words that begins with a random number: only the second turn of `turn2` finds tokens in a prefix cache.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path

import aiohttp

from miniserve.bench.replay.answer import Answer, TurnError, ask
from miniserve.bench.replay.metrics import TurnTimes, percentile
from miniserve.bench.replay.server import TargetServer
from miniserve.text.tokenizer import Tokenizer

# fmt: off
WORDS = (
    "answer", "bread", "bridge", "city", "color", "country", "dinner", "doctor", "door", "evening", "family",
    "farmer", "forest", "garden", "glass", "horse", "house", "island", "kitchen", "lake", "letter", "market",
    "morning", "mountain", "music", "number", "paper", "people", "picture", "question", "river", "road",
    "school", "season", "shadow", "snow", "song", "star", "stone", "street", "summer", "table", "teacher",
    "train", "tree", "village", "wall", "water", "window", "winter",
)
# fmt: on
SHORT_PROMPT = 64
STREAM_TOKENS = 64
REST_SECONDS = 0.3
"""Between the turns of `turn2`."""

Figures = dict[str, float | None]


class RandomPrompts:
    """Token ids of prompts that share nothing, for the model whose tokenizer is in `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._tokenizer = Tokenizer.load(folder)
        self._random = random.Random(seed)

    def words(self, count: int) -> list[int]:
        """`count` tokens of words."""
        text = "".join(f" {word}" for word in self._random.choices(WORDS, k=count))
        return self._tokenizer.encode(text, add_special_tokens=False)[:count]

    def chat(self, count: int) -> list[int]:
        """A chat of `count` tokens as the model's template renders it; more if the template alone is longer."""
        system = {"role": "system", "content": f"Chat {self._random.randrange(10**9)}"}
        bread, water = (
            self._tokenizer.chat([system, {"role": "user", "content": word}]) for word in ("bread", "water")
        )
        before = _common_start(bread, water)
        after = _common_start(bread[::-1], water[::-1])[::-1]
        return [*before, *self.words(max(count - len(before) - len(after), 0)), *after]


def _common_start(one: list[int], other: list[int]) -> list[int]:
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


class Scenarios:
    """The scenarios on one server. Each raises `TurnError` if a turn fails, but for `concurrent` with some failures."""

    def __init__(
        self, http: aiohttp.ClientSession, server: TargetServer, prompts: RandomPrompts, timeout: float = 120.0
    ) -> None:
        self._http = http
        self._server = server
        self._prompts = prompts
        self._timeout = timeout

    async def turn(self, prompt: list[int], output: int) -> tuple[TurnTimes, Answer]:
        """`output` greedy tokens after the prompt."""
        answer = Answer(len(prompt))
        post = partial(self._http.post, self._server.generate_url, data=self._server.body(prompt, output))
        turn = await ask(post, self._server, answer, self._timeout)
        if turn.error:
            raise TurnError(turn.error)
        return turn, answer

    async def warm_up(self) -> None:
        """A turn that does not count."""
        await self.turn(self._prompts.chat(SHORT_PROMPT), 8)

    async def prefill(self, tokens: int) -> Figures:
        """A prompt of `tokens` and one token of output: prompt tokens a second until it comes."""
        turn, _ = await self.turn(self._prompts.chat(tokens), 1)
        return {
            "prompt_tokens": turn.prompt,
            "cached_tokens": turn.cached,
            "ttft_s": turn.ttft,
            "prefill_tok_s": turn.prompt / turn.ttft,
        }

    async def decode(self, output: int = 128) -> Figures:
        """One stream of `output` tokens: tokens a second after the first one, and the gaps between events."""
        turn, answer = await self.turn(self._prompts.chat(SHORT_PROMPT), output)
        gaps = sorted(b - a for a, b in pairwise(answer.times))
        return {
            "output_tokens": turn.output,
            "ttft_s": turn.ttft,
            "decode_tok_s": _rate(turn),
            "gap_p50_s": percentile(gaps, 0.5) if gaps else None,
            "gap_p99_s": percentile(gaps, 0.99) if gaps else None,
            "e2e_s": turn.last - turn.sent,
        }

    async def concurrent(self, streams: int) -> Figures:
        """Streams that start together; those that fail are `errors`. Raises `TurnError` if all do."""
        prompts = [self._prompts.chat(SHORT_PROMPT) for _ in range(streams)]
        ended = await asyncio.gather(*(self.turn(p, STREAM_TOKENS) for p in prompts), return_exceptions=True)
        done = [pair for pair in ended if isinstance(pair, tuple)]
        failures = [error for error in ended if isinstance(error, BaseException)]
        if raised := [error for error in failures if not done or not isinstance(error, TurnError)]:
            raise raised[0]
        return {"streams": streams, "errors": len(failures), **side_by_side(done)}

    async def turn2(self, history: int = 2048, new: int = 64, output: int = 8) -> Figures:
        """A prompt of `history` tokens, then the same with its answer and `new` tokens more: the TTFT of both, and that
        of a prompt as long as the second one of which nothing is cached."""
        prompt = self._prompts.chat(history)
        first, answer = await self.turn(prompt, output)
        prompt += answer.ids + self._prompts.words(max(first.output - len(answer.ids), 0) + new)
        await asyncio.sleep(REST_SECONDS)
        second, _ = await self.turn(prompt, output)
        await asyncio.sleep(REST_SECONDS)
        cold, _ = await self.turn(self._prompts.chat(len(prompt)), output)
        return {
            "turn1_ttft_s": first.ttft,
            "turn2_prompt_tokens": second.prompt,
            "turn2_cached_tokens": second.cached,
            "turn2_ttft_s": second.ttft,
            "cold_ttft_s": cold.ttft,
            "speedup": cold.ttft / second.ttft,
        }


def side_by_side(streams: Sequence[tuple[TurnTimes, Answer]]) -> Figures:
    """`output_tok_s` counts all tokens from the first request to the last token, prefill included; `decode_tok_s` adds
    up the streams' own rates; `steady_tok_s` counts what comes while all streams decode (None if they never do)."""
    turns = [turn for turn, _ in streams]
    times = [at for _, answer in streams for at in answer.times]
    output = sum(turn.output for turn in turns)
    start, end = max(turn.first for turn in turns), min(turn.last for turn in turns)
    within = sum(start < at <= end for at in times) * output / max(len(times), 1)
    return {
        "output_tokens": output,
        "output_tok_s": output / (max(turn.last for turn in turns) - min(turn.sent for turn in turns)),
        "decode_tok_s": sum(map(_rate, turns)),
        "steady_tok_s": within / (end - start) if end > start else None,
        "ttft_p50_s": percentile(sorted(turn.ttft for turn in turns), 0.5),
        "ttft_max_s": max(turn.ttft for turn in turns),
    }


def _rate(turn: TurnTimes) -> float:
    """Tokens a second after the first one."""
    return (turn.output - 1) / max(turn.last - turn.first, 1e-9)
