"""Chat templates: finding a model's, rendering messages with it in jinja's sandbox, meeting what it demands of them.

Templates refuse what their models were not trained on (a second system message, two user turns in a row), or leave it
out without a word. Which of it is found once, by rendering probes. All that is put elsewhere stays in its place from
turn to turn, so that each prompt begins with the one before.
"""

import json
from collections.abc import Callable
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

import jinja2
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from miniserve.config import problem, read_object, tables
from miniserve.sampling_params import ParameterError

Message = dict[str, Any]
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "documents"})
THINKING_VARIABLES = frozenset({"enable_thinking", "thinking", "reasoning_effort"})
"""Requests may set these for every model: clients send them to models that do not think, too."""
Render = Callable[[list[Message]], str | None]
"""A conversation as the template renders it; None where it refuses."""
TABLES = tables("text/demands.toml")
PROBES: dict[str, Message] = TABLES["probes"]
DEMANDS: dict[str, list[list[str]]] = TABLES["demands"]


class ChatTemplates:
    """The compiled templates of a model: `texts` maps names (`default`, `tool_use`) to jinja text, `variables` are
    those that all see (`bos_token`), and `settable` those that templates read and requests may set. Immutable, safe to
    use from many threads. Raises `ParameterError` for text that is no jinja."""

    def __init__(self, texts: dict[str, str], variables: dict[str, str]) -> None:
        self._variables = variables
        self._compiled: dict[str, jinja2.Template] = {}
        self.settable = THINKING_VARIABLES
        environment = _environment()
        for name, text in texts.items():
            try:
                self._compiled[name] = environment.from_string(text)
                self.settable |= find_undeclared_variables(environment.parse(text))
            except jinja2.TemplateError as error:
                raise ParameterError("chat_template", problem("text.no_jinja", why=error.message)) from error
        self.settable -= RESERVED | variables.keys() | environment.globals.keys()

    def render(
        self, messages: list[Message], tools: Any, add_generation_prompt: bool, end: str, variables: dict[str, Any]
    ) -> str:
        """The rendered text. `variables` are the request's own. Where `end` is not empty it is put after the last
        message's content (which is changed in place), and the text ends before it. Raises `ParameterError`."""
        template = self._compiled.get("tool_use") if tools else None
        template = template or self._compiled.get("default") or next(iter(self._compiled.values()), None)
        if template is None:
            raise ParameterError("messages", problem("text.no_template"))
        if unknown := variables.keys() - self.settable:
            said = problem("text.variable", name=min(unknown)[:64], known=", ".join(sorted(self.settable)))
            raise ParameterError("chat_template_kwargs", said)
        if end:
            messages[-1]["content"] += end + " "
        scope = {**self._variables, "documents": None, **variables, "tools": tools, "messages": messages}
        try:
            text = template.render(scope, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise ParameterError("messages", f"The chat template refuses this: {error.message}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ParameterError("messages", f"The chat template cannot render this: {error}") from error
        if end:
            at = text.rfind(end)
            if at < 0:
                raise ParameterError("continue_final_message", problem("text.left_out"))
            # A template that trims content has taken the space after the mark, and meant to trim what is before it.
            text = text[:at] if text.startswith(end + " ", at) else text[:at].rstrip()
        return text


def find_templates(folder: Path, settings: dict[str, Any], given: str | None) -> dict[str, str]:
    """Name -> jinja text; `given` (a file or a text) replaces the model's own."""
    if given is not None:
        if not any(mark in given for mark in "{\n"):
            try:
                return {"default": Path(given).expanduser().read_text("utf-8")}
            except OSError as error:
                said = problem("text.template_file", given=given, reason=error.strerror)
                raise ParameterError("chat_template", said) from error
        return {"default": given}
    templates: dict[str, str] = {}
    own = settings.get("chat_template") or read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(own, str):
        templates["default"] = own
    elif isinstance(own, list):
        templates |= {entry["name"]: entry["template"] for entry in own}
    if (path := folder / "chat_template.jinja").is_file():
        templates["default"] = path.read_text("utf-8")
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[path.stem] = path.read_text("utf-8")
    return templates


class GenerationTag(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is only a block."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    """The sandbox chat templates run in, with what they expect to find there."""

    def tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        # jinja's own filter escapes HTML, which no model was trained on.
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class Demands(frozenset[str]):
    """What a template does not render as it is, by its names in demands.toml; empty for one that renders anything."""

    @classmethod
    def of(cls, render: Render) -> Self:
        def refuses(probes: str) -> bool:
            messages = [PROBES[probe] for probe in probes.split()]
            text = render([dict(message) for message in messages])
            places = [-1 if text is None else text.find(message["content"]) for message in messages]
            return min(places) < 0 or ("late" in probes and places != sorted(places))

        def holds(condition: str) -> bool:
            plain = condition.removeprefix("!")
            return (plain in found if plain in DEMANDS else refuses(plain)) == (plain == condition)

        found: set[str] = set()
        if not refuses("ask"):  # else there is nothing to learn from it
            for name, cases in DEMANDS.items():
                found |= {name} if any(all(map(holds, case)) for case in cases) else set()
        return cls(found)

    def met(self, messages: list[Message]) -> list[Message]:
        """The conversation as the template takes it."""
        if not self:
            return messages
        leading = list(takewhile(lambda message: message["role"] == "system", messages))
        rest = messages[len(leading) :]
        if "one_system" in self and leading:
            leading = [{**leading[0], "content": _joined(*leading)}]
        if "no_system" in self:
            leading, rest = [], leading + rest
        out: list[Message] = []
        called = False  # by the last message that was no result
        for message in rest:
            if message["role"] == "tool" and ("no_tool" in self or ("tool_after_call" in self and not called)):
                message = {"role": "user", "content": message["content"]}
            elif message["role"] == "system" and "system_first" in self:
                message = {**message, "role": "user"}
            if message["role"] != "tool":
                called = bool(message.get("tool_calls"))
            last = out[-1] if out else {"role": None}
            behind_tool = "no_user_after_tool" in self and (last["role"], message["role"]) == ("tool", "user")
            if behind_tool or ("alternate" in self and last["role"] == message["role"] in ("user", "assistant")):
                out[-1] = _one(last, message)
            else:
                out.append(message)
        if "user_first" in self and (not out or out[0]["role"] != "user"):
            out.insert(0, {"role": "user", "content": ""})
        return leading + out


def _one(first: Message, second: Message) -> Message:
    """Two neighbours as one message, with the calls and the reasoning of both."""
    one = {**first, "content": _joined(first, second)}
    if calls := [*(first.get("tool_calls") or []), *(second.get("tool_calls") or [])]:
        one["tool_calls"] = calls
    if thoughts := [m["reasoning_content"] for m in (first, second) if m.get("reasoning_content")]:
        one["reasoning_content"] = "\n\n".join(thoughts)
    return one


def _joined(*messages: dict[str, Any]) -> str:
    return "\n\n".join(message["content"] for message in messages if message["content"])
