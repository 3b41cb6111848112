"""/v1/responses: a chat's answer as output items, whole and as events."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

import msgspec

from miniserve.api.errors import ApiError
from miniserve.api.generation import Choice, Generation
from miniserve.api.openai.answers import Head
from miniserve.api.responses.schemas import OUTPUT, AnyItem, ResponsesRequest
from miniserve.api.responses.store import ResponseStore, Stored
from miniserve.api.responses.types import (
    FunctionCallOut,
    ItemOut,
    ItemStatus,
    MessageOut,
    OutputText,
    ReasoningOut,
    ReasoningText,
    ResponseOut,
    ResponseUsage,
)
from miniserve.api.streaming import named_event
from miniserve.text.reader import Part, Reasoning, ToolCall

Event = tuple[str, dict[str, Any]]
"""Its name, and what it says."""


class OutputItems:
    """Makes items of the parts of an answer, as they come, and the events that tell of it."""

    def __init__(self) -> None:
        self.items: list[ItemOut] = []
        self._open: MessageOut | ReasoningOut | None = None

    def feed(self, part: Part) -> Iterator[Event]:
        """The next part."""
        if isinstance(part, ToolCall):
            yield from self.close("completed")
            yield from self._call(part)
            return
        kind: Literal["message", "reasoning"] = "reasoning" if isinstance(part, Reasoning) else "message"
        if self._open is None or self._open["type"] != kind:
            yield from self.close("completed")
            yield from self._begin(kind)
        assert self._open is not None
        text = part.text if isinstance(part, Reasoning) else part
        self._open["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield f"response.{_text_kind(self._open)}.delta", {**self._place(), "delta": text, **more}

    def end(self, cut_off: bool) -> Iterator[Event]:
        """There are no further parts. An answer of nothing at all is an empty message."""
        if not self.items:
            yield from self._begin("message")
        yield from self.close("incomplete" if cut_off else "completed")

    def close(self, status: ItemStatus) -> Iterator[Event]:
        """The item that has been growing is complete."""
        if (item := self._open) is None:
            return
        part: OutputText | ReasoningText = item["content"][0]
        more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        yield f"response.{_text_kind(item)}.done", {**self._place(), "text": part["text"], **more}
        yield "response.content_part.done", {**self._place(), "part": part}
        item["status"] = status
        self._open = None
        yield "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _begin(self, kind: Literal["message", "reasoning"]) -> Iterator[Event]:
        part: dict[str, Any]
        item: MessageOut | ReasoningOut
        if kind == "message":
            item = {"type": "message", "id": _id("msg"), "role": "assistant", "status": "in_progress", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"type": "reasoning", "id": _id("rs"), "status": "in_progress", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        self._open = item
        self.items.append(item)
        yield "response.output_item.added", {"output_index": len(self.items) - 1, "item": {**item, "content": []}}
        content: list[Any] = item["content"]
        content.append(part)
        yield "response.content_part.added", {**self._place(), "part": dict(part)}

    def _call(self, call: ToolCall) -> Iterator[Event]:
        item: FunctionCallOut = {
            "type": "function_call",
            "id": _id("fc"),
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        self.items.append(item)
        index = len(self.items) - 1
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield "response.output_item.added", {"output_index": index, "item": begun}
        yield "response.function_call_arguments.delta", {**place, "delta": call.arguments}
        yield "response.function_call_arguments.done", {**place, "name": call.name, "arguments": call.arguments}
        yield "response.output_item.done", {"output_index": index, "item": item}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}


class ResponsesShape:
    """The answer to one request about `items`, the whole conversation. It is stored when it is complete."""

    id_prefix = "resp_"
    chunk_object = "response"
    input_field = "messages"
    id_is_a_key = True
    ending = b""

    def __init__(self, request: ResponsesRequest, items: Sequence[AnyItem], store: ResponseStore[AnyItem]) -> None:
        self._request = request
        self._items = items
        self._store = store
        self._numbers = count()
        self._begun: ResponseOut | None = None

    def whole(self, head: Head, generation: Generation) -> ResponseOut:
        """The answer in one piece, when it has ended."""
        (choice,) = generation.choices
        output = OutputItems()
        for part in choice.take()[0]:
            for _ in output.feed(part):
                pass
        for _ in output.end(choice.finish == "length"):
            pass
        return self._ended(self._in_progress(head, choice), output, generation)

    async def stream(self, head: Head, generation: Generation) -> AsyncIterator[bytes]:
        """The events of the answer. Raises what the generation failed of."""
        (choice,) = generation.choices
        self._begun = begun = self._in_progress(head, choice)
        yield self._event("response.created", {"response": begun}) + self._event(
            "response.in_progress", {"response": begun}
        )
        output = OutputItems()
        async for _ in generation.updates():
            events = [event for part in choice.take()[0] for event in output.feed(part)]
            if choice.finish is not None:
                events += output.end(choice.finish == "length")
                response = self._ended(begun, output, generation)
                events.append((f"response.{response['status']}", {"response": response}))
            if events:
                yield b"".join(self._event(*event) for event in events)

    def broken(self, error: ApiError) -> bytes:
        """The events of what a stream failed of."""
        code = "server_error" if error.status_code >= 500 else "invalid_prompt"
        told = self._event("error", {"code": error.code or code, "message": error.message, "param": error.param})
        if self._begun is None:
            return told
        response = {**self._begun, "status": "failed", "error": {"code": code, "message": error.message}}
        return told + self._event("response.failed", {"response": response})

    def _event(self, kind: str, data: Mapping[str, Any]) -> bytes:
        return named_event(kind, {"sequence_number": next(self._numbers), **data})

    def _in_progress(self, head: Head, choice: Choice) -> ResponseOut:
        asked, text = self._request, self._request.text
        form = text.format.model_dump(by_alias=True, exclude_none=True) if text and text.format else {"type": "text"}
        tools = [{"parameters": None, "strict": None, **tool} for tool in asked.tools or []]
        return {
            "id": head["id"],
            "object": "response",
            "created_at": head["created"],
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": head["model"],
            "output": [],
            "usage": None,
            "background": False,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "store": asked.store is not False,
            "temperature": choice.params.temperature,
            "text": {"format": form},
            "tool_choice": asked.tool_choice or "auto",
            "tools": tools,
            "top_p": choice.params.top_p,
            "truncation": "disabled",
        }

    def _ended(self, begun: ResponseOut, output: OutputItems, generation: Generation) -> ResponseOut:
        (choice,) = generation.choices
        cut_off = choice.finish == "length"
        answer: ResponseOut = {
            **begun,
            "completed_at": None if cut_off else int(time.time()),
            "status": "incomplete" if cut_off else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "output": output.items,
            "usage": _usage(generation),
        }
        if self._request.store is not False:
            assert choice.turn is not None
            # A client may go on as soon as it has read the last event, so before that is sent.
            items = (*self._items, *OUTPUT.validate_python(output.items))
            tokens = len(choice.prompt) + choice.output_tokens
            stored = Stored(items, tokens, choice.turn.conversation, msgspec.json.encode(answer))
            self._store.put(answer["id"], stored)
        return answer


def not_kept(id: str) -> ApiError:
    """That there is no such response, or no longer."""
    return ApiError(
        404,
        f"There is no response {id[:128]!r} here (any more): the latest ones are kept, until the server stops, unless "
        "`store` is false or they failed.",
        code="response_not_found",
    )


def previous(store: ResponseStore[AnyItem], id: str | None) -> Stored[AnyItem] | None:
    """What the response of that id has stored; None where a request names none. Raises `ApiError`."""
    if id is None:
        return None
    stored = store.get(id)
    if stored is None:
        raise ApiError(
            404,
            f"There is no response {id[:128]!r} here (any more): the latest ones are kept, until the server stops. "
            "Send the whole conversation as `input`, without `previous_response_id`.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return stored


@contextmanager
def going_on(before: Stored[AnyItem] | None) -> Iterator[str | int]:
    """The conversation that a response behind `before` is a turn of. Only one can be, unless that one fails: the others
    are forks, and the scheduler sees from the prompt where they belong."""
    if before is None or before.continued:
        yield ""
        return
    before.continued = True
    try:
        yield before.conversation
    except BaseException:
        before.continued = False
        raise


def _usage(generation: Generation) -> ResponseUsage:
    used = generation.usage
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": used["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in generation.choices)},
        "total_tokens": used["total_tokens"],
    }


def _text_kind(item: MessageOut | ReasoningOut) -> str:
    return "output_text" if item["type"] == "message" else "reasoning_text"


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
