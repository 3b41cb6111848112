"""/v1/responses: a chat's answer as output items, whole and as events."""

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from itertools import count
from typing import Any, Literal

import msgspec

from miniserve.api.errors import ApiError
from miniserve.api.generation import Choice, Generation
from miniserve.api.protocols import AnswerHead
from miniserve.api.responses import answers
from miniserve.api.responses.schemas import OUTPUT, InputItem, ResponsesRequest
from miniserve.api.responses.store import ResponseStore, Stored
from miniserve.api.streaming import NamedEvent, named_event
from miniserve.text.reader import Part, Reasoning, ToolCall


class OutputItems:
    """Makes items of the parts of an answer, as they come, and the events of a stream that announce them."""

    def __init__(self) -> None:
        self.items: list[answers.OutputItem] = []
        self._open: answers.OutputMessage | answers.OutputReasoning | None = None

    def feed(self, part: Part) -> list[NamedEvent]:
        if isinstance(part, ToolCall):
            return [*self._close("completed"), *self._call(part)]
        kind: Literal["message", "reasoning"] = "reasoning" if isinstance(part, Reasoning) else "message"
        events: list[NamedEvent] = []
        if self._open is None or self._open["type"] != kind:
            events += [*self._close("completed"), *self._begin(kind)]
        assert self._open is not None
        text = part.text if isinstance(part, Reasoning) else part
        self._open["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return [*events, (f"response.{_text_kind(self._open)}.delta", {**self._place(), "delta": text, **more})]

    def end(self, cut_off: bool) -> list[NamedEvent]:
        """End the answer. An answer of nothing at all is an empty message."""
        events = [] if self.items else self._begin("message")
        return events + self._close("incomplete" if cut_off else "completed")

    def _begin(self, kind: Literal["message", "reasoning"]) -> list[NamedEvent]:
        part: dict[str, Any]
        item: answers.OutputMessage | answers.OutputReasoning
        if kind == "message":
            item = {"type": "message", "id": _id("msg"), "role": "assistant", "status": "in_progress", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"type": "reasoning", "id": _id("rs"), "status": "in_progress", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        self._open = item
        self.items.append(item)
        added = {"output_index": len(self.items) - 1, "item": {**item, "content": []}}
        content: list[Any] = item["content"]
        content.append(part)
        return [
            ("response.output_item.added", added),
            ("response.content_part.added", {**self._place(), "part": dict(part)}),
        ]

    def _close(self, status: answers.ItemStatus) -> list[NamedEvent]:
        if (item := self._open) is None:
            return []
        self._open = None
        item["status"] = status
        part: answers.OutputText | answers.ReasoningText = item["content"][0]
        more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        return [
            (f"response.{_text_kind(item)}.done", {**self._place(), "text": part["text"], **more}),
            ("response.content_part.done", {**self._place(), "part": part}),
            ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item}),
        ]

    def _call(self, call: ToolCall) -> list[NamedEvent]:
        item: answers.OutputFunctionCall = {
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
        return [
            ("response.output_item.added", {"output_index": index, "item": begun}),
            ("response.function_call_arguments.delta", {**place, "delta": call.arguments}),
            ("response.function_call_arguments.done", {**place, "name": call.name, "arguments": call.arguments}),
            ("response.output_item.done", {"output_index": index, "item": item}),
        ]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}


class ResponsesWriter:
    """A `ResponseWriter` of the answer to `items`, the whole conversation. It stores the answer when that is complete,
    unless the request asks not to."""

    def __init__(
        self, head: AnswerHead, request: ResponsesRequest, items: Sequence[InputItem], store: ResponseStore[InputItem]
    ) -> None:
        self.head = head
        self._request = request
        self._items = items
        self._store = store
        self._numbers = count()
        self._begun: answers.ResponseOut | None = None

    def response(self, generation: Generation) -> answers.ResponseOut:
        (choice,) = generation.choices
        output = OutputItems()
        for part in choice.take()[0]:
            output.feed(part)
        output.end(choice.finish == "length")
        return self._ended(self._in_progress(choice), output, generation)

    async def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        (choice,) = generation.choices
        self._begun = begun = self._in_progress(choice)
        yield self._encoded([(f"response.{event}", {"response": begun}) for event in ("created", "in_progress")])
        output = OutputItems()
        async for _ in generation.updates():
            events = [event for part in choice.take()[0] for event in output.feed(part)]
            if choice.finish is not None:
                events += output.end(choice.finish == "length")
                response = self._ended(begun, output, generation)
                events.append((f"response.{response['status']}", {"response": response}))
            if events:
                yield self._encoded(events)

    def error_events(self, error: ApiError) -> bytes:
        code = "server_error" if error.status_code >= 500 else "invalid_prompt"
        events: list[NamedEvent] = [
            ("error", {"code": error.code or code, "message": error.message, "param": error.param})
        ]
        if self._begun is not None:
            response = {**self._begun, "status": "failed", "error": {"code": code, "message": error.message}}
            events.append(("response.failed", {"response": response}))
        return self._encoded(events)

    def _encoded(self, events: Sequence[NamedEvent]) -> bytes:
        return b"".join(named_event(name, {"sequence_number": next(self._numbers), **data}) for name, data in events)

    def _in_progress(self, choice: Choice) -> answers.ResponseOut:
        asked, text = self._request, self._request.text
        form = text.format.model_dump(by_alias=True, exclude_none=True) if text and text.format else {"type": "text"}
        tools = [{"parameters": None, "strict": None, **tool} for tool in asked.tools or []]
        return {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": self.head.model,
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

    def _ended(self, begun: answers.ResponseOut, output: OutputItems, generation: Generation) -> answers.ResponseOut:
        (choice,) = generation.choices
        cut_off = choice.finish == "length"
        answer: answers.ResponseOut = {
            **begun,
            "completed_at": None if cut_off else int(time.time()),
            "status": "incomplete" if cut_off else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "output": output.items,
            "usage": {
                "input_tokens": generation.prompt_tokens,
                "input_tokens_details": {"cached_tokens": generation.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": generation.output_tokens,
                "output_tokens_details": {"reasoning_tokens": generation.reasoning_tokens},
                "total_tokens": generation.prompt_tokens + generation.output_tokens,
            },
        }
        if self._request.store is not False:
            assert choice.turn is not None
            # A client may go on as soon as it has read the last event, so the store comes before that event.
            items = (*self._items, *OUTPUT.validate_python(output.items))
            tokens = len(choice.prompt) + choice.output_tokens
            stored = Stored(items, tokens, choice.turn.conversation, msgspec.json.encode(answer))
            self._store.put(answer["id"], stored)
        return answer


def _text_kind(item: answers.OutputMessage | answers.OutputReasoning) -> str:
    return "output_text" if item["type"] == "message" else "reasoning_text"


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
