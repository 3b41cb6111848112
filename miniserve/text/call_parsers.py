"""Parsers of tool calls, one for each family of formats (`formats.toml`).

A `CallParser` is made at each place where a call may begin. It looks at every character once however the text arrives,
and ends with the calls that stand there, or with the finding that this is no call.
"""

import json
import re
from typing import Any, NamedTuple

from miniserve.text.calls import Begun, Call, Schemas, call_with, json_calls, sound
from miniserve.text.schemas import argument, typed


class ParsedCalls(NamedTuple):
    """What a parser has come to. Without `calls` the text up to `end` is no call."""

    calls: list[Call]
    end: int


class CallParser:
    """What parsers share: they look for the end of a JSON object or list, and for the arguments of calls in it. These
    are certain as long as all was valid JSON, token by token; behind that only brackets and quotes count.

    `begun` are the calls whose arguments have begun; the last may get longer. Empty where calls come whole.
    """

    _SPACE = re.compile(r"[ \t\n\r]*")
    _ATOM = re.compile(r"[\w.+-]*")
    _ANY = re.compile(r'(?:[^"\\]+|\\.)*+', re.DOTALL)
    _SOUND = re.compile(
        r'(?:[^"\\\x00-\x1f]+|\\["\\/bfnrt]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
        r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+"
    )
    _LONGEST_ESCAPE = 12
    _VALUE, _KEY, _MORE = '{["0', '"', ",]}"
    """What may follow, by its first character; "0" stands for numbers and words."""

    def __init__(self, schemas: Schemas) -> None:
        self.begun: list[Begun] = []
        self._schemas = schemas
        self._known_only = False  # what does not name a tool may be no call
        self._at = 0  # so far the JSON was looked at
        self._passed = 0  # so far a number or word was
        self._open: list[str] = []  # brackets
        self._quoted = -1  # where the string begins that it is in
        self._next = self._VALUE
        self._strict = True  # it was valid so far
        self._key = self._name = ""  # in the object of a call
        self._depth = 0  # of arguments that have not ended

    def read(self, text: str, final: bool) -> ParsedCalls | None:
        """`text` begins where a call may, and is longer each time; None until it needs more. `final`: no more comes."""
        raise NotImplementedError

    def _json_end(self, text: str, start: int, name: str = "") -> int | ParsedCalls | None:
        """Where the JSON ends that begins with a bracket at `start`: the arguments of `name`, or one call or a list.
        None while more text is needed, the finding that this is no call for what stands in no JSON."""
        self._at = max(self._at, start)
        while self._at == start or self._open:
            went = self._token(text, name) if self._quoted < 0 else self._string(text)
            self._note()
            if not went:
                return ParsedCalls([], self._at) if went is False else None
            self._depth = self._depth if len(self._open) >= self._depth else 0
        return self._at

    def _note(self) -> None:
        if self._depth and self._strict:
            self.begun[-1] = self.begun[-1]._replace(end=self._at)

    def _token(self, text: str, name: str) -> bool | None:
        """Go on behind the next token. None while more text is needed, False if it is none of JSON."""
        self._at = self._passed_by(self._SPACE, text, self._at)
        if self._at == len(text):
            return None
        kind, end = text[self._at], self._at + 1
        if kind not in '{}[],:"':
            kind, end = "0", self._passed_by(self._ATOM, text, max(self._at, self._passed))
            self._passed = end
            if end in (self._at, len(text)):
                return None if end > self._at else False
        opening = {"]": "[", "}": "{"}.get(kind)
        wrong = kind not in self._next or (opening and self._open[-1] != opening)
        if wrong or (kind == "0" and not sound(text[self._at : end])):
            self._note()
            self._strict = False
        if kind == '"':
            self._quoted = self._at
        elif kind in "{[":
            self._enter(kind, name)
            self._next = self._KEY + "}" if kind == "{" else self._VALUE + "]"
        elif opening:
            self._open.pop()
            self._next = self._MORE
        else:
            of_list = self._open[-1] == "["
            self._next = {"0": self._MORE, ":": self._VALUE}.get(kind, self._VALUE if of_list else self._KEY)
        self._at = end
        return True

    def _enter(self, bracket: str, name: str) -> None:
        of_call = not name and self._open in (["{"], ["[", "{"])
        found = self._name if of_call and self._key in ("arguments", "parameters") and bracket == "{" else ""
        found = name if not self._open else found
        if found and self._strict and (found in self._schemas or not self._known_only):
            self.begun.append(Begun(found, self._at, self._at))
            self._depth = len(self._open) + 1
        if self._open in ([], ["["]) or found:
            self._key = self._name = ""
        self._open.append(bracket)

    def _string(self, text: str) -> bool | None:
        """Go on in a string, and behind it if it ends."""
        passed = self._SOUND if self._strict else self._ANY
        self._at = self._passed_by(passed, text, self._at + (self._at == self._quoted))
        rest = text[self._at : self._at + self._LONGEST_ESCAPE]
        if text.startswith('"', self._at):
            self._at += 1
            if self._strict and self._open in (["{"], ["[", "{"]):
                said = json.loads(text[self._quoted : self._at])
                if self._next.startswith(self._KEY):
                    self._key = said
                elif self._key == "name":
                    self._name = said
            self._next = ":" if self._next.startswith(self._KEY) else self._MORE
            self._quoted = -1
        elif rest and self._strict and (rest[0] != "\\" or len(rest) == self._LONGEST_ESCAPE):
            self._note()
            self._strict = False
        else:
            return None
        return True

    @staticmethod
    def _passed_by(expression: re.Pattern[str], text: str, start: int) -> int:
        passed = expression.match(text, start)
        assert passed is not None  # they match nothing, too
        return passed.end()


TAG_MARKS = ("<parameter=", "</parameter>", "<function=", "</function>")
"""Around the arguments of Qwen3-Coder's calls, and their names."""


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
    _MARK = re.compile("|".join(TAG_MARKS))
    _HEAD = re.compile(r"<function=([^<>\s]+)>\s*")
    _PARAMETER = re.compile(r"<parameter=([^<>\n]+)>(.*?)</parameter>\s*", re.DOTALL)

    def __init__(self, schemas: Schemas) -> None:
        super().__init__(schemas)
        self._searched = 0
        self._inside = False  # of an argument
        self._broken = ""  # what closes a call with a mark in an argument

    def read(self, text: str, final: bool) -> ParsedCalls | None:
        start = self._passed_by(self._OPEN, text, 0)
        head = text[start : start + len(self._FUNCTION)]
        if head.startswith(("{", "[")):
            return self._read_json(text, start, final)
        if head == self._FUNCTION:
            return self._read_function(text, start, final)
        return None if self._FUNCTION.startswith(head) else ParsedCalls([], start)

    def _read_json(self, text: str, start: int, final: bool) -> ParsedCalls | None:
        end = self._json_end(text, start)
        if not isinstance(end, int):
            return end
        close = self._closing(text, end, final)
        if close is None:
            return None
        return ParsedCalls(json_calls(text[start:end]) if close else [], close or end)

    def _read_function(self, text: str, start: int, final: bool) -> ParsedCalls | None:
        self._searched = max(self._searched, start + len(self._FUNCTION))
        while not self._broken and (mark := self._MARK.search(text, self._searched)):
            if mark[0] == self._FUNCTION_END and not self._inside:
                close = self._closing(text, mark.end(), final)
                if close is None:
                    return None
                # Without <tool_call> before it, none need close it.
                calls = self._function(text[start : mark.start()]) if close or not start else []
                return ParsedCalls(calls, close or mark.end())
            if mark[0] == ("</parameter>" if self._inside else "<parameter="):
                self._inside, self._searched = not self._inside, mark.end()
            else:
                self._broken = self._CLOSE if start else self._FUNCTION_END
                self._searched = mark.start()
        if self._broken and (at := text.find(self._broken, self._searched)) >= 0:
            return ParsedCalls([], at + len(self._broken))
        self._searched = max(self._searched, len(text) - len(self._CLOSE) + 1)
        return None

    def _closing(self, text: str, end: int, final: bool) -> int | None:
        """Where the closing tag after `end` ends; 0 if something else stands there, None if that cannot be known yet.
        A model that stops before it has still said all there is to say."""
        rest = text[end:].lstrip()
        if rest.startswith(self._CLOSE):
            return len(text) - len(rest) + len(self._CLOSE)
        if not self._CLOSE.startswith(rest):
            return 0
        return len(text) if final else None

    def _function(self, body: str) -> list[Call]:
        head = self._HEAD.match(body)
        if head is None:
            return []
        schema = self._schemas.get(head[1])
        arguments: dict[str, Any] = {}
        at = head.end()
        while at < len(body):
            found = self._PARAMETER.match(body, at)
            if found is None:
                return []
            text = found[2].removeprefix("\n").removesuffix("\n")
            arguments[found[1]] = typed(text, argument(schema, found[1]), schema)
            at = found.end()
        return [Call(head[1], json.dumps(arguments, ensure_ascii=False))]


class LlamaParser(CallParser):
    """Llama 3.x: a JSON object, after <|python_tag|> or by itself; its first key separates it from other JSON early. By
    itself it is a call if it has arguments or names a tool: other objects have names, too."""

    _OPEN = re.compile(r"(?:<\|python_tag\|>)?\s*")
    _FIRST = re.compile(r'\{\s*(?:"(\w*)("?))?')
    _FIRST_KEYS = ("name", "function", "arguments", "parameters", "type", "id")

    def read(self, text: str, final: bool) -> ParsedCalls | None:
        start = self._passed_by(self._OPEN, text, 0)
        if start == len(text):
            return None
        first = self._FIRST.match(text, start)
        if first is None:
            return ParsedCalls([], start)
        key, whole = first[1] or "", first[2]
        if not whole:
            may_be = first.end() == len(text) and any(known.startswith(key) for known in self._FIRST_KEYS)
            return None if may_be else ParsedCalls([], start + 1)
        if key not in self._FIRST_KEYS:
            return ParsedCalls([], start + 1)
        self._known_only = not start
        end = self._json_end(text, start)
        if not isinstance(end, int):
            return end
        calls = json_calls(text[start:end])
        sure = start > 0 or all(call.name in self._schemas or call.arguments != "{}" for call in calls)
        return ParsedCalls(calls if sure else [], end)


class MistralParser(CallParser):
    """Mistral: [TOOL_CALLS] and a list of objects, or in newer models a name, [ARGS] and the arguments."""

    _MARK = "[TOOL_CALLS]"
    _HEAD = re.compile(r"\s*(?:(?P<name>[\w.-]+)(?:\[CALL_ID\]\s*[\w-]*)?(?:\[ARGS\])?\s*)?")
    _INNER = ("[CALL_ID]", "[ARGS]")

    def read(self, text: str, final: bool) -> ParsedCalls | None:
        head = self._HEAD.match(text, len(self._MARK))
        assert head is not None
        start, name = head.end(), head["name"]
        rest = text[start : start + len("[CALL_ID]")]
        if not rest or (name and any(inner.startswith(rest) for inner in self._INNER)):
            return None
        if rest[0] != "{" and (name or rest[0] != "["):
            return ParsedCalls([], start)
        end = self._json_end(text, start, name or "")
        if not isinstance(end, int):
            return end
        if not name:
            return ParsedCalls(json_calls(text[start:end]), end)
        try:
            call = call_with(name, text[start:end])
        except (ValueError, RecursionError):
            call = None
        return ParsedCalls([call] if call else [], end)


PARSERS: dict[str, type[CallParser]] = {"tags": TagParser, "llama": LlamaParser, "mistral": MistralParser}
"""As formats.toml calls them."""
