"""Which worker runs on which GPU, and how much of it each may use; without any GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from miniserve.cli.banner import ways
from miniserve.cluster import devices
from miniserve.cluster.devices import count_gpus, place
from miniserve.cluster.messages import CudaHandle, PoolInfo
from miniserve.config import ConfigError, EngineConfig, ServeConfig, Topology, parse_devices
from miniserve.dispatcher import Dispatcher
from miniserve.kv.memory import PageShape
from miniserve.worker import sizing
from miniserve.worker.sizing import CUDA_RUNTIME_BYTES, size_pool

GIB = 2**30


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Sets how many there are."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    return lambda count: monkeypatch.setattr(devices, "_driver_gpus", lambda: count)


def placed(
    topology: str | None, names: list[str], device: str = "auto", ranks: int = 1
) -> tuple[str, dict[str, tuple[str, int]]]:
    """The topology, and each worker's device and with how many it shares it."""
    config = EngineConfig(model="m", device=device, tensor_parallel_size=ranks)
    chosen, engines = place(Topology.parse(topology) if topology else None, names, config)
    assert all(engine.workers == len(engines) * ranks for engine in engines.values())
    return str(chosen), {name: (engine.device, engine.sharing) for name, engine in engines.items()}


@pytest.mark.parametrize(
    ("text", "names"), [("0", ["cuda:0"]), ("cuda:1, 0", ["cuda:1", "cuda:0"]), ("02", ["cuda:2"])]
)
def test_gpus_can_be_named(text: str, names: list[str]) -> None:
    assert parse_devices(text) == names


@pytest.mark.parametrize("text", ["", "cpu", "0,", "cuda", "cuda:-1", "0 1"])
def test_what_names_no_gpu_says_how_to(text: str) -> None:
    with pytest.raises(ConfigError, match="write them like"):
        parse_devices(text)


def test_without_a_gpu_all_is_as_the_device_says(gpus) -> None:
    gpus(0)
    assert placed(None, []) == ("1D", {"d0": ("auto", 1)})
    assert placed("1P1D", [], "cpu") == ("1P1D", {"p0": ("cpu", 2), "d0": ("cpu", 2)})
    assert placed(None, [], "cuda") == ("1D", {"d0": ("cuda", 1)}), "the worker says what is wrong"


def test_all_gpus_are_used_by_default(gpus) -> None:
    gpus(1)
    assert placed(None, []) == ("1D", {"d0": ("cuda:0", 1)})
    gpus(3)
    three = {"p0": ("cuda:0", 1), "d0": ("cuda:1", 1), "d1": ("cuda:2", 1)}
    for device in ("auto", "cuda"):
        assert placed(None, [], device) == ("1P2D", three)
    assert placed("1D", []) == ("1D", {"d0": ("cuda:0", 1)})
    assert placed(None, [], "cuda:2") == ("1D", {"d0": ("cuda:2", 1)})
    assert placed(None, [], "cpu") == ("1D", {"d0": ("cpu", 1)})


def test_workers_get_gpus_in_turns_and_share_them(gpus) -> None:
    gpus(4)
    assert placed("1P2D", ["cuda:3", "cuda:1"]) == (
        "1P2D",
        {"p0": ("cuda:3", 2), "d0": ("cuda:1", 1), "d1": ("cuda:3", 2)},
    )
    assert placed("1P1D", ["cuda:0"]) == ("1P1D", {"p0": ("cuda:0", 2), "d0": ("cuda:0", 2)})
    assert placed(None, ["cuda:0", "cuda:0"]) == ("1P1D", {"p0": ("cuda:0", 2), "d0": ("cuda:0", 2)})


def test_a_worker_of_several_ranks_has_a_row_of_gpus(gpus) -> None:
    gpus(5)
    assert placed(None, [], ranks=2) == ("1P1D", {"p0": ("cuda:0", 1), "d0": ("cuda:2", 1)})
    assert placed(None, [], ranks=4) == ("1D", {"d0": ("cuda:0", 1)})
    assert placed("2D", ["cuda:3", "cuda:4"], ranks=2) == ("2D", {"d0": ("cuda:3", 2), "d1": ("cuda:3", 2)})
    assert placed("1P1D", [], "cpu", ranks=4) == ("1P1D", {"p0": ("cpu", 2), "d0": ("cpu", 2)})
    for names in (["cuda:0", "cuda:2"], ["cuda:1", "cuda:0"], ["cuda:0", "cuda:1", "cuda:2"], ["cuda:0"]):
        with pytest.raises(
            ConfigError, match=r"--tensor-parallel-size 2 takes 2 neighbouring GPUs .* like cuda:0,cuda:1"
        ):
            placed(None, names, ranks=2)
    with pytest.raises(ConfigError, match="takes 6 neighbouring"):
        placed(None, [], ranks=6)
    with pytest.raises(ConfigError, match="has 1 workers"):
        placed("1D", ["cuda:0", "cuda:1", "cuda:2", "cuda:3"], ranks=2)


def test_devices_that_cannot_be(gpus) -> None:
    gpus(2)
    for topology, names, device, says in (
        (None, ["cuda:2"], "auto", "there are 2 GPUs"),
        ("1D", ["cuda:0", "cuda:1"], "auto", "has 1 workers"),
        (None, ["cuda:0"], "cpu", "leave one of them out"),
    ):
        with pytest.raises(ConfigError, match=says):
            placed(topology, names, device)


def test_a_torch_without_cuda_leaves_gpus_alone(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: False)
    assert placed(None, []) == ("1D", {"d0": ("auto", 1)})


def test_what_torch_was_built_for_is_known_without_it() -> None:
    assert devices._torch_has_cuda() == (torch.version.cuda is not None)
    code = "import sys; from miniserve.cluster.devices import *; from miniserve.cluster import devices as d; "
    code += "d._torch_has_cuda(); count_gpus(); import miniserve.dispatcher; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("2", 1),
        ("3, 1", 2),
        ("0,9,1", 1),
        ("0,-1,1", 1),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,MIG-1", 2),
    ],
)
def test_only_visible_gpus_count(gpus, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    gpus(4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count
    gpus(0)
    assert count_gpus() == 0


def test_gpus_are_counted_by_what_the_driver_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    monkeypatch.setattr(devices, "PROC_GPUS", tmp_path / "gpus")
    assert devices._driver_gpus() == 0
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert devices._driver_gpus() == 2


def test_the_banner_names_gpus_that_cannot_read_each_other(gpus) -> None:
    gpus(3)

    def shown(how: str, refused: str = "") -> str:
        engine = EngineConfig(model="m", kv_transfer=how)
        client = Dispatcher(ServeConfig(engine=engine), SimpleNamespace(folder=Path("/m")))
        assert str(client.topology) == "1P2D"
        for name, device, reach in (("p0", 0, [0, 1]), ("d0", 1, [0, 1]), ("d1", 2, [2])):
            reach = reach if not refused else []
            pool = PoolInfo(1, -1, 8, 64, "L", CudaHandle(device, reach, b"", 0, 0, b"", 0, refused))
            client.ready[name] = SimpleNamespace(pool=pool)
        return ways(client.transfer)

    for how, says in (
        (
            "auto",
            "collective (NCCL, their GPUs cannot read each other) between all workers but d0->p0 mapped, p0->d0 mapped",
        ),
        ("mapped", "none (prefills at home) between all workers but d0->p0 mapped, p0->d0 mapped"),
        ("collective", "collective (NCCL) between all workers"),
    ):
        assert shown(how) == says
    assert shown("auto", "no") == "collective (NCCL, CUDA IPC: no) between all workers"
    assert shown("mapped", "no") == "none (prefills at home, CUDA IPC: no) between all workers"
    assert shown("collective", "no") == "collective (NCCL) between all workers"


# --- memory ---------------------------------------------------------------------------------------------------------


def test_workers_on_one_gpu_split_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 70 * GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8 * GIB)
    shape = PageShape(layers=32, page_tokens=16, kv_heads=8, head_dim=128, dtype=torch.bfloat16)

    def size(sharing: int) -> tuple[int, str]:
        config = EngineConfig(model="m", sharing=sharing)
        sizes = {"shape": shape, "max_model_len": 1024, "state_bytes": 0, "snapshot": 0}
        pages, note = size_pool(config, SimpleNamespace(device=torch.device("cuda:1"), **sizes), 7 * GIB, GIB)
        return pages * shape.bytes, note

    assert size(1)[0] == pytest.approx(61 * GIB, abs=shape.bytes)
    half, note = size(2)
    assert half == pytest.approx(36 * GIB - 9 * GIB - CUDA_RUNTIME_BYTES, abs=shape.bytes)
    assert "90% of 80GiB / 2 workers on cuda:1, less 10.18GiB" in note
    free = 5 * GIB
    assert size(2)[0] <= free, "another process has the rest"


def test_files_in_a_containers_memory_give_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container of 16 GiB into which 14 GiB of weights have just been downloaded."""
    for name, text in {
        "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {60 * 2**20} kB\n",
        "sys/fs/cgroup/memory.max": f"{16 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{15 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon {GIB}\nfile {14 * GIB}\ninactive_file {13 * GIB}\nactive_file {GIB}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sizing, "Path", lambda path: tmp_path / path.lstrip("/"))
    assert sizing.memory_available() == 15 * GIB
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert sizing.memory_available() == 60 * GIB


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:01", "cpu:00", "cuda:100", "cuda:٣", "cuda:1\n", "mps"])
def test_what_is_no_device_says_how_to_write_one(name: str) -> None:
    with pytest.raises(ConfigError, match="is not supported: use auto, cpu or cuda"):
        sizing.choose_device(name)
