"""Workers on several hosts: the same text, whatever dies and whichever cable is cut, and nothing for strangers."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from miniserve.cluster.channels import Keys, Outboxes
from miniserve.cluster.messages import Abort, Failed, Run
from miniserve.config import EngineConfig, Role, ServeConfig, Topology
from miniserve.dispatcher import Dispatcher
from miniserve.hub.resolve import resolve
from miniserve.kv.transfer.door import Door, TransferError
from miniserve.sampling_params import SamplingParams
from tests.support.hosts import Hosts, possible
from tests.support.tiny import prompts, reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="needs root for network namespaces, and Ray"),
    pytest.mark.timeout(300),
]
TOKENS = 200


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    made = Hosts(3)
    try:
        for n in range(3):
            made.start_ray(n, cpus=2)
        made.enter(0)
        yield made
    finally:
        made.leave()
        made.remove()


def greedy(tokens: int = TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


@asynccontextmanager
async def cluster(
    hosts: Hosts, folder: Path, topology: str = "1P2D", placement: str = "STRICT_SPREAD", **engine: object
) -> AsyncIterator[Dispatcher]:
    """A running `Dispatcher`, checked for leaks at the end."""
    engine = {"max_num_batched_tokens": 32, "threads": 1, "kv_cache_memory": 2**23, "dtype": "float32", **engine}
    config = ServeConfig(
        engine=EngineConfig(model=str(folder), **engine),
        topology=Topology.parse(topology),
        policy="conserve",
        launcher="ray",
        ray_address=f"{hosts.address(0)}:6379",
        placement=placement,
    )
    client = Dispatcher(config, resolve(str(folder)))
    await client.start()
    try:
        yield client
        async with asyncio.timeout(20):
            while any(stats.held_pages or stats.leases for stats in client.scheduler.stats.values()):
                await asyncio.sleep(0.1)
        for stats in client.scheduler.stats.values():
            assert stats.free_pages + stats.cached_pages == stats.total_pages
    finally:
        await client.stop()


async def collect(client: Dispatcher, tokens: list[int], params: SamplingParams) -> list[int]:
    """The text of a turn, whose outputs neither repeat nor skip one."""
    text: list[int] = []
    async for output in client.submit(tokens, params):
        assert not isinstance(output, Failed), output.error
        assert output.index == len(text)
        text += output.tokens
    return text


def at(client: Dispatcher, name: str) -> int:
    """The number of the host on which a worker is."""
    return int(client.ready[name].far.rpartition(":")[0].rpartition(".")[2]) - 1


async def served_again(client: Dispatcher, names: set[str], seconds: float = 60.0) -> float:
    """Until workers of these names serve; how long that took."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while client.scheduler.workers.keys() != names:
            await asyncio.sleep(0.05)
    return time.monotonic() - began


async def test_text_is_the_same_on_three_hosts(hosts: Hosts, tiny_folder: Path, hybrid_folder: Path) -> None:
    """A handoff goes from host to host, pages and the recurrent state of a hybrid model."""
    for folder in (tiny_folder, hybrid_folder):
        items = prompts(6, seed=2, shortest=50)
        texts = reference(folder, items, 24)
        async with cluster(hosts, folder) as client:
            assert {at(client, name) for name in client.ready} == {0, 1, 2}
            assert set(client.transfer.values()) == {"collective (sockets, between hosts)"}
            assert await asyncio.gather(*(collect(client, item, greedy(24)) for item in items)) == texts
            assert sum(link.pages for link in client.scheduler.links.values()) > 0


@pytest.mark.long
async def test_delay_and_loss_change_nothing(hosts: Hosts, tiny_folder: Path) -> None:
    items = prompts(4, seed=3, shortest=60)
    texts = reference(tiny_folder, items, 24)
    with hosts.disturbed(1, 0.025, 0.02):
        async with cluster(hosts, tiny_folder) as client:
            assert await asyncio.gather(*(collect(client, item, greedy(24)) for item in items)) == texts
            slow = [link for pair, link in client.scheduler.links.items() if 1 in {at(client, name) for name in pair}]
            assert any(link.count for link in slow)
            assert all(0.04 < link.exposed.value < 5.0 for link in slow if link.count), "the round trip is in it"


KILLS: dict[str, Callable[[Hosts, int], None]] = {
    "worker": lambda hosts, n: [  # type: ignore[func-returns-value]
        os.kill(pid, signal.SIGKILL)
        for pid in hosts.pids(n)
        if b"WorkerActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ],
    "cable": lambda hosts, n: hosts.cut(n),
}


@pytest.mark.long
@pytest.mark.parametrize("phase", ["handoff", "decode"])
@pytest.mark.parametrize("what", ["worker", "cable"])
async def test_a_host_is_lost(hosts: Hosts, tiny_folder: Path, what: str, phase: str) -> None:
    """Whoever is lost in whatever phase of several turns at once: each goes on where the client has left off."""
    items = prompts(8, seed=4, shortest=100, longest=160)
    texts = reference(tiny_folder, items, TOKENS)
    async with cluster(hosts, tiny_folder) as client:
        names = set(client.ready)
        for victim in ("d0", "p0") if phase == "handoff" else ("d1",):
            if at(client, victim) == 0:
                victim = next(name for name in sorted(names - {victim}) if at(client, name))
            lost, epoch = at(client, victim), client.scheduler.workers[victim].epoch
            turns = [asyncio.create_task(collect(client, item, greedy())) for item in items]
            if phase == "decode":
                async with asyncio.timeout(20):
                    while sum(turn.delivered > 20 for turn in client.scheduler.turns.values()) < 4:
                        await asyncio.sleep(0.001)
            else:
                await asyncio.sleep(random.uniform(0.0, 0.02))
            began = time.monotonic()
            KILLS[what](hosts, lost)
            assert await asyncio.gather(*turns) == texts
            served = time.monotonic() - began
            async with asyncio.timeout(20):  # until it counts as dead, whether or not a turn needed it
                while getattr(client.scheduler.workers.get(victim), "epoch", 0) == epoch:
                    await asyncio.sleep(0.05)
            if what == "cable":
                hosts.cut(lost, mend=True)
            await served_again(client, names)
            print(
                f"{what} of {victim} in {phase}: turns after {served:.1f} s, all there after", time.monotonic() - began
            )
            assert client.scheduler.workers[victim].epoch > epoch
            assert served < 15


@pytest.mark.long
async def test_two_workers_that_do_not_reach_each_other(hosts: Hosts, tiny_folder: Path) -> None:
    """Each decoder prefills for itself what the prefiller cannot hand over."""
    items = prompts(4, seed=5, shortest=60)
    texts = reference(tiny_folder, items, 24)
    async with cluster(hosts, tiny_folder) as client:
        p, d = at(client, "p0"), at(client, "d0")
        hosts.part(p, d)
        try:
            began = time.monotonic()
            assert await asyncio.gather(*(collect(client, item, greedy(24)) for item in items)) == texts
            assert time.monotonic() - began < 20
        finally:
            hosts.part(p, d, mend=True)


@pytest.mark.long
async def test_a_lost_raylet_comes_back_elsewhere(hosts: Hosts, tiny_folder: Path) -> None:
    items = prompts(6, seed=6, shortest=60)
    texts = reference(tiny_folder, items, TOKENS)
    async with cluster(hosts, tiny_folder, "2D", "SPREAD") as client:
        victim = next(name for name in client.ready if at(client, name))
        lost = at(client, victim)
        turns = [asyncio.create_task(collect(client, item, greedy())) for item in items]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        hosts.kill_raylet(lost)
        assert await asyncio.gather(*turns) == texts
        served = time.monotonic() - began
        async with asyncio.timeout(60):
            while getattr(client.scheduler.workers.get(victim), "epoch", 1) == 1:
                await asyncio.sleep(0.1)
        print(f"raylet of {victim}: turns after {served:.1f} s, all there after {time.monotonic() - began:.1f} s")
        assert at(client, victim) != lost
    hosts.start_ray(lost, cpus=2)


@pytest.mark.long
async def test_workers_of_two_ranks_come_and_go(hosts: Hosts, tiny_folder: Path) -> None:
    """A handoff between hosts is rank to rank. A worker that is added has a bundle of its own; the conversation of one
    that goes moves to another host."""
    items = prompts(3, seed=8, shortest=60)
    texts = reference(tiny_folder, items, 24)
    async with cluster(hosts, tiny_folder, "1P1D", tensor_parallel_size=2) as client:
        assert await asyncio.gather(*(collect(client, item, greedy(24)) for item in items)) == texts
        assert client.scheduler.links["p0", "d0"].pages > 0
        name = await client.add_worker(Role.DECODER)
        assert len({at(client, each) for each in ("p0", "d0", name)}) == 3
        await client.remove_worker("d0")
        assert client.scheduler.links["d0", name].pages > 0
        assert await asyncio.gather(*(collect(client, item, greedy(24)) for item in items)) == texts


@pytest.mark.long
async def test_a_stranger_gets_nothing(hosts: Hosts, tiny_folder: Path) -> None:
    """Random bytes, other keys, and half of a greeting at every port: no answer that says anything, nothing changes."""
    item = prompts(1, seed=7, shortest=100, longest=100)[0]
    (text,) = reference(tiny_folder, [item], TOKENS)
    async with cluster(hosts, tiny_folder) as client:
        turn = asyncio.create_task(collect(client, item, greedy()))
        inboxes = [ready.far for ready in client.ready.values()] + [client.workers._inbox.far]
        doors = [ready.pool.door for ready in client.ready.values()]
        await asyncio.to_thread(knock, inboxes, doors)
        assert await turn == text
        assert await collect(client, item, greedy()) == text
        assert not client.workers.failed


def knock(inboxes: list[str], doors: list[str]) -> None:
    places = [(host.strip("[]"), int(port)) for host, _, port in (at[6:].rpartition(":") for at in inboxes)]
    places += [(host, int(port)) for host, port in map(str.split, doors)]
    for place in places:
        for data in (
            b"",
            random.randbytes(9),
            random.randbytes(5000),
            b"\xff" + bytes(8) + b"\x7f\x03NULL" + bytes(48),
        ):
            with socket.create_connection(place, 2) as channel:
                channel.sendall(data)
                channel.settimeout(0.2)
                try:
                    heard = channel.recv(4096)
                except (TimeoutError, ConnectionError):
                    heard = b""
                assert len(heard) in (0, 10, 11, 12, 32, 64), "a greeting of ZeroMQ, or a door's random number"
    stranger = Outboxes(zmq.Context.instance(), "frontend", 0, Keys.make())
    for address in inboxes:
        stranger.send(address, Abort("turn"))
        stranger.send(address, Run("x", [1] * 8, SamplingParams(), 0))
    time.sleep(0.5)
    stranger.close()
    for number, place in enumerate(doors):
        host, port = place.split()
        door = Door(("d9", number), "/tmp", b"another key")
        try:
            with pytest.raises((OSError, TransferError)):
                door.call(_at(host, port))
        finally:
            door.close()
            os.unlink(f"/tmp/pages-d9.{number}")


def _at(host: str, port: str):
    from miniserve.cluster.messages import Peer, PoolInfo

    return Peer("d0", 1, "", PoolInfo(1, -1, 8, 64, "", host="elsewhere", door=f"{host} {port}"))
