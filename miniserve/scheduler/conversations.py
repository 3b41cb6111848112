"""Which conversation a turn belongs to, and which conversations belong together."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from enum import IntEnum
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

from miniserve.kv.hashing import token_bytes
from miniserve.scheduler.conversation import TURNS, UNSAID, Change, Conversation, Said
from miniserve.scheduler.prompts import KEPT_BYTES, FirstPages, LastPrompts, PromptIndex, common_run

SLACK = 4
"""Tokens that the next prompt may lack of one's end: templates open an answer otherwise than they show a given one."""
NEEDLE = 16
"""Tokens by which the end of a prompt or an answer is found again behind a change: fewer are mostly the template's."""
MOST_MEMBERS = 16
"""Conversations under one key that a prompt is compared with, the latest ones."""
MAX_IDLE = 3600.0
"""Seconds after which an idle conversation is forgotten."""
GROUP_SECONDS = 10.0
"""How soon after a turn of another conversation a sub-agent begins that no header announces."""


class Relation(IntEnum):
    """What a prompt is to a conversation."""

    NEW = 0
    EDITS = 1
    CONTINUES = 2


Near = list[tuple[int, Conversation]]


class Match(NamedTuple):
    """A conversation that a prompt may be of, its relation, its known tokens; and what other last prompts share."""

    conversation: Conversation | None
    relation: Relation
    known: int
    near: Near


class Conversations:
    """Conversations by a client's key and by their prompts.

    A prompt that begins with the last prompt of a conversation continues it. What the model answered need not match:
    clients resend it in their own rendering. A prompt that begins with an earlier prompt, or that differs before but
    holds the end of the last prompt or answer and goes on behind it, is an edited history. A prompt that shares only
    the first prompt is another conversation with the same beginning.

    A key is a hint: it narrows the search to the conversations that came with it. A prompt that continues none of them,
    or comes while a turn of the one it continues runs, is a fork: a new conversation with its own history, which begins
    at the same home if its pages are there. The prompt of a session may lose its history, as compaction does, and is
    still the session's if it shares half of the first prompt, and offers tools as that did.

    Lookups hash the prompt once, whatever the number of conversations. `capacity` conversations are kept; beyond it,
    and after `MAX_IDLE`, those idle for longest are forgotten, which costs nothing but a placement made anew.
    """

    def __init__(self, page_tokens: int, *, capacity: int = 100_000, kept_bytes: int = KEPT_BYTES) -> None:
        self._capacity = capacity
        # Least recently active first.
        self._by_key: OrderedDict[str | int, Conversation] = OrderedDict()
        self._families: dict[str | int, dict[str | int, Conversation]] = {}
        """By the client's id: its conversations, side requests left out, the one that had a turn last behind."""
        self._prompts = PromptIndex(page_tokens)
        self._first = FirstPages()
        self._last = LastPrompts(kept_bytes)
        self._made = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self._by_key.values())

    def get(self, key: str | int) -> Conversation | None:
        return self._by_key.get(key)

    def latest(self, count: int) -> list[Conversation]:
        """The `count` conversations that had a turn last, the latest first."""
        return list(islice(reversed(self._by_key.values()), count))

    def is_side(self, conversation: Conversation) -> bool:
        """Whether it holds requests beside turns: the client says so, or only others under its key offer tools."""
        said, others = conversation.said, self._members(conversation.family)
        return said.side or (not said.tools and any(other.said.tools for other in others))

    def _members(self, family: str | int) -> Iterator[Conversation]:
        """The latest conversations of a client's id, the latest first."""
        return islice(reversed(self._families.get(family, {}).values()), MOST_MEMBERS)

    def find(
        self, key: str | int, prompt: bytes, chain: list[bytes], now: float, said: Said = UNSAID
    ) -> tuple[Conversation, int, Change | None]:
        """The conversation of a prompt, of 4 bytes a token (one that it continues or edits, or a new one), how many of
        its tokens that has seen before, and how it differs from the last. `key` is the client's, "" for none; `chain`
        is the prompt's `page_chain`."""
        change, length = None, len(prompt) // 4
        of, relation, known, near = (self._among if key else self._of_all)(key, prompt, chain, said)
        if of is not None and relation is not Relation.NEW:
            before = self._last.get(of.key)
            if before and (shared := common_run(before, prompt)) < min(len(before), len(prompt)) // 4:
                known, change = shared, Change(shared, before, prompt, first=False)
            of.edits += relation is Relation.EDITS
        else:
            of = self._begun(key, of, known, length, chain[0], now, said)
            near += self._alike(prompt, chain, said) if key else []
            if near and not said.side:
                shared, other = max(near, key=itemgetter(0))
                if before := self._last.get(other.key):
                    change = Change(shared, before, prompt, first=True)
                if other.by == "prefix":  # two sub-agents of the same one
                    other = self._by_key.get(other.parent or 0, other)
                if of.parent is None and not key and self._starts(other, shared, of):
                    of.parent, of.group, of.by = other.key, other.group, "prefix"
        self._by_key.move_to_end(of.key)
        if (family := self._families.get(of.family)) and of.key in family:
            family[of.key] = family.pop(of.key)
        if relation is not Relation.CONTINUES:
            self._first.remove(of.places, of)
            of.places = self._first.add(chain, of)
        self._mark(of, prompt, chain)
        self._last.put(of.key, prompt)
        return of, min(known, length), change

    def answered(self, conversation: Conversation, tokens: list[int]) -> None:
        """The tokens that were generated behind the last prompt."""
        if prompt := self._last.get(conversation.key):
            prompt = prompt[: 4 * conversation.last]  # without the answer to another choice of the same request
            self._last.put(conversation.key, prompt + token_bytes(tokens))

    def tokens(self, conversation: Conversation) -> list[int]:
        """Of its last turn, prompt and answer; none if they are not kept any more."""
        return array("i", self._last.get(conversation.key)).tolist()

    def expire(self, now: float) -> list[Conversation]:
        gone: list[Conversation] = []
        for conversation in self._by_key.values():
            too_many = len(self._by_key) - len(gone) > self._capacity
            if not conversation.active and (too_many or now - conversation.last_end > MAX_IDLE):
                gone.append(conversation)
            elif not too_many and not conversation.active:
                break  # All others had a turn later.
        for conversation in gone:
            del self._by_key[conversation.key]
            family = self._families.get(conversation.family, {})
            family.pop(conversation.key, None)
            if not family:
                self._families.pop(conversation.family, None)
            self._first.remove(conversation.places, conversation)
            self._last.put(conversation.key, b"")
            for mark in conversation.marks:
                self._prompts.remove(mark, conversation)
        return gone

    def _of_all(self, key: str | int, prompt: bytes, chain: list[bytes], said: Said) -> Match:
        """The conversation that a prompt without a key continues or edits; else the one whose prompt is its longest
        prefix, which may still run or share its first prompt alone."""
        parent, known = None, 0
        near: Near = []
        if (found := self._prompts.longest(prompt, chain)) is not None:
            mark, owners = found
            parent = max(owners, key=lambda owner: (not owner.active, owner.marks[-1] == mark))
            is_first, is_last = mark == parent.marks[0], mark == parent.marks[-1]
            known = parent.tokens if is_last and not parent.active else mark.length
            if not parent.active and (not is_first or (is_last and 4 * mark.length < len(prompt))):
                return Match(parent, Relation.CONTINUES if is_last else Relation.EDITS, known, near)
        if parent is None or not parent.active:
            near = self._alike(prompt, chain, said)
            for seen, other in sorted(near, key=itemgetter(0), reverse=True):
                if not other.active and 2 * seen > other.first and self._resumed(other, seen, prompt):
                    goes_on = seen >= other.last - SLACK
                    return Match(other, Relation.CONTINUES if goes_on else Relation.EDITS, seen, near)
        return Match(parent, Relation.NEW, known, near)

    def _alike(self, prompt: bytes, chain: list[bytes], said: Said) -> Near:
        alike = [other for other in self._first.alike(chain) if other.said.client == said.client]
        return [(common_run(before, prompt), other) for other in alike if (before := self._last.get(other.key))]

    def _resumed(self, of: Conversation, shared: int, prompt: bytes) -> bool:
        """Whether a prompt that shares some tokens with the last one of a conversation shares more than the first one,
        or holds the end of the last one or its answer behind them, and goes on."""
        before, end = self._last.get(of.key), 4 * of.last
        if shared >= of.first + NEEDLE:
            return True
        ends = [before[end - 4 * NEEDLE : end]]
        if len(before) > end + 4 * NEEDLE:
            ends.append(before[-4 * NEEDLE - 4 : -4])  # without the token that ended the answer
        start = max(4 * (shared - NEEDLE), 0)
        found = [at for needle in ends if len(needle) == 4 * NEEDLE and (at := prompt.find(needle, start)) >= 0]
        return bool(found) and min(found) + 6 * NEEDLE < len(prompt)

    def _among(self, key: str | int, prompt: bytes, chain: list[bytes], said: Said) -> Match:
        """The same among the conversations of a key."""
        named = self._by_key.get(key)
        _, owners = self._prompts.longest(prompt, chain) or (None, ())
        family = (named.family if named else "") or key
        begun_alike = (of for of in (*owners, *self._first.alike(chain)) if of.family == family)
        members = (*begun_alike, *([named] if named else []), *self._members(family))
        best = Match(None, Relation.NEW, 0, [])
        for of in (of for of in members if of.root == chain[0]):
            relation, known = self._relation(of, prompt, chain, said)
            if best.conversation is None or (relation, known) > best[1:3]:
                best = Match(of, relation, known, [(known, of)])
            if relation is Relation.CONTINUES:
                break
        return best

    def _relation(self, of: Conversation, prompt: bytes, chain: list[bytes], said: Said) -> tuple[Relation, int]:
        """What a prompt with its key is to a conversation, and how many tokens that has seen of it."""
        first, last, length = of.first, of.last, len(prompt) // 4
        before = self._last.get(of.key)
        seen = (mark.length for mark in reversed(of.marks) if self._prompts.begins(mark, prompt, chain))
        shared = common_run(before, prompt) if before else next(seen, 0)
        if said.side != of.said.side:
            return Relation.NEW, shared
        if shared >= last == length:  # the same again, or one more choice
            return Relation.CONTINUES, shared
        if of.active:
            return Relation.NEW, shared
        if shared >= last - min(SLACK, last // 8) and length > last:
            return Relation.CONTINUES, of.tokens
        half = 2 * shared >= first
        lost_history = half and said.session and not said.side and of.said.tools == said.tools
        resumed = (half or said.session) and bool(before) and self._resumed(of, shared, prompt)
        edits = shared >= first or lost_history or said.sure or resumed
        return (Relation.EDITS if edits else Relation.NEW), shared

    def _begun(
        self, key: str | int, near: Conversation | None, known: int, length: int, root: bytes, now: float, said: Said
    ) -> Conversation:
        """A new conversation, a fork of `near` if that has seen `known` tokens of its prompt, of `length`."""
        self._made += 1
        own = key or self._made
        while own in self._by_key or (said.side and own == key):
            own, self._made = f"{key}~{self._made}", self._made + 1
        family = near.family if key and near is not None and near.family else key
        made = Conversation(own, said, own, family=family, root=root, began=now, last_end=now)
        if near is not None and near.first <= known and near.first < length:
            made.home = near.home
            made.turns, made.ends = 1, near.ends  # Its first turn was the parent's.
        if parent := said.parent or (family if family != own else ""):
            known_parent = self._by_key.get(parent)
            made.parent, made.by = parent, "header" if said.parent else "key"
            made.group = parent if known_parent is None else known_parent.group
        self._by_key[own] = made
        if family and not said.side:
            self._families.setdefault(family, {})[own] = made
        return made

    def _starts(self, parent: Conversation, shared: int, made: Conversation) -> bool:
        """Whether a new conversation looks like the sub-agent of another of its client: both have tools, it begins like
        that, and while that waits for something."""
        alike = parent.said.tools and made.said.tools
        waits = not parent.active and parent.turns and made.began - parent.last_end < GROUP_SECONDS
        return bool(alike and waits and 2 * shared >= parent.first)

    def _mark(self, conversation: Conversation, prompt: bytes, chain: list[bytes]) -> None:
        """Make this the conversation's last prompt, and forget earlier ones that it does not begin with."""
        kept = [mark for mark in conversation.marks if self._prompts.begins(mark, prompt, chain)]
        kept = kept[:1] + kept[1:][-(TURNS - 2) :]
        for mark in conversation.marks:
            if mark not in kept:
                self._prompts.remove(mark, conversation)
        newest = self._prompts.mark(prompt, chain)
        conversation.marks = [*kept, newest]
        conversation.first, conversation.last = conversation.marks[0].length, newest.length
        self._prompts.add(newest, conversation)
