"""Keys of conversations are hints: forks, side requests, groups, edited beginnings. Pages hold 4 tokens."""

from __future__ import annotations

import pytest

from miniserve.scheduler.conversations import GROUP_SECONDS
from miniserve.scheduler.prompts import ALIKE, KEPT_BYTES, LastPrompts, common_run
from tests.scheduler.test_conversations import Book, prompt

HEAD = list(range(1000, 1200))
"""What sessions of one agent share: its tools and its system prompt."""
ASK = [900, 901, 902]
"""Ends a prompt."""


@pytest.fixture
def book() -> Book:
    return Book()


def words(*parts: int) -> list[int]:
    """20 tokens for each part."""
    return [2000 + part * 20 + i for part in parts for i in range(20)]


def test_a_prompt_that_continues_nothing_is_a_fork(book):
    first = book.turn(prompt(1), "a")
    fork = book.turn(prompt(7), "a")
    assert fork is not first
    assert (fork.parent, fork.group, fork.by, book.known) == ("a", "a", "key", 0)
    assert book.turn(prompt(7, 8), "a") is fork
    assert book.turn(prompt(1, 2), "a") is first, "both go on under the key"
    assert (first.edits, fork.edits) == (0, 0)


def test_a_turn_beside_one_that_runs_is_a_fork_at_the_same_home(book):
    first = book.turn(prompt(1), "a")
    book.find(prompt(1, 2), "a").active = 1
    fork = book.find(prompt(1, 2, 3), "a")
    assert fork is not first
    assert (fork.home, fork.turns, fork.group) == ("d0", 1, "a")


def test_the_same_prompt_again_is_no_fork(book):
    """A client that tries once more, and the choices of one request."""
    first = book.find(prompt(1, 2), "a")
    first.active = 1
    assert book.find(prompt(1, 2), "a") is first
    assert len(book.all) == 1


def test_a_session_may_lose_its_history(book):
    """After compaction there is the beginning, and a summary."""
    first = book.turn([*HEAD, *words(1), *ASK], "a", tools=True)
    book.turn([*HEAD, *words(1, 2, 3), *ASK], "a", tools=True)
    assert book.turn([*HEAD, *words(9), *ASK], "a", tools=True) is first
    assert (first.edits, book.known) == (1, len(HEAD))
    assert book.turn([*HEAD, *words(9, 10), *ASK], "a", tools=True) is first


def test_a_key_that_only_routes_is_less_than_a_session(book):
    """An app that gives all its requests one `prompt_cache_key` has many conversations."""
    first = book.turn([*HEAD, *words(1), *ASK], "app", session=False)
    second = book.turn([*HEAD, *words(2), *ASK], "app", session=False)
    assert first is not second
    assert book.turn([*HEAD, *words(2, 3), *ASK], "app", session=False) is second
    assert book.turn([*HEAD, *words(1, 3), *ASK], "app", session=False) is first


def test_a_title_leaves_the_key_to_the_conversation(book):
    title = book.turn(words(8), "s", side=True)
    first = book.turn([*HEAD, *words(1), *ASK], "s", tools=True)
    summary = book.turn([*HEAD, *words(1, 9), *ASK], "s", side=True)
    assert book.turn([*HEAD, *words(1, 2), *ASK], "s", tools=True) is first
    assert (first.key, first.turns, first.edits, first.parent) == ("s", 2, 0, None)
    assert {title.group, summary.group} == {"s"}
    assert [book.all.is_side(one) for one in (title, summary, first)] == [True, True, False]


def test_what_offers_no_tools_beside_tools_is_aside(book):
    """Of a client that no table knows."""
    title = book.turn(words(8), "s")
    assert not book.all.is_side(title)
    first = book.turn([*HEAD, *words(1), *ASK], "s", tools=True)
    assert (book.all.is_side(title), book.all.is_side(first)) == (True, False)


def test_salts_keep_the_conversations_of_a_key_apart(book):
    first = book.turn(prompt(1), "a", salt="x")
    other = book.turn(prompt(1, 2), "a", salt="y")
    assert (other is first, book.known, book.change) == (False, 0, None)
    assert book.turn(prompt(1, 2), "a", salt="x") is first


def test_many_side_requests_hide_no_conversation(book):
    book.turn([*HEAD, *words(1), *ASK], "s", tools=True)
    fork = book.turn([*words(50), *HEAD, *words(1), *ASK], "s", tools=True)
    for n in range(40):
        book.turn([*words(n), *HEAD], "s", side=True)
    assert book.turn([*words(50), *HEAD, *words(9), *ASK], "s", tools=True) is fork


def test_a_key_of_thousands(book):
    """All of them under one key: each is found by its prompt, and forgotten."""
    for n in range(2000):
        book.now += 1
        book.turn([n, *words(n % 7), *ASK], "app", session=False)
    known = {c.key: c for c in book.all}
    assert len(known) == 2000
    found = [book.turn([n, *words(n % 7), *ASK, *words(8), *ASK], "app", session=False) for n in range(2000)]
    assert [c.key for c in found] == list(known), "each is its own one, in the order in which they came"
    book.all.expire(1e9)
    assert len(book.all) == 0


def test_sub_agents_are_of_their_parents_group(book):
    book.turn([*HEAD, *words(1), *ASK], "p", tools=True)
    one = book.turn([*HEAD, *words(5), *ASK], "c1", parent="p", tools=True)
    two = book.turn([*HEAD, *words(6), *ASK], "c2", parent="p", tools=True)
    deeper = book.turn([*HEAD, *words(7), *ASK], "c3", parent="c1", tools=True)
    assert {one.group, two.group, deeper.group} == {"p"}
    assert (deeper.parent, deeper.by) == ("c1", "header")
    assert len(book.all) == 4


@pytest.mark.parametrize(("later", "by"), [(GROUP_SECONDS - 1, "prefix"), (GROUP_SECONDS + 1, "")])
def test_a_sub_agent_without_headers_is_guessed_by_prefix_and_time(book, later, by):
    parent = book.turn([*HEAD, *words(1), *ASK], tools=True, client="x")
    book.now += later
    child = book.turn([*HEAD, *words(5), *ASK], tools=True, client="x")
    assert (child.by, child.parent) == (by, parent.key if by else None)
    assert book.turn([*HEAD, *words(6), *ASK], tools=True, client="y").by == "", "of another program"


@pytest.mark.parametrize("others", [0, 5])
def test_a_resumed_session_without_its_reminder_is_found(book, others):
    """Without a key: what differs is near the beginning, and what was asked stands behind it."""
    first = book.turn([*HEAD, *words(3), *words(1), *ASK])
    for n in range(others):
        book.turn([*HEAD, *words(3), *words(20 + n), *ASK])
    assert book.turn([*HEAD, *words(1), *ASK, *words(2), *ASK]) is first
    assert (first.edits, book.known) == (1, len(HEAD))
    assert (book.change.shared, book.change.first) == (len(HEAD), False)
    assert book.turn([*HEAD, *words(1), *ASK, *words(2), *ASK, *words(4), *ASK]) is first
    assert first.edits == 1


def test_another_task_in_the_same_folder_is_another_conversation(book):
    first = book.turn([*HEAD, *words(1), *ASK])
    other = book.turn([*HEAD, *words(2), *ASK])
    assert other is not first
    assert (book.change.shared, book.change.first) == (len(HEAD), True)


def test_a_template_that_opens_answers_in_its_own_way_continues(book):
    """The prompt ends in <think>, the next one does not hold that: two tokens, and no edit."""
    first = book.turn([*HEAD, *words(1), *ASK, 77, 78], "a")
    assert book.turn([*HEAD, *words(1), *ASK, *words(2), *ASK], "a") is first
    assert first.edits == 0
    unkeyed = book.turn([*words(30), *HEAD, *words(1), *ASK, 77, 78])
    book.all.answered(unkeyed, [*words(40), 2])
    assert book.turn([*words(30), *HEAD, *words(1), *ASK, *words(40), *ASK, *words(5), *ASK]) is unkeyed
    assert unkeyed.edits == 0


def test_what_was_answered_counts_as_known(book):
    first = book.turn(words(1), "a")
    book.all.answered(first, [*words(2)])
    assert book.turn([*words(1, 2), *words(3)], "a") is first
    assert (book.known, book.change) == (25, None), "the length that the scheduler has counted"
    book.all.answered(first, [*words(4)])
    book.turn([*words(1, 2, 3), *words(4)[:7], *words(9)], "a")
    assert (book.known, book.change.shared) == (67, 67)


def test_forgetting_leaves_nothing_behind_keys(book):
    for n in range(20):
        book.now += 1
        book.turn([*HEAD, *words(n), *ASK], "a" if n % 2 else "", tools=True)
        book.turn(words(n), "a", side=True)
    book.now += 10_000
    book.all.expire(book.now)
    assert (len(book.all), len(book.all._families), len(book.all._first._owners), book.all._last.size) == (0, 0, 0, 0)


def test_last_prompts_are_bounded():
    kept = LastPrompts(100)
    for n in range(10):
        kept.put(n, bytes(40))
    assert kept.size == 80
    assert [bool(kept.get(n)) for n in range(10)] == [False] * 8 + [True] * 2
    kept.put(9, bytes(60))
    assert (kept.size, len(kept.get(8))) == (100, 40)
    kept.put(9, b"")
    assert kept.size == 40
    assert KEPT_BYTES >= 3000 * 20_000 * 4


def test_common_run():
    one, other = (b"".join(n.to_bytes(4, "little") for n in tokens) for tokens in ([1, 2, 300, 4], [1, 2, 301]))
    assert [common_run(*pair) for pair in ((one, other), (one, one), (one, b""), (one[:8], one))] == [2, 4, 0, 2]


def test_a_fork_takes_no_name_that_a_client_has_given(book):
    book.turn(prompt(1), "a")
    theirs = [book.turn(prompt(n), f"a~{n}") for n in range(2, 9)]
    fork = book.turn(prompt(50), "a")
    assert fork not in theirs
    assert len(book.all) == 9
    assert [book.turn(prompt(n, 60), f"a~{n}") is one for n, one in enumerate(theirs, 2)] == [True] * 7
    book.all.expire(1e9)
    assert (len(book.all), len(book.all._families), len(book.all._prompts._owners)) == (0, 0, 0)


def test_many_sessions_that_begin_with_the_same_prompt_go_on(book):
    """More than the index keeps of one prompt; the key tells them apart."""
    sessions = [book.turn([*HEAD, *ASK], f"s{n}") for n in range(ALIKE + 40)]
    assert [book.turn([*HEAD, *ASK, *words(n), *ASK], f"s{n}") for n in range(ALIKE + 40)] == sessions
    assert {session.edits for session in sessions} == {0}


@pytest.mark.parametrize("order", [1, -1])
def test_the_one_that_shares_most_goes_on(book, order):
    """Sessions without keys that have said the same last, with a template that opens answers in its own way."""
    sessions = []
    for n in (1, 2):
        one = book.turn([*HEAD, *words(n), *ASK, 77, 78])
        book.all.answered(one, [*words(30), 2])
        sessions.append(one)
    for n, one in list(enumerate(sessions, 1))[::order]:
        assert book.turn([*HEAD, *words(n), *ASK, *words(30), *ASK, *words(40 + n), *ASK, 77, 78]) is one
        assert one.edits == 0


def test_two_sessions_that_end_alike_are_two(book):
    """Both come with a history, as after a restart; a few tokens of the template stand in both."""
    first = book.turn([*HEAD, *words(1), *ASK, *words(2), *ASK])
    other = book.turn([*HEAD, *words(3), *ASK, *words(4), *ASK, *words(5), *ASK])
    assert other is not first


def test_a_cache_key_joins_nothing_that_begins_otherwise(book):
    """Prompts of a batch that differ from their first token on, and end alike."""
    batch = [book.turn([n, *HEAD, *words(1), *ASK, *words(n), *ASK], "batch", session=False) for n in range(2, 12)]
    assert len({id(one) for one in batch}) == 10


def test_interleaved_conversations_of_one_cache_key_go_on(book):
    """More than are compared, and with a template that opens answers in its own way: those that had a turn last."""
    chats = [book.turn([*HEAD, *words(n), *ASK, 77, 78], "app", session=False) for n in range(16)]
    for turn in range(1, 4):
        for n, one in enumerate(chats):
            history = [token for t in range(turn) for token in (*words(100 + 20 * n + t), *ASK)]
            assert book.turn([*HEAD, *words(n), *ASK, *history, 77, 78], "app", session=False) is one


def test_answers_of_choices_stand_behind_the_prompt_each(book):
    one = book.turn([*HEAD, *ASK], "a")
    for n in range(4):
        book.find([*HEAD, *ASK], "a").active = n + 1
    for n in range(4):
        book.all.answered(one, words(n))
    assert book.all._last.size == 4 * len([*HEAD, *ASK, *words(3)])


def test_a_fork_is_found_under_its_own_name(book):
    book.turn(prompt(1), "a")
    fork = book.turn(prompt(7), "a")
    assert book.turn(prompt(7, 8), fork.key) is fork
    again = book.turn(prompt(9), fork.key)
    assert (again.parent, again.group) == ("a", "a")
    assert book.turn(prompt(9, 10), fork.key) is again


def test_two_sub_agents_without_headers_have_the_same_parent(book):
    parent = book.turn([*HEAD, *words(1), *ASK], tools=True)
    children = [book.turn([*HEAD, *words(n), *ASK], tools=True) for n in (5, 6)]
    assert [child.parent for child in children] == [parent.key] * 2
