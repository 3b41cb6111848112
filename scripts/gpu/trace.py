"""What a device did, from torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.gpu.setting import Setting


@contextmanager
def profiled(run: Setting) -> Iterator[Any]:
    """A profiler of what is done within, up to the end of the device's part of it."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield profiler
        run.sync()


def events(profiler: Any) -> list[Any]:
    """Kernels and copies. Raises RuntimeError where there is none."""
    on_device = torch.autograd.DeviceType.CUDA
    found = [e for e in profiler.profiler.kineto_results.events() if e.device_type() == on_device]
    found = [event for event in found if event.duration_ns() > 0]
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return found


def at_work(profiler: Any) -> tuple[float, float]:
    """Seconds that a device was at work, and from its first to its last kernel.

    It is at work from the first to the last kernel of each launch, a graph's or a single one's.
    """
    launches: dict[int, list[int]] = {}
    for event in events(profiler):
        begin, end = event.start_ns(), event.start_ns() + event.duration_ns()
        span = launches.setdefault(event.correlation_id(), [begin, end])
        span[:] = min(span[0], begin), max(span[1], end)
    busy, until = 0, 0
    for begin, end in sorted(launches.values()):
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e9, (until - min(begin for begin, _ in launches.values())) / 1e9


def by_kernel(profiler: Any) -> dict[str, tuple[float, int]]:
    """Seconds and calls of each kernel, the longest first; those of one template are one."""
    spent: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for event in events(profiler):
        of = spent[plain_name(event.name())]
        of[0] += event.duration_ns()
        of[1] += 1
    ordered = sorted(spent.items(), key=lambda item: -item[1][0])
    return {name: (nanoseconds / 1e9, calls) for name, (nanoseconds, calls) in ordered}


def plain_name(name: str) -> str:
    """A kernel's name without its return type and what its template is made with."""
    plain = re.sub(r"^(void|int|bool) ", "", name)
    plain = re.sub(r"[<(].*", "", plain.replace("(anonymous namespace)::", ""))
    return (plain or name)[:70]
