"""What models speak: their formats of tool calls and the marks of their reasoning, both from `formats.toml`.

To add either, add an entry there, and to `signs` what its chat templates spell. The entry of a format says how a call
is written; how calls of the history are spelled (`ToolFormat.write`) and what a forced call has to match
(`answer_grammar.py`) both follow from that. Only a format that no parser in `call_parsers.py` reads needs one more.
"""

import json
import re
from typing import Any, NamedTuple

import msgspec

from miniserve.config import tables
from miniserve.text.schemas import spelled

PIECES = re.compile(r"(\$[A-Z_]+|<<.*?>>)")
"""Splits the text of a call in formats.toml: fields and what may be left out, with fixed texts between them."""


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """A format of tool calls: `begin`, then each `call` with `separator` between them, then `end`.

    `marks` are all texts of the format that may be tokens of their own. Calls start with one of `starts`; `bare` says
    that the first call may do without. `parser` names what reads one place where a call starts. `parallel` says that an
    answer, and a message of the history, may hold several calls. `short_ids` says that chat templates insist on ids of
    nine letters and digits.
    """

    name: str
    marks: tuple[str, ...]
    starts: tuple[str, ...]
    parser: str
    begin: str = ""
    call: str
    separator: str = ""
    end: str = ""
    bare: bool = False
    parallel: bool = True
    short_ids: bool = False

    def write(self, calls: list[tuple[str, Any]]) -> str:
        """Calls, each a name and its arguments, as a model that was trained on the format writes them."""
        texts = (_written(self.call, *call) for call in calls)
        return _written(self.begin, "", {}) + self.separator.join(texts) + self.end


def _written(text: str, name: str, arguments: Any) -> str:
    given = arguments.items() if isinstance(arguments, dict) else ()
    fields = {
        "$NAME": name,
        "$QUOTED_NAME": json.dumps(name, ensure_ascii=False),
        "$ARGUMENTS": json.dumps(arguments, ensure_ascii=False),
        "$PARAMETERS": "".join(f"<parameter={key}>\n{spelled(value)}\n</parameter>\n" for key, value in given),
    }
    # Of what may be left out, ids never stand in histories.
    whole = re.sub("<<(.*?)>>", lambda found: "" if "$CALL_ID" in found[1] else found[1], text)
    return "".join(fields.get(piece, piece) for piece in PIECES.split(whole))


class ReasoningMarks(NamedTuple):
    """The marks around reasoning. With `always` it begins without the first one, unless the prompt has ended it."""

    start: str
    end: str
    always: bool = False


_TABLES = tables("text/formats.toml")
FORMATS = {form["name"]: msgspec.convert(form, ToolFormat) for form in _TABLES["formats"]}
DESCRIPTION: str = _TABLES["description"]
SIGNS: dict[str, str] = _TABLES["signs"]
REASONING_MARKS = {name: ReasoningMarks(**marks) for name, marks in _TABLES["reasoning"].items()}
FILL_IN_THE_MIDDLE: list[list[str]] = _TABLES["fill_in_the_middle"]
"""The tokens before a text, at the gap in it, and after its suffix: what comes then fills the gap."""
