"""How one model talks: its format of tool calls, the marks around its reasoning, what its chat template knows of both.

A template that knows nothing of tools still serves them: they are described in the system message and calls stand in
the text of the history, in the format that SmolLM2 was trained with.
"""

import hashlib
import json
import re
from typing import Any, Literal

import msgspec

from miniserve.text.formats import DESCRIPTION, FORMATS, REASONING_MARKS, SIGNS, ReasoningMarks, ToolFormat
from miniserve.text.reader import CallScanner, Reader
from miniserve.text.template import Demands, Message
from miniserve.text.tokenizer import Tokenizer

TAIL_TOKENS = 16
"""More than a template writes behind a mark of reasoning at the end of a prompt."""
Reasoned = Literal["not yet", "begun", "over"]
"""What a prompt has of the reasoning of its answer: with "not yet" the model decides whether there is any."""


class Dialect(msgspec.Struct, frozen=True):
    """`form` is the format of calls, `thinking` is None for models that do not reason. `knows_tools` and `knows_calls`
    say whether the chat template renders tools and the calls of the history, `demands` what else it does not."""

    form: ToolFormat
    thinking: ReasoningMarks | None
    knows_tools: bool
    knows_calls: bool
    demands: Demands

    def reader(
        self, tokenizer: Tokenizer, tools: list[dict[str, Any]], *, single: bool, first: bool, opened: bool, early: bool
    ) -> Reader | None:
        """What reads an answer; None where all of it is content. `tools` are those that may be called, `single` allows
        one call only and `first` none behind text, `opened` says that the prompt has begun the reasoning, and with
        `early` calls come while their arguments do."""
        if not tools and self.thinking is None:
            return None
        marks = [*self.form.marks] if tools else []
        marks += self.thinking[:2] if self.thinking else []
        ids = {id for mark in marks if (id := tokenizer.control_id(mark)) is not None}
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
        scanner = CallScanner(self.form, schemas, single, first, early) if tools else None
        ends = tokenizer.control_id(self.thinking.end) if self.thinking else None
        return Reader(self.thinking, opened, scanner, frozenset(ids & tokenizer.special_ids), ends)

    def reasoned(self, tokenizer: Tokenizer, prompt: list[int], continued: str | None) -> Reasoned:
        """How far the reasoning is at the end of `prompt`; `continued` is the answer that it ends with, if it does."""
        if self.thinking is None:
            return "over"
        start, end, always = self.thinking
        if continued is not None:
            return "begun" if continued.rfind(start) > continued.rfind(end) else "over"
        tail = tokenizer.decode(prompt[-TAIL_TOKENS:], skip_special_tokens=False).rstrip()
        if tail.endswith(end):
            return "over"
        return "begun" if always or tail.endswith(start) else "not yet"

    def messages(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Message]:
        """The conversation as this model's template can render it."""
        if tools and not self.knows_tools:
            example = self.form.write([("name_of_tool", {"name_of_parameter": "value"})])
            told = json.dumps(tools, ensure_ascii=False)
            messages = _with_system(messages, DESCRIPTION.format(tools=told, example=example))
        if not self.knows_calls or "no_tool" in self.demands:
            messages = [self._spelled(message) for message in messages]
        elif not self.form.parallel:
            messages = _one_by_one(messages)
        if self.form.short_ids:
            messages = [_with_short_ids(message) for message in messages]
        return self.demands.met(messages)

    def _spelled(self, message: Message) -> Message:
        """Calls as text, as the model has written them."""
        if not message.get("tool_calls"):
            return message
        functions = [call["function"] for call in message["tool_calls"]]
        text = self.form.write([(function["name"], function["arguments"]) for function in functions])
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**rest, "content": f"{message['content']}\n{text}" if message["content"] else text}


def find_dialect(tokenizer: Tokenizer, tool_parser: str = "auto", reasoning_parser: str = "auto") -> Dialect:
    """The dialect of a model, from its chat template, else from its architecture; parsers other than auto are given by
    names in `FORMATS` and `REASONING_MARKS`, or "none"."""
    text = tokenizer.template_text
    knows_tools = re.search(r"\btools\b", text) is not None
    form = FORMATS[_find_format(tokenizer, knows_tools) if tool_parser == "auto" else tool_parser]
    thinking = _find_reasoning(tokenizer) if reasoning_parser == "auto" else REASONING_MARKS.get(reasoning_parser)
    return Dialect(form, thinking, knows_tools, "tool_calls" in text, Demands.of(tokenizer.rendered))


def _find_format(tokenizer: Tokenizer, knows_tools: bool) -> str:
    for sign, name in SIGNS.items():
        if sign in tokenizer.template_text:
            return name
    if not knows_tools:
        return "smollm2"
    if tokenizer.control_id("<|start_header_id|>") is not None:
        return "llama3_json"
    return "mistral" if tokenizer.model_type in ("mistral", "mixtral") else "hermes"


def _find_reasoning(tokenizer: Tokenizer) -> ReasoningMarks | None:
    for marks in REASONING_MARKS.values():
        both = marks.start, marks.end
        if any(mark in tokenizer.template_text for mark in both) or None not in map(tokenizer.control_id, both):
            return marks
    return None


def _with_system(messages: list[Message], text: str) -> list[Message]:
    """`text` at the end of the system message, which is put in front where there is none."""
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _one_by_one(messages: list[Message]) -> list[Message]:
    """Llama's templates refuse messages with several calls: each gets a message of its own, its result behind it."""
    out: list[Message] = []
    waiting: dict[str, Message] = {}  # calls still to be put before their results, by id
    for message in messages:
        if message["role"] == "tool" and (own := waiting.pop(message.get("tool_call_id", ""), None)):
            out.append(own)
        elif message["role"] != "tool":
            out += waiting.values()
            waiting = {}
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            out.append(message)
            continue
        for number, call in enumerate(calls):
            content = message["content"] if not number else ""
            waiting[call.get("id") or f"#{number}"] = {**message, "content": content, "tool_calls": [call]}
    return [*out, *waiting.values()]


def _with_short_ids(message: Message) -> Message:
    """Mistral's templates want ids of nine letters and digits; different ones stay different."""
    out = dict(message)
    if "tool_call_id" in message:
        out["tool_call_id"] = _short(message["tool_call_id"])
    if calls := message.get("tool_calls"):
        out["tool_calls"] = [{**call, "id": _short(call.get("id") or "")} for call in calls]
    return out


def _short(id: str) -> str:
    return id if re.fullmatch(r"[A-Za-z0-9]{9}", id) else hashlib.blake2b(id.encode()).hexdigest()[:9]
