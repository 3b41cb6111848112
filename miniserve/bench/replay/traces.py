"""Two formats of traces: CSV of token sizes by conversation and turn, and Mooncake's JSONL of requests."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import msgspec

from miniserve.bench.replay.workload import BLOCK_TOKENS, Script, TurnSize
from miniserve.config import ConfigError

_LIMIT = 2**31
_Tokens = Annotated[int, msgspec.Meta(ge=1, lt=_LIMIT)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, lt=_LIMIT)]


def read_trace(path: Path) -> list[Script]:
    """The conversations of a trace, in order of their first turns, or of their arrivals where it has them.

    CSV: a header, then a row for each turn: `conversation_id,turn,new_input_tokens,output_tokens[,gap_s][,arrival_s]`,
    columns in any order. Turns count from 0; conversations may be interleaved. `gap_s` is the seconds since the end of
    the turn before, `arrival_s` (turn 0 only) those since the start.

    JSONL, as in github.com/kvcache-ai/Mooncake: a request on each line; `_requests` makes conversations of them. A
    file without one of the known endings is JSONL if it begins with a brace. Raises `ConfigError`.
    """
    try:
        data = path.read_bytes()
        text = data.decode().removeprefix("\ufeff")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}.") from None
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8; save the trace as UTF-8 text.") from None
    named = {".csv": False, ".jsonl": True, ".ndjson": True, ".json": True}
    number = 1

    def lines() -> Iterator[str]:
        nonlocal number
        # Not splitlines: it also splits at characters that a quoted name may hold.
        for number, line in enumerate(io.StringIO(text, newline="\n"), 1):  # noqa: B007
            yield line

    try:
        scripts = (_requests if named.get(path.suffix.lower(), text.lstrip()[:1] == "{") else _rows)(lines())
        if not scripts:
            raise ValueError("no turns; a trace has at least one")
    except (ValueError, csv.Error, msgspec.DecodeError) as e:
        raise ConfigError(f"{path}, line {number}: {e}.") from None
    return scripts


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    """A row of a CSV trace."""

    conversation_id: str
    turn: Annotated[int, msgspec.Meta(ge=0)]
    new_input_tokens: _Tokens
    output_tokens: _Tokens
    gap_s: _Seconds = 0.0
    arrival_s: _Seconds | None = None


def _rows(lines: Iterable[str]) -> list[Script]:
    """Scripts of a CSV file. An empty cell is as good as none. Raises ValueError or csv.Error."""
    reader = csv.reader(lines, strict=True)
    header = [name.strip() for name in next(reader, [])]
    turns: dict[str, list[TurnSize]] = {}
    arrivals: dict[str, float | None] = {}
    for cells in filter(None, reader):
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} values for the {len(header)} columns of the header")
        given = {name: cell.strip() for name, cell in zip(header, cells, strict=True) if cell.strip()}
        try:
            row = msgspec.convert(given, _Row, strict=False)
        except msgspec.ValidationError as e:
            raise ValueError(f"{e}; the first line is a header: {','.join(_Row.__struct_fields__)}") from None
        key, before = row.conversation_id, turns.setdefault(row.conversation_id, [])
        if row.turn != len(before):
            should = f"should be turn {len(before)}: they count from 0, each once, in order"
            raise ValueError(f"turn {row.turn} of conversation {key!r} {should}")
        if not row.turn and row.gap_s:
            raise ValueError("gap_s of turn 0 should be 0 or empty: nothing comes before it")
        if row.turn and row.arrival_s is not None:
            raise ValueError("only turn 0 has an arrival_s, later turns have a gap_s")
        arrivals.setdefault(key, row.arrival_s)
        before.append(TurnSize(row.new_input_tokens, row.output_tokens, row.gap_s))
    scripts = [Script(key, tuple(sizes), arrivals[key]) for key, sizes in turns.items()]
    return sorted(scripts, key=lambda script: script.arrival or 0.0)


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of Mooncake's traces: `timestamp` in ms, lengths in tokens, ids of the prompt's blocks."""

    timestamp: Annotated[float, msgspec.Meta(ge=0, lt=_LIMIT * 1000)]
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.hash_ids[: self.input_length // BLOCK_TOKENS]


@dataclass(slots=True, eq=False)
class _Chain:
    """Requests of which each continues the one before: a conversation that is being put together."""

    key: str
    arrival: float
    first: _Request
    last: _Request
    turns: list[TurnSize] = field(default_factory=list)


def _requests(lines: Iterable[str]) -> list[Script]:
    """Conversations of a trace that has only requests: `{"timestamp": ms, "input_length": tokens, "output_length":
    tokens, "hash_ids": [...]}` on each line, in order of time. An id stands for a block of 512 tokens and all before.

    Which request continues which is a guess: B continues A if it is later and longer and begins with all of A's full
    blocks, the last of which appears first in A's conversation (else a system prompt would make all its users one); of
    several, the one it shares most with. What B adds is its length less A's prompt and answer, at least 1 token: the
    blocks do not show where the answer ends. Nor when: the gap is from arrival to arrival, so the tool took less.
    Prompts shorter than a block are conversations of their own.

    A script's `shared` are the full blocks that its first prompt begins with and other conversations have too. Raises
    ValueError or msgspec.DecodeError.
    """
    owners: dict[tuple[int, int], _Chain] = {}  # By place in the prompt and id: the chain that had the block first.
    common: set[tuple[int, int]] = set()
    chains: list[_Chain] = []
    start = now = 0.0
    for number, request in _decoded(lines):
        if request.timestamp < now:
            raise ValueError(f"timestamp {request.timestamp:g} is before the {now:g} of the line above; sort the lines")
        now = request.timestamp
        start = start if chains else now
        chain = _continued(request, owners)
        if chain is None:
            chain = _Chain(f"line-{number}", (now - start) / 1000, request, request)
            chains.append(chain)
            turn = TurnSize(request.input_length, request.output_length)
        else:
            new = max(1, request.input_length - chain.last.input_length - chain.last.output_length)
            turn = TurnSize(new, request.output_length, (now - chain.last.timestamp) / 1000)
        chain.turns.append(turn)
        chain.last = request
        common.update(block for block in enumerate(request.blocks) if owners.setdefault(block, chain) is not chain)
    scripts = []
    for chain in chains:
        shared = takewhile(common.__contains__, enumerate(chain.first.blocks))
        scripts.append(Script(chain.key, tuple(chain.turns), chain.arrival, tuple(block for _, block in shared)))
    return scripts


def _continued(request: _Request, owners: dict[tuple[int, int], _Chain]) -> _Chain | None:
    blocks = request.blocks
    for place in reversed(range(len(blocks))):
        chain = owners.get((place, blocks[place]))
        if chain is None or len(chain.last.blocks) != place + 1 or chain.last.blocks != blocks[: place + 1]:
            continue
        if request.timestamp > chain.last.timestamp and request.input_length > chain.last.input_length:
            return chain
    return None


def _decoded(lines: Iterable[str]) -> Iterator[tuple[int, _Request]]:
    """Requests, and the numbers of their lines."""
    decoder = msgspec.json.Decoder(_Request)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = decoder.decode(line)
        except msgspec.DecodeError as e:
            how = 'a line is {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}'
            raise ValueError(f"{e}; {how}") from None
        ids, blocks = len(request.hash_ids), -(-request.input_length // BLOCK_TOKENS)
        if ids != blocks:
            raise ValueError(f"{ids} hash_ids; {request.input_length} tokens have {blocks} (512 each)")
        yield number, request
