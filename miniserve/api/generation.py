"""The choices of one request while they run: from the engine's tokens to parts of an answer. And what each of the APIs
has of its own: how it makes prompts of a request, and how its answers look.

The way of a turn: a route of app.py calls `Service`, which prepares what the `Renderer` gives and starts a `Generation`
with it; the `ResponseWriter` makes the answer of the generation, whole or as a stream of events.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, NamedTuple, Protocol

from miniserve.api.errors import ApiError
from miniserve.cluster.messages import Ended, Failed, FirstToken, TokenLogprob, Tokens, TurnOutput
from miniserve.dispatcher import EngineError, TurnStream
from miniserve.monitor.metrics import Metrics
from miniserve.sampling_params import SamplingParams
from miniserve.text.detokenizer import IncrementalDetokenizer
from miniserve.text.reader import Part, Reader, merged
from miniserve.text.tokenizer import Tokenizer

Finish = Literal["stop", "length", "tool_calls"]
Prompts = list[tuple[list[int], SamplingParams]]
"""Token ids and parameters of each."""
Submit = Callable[[list[int], SamplingParams, int], TurnStream]
"""Starts a turn, given its prompt, its parameters, and the choice's index. Raises `EngineError`."""


class Choice:
    """One choice: its counts so far, and the parts, tokens and log-probabilities that its writer has not taken yet."""

    def __init__(
        self, index: int, prompt: list[int], params: SamplingParams, tokenizer: Tokenizer, reader: Reader | None = None
    ) -> None:
        """Without a `reader` all text is content."""
        self.index = index
        self.prompt = prompt
        self.params = params
        self.turn: TurnStream | None = None
        self.began = 0.0
        self.output_tokens = self.cached_tokens = self.reasoning_tokens = 0
        self.thinks = reader is not None and reader.thinking
        self._reader = reader
        self._words = IncrementalDetokenizer(tokenizer, params, reader.visible if reader else frozenset())
        self.parts: list[Part] = []
        self.tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []

    @property
    def finish(self) -> Finish | None:
        """Why it has ended; None while it goes on."""
        ended = self._words.finish
        if self._reader is not None and (self._reader.done or (ended == "stop" and self._reader.called)):
            return "tool_calls"
        return ended

    @property
    def stop_reason(self) -> str | int | None:
        return self._words.stop_reason

    def take(self) -> tuple[list[Part], list[TokenLogprob]]:
        """The parts of the answer since the last time, and the log-probabilities of their tokens if the request wants
        any. Neighbours are never of the same kind, unless they are calls."""
        parts, logprobs = self.parts, self._logprobs
        self.parts, self._logprobs = [], []
        return merged(parts), logprobs

    def take_tokens(self) -> list[int]:
        tokens, self.tokens = self.tokens, []
        return tokens

    def feed(self, out: FirstToken | Tokens | Ended) -> None:
        if isinstance(out, FirstToken):
            self.cached_tokens = out.cached_tokens
            self.prompt_logprobs = out.prompt_logprobs or self.prompt_logprobs
        text, count = self._words.feed(out)
        self.output_tokens += count
        self.tokens += out.tokens[:count]
        self._logprobs += (out.logprobs or [])[:count]
        if (reader := self._reader) is None:
            self.parts += [text] if text else []
            return
        thinking, tokens = reader.thinking, out.tokens[:count]
        self.parts += reader.read(text, final=self._words.finish is not None)
        if thinking and reader.has_thought:
            last = reader.ends if not reader.thinking else None
            self.reasoning_tokens += tokens.index(last) + 1 if last in tokens else len(tokens)


def given(output: TurnOutput) -> FirstToken | Tokens | Ended:
    """`output` if it brings tokens. Raises `ApiError` or `EngineError` if the engine has given up."""
    if isinstance(output, Failed):
        if output.invalid:
            raise ApiError(400, output.error)
        raise ApiError(500, output.error or "The engine failed at this request.", code="engine_failure")
    if isinstance(output, Ended) and output.finish == "abort":
        raise EngineError("The server is stopping and has ended this request: send it again.")
    return output


class Generation(AbstractAsyncContextManager):
    """All choices of a request. Use it as an async context: leaving it ends the turns that still run. Each prompt has
    `n` choices, in order. The first choice of a prompt starts at once, and the others with its first token, when they
    find the prompt in the prefix cache."""

    def __init__(
        self,
        prompts: Prompts,
        submit: Submit,
        tokenizer: Tokenizer,
        metrics: Metrics,
        arrived: float,
        reader: Callable[[list[int]], Reader | None] = lambda prompt: None,
        begun: Callable[[Choice], None] = lambda choice: None,
    ) -> None:
        """`arrived` is when the request arrived (`time.perf_counter`), `reader` makes a reader of one answer to a
        prompt, `begun` gets each choice with its first token."""
        self._submit = submit
        self._begun = begun
        self._metrics = metrics
        self._arrived = arrived
        self._tasks: list[asyncio.Task[None]] = []
        self._news: asyncio.Queue[Choice | Exception] = asyncio.Queue()
        self._groups = [
            [Choice(p * params.n + i, prompt, params.nth(i), tokenizer, reader(prompt)) for i in range(params.n)]
            for p, (prompt, params) in enumerate(prompts)
        ]
        self.choices = [choice for group in self._groups for choice in group]

    def start(self) -> None:
        """Submit the first choice of each prompt. Raises `EngineError`; then nothing runs."""
        try:
            for group in self._groups:
                self._begin(group[0], siblings=group[1:])
        except Exception:
            self._cancel()
            raise

    async def __aexit__(self, *error: object) -> None:
        self._cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def updates(self) -> AsyncIterator[list[Choice]]:
        """The choices that have gone on since the last time, until all have ended. Raises what a choice failed with."""
        running = len(self.choices)
        while running:
            news = [await self._news.get(), *(self._news.get_nowait() for _ in range(self._news.qsize()))]
            if updated := [*dict.fromkeys(one for one in news if isinstance(one, Choice))]:
                running -= sum(choice.finish is not None for choice in updated)
                yield updated
            for failure in (one for one in news if isinstance(one, Exception)):
                raise failure

    async def finish(self) -> None:
        async for _ in self.updates():
            pass

    def _begin(self, choice: Choice, siblings: list[Choice]) -> None:
        choice.began = time.perf_counter()
        choice.turn = self._submit(choice.prompt, choice.params, choice.index)
        self._tasks.append(asyncio.create_task(self._follow(choice, choice.turn, siblings)))

    async def _follow(self, choice: Choice, turn: TurnStream, siblings: list[Choice]) -> None:
        first = before = None
        try:
            async for output in turn:
                out = given(output)
                had = choice.output_tokens
                choice.feed(out)
                now = time.perf_counter()
                if first is None or before is None:
                    first, prefill = now, out.prefill if isinstance(out, FirstToken) else 0.0
                    self._metrics.first_token(now - self._arrived, len(choice.prompt))
                    self._begun(choice)
                    for sibling in siblings:
                        sibling.prompt_logprobs = choice.prompt_logprobs
                        self._begin(sibling, [])
                elif had and out.tokens:
                    self._metrics.observe(inter_token_latency_seconds=now - before)
                self._metrics.generated.inc(len(out.tokens))
                before = now
                self._news.put_nowait(choice)
                if choice.finish is not None:
                    if not isinstance(out, Ended):  # by a stop string or a last call, which the engine does not know
                        turn.cancel()
                    self._metrics.ended("length" if choice.finish == "length" else "stop", self._arrived)
                    return self._measure(choice, first - choice.began, prefill, now - first)
            raise EngineError("The engine has lost this request: send it again.")
        except Exception as error:
            self._metrics.ended("error", self._arrived)
            turn.cancel()
            choice.turn = None
            self._news.put_nowait(error)

    def _measure(self, choice: Choice, first_token: float, prefill: float, decode: float) -> None:
        """`choice` has ended: its first token came after `first_token` seconds, with `prefill` of them spent on it."""
        count = choice.output_tokens
        self._metrics.observe(
            request_queue_time_seconds=max(first_token - prefill, 0.0),
            request_prefill_time_seconds=prefill,
            request_decode_time_seconds=decode,
            request_inference_time_seconds=prefill + decode,
            request_time_per_output_token_seconds=decode / (count - 1) if count > 1 else None,
            request_prompt_tokens=len(choice.prompt),
            request_generation_tokens=count,
            request_params_max_tokens=choice.params.max_tokens,
        )
        group = self._groups[choice.index // choice.params.n]
        if all(one.finish is not None for one in group):
            longest = max(one.output_tokens for one in group)
            self._metrics.observe(request_params_n=len(group), request_max_num_generation_tokens=longest)

    def _cancel(self) -> None:
        for choice in self.choices:
            if choice.turn is not None and choice.finish is None:
                choice.turn.cancel()
                choice.turn = None
                self._metrics.ended("abort", self._arrived)
        for task in self._tasks:
            task.cancel()


class AnswerHead(NamedTuple):
    """What an answer and all chunks of a stream begin with. `created` is in seconds of Unix time."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class Renderer(Protocol):
    """How prompts, parameters and readers come from one request. Errors about a prompt name `prompt_field`; `relaxed`
    names what of the request turned out not to have (all of) its effect."""

    prompt_field: str
    relaxed: set[str]

    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt. Slow: not for the event loop. Raises `ParameterError`."""

    def params(self, params: SamplingParams, prompt: list[int]) -> SamplingParams:
        """`params` with what only this prompt needs. Slow: not for the event loop. Raises `ParameterError`."""

    def reader(self, prompt: list[int]) -> Reader | None:
        """A reader of one answer to `prompt`; None if all text is content."""


class ResponseWriter(Protocol):
    """How the answer to one request looks in one of the APIs. `ping` is what a stream says that has nothing to say."""

    head: AnswerHead
    ping: bytes

    def response(self, generation: Generation) -> Mapping[str, Any]:
        """The whole answer as a JSON object, when all choices have ended."""

    def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        """All server-sent events, those to be sent together as one piece. Raises what a choice failed with."""

    def error_events(self, error: ApiError) -> bytes:
        """The events that end a stream that has failed."""
