"""/v1/messages: a chat's answer as content blocks, whole and as events."""

from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec

from miniserve.api.errors import ApiError
from miniserve.api.generation import AnswerHead, Choice, Finish, Generation
from miniserve.api.streaming import NamedEvent, named_event
from miniserve.text.reader import MoreArguments, Part, Reasoning, ToolCall

STOP_REASONS: dict[Finish | None, str] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesWriter:
    """Makes blocks of the parts of an answer, as they come, and the events of a stream that announce them."""

    ping = named_event("ping", {})

    def __init__(self, head: AnswerHead) -> None:
        self.head = head
        self._blocks: list[Any] = []
        self._open: Literal["text", "thinking", "tool_use"] | None = None

    def response(self, generation: Generation) -> dict[str, Any]:
        (choice,) = generation.choices
        self._fed(choice)
        return self._message(choice)

    async def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        (choice,) = generation.choices
        yield named_event("message_start", {"message": self._message(choice)}) + self.ping
        async for _ in generation.updates():
            events = self._fed(choice)
            if choice.finish is not None:
                ended = {"delta": _stop(choice), "usage": _usage(choice)}
                events += [("message_delta", ended), ("message_stop", {})]
            if events:
                yield b"".join(named_event(*event) for event in events)

    def error_events(self, error: ApiError) -> bytes:
        return named_event("error", {"error": error.anthropic_body["error"]})

    def _message(self, choice: Choice) -> dict[str, Any]:
        return {
            "id": self.head.id,
            "type": "message",
            "role": "assistant",
            "model": self.head.model,
            "content": self._blocks,
            **_stop(choice),
            "usage": _usage(choice),
        }

    def _fed(self, choice: Choice) -> list[NamedEvent]:
        """What has come since the last time, and the end."""
        events = [event for part in choice.take()[0] for event in self._feed(part)]
        return events + (self._close() if choice.finish is not None else [])

    def _feed(self, part: Part) -> list[NamedEvent]:
        match part:
            case ToolCall():
                block = {"type": "tool_use", "id": part.id, "name": part.name, "input": ""}
                return [*self._close(), self._begin(block), *self._argue(part.arguments)]
            case MoreArguments():
                return self._argue(part.text)
            case Reasoning():
                # Other servers prove by the signature that a thought is their own.
                return self._say("thinking", part.text, {"signature": ""})
            case _:
                return self._say("text", part, {})

    def _close(self) -> list[NamedEvent]:
        if self._open is None:
            return []
        signed = [self._delta({"type": "signature_delta", "signature": ""})] if self._open == "thinking" else []
        if self._open == "tool_use":
            # The arguments stay as the model wrote them: decoded and encoded again they might be another text.
            block = self._blocks[-1]
            block["input"] = msgspec.Raw(block["input"].encode())
        self._open = None
        return [*signed, ("content_block_stop", {"index": len(self._blocks) - 1})]

    def _say(self, kind: Literal["text", "thinking"], text: str, more: dict[str, str]) -> list[NamedEvent]:
        opened = [] if self._open == kind else [*self._close(), self._begin({"type": kind, kind: "", **more})]
        self._blocks[-1][kind] += text
        return [*opened, self._delta({"type": f"{kind}_delta", kind: text})]

    def _argue(self, text: str) -> list[NamedEvent]:
        self._blocks[-1]["input"] += text
        return [self._delta({"type": "input_json_delta", "partial_json": text})] if text else []

    def _begin(self, block: dict[str, Any]) -> NamedEvent:
        self._open = block["type"]
        self._blocks.append(block)
        shown = {**block, "input": {}} if "input" in block else {**block}
        return "content_block_start", {"index": len(self._blocks) - 1, "content_block": shown}

    def _delta(self, delta: dict[str, str]) -> NamedEvent:
        return "content_block_delta", {"index": len(self._blocks) - 1, "delta": delta}


def _stop(choice: Choice) -> dict[str, str | None]:
    if choice.finish == "stop" and isinstance(choice.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    return {"stop_reason": STOP_REASONS.get(choice.finish), "stop_sequence": None}


def _usage(choice: Choice) -> dict[str, Any]:
    return {
        "input_tokens": len(choice.prompt) - choice.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": choice.cached_tokens,
        "output_tokens": choice.output_tokens,
        "output_tokens_details": {"thinking_tokens": choice.reasoning_tokens},
    }
