"""Conversations find on disk what workers had of them: after a restart of the server, of a worker, and elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from miniserve.cluster.messages import FirstToken
from tests.e2e.test_cluster import back, cluster, greedy, long, settled
from tests.support.tiny import prompts, reference

pytestmark = pytest.mark.slow

TOKENS = 24


async def written(client) -> int:
    """Pages on disk, once that number does not grow any more."""
    pages, before = 0, -1
    async with asyncio.timeout(20):
        while not pages or pages != before:
            before = pages
            await asyncio.sleep(1.3)  # reports of idle workers come once a second
            pages = sum(stats.saved for stats in client.scheduler.stats.values())
    return pages


async def turns(client, folder, histories, cached=None) -> None:
    """The next turn of each conversation; `cached` gets what was found of it. Texts are those of `transformers`."""

    async def one(name: int, history: list[int]) -> list[int]:
        answer: list[int] = []
        async for output in client.submit(history, greedy(TOKENS), conversation=f"c{name}"):
            if cached is not None and isinstance(output, FirstToken):
                cached[name] = output.cached_tokens
            answer += output.tokens
        return answer

    answers = await asyncio.gather(*(one(i, history) for i, history in enumerate(histories)))
    assert answers == reference(folder, histories, TOKENS)
    for i, answer in enumerate(answers):
        histories[i] += [*answer, 5, 6, i]


@pytest.mark.parametrize(
    ("topology", "policy"),
    [("1P2D", "observe"), long("2D", "colocated"), long("1P1D", "conserve")],
)
async def test_a_restart_of_the_server_loses_nothing_that_was_on_disk(tiny_models, tmp_path, topology, policy):
    folder, histories = tiny_models["qwen3"], prompts(6, seed=3, shortest=60, longest=200)
    memory = {"swap_space": 2**22, "kv_disk": str(tmp_path), "kv_disk_size": 2**26}
    async with cluster(folder, topology, policy, **memory) as client:
        await turns(client, folder, histories)
        await turns(client, folder, histories)
        assert await written(client) >= sum((len(history) - 4) // 16 for history in histories)
        await settled(client)
    cached: dict[int, int] = {}
    known = [(len(history) - 4) // 16 * 16 for history in histories]
    async with cluster(folder, topology, policy, **memory) as client:
        await turns(client, folder, histories, cached)
        assert [cached[i] for i in range(6)] == known
        await settled(client)
        # A worker that is gone leaves its conversations to the others, with what it had written.
        await written(client)
        known = [(len(history) - 4) // 16 * 16 for history in histories]
        os.kill(client.workers.processes["d0"].pid, signal.SIGKILL)
        await back(client, ("d0", 2))
        await turns(client, folder, histories, cached)
        assert [cached[i] for i in range(6)] == known
        await settled(client)
