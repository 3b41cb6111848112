"""Workers of several processes: handoffs from rank to rank, and what happens when a rank dies or cannot start."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from miniserve.cluster.supervisor import StartupError
from tests.e2e.test_cluster import back, cluster, collect, greedy, settled
from tests.support.tiny import prompts, reference

pytestmark = pytest.mark.slow

TOKENS = 32


def children(pid: int) -> list[int]:
    """The processes that a worker has started."""
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def gone(pids: list[int]) -> None:
    """Ranks leave on their own when their pipe closes: that takes a moment."""
    async with asyncio.timeout(2):
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            await asyncio.sleep(0.01)


@pytest.fixture
def two(tiny_models, newer_models):
    """Settings of workers with two ranks."""
    return tiny_models | newer_models, {"tensor_parallel_size": 2, "dtype": "float32"}


@pytest.mark.parametrize(
    ("arch", "transfer", "swap"),
    [pytest.param("qwen3_5", "mapped", 2**22, marks=pytest.mark.long), ("qwen3_5_moe", "collective", 0)],
)
async def test_handoffs_go_from_rank_to_rank(two, arch, transfer, swap):
    models, settings = two
    items = prompts(8, seed=1, shortest=40, longest=200)
    texts = reference(models[arch], items, TOKENS)
    pool = {"kv_cache_memory": 2**19, "max_num_seqs": 2, "max_model_len": 300} if swap else {}
    async with cluster(models[arch], "1P1D", kv_transfer=transfer, swap_space=swap, **settings, **pool) as client:
        pids = [pid for worker in client.workers.processes.values() for pid in children(worker.pid)]
        assert len(pids) == 2
        assert await asyncio.gather(*(collect(client, item, greedy(TOKENS)) for item in items)) == texts
        longer = [item + text + [5, 6, 7] for item, text in zip(items, texts, strict=True)]
        again = await asyncio.gather(*(collect(client, item, greedy(8)) for item in longer))
        assert again == reference(models[arch], longer, 8)
        moved = client.scheduler.links["p0", "d0"]
        assert moved.count == len(items)
        assert moved.bytes == moved.pages * 2 * client.ready["d0"].pool.page_bytes
        await settled(client)
        if swap:
            assert sum(stats.restored for stats in client.scheduler.stats.values()) > 0
    await gone(pids)


async def test_a_worker_dies_with_its_rank(two):
    """And comes back; the turns go on where they were."""
    models, settings = two
    items = prompts(6, seed=6, longest=100)
    texts = reference(models["qwen3"], items, 200)
    async with cluster(models["qwen3"], "1D", "colocated", **settings) as client:
        tasks = [asyncio.create_task(collect(client, item, greedy(200))) for item in items]
        while not ((stats := client.scheduler.stats.get("d0")) and stats.running and stats.generated_tokens > 20):
            await asyncio.sleep(0.01)
        (rank,) = children(client.workers.processes["d0"].pid)
        os.kill(rank, signal.SIGKILL)
        while "d0" not in client.workers.failed:
            await asyncio.sleep(0.01)
        assert client.workers.failed["d0"] == "Rank 1 of the worker d0 ended with exit code -9."
        await back(client, ("d0", 2))
        assert await asyncio.gather(*tasks) == texts
        (rank,) = children(client.workers.processes["d0"].pid)
        os.kill(client.workers.processes["d0"].pid, signal.SIGKILL)  # the rank leaves with rank 0
        await back(client, ("d0", 3))
        await gone([rank])
        assert client.workers.run_dir.path.exists()
        assert await collect(client, items[0], greedy(20)) == texts[0][:20]
        await settled(client)


FAILING = """
import json, sys
from miniserve.config import ConfigError
from miniserve.worker import ranks

def fail(*args):
    raise ConfigError("This rank has no device.")

ranks.follow = fail
"""


async def test_a_rank_that_cannot_start_says_why(two, tmp_path, monkeypatch):
    models, settings = two
    (tmp_path / "sitecustomize.py").write_text(FAILING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(StartupError, match=r"^This rank has no device\.$"):
        async with cluster(models["llama"], "1D", **settings):
            pass


async def test_sizes_that_do_not_divide_are_said(two):
    models, settings = two
    with pytest.raises(StartupError, match=r"^--tensor-parallel-size 3 does not divide 4 heads.*: use 1, 2, 4\.$"):
        async with cluster(models["llama"], "1D", **settings | {"tensor_parallel_size": 3}):
            pass
