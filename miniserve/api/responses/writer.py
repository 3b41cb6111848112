"""/v1/responses: a chat's answer as a response, whole and as events."""

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from miniserve.api.errors import ApiError
from miniserve.api.generation import AnswerHead, Choice, Generation
from miniserve.api.openai.answers import chat_logprobs
from miniserve.api.responses.items import new_id
from miniserve.api.responses.schemas import ResponsesRequest
from miniserve.api.responses.tools import Offered, custom_input
from miniserve.api.streaming import COMMENT, NamedEvent, named_event
from miniserve.cluster.messages import TokenLogprob
from miniserve.config import tables
from miniserve.text.calls import sound
from miniserve.text.messages import sound_json
from miniserve.text.reader import MoreArguments, Part, Reasoning, ToolCall
from miniserve.text.tokenizer import Tokenizer

RESPONSE = tables("api/answers.toml")["ResponseOut"]


@dataclass(eq=False)
class ResponsesWriter:
    """A `ResponseWriter`. It makes items of the parts of the answer, as they come, and the events that announce them.
    `offered` are the tools that may be called, by their names in the chat; `keep` stores the whole answer."""

    ping = COMMENT

    head: AnswerHead
    request: ResponsesRequest
    offered: Mapping[str, Offered]
    tokenizer: Tokenizer
    keep: Callable[[dict[str, Any], Choice], None]

    def __post_init__(self) -> None:
        self._numbers = count()
        self._items: list[Any] = []
        self._open: dict[str, Any] | None = None
        self._arguments = ""  # of the call that is open
        self._begun: dict[str, Any] = {}
        self._logprobs: list[TokenLogprob] = []  # of text that is still to come
        self._reasoned = 0  # tokens whose log-probabilities were passed over

    def response(self, generation: Generation) -> dict[str, Any]:
        (choice,) = generation.choices
        self._fed(choice)
        return self._ended(self._in_progress(choice), choice)

    async def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        (choice,) = generation.choices
        self._begun = begun = self._in_progress(choice)
        yield self._encoded([(f"response.{event}", {"response": begun}) for event in ("created", "in_progress")])
        async for _ in generation.updates():
            events = self._fed(choice)
            if choice.finish is not None:
                response = self._ended(begun, choice)
                events.append((f"response.{response['status']}", {"response": response}))
            if events:
                yield self._encoded(events)

    def error_events(self, error: ApiError) -> bytes:
        code = "server_error" if error.status_code >= 500 else "invalid_prompt"
        about = {"code": error.code or code, "message": error.message, "param": error.param}
        response = {**self._begun, "status": "failed", "error": {"code": code, "message": error.message}}
        return self._encoded([("error", about), ("response.failed", {"response": response})])

    def _encoded(self, events: Sequence[NamedEvent]) -> bytes:
        return b"".join(named_event(name, {"sequence_number": next(self._numbers), **data}) for name, data in events)

    def _in_progress(self, choice: Choice) -> dict[str, Any]:
        asked, text = self.request, self.request.text
        form = text.format.model_dump(by_alias=True, exclude_none=True) if text and text.format else {"type": "text"}
        functions = {"description": None, "parameters": None, "strict": None}
        tools = [{**(functions if tool["type"] == "function" else {}), **tool} for tool in asked.tools or []]
        fields = {name: schema for name, schema in RESPONSE["properties"].items() if name not in RESPONSE["optional"]}
        begun: dict[str, Any] = {
            # Parameters are repeated as they were used, else as they came. Other fields are null, most until the end.
            **{n: s.get("const", getattr(choice.params, n, getattr(asked, n, None))) for n, s in fields.items()},
            "id": self.head.id,
            "created_at": self.head.created,
            "status": "in_progress",
            "model": self.head.model,
            "output": [],
            "metadata": asked.metadata or {},
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "text": {"format": form},
            "tool_choice": asked.tool_choice or "auto",
            "tools": tools,
            "top_logprobs": asked.top_logprobs or 0,
            "truncation": asked.truncation or "disabled",
        }
        if asked.conversation:
            begun["conversation"] = {"id": asked.conversation}
        return begun

    def _ended(self, begun: dict[str, Any], choice: Choice) -> dict[str, Any]:
        cut_off = choice.finish == "length"
        answer: dict[str, Any] = {
            **begun,
            "completed_at": None if cut_off else int(time.time()),
            "status": "incomplete" if cut_off else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "output": self._items,
            "usage": {
                "input_tokens": len(choice.prompt),
                "input_tokens_details": {"cached_tokens": choice.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": choice.output_tokens,
                "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
                "total_tokens": len(choice.prompt) + choice.output_tokens,
            },
        }
        # A client may go on as soon as it has read the last event, so the answer is kept before that.
        self.keep(answer, choice)
        return answer

    def _fed(self, choice: Choice) -> list[NamedEvent]:
        """What has come since the last time, and the end. An answer of nothing at all is an empty message."""
        parts, logprobs = choice.take()
        self._logprobs += logprobs[choice.reasoning_tokens - self._reasoned :]
        self._reasoned = choice.reasoning_tokens
        events = [event for part in parts for event in self._feed(part)]
        if choice.finish is None:
            return events
        if not self._items:
            events += self._opened("message")
        return events + self._close("incomplete" if choice.finish == "length" else "completed")

    def _feed(self, part: Part) -> list[NamedEvent]:
        match part:
            case ToolCall():
                return [*self._close("completed"), *self._begin_call(part), *self._argue(part.arguments)]
            case MoreArguments():
                return self._argue(part.text)
            case Reasoning():
                return [*self._opened("reasoning"), *self._say(part.text, [])]
            case _:  # texts have log-probabilities, reasoning has none
                shown, self._logprobs = chat_logprobs(self.tokenizer, self._logprobs)["content"], []
                return [*self._opened("message"), *self._say(part, shown)]

    def _opened(self, kind: Literal["message", "reasoning"]) -> list[NamedEvent]:
        if self._open is not None and self._open["type"] == kind:
            return []
        ended = self._close("completed")
        if kind == "message":
            own: dict[str, Any] = {"role": "assistant"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:  # the content is the reasoning itself, so there is no summary
            own, part = {"summary": []}, {"type": "reasoning_text", "text": ""}
        added = self._add({"type": kind, "id": new_id(kind), "status": "in_progress", **own, "content": []})
        self._items[-1]["content"] = [part]
        return [*ended, added, ("response.content_part.added", {**self._place(0), "part": {**part}})]

    def _say(self, text: str, logprobs: list[Any]) -> list[NamedEvent]:
        part = self._items[-1]["content"][0]
        part["text"] += text
        delta = {**self._place(0), "delta": text}
        if "logprobs" in part:
            part["logprobs"] += logprobs
            delta["logprobs"] = logprobs
        return [(f"response.{part['type']}.delta", delta)]

    def _begin_call(self, call: ToolCall) -> list[NamedEvent]:
        found = self.offered.get(call.name) or Offered({}, "function_call", call.name)
        base = {"type": found.kind, "id": new_id(found.kind), "call_id": call.id, "status": "in_progress"}
        empty: dict[str, Any] = {"execution": "client", "arguments": {}}
        if found.kind != "tool_search_call":
            empty = {"name": found.name, "input" if found.kind == "custom_tool_call" else "arguments": ""}
        if found.namespace:
            empty["namespace"] = found.namespace
        self._arguments = ""
        return [self._add({**base, **empty})]

    def _argue(self, text: str) -> list[NamedEvent]:
        """Further arguments: of functions they are shown as they come, the others' are not what the model writes."""
        self._arguments += text
        if not text or self._open is None or self._open["type"] != "function_call":
            return []
        return [("response.function_call_arguments.delta", {**self._place(), "delta": text})]

    def _end_call(self, item: dict[str, Any]) -> list[NamedEvent]:
        match item["type"]:
            case "function_call":
                item["arguments"] = self._arguments
                done = {"name": item["name"], "arguments": self._arguments}
                return [("response.function_call_arguments.done", {**self._place(), **done})]
            case "custom_tool_call":
                item["input"] = text = custom_input(self._arguments)
                return [
                    ("response.custom_tool_call_input.delta", {**self._place(), "delta": text}),
                    ("response.custom_tool_call_input.done", {**self._place(), "input": text}),
                ]
            case _:
                with suppress(ValueError, RecursionError):  # it was cut off, or is too deep to be sent back
                    item["arguments"] = sound_json(json.loads(self._arguments))
                return []

    def _add(self, item: dict[str, Any]) -> NamedEvent:
        self._open = item
        self._items.append(item)
        return "response.output_item.added", {"output_index": len(self._items) - 1, "item": {**item}}

    def _close(self, status: str) -> list[NamedEvent]:
        if (item := self._open) is None:
            return []
        events: list[NamedEvent] = []
        if "content" in item:
            (part,) = item["content"]
            more = {key: part[key] for key in ("text", "logprobs") if key in part}
            events.append((f"response.{part['type']}.done", {**self._place(0), **more}))
            events.append(("response.content_part.done", {**self._place(0), "part": part}))
        else:
            events += self._end_call(item)
            if not sound(self._arguments):
                status = "incomplete"  # the model broke off, and may have gone on with text
        item["status"], self._open = status, None
        return [*events, ("response.output_item.done", {"output_index": len(self._items) - 1, "item": item})]

    def _place(self, content: int | None = None) -> dict[str, Any]:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return place if content is None else {**place, "content_index": content}
