"""AgentX's traces as scripts for `miniserve replay` and `simulate`: `python scripts/agentx.py TRACE... > agents.jsonl`.

A session of `semianalysisai/cc-traces-weka-*` names all blocks of all its prompts, hundreds of millions in a data set;
its script has sizes only. Each TRACE is a JSON file of one session, or has one on each line.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile
from operator import eq
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from miniserve.bench.replay.workload import WHOLE, Script, Seconds, Tokens, TurnSize
from miniserve.config import ConfigError

HOW = """{"id": name, "block_size": 64, "requests": [{"type": "n" or "s", "t": s, "in": tokens, "out": tokens, \
"hash_ids": [...], "api_time": s}, {"type": "subagent", "t": s, "agent_id": name, "requests": [...]}]}"""


class Call(msgspec.Struct, tag_field="type", tag="n"):
    """A request: seconds since the session's start, tokens, ids of its prompt's blocks, seconds of the server."""

    t: Seconds
    input: Tokens = msgspec.field(name="in")
    output: Annotated[int, msgspec.Meta(ge=0, lt=WHOLE)] = msgspec.field(name="out")
    hash_ids: list[int] = []
    model: str = ""
    api_time: Seconds | None = None

    @property
    def ended(self) -> float:
        return self.t + (self.api_time or 0.0)


class Streamed(Call, tag="s"):
    """The same; its answer was streamed."""


class SubAgent(msgspec.Struct, tag_field="type", tag="subagent"):
    """Requests of a sub-agent that the client has named."""

    t: Seconds
    agent_id: str
    requests: list[Call | Streamed]


class Session(msgspec.Struct):
    """The format of github.com/callanjfox/kv-cache-tester (docs/trace_replay_tester.md) as aiperf 0.13.0 reads it. An
    id stands for the same `block_size` tokens in all of the session. Requests of sub-agents have times since the
    session's start; if any is before its sub-agent's own, all are taken to count from there."""

    id: str
    block_size: Tokens
    requests: list[Call | Streamed | SubAgent]
    hash_id_scope: Literal["local"] = "local"


Chain = list[Call]


def script(of: Session) -> Script:
    """The chain of most requests is the agent; all others are its sub-agents, whether the client has named them or not:
    each begins after the last turn that was sent before it, with the blocks it has in common with that turn; the first
    turn that was sent after its end waits for it. Those that begin with none of the agent's blocks, but with the same
    as each other, share these. Raises ValueError."""
    block, others = of.block_size, list[Chain]()
    own = [one for one in of.requests if not isinstance(one, SubAgent)]
    named = [one for one in of.requests if isinstance(one, SubAgent)]
    relative = any(call.t < one.t for one in named for call in one.requests)
    for one in named:
        for call in one.requests:
            call.t += one.t if relative else 0.0
        others += chains(one.requests, block)
    if not own:
        raise ValueError(f"session {of.id!r} has no requests of its own, after which its sub-agents would begin")
    main, *rest = sorted(chains(own, block), key=len, reverse=True)
    others = sorted(rest + others, key=lambda chain: chain[0].t)
    sent, ended, agents = [call.t for call in main], [call.ended for call in main], []
    for n, (chain, shared) in enumerate(zip(others, common(others), strict=True)):
        begin, end = chain[0].t, max(call.ended for call in chain)
        after = max(bisect_right(sent, begin) - 1, 0)
        until = max(bisect_left(sent, end), after + 1)
        prefix = min(alike(main[after], chain[0]) * block, chain[0].input - 1)
        agents.append(
            Script(
                f"{of.id}/{n}",
                turns(chain, block, prefix, max(begin - ended[after], 0.0)),
                shared=() if prefix else tuple(f"{of.id}/{name}" for name in shared),
                block=block,
                after=after,
                until=until,
                prefix=prefix,
            )
        )
        if until < len(main):  # the gap before that turn begins where the last one ends that it waits for
            main[until - 1].api_time = max(main[until - 1].ended, end) - sent[until - 1]
    return Script(of.id, turns(main, block), block=block, agents=tuple(agents))


def chains(calls: Iterable[Call], block: int) -> list[Chain]:
    """Calls of which each continues the one before. That is a guess: it is later, by the same model, and begins with
    all of that one's full blocks and goes on; or it has lost the end of them, which no later call has (compaction).
    Raises ValueError."""
    calls = sorted(calls, key=lambda call: call.t)
    for call in calls:
        if len(call.hash_ids) > (most := -(-call.input // block)):
            raise ValueError(f"{len(call.hash_ids)} hash_ids; {call.input} tokens have {most} ({block} each)")
        del call.hash_ids[call.input // block :]
        call.output = max(call.output, 1)
    found: list[Chain] = []
    owners: dict[tuple[int, int], int] = {}  # By place in the prompt and id: the chain that had the block first.
    latest = {place: n for n, call in enumerate(calls) for place in enumerate(call.hash_ids)}
    for n, call in enumerate(calls):
        known = [owners[place] for place in enumerate(call.hash_ids) if place in owners]
        for near in dict.fromkeys(reversed(known)):
            last = found[near][-1]
            shared = alike(last, call)
            whole = shared == len(last.hash_ids) and call.input > last.input
            lost = shared < len(last.hash_ids) and latest[shared, last.hash_ids[shared]] < n
            if (whole or lost) and call.t > last.t and call.model == last.model:
                break
        else:
            near = len(found)
            found.append([])
        found[near].append(call)
        for place in enumerate(call.hash_ids):
            owners.setdefault(place, near)
    return found


def turns(chain: Chain, block: int, prefix: int = 0, gap: float = 0.0) -> tuple[TurnSize, ...]:
    """Turns whose prompts are as long as the calls'; the first one adds to `prefix` tokens. The blocks do not show
    where an answer ends: a prompt that goes on holds all of the one before if it is longer than both, else none."""
    made = [TurnSize(chain[0].input - prefix, chain[0].output, gap)]
    for last, call in pairwise(chain):
        shared, said = alike(last, call), last.input + last.output
        whole = said if call.input > said else last.input
        known = min(whole if shared == len(last.hash_ids) else shared * block, call.input - 1)
        keep = WHOLE if known == said else known
        made.append(TurnSize(call.input - known, call.output, max(call.t - last.ended, 0.0), keep))
    return tuple(made)


def alike(one: Call, other: Call) -> int:
    """The blocks that both prompts begin with."""
    return len(list(takewhile(bool, map(eq, one.hash_ids, other.hash_ids))))


def common(chains: Sequence[Chain]) -> list[list[int]]:
    """Of each chain, the blocks that its first prompt begins with and other first prompts have too."""
    firsts = [list(enumerate(chain[0].hash_ids)) for chain in chains]
    count = Counter(place for first in firsts for place in first)
    return [[block for _, block in takewhile(lambda place: count[place] > 1, first)] for first in firsts]


def read(path: Path) -> Iterable[Script]:
    """The sessions of a file. Raises `ConfigError`."""
    decoder = msgspec.json.Decoder(Session)
    try:
        text = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}.") from None
    lines = text.split(b"\n")
    first = next(filter(None, map(bytes.strip, lines)), b"")
    for number, line in enumerate(lines if first[-1:] == b"}" else [text], 1):
        if line.strip():
            try:
                yield script(decoder.decode(line))
            except ValueError as e:  # a msgspec.DecodeError is one
                raise ConfigError(f"{path}, line {number}: {e}; a session is {HOW}.") from None


def main(paths: Sequence[str]) -> int:
    seen: set[str] = set()
    try:
        for path in map(Path, paths):
            for one in read(path):
                if one.key in seen:
                    raise ConfigError(f"{path}: session {one.key!r} is there twice; each has an id of its own.")
                seen.add(one.key)
                sys.stdout.buffer.write(msgspec.json.encode(one) + b"\n")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
