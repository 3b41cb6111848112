"""Workers come and go while turns run: no turn is lost, and conversations take their KV along."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from miniserve.config import Role
from miniserve.scheduler.scheduler import NoDecoder
from tests.e2e.test_cluster import cluster, greedy
from tests.support.tiny import prompts, reference

pytestmark = pytest.mark.slow


async def turn(client, tokens: list[int], key: str, count: int) -> tuple[list[int], int]:
    """The text, and how many tokens of the prompt were found."""
    text, cached = [], 0
    async for output in client.submit(tokens, greedy(count), conversation=key):
        text += getattr(output, "tokens", [])
        cached = getattr(output, "cached_tokens", cached)
    return text, cached


@pytest.mark.parametrize("model", ["tiny_folder", pytest.param("hybrid_folder", marks=pytest.mark.long)])
async def test_conversations_move_before_their_home_goes(request: pytest.FixtureRequest, model: str) -> None:
    folder: Path = request.getfixturevalue(model)
    items = prompts(4, seed=1, shortest=60)
    firsts = reference(folder, items, 40)
    more = [[*item, *first, 7, 8, 9] for item, first in zip(items, firsts, strict=True)]
    seconds = reference(folder, more, 20)
    async with cluster(folder, "2D", "observe") as client:
        for n, item in enumerate(items):
            assert await turn(client, item, f"c{n}", 40) == (firsts[n], 0)
        homes = {c.key: c.home for c in client.scheduler.conversations}
        goes = homes["c0"]
        await client.remove_worker(goes)
        assert list(client.scheduler.workers) == [name for name in ("d0", "d1") if name != goes]
        for n, prompt in enumerate(more):
            text, cached = await turn(client, prompt, f"c{n}", 20)
            assert text == seconds[n]
            assert cached >= (len(prompt) - 4) // 16 * 16 - (16 if model == "hybrid_folder" else 0), homes
        with pytest.raises(NoDecoder, match="last decoder"):
            await client.remove_worker(next(iter(client.scheduler.workers)))


async def test_turns_that_run_end_where_they_are_and_others_go_on(tiny_folder: Path) -> None:
    items = prompts(6, seed=2, shortest=40)
    texts = reference(tiny_folder, items, 150)
    async with cluster(tiny_folder, "1P1D", "conserve") as client:
        running = [asyncio.create_task(turn(client, item, f"c{n}", 150)) for n, item in enumerate(items[:3])]
        name = await client.add_worker(Role.DECODER)
        assert name == "d3"
        running += [asyncio.create_task(turn(client, item, f"c{n}", 150)) for n, item in enumerate(items[3:], 3)]
        await asyncio.sleep(0.05)
        await asyncio.gather(client.remove_worker("d0"), client.remove_worker("d0"), client.remove_worker("p0"))
        assert [text for text, _ in await asyncio.gather(*running)] == texts
        assert list(client.scheduler.workers) == [name]
        os.kill(client.workers.processes[name].pid, signal.SIGKILL)  # it is watched like those of the start
        assert (await turn(client, items[0], "again", 150))[0] == texts[0]


async def test_one_that_goes_may_die_on_the_way(tiny_folder: Path) -> None:
    items = prompts(6, seed=3, shortest=40)
    texts = reference(tiny_folder, items, 300)
    async with cluster(tiny_folder, "3D", "colocated") as client:
        running = [asyncio.create_task(turn(client, item, f"c{n}", 300)) for n, item in enumerate(items)]
        await asyncio.sleep(0.1)
        going = asyncio.create_task(client.remove_worker("d1"))
        await asyncio.sleep(0.02)
        os.kill(client.workers.processes["d1"].pid, signal.SIGKILL)
        assert [text for text, _ in await asyncio.gather(*running)] == texts
        await going
        assert set(client.scheduler.workers) == {"d0", "d2"}
        assert set(client.workers.processes) == {"d0", "d2"}


async def test_over_http(tiny_folder: Path) -> None:
    """Every answer of the two routes."""
    import httpx

    from miniserve.cli.serve import http_app
    from miniserve.config import EngineConfig, ServeConfig
    from miniserve.hub.resolve import resolve
    from miniserve.monitor.events import Feed

    async with cluster(tiny_folder, "1D", "observe") as client:
        config = ServeConfig(engine=EngineConfig(model=str(tiny_folder)), served_model_names=["m"], api_key="k")
        app = http_app(config, resolve(str(tiny_folder)), client, Feed(client.scheduler))
        headers = {"Authorization": "Bearer k"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://m", headers=headers, timeout=60) as http:
            last = await http.delete("/v1/workers/d0")
            assert last.status_code == 409
            assert last.json()["error"]["code"] == "last_decoder"
            wrong = await http.post("/v1/workers", json={"role": "dekoder"})
            assert wrong.status_code == 400
            assert "'decoder' or 'prefiller'" in wrong.json()["error"]["message"]
            added = await http.post("/v1/workers", json={"role": "prefiller"})
            assert added.status_code == 200
            name = added.json()["name"]
            assert [card["name"] for card in (await http.get("/v1/workers")).json()["data"]] == ["d0", name]
            gone = await http.delete(f"/v1/workers/{name}")
            assert gone.json() == {"id": name, "object": "worker.deleted", "deleted": True}
            missing = await http.delete(f"/v1/workers/{name}")
            assert missing.status_code == 404
            assert missing.json()["error"]["code"] == "worker_not_found"
            assert (await http.post("/v1/workers", json={}, headers={"Authorization": "no"})).status_code == 401
