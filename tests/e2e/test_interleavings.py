"""The scheduler and workers under every order in which messages can arrive, aborts and deaths in between.

The real `Scheduler` and real `Worker`s in one process and one thread. Messages of one sender to one receiver stay in
order, as ZeroMQ keeps them; otherwise the next one to arrive is anybody's. The model is made up: the next token is a
hash of all before it, and the KV of a token is a hash too, which is checked wherever a step would read it. So a page
that is reused too early, or served under a wrong name, is noticed even if the text would come out right.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import defaultdict, deque
from contextlib import suppress
from types import SimpleNamespace

import msgspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miniserve.cluster.channels import decode
from miniserve.cluster.messages import Ended, Envelope, Failed, Peer, Report, StepTime
from miniserve.config import Role
from miniserve.kv.eviction import make_order
from miniserve.kv.host import HostPool
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.pages import PagePool
from miniserve.kv.swap import SwapSpace
from miniserve.kv.transfer.door import TransferError
from miniserve.kv.transfer.interface import Copy, Transfer, connect
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import POLICIES, make_policy
from miniserve.scheduler.scheduler import NoDecoder, Scheduler
from miniserve.scheduler.turns import TRIED_AFTER, Command, Note, Send
from miniserve.worker.batching import Pace
from miniserve.worker.engine import Engine
from miniserve.worker.handoff import Handoffs
from miniserve.worker.process import Worker
from miniserve.worker.sequence import Sequence, State
from miniserve.worker.snapshots import Snapshots
from miniserve.worker.step import Launched, Work
from tests.support.anywhere import Anywhere
from tests.support.doors import NO_DOOR
from tests.support.often import often
from tests.support.whole import check_pool

PAGE, LONGEST, VOCAB = 4, 64, 1000
EOS = frozenset(range(30))
TOPOLOGIES = [("d0",), ("d0", "d1"), ("p0", "d0"), ("p0", "d0", "d1"), ("p0", "p1", "d0", "d1")]


def digest(tokens: list[int]) -> int:
    return int.from_bytes(hashlib.blake2b(str(tokens).encode(), digest_size=7).digest(), "little")


def next_token(tokens: list[int], seed: int) -> int:
    """Texts that go in circles, so that drafts hold, and leave them now and then."""
    whole = digest([seed, *tokens])
    return whole // 6 % 200 if whole % 6 == 0 else 30 + digest([seed % 3, tokens[-1]]) % 12


class Slots:
    """Recurrent states: a hash of all tokens so far, which a snapshot has in each of its pages."""

    slots, pages = 6, 2

    def __init__(self, memory: KVMemory) -> None:
        self.states = [0] * self.slots
        self._pages = memory.pages

    def clear(self, slot: int) -> None:
        self.states[slot] = digest([])

    def save(self, slot: int, pages: list[int]) -> None:
        for part, page in enumerate(pages):
            self._pages[page] = self.states[slot] + part

    def load(self, slot: int, pages: list[int]) -> None:
        self.states[slot] = int(self._pages[pages[0]].flatten()[0])
        for part, page in enumerate(pages):
            assert (self._pages[page] == self.states[slot] + part).all(), "half of a snapshot is another one's"


class Model:
    """Stands in for `Runner`: writes a hash where KV would go, and reads what lies before it; and makes a hash of the
    tokens before in a state, if there is one, that of those after. All is done at launch."""

    eos = EOS

    def __init__(self, memory: KVMemory, slots: Slots | None) -> None:
        self._pages = memory.pages
        self._slots = slots
        self._latest: dict[Sequence, int] = {}

    def launch(self, batch: list[Work]) -> Launched:
        latest: dict[Sequence, int] = {}
        sampled: list[int] = []
        for work in batch:
            sequence, start, count, tokens = work.sequence, work.start, work.count, list(work.sequence.tokens)
            if sequence.sampling:
                tokens.append(self._latest[sequence])  # the host does not know it yet
            assert start + count <= len(tokens)
            assert work.samples or not work.draft
            tokens += work.draft
            end = start + count + len(work.draft)
            if self._slots is not None:
                found = self._slots.states[sequence.slot]
                assert found == digest(tokens[:start]), (
                    f"{sequence.turn}: the state after {start} tokens is another one's"
                )
                self._slots.states[sequence.slot] = digest(tokens[:end])
            for position in range(end):
                slot = self._pages[sequence.pages[position // PAGE], 0, 0, position % PAGE, 0]
                kv = digest(tokens[: position + 1])
                if position >= start:
                    slot[0] = kv
                assert int(slot[0]) == kv, f"{sequence.turn}: the KV of token {position} is another one's"
            if work.samples:
                sampled += [next_token(tokens[:known], sequence.seed) for known in range(start + count, end + 1)]
                latest[sequence] = sampled[-1]
        self._latest = latest
        found: list = [(token, None) for token in sampled]
        return lambda: found


class Slow:
    """A transfer whose pages take their time, and now and then do not come: as `collective`, but in our hands. They are
    written at any time after `fetch`, as by a GPU beside its steps."""

    def __init__(self, world: World, memory: KVMemory, wire: tuple[str, str]) -> None:
        self.world, self.memory, self.wire = world, memory, wire
        self.writing: list[SlowCopy] = []
        world.slow_ways[wire[0]].append(self)

    def fetch(self, theirs: list[int], ours: list[int], lease: float) -> Copy:
        return SlowCopy(self, self.world.memories[self.wire[1]].pages[theirs].clone(), ours)

    def close(self) -> None:
        pass


class SlowCopy:
    seconds = 0.0

    def __init__(self, transfer: Slow, content: torch.Tensor, ours: list[int]) -> None:
        self.transfer, self.content, self.ours = transfer, content, ours
        self.left = transfer.world.pick.choice([0, 0, 1, 1, 1, 2, 4, 10])
        self.lost = transfer.world.pick.random() < 0.05
        transfer.writing.append(self)

    @property
    def stored(self) -> bool:
        self.left -= 1
        if self.left <= 0 and self in self.transfer.writing:
            if self.lost:
                self.transfer.writing.remove(self)
                raise TransferError("lost on its way")
            if self.transfer.world.pick.random() < 0.03:
                self.transfer.writing.remove(self)
                self.transfer.memory.pages[self.ours[:1]] = self.content[:1]
                raise TransferError("broke on its way")
            self.write()
        return self.left <= 0

    def abandon(self) -> None:
        if self in self.transfer.writing:
            self.write()  # at the last moment that is allowed

    def write(self) -> None:
        self.transfer.writing.remove(self)
        self.transfer.world.stored += len(self.ours)
        self.transfer.memory.pages[self.ours] = self.content


class Whim(Pace):
    """A pace on a machine whose steps take any time: how much of a prompt comes next is anybody's guess."""

    def __init__(self, pick: random.Random) -> None:
        super().__init__(pick.choice([2, 8, 40]), pick.choice([1.0, 3.0]))
        self._pick = pick

    def observe(self, step: StepTime) -> None:
        super().observe(msgspec.structs.replace(step, seconds=self._pick.choice([0.0, 0.01, 0.02, 0.05, 1.0])))


class World:
    """A cluster whose messages, steps, clients and deaths happen in an order drawn from `seed`."""

    def __init__(self, seed: int, deaths: int, policy: str, deadly: dict[str, int] | None = None) -> None:
        self.pick = random.Random(seed)
        self.wires: dict[tuple[str, str], deque[Envelope]] = defaultdict(deque)
        self.deaths = deaths
        self.deadly = deadly or {}
        """Turns, and the number of the output token whose computing kills a worker."""
        self.killed = 0
        self.unnoticed: list[str] = []
        self.memories: dict[str, KVMemory] = {}
        self.alive: dict[str, Worker] = {}
        """By address: a name and the number of this incarnation."""
        self.absent: list[tuple[str, int]] = []
        self.wanted: dict[str, list[int]] = {}
        self.got: dict[str, list[int]] = defaultdict(list)
        self.prompts: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        self.stored = self.moved = 0
        self.slow = self.pick.random() < 0.5
        self.recurrent = random.Random(seed).random() < 0.5
        self.begun_from = 0
        """Turns that began from a snapshot."""
        self.slow_ways: dict[str, list[Slow]] = defaultdict(list)
        self.now = 100.0
        chosen = Anywhere(self.pick) if policy == "anywhere" else make_policy(policy, 0.3)
        self.scheduler = Scheduler(chosen, PAGE, 6, 100)
        self.scheduler.notes = True
        self.pages = self.pick.choice([17, 24, 40]) + self.recurrent * Slots.pages
        for name in self.pick.choice(TOPOLOGIES):
            self.start(name, 1)

    def start(self, name: str, epoch: int) -> None:
        address = f"{name}.{epoch}"
        self.alive[address] = self.worker(name, epoch)
        memory = self.memories[address]
        pool = memory.info("L")
        role = Role.PREFILLER if name.startswith("p") else Role.DECODER
        peer = Peer(name, epoch, address, pool, role)
        self.carry_out(self.scheduler.worker_up(peer, now=self.now))

    def worker(self, name: str, epoch: int) -> Worker:
        pages, address = self.pages, f"{name}.{epoch}"
        snapshot = Slots.pages if self.recurrent else 0
        memory = KVMemory(PageShape(1, PAGE, 1, 1, torch.int64), pages, torch.device("cpu"), snapshot)
        order = self.pick.choice(["expected", "lru"])
        swap = self.pick.choice([6, 60])
        host = HostPool(SwapSpace(memory, swap), make_order(order)) if self.pick.random() < 0.5 else None
        pool, slots = PagePool(pages, make_order(order), on_evict=host and host.store), Slots(memory)
        engine = Engine(
            Model(memory, slots if self.recurrent else None),
            pool,
            host=host,
            snapshots=Snapshots(slots, pool, host, PAGE) if self.recurrent else None,
            page_tokens=PAGE,
            max_num_batched_tokens=self.pick.choice([3, 7, 12]),
            max_num_seqs=6,
            max_model_len=LONGEST,
            pace=Whim(self.pick) if self.pick.random() < 0.5 else None,
            overlap=self.pick.random() < 0.5,
            clock=lambda: self.now,
            draft_rows=12 if self.pick.random() < 0.5 and not self.recurrent else 0,
        )
        outboxes = SimpleNamespace(
            send=lambda to, body: self.send(address, to, Envelope(name, epoch, body)), forget=lambda address: None
        )

        def way(peer: Peer) -> Transfer | None:
            if self.slow:
                return Slow(self, memory, (address, peer.address))
            return connect(memory, memory.info("L"), NO_DOOR, peer, "mapped")

        handoffs = Handoffs(engine, memory.shape.bytes, "L", 30.0, outboxes.send, way, engine.clock)
        made = Worker(name, engine, handoffs, outboxes, "frontend", layout="L", vocab_size=VOCAB, clock=engine.clock)
        self.memories[address] = memory
        return made

    def send(self, sender: str, to: str, envelope: Envelope) -> None:
        if to == "frontend" or to in self.alive:
            self.wires[sender, to].append(decode(msgspec.msgpack.encode(envelope)))

    # --- what can happen ---

    def submit(self) -> None:
        """A new prompt, one that shares a beginning with others, or the next turn of a conversation."""
        pick, turn = self.pick, f"t{len(self.wanted)}"
        fresh = [pick.randrange(30, VOCAB) for _ in range(pick.randint(1, 25))]
        if self.prompts and pick.random() < 0.4:
            before = pick.choice(list(self.prompts))
            tokens = (self.prompts[before] + self.got[before])[: LONGEST - 5] + fresh[:4]
        else:
            tokens = [100] * pick.choice([0, 0, 8, 16]) + fresh
        seed = len(self.wanted)
        params = SamplingParams(
            temperature=0, max_tokens=pick.choice([1, 2, 5, 12, 30]), ignore_eos=pick.random() < 0.5
        )
        answer = Sequence(turn, tokens, params, seed, b"")
        while not answer.finish:
            answer.extend([next_token(answer.tokens, seed)], EOS, LONGEST)
        self.prompts[turn], self.wanted[turn] = tokens, answer.tokens[len(tokens) :]
        self.carry_out(self.scheduler.submit(turn, tokens, params, seed, pick.choice(["", "", "c"]), "", self.now))

    def cancel(self) -> None:
        if running := [turn for turn in self.wanted if turn not in self.ends]:
            turn = self.pick.choice(running)
            self.ends[turn] = "abort"
            self.carry_out(self.scheduler.cancel(turn, self.now))

    def step(self, name: str, until: int = 3) -> None:
        """One round of a worker's loop, or the part of it before it dies."""
        worker = self.alive[name]
        for copy in [copy for way in self.slow_ways[name] for copy in way.writing]:
            if self.pick.random() < 0.3:
                copy.write()
        for _ in range(self.pick.choice([0, 1, 2, 5, 100])):
            waiting = [wire for (_, to), wire in self.wires.items() if to == name and wire]
            if not waiting:
                break
            worker._handle(self.pick.choice(waiting).popleft())
        if until > 0:
            worker._admit()
        if until > 1:
            if any(self.kills(sequence) for sequence in worker.engine.running):
                self.killed += 1
                self.kill(name)
                return
            worker._step()
        if until > 2:
            worker._report(0.0)
        check_pool(worker.engine.pool)
        if worker.engine.host:
            check_pool(worker.engine.host)

    def listen(self) -> None:
        """The frontend hears one message."""
        waiting = [key for key, wire in self.wires.items() if key[1] == "frontend" and wire]
        if waiting:
            envelope = self.wires[self.pick.choice(waiting)].popleft()
            assert isinstance(envelope.body, Report)
            if f"{envelope.sender}.{envelope.epoch}" in self.served:
                self.carry_out(self.scheduler.on_report(envelope.sender, envelope.body, self.now))

    def die(self) -> None:
        """A worker dies somewhere in its loop; of what it has just sent some is lost."""
        if not self.deaths or not self.alive:
            return
        self.deaths -= 1
        name = self.pick.choice(list(self.alive))
        self.step(name, until=self.pick.randint(0, 3))
        self.kill(name)

    def kills(self, sequence: Sequence) -> bool:
        index = self.deadly.get(sequence.turn.rpartition(".")[0])
        return sequence.state is State.RUNNING and index is not None and sequence.num_outputs >= index

    def kill(self, name: str) -> None:
        if self.alive.pop(name, None) is None:
            return
        self.unnoticed.append(name)
        for (sender, to), wire in self.wires.items():
            if sender == name:
                for _ in range(min(len(wire), self.pick.choice([0, 0, 1, 2, 100]))):
                    wire.pop()
            if to == name:
                wire.clear()

    def notice(self) -> None:
        if self.unnoticed:
            name, epoch = self.unnoticed.pop(0).split(".")
            self.absent.append((name, int(epoch) + 1))
            self.carry_out(self.scheduler.worker_down(name, returns=True, now=self.now))

    def retire(self) -> None:
        """A worker is to go; it is never ended here, and returns to the others if it dies."""
        names = [name for name in self.scheduler.workers if name not in self.scheduler.cluster.retired]
        if names and self.pick.random() < 0.5:
            with suppress(NoDecoder):
                self.carry_out(self.scheduler.retire(self.pick.choice(names), self.now))

    def come_back(self) -> None:
        if self.absent:
            self.start(*self.absent.pop(self.pick.randrange(len(self.absent))))

    @property
    def served(self) -> set[str]:
        """Incarnations that the scheduler knows: those alive, and those whose death it has not noticed."""
        return {*self.alive, *self.unnoticed}

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Note):
                self.moved += bool(command.record.get("history_at"))
                continue
            if isinstance(command, Send):
                for address in self.alive:
                    if address.startswith(f"{command.worker}."):
                        self.send("frontend", address, Envelope("frontend", 0, command.message))
                continue
            turn, output = command.turn, command.output
            assert turn not in self.ends, "nothing comes after the end"
            if isinstance(output, Failed):
                self.ends[turn] = "error"
                continue
            assert output.index == len(self.got[turn]), "no token is repeated or skipped"
            self.got[turn] += output.tokens
            if isinstance(output, Ended):
                self.ends[turn] = output.finish

    # --- the whole of it ---

    def run(self) -> None:
        for _ in range(150):
            what = self.pick.random()
            self.now += self.pick.choice([0.0, 0.01, 0.1, 1.0, 10.0])
            if what < 0.12:
                self.submit()
            elif what < 0.15:
                self.cancel()
            elif what < 0.17:
                self.die()
            elif what < 0.20:
                self.notice()
            elif what < 0.22:
                self.come_back()
            elif what < 0.23:
                self.retire()
            elif what < 0.5:
                self.listen()
            elif self.alive:
                self.step(self.pick.choice(list(self.alive)))
        for _ in range(600):
            while self.unnoticed:
                self.notice()
            while self.absent:
                self.come_back()
            self.now += 0.5
            self.carry_out(self.scheduler.on_tick(self.now))
            for name in list(self.alive):
                self.step(name)
            for _ in range(20):
                self.listen()
            if self.wanted.keys() <= self.ends.keys():
                break
        # Publications, aborts and releases are under way, and pages: a publication may take 20 polls to be stored.
        for _ in range(200):
            if not any(self.wires.values()) and all(self.at_rest(worker) for worker in self.alive.values()):
                break
            for name in list(self.alive):
                self.step(name)
            for _ in range(20):
                self.listen()

    @staticmethod
    def at_rest(worker: Worker) -> bool:
        handoffs = worker.handoffs
        return not worker.engine.has_work and not handoffs.sender.leases and not handoffs.receiver.pulls

    def check(self, deaths: int) -> None:
        for turn, wanted in self.wanted.items():
            assert turn in self.ends, f"{turn} hangs: {self.scheduler.turns[turn]}"
            if self.ends[turn] in ("abort", "error"):
                assert self.ends[turn] == "abort" or deaths > TRIED_AFTER or turn in self.deadly
                assert self.got[turn] == wanted[: len(self.got[turn])]
            else:
                assert self.got[turn] == wanted
        for name, worker in self.alive.items():
            engine, handoffs = worker.engine, worker.handoffs
            if engine.snapshots is not None:
                assert sorted(engine.snapshots._free) == list(range(Slots.slots))
                self.begun_from += engine.snapshots.used
            assert (engine.pool.num_held, engine.running, list(engine.waiting)) == (0, [], []), name
            assert (handoffs.sender.leases, handoffs.receiver.pulls, worker._early) == ({}, {}, []), name
        for view in self.scheduler.workers.values():
            assert (view.reserved, view.turns) == (0, 0)
            at_home = [c for c in self.scheduler.conversations if c.home == view.name]
            assert view.resident == sum(c.resident for c in at_home)
            assert view.wanted == pytest.approx(sum(c.wanted for c in at_home), abs=1e-6)
        assert not self.scheduler.turns
        assert not self.scheduler.queued
        assert not self.scheduler._moves
        for name in self.scheduler.cluster.retired:
            assert self.scheduler.retired(name)
            assert not [c for c in self.scheduler.conversations if c.home == name]
        self.scheduler.on_tick(self.now + 1e6)
        assert all(view.wanted == pytest.approx(0, abs=1e-6) for view in self.scheduler.workers.values())


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


WORLDS = [*(name for name in POLICIES if name not in ("threshold", "ppd", "affinity")), "anywhere"]
"""Policies that do with messages what no other one of these does."""
CASES = often(WORLDS, "observe", "conserve", "anywhere")


@pytest.mark.parametrize("policy", CASES)
@given(seed=st.integers(0, 2**32), deaths=st.integers(0, 3))
@example(seed=535, deaths=0)  # under ampd, copies that take long after the last turn has ended
@example(seed=85, deaths=0)  # the same under anywhere
@settings(max_examples=40)
def test_every_turn_ends_with_its_text_and_nothing_is_held(policy: str, seed: int, deaths: int) -> None:
    world = World(seed, deaths, policy)
    world.run()
    world.check(deaths)


@pytest.mark.parametrize("policy", CASES)
@given(seed=st.integers(0, 2**32), turn=st.integers(0, 8), index=st.sampled_from([0, 1, 4]))
@example(seed=5289, turn=6, index=1)  # stopped elsewhere, it kills the decoder that another one is tried on next
@settings(max_examples=20)
def test_a_turn_that_workers_die_of_takes_no_other_with_it(policy: str, seed: int, turn: int, index: int) -> None:
    world = World(seed, 0, policy, {f"t{turn}": index})
    world.run()
    world.check(0)
    assert world.killed <= 8
