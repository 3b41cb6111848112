"""Which worker runs on which device. The frontend decides it without torch, so GPUs are counted without CUDA."""

import importlib.util
import os
import runpy
from collections import Counter
from itertools import takewhile
from pathlib import Path

import msgspec

from miniserve.config import ConfigError, EngineConfig, Role, Topology, problem

PROC_GPUS = Path("/proc/driver/nvidia/gpus")


def place(
    topology: Topology | None, devices: list[str], engine: EngineConfig, *, elsewhere: bool = False
) -> tuple[Topology, dict[str, EngineConfig]]:
    """The topology, and each worker's settings by its name: workers get the `devices` in turns, as many at a time as
    they have ranks, of which the settings name the first.

    Without `devices` these are all visible GPUs, unless `engine.device` names something else. Workers `elsewhere` get
    theirs there. No topology: 1D on the devices of one worker, 1P(N-1)D on those of N. Raises `ConfigError`.
    """
    if devices and elsewhere:
        raise ConfigError("--devices names GPUs of this machine, but workers run where Ray places them: leave it out.")
    if devices and engine.device in ("auto", "cuda"):
        count = count_gpus()  # 0 where they cannot be counted
        for named in devices:
            if 0 < count <= int(named.removeprefix("cuda:")):
                raise ConfigError(f"--devices names {named}, but there are {count} GPUs to be seen, from cuda:0 on.")
    elif devices:
        raise ConfigError(f"--devices names GPUs, --device {engine.device} does not: leave one of them out.")
    ranks, every = engine.tensor_parallel_size, [engine.device] if elsewhere else _all(engine.device)
    chosen = _firsts(devices or every[: len(every) // ranks * ranks] or every, ranks)
    if topology is None:
        topology = Topology(1, len(chosen) - 1) if len(chosen) > 1 else Topology(0, 1)
    roles = topology.roles
    if len(roles) * ranks < len(devices):
        raise ConfigError(f"--devices names {len(devices)} GPUs, --topology {topology} has {len(roles)} workers.")
    at = {name: chosen[i % len(chosen)] for i, name in enumerate(roles)}
    sharing = Counter(at.values())
    return topology, {
        name: msgspec.structs.replace(
            engine, role=roles[name], device=device, workers=len(roles) * ranks, sharing=sharing[device]
        )
        for name, device in at.items()
    }


def one_more(engines: dict[str, EngineConfig], role: Role) -> EngineConfig:
    """The settings of one more worker beside others: on GPUs, those that none of them has. Raises `ConfigError`."""
    like = next(iter(engines.values()))
    if not like.device.startswith("cuda:"):
        return msgspec.structs.replace(like, role=role, workers=like.workers + like.tensor_parallel_size)
    taken = {engine.device for engine in engines.values()}
    free = [device for device in _firsts(_all("cuda"), like.tensor_parallel_size) if device not in taken]
    if not free:
        raise ConfigError(f"All GPUs of this machine have workers: {', '.join(sorted(taken))}.")
    return msgspec.structs.replace(like, role=role, device=free[0], sharing=1)


def _firsts(devices: list[str], ranks: int) -> list[str]:
    """The first GPU of each worker, whose other ranks have the next ones. Raises `ConfigError`."""
    numbers = [int(device.removeprefix("cuda:")) for device in devices if device.startswith("cuda:")]
    firsts = numbers[::ranks]
    if numbers != [first + rank for first in firsts for rank in range(ranks)]:
        raise ConfigError(problem("cluster.neighbours", ranks=ranks, devices=", ".join(devices)))
    return [f"cuda:{first}" for first in firsts] or devices


def _all(device: str) -> list[str]:
    """All devices of the kind that `--device` names."""
    wanted = device == "cuda" or (device == "auto" and _torch_has_cuda())
    return [f"cuda:{n}" for n in range(count_gpus() if wanted else 0)] or [device]


def count_gpus() -> int:
    """NVIDIA GPUs that CUDA will see in a process of ours: the driver's, if any, that CUDA_VISIBLE_DEVICES allows."""
    total = _driver_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return total
    names = filter(None, (name.strip() for name in visible.split(",")))
    # CUDA ignores all that follows a number without a GPU.
    there = takewhile(lambda name: not name.lstrip("-").isdecimal() or 0 <= int(name) < total, names)
    return len(list(there)) if total else 0


def _driver_gpus() -> int:
    """All GPUs of the driver: asked through NVML, else counted where the driver lists them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        pynvml.nvmlShutdown()
        return count
    except Exception:  # no package, no driver: NVML has an exception of its own for each
        return len(list(PROC_GPUS.iterdir())) if PROC_GPUS.is_dir() else 0


def _torch_has_cuda() -> bool:
    """Whether the workers' torch was built for CUDA, read from its version file: importing torch takes a second."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        return runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda") is not None
    except OSError:
        return False
