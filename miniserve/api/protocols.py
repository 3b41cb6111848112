"""What each of the APIs has of its own: how it makes prompts of a request, and how its answers look.

The way of a turn: a route of app.py calls `Service`, which prepares what the `Renderer` gives and starts a `Generation`
with it; the `ResponseWriter` makes the answer of the generation, whole or as a stream of events.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple, Protocol

from miniserve.api.errors import ApiError
from miniserve.api.generation import Generation
from miniserve.sampling_params import SamplingParams
from miniserve.text.reader import Reader


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
        """All server-sent events of the answer; events that can be sent together come as one piece. Raises the
        exception that a choice failed with."""

    def error_events(self, error: ApiError) -> bytes:
        """The events that end a stream that has failed."""
