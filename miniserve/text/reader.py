"""What a model writes, read as it comes: reasoning, content, and tool calls, each of them complete.

The parts that a `Reader` gives are all that any API has to translate. It loses no text: what is no call after all is
content, and only white space beside the marks of calls and reasoning is dropped together with these.
"""

from __future__ import annotations

import re
import secrets
from typing import NamedTuple

import msgspec

from miniserve.text.calls import Attempt, Found, Schemas
from miniserve.text.formats import Format


class Reasoning(msgspec.Struct, frozen=True):
    """A piece of what the model thinks before it answers."""

    text: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call, the answer's number `index`. `arguments` is the JSON text of an object."""

    index: int
    id: str
    name: str
    arguments: str


Part = str | Reasoning | ToolCall
"""A part of an answer; a string is a piece of its content."""


class Thinking(NamedTuple):
    """The marks around reasoning. `always`: it begins without the first one, unless the prompt has ended it."""

    start: str
    end: str
    always: bool = False


def merged(parts: list[Part]) -> list[Part]:
    """`parts` with neighbours of the same kind as one."""
    out: list[Part] = []
    for part in parts:
        if out and isinstance(part, str) and isinstance(last := out[-1], str):
            out[-1] = last + part
        elif out and isinstance(part, Reasoning) and isinstance(last := out[-1], Reasoning):
            out[-1] = Reasoning(last.text + part.text)
        else:
            out.append(part)
    return out


def _beginning(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    most = min(len(text), max(map(len, marks)) - 1)
    return next((n for n in range(most, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)


class CallScanner:
    """Parts content into text and calls. With `single` all ends with the first call: `done`. With `first` there is no
    call behind text: what looks like one is a part of it."""

    _BARE = re.compile(r"\s*(?:;\s*)?")

    def __init__(self, form: Format, schemas: Schemas, single: bool, first: bool = False) -> None:
        self.calls = 0
        self.done = False
        self._format = form
        self._schemas = schemas
        self._single = single
        self._first = first
        self._starts = re.compile("|".join(map(re.escape, form.starts)))
        self._held = ""
        self._gap = ""  # white space before the attempt
        self._attempt: Attempt | None = None
        self._trim = False  # white space that follows a call
        self._fresh = True  # nothing but calls so far: the next one needs no mark, where the format has none

    def read(self, text: str, final: bool = False) -> list[Part]:
        """The parts that are certain with `text`, the next piece; all of them if it is the `final` one."""
        parts: list[Part] = []
        self._held += text
        while self._held and not self.done:
            if self._attempt is None and not self._find(parts, final):
                break
            assert self._attempt is not None
            found = self._attempt.read(self._held, final)
            if found is None and not final:
                break
            self._settle(found or Found([], len(self._held)), parts)
        return parts

    def _find(self, parts: list[Part], final: bool) -> bool:
        """Give out what is certainly no call; whether one may begin behind it."""
        if self._first and not self._fresh:
            held, self._held = self._held, ""
            self._give(held, parts)
            return False
        held, at, kept = self._held, -1, ""
        if self._format.bare and self._fresh:
            passed = self._BARE.match(held)
            assert passed is not None
            if passed.end() == len(held) and not final:
                return False
            at = passed.end() if held.startswith("{", passed.end()) else -1
        if at < 0:
            marked = self._starts.search(held)
            at = marked.start() if marked else len(held) - (0 if final else _beginning(held, self._format.starts))
            kept = held[:at] if final and not marked else held[:at].rstrip()
            self._give(kept, parts)
            if marked is None:
                self._held = held[len(kept) :]
                return False
        self._gap, self._held = held[len(kept) : at], held[at:]
        self._attempt = self._format.attempt(self._schemas)
        return True

    def _settle(self, found: Found, parts: list[Part]) -> None:
        """An attempt has ended."""
        self._attempt = None
        text, self._held = self._held[: found.end], self._held[found.end :]
        if not found.calls:
            self._give(self._gap + text, parts)
            return
        for call in found.calls[:1] if self._single else found.calls:
            parts.append(ToolCall(self.calls, f"call_{secrets.token_hex(12)}", call.name, call.arguments))
            self.calls += 1
        self._trim = self._fresh = True
        self.done = self._single

    def _give(self, text: str, parts: list[Part]) -> None:
        if self._trim:
            text = text.lstrip()
        if text:
            self._trim = False
            self._fresh = self._fresh and text.isspace()
            parts.append(text)


class Reader:
    """Reads one answer: reasoning first, if the model has any, then content with calls among it.

    `opened` says that the prompt has begun the reasoning already. `visible` are special tokens whose text it needs to
    see, `ends` is the token that ends the reasoning, if it is a single one.
    """

    def __init__(
        self,
        thinking: Thinking | None,
        opened: bool,
        scanner: CallScanner | None,
        visible: frozenset[int] = frozenset(),
        ends: int | None = None,
    ) -> None:
        self.visible = visible
        self.ends = ends
        self.has_thought = opened
        self._thinking = thinking
        self._opened = opened
        self._scanner = scanner
        self._inside = False
        self._held = ""
        self._trim = False  # white space at the beginning of reasoning, or behind it

    @property
    def thinking(self) -> bool:
        """Whether the reasoning is not over yet, or it is not known yet if there is any."""
        return self._thinking is not None

    @property
    def calls(self) -> int:
        """Calls so far."""
        return self._scanner.calls if self._scanner else 0

    @property
    def done(self) -> bool:
        """Whether nothing more is wanted of the model."""
        return self._scanner is not None and self._scanner.done

    def read(self, text: str, final: bool = False) -> list[Part]:
        """The parts that are certain with `text`, the next piece; all of them if it is the `final` one."""
        if self._thinking is None:
            return self._content(text, final)
        parts: list[Part] = []
        self._held += text
        if not self._inside and not self._began(self._thinking, final):
            return parts
        if self._inside:
            self._reason(self._thinking, parts, final)
        if not self.thinking:
            rest, self._held = self._held, ""
            parts += self._content(rest, final)
        return parts

    def _began(self, marks: Thinking, final: bool) -> bool:
        """Whether it is known now if there is any reasoning."""
        seen = self._held.lstrip()
        if seen.startswith(marks.start):
            self._held = seen[len(marks.start) :]
            self.has_thought = True
        elif marks.start.startswith(seen) and not final:
            return False
        elif not self._opened:
            self._thinking = None
            return True
        self._inside = self._trim = True
        return True

    def _reason(self, marks: Thinking, parts: list[Part], final: bool) -> None:
        if self._trim:
            self._held = self._held.lstrip()
            self._trim = not self._held
        end = self._held.find(marks.end)
        if end >= 0:
            text, self._held = self._held[:end].rstrip(), self._held[end + len(marks.end) :]
            self._thinking, self._trim = None, True
        else:
            sure = self._held[: len(self._held) - _beginning(self._held, (marks.end,))].rstrip()
            text = self._held if final else sure
            self._held = self._held[len(text) :]
        if text:
            parts.append(Reasoning(text))

    def _content(self, text: str, final: bool) -> list[Part]:
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        if self._scanner is not None:
            return self._scanner.read(text, final)
        return [text] if text else []
