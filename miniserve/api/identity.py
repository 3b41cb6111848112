"""Who is speaking: what the headers and fields of a request say of its conversation, its group and its urgency."""

import re
from collections.abc import Mapping, Sequence

import msgspec

from miniserve.api.errors import ApiError
from miniserve.api.fields import MAX_KEY_CHARS
from miniserve.api.openai.parameters import GenerationRequest
from miniserve.config import tables
from miniserve.scheduler.conversation import Said

OWN_HEADER = "X-Conversation-ID"
TIERS = {"priority": -1, "flex": 1}
"""What OpenAI's `service_tier` adds to a `priority`."""


class Client(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A row of clients.toml, which says what each field means."""

    session: list[str] = []
    known_by: list[str] = []
    user_agent: str = ""
    agent: str = ""
    parent: str = ""
    kind: str = ""
    side: list[str] = []
    always_tools: bool = False


CLIENTS = msgspec.convert(tables("api/clients.toml"), dict[str, Client])


def speaker(headers: Mapping[str, str], body: GenerationRequest, own_headers: Sequence[str] = ()) -> tuple[str, Said]:
    """The key of a request's conversation, "" if it has none, and what else the client says. `own_headers` go before
    those of clients. Raises `ApiError` for a key that is too long."""
    tools = bool(body.tool_names)
    agent = headers.get("user-agent", "").lower()
    # The last one is any client: whatever an agent is called begins with nothing.
    name = next(n for n, c in CLIENTS.items() if agent.startswith(c.user_agent) or {*headers} & {*c.known_by})
    row = CLIENTS[name]
    key = _first(headers, [*own_headers, OWN_HEADER, *row.session, *CLIENTS["any"].session])
    session, parent = bool(key), _first(headers, [row.parent])
    if key and row.agent:  # the agents of a session; the one that has no id is the session's own
        parent = f"{key}/{parent}" if parent else key
        key, parent = (f"{key}/{one}", parent) if (one := _first(headers, [row.agent])) else (key, "")
    hints = body.nvext.agent_hints if body.nvext and body.nvext.agent_hints else None
    urgency = (body.priority or 0) - (hints.priority or 0 if hints else 0) + TIERS.get(body.service_tier or "", 0)
    said = Said(
        client=name if name != "any" else (re.match(r"[\w./ -]{1,32}?(?=[/ ]?\d|$)", agent) or [""])[0],
        parent=parent if parent != key else "",
        side=headers.get(row.kind) in row.side or (row.always_tools and not tools),
        session=session,
        tools=tools,
        tool_result=body.ends_in_tool_result,
        priority=urgency,
        osl=hints.osl if hints else None,
    )
    return key or body.prompt_cache_key or "", said


def _first(headers: Mapping[str, str], names: Sequence[str]) -> str:
    for name in names:
        if found := headers.get(name):
            if len(found) > MAX_KEY_CHARS:
                raise ApiError(400, f"`{name}` is longer than {MAX_KEY_CHARS} characters: shorten it.", param=name)
            return found
    return ""
