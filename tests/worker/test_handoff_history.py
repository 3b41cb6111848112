"""Handoffs of a history: a prefiller or a new home fetches what another worker holds of a conversation."""

from __future__ import annotations

import msgspec
import pytest

from miniserve.cluster.messages import Fetch, Keep, Prefill, Publish, Release
from miniserve.kv.hashing import root_hash
from miniserve.worker.sequence import Sequence
from tests.support.handoff_pair import GREEDY, PROMPT, Pair, Side
from tests.support.whole import check_pool


@pytest.fixture
def pair(tiny_folder):
    return Pair(tiny_folder)


def warm(side: Side, tokens: int) -> None:
    """`side` has served the first `tokens` of the prompt before."""
    side.engine.add(Sequence("w", PROMPT[:tokens], GREEDY, 0, root_hash(side.built.layout)))
    while side.engine.find("w"):
        side.step()
    side.out.clear()
    side.engine.counters.prompt_tokens = 0


def fetched(side: Side, other: Side) -> list[Publish]:
    """`other` asks `side` for history: what is published."""
    (fetch,) = other.take(Fetch)
    side.handoffs.sender.on_fetch(fetch, other.peer.name)
    return side.take(Publish)


def test_a_prefiller_fetches_the_history_it_lacks(pair):
    warm(pair.d, 90)
    pair.ask(share_history=True)
    pair.p.step()
    (history,) = fetched(pair.d, pair.p)
    assert (history.first, len(history.pages), history.last) == (0, 5, True)
    assert len(pair.d.handoffs.sender.leases) == 1
    pair.p.handoffs.receiver.on_publish(history, "d0")
    for message in pair.publications():
        assert message.first >= 5, "only new pages come back"
        pair.d.handoffs.receiver.on_publish(message, "p0")
    pair.d.handoffs.sender.on_release(pair.p.take(Release)[0].turn)
    pair.p.handoffs.sender.on_release(pair.d.take(Release)[0].turn)
    assert pair.finish() == pair.text
    assert pair.p.engine.counters.prompt_tokens == 20
    assert pair.d.engine.counters.prompt_tokens == 0
    assert [(m.source, m.pages, m.history) for m in pair.p.handoffs.receiver.moves] == [("d0", 5, True)]
    assert [(m.source, m.pages, m.history) for m in pair.d.handoffs.receiver.moves] == [("p0", 2, False)]
    pair.check()


def test_a_prefiller_that_has_the_history_asks_for_none(pair):
    warm(pair.d, 90)
    warm(pair.p, 95)
    pair.ask(share_history=True)
    pair.p.step()
    assert not pair.p.take(Fetch)


def test_a_new_home_fetches_the_history_from_the_old_one(pair):
    warm(pair.p, 90)
    sequence = pair.d.sequence(history_at="p0")
    pair.d.engine.add(sequence)
    pair.d.step()
    for message in fetched(pair.p, pair.d):
        pair.d.handoffs.receiver.on_publish(message, "p0")
    assert sequence.cached == 80
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    assert pair.d.engine.counters.prompt_tokens == 20
    pair.check()


@pytest.mark.parametrize("room", [7, 4, 0])
def test_history_in_host_memory_comes_back_as_far_as_there_is_room(tiny_folder, room):
    pair = Pair(tiny_folder, swap_space=2**22)
    warm(pair.p, 90)
    pool, watermark = pair.p.engine.pool, max(1, pair.p.engine.pool.num_pages // 100)
    pages = pool.allocate(pool.num_pages, 0.0)
    assert pair.p.engine.host.num_used >= 5, "all were evicted"
    pool.release(pages[: room + watermark], Keep(), 0.0)
    sequence = pair.d.sequence(history_at="p0")
    pair.d.engine.add(sequence)
    pair.d.step()
    for message in fetched(pair.p, pair.d):
        pair.d.handoffs.receiver.on_publish(message, "p0")
    assert sequence.cached == 16 * min(5, room)
    assert pair.p.engine.host.restored == min(5, room)
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    pool.release(pages[room + watermark :], Keep(), 0.0)
    check_pool(pair.p.engine.host)
    assert pair.p.engine.host.num_held == 0
    pair.check()


def test_history_of_a_long_past_comes_in_pieces(tiny_folder, monkeypatch):
    monkeypatch.setattr("miniserve.worker.sender.PIECE", 2)
    pair = Pair(tiny_folder)
    warm(pair.p, 90)
    pair.d.engine.add(pair.d.sequence(history_at="p0"))
    pair.d.step()
    messages = fetched(pair.p, pair.d)
    assert [(m.first, len(m.pages), m.last) for m in messages] == [(0, 2, False), (2, 2, False), (4, 1, True)]
    for message in messages:
        pair.d.handoffs.receiver.on_publish(message, "p0")
    assert pair.d.handoffs.receiver.moves[0].pages == 5
    assert pair.finish() == pair.text


def test_history_that_is_gone_is_computed(pair):
    pair.d.engine.add(pair.d.sequence(history_at="p0"))
    pair.d.step()
    (message,) = fetched(pair.p, pair.d)
    assert (message.pages, message.last) == ([], True)
    pair.d.handoffs.receiver.on_publish(message, "p0")
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    assert not pair.d.handoffs.receiver.moves
    pair.check()


@pytest.mark.parametrize("bad", [0, 1])
def test_history_with_other_hashes_or_copied_too_late_is_computed(pair, bad):
    warm(pair.p, 90)
    pair.d.engine.add(pair.d.sequence(history_at="p0"))
    pair.d.step()
    (message,) = fetched(pair.p, pair.d)
    if bad:
        message = msgspec.structs.replace(message, hashes=[b"x" * 16] * len(message.hashes))
    else:
        pair.now += 31
        pair.p.handoffs.sender.expire()
        assert pair.p.engine.pool.num_held == 0
    pair.d.handoffs.receiver.on_publish(message, "p0")
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    assert pair.d.engine.counters.prompt_tokens == 100
    pair.check()


def test_an_abort_while_p_fetches_the_history(pair):
    warm(pair.d, 90)
    pair.ask(share_history=True)
    pair.p.step()
    (history,) = fetched(pair.d, pair.p)
    pair.d.handoffs.receiver.abort("t")
    pair.d.engine.abort("t")
    assert pair.d.engine.pool.num_held == 5, "P may be reading"
    pair.p.handoffs.sender.on_release("t")
    pair.p.handoffs.receiver.on_publish(history, "d0")
    assert pair.p.engine.counters.prompt_tokens == 0
    pair.d.handoffs.sender.on_release(pair.p.take(Release)[0].turn)
    pair.check()


def test_history_that_comes_after_it_was_given_up_is_not_taken_for_the_prefill(pair):
    warm(pair.p, 90)
    sequence = pair.d.sequence(history_at="p0", prefill_at="p0")
    pair.d.engine.add(sequence)
    pair.d.step()
    (stale,) = fetched(pair.p, pair.d)
    pair.p.handoffs.sender.on_release("t")  # P hears all at once: it has published, and the pages are free again
    pair.now += 31
    pair.d.handoffs.receiver.poll()
    (prefill,) = pair.d.take(Prefill)
    stale = msgspec.structs.replace(stale, deadline=pair.now + 30)
    pair.d.handoffs.receiver.on_publish(stale, "p0")
    assert sequence.computed == 0
    pair.d.take(Release)
    pair.p.handoffs.sender.on_prefill(prefill, "d0")
    for message in pair.publications():
        pair.d.handoffs.receiver.on_publish(message, "p0")
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    pair.check()
