"""What a chat template demands of a conversation, and how any conversation meets that.

Templates refuse what their models were not trained on (a second system message, two user turns in a row), or leave it
out without a word. Which of it is found once, by rendering probes. All that is put elsewhere stays in its place from
turn to turn, so that each prompt begins with the one before.
"""

from collections.abc import Callable
from itertools import takewhile
from typing import Any, NamedTuple

from miniserve.config import tables
from miniserve.text.template import Message

Render = Callable[[list[Message]], str | None]
"""A conversation as the template renders it; None where it refuses."""

PROBES: dict[str, Message] = tables("text/demands.toml")


class Demands(NamedTuple):
    """What a template does not render as it is; all false for one that renders anything."""

    no_system: bool = False
    """There is no system message: it is user text."""
    one_system: bool = False
    """System messages at the beginning are one."""
    system_first: bool = False
    """A later one is user text."""
    no_tool: bool = False
    """There are no results of tools: they are user text."""
    tool_after_call: bool = False
    """Results that answer no call are user text."""
    no_user_after_tool: bool = False
    """User text behind a result is a part of it."""
    alternate: bool = False
    """Neighbours of the same role are one message."""
    user_first: bool = False
    """An empty user message stands before what is none."""

    @classmethod
    def of(cls, render: Render) -> "Demands":
        def refuses(probes: str) -> bool:
            messages = [PROBES[probe] for probe in probes.split()]
            text = render([dict(message) for message in messages])
            places = [-1 if text is None else text.find(message["content"]) for message in messages]
            return min(places) < 0 or ("late" in probes and places != sorted(places))

        if refuses("ask"):  # nothing to learn from such a one
            return cls()
        calls = not refuses("ask call result")
        no_system = refuses("system ask")
        alternate = refuses("ask more") or refuses("ask said said more")
        return cls(
            no_system=no_system,
            one_system=not no_system and refuses("system late ask"),
            system_first=no_system or refuses("system ask said late more") or refuses("ask said late more"),
            no_tool=not calls and refuses("ask said result"),
            # Where turns alternate a result that answers nothing would be neither the one's turn nor the other's.
            tool_after_call=alternate or refuses("result ask") or refuses("ask said result"),
            no_user_after_tool=calls and refuses("ask call result more"),
            alternate=alternate,
            user_first=refuses("said ask") or (not no_system and refuses("system")),
        )

    def met(self, messages: list[Message]) -> list[Message]:
        """The conversation as the template takes it."""
        if not any(self):
            return messages
        leading = list(takewhile(lambda message: message["role"] == "system", messages))
        rest = messages[len(leading) :]
        if self.one_system and leading:
            leading = [{**leading[0], "content": _joined(*leading)}]
        if self.no_system:
            leading, rest = [], leading + rest
        out: list[Message] = []
        called = False  # by the last message that was no result
        for message in rest:
            if message["role"] == "tool" and (self.no_tool or (self.tool_after_call and not called)):
                message = {"role": "user", "content": message["content"]}
            elif message["role"] == "system" and self.system_first:
                message = {**message, "role": "user"}
            if message["role"] != "tool":
                called = bool(message.get("tool_calls"))
            last = out[-1] if out else {"role": None}
            behind_tool = self.no_user_after_tool and (last["role"], message["role"]) == ("tool", "user")
            if behind_tool or (self.alternate and last["role"] == message["role"] in ("user", "assistant")):
                out[-1] = _one(last, message)
            else:
                out.append(message)
        if self.user_first and (not out or out[0]["role"] != "user"):
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
