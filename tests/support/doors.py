"""The doors of workers that tests make up: one for each name, epoch and directory, as a process has."""

from __future__ import annotations

from functools import cache

from miniserve.kv.transfer.door import Door

KEY = b"k" * 40


@cache
def door(us: tuple[str, int], run_dir: str) -> Door:
    return Door(us, run_dir, KEY)


NO_DOOR: Door = None  # type: ignore[assignment]  # of workers that only map each other's memory
