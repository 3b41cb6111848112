"""Formats of traces: CSV of sizes by turn, with own columns or TraceLab's; JSONL of scripts, or Mooncake's requests."""

import csv
import io
from collections.abc import Iterable, Iterator
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Annotated

import msgspec

from miniserve.bench.replay.workload import BLOCK_TOKENS, WHOLE, Count, Script, Seconds, Tokens, TurnSize
from miniserve.config import ConfigError, problem

_Milliseconds = Annotated[float, msgspec.Meta(ge=0, lt=WHOLE * 1000)]


def read_trace(path: Path) -> list[Script]:
    """The conversations of a trace, in order of their first turns, or of their arrivals where it has them.

    CSV: a header with the fields of `_Row` or `_Round`, then a row for each turn; conversations may be interleaved.

    JSONL: a `Script` on each line, which has a key and turns `[new, output, gap, keep]`; or a request on each, as in
    github.com/kvcache-ai/Mooncake, of which `_requests` makes conversations. A file without one of the known endings is
    JSONL if it begins with a brace. Raises `ConfigError`.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}.") from None
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8; save the trace as UTF-8 text.") from None
    named = {".csv": False, ".jsonl": True, ".ndjson": True, ".json": True}
    number = 1

    def lines() -> Iterator[str]:
        nonlocal number
        # Not splitlines: it also splits at characters that a quoted name may hold.
        for number, line in enumerate(io.StringIO(text, newline="\n"), 1):  # noqa: B007
            yield line

    csv_file = not named.get(path.suffix.lower(), text.lstrip()[:1] == "{")
    read = _rows if csv_file else _scripts if '"turns"' in text.lstrip().partition("\n")[0] else _requests
    try:
        scripts = sorted(read(lines()), key=lambda script: script.arrival or 0.0)
        if not scripts:
            raise ValueError("no turns; a trace has at least one")
    except (ValueError, csv.Error, msgspec.DecodeError) as e:
        raise ConfigError(f"{path}, line {number}: {e}.") from None
    return scripts


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    """A turn, from 0 on. `gap_s` are seconds since the end of the one before, `arrival_s` (turn 0) since the start."""

    conversation_id: str
    turn: Count
    new_input_tokens: Tokens
    output_tokens: Tokens
    gap_s: Seconds = 0.0
    arrival_s: Seconds | None = None


class _Round(msgspec.Struct, forbid_unknown_fields=True):
    """A turn as TraceLab has it (arXiv 2606.30560; github.com/uw-syfi/TraceLab, replay/README.md). The first
    `prefix_len` tokens of what was said stay, `input_len` are new; what the prefix has beyond all that was said, which
    a cache knew from elsewhere, is new here. Times are in ms: the session's `arrival_time` since the start, and
    `tool_wait_after_ms` until the next turn. `session_id` may be called `id`."""

    session_id: str
    round_idx: Count
    prefix_len: Count
    input_len: Tokens
    output_len: Tokens
    tool_wait_after_ms: _Milliseconds
    arrival_time: _Milliseconds | None = None


def _rows(lines: Iterable[str]) -> list[Script]:
    """Scripts of a CSV file. An empty cell is as good as none. Raises ValueError or csv.Error."""
    reader = csv.reader(lines, strict=True)
    header = [name.strip() for name in next(reader, [])]
    kind: type[_Row | _Round] = _Row
    if "round_idx" in header:
        kind, header = _Round, ["session_id" if name == "id" else name for name in header]
    turns: dict[str, list[TurnSize]] = {}
    arrivals: dict[str, float | None] = {}
    said: dict[str, tuple[int, float]] = {}  # of TraceLab: tokens, and how long the tools of the last turn take
    for cells in filter(None, reader):
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} values for the {len(header)} columns of the header")
        given = {name: cell.strip() for name, cell in zip(header, cells, strict=True) if cell.strip()}
        try:
            row = msgspec.convert(given, kind, strict=False)
        except msgspec.ValidationError as e:
            raise ValueError(f"{e}; the first line is a header: {','.join(kind.__struct_fields__)}") from None
        if isinstance(row, _Round):
            key, number, arrival = row.session_id, row.round_idx, row.arrival_time and row.arrival_time / 1000
            before, gap = said.get(key, (0, 0.0))
            new = row.input_len + max(row.prefix_len - before, 0)
            size = TurnSize(new, row.output_len, gap, row.prefix_len if row.prefix_len < before else WHOLE)
            said[key] = row.prefix_len + row.input_len + row.output_len, row.tool_wait_after_ms / 1000
        else:
            key, number, arrival = row.conversation_id, row.turn, row.arrival_s
            size = TurnSize(row.new_input_tokens, row.output_tokens, row.gap_s)
            if not number and size.gap:
                raise ValueError("gap_s of turn 0 should be 0 or empty: nothing comes before it")
            if number and arrival is not None:
                raise ValueError("only turn 0 has an arrival_s, later turns have a gap_s")
        sizes = turns.setdefault(key, [])
        if number != len(sizes):
            raise ValueError(problem("bench.no_turn", turn=number, key=key, next=len(sizes)))
        arrivals.setdefault(key, arrival)
        sizes.append(size)
    return [Script(key, tuple(sizes), arrivals[key]) for key, sizes in turns.items()]


def _scripts(lines: Iterable[str]) -> list[Script]:
    """Scripts as they are. Raises ValueError or msgspec.DecodeError."""
    decoder, found = msgspec.json.Decoder(Script), dict[str, Script]()
    for line in filter(str.strip, lines):
        script = decoder.decode(line)
        if found.setdefault(script.key, script) is not script:
            raise ValueError(f"key {script.key!r} is there twice; each script has its own")
    return list(found.values())


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of Mooncake's traces: `timestamp` in ms, lengths in tokens, ids of the prompt's blocks."""

    timestamp: _Milliseconds
    input_length: Tokens
    output_length: Tokens
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]

    def __post_init__(self) -> None:
        ids, blocks = len(self.hash_ids), -(-self.input_length // BLOCK_TOKENS)
        if ids != blocks:
            raise ValueError(f"{ids} hash_ids; {self.input_length} tokens have {blocks} (512 each)")

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.hash_ids[: self.input_length // BLOCK_TOKENS]


def _requests(lines: Iterable[str]) -> list[Script]:
    """Conversations of a trace of requests, in order of time. An id stands for a block of 512 tokens and all before.

    Which request continues which is a guess: B continues A if it is later and longer and begins with all of A's full
    blocks, the last of which appears first in A's conversation (else a system prompt would make all its users one); of
    several, the one it shares most with. What B adds is its length less A's prompt and answer, at least 1 token: the
    blocks do not show where the answer ends. Nor when: the gap is from arrival to arrival, so the tool took less.
    Prompts shorter than a block are conversations of their own.

    A script's `shared` are the full blocks that its first prompt begins with and others have too. Raises ValueError.
    """
    owners: dict[tuple[int, int], list[_Request]] = {}  # By place and id: the conversation that had the block first.
    common: set[tuple[int, int]] = set()
    chains: dict[str, list[_Request]] = {}
    now, decoder = 0.0, msgspec.json.Decoder(_Request)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = decoder.decode(line)
        except msgspec.DecodeError as e:
            raise ValueError(problem("bench.no_request", error=e)) from None
        if request.timestamp < now:
            raise ValueError(f"timestamp {request.timestamp:g} is before the {now:g} of the line above; sort the lines")
        now = request.timestamp
        chain = _continued(request, owners)
        if chain is None:
            chain = chains[f"line-{number}"] = []
        chain.append(request)
        common.update(block for block in enumerate(request.blocks) if owners.setdefault(block, chain) is not chain)
    scripts: list[Script] = []
    start = next(iter(chains.values()))[0].timestamp if chains else 0.0
    for key, chain in chains.items():
        first = chain[0]
        turns = [TurnSize(first.input_length, first.output_length)]
        for before, request in pairwise(chain):
            new = max(1, request.input_length - before.input_length - before.output_length)
            turns.append(TurnSize(new, request.output_length, (request.timestamp - before.timestamp) / 1000))
        shared = tuple(block for _, block in takewhile(common.__contains__, enumerate(first.blocks)))
        scripts.append(Script(key, tuple(turns), (first.timestamp - start) / 1000, shared))
    return scripts


def _continued(request: _Request, owners: dict[tuple[int, int], list[_Request]]) -> list[_Request] | None:
    blocks = request.blocks
    for place in reversed(range(len(blocks))):
        chain = owners.get((place, blocks[place]))
        if chain is None or len(chain[-1].blocks) != place + 1 or chain[-1].blocks != blocks[: place + 1]:
            continue
        if request.timestamp > chain[-1].timestamp and request.input_length > chain[-1].input_length:
            return chain
    return None
