"""The API over a real scheduler whose workers answer each turn at once, for what agents send."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.conversation import UNSAID, Said
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import Api, make_app
from tests.support.fake_engine import EOS, FakeTurn, spell
from tests.support.live_engine import LiveClient

WORD = "Fine."


class AgentEngine(LiveClient):
    """Each turn says `WORD` and has ended when `submit` returns, unless it `holds`."""

    holds = False
    found = 0
    """Tokens of the next prompts that are found."""

    def __init__(self) -> None:
        super().__init__(steps=[*spell(WORD), [EOS]], stop_token=EOS)
        self.max_model_len = 131_072
        self.made = 0

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        conversation: str | int = "",
        salt: str = "",
        request_id: str = "",
        said: Said = UNSAID,
    ) -> FakeTurn:
        turn = super().submit(tokens, params, conversation=conversation, salt=salt, request_id=request_id, said=said)
        self.made += 1
        turn.cached = min(self.found, len(tokens) - 1)
        turn.id = f"t{self.made}"
        self.carry_out(self.scheduler.submit(turn.id, tokens, params, 0, conversation, salt, time.monotonic(), said))
        accepted = self.scheduler.turns.get(turn.id)
        assert accepted is not None
        turn.conversation, turn.number, turn.change = accepted.conversation.key, accepted.number, accepted.change
        if not self.holds:
            self.report(turn.id, 0, [7], prefill=0.01)
            self.report(turn.id, 1, [8, EOS], "stop")
        return turn


class AgentApi(Api):
    """A client of it."""

    engine: AgentEngine

    def __init__(self, tokenizer: Tokenizer, **config: Any) -> None:
        engine = AgentEngine()
        super().__init__(make_app(tokenizer, engine, **config), engine)

    async def send(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        """A request that must be served; only the wrapped prompt counts."""
        response = await self.http.post(path, json={**body, "stream": False, "model": None}, headers=headers)
        assert response.status_code == 200, response.text
        # The doctor looks at a prompt beside its turn.
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))

    async def conversations(self) -> list[dict[str, Any]]:
        """Those of GET /conversations, the earliest first."""
        return (await self.http.get("/conversations?limit=1000")).json()["data"][::-1]

    async def misses(self) -> list[tuple[str, str]]:
        """(kind, field) of all misses that GET /conversations/ID shows."""
        found = []
        for conversation in await self.conversations():
            detail = (await self.http.get(f"/conversations/{conversation['id']}")).json()
            found += [(miss["kind"], miss["field"]) for miss in detail["misses"]]
        return found


# --- requests -------------------------------------------------------------------------------------------------------


def tools(*names: str) -> list[dict[str, Any]]:
    """Tools of a chat, whose descriptions take some room."""
    words = "Use this one for what its name says, and for nothing else; it works in the folder of the project."
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}}
    return [
        {"type": "function", "function": {"name": name, "description": f"{name}: {words}", "parameters": parameters}}
        for name in names
    ]


def chat(task: str, turns: int, system: str = "") -> list[dict[str, Any]]:
    """The messages of turn number `turns` about a task: each turn before it was answered by `WORD`."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in range(1, turns + 1):
        messages.append({"role": "user", "content": task if turn == 1 else f"Go on with step {turn} of it."})
        if turn < turns:
            messages.append({"role": "assistant", "content": WORD})
    return messages


def items(task: str, turns: int) -> list[dict[str, Any]]:
    """The same as items of /v1/responses."""
    return [{"type": "message", **message} for message in chat(task, turns)]
