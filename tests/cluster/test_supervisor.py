"""What the supervisor says of workers that end, by processes that are none."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miniserve.cluster import devices
from miniserve.cluster import supervisor as module
from miniserve.cluster.devices import one_more
from miniserve.cluster.launch import Launcher, StartupError, WorkerSpec
from miniserve.cluster.messages import Envelope, StartFailed
from miniserve.cluster.supervisor import Supervisor
from miniserve.config import EngineConfig, Role
from tests.support.fake_engine import READY


class Process:
    """A worker's process that does nothing, and ends when it is told to."""

    placed = True

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.ended: str | None = None

    def kill(self) -> None:
        self.ended = "ended with exit code -9"

    def stop(self, seconds: float) -> None:
        self.kill()


class Fake(Launcher):
    def start(self, spec: WorkerSpec, far: str) -> Process:
        return Process(spec)


def supervisor() -> Supervisor:
    """Of one worker, for an owner that does not care."""
    ignore = lambda *told: None  # noqa: E731
    return Supervisor(
        {"d0": EngineConfig(model="m")}, 60.0, Fake(), up=ignore, down=ignore, report=ignore, loading=ignore
    )


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """One worker that has served; it is started again at once when it ends."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(module, "WATCH_START_SECONDS", 0.01)
    made = supervisor()
    monkeypatch.setattr(made._health, "died", lambda name, now: 0.0)
    starting = asyncio.create_task(made.start())
    while not made.processes:
        await asyncio.sleep(0.01)
    said(made, READY)
    await starting
    yield made
    await made.stop()


def said(workers: Supervisor, body: Any) -> None:
    workers._handle(Envelope("d0", workers.processes["d0"].spec.epoch, body))


async def end(workers: Supervisor, code: int) -> None:
    """The present incarnation ends, and the next one has been started."""
    process = workers.processes["d0"]
    process.ended = f"ended with exit code {code}"
    async with asyncio.timeout(5):
        while workers.processes["d0"] is process:
            await asyncio.sleep(0.01)


async def test_the_reason_is_that_of_the_latest_end(watched: Supervisor) -> None:
    assert watched.failed == {}
    await end(watched, -11)
    assert "exit code -11" in watched.failed["d0"]
    said(watched, StartFailed("There is no room for the model."))
    await end(watched, 1)
    assert watched.failed["d0"] == "There is no room for the model.", "better than a code"
    await end(watched, 7)
    assert "exit code 7" in watched.failed["d0"], "the room was not this one's trouble"
    said(watched, READY)
    assert watched.failed == {}
    await end(watched, -9)
    assert "exit code -9" in watched.failed["d0"]


async def test_one_that_was_silent_ended_of_that(watched: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    silences: Iterator[dict[str, float]] = iter([{"d0": 61.0}])
    monkeypatch.setattr(watched._health, "silent", lambda now: next(silences, {}))
    process = watched.processes["d0"]
    async with asyncio.timeout(5):
        while watched.processes["d0"] is process:
            await asyncio.sleep(0.01)
    assert watched.failed["d0"] == "The worker d0 was silent for 61 s and was ended."
    await end(watched, 3)
    assert "exit code 3" in watched.failed["d0"]


async def test_a_worker_that_loads_while_all_are_stopped_is_told_so(watched: Supervisor) -> None:
    adding = asyncio.create_task(watched.add("d1", EngineConfig(model="m")))
    async with asyncio.timeout(5):
        while "d1" not in watched.processes:
            await asyncio.sleep(0.01)
        await watched.stop()
        with pytest.raises(StartupError, match="shutting down"):
            await adding


async def test_a_worker_that_takes_its_time_to_leave_does_not_disturb_the_watch(
    watched: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await added(watched, "d1")
    monkeypatch.setattr(watched.processes["d1"], "stop", lambda seconds: time.sleep(0.2))
    await watched.remove("d1")
    assert not caplog.records


async def test_a_worker_that_is_removed_as_it_ends_is_not_started_again(watched: Supervisor) -> None:
    await added(watched, "d1")
    watched.processes["d1"].ended = "ended with exit code 1"
    await asyncio.sleep(0.05)  # the watch has seen it, and waits for what it still has to say
    await watched.remove("d1")
    await asyncio.sleep(0.2)
    assert set(watched.processes) == {"d0"}
    assert not watched.failed
    await end(watched, 3)  # others are still watched


@pytest.mark.parametrize(("address", "deep", "why"), [("192.0.2.1", "", "192.0.2.1"), ("", "x" * 100, "longer than")])
async def test_a_start_without_sockets_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, deep: str, why: str
) -> None:
    (tmp_path / deep).mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / deep))
    monkeypatch.setattr(Fake, "address", address)
    made = supervisor()
    with pytest.raises(StartupError, match=re.escape(why)):
        await made.start()
    assert not list((tmp_path / deep).glob("miniserve-*/*"))


async def test_two_workers_that_are_added_at_once_do_not_get_one_device(
    watched: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 3)
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    watched.engines["d0"] = EngineConfig(model="m", device="cuda:0")
    adding = [asyncio.create_task(added(watched, name)) for name in ("d1", "d2")]
    await asyncio.gather(*adding)
    assert sorted(engine.device for engine in watched.engines.values()) == ["cuda:0", "cuda:1", "cuda:2"]


async def test_one_that_there_is_no_room_for_has_no_device(
    watched: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Fake, engines: Any) -> Any:
        raise StartupError("There is no room.")

    monkeypatch.setattr(Fake, "prepare", full)
    with pytest.raises(StartupError, match="no room"):
        await watched.add("d1", EngineConfig(model="m"))
    assert set(watched.engines) == {"d0"}


async def added(workers: Supervisor, name: str) -> None:
    """One more worker serves."""

    async def add() -> None:
        await workers.add(name, one_more(workers.engines, Role.DECODER))

    adding = asyncio.create_task(add())
    async with asyncio.timeout(5):
        while name not in workers.processes:
            await asyncio.sleep(0.01)
        workers._handle(Envelope(name, 1, READY))
        await adding
