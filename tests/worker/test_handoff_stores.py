"""Handoffs whose copies take their time, as on a GPU: they go on beside steps, aborts and failures."""

from __future__ import annotations

import pytest

from miniserve.cluster.messages import PrefillRefused, Release
from miniserve.kv.transfer.door import TransferError
from miniserve.worker.sequence import State
from tests.support.handoff_pair import Pair, Side


@pytest.fixture
def pair(tiny_folder):
    return Pair(tiny_folder)


class SlowStore:
    """Every copy to `side`; the first is written and `stored` only when `finish` says so. `log` is what was done to
    copies."""

    def __init__(self, side: Side, monkeypatch) -> None:
        self.log: list[str] = []
        self.unfinished: list[Storing] = []
        transfer = side.handoffs.peers.ways["p0"]
        fetch = transfer.fetch
        monkeypatch.setattr(transfer, "fetch", lambda *what: Storing(self, lambda: fetch(*what)))

    def finish(self) -> None:
        self.unfinished.pop(0).write()


class Storing:
    seconds = 2.0

    def __init__(self, slow: SlowStore, fetch) -> None:
        self.slow, self.fetch = slow, fetch
        self.written = self.broken = False
        slow.log.append("fetch")
        slow.unfinished.append(self)

    @property
    def stored(self) -> bool:
        if self.broken:
            raise TransferError("the connection to the peer broke")
        return self.written

    def write(self) -> None:
        self.fetch()
        self.written = True

    def abandon(self) -> None:
        """The last moment at which it may still be written."""
        self.slow.log.append("abandon")
        self.slow.unfinished.remove(self)
        self.write()


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
        assert slow.log == ["fetch"] * 4, "each is begun once, when it is published"
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
    assert slow.log == ["fetch"] * 4
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
    assert slow.log == ["fetch"] * 4 + ["abandon"] * (4 - before)
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
    assert slow.log == ["fetch"] * 3 + ["abandon"] * (3 - before - (why in ("late", "broken"))), (
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
