"""What a model writes, read as it comes: reasoning, content, and tool calls, each of them complete unless it is wanted
early.

The parts that a `Reader` gives are all that any API has to translate. It loses no text: what is no call after all is
content, and only white space beside the marks of calls and reasoning is dropped together with these.
"""

import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from miniserve.text.call_parsers import PARSERS, CallParser, ParsedCalls, past
from miniserve.text.calls import Begun, Schemas
from miniserve.text.detokenizer import beginning
from miniserve.text.formats import ReasoningMarks, ToolFormat


class Reasoning(msgspec.Struct, frozen=True):
    """A piece of what the model thinks before it answers."""

    text: str


class ToolCall(msgspec.Struct, frozen=True):
    """The answer's call number `index`. `arguments` is an object's JSON; its beginning if `MoreArguments` follow."""

    index: int
    id: str
    name: str
    arguments: str


class MoreArguments(msgspec.Struct, frozen=True):
    """Further text of the arguments of the call before, which is over when another part comes or the answer ends."""

    index: int
    text: str


Part = str | Reasoning | ToolCall | MoreArguments
"""A part of an answer; a string is a piece of its content."""


def merged(parts: list[Part]) -> list[Part]:
    """`parts` with neighbours of the same kind as one."""
    out: list[Part] = []
    for part in parts:
        match out[-1] if out else None, part:
            case str(before), str(text):
                out[-1] = before + text
            case Reasoning(before), Reasoning(text):
                out[-1] = Reasoning(before + text)
            case ToolCall(index, id, name, before), MoreArguments(_, text):
                out[-1] = ToolCall(index, id, name, before + text)
            case MoreArguments(index, before), MoreArguments(_, text):
                out[-1] = MoreArguments(index, before + text)
            case _:
                out.append(part)
    return out


class CallScanner:
    """Parts content into text and calls. With `single` all ends with the first call: `done`. With `first` there is no
    call behind text: what looks like one is a part of it. With `early` calls are given as they come, as far as they are
    certain; if one of them turns out to be none, its arguments end there and the rest of it is text."""

    _BARE = re.compile(r"\s*(?:;\s*)?")

    def __init__(
        self, form: ToolFormat, schemas: Schemas, single: bool, first: bool = False, early: bool = False
    ) -> None:
        self.calls = 0
        self.done = False
        self.broken = False  # one of the calls was given early, and is none
        self._format = form
        self._schemas = schemas
        self._single = single
        self._first = first
        self._early = early
        self._given: list[Begun] = []  # of the calls that are being read
        self._starts = re.compile("|".join(map(re.escape, form.starts)))
        self._held = ""
        self._gap = ""  # white space before the place that the parser reads
        self._parser: CallParser | None = None
        self._trim = False  # white space that follows a call
        self._fresh = True  # nothing but calls so far: the next one needs no mark, where the format has none

    def read(self, text: str, final: bool = False) -> list[Part]:
        """The parts that are certain with `text`, the next piece; all of them if it is the `final` one."""
        parts: list[Part] = []
        self._held += text
        while self._held and not self.done:
            if self._parser is None and not self._find(parts, final):
                break
            assert self._parser is not None
            found = self._parser.read(self._held, final)
            if self._early:
                self._stream(self._parser.begun, parts)
            if found is None and not final:
                break
            self._settle(found or ParsedCalls([], len(self._held)), parts)
        return parts

    def _find(self, parts: list[Part], final: bool) -> bool:
        """Give out what is certainly no call; whether one may begin behind it."""
        if self._first and not self._fresh:
            held, self._held = self._held, ""
            self._give(held, parts)
            return False
        held, at, kept = self._held, -1, ""
        if self._format.bare and self._fresh:
            begun = past(self._BARE, held, 0)
            if begun == len(held) and not final:
                return False
            at = begun if held.startswith("{", begun) else -1
        if at < 0:
            marked = self._starts.search(held)
            at = marked.start() if marked else len(held) - (0 if final else beginning(held, self._format.starts))
            kept = held[:at] if final and not marked else held[:at].rstrip()
            self._give(kept, parts)
            if marked is None:
                self._held = held[len(kept) :]
                return False
        self._gap, self._held = held[len(kept) : at], held[at:]
        self._parser = PARSERS[self._format.parser](self._schemas)
        return True

    def _stream(self, begun: list[Begun], parts: list[Part]) -> None:
        """Give out what has come of the arguments of calls."""
        for number, call in enumerate(begun[:1] if self._single else begun):
            if number == len(self._given):
                self._call(call.name, self._held[call.start : call.end], parts)
                self._given.append(call)
            elif more := self._held[self._given[number].end : call.end]:
                parts.append(MoreArguments(self.calls - 1, more))
                self._given[number] = call

    def _settle(self, found: ParsedCalls, parts: list[Part]) -> None:
        self._parser = None
        given, self._given = self._given, []
        calls = [(call.name, call.arguments) for call in found.calls[: 1 if self._single else None]]
        kept = 0
        if calls[: len(given)] != [(call.name, self._held[call.start : call.end]) for call in given]:
            calls, kept, self._trim, self.broken = [], given[-1].end, False, True
        text, self._held = self._held[kept : found.end], self._held[found.end :]
        if not calls:
            self._give(text if given else self._gap + text, parts)
            return
        for call in calls[len(given) :]:
            self._call(*call, parts)
        self.done = self._single

    def _call(self, name: str, arguments: str, parts: list[Part]) -> None:
        parts.append(ToolCall(self.calls, f"call_{secrets.token_hex(12)}", name, arguments))
        self.calls += 1
        self._trim = self._fresh = True

    def _give(self, text: str, parts: list[Part]) -> None:
        if self._trim:
            text = text.lstrip()
        if text:
            self._trim = False
            self._fresh = self._fresh and text.isspace()
            parts.append(text)


@dataclass(eq=False)
class Reader:
    """Reads one answer: reasoning first, if the model has any, then content with calls among it.

    `marks` is None for models that do not reason, and `opened` says that the prompt has begun the reasoning already.
    Without a `scanner` there are no calls. `visible` are special tokens whose text the reader needs to see, `ends` is
    the token that ends the reasoning, if it is a single one. `has_thought` says whether there was any reasoning.
    """

    marks: ReasoningMarks | None
    opened: bool
    scanner: CallScanner | None
    visible: frozenset[int] = frozenset()
    ends: int | None = None

    def __post_init__(self) -> None:
        self.thinking = self.marks is not None
        """Whether the reasoning is not over yet, or it is not known yet if there is any."""
        self.has_thought = self.opened
        self._parts: list[Part] = []
        self._held, self._final = "", False
        self._reading = self._read()

    @property
    def called(self) -> bool:
        """Whether there are calls, none of them broken off: all may be run."""
        return self.scanner is not None and self.scanner.calls > 0 and not self.scanner.broken

    @property
    def done(self) -> bool:
        return self.scanner is not None and self.scanner.done

    def read(self, text: str, final: bool = False) -> list[Part]:
        """The parts that are certain with `text`, the next piece; all of them if it is the `final` one."""
        self._held, self._final, self._parts = self._held + text, final, []
        next(self._reading)
        return self._parts

    def _read(self) -> Iterator[None]:
        """Gives out what is certain, and yields where it needs more text."""
        if self.marks is not None:
            yield from self._reason(self.marks)
        self.thinking = False
        while True:
            text, self._held = self._held, ""
            if self.scanner is not None:
                self._parts += self.scanner.read(text, self._final)
            elif text:
                self._parts.append(text)
            yield

    def _reason(self, marks: ReasoningMarks) -> Iterator[None]:
        """Goes up to the first text of the answer. White space at both ends of the reasoning is no part of it."""
        while not (seen := self._held.lstrip()).startswith(marks.start):
            if self._final or not marks.start.startswith(seen):
                break
            yield
        else:
            self._held, self.has_thought = seen.removeprefix(marks.start), True
        if not self.has_thought:
            return
        while not (held := self._held.lstrip()):
            yield
        while marks.end not in held:
            text = held if self._final else held[: len(held) - beginning(held, (marks.end,))].rstrip()
            self._parts += [Reasoning(text)] if text else []
            self._held = held[len(text) :]
            yield
            held = self._held
        text, _, self._held = held.partition(marks.end)
        self._parts += [Reasoning(text.rstrip())] if text.rstrip() else []
        self.thinking = False
        while not (held := self._held.lstrip()):
            yield
        self._held = held
