"""Parsers of tool calls, one for each family of formats (`formats.toml`).

A `CallParser` is made at each place where a call may begin. It looks at every character once however the text arrives,
and ends with the calls that stand there, or with the finding that this is no call.
"""

import json
import re
from collections.abc import Generator
from typing import Any, NamedTuple, TypeVar

from miniserve.text.calls import Begun, Call, Schemas, json_calls, sound
from miniserve.text.schemas import argument, typed

T = TypeVar("T")
Parsing = Generator[None, None, T]
"""Yields where it needs more text than there is, and goes on from there."""

SPACE = re.compile(r"[ \t\n\r]*")
ATOM = re.compile(r"[\w.+-]*")
ANY = re.compile(r'(?:[^"\\]+|\\.)*+', re.DOTALL)
SOUND = re.compile(
    r'(?:[^"\\\x00-\x1f]+|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+"
)
"""In a string: what is valid, and what ends behind a whole escape."""
LONGEST_ESCAPE = 12
VALUE, KEY, MORE = '{["0', '"', ",]}"
"""What may follow in JSON, by its first character; "0" stands for numbers and words."""
TAG_MARKS = ("<parameter=", "</parameter>", "<function=", "</function>")
"""Around the arguments of Qwen3-Coder's calls, and their names."""


class ParsedCalls(NamedTuple):
    """What a parser has come to. Without `calls` the text up to `end` is no call."""

    calls: list[Call]
    end: int


class CallParser:
    """What parsers share: they look for the end of a JSON object or list, and for the arguments of calls in it. These
    are certain as long as all was valid JSON, token by token; behind that only brackets and quotes count. `begun` are
    the calls whose arguments have begun, of which the last may get longer; none where calls come whole."""

    def __init__(self, schemas: Schemas) -> None:
        self.begun: list[Begun] = []
        self._schemas = schemas
        self._known_only = False  # what does not name a tool may be no call
        self._text, self._final = "", False
        self._parsing = self._parse()

    def read(self, text: str, final: bool) -> ParsedCalls | None:
        """`text` begins where a call may, and is longer each time; None until it needs more. `final`: no more comes."""
        self._text, self._final = text, final
        try:
            next(self._parsing)
        except StopIteration as end:
            return end.value
        return None

    def _parse(self) -> Parsing[ParsedCalls]:
        raise NotImplementedError

    def _json(self, start: int, called: str = "") -> Parsing[int]:
        """Where the JSON ends that begins with a bracket at `start`: the arguments of `called`, or one call or a list.
        Where something stands that is none of JSON, it ends there."""
        at, expected, strict = start, VALUE, True
        opened: list[str] = []  # brackets
        key = name = ""  # in the object of a call
        depth = 0  # of arguments that have not ended

        def note() -> None:
            if depth and strict:
                self.begun[-1] = self.begun[-1]._replace(end=at)

        while at == start or opened:
            while (at := past(SPACE, self._text, at)) == len(self._text):
                note()
                yield
            note()
            kind, end = self._text[at], at + 1
            if kind not in '{}[],:"':
                kind, end = "0", at
                while (end := past(ATOM, self._text, end)) == len(self._text):
                    yield
                if end == at:
                    return at
            opening, in_call = {"]": "[", "}": "{"}.get(kind), opened in (["{"], ["[", "{"])
            wrong = kind not in expected or (opening and opened[-1] != opening)
            strict = strict and not wrong and (kind != "0" or sound(self._text[at:end]))
            if kind == '"':
                at += 1
                while not self._text.startswith('"', at := past(SOUND if strict else ANY, self._text, at)):
                    rest = self._text[at : at + LONGEST_ESCAPE]
                    note()
                    if rest and strict and (rest[0] != "\\" or len(rest) == LONGEST_ESCAPE):
                        strict = False
                    else:
                        yield
                if strict and in_call:
                    said = json.loads(self._text[end - 1 : at + 1])
                    key, name = (said, name) if expected.startswith(KEY) else (key, said if key == "name" else name)
                end = at + 1
                expected = ":" if expected.startswith(KEY) else MORE
            elif kind in "{[":
                found = name if in_call and not called and key in ("arguments", "parameters") and kind == "{" else ""
                found = found if opened else called
                if found and strict and (found in self._schemas or not self._known_only):
                    self.begun.append(Begun(found, at, at))
                    depth = len(opened) + 1
                if opened in ([], ["["]) or found:
                    key = name = ""
                opened.append(kind)
                expected = KEY + "}" if kind == "{" else VALUE + "]"
            elif opening:
                opened.pop()
                expected = MORE
            else:
                expected = {"0": MORE, ":": VALUE}.get(kind, VALUE if opened[-1] == "[" else KEY)
            at = end
            note()
            depth = depth if len(opened) >= depth else 0
        return at


def past(expression: re.Pattern[str], text: str, start: int) -> int:
    """Where ends what an expression that matches nothing, too, matches at `start`."""
    passed = expression.match(text, start)
    assert passed is not None
    return passed.end()


class TagParser(CallParser):
    """Hermes, Qwen and SmolLM2: JSON, an object or a list, in <tool_call>; Qwen3-Coder: <function=...> in it, or alone.

    Inside of a JSON string the closing tag is a part of the string. Qwen3-Coder's arguments are not quoted: a mark in
    one may be text that the model writes to a file, or follow a mark that it forgot, and nothing tells which. vLLM ends
    the argument there and drops what stands before the next mark, so that half a file is written. Here such a call is
    content as a whole, up to where it would have closed, and no call inside of it is read. Only <tool_call> and
    </tool_call> may stand in an argument: with the mark behind them that closes it, they are a part of it.
    """

    _OPEN = re.compile(r"(?:<tool_call>)?\s*")
    _CLOSE = "</tool_call>"
    _FUNCTION, _FUNCTION_END = TAG_MARKS[2:]
    _MARKS = re.compile("|".join(TAG_MARKS))
    _HEAD = re.compile(r"<function=([^<>\s]+)>\s*")
    _PARAMETER = re.compile(r"<parameter=([^<>\n]+)>(.*?)</parameter>\s*", re.DOTALL)

    def _parse(self) -> Parsing[ParsedCalls]:
        while self._FUNCTION.startswith(rest := self._text[(start := past(self._OPEN, self._text, 0)) :]):
            yield
        if rest.startswith(self._FUNCTION):
            return (yield from self._parse_function(start))
        if rest[0] not in "{[":
            return ParsedCalls([], start)
        end = yield from self._json(start)
        close = yield from self._closing(end)
        return ParsedCalls(json_calls(self._text[start:end]) if close else [], close or end)

    def _parse_function(self, start: int) -> Parsing[ParsedCalls]:
        at, inside = start + len(self._FUNCTION), False  # of an argument
        while True:
            mark = yield from self._found(self._MARKS, at)
            if mark[0] == self._FUNCTION_END and not inside:
                close = yield from self._closing(mark.end())
                # Without <tool_call> before it, none need close it.
                calls = self._function(self._text[start : mark.start()]) if close or not start else []
                return ParsedCalls(calls, close or mark.end())
            if mark[0] != ("</parameter>" if inside else "<parameter="):
                closing = yield from self._found(re.compile(self._CLOSE if start else self._FUNCTION_END), mark.start())
                return ParsedCalls([], closing.end())
            at, inside = mark.end(), not inside

    def _found(self, marks: re.Pattern[str], at: int) -> Parsing[re.Match[str]]:
        """The first of `marks` behind `at`."""
        while not (found := marks.search(self._text, at)):
            at = max(at, len(self._text) - len(self._CLOSE) + 1)  # none is longer
            yield
        return found

    def _closing(self, end: int) -> Parsing[int]:
        """Where the closing tag after `end` ends; 0 if something else is there. An answer may end without it."""
        while not (rest := self._text[end:].lstrip()).startswith(self._CLOSE):
            if self._final or not self._CLOSE.startswith(rest):
                return len(self._text) if self._CLOSE.startswith(rest) else 0
            yield
        return len(self._text) - len(rest) + len(self._CLOSE)

    def _function(self, body: str) -> list[Call]:
        head = self._HEAD.match(body)
        if head is None or self._PARAMETER.sub("", body[head.end() :]):  # something stands between its parameters
            return []
        schema = self._schemas.get(head[1])
        arguments: dict[str, Any] = {}
        for key, text in self._PARAMETER.findall(body, head.end()):
            arguments[key] = typed(text.removeprefix("\n").removesuffix("\n"), argument(schema, key), schema)
        return [Call(head[1], json.dumps(arguments, ensure_ascii=False))]


class LlamaParser(CallParser):
    """Llama 3.x: a JSON object, after <|python_tag|> or by itself; its first key separates it from other JSON early. By
    itself it is a call if it has arguments or names a tool: other objects have names, too."""

    _OPEN = re.compile(r"(?:<\|python_tag\|>)?\s*")
    _FIRST = re.compile(r'\{\s*(?:"(\w*"?))?')
    _FIRST_KEYS = ('name"', 'function"', 'arguments"', 'parameters"', 'type"', 'id"')

    def _parse(self) -> Parsing[ParsedCalls]:
        while (start := past(self._OPEN, self._text, 0)) == len(self._text):
            yield
        while first := self._FIRST.match(self._text, start):
            key = first[1] or ""
            if key in self._FIRST_KEYS:
                break
            if first.end() < len(self._text) or not any(known.startswith(key) for known in self._FIRST_KEYS):
                return ParsedCalls([], start + 1)
            yield
        else:
            return ParsedCalls([], start)
        self._known_only = not start
        end = yield from self._json(start)
        calls = json_calls(self._text[start:end])
        sure = start > 0 or all(call.name in self._schemas or call.arguments != "{}" for call in calls)
        return ParsedCalls(calls if sure else [], end)


class MistralParser(CallParser):
    """Mistral: [TOOL_CALLS] and a list of objects, or in newer models a name, [ARGS] and the arguments."""

    _MARK = "[TOOL_CALLS]"
    _HEAD = re.compile(r"\s*(?:([\w.-]+)(?:\[CALL_ID\]\s*[\w-]*)?(?:\[ARGS\])?\s*)?")
    _INNER = ("[CALL_ID]", "[ARGS]")

    def _parse(self) -> Parsing[ParsedCalls]:
        while head := self._HEAD.match(self._text, len(self._MARK)):
            start, name = head.end(), head[1] or ""
            rest = self._text[start : start + len("[CALL_ID]")]
            if rest and not (name and any(inner.startswith(rest) for inner in self._INNER)):
                break
            yield
        if rest[0] != "{" and (name or rest[0] != "["):
            return ParsedCalls([], start)
        end = yield from self._json(start, name)
        return ParsedCalls(json_calls(self._text[start:end], name), end)


PARSERS: dict[str, type[CallParser]] = {"tags": TagParser, "llama": LlamaParser, "mistral": MistralParser}
"""As formats.toml calls them."""
