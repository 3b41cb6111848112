"""Real worker processes: the same text on every topology and policy, and every page accounted for."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from miniserve.cluster.channels import Keys, Outboxes
from miniserve.cluster.launch import StartupError
from miniserve.cluster.messages import Failed, FirstToken, StartFailed
from miniserve.config import EngineConfig, ServeConfig, Topology
from miniserve.dispatcher import Dispatcher, EngineError
from miniserve.hub.resolve import resolve
from miniserve.sampling_params import ParameterError, SamplingParams
from miniserve.scheduler.scheduler import QueueFull
from tests.support.tiny import prompts, reference

pytestmark = pytest.mark.slow

TOKENS = 64


def long(*values):
    """A case like its neighbours, which CI leaves out."""
    return pytest.param(*values, marks=pytest.mark.long)


def greedy(max_tokens: int = TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@asynccontextmanager
async def cluster(
    folder: Path, topology: str, policy: str = "conserve", queue: int = 1024, timeout: float = 120.0, **engine
):
    """A running `Dispatcher`, checked for leaks at the end."""
    engine = {"max_num_batched_tokens": 48, "threads": 1, "kv_cache_memory": 2**23, **engine}
    config = ServeConfig(
        engine=EngineConfig(model=str(folder), **engine),
        topology=Topology.parse(topology),
        policy=policy,
        max_num_queued_reqs=queue,
        worker_timeout=timeout,
    )
    client = Dispatcher(config, resolve(str(folder)))
    await client.start()
    pids = [process.pid for process in client.workers.processes.values()]
    run_dir = client.workers.run_dir.path
    try:
        yield client
    finally:
        await client.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not run_dir.exists()


async def collect(client: Dispatcher, tokens: list[int], params: SamplingParams, **kwargs) -> list[int]:
    out: list[int] = []
    async for output in client.submit(tokens, params, **kwargs):
        assert not isinstance(output, Failed), output.error
        if output.tokens:
            assert output.index == len(out)
        out += output.tokens
    return out


async def settled(client: Dispatcher) -> None:
    """Wait until every worker reports that nothing is held; fails if pages leak."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        await asyncio.sleep(0.2)
        if len(client.scheduler.stats) == len(client.scheduler.workers) and all(
            s.held_pages == 0 and s.leases == 0 and s.running == s.waiting == 0 for s in client.scheduler.stats.values()
        ):
            break
    for name, s in client.scheduler.stats.items():
        assert (s.held_pages, s.leases, s.running, s.waiting) == (0, 0, 0, 0), (name, s)
        assert s.free_pages + s.cached_pages == s.total_pages
    assert len(client.scheduler.turns) == client.scheduler.queued == 0
    assert all(w.reserved == 0 and w.turns == 0 for w in client.scheduler.workers.values())


@pytest.fixture(scope="session")
def models(tiny_models, newer_models):
    return tiny_models | newer_models


@pytest.mark.parametrize(
    ("arch", "topology", "policy", "transfer"),
    [
        ("qwen2", "1D", "colocated", "mapped"),
        ("llama3", "2D", "observe", "mapped"),
        long("qwen3", "1P1D", "disaggregated", "collective"),
        ("mistral", "1P2D", "observe", "collective"),
        long("mistral", "1P2D", "conserve", "collective"),
        ("llama", "2P2D", "ampd", "mapped"),
        long("qwen3_5", "1D", "colocated", "mapped"),
        ("qwen3_5_moe", "1P1D", "disaggregated", "collective"),
        ("qwen3_next", "1P2D", "conserve", "mapped"),
        ("qwen3_5", "2P2D", "ampd", "mapped"),
        long("qwen3_moe", "2D", "observe", "mapped"),
        ("gemma3", "1P2D", "conserve", "collective"),
        long("mixtral", "1P1D", "observe", "mapped"),
    ],
)
async def test_parity(models, arch, topology, policy, transfer):
    items = prompts(12, seed=1, longest=200)
    texts = reference(models[arch], items, TOKENS)
    async with cluster(models[arch], topology, policy, kv_transfer=transfer) as client:
        assert await collect(client, items[0], greedy()) == texts[0]
        together = await asyncio.gather(*(collect(client, item, greedy()) for item in items))
        assert together == texts
        # Second turns: prompt, answer, more; from the home's KV.
        longer = [item + text + [5, 6, 7] for item, text in zip(items, texts, strict=True)]
        again = await asyncio.gather(*(collect(client, item, greedy(16)) for item in longer))
        assert again == reference(models[arch], longer, 16)
        moved = sum(h.count for h in client.scheduler.links.values())
        if policy in ("colocated", "conserve", "disaggregated"):
            turns = {"colocated": 0, "conserve": len(items) + 1, "disaggregated": 2 * len(items) + 1}
            assert moved == turns[policy]
        await settled(client)
        found = sum(stats.prefix_hits for stats in client.scheduler.stats.values())
        assert found >= sum(len(item) // 16 * 16 for item in items), "second turns find the first ones, and that counts"


async def test_conversation_moves_once(tiny_models):
    """Turn 1 is prefilled on P and its KV moves; turns 2 to 5 stay on D and find what was there before."""
    folder = tiny_models["llama"]
    async with cluster(folder, "1P1D") as client:
        history, known = prompts(1, seed=3, shortest=100, longest=100)[0], 0
        for turn in range(5):
            cached = None
            out: list[int] = []
            async for output in client.submit(history, greedy(10)):
                cached = output.cached_tokens if isinstance(output, FirstToken) else cached
                out += output.tokens
            assert out == reference(folder, [history], 10)[0]
            assert cached == known // 16 * 16
            known = len(history) + 10 - 1  # the last token's KV is computed when the next one is
            history = history + out + [turn, turn + 1]
        assert client.scheduler.placements == {("p0", "d0"): 1, ("d0", "d0"): 4}
        moved = client.scheduler.links["p0", "d0"]
        page_bytes = client.ready["d0"].pool.page_bytes
        assert (moved.count, moved.pages, moved.bytes) == (1, 7, 7 * page_bytes)
        await settled(client)


@pytest.mark.parametrize("topology", ["1D", "1P2D"])
async def test_many_streams_a_third_aborted(tiny_models, topology):
    folder = tiny_models["llama"]
    pick = random.Random(7)
    items = prompts(64, seed=4, longest=180)
    lengths = [pick.randrange(1, 60) for _ in items]
    texts = reference(folder, items, 60)
    async with cluster(folder, topology, kv_cache_memory=2**21) as client:

        async def run(i: int) -> None:
            stop_at = pick.randrange(lengths[i]) if i % 3 == 0 else None
            turn = client.submit(items[i], greedy(lengths[i]))
            out: list[int] = []
            if stop_at == 0:
                await asyncio.sleep(pick.random() * 0.3)
                turn.cancel()
            async for output in turn:
                out += output.tokens
                if stop_at is not None and len(out) >= stop_at:
                    turn.cancel()
            assert out == texts[i][: len(out)]
            assert output.finish == ("length" if len(out) == lengths[i] else "abort")
            if stop_at is None:
                assert len(out) == lengths[i]

        await asyncio.gather(*(run(i) for i in range(64)))
        await settled(client)


@pytest.mark.parametrize(
    ("arch", "seconds"),
    [("llama3", 0.25), long("qwen3_5", 0.05), ("qwen3_5", 0.15), long("qwen3_5", 0.3), long("qwen3_5", 0.6)],
)
async def test_losing_the_prefiller_in_mid_flight(models, arch, seconds):
    """D prefills itself; no token is repeated or skipped."""
    folder = models[arch]
    items = prompts(10, seed=5, shortest=150, longest=300)
    texts = reference(folder, items, 32)
    async with cluster(folder, "1P1D", max_num_batched_tokens=16) as client:
        tasks = [asyncio.create_task(collect(client, item, greedy(32))) for item in items]
        await asyncio.sleep(seconds)
        os.kill(client.workers.processes["p0"].pid, signal.SIGKILL)
        assert await asyncio.gather(*tasks) == texts
        assert not client.unhealthy_reason
        assert await collect(client, items[0], greedy(32)) == texts[0]
        await settled(client)


@pytest.mark.parametrize(("arch", "seconds"), [("qwen2", 0.3), long("qwen3_5_moe", 0.1), long("qwen3_5_moe", 0.5)])
async def test_losing_a_decoder_in_mid_flight(models, arch, seconds):
    """Its conversations go on at the other one, from their tokens."""
    folder = models[arch]
    items = prompts(12, seed=6, longest=200)
    texts = reference(folder, items, TOKENS)
    async with cluster(folder, "1P2D") as client:
        tasks = [asyncio.create_task(collect(client, item, greedy())) for item in items]
        await asyncio.sleep(seconds)
        os.kill(client.workers.processes["d1"].pid, signal.SIGKILL)
        assert await asyncio.gather(*tasks) == texts
        assert not client.unhealthy_reason
        await settled(client)


async def test_a_worker_that_breaks_is_as_dead_as_a_killed_one(tiny_models):
    """It can still say why, with its last breath; its turns go on at the other one."""
    folder = tiny_models["qwen2"]
    items = prompts(6, seed=6, shortest=50)
    texts = reference(folder, items, 300)
    async with cluster(folder, "2D", "colocated") as client:
        tasks = [asyncio.create_task(collect(client, item, greedy(300))) for item in items]
        while not all((stats := client.scheduler.stats.get(name)) and stats.running for name in ("d0", "d1")):
            await asyncio.sleep(0.01)
        last_words = Outboxes(zmq.Context.instance(), "d0", 1, Keys.make())
        last_words.send(client.workers.processes["d0"].spec.frontend, StartFailed("ZeroDivisionError"))
        while "d0" not in client.workers.failed:
            await asyncio.sleep(0)
        os.kill(client.workers.processes["d0"].pid, signal.SIGKILL)
        await back(client, ("d0", 2))
        assert await asyncio.gather(*tasks) == texts
        assert not client.unhealthy_reason
        await settled(client)


async def test_parameters_that_slip_through_hurt_nobody_else(tiny_models):
    folder = tiny_models["qwen2"]
    item = prompts(1, seed=6, shortest=50)[0]
    async with cluster(folder, "1D", "colocated") as client:
        other = asyncio.create_task(collect(client, item, greedy(40)))
        bad = client.submit(item, SamplingParams(temperature=0, logit_bias={10**6: 1.0}))
        outputs = [output async for output in bad]
        assert isinstance(outputs[-1], Failed)
        assert "logit_bias" in outputs[-1].error
        assert await other == reference(folder, [item], 40)[0]
        await settled(client)


async def test_what_waited_for_a_step_does_not_wait_for_a_message(tiny_folder):
    """Equal prompts at once: the second waits for the first one's pages, and begins as soon as they are there."""
    async with cluster(tiny_folder, "1D", max_num_batched_tokens=512) as client:
        for seed in range(4):
            item = prompts(1, seed=seed, shortest=100, longest=100)[0]
            started = time.monotonic()
            await asyncio.gather(*(collect(client, item, greedy(1)) for _ in range(2)))
            assert time.monotonic() - started < 0.7, "an idle worker looks around once a second"


async def back(client: Dispatcher, *epochs: tuple[str, int]) -> None:
    """Wait until these incarnations serve."""
    async with asyncio.timeout(30):
        while not all((p := client.scheduler.workers.get(name)) and p.epoch == epoch for name, epoch in epochs):
            await asyncio.sleep(0.1)


async def test_losing_every_worker_once(tiny_models):
    """The only prefiller is killed, then the only decoder: all streams finish, and both workers come back."""
    folder = tiny_models["qwen3"]
    items = prompts(8, seed=12, shortest=100, longest=200)
    texts = reference(folder, items, 120)
    async with cluster(folder, "1P1D") as client:
        tasks = [asyncio.create_task(collect(client, item, greedy(120))) for item in items]
        await asyncio.sleep(0.2)
        os.kill(client.workers.processes["p0"].pid, signal.SIGKILL)
        await back(client, ("p0", 2))
        tasks.append(asyncio.create_task(collect(client, items[0], greedy(120))))
        await asyncio.sleep(0.1)
        os.kill(client.workers.processes["d0"].pid, signal.SIGKILL)
        while not client.unhealthy_reason:
            await asyncio.sleep(0.05)
        assert "is being started again" in client.unhealthy_reason
        late = asyncio.create_task(collect(client, items[1], greedy(120)))  # taken, and served when d0 is back
        await back(client, ("d0", 2))
        assert not client.unhealthy_reason
        assert await asyncio.gather(*tasks, late) == [*texts, texts[0], texts[1]]
        before = sum(h.count for h in client.scheduler.links.values())
        assert await collect(client, [*items[2], 1], greedy(8)) == reference(folder, [[*items[2], 1]], 8)[0]
        assert sum(h.count for h in client.scheduler.links.values()) == before + 1, "the new ones exchange pages"
        await settled(client)


DEADLY = """
import os, signal
from miniserve.worker.runner import ModelRunner

launch = ModelRunner.launch

def deadly(self, batch):
    if any(work.sequence.tokens[:3] == [7, 7, 7] and work.sequence.num_outputs >= {index} for work in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return launch(self, batch)

ModelRunner.launch = deadly
"""
"""What workers import before anything else: a prompt that begins with 7, 7, 7 kills them at an output token."""


@pytest.mark.parametrize(("topology", "policy", "index"), [("1D", "observe", 5), long("1P1D", "conserve", 0)])
async def test_a_request_that_kills_its_worker_each_time_fails_alone(
    tiny_models, tmp_path, monkeypatch, topology, policy, index
):
    (tmp_path / "sitecustomize.py").write_text(DEADLY.format(index=index))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tiny_models["qwen2"]
    items = prompts(5, seed=15, longest=100)
    texts = reference(folder, items, 200)
    async with cluster(folder, topology, policy) as client:
        tasks = [asyncio.create_task(collect(client, item, greedy(200))) for item in items[:3]]
        killer = client.submit([7, 7, 7, 8, 9], greedy(200))
        tasks += [asyncio.create_task(collect(client, item, greedy(200))) for item in items[3:]]
        outputs = [output async for output in killer]
        assert isinstance(outputs[-1], Failed)
        assert "3 workers died while they served this request" in outputs[-1].error
        assert sum(len(output.tokens) for output in outputs[:-1]) == index
        assert await asyncio.gather(*tasks) == texts
        assert await collect(client, items[0], greedy(20)) == texts[0][:20]
        await settled(client)


async def test_a_replacement_gets_the_pool_that_was_there(tiny_models):
    """What is free when it starts is what the living have left, not what there was for all of them."""
    async with cluster(tiny_models["qwen3"], "1D", kv_cache_memory=None) as client:
        first = client.ready["d0"].pool
        os.kill(client.workers.processes["d0"].pid, signal.SIGKILL)
        await back(client, ("d0", 2))
        assert client.workers.processes["d0"].spec.engine.kv_cache_memory == first.num_pages * first.page_bytes
        assert client.ready["d0"].pool.num_pages == first.num_pages


async def test_a_worker_that_hangs_is_replaced(tiny_models):
    folder = tiny_models["llama3"]
    items = prompts(4, seed=13, shortest=60)
    texts = reference(folder, items, 100)
    async with cluster(folder, "1P1D", timeout=3.0) as client:
        tasks = [asyncio.create_task(collect(client, item, greedy(100))) for item in items]
        await asyncio.sleep(0.1)
        os.kill(client.workers.processes["p0"].pid, signal.SIGSTOP)
        assert await asyncio.gather(*tasks) == texts
        await back(client, ("p0", 2))
        await settled(client)


@pytest.mark.long
async def test_a_replacement_that_hangs_while_it_loads_is_replaced(tiny_models, monkeypatch):
    """The only decoder dies, and the next one gets stuck before it serves: its streams wait for the third."""
    monkeypatch.setattr("miniserve.cluster.health.SLOWER", 1.0)  # shorter for a test; loading again takes no longer
    folder = tiny_models["qwen2"]
    items = prompts(4, seed=14, shortest=60)
    texts = reference(folder, items, 100)
    async with cluster(folder, "1D", timeout=3.0) as client:
        tasks = [asyncio.create_task(collect(client, item, greedy(100))) for item in items]
        await asyncio.sleep(0.1)
        os.kill(client.workers.processes["d0"].pid, signal.SIGKILL)
        while client.workers.processes["d0"].spec.epoch == 1:
            await asyncio.sleep(0.05)
        os.kill(client.workers.processes["d0"].pid, signal.SIGSTOP)
        while client.workers.processes["d0"].spec.epoch == 2:
            await asyncio.sleep(0.05)
        monkeypatch.undo()  # the third one may take its time where other programs are busy too
        await back(client, ("d0", 3))
        assert await asyncio.gather(*tasks) == texts
        assert not client.unhealthy_reason
        await settled(client)


async def test_a_worker_that_dies_over_and_over_is_given_up(tiny_folder, monkeypatch):
    """Then requests end with an error that says so, and nothing hangs."""
    monkeypatch.setattr("miniserve.cluster.health.MOST_DEATHS", 2)
    async with cluster(tiny_folder, "1D") as client:
        os.kill(client.workers.processes["d0"].pid, signal.SIGKILL)
        await back(client, ("d0", 2))
        turn = client.submit([1, 2, 3], greedy(400))
        os.kill(client.workers.processes["d0"].pid, signal.SIGKILL)
        outputs = [output async for output in turn]
        assert isinstance(outputs[-1], Failed)
        assert "no decoder is left" in outputs[-1].error
        assert "restart the server (d0" in client.unhealthy_reason
        with pytest.raises(EngineError, match="restart the server"):
            client.submit([1, 2, 3], greedy())


async def test_queue_and_bounds(tiny_folder):
    async with cluster(tiny_folder, "1D", queue=2, max_num_seqs=1) as client:
        running = [client.submit([1, 2, 3], greedy(200)) for _ in range(3)]
        with pytest.raises(QueueFull) as full:
            client.check_room()
        assert full.value.retry_after >= 1
        with pytest.raises(ParameterError, match="maximum context length is 512"):
            client.submit([1] * 512, greedy())
        for turn in running:
            turn.cancel()
            turn.cancel()
        assert [o.finish async for o in running[2]] == ["abort"]
        assert len(await collect(client, [1] * 511, greedy())) == 1
        await settled(client)


async def test_startup_errors_name_the_fix(tiny_folder):
    with pytest.raises(StartupError, match=r"--max-model-len 256 or --kv-cache-memory"):
        async with cluster(tiny_folder, "2D", kv_cache_memory=16 * 16 * 1024):
            pass
    with pytest.raises(StartupError, match="made for"):
        async with cluster(tiny_folder, "1D", max_model_len=100_000):
            pass
