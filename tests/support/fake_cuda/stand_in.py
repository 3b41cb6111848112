"""Runs programs with the real torch and FlashInfer for CUDA on a device that is not there: see `device.h`.

The library is compiled with the machine's own compiler, and takes the place of the CUDA runtime, cuBLAS and the driver
when a program is loaded (LD_PRELOAD). Such a program ends with one line of JSON, which is what it has found.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
RUNTIME = [HERE / f"{part}.cpp" for part in ("device", "memory", "copies", "streams", "launches", "products")]
COMPILE = ("g++", "-std=c++20", "-O1", "-fPIC", "-shared")
PROBLEM = "FAKE CUDA: "
"""How the stand-in begins a line on stderr."""


def missing() -> str | None:
    """Why nothing can run here with the stand-in. torch is not imported for that."""
    if sys.platform != "linux" or shutil.which(COMPILE[0]) is None:
        return "needs Linux and g++"
    try:
        plain = version("torch").endswith("+cpu")
    except PackageNotFoundError:
        plain = True
    needed = "flashinfer", "flashinfer_jit_cache", "triton", "nvidia"
    if plain or any(importlib.util.find_spec(name) is None for name in needed) or not _headers()[0].is_dir():
        return "needs torch for CUDA 13 and FlashInfer's compiled modules (flashinfer-python, flashinfer-jit-cache)"
    return None


def _headers() -> list[Path]:
    """Folders of torch's packages that hold CUDA's headers; the second has what the first lacks."""
    nvidia, triton = (importlib.util.find_spec(name) for name in ("nvidia", "triton"))
    assert nvidia is not None
    assert triton is not None
    places = [Path(place) / "cu13" / "include" for place in nvidia.submodule_search_locations or ()]
    found = next((place for place in places if place.is_dir()), places[0])
    return [found, Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "include"]  # type: ignore[index]


@dataclass(frozen=True)
class Result:
    """What a program has found, and what the stand-in had to say of it."""

    found: dict[str, Any]
    problems: list[str]


class StandIn:
    """The compiled stand-in, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._library = folder / "libfake_cuda.so"
        (folder / "driver").mkdir()
        includes = [flag for place in _headers() for flag in ("-isystem", str(place))]
        self._compile(RUNTIME, self._library, includes)
        self._compile([HERE / "driver.cpp"], folder / "driver" / "libcuda.so.1", [])

    @staticmethod
    def _compile(sources: Iterable[Path], out: Path, flags: list[str]) -> None:
        subprocess.run([*COMPILE, *map(str, sources), *flags, "-o", str(out)], check=True)

    @property
    def fault(self) -> Path:
        """Where a running program looks for what is to fail: "launch 3 1" is the fourth launch from then on."""
        return self.folder / "fault"

    def environment(self) -> dict[str, str]:
        """Of a program under the stand-in."""
        return os.environ | {
            "LD_PRELOAD": str(self._library),
            "LD_LIBRARY_PATH": str(self.folder / "driver"),
            "FAKE_CUDA_FAULT": str(self.fault),
            "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
            "FLASHINFER_DISABLE_JIT": "1",
            "FLASHINFER_WORKSPACE_BASE": str(self.folder),
            "TRITON_CACHE_DIR": str(self.folder / "triton"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, program: str, *arguments: str, seconds: float = 170) -> Result:
        """What the module `program` of `tests.gpu_stand_in.programs` has found. Raises AssertionError if it fails."""
        command = [sys.executable, "-m", f"tests.gpu_stand_in.programs.{program}", *arguments]
        settings: dict[str, Any] = {"cwd": ROOT, "env": self.environment(), "timeout": seconds}
        done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
        assert done.returncode == 0, f"{program} ended with {done.returncode}:\n{done.stderr[-6000:]}"
        said = done.stderr.splitlines()
        problems = [line.removeprefix(PROBLEM) for line in said if line.startswith(PROBLEM)]
        return Result(json.loads(done.stdout.splitlines()[-1]), problems)
