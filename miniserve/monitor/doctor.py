"""The prefix doctor: why a turn found less of its prompt than it could have, from where the prompt began to differ."""

import re
import secrets
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

from miniserve.config import tables
from miniserve.monitor.views import Card, card
from miniserve.scheduler.conversation import Change
from miniserve.scheduler.scheduler import Reuse

KINDS: dict[str, dict[str, str]] = tables("monitor/doctor.toml")
PATTERNS = {kind: re.compile(row["pattern"]) for kind, row in KINDS.items() if "pattern" in row}
LEAST_TOKENS, LEAST_KNOWN = 64, 16
"""A turn that could have found fewer is well, a first turn twice as many; of the second where a pattern knows why."""
AROUND = 48
"""Tokens on both sides of a change in which its kind is looked for."""
MOST_CHANGED = 4096
MOST_CHARS = 600
"""Of a change inside of one tool's description."""
NEEDLE = 16
NEAR, TAIL = 512, 40
"""Tokens before a change by which its place is found, and characters by which texts are recognised there."""
MOST_CONVERSATIONS = 1000
MOST_MISSES = 16
"""Of each conversation, the latest ones."""


class Segment(NamedTuple):
    """A text of a request, in the order of the prompt. `field` is where it stands in the chat made of the request."""

    field: str
    role: str
    text: str


class Doctor:
    """`decode` makes text of tokens. Texts of prompts are kept only with `consent`."""

    def __init__(self, decode: Callable[[list[int]], str], *, consent: bool = False) -> None:
        self._decode = decode
        self._consent = consent
        self._secret = secrets.token_bytes(16)
        self._misses: OrderedDict[str | int, deque[Card]] = OrderedDict()
        self._turns: Counter[tuple[str, str, str]] = Counter()
        self._tokens: Counter[tuple[str, str, str]] = Counter()

    def misses(self, conversation: str | int) -> list[Card]:
        """Of a conversation, the earliest first."""
        return list(self._misses.get(conversation, ()))

    def report(self, reuse: dict[str, Reuse]) -> Card:
        """Of all clients, those that computed most first."""
        data = [self._client(client, seen) for client, seen in reuse.items()]
        return {"data": sorted(data, key=lambda one: -one["computed_tokens"])}

    def _client(self, client: str, seen: Reuse) -> Card:
        computed = seen.prompt - seen.cached
        causes: list[Card] = []
        for (name, kind, where), tokens in self._tokens.most_common():
            if name == client:
                lost = {"turns": self._turns[name, kind, where], "tokens": tokens}
                share = min(tokens / max(computed, 1), 1.0)
                causes.append(card("Cause", kind=kind, where=where, share=share, **lost, **KINDS[kind]))
        name = client or "other clients"
        return card("ClientReport", seen, client=name, causes=causes, computed_tokens=computed)

    def note(self, client: str, conversation: str | int, found: tuple[Card, str]) -> None:
        """Remember a miss and the role of the message that it is in."""
        miss, where = found
        if miss["turn"] == 1:  # an earlier conversation of this name is forgotten
            self._misses.pop(conversation, None)
        self._misses.setdefault(conversation, deque(maxlen=MOST_MISSES)).append(miss)
        self._misses.move_to_end(conversation)
        if len(self._misses) > MOST_CONVERSATIONS:
            self._misses.popitem(last=False)
        self._turns[client, miss["kind"], where] += 1
        self._tokens[client, miss["kind"], where] += miss["lost"]

    def examine(
        self, turn: int, change: Change, cached: int, segments: Sequence[Segment], tools: Sequence[str]
    ) -> tuple[Card, str] | None:
        """What turn number `turn` lost by a change of its prompt, in a message of which role; None if it was little.
        `cached` tokens were found, `segments` and `tools` (names) are its request's. Not for the event loop."""
        at, before, after, _ = change
        ends = _same_again(before, after, at)
        changed = ends or (at, at)
        lost = min(len(before) // 4 - changed[0], len(after) // 4 - max(changed[1], cached))
        if lost < LEAST_KNOWN or (change.first and ends is None):
            return None
        old_end, new_end = (min(end, at + MOST_CHANGED) for end in ends or (at + AROUND, at + AROUND))
        start = max(at - AROUND, 0)
        old = self._text(before, start, old_end + AROUND)
        new = self._text(after, start, new_end + AROUND)
        place, leads = _place(self._text(after, max(at - NEAR, 0), at), new, segments, tools)
        reordered = all(b.find(a[4 * at : 4 * (at + 8)], 4 * at) >= 0 for a, b in ((before, after), (after, before)))
        shorter = not change.first and len(after) < 0.75 * len(before)
        kind = _kind(old, new, place.role, leads, reordered, shorter, ends is not None)
        if kind not in PATTERNS and lost < LEAST_TOKENS * (1 + change.first):
            return None
        if change.first and (kind == "tools" or (place.role not in ("tools", "system") and not leads)):
            return None  # a session that begins alike, of other tools or with other words of its user
        texts = {"before": old if self._consent else None, "after": new if self._consent else None}
        hashes = {"before_hash": self._digest(old), "after_hash": self._digest(new)}
        return card("Miss", place, turn=turn, kind=kind, token=at, lost=lost, **texts, **hashes), place.role

    def _digest(self, text: str) -> str:
        return blake2b(text.encode(), digest_size=6, key=self._secret).hexdigest()

    def _text(self, tokens: bytes, start: int, end: int) -> str:
        return self._decode(array("i", tokens[4 * start : 4 * end]).tolist())


def _place(text: str, around: str, segments: Sequence[Segment], tools: Sequence[str]) -> tuple[Segment, bool]:
    """The segment in which a prompt goes on behind `text`, which ends it so far, with more `around` that place; and
    whether more words of its user follow. Templates show tools beside the system prompt."""
    begun, tail, number, ended = False, text[-TAIL:], -1, -1
    for n, segment in enumerate(segments):
        if tail.strip() and tail in segment.text:
            number, begun = n - 1, True
            break
        content = segment.text.strip()
        if content and (found := text.rfind(content[-TAIL:])) > ended:
            number, ended = n, found
    rest = [segment for segment in segments[number + 1 :] if segment.text.strip()][:2]
    begins = rest[0].text.strip()[: 2 * TAIL] if rest else ""
    begun = begun or any(text.endswith(begins[:n]) for n in range(4, len(begins) + 1))
    shown = any(f'"{name}"' in around for name in tools) or len(text) - ended > 3 * TAIL
    leading = all(segment.role == "system" for segment in segments[: number + 1])
    if tools and leading and (number < 0 or shown) and not begun:
        return Segment("tools", "tools", ""), False
    leads = [segment.role for segment in rest] == ["user", "user"]
    return (rest[0] if rest else Segment("messages", "", "")), leads


def _same_again(before: bytes, after: bytes, at: int) -> tuple[int, int] | None:
    """Where two prompts that differ from token `at` on are the same again: in one and in the other."""
    for one, other, turned in ((before, after, False), (after, before, True)):
        for offset in (1, 4, 16, 64, 256, 1024, MOST_CHANGED):
            start = 4 * (at + offset)
            needle = one[start : start + 4 * NEEDLE]
            found = other.find(needle, 4 * at) if len(needle) == 4 * NEEDLE else -1
            if found < 0 or found % 4:
                continue
            ends = start // 4, found // 4
            while min(ends) > at and one[4 * ends[0] - 4 : 4 * ends[0]] == other[4 * ends[1] - 4 : 4 * ends[1]]:
                ends = ends[0] - 1, ends[1] - 1
            return ends[::-1] if turned else ends
    return None


def _kind(old: str, new: str, role: str, leads: bool, reordered: bool, shorter: bool, same_again: bool) -> str:
    """Of a change of `old` to `new` in a message of `role`: `shorter`: it lost much; `same_again`: both end alike."""
    if shorter and role not in ("tools", "system"):
        return "compaction"
    whole = role == "tools" and max(len(old), len(new)) > MOST_CHARS
    for kind, pattern in PATTERNS.items():
        known = same_again or kind == "reasoning"
        if known and not whole and set(pattern.findall(old)) != set(pattern.findall(new)):
            return kind
    if role == "tools":
        return "tools-reordered" if reordered else "tools"
    return "reminder" if leads else {"system": "system", "assistant": "answer"}.get(role, "edited")
