"""Which conversation a turn belongs to. Prompts are lists of numbers; pages hold 4 tokens."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from miniserve.kv.hashing import token_bytes
from miniserve.scheduler.conversation import TURNS, Conversation, History, Said, TurnRecord
from miniserve.scheduler.conversations import Conversations
from miniserve.scheduler.prompts import ALIKE, page_chain

PAGE = 4


def prompt(*parts: int) -> list[int]:
    """Ten tokens for each part: the same number, the same tokens."""
    return [part * 100 + i for part in parts for i in range(10)]


class Book:
    """`Conversations`, and turns that end at once."""

    def __init__(self, **kwargs) -> None:
        self.all = Conversations(PAGE, **kwargs)
        self.now = 0.0

    def find(self, tokens: list[int], key: str | int = "", salt: str = "", **said) -> Conversation:
        chain = page_chain(tokens, salt, PAGE)
        conversation, self.known, self.change = self.all.find(key, token_bytes(tokens), chain, self.now, Said(**said))
        return conversation

    def turn(self, tokens: list[int], key: str | int = "", salt: str = "", **said) -> Conversation:
        conversation = self.find(tokens, key, salt, **said)
        conversation.turns += 1
        conversation.tokens = len(tokens) + 5
        conversation.home = conversation.home or "d0"
        conversation.last_end = self.now
        return conversation


@pytest.fixture
def book() -> Book:
    return Book()


def test_a_prompt_that_goes_on_continues(book):
    first = book.turn(prompt(1))
    assert book.known == 0
    assert book.turn(prompt(1, 2)) is first
    assert book.known == 15, "what the first turn left at home"
    assert book.turn(prompt(1, 2, 3)) is first
    assert first.edits == 0


def test_keys_keep_conversations_apart(book):
    first = book.turn(prompt(1), "a")
    other = book.turn(prompt(1), "b")
    assert other is not first
    assert book.turn(prompt(1, 2), "a") is first
    assert book.known == 15
    assert book.turn(prompt(1, 2), "b") is other


@pytest.mark.parametrize("cut", [2, 3])
def test_an_edited_history_is_found(book, cut):
    """The client goes back to an earlier turn and asks something else."""
    first = book.turn(prompt(1))
    for end in range(2, 5):
        book.turn(prompt(*range(1, end + 1)))
    edited = prompt(*range(1, cut + 1), 9)
    assert book.turn(edited) is first
    assert book.known == 10 * cut
    assert first.edits == 1
    assert book.turn([*edited, 1]) is first, "the new history is the conversation's now"
    assert first.edits == 1
    assert len(book.all) == 1


def test_the_last_prompt_sent_again_is_the_same_conversation(book):
    first = book.turn(prompt(1))
    book.turn(prompt(1, 2))
    assert book.turn(prompt(1, 2)) is first
    assert len(first.marks) == 2


def test_the_same_first_prompt_is_another_conversation(book):
    first, second = book.turn(prompt(1)), book.turn(prompt(1))
    assert first is not second
    assert second.home == "d0"
    book.all.get(second.key).home = "d1"
    third, fourth = book.turn(prompt(1, 2)), book.turn(prompt(1, 3))
    assert {id(third), id(fourth)} == {id(first), id(second)}, "each goes on"
    assert book.turn(prompt(1, 2, 4)) is third
    assert book.turn(prompt(1, 3, 4)) is fourth


def test_a_fork_of_a_running_turn_begins_at_the_same_home(book):
    first = book.turn(prompt(1))
    first.home, first.ends = "d1", (10, 14)
    book.find(prompt(1, 2)).active = 1
    fork = book.find(prompt(1, 2, 3))
    assert fork is not first
    assert (fork.home, fork.turns, book.known) == ("d1", 1, 20)
    assert fork.ends == (10, 14), "snapshots that it may find there"


def test_a_prompt_that_shares_only_the_system_prompt_is_new(book):
    first = book.turn(prompt(1, 2))
    other = book.turn(prompt(1, 3))
    assert other is not first
    assert book.turn(prompt(1, 3, 4)) is other


def test_salts_are_kept_apart(book):
    first = book.turn(prompt(1), salt="a")
    assert book.turn(prompt(1, 2), salt="b") is not first
    assert book.turn(prompt(1, 2), salt="a") is first


def test_many_that_are_alike(book):
    for _ in range(3 * ALIKE):
        book.turn(prompt(1))
    assert len(book.all) == 3 * ALIKE
    continued = {id(book.turn(prompt(1, n))) for n in range(2, 2 + ALIKE)}
    assert len(continued) == ALIKE


def test_forgetting_leaves_nothing(book):
    for n in range(20):
        book.now += 1
        for end in range(1, 4):
            book.turn(prompt(n + 1, *range(50, 50 + end)))
    running = book.find(prompt(99))
    running.active = 1
    book.now += 10_000
    assert len(book.all.expire(book.now)) == 20
    assert list(book.all) == [running]
    running.active = 0
    book.all.expire(book.now)
    assert (len(book.all), len(book.all._prompts._owners)) == (0, 0)


def test_capacity_forgets_the_longest_idle():
    book = Book(capacity=3)
    for n in range(5):
        book.now += 1
        book.turn(prompt(n + 1))
    gone = book.all.expire(book.now)
    assert [c.began for c in gone] == [1.0, 2.0]
    assert len(book.all) == 3


def test_the_index_is_what_the_conversations_say():
    """Random prompts over few words: the index holds exactly the marks of the conversations that live."""
    pick, book = random.Random(3), Book(capacity=40)
    for _ in range(30000):
        book.now += pick.random()
        conversation = book.find(
            [pick.randint(1, 2) for _ in range(pick.randint(1, 14))], pick.choice(["", "", "", "a", "b"])
        )
        conversation.active = pick.random() < 0.1
        conversation.tokens = 20
        if pick.random() < 0.1:
            book.all.expire(book.now)
    marks = {(mark.digest, mark.tail, id(c)) for c in book.all for mark in c.marks}
    index = set()
    for digest, there in book.all._prompts._owners.items():
        alone = not isinstance(there, dict)
        tails = {m.tail: (there,) for m in there.marks if m.digest == digest} if alone else there
        index |= {(digest, tail, id(c)) for tail, owners in tails.items() for c in owners}
    assert index <= marks, "nothing of the dead"
    assert len(index) >= 0.9 * len(marks), "only marks that many share are dropped"
    assert all(len(c.marks) <= TURNS for c in book.all)


def test_an_idle_conversation_is_small():
    """Five turns, all of it remembered: under 2.5 KB, the hashes in its marks included, and 4 bytes for each token of
    its last prompt, as long as that is kept."""
    count, pick = 300, random.Random(1)
    all = Conversations(16, kept_bytes=0)
    prompts = [[pick.randrange(50_000) for _ in range(250)] for _ in range(count)]
    chains = [[page_chain(p[: 50 * (turn + 1)], "", 16) for turn in range(5)] for p in prompts]
    record = TurnRecord(*[1.5] * len(TurnRecord._fields))
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    for p, of_turns in zip(prompts, chains, strict=True):
        for turn, chain in enumerate(of_turns):
            conversation, _, _ = all.find("", token_bytes(p[: 50 * (turn + 1)]), chain, 0.5 * turn)
            conversation.turns += 1
            conversation.tokens = 50 * (turn + 1)
            conversation.last_end = turn + 0.25
            conversation.history.append(record)
    size = sum(s.size_diff for s in tracemalloc.take_snapshot().compare_to(before, "filename")) / count
    tracemalloc.stop()
    assert len(all) == count
    assert size + 5 * 49 < 2560, "and the digests, which were there before"


def test_history_keeps_the_last_turns_as_they_were():
    history = History()
    for turn in range(TURNS + 3):
        gap = 2.0 + turn if turn else None
        times, home = (0, 0, 0.25, 0, 0, 0.5, 1), (0, 1, None)
        history.append(TurnRecord(turn, 1.5, gap, 100, 50, 10, turn, *times, *home, True, 1, 2))
    rows = list(history)
    assert [row.turn for row in rows] == list(range(3, TURNS + 3))
    assert (rows[0].arrived, rows[0].prefill, rows[0].prefill_at, rows[0].tool) == (1.5, 0.25, None, True)
    assert isinstance(rows[0].prompt, int)
    assert [row.output for row in rows] == list(range(3, TURNS + 3))
    assert history.quantile("output", 0.5) == 3 + TURNS // 2
    assert History().quantile("output", 0.5) is None


def test_a_prompt_that_the_index_has_dropped_is_its_owners_no_more():
    """Short prompts share a digest: a mark that many others push out must not confuse later prompts."""
    book = Book()
    book.turn([1], "x")
    others = [f"k{n}" for n in range(ALIKE)]
    for key in others:
        book.turn([1], key)
    for n, key in enumerate(others):
        book.turn([2, n], key)
    book.turn([1, 5], "x")
    for prompt_ in ([7], [1], [1, 5, 6], [9, 9]):
        book.turn(prompt_)
        book.turn(prompt_, "y")
    for n in range(50):
        book.turn([3, n])


def test_a_conversation_that_runs_for_long_keeps_no_other_from_being_forgotten(book):
    running = book.find(prompt(1))
    running.active = 1
    for n in range(5):
        book.turn(prompt(n + 2))
    book.now += 10_000
    assert len(book.all.expire(book.now)) == 5
