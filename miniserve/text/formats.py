"""What models speak: their formats of tool calls and the marks of their reasoning, as data.

To add a format of tool calls, add an entry to `_FORMATS`, and to `SIGNS` what its chat templates spell. The entry says
how a call is written; how calls of the history are spelled (`ToolFormat.write`) and what a forced call has to match
(`answer_grammar.py`) both follow from that. Only a format that no parser in `call_parsers.py` reads needs one more.
To add marks of reasoning, add an entry to `REASONING_MARKS`.
"""

import json
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, NamedTuple

import msgspec

from miniserve.text.call_parsers import CallParser, LlamaParser, MistralParser, TagParser
from miniserve.text.calls import Schemas


class CallField(Enum):
    """What stands between the fixed texts of a call."""

    NAME = auto()
    QUOTED_NAME = auto()
    ARGUMENTS = auto()
    PARAMETERS = auto()
    """The arguments as Qwen3-Coder writes them, one tag each: strings as they are, all else as JSON."""
    CALL_ID = auto()
    """A call's id in the way of Mistral's models: nine letters and digits."""


class Maybe(NamedTuple):
    """Pieces that a model may write or leave out; `written` says whether they stand in histories."""

    pieces: tuple[str | CallField, ...]
    written: bool = False


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """A format of tool calls: `begin`, then each `call` with `separator` between them, then `end`.

    `marks` are all texts of the format that may be tokens of their own. Calls start with the first of them, or with one
    of `other_starts`; `bare` says that the first call may do without. `parser` makes what reads one place where a call
    starts. `parallel` says that an answer, and a message of the history, may hold several calls. `short_ids` says that
    chat templates insist on ids of nine letters and digits.
    """

    name: str
    marks: tuple[str, ...]
    parser: Callable[[Schemas], CallParser]
    begin: tuple[str | Maybe, ...] = ()
    call: tuple[str | CallField | Maybe, ...]
    separator: str = ""
    end: str = ""
    other_starts: tuple[str, ...] = ()
    bare: bool = False
    parallel: bool = True
    short_ids: bool = False

    @property
    def starts(self) -> tuple[str, ...]:
        return (self.marks[0], *self.other_starts)

    def write(self, calls: list[tuple[str, Any]]) -> str:
        """Calls, each a name and its arguments, as a model that was trained on the format writes them."""
        texts = ("".join(_written(piece, *call) for piece in self.call) for call in calls)
        return "".join(_written(piece, "", {}) for piece in self.begin) + self.separator.join(texts) + self.end


def _written(piece: str | CallField | Maybe, name: str, arguments: Any) -> str:
    match piece:
        case str():
            return piece
        case Maybe(pieces, written):
            return "".join(_written(inner, name, arguments) for inner in pieces) if written else ""
        case CallField.NAME:
            return name
        case CallField.QUOTED_NAME:
            return _json(name)
        case CallField.ARGUMENTS:
            return _json(arguments)
        case CallField.PARAMETERS:
            given = arguments.items() if isinstance(arguments, dict) else ()
            texts = ((key, value if isinstance(value, str) else _json(value)) for key, value in given)
            return "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts)
        case CallField.CALL_ID:
            raise ValueError("ids stand in a `Maybe` that is not written")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _object(key: str, *more: Maybe) -> tuple[str | CallField | Maybe, ...]:
    return ('{"name": ', CallField.QUOTED_NAME, f', "{key}": ', CallField.ARGUMENTS, *more, "}")


TAGS = ("<tool_call>", "</tool_call>")
MISTRAL_MARKS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_FORMATS = (
    ToolFormat(
        name="hermes",
        marks=TAGS,
        parser=TagParser,
        call=("<tool_call>\n", *_object("arguments"), "\n</tool_call>"),
        separator="\n",
    ),
    ToolFormat(
        name="smollm2",
        marks=TAGS,
        parser=TagParser,
        begin=("<tool_call>[",),
        call=_object("arguments"),
        separator=", ",
        end="]</tool_call>",
    ),
    ToolFormat(
        name="qwen3_coder",
        marks=TAGS,
        parser=TagParser,
        call=("<tool_call>\n<function=", CallField.NAME, ">\n", CallField.PARAMETERS, "</function>\n</tool_call>"),
        separator="\n",
        other_starts=("<function=",),  # these models forget the first tag at times
    ),
    ToolFormat(
        name="llama3_json",
        marks=("<|python_tag|>",),
        parser=LlamaParser,
        call=_object("parameters"),
        separator="; ",
        bare=True,
        parallel=False,
    ),
    ToolFormat(
        name="mistral",
        marks=MISTRAL_MARKS,
        parser=MistralParser,
        # Some models were trained with the space, and with ids, and some without.
        begin=("[TOOL_CALLS]", Maybe((" ",), written=True), "["),
        call=_object("arguments", Maybe((', "id": "', CallField.CALL_ID, '"'))),
        separator=", ",
        end="]",
        short_ids=True,
    ),
    ToolFormat(
        name="mistral_args",
        marks=MISTRAL_MARKS,
        parser=MistralParser,
        call=("[TOOL_CALLS]", CallField.NAME, Maybe(("[CALL_ID]", CallField.CALL_ID)), "[ARGS]", CallField.ARGUMENTS),
        short_ids=True,
    ),
)
FORMATS = {form.name: form for form in _FORMATS}
"""The formats of tool calls, by name; the names are vLLM's where it has one."""

SIGNS = {
    "<function=": "qwen3_coder",
    "[ARGS]": "mistral_args",
    "[TOOL_CALLS]": "mistral",
    "<|python_tag|>": "llama3_json",
    "<tool_call>": "hermes",
    '"parameters"': "llama3_json",
}
"""What a chat template spells, and the format that this is a sign of. Of several the first counts."""


class ReasoningMarks(NamedTuple):
    """The marks around reasoning. With `always` it begins without the first one, unless the prompt has ended it."""

    start: str
    end: str
    always: bool = False


REASONING_MARKS = {
    "qwen3": ReasoningMarks("<think>", "</think>"),
    "deepseek_r1": ReasoningMarks("<think>", "</think>", always=True),
    "mistral": ReasoningMarks("[THINK]", "[/THINK]"),
}
"""By vLLM's name of the parser. A chat template is searched for them in this order."""
