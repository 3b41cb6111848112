"""How chat and text completions stream: chunks of choices, with `[DONE]` at the end."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

from miniserve.api.errors import ApiError
from miniserve.api.generation import Choice, Generation
from miniserve.api.openai.answers import usage
from miniserve.api.openai.parameters import GenerationRequest, StreamOptions
from miniserve.api.protocols import AnswerHead
from miniserve.api.streaming import COMMENT, data_event
from miniserve.cluster.messages import TokenLogprob
from miniserve.text.reader import Part
from miniserve.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


class ChunkWriter(ABC):
    """The part of a `ResponseWriter` that chat and text completions share. If the request asks for token ids, chunks
    hold them, and each token has a chunk even if it has no text (yet). `objects` is what a whole answer and a chunk are
    called."""

    ping = COMMENT
    objects: ClassVar[tuple[str, str]]

    def __init__(self, head: AnswerHead, tokenizer: Tokenizer, request: GenerationRequest) -> None:
        self.head = head
        self.token_ids = bool(request.return_token_ids)
        self.prompt_logprobs = request.prompt_logprobs
        self._tokenizer = tokenizer
        self._options = request.stream_options or StreamOptions()

    @abstractmethod
    def shown(
        self, choice: Choice, parts: list[Part], logprobs: list[TokenLogprob], *, chunk: bool, ended: bool
    ) -> Mapping[str, Any]:
        """The choice with these parts of its text: all of them, or in a `chunk` the next one, or none when it has
        `ended`."""

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
        with_usage = bool(self._options.include_usage)
        continuous = with_usage and bool(self._options.continuous_usage_stats)

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
                by_token = self.token_ids and bool(choice.tokens)
                if not (choice.has_parts or by_token):
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
