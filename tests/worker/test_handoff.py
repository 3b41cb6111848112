"""The rules of a handoff, one by one: a prefiller and a decoder in this process, with every message in our hands."""

from __future__ import annotations

import msgspec
import pytest

from miniserve.cluster.messages import Peer, Prefill, PrefillRefused, Publish, Release
from miniserve.kv.hashing import root_hash
from miniserve.sampling_params import SamplingParams
from miniserve.worker.sequence import Sequence, State
from tests.support.handoff_pair import GREEDY, PROMPT, Pair
from tests.support.tiny import prompts, reference
from tests.support.whole import check_pool


@pytest.fixture
def pair(tiny_folder):
    return Pair(tiny_folder)


def test_pages_arrive_chunk_by_chunk_and_the_commit_is_acknowledged(pair):
    sequence = pair.ask()
    publications = pair.publications()
    assert [(m.first, len(m.pages)) for m in publications] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    for message in publications:
        assert sequence.state is State.RECEIVING, "D computes nothing before the commit"
        assert len(pair.p.handoffs.sender.leases) == 1
        pair.d.handoffs.receiver.on_publish(message, "p0")
    (release,) = pair.d.take(Release)
    assert pair.p.engine.pool.num_held == 7, "P keeps the pages until the ack"
    pair.p.handoffs.sender.on_release(release.turn)
    assert pair.p.engine.pool.num_cached == 6, "full pages stay as prefix cache"
    assert pair.finish() == pair.text
    assert pair.p.out == {0: pair.text[0]}, "the first token is P's"
    (move,) = pair.d.handoffs.receiver.moves
    assert (move.pages, move.bytes) == (7, 7 * pair.d.built.memory.shape.bytes)
    pair.check()


def test_only_what_d_lacks_moves(pair):
    warm = Sequence("w", PROMPT[:50], GREEDY, 0, root_hash(pair.d.built.layout))
    pair.d.engine.add(warm)
    while pair.d.engine.find("w"):
        pair.d.step()
    pair.d.out.clear()
    pair.ask()
    publications = pair.publications()
    assert publications[0].first == 3
    for message in publications:
        pair.d.handoffs.receiver.on_publish(message, "p0")
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    assert pair.d.handoffs.receiver.moves[0].pages == 4


@pytest.mark.parametrize("bad", range(4))
def test_a_hash_mismatch_is_recomputed(pair, bad):
    pair.ask()
    for i, message in enumerate(pair.publications()):
        if i == bad:
            message = msgspec.structs.replace(message, hashes=[b"x" * 16] * len(message.hashes))
        pair.d.handoffs.receiver.on_publish(message, "p0")
    assert pair.d.take(Release)
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    assert pair.d.engine.counters.prompt_tokens == 100 - bad * 32
    assert not pair.d.handoffs.receiver.moves
    pair.check()


def test_pages_copied_after_the_lease_do_not_count(pair):
    pair.ask()
    first, *rest = pair.publications()
    pair.d.handoffs.receiver.on_publish(first, "p0")
    pair.now += 31
    pair.p.handoffs.sender.expire()
    assert pair.p.engine.pool.num_held == 0, "the lease has ended"
    for message in rest:
        pair.d.handoffs.receiver.on_publish(message, "p0")
    assert pair.finish() == pair.text
    assert pair.d.engine.counters.prompt_tokens == 100 - 32
    pair.check()


@pytest.mark.parametrize("length", [100, 112])
def test_a_commit_that_comes_too_late_still_carries_the_first_token(tiny_folder, length):
    """The client has it already: D computes the pages, but draws no other first token."""
    prompt = prompts(1, seed=8, shortest=length, longest=length)[0]
    pair = Pair(tiny_folder, prompt)
    pair.ask()
    messages = pair.publications()
    other = (pair.text[0] + 1) % 256
    pair.p.out = {0: other}
    messages[-1] = msgspec.structs.replace(
        messages[-1], commit=msgspec.structs.replace(messages[-1].commit, tokens=[other])
    )
    for message in messages[:-1]:
        pair.d.handoffs.receiver.on_publish(message, "p0")
    pair.now += 31
    pair.p.handoffs.sender.expire()
    pair.d.handoffs.receiver.on_publish(messages[-1], "p0")
    assert pair.finish() == [other, *reference(tiny_folder, [[*prompt, other]], 11)[0]]
    pair.check()


def test_a_lease_does_not_end_while_p_still_prefills(pair):
    pair.ask()
    pair.p.step()
    pair.now += 1000
    pair.p.handoffs.sender.expire()
    assert len(pair.p.handoffs.sender.leases) == 1


@pytest.mark.parametrize("published", range(5))
def test_losing_p(pair, published):
    pair.ask()
    messages = pair.publications()
    for message in messages[: min(published, 3)]:
        pair.d.handoffs.receiver.on_publish(message, "p0")
    pair.d.handoffs.set_peers([])
    for message in messages:  # words of the dead
        pair.d.handoffs.receiver.on_publish(message, "p0")
    assert pair.finish() == pair.text
    assert pair.d.engine.pool.num_held == 0
    check_pool(pair.d.engine.pool)


@pytest.mark.parametrize("steps", range(6))
def test_losing_d_or_its_abort_ends_the_lease(pair, steps):
    for how in ("death", "abort"):
        pair.ask()
        for _ in range(steps):
            pair.p.step()
        if how == "death":
            pair.p.handoffs.set_peers([replace_epoch(pair.d.peer, 2)])
            pair.d.engine.abort("t")
            pair.d.handoffs.receiver.pulls.clear()
            pair.p.handoffs.set_peers([pair.d.peer])
        else:
            pair.d.handoffs.receiver.abort("t")
            pair.d.engine.abort("t")
            assert pair.d.take(Release)
            pair.p.handoffs.sender.on_release("t")
        pair.check()


def replace_epoch(peer: Peer, epoch: int) -> Peer:
    return msgspec.structs.replace(peer, epoch=epoch)


def test_refusal(pair):
    pair.ask()
    pair.d.handoffs.receiver.on_refused(PrefillRefused("t", "no"))
    assert pair.finish() == pair.text


def test_what_can_never_fit_is_refused(pair):
    pair.p.handoffs.sender.on_prefill(Prefill("t", [1] * 600, GREEDY, 0), "d0")
    assert pair.p.take(PrefillRefused)
    assert not pair.p.handoffs.sender.leases


@pytest.mark.parametrize("ends", ["length", "stop"])
def test_a_turn_that_ends_with_its_first_token(pair, ends):
    token = pair.text[0]
    limit = {"max_tokens": 1} if ends == "length" else {"stop_token_ids": [token]}
    pair.ask(params=SamplingParams(temperature=0, **limit))
    for message in pair.publications():
        pair.d.handoffs.receiver.on_publish(message, "p0")
    assert pair.d.engine.find("t") is None
    first, ended = pair.d.handoffs.receiver.outputs
    assert (first.index, first.tokens) == (0, [])
    assert (ended.index, ended.tokens, ended.finish) == (0, [token], ends)
    pair.p.handoffs.sender.on_release("t")
    pair.check()
    assert pair.d.engine.pool.num_cached == 6


def test_other_layouts_exchange_nothing(pair):
    stranger = replace_pool(pair.p.peer, layout="other")
    pair.d.handoffs.set_peers([stranger])
    pair.d.engine.add(pair.d.sequence(prefill_at="p0"))
    pair.d.step()
    assert not pair.d.take(Prefill)
    assert pair.finish() == pair.text


def replace_pool(peer: Peer, **changes) -> Peer:
    return msgspec.structs.replace(peer, pool=msgspec.structs.replace(peer.pool, **changes))


# --- deadlines of the receiver ---


def test_a_stuck_handoff_ends_at_its_deadline(pair):
    pair.ask()
    pair.now += 29
    pair.d.handoffs.receiver.poll()
    assert pair.d.engine.find("t").state is State.RECEIVING
    pair.now += 2
    pair.d.handoffs.receiver.poll()
    assert pair.d.take(Release)
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    pair.check()


def test_a_prefiller_that_is_busy_is_not_stuck(pair):
    pair.ask()
    pair.p.engine.admit()
    for _ in range(10):
        pair.now += 10
        pair.p.handoffs.sender.expire()
        for message in pair.p.take(Publish):
            assert not message.pages
            pair.d.handoffs.receiver.on_publish(message, "p0")
        pair.d.handoffs.receiver.poll()
    assert pair.d.engine.find("t").state is State.RECEIVING
    for message in pair.publications():
        pair.d.handoffs.receiver.on_publish(message, "p0")
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    assert pair.d.engine.counters.prompt_tokens == 0
    pair.check()
