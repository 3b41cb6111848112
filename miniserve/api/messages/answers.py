"""/v1/messages: a chat's answer as content blocks, whole and as events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import msgspec
from typing_extensions import TypedDict

from miniserve.api.errors import ApiError
from miniserve.api.generation import Choice, Generation
from miniserve.api.messages.errors import anthropic_body
from miniserve.api.openai.answers import Head
from miniserve.api.streaming import named_event
from miniserve.text.reader import Part, Reasoning, ToolCall

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
Event = tuple[str, dict[str, Any]]
"""Its name, and what it says."""


class TextOut(TypedDict):
    type: Literal["text"]
    text: str


class ThinkingOut(TypedDict):
    """Nobody else can have written it: the signature is empty."""

    type: Literal["thinking"]
    thinking: str
    signature: Literal[""]


class ToolUseOut(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class OutputTokensDetails(TypedDict):
    thinking_tokens: int


class MessageUsage(TypedDict):
    """`input_tokens` are those that were computed; the prompt has those found in the cache, too."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class MessageOut(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextOut | ThinkingOut | ToolUseOut]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    input_tokens: int


class ContentBlocks:
    """Makes blocks of the parts of an answer, as they come, and the events that tell of it."""

    def __init__(self) -> None:
        self.blocks: list[Any] = []
        self._open: Literal["text", "thinking"] | None = None

    def feed(self, part: Part) -> Iterator[Event]:
        """The next part."""
        if isinstance(part, ToolCall):
            yield from self.close()
            block = {"type": "tool_use", "id": part.id, "name": part.name}
            # As the model wrote it: decoded and encoded again it might be another text.
            self.blocks.append({**block, "input": msgspec.Raw(part.arguments.encode())})
            yield "content_block_start", {"index": self._index, "content_block": {**block, "input": {}}}
            yield self._delta({"type": "input_json_delta", "partial_json": part.arguments})
            yield "content_block_stop", {"index": self._index}
            return
        kind: Literal["text", "thinking"] = "thinking" if isinstance(part, Reasoning) else "text"
        if self._open != kind:
            yield from self.close()
            self._open = kind
            self.blocks.append({"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})})
            yield "content_block_start", {"index": self._index, "content_block": dict(self.blocks[-1])}
        text = part.text if isinstance(part, Reasoning) else part
        self.blocks[-1][kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def close(self) -> Iterator[Event]:
        """The block that has been growing is complete."""
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._open is not None:
            yield "content_block_stop", {"index": self._index}
        self._open = None

    @property
    def _index(self) -> int:
        return len(self.blocks) - 1

    def _delta(self, delta: dict[str, str]) -> Event:
        return "content_block_delta", {"index": self._index, "delta": delta}


class MessagesShape:
    """The answer to one request."""

    id_prefix = "msg_"
    chunk_object = "message"
    input_field = "messages"
    id_is_a_key = False
    ending = b""

    def whole(self, head: Head, generation: Generation) -> MessageOut:
        """The answer in one piece, when it has ended."""
        (choice,) = generation.choices
        content = ContentBlocks()
        for part in choice.take()[0]:
            for _ in content.feed(part):
                pass
        return self._message(head, choice, content.blocks)

    async def stream(self, head: Head, generation: Generation) -> AsyncIterator[bytes]:
        """The events of the answer. Raises what the generation failed of."""
        (choice,) = generation.choices
        begun = {**self._message(head, choice, []), "stop_reason": None}
        yield named_event("message_start", {"message": begun}) + named_event("ping", {})
        content = ContentBlocks()
        async for _ in generation.updates():
            events = [event for part in choice.take()[0] for event in content.feed(part)]
            if choice.finish is not None:
                events += content.close()
                reason, sequence = _stop(choice)
                delta = {"stop_reason": reason, "stop_sequence": sequence}
                events += [("message_delta", {"delta": delta, "usage": _usage(choice)}), ("message_stop", {})]
            if events:
                yield b"".join(named_event(*event) for event in events)

    def broken(self, error: ApiError) -> bytes:
        """The event of what a stream failed of."""
        return named_event("error", {"error": anthropic_body(error.status_code, error.message)["error"]})

    def _message(self, head: Head, choice: Choice, blocks: list[Any]) -> MessageOut:
        reason, sequence = _stop(choice)
        return {
            "id": head["id"],
            "type": "message",
            "role": "assistant",
            "model": head["model"],
            "content": blocks,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": _usage(choice),
        }


def _stop(choice: Choice) -> tuple[StopReason, str | None]:
    if choice.finish == "tool_calls":
        return "tool_use", None
    if choice.finish == "length":
        return "max_tokens", None
    if isinstance(choice.stop_reason, str):
        return "stop_sequence", choice.stop_reason
    return "end_turn", None


def _usage(choice: Choice) -> MessageUsage:
    return {
        "input_tokens": len(choice.prompt) - choice.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": choice.cached_tokens,
        "output_tokens": choice.output_tokens,
        "output_tokens_details": {"thinking_tokens": choice.reasoning_tokens},
    }
