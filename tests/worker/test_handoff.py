"""The rules of a handoff, one by one: a prefiller and a decoder in this process, with every message in our hands."""

from __future__ import annotations

import msgspec
import pytest

from miniserve.cluster.messages import Fetch, Peer, Prefill, PrefillRefused, Publish, Release
from miniserve.kv.hashing import root_hash
from miniserve.kv.transfer.interface import TransferError
from miniserve.sampling_params import SamplingParams
from miniserve.worker.sequence import Sequence, State
from tests.support.handoff_pair import GREEDY, PROMPT, Pair, Side
from tests.support.tiny import prompts, reference


@pytest.fixture
def pair(tiny_folder):
    return Pair(tiny_folder)


def test_pages_arrive_chunk_by_chunk_and_the_commit_is_acknowledged(pair):
    sequence = pair.ask()
    publications = pair.publications()
    assert [(m.first, len(m.pages)) for m in publications] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    for message in publications:
        assert sequence.state is State.RECEIVING, "D computes nothing before the commit"
        assert pair.p.handoffs.sender.num_leases == 1
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
    assert pair.p.handoffs.sender.num_leases == 1


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
    pair.d.engine.pool.check()


@pytest.mark.parametrize("steps", range(6))
def test_losing_d_or_its_abort_ends_the_lease(pair, steps):
    for how in ("death", "abort"):
        pair.ask()
        for _ in range(steps):
            pair.p.step()
        if how == "death":
            pair.p.handoffs.set_peers([replace_epoch(pair.d.peer, 2)])
            pair.d.engine.abort("t")
            pair.d.handoffs.receiver._pulls.clear()
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
    pair.p.handoffs.sender.on_prefill(Prefill("t", [1] * 600, GREEDY, 0, "", 0, 0), "d0")
    assert pair.p.take(PrefillRefused)
    assert pair.p.handoffs.sender.num_leases == 0


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


# --- history ---


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
    assert pair.d.handoffs.sender.num_leases == 1
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


# --- stores that take their time, as on a GPU ---


class SlowStore:
    """Every copy to `side`, written and `stored` only when `finish` says so. `log` is what was done to copies."""

    def __init__(self, side: Side, monkeypatch) -> None:
        self.log: list[str] = []
        self.unfinished: list[Storing] = []
        transfer = side.handoffs.peers.transfer("p0")
        fetch = transfer.fetch
        monkeypatch.setattr(transfer, "fetch", lambda ticket, pages: Storing(self, fetch(ticket, pages)))

    def finish(self) -> None:
        for copy in self.unfinished:
            copy.write()
        self.unfinished = []


class Storing:
    ready = True
    seconds = 2.0

    def __init__(self, slow: SlowStore, copy) -> None:
        self.slow, self.copy = slow, copy
        self.written = self.broken = False

    @property
    def stored(self) -> bool:
        if self.broken:
            raise TransferError("the connection to the peer broke")
        return self.written

    def store(self, ours: list[int]) -> None:
        self.slow.log.append("store")
        self.slow.unfinished.append(self)
        self.ours = ours

    def write(self) -> None:
        self.copy.store(self.ours)
        self.written = True

    def abandon(self) -> None:
        """The last moment at which it may still be written."""
        self.slow.log.append("abandon")
        self.slow.finish()


def test_a_store_that_takes_several_polls(pair, monkeypatch):
    slow = SlowStore(pair.d, monkeypatch)
    sequence = pair.ask()
    for message in pair.publications():
        pair.d.handoffs.receiver.on_publish(message, "p0")
    done = [0]
    while pair.d.engine.find("t").state is State.RECEIVING:
        for _ in range(3):
            pair.d.handoffs.receiver.poll()
            pair.d.step()
        assert len(slow.log) == len(done), "one after the other, each begun once"
        assert sequence.computed == done[-1], "nothing counts before it is stored"
        assert pair.d.handoffs.receiver.copying
        assert not pair.d.take(Release)
        slow.finish()
        pair.d.handoffs.receiver.poll()
        done.append(sequence.computed)
    assert done == [0, 32, 64, 96, 100]
    assert not pair.d.handoffs.receiver.copying
    assert pair.d.take(Release)
    pair.p.handoffs.sender.on_release("t")
    assert pair.d.handoffs.receiver.moves[0].seconds == 8.0
    assert pair.finish() == pair.text
    assert pair.d.engine.counters.prompt_tokens == 0
    assert slow.log == ["store"] * 4
    pair.check()


@pytest.mark.parametrize("before", [0, 1, 3])
def test_an_abort_while_pages_are_stored(pair, monkeypatch, before):
    slow = SlowStore(pair.d, monkeypatch)
    pair.ask()
    messages = pair.publications()
    for message in messages:
        pair.d.handoffs.receiver.on_publish(message, "p0")
    for _ in range(before):
        slow.finish()
        pair.d.handoffs.receiver.poll()
    pair.d.handoffs.receiver.abort("t")
    pair.d.engine.abort("t")
    assert slow.log == ["store"] * (before + 1) + ["abandon"]
    assert pair.d.take(Release)
    pair.p.handoffs.sender.on_release("t")
    pair.d.handoffs.receiver.poll()
    pair.check()
    assert pair.d.engine.pool.num_cached == 2 * before, "what was stored stays"
    assert not pair.d.handoffs.receiver.copying


@pytest.mark.parametrize("why", ["dead", "stuck", "refused", "late", "broken"])
@pytest.mark.parametrize("before", [0, 2])
def test_giving_up_while_pages_are_stored(pair, monkeypatch, why, before):
    slow = SlowStore(pair.d, monkeypatch)
    sequence = pair.ask()
    for message in pair.publications()[:-1]:
        pair.d.handoffs.receiver.on_publish(message, "p0")
    for _ in range(before):
        slow.finish()
        pair.d.handoffs.receiver.poll()
    match why:
        case "dead":
            pair.d.handoffs.set_peers([])
        case "stuck":
            pair.now += 31
            pair.d.handoffs.receiver.poll()
        case "refused":
            pair.d.handoffs.receiver.on_refused(PrefillRefused("t", "no"))
        case "late":
            pair.now += 31
            slow.finish()
            pair.d.handoffs.receiver.poll()
        case "broken":
            slow.unfinished[0].broken = True
            pair.d.built.memory.pages[sequence.pages[before * 2]] = 1  # a part of it was written
            pair.d.handoffs.receiver.poll()
    assert sequence.state is State.RUNNING
    assert sequence.computed == before * 32
    assert slow.log == ["store"] * (before + 1) + ["abandon"] * (why not in ("late", "broken")), (
        "what is over needs no abandoning"
    )
    pair.p.handoffs.sender.on_release("t")
    assert pair.finish() == pair.text
    assert pair.d.engine.counters.prompt_tokens == 100 - before * 32
    assert not pair.d.handoffs.receiver.copying
    pair.check()


def test_a_decoder_that_computes_what_did_not_come_says_so(pair):
    pair.ask()
    assert pair.d.engine.queued_prefill_tokens == 0
    pair.d.handoffs.receiver.on_refused(PrefillRefused("t", "no"))
    assert pair.d.engine.queued_prefill_tokens == 100
