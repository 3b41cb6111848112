"""Where Ray places workers, on a cluster of this process with GPUs that are only names."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

ray = pytest.importorskip("ray")

from miniserve.cluster import ray_launcher as module  # noqa: E402
from miniserve.cluster.launch import StartupError  # noqa: E402
from miniserve.cluster.ray_launcher import RayLauncher  # noqa: E402
from miniserve.config import EngineConfig  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launcher() -> Iterator[RayLauncher]:
    ray.init("local", num_cpus=1, num_gpus=3, include_dashboard=False, logging_level="ERROR")
    yield RayLauncher("auto", "PACK", "")
    ray.shutdown()


class Where:
    """In place of a worker: says what it was given."""

    def place(self) -> list[int]:
        return sorted(int(gpu) for gpu in ray.get_gpu_ids())

    def run(self, *arguments: Any) -> int:
        return 0


def test_a_worker_gets_the_gpus_of_its_ranks(launcher: RayLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WorkerActor", Where)
    monkeypatch.setattr(module.msgspec.json, "encode", lambda spec: b"")
    engines = launcher.prepare({"d0": EngineConfig(model="m", tensor_parallel_size=2), "d1": EngineConfig(model="m")})
    assert {name: engine.workers for name, engine in engines.items()} == {"d0": 3, "d1": 3}
    started = [launcher.start(SimpleNamespace(name=name, engine=engine), "") for name, engine in engines.items()]
    given = [ray.get(worker._place, timeout=30) for worker in started]
    assert sorted(map(len, given)) == [1, 2]
    assert sorted(gpu for each in given for gpu in each) == [0, 1, 2]
    for worker in started:
        assert worker.placed
        worker.stop(5.0)
        assert worker.ended
    for name in engines:
        launcher.release(name)
    assert not launcher._groups


def test_without_room_it_says_what_there_is(launcher: RayLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM_SECONDS", 1.0)
    with pytest.raises(StartupError, match=r"no room for bundles of .*'CPU': 1.0.*: it has .*'GPU': 3"):
        launcher.prepare({f"d{n}": EngineConfig(model="m", device="cpu") for n in range(4)})
