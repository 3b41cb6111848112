"""Drives a live server as agents would: each conversation arrives at its time, each turn after its tool has run. A task
for each conversation, and a connection for each that waits for an answer."""

import asyncio
import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import aiohttp
import msgspec
import uvloop
from rich.console import Console
from rich.live import Live

from miniserve.bench.replay.answer import Answer, ask, session
from miniserve.bench.replay.metrics import ConversationTimes, Latency, latency, percentile, summary
from miniserve.bench.replay.server import TargetServer, Totals, describe, totals
from miniserve.bench.replay.workload import IDS, Script, Text, Workload
from miniserve.client import ApiClient
from miniserve.config import ConfigError, problem

ALONE = 1_000_003
"""Seeds of standalone conversations lie this far above the run's, which finds nothing of theirs in a cache."""
MOST_FAILURES = 10


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """What to replay where, each by the flag of its name (`cli/commands.toml`). Times are in seconds. `scale_tokens` is
    what the trace's token counts were multiplied by: an error message recommends another factor."""

    url: str
    workload: Workload
    api_key: str | None = None
    model: str | None = None
    scale_tokens: float = 1.0
    vocab: int | None = None
    """None: as many ids as the server says, else those of `IDS`."""
    standalone: int = 0
    timeout: float = 600.0
    name_groups: bool = False


def replay(config: ReplayConfig) -> dict[str, Any]:
    """Replay the workload, if need be until Ctrl-C; the JSON object of docs/evaluation.md. Raises `ConfigError`."""
    if not config.workload.scripts:
        raise ConfigError("There is nothing to replay: no conversation was chosen from the trace.")
    client = ApiClient.around(config.url, config.api_key)
    server = describe(client, config.model)
    longest = max(script.tokens for script in config.workload.scripts)
    if server.max_model_len is not None and longest > server.max_model_len:
        fits = config.scale_tokens * server.max_model_len / longest
        digits = 10 ** (1 - math.floor(math.log10(fits)))
        factor = math.floor(fits * digits) / digits
        raise ConfigError(problem("bench.too_long", longest=longest, context=server.max_model_len, factor=factor))
    return uvloop.run(_replay(config, client, server))


async def _replay(config: ReplayConfig, client: ApiClient, server: TargetServer) -> dict[str, Any]:
    replay = Replay(config, client, server)
    work = asyncio.create_task(replay.work())
    loop = asyncio.get_running_loop()
    # As Ctrl-C, at which asyncio cancels this task, and so `work`.
    loop.add_signal_handler(signal.SIGTERM, work.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await work
    loop.remove_signal_handler(signal.SIGTERM)
    return replay.report(interrupted=work.cancelled())


class Replay:
    def __init__(self, config: ReplayConfig, client: ApiClient, server: TargetServer) -> None:
        self.config = config
        self.client = client
        self.server = server
        self.ended: list[ConversationTimes] = []
        self.standalone: dict[str, Latency] | None = None
        self._workload = config.workload
        self._group: asyncio.TaskGroup
        self._http: aiohttp.ClientSession
        vocab = config.vocab or server.vocab or IDS[1]
        self._ids = min(IDS[0], vocab // 4), vocab
        self._made_up = False
        self._short = self._stale = 0
        self._before: Totals | None = None
        self._began = self._over = 0.0
        # For the progress line.
        self._running = 0
        self._since, self._tokens = time.monotonic(), 0  # of answers that have ended
        self._ttfts: list[float] = []

    async def work(self) -> None:
        """First the standalone conversations, one after the other; then all at their times. A terminal shows both."""
        console = Console(stderr=True, highlight=False)
        with Live(console=console, get_renderable=self._line, refresh_per_second=2, transient=True):
            async with session(self.config.api_key) as self._http:
                if self.config.standalone:
                    await self._measure_alone()
                await self._all_at_their_times()

    async def _all_at_their_times(self) -> None:
        self._before = totals(self.client, self.server)
        self._ttfts, self._tokens = [], 0
        self._began = self._since = time.monotonic()
        try:
            async with asyncio.TaskGroup() as self._group:
                for script, start in zip(self._workload.scripts, self._workload.starts, strict=True):
                    self._group.create_task(self._arrive(script, self._began + start, (), None))
        finally:
            self._over = time.monotonic()

    def report(self, interrupted: bool) -> dict[str, Any]:
        """The keys of the contract, and more about the server and the run."""
        after = totals(self.client, self.server) if self._before else None
        moved = after.since(self._before) if after and self._before else None
        figures = summary(self.ended, self.standalone, self._over - self._began)
        failures = Counter(turn.error for times in self.ended for turn in times.turns if turn.error)
        return figures | {
            "policy": self.server.policy,
            "topology": self.server.topology,
            "rate": self._workload.rate,
            "seed": self._workload.seed,
            "kv_transfer": {"bytes": moved and moved.bytes, "seconds": moved and moved.seconds},
            "placements": moved and dict(moved.placements),
            "energy": None,
            "server": msgspec.to_builtins(self.server) | {"url": self.config.url},
            "output_ids": "made up" if self._made_up else "returned",
            "short_turns": self._short,
            "stale_cached_tokens": self._stale,
            "unfinished": len(self._workload.conversations) - len(self.ended),
            "interrupted": interrupted,
            "failures": dict(failures.most_common(MOST_FAILURES)),
        }

    async def _measure_alone(self) -> None:
        self.standalone = {}
        known: dict[tuple[Any, ...], Latency] = {}
        chosen = replace(self._workload, scripts=self._workload.scripts[: self.config.standalone])
        for n, script in enumerate(chosen.conversations):
            sizes = (script.prefix, *((turn.new, turn.output, turn.keep) for turn in script.turns))
            if sizes not in known:
                # With seeds of their own: what scripts share is not cached here either.
                text = Text(script, self._workload.seed + ALONE * (n + 1), self._ids)
                text.said.fromlist(text.take(script.prefix))
                times = ConversationTimes(script.key, time.monotonic())
                await self._converse(script, text, times, alone=True)
                if times.failed:
                    raise ConfigError(problem("bench.failed_alone", key=script.key, error=times.turns[-1].error))
                known[sizes] = latency(times)
            self.standalone[script.key] = known[sizes]

    async def _arrive(self, script: Script, when: float, said: Iterable[int], parent: ConversationTimes | None) -> None:
        await asyncio.sleep(when - time.monotonic())
        self._running += 1
        text = Text(script, self._workload.seed, self._ids, said)
        times = ConversationTimes(script.key, when, parent=parent)
        await self._converse(script, text, times)
        self.ended.append(times)
        self._running -= 1

    async def _converse(self, script: Script, text: Text, times: ConversationTimes, alone: bool = False) -> None:
        """All turns of a conversation, or those up to one that fails; `alone` without gaps, names and sub-agents."""
        headers = {}
        if self.config.name_groups and not alone:
            headers = {"User-Agent": "miniserve-replay", "X-Session-ID": times.key}
            headers |= {"X-Parent-Session-ID": times.parent.key} if times.parent else {}
        agents: list[tuple[int, asyncio.Task[None]]] = []
        ended = times.arrival
        for n, turn in enumerate(script.turns):
            prompt = text.prompt(turn)
            body = self.server.body(prompt.tolist(), turn.output)
            post = partial(self._http.post, self.server.generate_url, data=body, headers=headers)
            if n and not alone:
                await asyncio.sleep(ended + turn.gap - time.monotonic())
                await asyncio.gather(*(agent for until, agent in agents if until == n))
            answer = Answer(len(prompt))
            measured = await ask(post, self.server, answer, self.config.timeout)
            self._tokens += answer.tokens
            if n:
                times.gaps += measured.sent - ended
                times.tools += turn.gap
            ended = time.monotonic()
            times.turns.append(measured)
            if measured.error:
                break
            self._ttfts.append(measured.ttft)
            self._short += measured.output < turn.output
            if not n:  # a first prompt can be known only as far as it is shared
                self._stale += max(0, (measured.cached or 0) - len(script.shared) * script.block - script.prefix)
            missing = max(measured.output - len(answer.ids), 0)
            self._made_up = self._made_up or missing > 0
            text.said.fromlist(answer.ids + text.take(missing))
            for agent in script.agents if not alone else ():
                if agent.after == n:
                    begins = self._arrive(agent, ended + agent.turns[0].gap, text.said[: agent.prefix], times)
                    agents.append((agent.until, self._group.create_task(begins)))

    def _line(self) -> str:
        ttfts, speed = self._ttfts, self._tokens / max(time.monotonic() - self._since, 1.0)
        first = f"TTFT p50 {percentile(ttfts, 0.5):.3f} p95 {percentile(ttfts, 0.95):.3f} s, " if ttfts else ""
        phase, done = ("replay", len(self.ended)) if self._began else ("alone", len(self.standalone or ()))
        return (
            f"{phase}: {done} of {len(self._workload.conversations)} conversations done, {self._running} running"
            f", {len(ttfts)} turns, {speed:.0f} tokens/s, {first}{sum(times.failed for times in self.ended)} errors"
        )
