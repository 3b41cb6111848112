"""Answers of chat and text completions: whole, or as a stream of chunks of choices with `[DONE]` at the end."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from miniserve.api.errors import ApiError
from miniserve.api.generation import AnswerHead, Choice, Generation
from miniserve.api.openai.parameters import GenerationRequest, StreamOptions
from miniserve.api.streaming import COMMENT, data_event
from miniserve.cluster.messages import TokenLogprob
from miniserve.text.reader import Part
from miniserve.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks; as in OpenAI's answers and vLLM's."""


@dataclass(eq=False)
class ChunkWriter(ABC):
    """The part of a `ResponseWriter` that chat and text completions share. `objects` names a whole answer and a chunk.
    If the request asks for token ids, chunks hold them, and each token has a chunk even if it has no text (yet)."""

    ping = COMMENT
    objects: ClassVar[tuple[str, str]]

    head: AnswerHead
    tokenizer: Tokenizer
    request: GenerationRequest

    @abstractmethod
    def shown(
        self, choice: Choice, parts: list[Part], logprobs: list[TokenLogprob], *, chunk: bool, ended: bool
    ) -> Mapping[str, Any]:
        """The choice with these parts: all of them, or in a `chunk` the next one, or none when it has `ended`."""

    @abstractmethod
    def opening(self, choice: Choice) -> Mapping[str, Any] | None:
        """The choice before anything was generated; None if no chunk is needed then."""

    def beside(self, choice: Choice) -> Mapping[str, Any]:
        """Further fields beside the choices of a whole answer, or beside the opening of this one."""
        return {}

    def response(self, generation: Generation) -> Mapping[str, Any]:
        return {
            "object": self.objects[0],
            **self.head._asdict(),
            "choices": [self.shown(one, *one.take(), chunk=False, ended=True) for one in generation.choices],
            "usage": usage(generation.choices),
            **self.beside(generation.choices[0]),
        }

    async def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        head = {"object": self.objects[1], **self.head._asdict()}
        options = self.request.stream_options or StreamOptions()
        with_usage, continuous = options.include_usage, options.continuous_usage_stats

        def event(choice: Choice, chunk: Mapping[str, Any], opening: bool = False, **beside: Any) -> bytes:
            used = {"usage": usage([choice], opening) if continuous else None} if with_usage else {}
            return data_event({**head, **beside, "choices": [chunk], **used})

        yield b"".join(
            event(choice, opening, True, **self.beside(choice))
            for choice in generation.choices
            if (opening := self.opening(choice)) is not None
        )
        async for updated in generation.updates():
            chunks: list[bytes] = []
            for choice in updated:
                by_token = self.request.return_token_ids and bool(choice.tokens)
                if not (choice.parts or by_token or choice.finish is not None):
                    continue
                parts, logprobs = choice.take()
                for part in parts or ([""] if logprobs or by_token else []):
                    # The first part that tokens have made carries what belongs to these tokens.
                    chunks.append(event(choice, self.shown(choice, [part], logprobs, chunk=True, ended=False)))
                    logprobs = []
                if choice.finish is not None:
                    chunks.append(event(choice, self.shown(choice, [], [], chunk=True, ended=True)))
            if chunks:
                yield b"".join(chunks)
        if with_usage:
            yield data_event({**head, "choices": [], "usage": usage(generation.choices)})
        yield DONE

    def error_events(self, error: ApiError) -> bytes:
        return data_event(error.body) + DONE


def usage(choices: Sequence[Choice], opening: bool = False) -> dict[str, Any]:
    """What choices of a request have used so far, an `opening` no output yet. They share prompts, which count once."""
    prompts = choices[:: choices[0].params.n]
    prompt_tokens = sum(len(choice.prompt) for choice in prompts)
    output_tokens = 0 if opening else sum(choice.output_tokens for choice in choices)
    used: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in prompts)},
    }
    if any(choice.thinks for choice in choices):
        used["completion_tokens_details"] = {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)}
    return used


def chat_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities as chats have them: each token with its exact bytes and its alternatives."""

    def logprob_of(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": max(logprob, LOWEST)}

    return {
        "content": [
            {**logprob_of(entry.token, entry.logprob), "top_logprobs": [logprob_of(*top) for top in entry.top]}
            for entry in entries
        ]
    }


def prompt_logprobs(tokenizer: Tokenizer, choice: Choice, count: int | None) -> dict[str, Any]:
    """Those of a prompt as vLLM has them, by token id, with `count` likely ones; the first token has none."""
    if count is None:
        return {}
    found: list[dict[str, Any] | None] = [None]
    for entry in choice.prompt_logprobs:
        ranked = [(rank, *top) for rank, top in enumerate(entry.top[:count], 1)]
        named: dict[str, Any] = {}
        for rank, token, logprob in [*ranked, (entry.rank, entry.token, entry.logprob)]:
            text = tokenizer.token_bytes(token).decode("utf-8", "replace")
            named[str(token)] = {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": text}
        found.append(named)
    return {"prompt_logprobs": found}
