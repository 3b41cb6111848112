"""The formats of tool calls that models know: where calls begin, how they are read and written, what they must match
when one is forced."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec

from miniserve.text.calls import Attempt, LlamaAttempt, MistralAttempt, Schemas, TagAttempt


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """One of them. `starts` are the marks that begin a call, `bare` says that one may begin without, and `marks` are
    all that may be tokens of their own. `parallel`: models that know it can call several tools at once.
    """

    name: str
    starts: tuple[str, ...]
    marks: tuple[str, ...]
    attempt: Callable[[Schemas], Attempt]
    write: Callable[[list[tuple[str, Any]]], str]
    bare: bool = False
    parallel: bool = True


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _hermes(calls: list[tuple[str, Any]]) -> str:
    objects = (_json({"name": name, "arguments": arguments}) for name, arguments in calls)
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)


def _smollm2(calls: list[tuple[str, Any]]) -> str:
    return f"<tool_call>{_json([{'name': name, 'arguments': arguments} for name, arguments in calls])}</tool_call>"


def _qwen3_coder(calls: list[tuple[str, Any]]) -> str:
    def one(name: str, arguments: Any) -> str:
        given = arguments.items() if isinstance(arguments, dict) else ()
        texts = ((key, value if isinstance(value, str) else _json(value)) for key, value in given)
        inside = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts)
        return f"<tool_call>\n<function={name}>\n{inside}</function>\n</tool_call>"

    return "\n".join(one(*call) for call in calls)


def _llama3_json(calls: list[tuple[str, Any]]) -> str:
    return "; ".join(_json({"name": name, "parameters": arguments}) for name, arguments in calls)


def _mistral(calls: list[tuple[str, Any]]) -> str:
    return "[TOOL_CALLS] " + _json([{"name": name, "arguments": arguments} for name, arguments in calls])


def _mistral_args(calls: list[tuple[str, Any]]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{_json(arguments)}" for name, arguments in calls)


TAGS = ("<tool_call>", "</tool_call>")
LLAMA = ("<|python_tag|>",)
MISTRAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
FORMATS = {
    form.name: form
    for form in (
        Format(name="hermes", starts=TAGS[:1], marks=TAGS, attempt=TagAttempt, write=_hermes),
        Format(name="smollm2", starts=TAGS[:1], marks=TAGS, attempt=TagAttempt, write=_smollm2),
        Format(
            name="qwen3_coder",
            starts=(TAGS[0], "<function="),  # these models forget the first tag at times
            marks=TAGS,
            attempt=TagAttempt,
            write=_qwen3_coder,
        ),
        Format(
            name="llama3_json",
            starts=LLAMA,
            marks=LLAMA,
            attempt=LlamaAttempt,
            write=_llama3_json,
            bare=True,
            parallel=False,
        ),
        Format(name="mistral", starts=MISTRAL[:1], marks=MISTRAL, attempt=MistralAttempt, write=_mistral),
        Format(name="mistral_args", starts=MISTRAL[:1], marks=MISTRAL, attempt=MistralAttempt, write=_mistral_args),
    )
}
"""By name; the names are vLLM's where it has one."""
