"""Four scenarios for one server: prefill, decode, streams side by side, a second turn.

They ask what a user of one conversation sees, so that servers can be compared (scripts/bench_peers.py). Every prompt is
a chat of random words that begins with a random number: only the second turn of `turn2` finds tokens in a prefix cache.
"""

from __future__ import annotations

import asyncio
import random
import time
from itertools import pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import aiohttp

from miniserve.bench.replay.answer import Answer, TurnError, ask
from miniserve.bench.replay.metrics import percentile
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


class Prompts:
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


class TimedTurn(NamedTuple):
    """A turn that is over. Times are in seconds, `sent` and `ended` by `time.monotonic`."""

    prompt: list[int]
    sent: float
    ended: float
    answer: Answer

    @property
    def first(self) -> float:
        """When its first token came; when it ended if none had text."""
        return self.answer.times[0] if self.answer.times else self.ended

    @property
    def last(self) -> float:
        return self.answer.times[-1] if self.answer.times else self.ended

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first one."""
        return (self.answer.output - 1) / max(self.last - self.first, 1e-9)

    @property
    def prompt_tokens(self) -> int:
        """By the server's count, if it reports one."""
        return self.answer.usage.prompt if self.answer.usage else len(self.prompt)

    @property
    def cached_tokens(self) -> int:
        """Tokens found in a prefix cache; 0 if the server does not report them."""
        return (self.answer.usage.cached if self.answer.usage else None) or 0


class Scenarios:
    """The scenarios on one server. Each raises `TurnError` if a turn fails, but for `concurrent` with some failures."""

    def __init__(
        self, http: aiohttp.ClientSession, server: TargetServer, prompts: Prompts, timeout: float = 120.0
    ) -> None:
        self._http = http
        self._server = server
        self._prompts = prompts
        self._timeout = timeout

    async def turn(self, prompt: list[int], output: int) -> TimedTurn:
        """`output` greedy tokens after the prompt."""
        body, answer = self._server.body(prompt, output, {}), Answer()
        sent = time.monotonic()
        await ask(self._http, self._server, body, answer, self._timeout)
        return TimedTurn(prompt, sent, time.monotonic(), answer)

    async def warm_up(self) -> None:
        """A turn that does not count."""
        await self.turn(self._prompts.chat(SHORT_PROMPT), 8)

    async def prefill(self, tokens: int) -> Figures:
        """A prompt of `tokens` and one token of output: prompt tokens a second until it comes."""
        turn = await self.turn(self._prompts.chat(tokens), 1)
        return {
            "prompt_tokens": turn.prompt_tokens,
            "cached_tokens": turn.cached_tokens,
            "ttft_s": turn.ttft,
            "prefill_tok_s": turn.prompt_tokens / turn.ttft,
        }

    async def decode(self, output: int = 128) -> Figures:
        """One stream of `output` tokens: tokens a second after the first one, and the gaps between events."""
        turn = await self.turn(self._prompts.chat(SHORT_PROMPT), output)
        gaps = sorted(b - a for a, b in pairwise(turn.answer.times))
        return {
            "output_tokens": turn.answer.output,
            "ttft_s": turn.ttft,
            "decode_tok_s": turn.decode_rate,
            "gap_p50_s": percentile(gaps, 0.5) if gaps else None,
            "gap_p99_s": percentile(gaps, 0.99) if gaps else None,
            "e2e_s": turn.ended - turn.sent,
        }

    async def concurrent(self, streams: int) -> Figures:
        """Streams that start together. `output_tok_s` counts all tokens from the first request to the last token,
        prefill included; `decode_tok_s` adds up the streams' own rates; `steady_tok_s` counts what comes while all
        streams decode. Streams that fail are `errors` and left out; raises `TurnError` if all do."""
        prompts = [self._prompts.chat(SHORT_PROMPT) for _ in range(streams)]
        ended = await asyncio.gather(*(self.turn(p, STREAM_TOKENS) for p in prompts), return_exceptions=True)
        turns = [turn for turn in ended if isinstance(turn, TimedTurn)]
        failures = [error for error in ended if isinstance(error, BaseException)]
        if unexpected := [error for error in failures if not turns or not isinstance(error, TurnError)]:
            raise unexpected[0]
        output = sum(turn.answer.output for turn in turns)
        start, end = max(turn.first for turn in turns), min(turn.last for turn in turns)
        times = [at for turn in turns for at in turn.answer.times]
        within = sum(start < at <= end for at in times) * output / max(len(times), 1)
        return {
            "streams": streams,
            "errors": len(failures),
            "output_tokens": output,
            "output_tok_s": output / (max(turn.last for turn in turns) - min(turn.sent for turn in turns)),
            "decode_tok_s": sum(turn.decode_rate for turn in turns),
            "steady_tok_s": within / (end - start) if end > start else None,
            "ttft_p50_s": percentile(sorted(turn.ttft for turn in turns), 0.5),
            "ttft_max_s": max(turn.ttft for turn in turns),
        }

    async def turn2(self, history: int = 2048, new: int = 64, output: int = 8) -> Figures:
        """A prompt of `history` tokens, then the same with its answer and `new` tokens more: the TTFT of both, and that
        of a prompt as long as the second one of which nothing is cached."""
        first = await self.turn(self._prompts.chat(history), output)
        said = first.answer.ids + self._prompts.words(max(first.answer.output - len(first.answer.ids), 0))
        await asyncio.sleep(REST_SECONDS)
        second = await self.turn(first.prompt + said + self._prompts.words(new), output)
        await asyncio.sleep(REST_SECONDS)
        cold = await self.turn(self._prompts.chat(len(second.prompt)), output)
        return {
            "turn1_ttft_s": first.ttft,
            "turn2_prompt_tokens": second.prompt_tokens,
            "turn2_cached_tokens": second.cached_tokens,
            "turn2_ttft_s": second.ttft,
            "cold_ttft_s": cold.ttft,
            "speedup": cold.ttft / second.ttft,
        }
