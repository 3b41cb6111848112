"""A prefiller and a decoder in this process, with every message in the test's hands."""

from __future__ import annotations

import os

from miniserve.cluster.messages import Peer, PoolInfo, Prefill, Publish
from miniserve.config import EngineConfig
from miniserve.kv.hashing import root_hash
from miniserve.kv.transfer.interface import connect
from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import build
from miniserve.worker.handoff import Handoffs
from miniserve.worker.sequence import Sequence
from tests.support.doors import NO_DOOR
from tests.support.tiny import prompts, reference
from tests.support.whole import check_pool

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = prompts(1, seed=8, shortest=100, longest=100)[0]


class Side:
    """One worker without its process; `sent` are the messages it wants to send."""

    def __init__(self, name: str, folder, clock, prompt: list[int] = PROMPT, connect=connect, **engine) -> None:
        self.prompt = prompt
        settings = {"kv_cache_memory": 2**22, "max_num_batched_tokens": 32, "threads": 1}
        self.built = build(EngineConfig(model=str(folder), **{**settings, **engine}))
        self.engine = self.built.engine
        self.sent: list = []
        self.out: dict[int, int] = {}
        memory = self.built.memory
        pool = PoolInfo(os.getpid(), memory.shared.fd, memory.num_pages, memory.shape.bytes, self.built.layout)
        self.handoffs = Handoffs(
            self.engine,
            self.built.memory.shape.bytes,
            self.built.layout,
            30.0,
            lambda to, body: self.sent.append(body),
            lambda peer: connect(self.built.memory, pool, NO_DOOR, peer, "mapped"),
            clock,
        )
        self.peer = Peer(name, 1, f"inproc://{name}", pool)

    def sequence(self, params: SamplingParams = GREEDY, **kwargs) -> Sequence:
        return Sequence("t", self.prompt, params, 0, root_hash(self.built.layout), **kwargs)

    def step(self) -> None:
        for sequence in self.engine.admit():
            self.handoffs.receiver.request(sequence)
        step = self.engine.step()
        for sequence, first in step.prefilled:
            self.handoffs.sender.publish(sequence, first)
        for output in self.handoffs.receiver.outputs + step.outputs:
            self.out.update(enumerate(output.tokens, output.index))
        self.handoffs.receiver.outputs.clear()

    def take(self, kind: type) -> list:
        """The messages of one kind, no longer in `sent`."""
        found = [m for m in self.sent if isinstance(m, kind)]
        self.sent = [m for m in self.sent if not isinstance(m, kind)]
        return found


class Pair:
    """p and d, and the clock they share. `ask` brings them to the point where P has the prompt; `connect` is as
    `kv.transfer.interface.connect`."""

    def __init__(self, folder, prompt: list[int] = PROMPT, connect=connect, **engine) -> None:
        self.now = 100.0
        self.p = Side("p0", folder, lambda: self.now, prompt, connect, **engine)
        self.d = Side("d0", folder, lambda: self.now, prompt, connect, **engine)
        self.text = reference(folder, [prompt], 12)[0]
        for side, other in ((self.p, self.d), (self.d, self.p)):
            side.handoffs.set_peers([other.peer])

    def ask(self, **kwargs) -> Sequence:
        sequence = self.d.sequence(prefill_at="p0", **kwargs)
        self.d.engine.add(sequence)
        self.d.step()
        (prefill,) = self.d.take(Prefill)
        assert len(sequence.pages) == 7, "D reserves before P starts"
        self.p.handoffs.sender.on_prefill(prefill, "d0")
        return sequence

    def publications(self) -> list[Publish]:
        """All that P publishes."""
        while not (found := self.p.take(Publish)) or found[-1].commit is None:
            self.p.sent += found
            self.p.step()
        return found

    def finish(self) -> list[int]:
        """Let D end the turn; its text, which D knows from the first token on."""
        while self.d.engine.find("t"):
            self.d.step()
        self.d.step()
        assert self.p.out.items() <= self.d.out.items(), "D goes on from what P has said"
        return [self.d.out[i] for i in range(len(self.d.out))]

    def check(self) -> None:
        """Neither side holds a page."""
        for side in (self.p, self.d):
            check_pool(side.engine.pool)
            assert side.engine.pool.num_held == 0
            assert not side.handoffs.sender.leases
