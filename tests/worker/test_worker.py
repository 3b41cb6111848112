"""One worker, driven by messages in an order of our choice."""

from __future__ import annotations

import os

import pytest

from miniserve.cluster.channels import Keys
from miniserve.cluster.launch import WorkerSpec
from miniserve.cluster.messages import Envelope, Message, Peer, Peers, PoolInfo, Prefill, Publish
from miniserve.config import EngineConfig
from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import build
from miniserve.worker.process import Worker, make_worker
from miniserve.worker.ranks import Ranks
from tests.support.doors import NO_DOOR
from tests.support.tiny import prompts

PROMPT = prompts(1, seed=8, shortest=100, longest=100)[0]


class Outboxes:
    """Keeps what a worker sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []

    def send(self, address: str, body: Message) -> None:
        self.sent.append((address, body))

    def forget(self, address: str) -> None:
        pass


@pytest.fixture
def p0(tiny_folder):
    """A prefiller, and the decoder it will hear of."""
    config = EngineConfig(model=str(tiny_folder), kv_cache_memory=2**22)
    built = build(config)
    memory = built.memory
    keys, pool = Keys("", ""), memory.info(built.layout)
    spec = WorkerSpec("p0", 1, "", "inproc://p0", "inproc://frontend", config, keys)
    outboxes = Outboxes()
    worker = make_worker(spec, built, pool, NO_DOOR, outboxes, Ranks(spec, outboxes))
    pool = PoolInfo(os.getpid(), memory.shared.fd, memory.num_pages, memory.shape.bytes, built.layout)
    return worker, lambda epoch: Peer("d0", epoch, "inproc://d0", pool)


def ask(epoch: int) -> Envelope:
    params = SamplingParams(temperature=0, max_tokens=4)
    return Envelope("d0", epoch, Prefill(f"t{epoch}", PROMPT, params, seed=0, salt="", prior=0, have=0))


def hear(worker: Worker, *envelopes: Envelope) -> set[str]:
    """The turns that the worker publishes pages of after hearing these."""
    for envelope in envelopes:
        worker._handle(envelope)
    worker.engine.admit()
    for sequence, first in worker.engine.step().prefilled:
        worker.handoffs.sender.publish(sequence, first)
    return {body.turn for _, body in worker.outboxes.sent if isinstance(body, Publish)}


def test_a_peer_that_is_heard_before_it_is_announced(p0):
    """Announcements come one by one while workers start: one without the peer must not lose its words."""
    worker, d0 = p0
    assert hear(worker, ask(1), Envelope("frontend", 0, Peers([]))) == set()
    assert hear(worker, Envelope("frontend", 0, Peers([d0(1)]))) == {"t1"}
    # It is started again, and is quicker than the frontend's word of it.
    assert hear(worker, ask(2), Envelope("frontend", 0, Peers([]))) == {"t1"}
    assert hear(worker, Envelope("frontend", 0, Peers([d0(2)]))) == {"t1", "t2"}


def test_words_of_the_dead_are_dropped(p0):
    worker, d0 = p0
    hear(worker, Envelope("frontend", 0, Peers([d0(2)])))
    assert hear(worker, ask(1)) == set()
    assert hear(worker, Envelope("frontend", 0, Peers([])), ask(2)) == set()
    assert hear(worker, Envelope("frontend", 0, Peers([d0(3)]))) == set()
    assert not worker._early
    assert not worker.handoffs.sender.leases
