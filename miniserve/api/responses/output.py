"""The parts of an answer as items of /v1/responses, as they come, and the events of a stream that announce them."""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from miniserve.api.openai.answers import chat_logprobs
from miniserve.api.responses.items import new_id
from miniserve.api.responses.tools import Offered, custom_input
from miniserve.api.streaming import NamedEvent
from miniserve.cluster.messages import TokenLogprob
from miniserve.text.calls import sound
from miniserve.text.messages import sound_json
from miniserve.text.reader import MoreArguments, Part, Reasoning, ToolCall
from miniserve.text.tokenizer import Tokenizer


class OutputItems:
    """`offered` are the tools that may be called, by their names in the chat. With a `tokenizer` texts have
    log-probabilities."""

    def __init__(self, offered: Mapping[str, Offered], tokenizer: Tokenizer | None = None) -> None:
        self.items: list[Any] = []
        self._offered = offered
        self._tokenizer = tokenizer
        self._open: dict[str, Any] | None = None
        self._arguments = ""  # of the call that is open

    def feed(self, part: Part, logprobs: list[TokenLogprob]) -> list[NamedEvent]:
        """Take the next part; `logprobs` are those of the tokens that came with it."""
        match part:
            case ToolCall():
                return [*self._close("completed"), *self._begin_call(part), *self._argue(part.arguments)]
            case MoreArguments():
                return self._argue(part.text)
            case Reasoning():
                return [*self._opened("reasoning"), *self._say(part.text, [])]
            case _:
                shown = list(chat_logprobs(self._tokenizer, logprobs)["content"]) if self._tokenizer else []
                return [*self._opened("message"), *self._say(part, shown)]

    def end(self, cut_off: bool) -> list[NamedEvent]:
        """End the answer. An answer of nothing at all is an empty message."""
        events = [] if self.items else self._begin("message")
        return events + self._close("incomplete" if cut_off else "completed")

    # --- text -------------------------------------------------------------------------------------------------------

    def _opened(self, kind: Literal["message", "reasoning"]) -> list[NamedEvent]:
        if self._open is not None and self._open["type"] == kind:
            return []
        return [*self._close("completed"), *self._begin(kind)]

    def _begin(self, kind: Literal["message", "reasoning"]) -> list[NamedEvent]:
        if kind == "message":
            own: dict[str, Any] = {"role": "assistant"}
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:  # the content is the reasoning itself, so there is no summary
            own, part = {"summary": []}, {"type": "reasoning_text", "text": ""}
        added = self._add({"type": kind, "id": new_id(kind), "status": "in_progress", **own, "content": []})
        self.items[-1]["content"].append(part)
        return [added, ("response.content_part.added", {**self._place(0), "part": {**part}})]

    def _say(self, text: str, logprobs: list[Any]) -> list[NamedEvent]:
        part = self.items[-1]["content"][0]
        part["text"] += text
        delta = {**self._place(0), "delta": text}
        if "logprobs" in part:
            part["logprobs"] += logprobs
            delta["logprobs"] = logprobs
        return [(f"response.{part['type']}.delta", delta)]

    # --- calls ------------------------------------------------------------------------------------------------------

    def _begin_call(self, call: ToolCall) -> list[NamedEvent]:
        found = self._offered.get(call.name)
        kind, name = (found.kind, found.name) if found else ("function_call", call.name)
        base = {"type": kind, "id": new_id(kind), "call_id": call.id, "status": "in_progress"}
        empty: dict[str, Any] = {"execution": "client", "arguments": {}}
        if kind != "tool_search_call":
            empty = {"name": name, "input" if kind == "custom_tool_call" else "arguments": ""}
        if found and found.namespace:
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

    # --- any item ---------------------------------------------------------------------------------------------------

    def _add(self, item: dict[str, Any]) -> NamedEvent:
        self._open = item
        self.items.append(item)
        added = {**item, "content": []} if "content" in item else {**item}
        return "response.output_item.added", {"output_index": len(self.items) - 1, "item": added}

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
        return [*events, ("response.output_item.done", {"output_index": len(self.items) - 1, "item": item})]

    def _place(self, content: int | None = None) -> dict[str, Any]:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return place if content is None else {**place, "content_index": content}
