"""Compiles `cpu.cpp` and its headers with the system's compiler, once, into the user's cache, and loads the result."""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from miniserve.config import cache_dir

SOURCE = Path(__file__).with_name("cpu.cpp")
PARTS = "vectors", "tiles", "matrix", "packing", "products", "experts", "attention", "delta", "group"
HEADERS = [SOURCE.with_name(f"cpu_{part}.h") for part in PARTS]
COMPILERS = ("g++", "c++")
"""`cpu.cpp` needs GCC for its vectors; $CXX comes first where it is set."""
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
ISAS = {
    "native": ("-march=native",),
    "avx512": ("-march=native", "-mno-amx-tile"),
    "avx2": ("-march=x86-64-v3",),
    "tiles-emulated": ("-march=native", "-DTILES_EMULATED"),
}
"""What $MINISERVE_CPU_ISA may name: all that this CPU has, or less of it, or tiles in plain C++ (slow: for tests)."""


class NoKernels(RuntimeError):
    """There are no native kernels here; the message says why."""


def load(progress: Callable[[str], None] = lambda line: None) -> ctypes.CDLL:
    """The compiled kernels. `progress` gets a line if they have to be compiled first. Raises `NoKernels`.

    torch must have been imported: both then share one OpenMP runtime, and so one pool of threads.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        raise NoKernels("no g++ found (Debian and Ubuntu: sudo apt install g++)")
    isa = os.environ.get("MINISERVE_CPU_ISA") or "native"
    if isa not in ISAS:
        raise NoKernels(f"MINISERVE_CPU_ISA={isa} is unknown: use {', '.join(ISAS)}")
    flags = (*FLAGS, *ISAS[isa])
    # Machines of different kinds may share a home directory: what was compiled for one must not run on another.
    sources = [path.read_text("utf-8") for path in (SOURCE, *HEADERS)]
    facts = ("flags", "Features", "model name")
    cpu = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(facts)}
    identity = [*sources, *flags, compiler, str(os.stat(compiler).st_mtime), platform.machine(), *sorted(cpu)]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    library = cache_dir() / "kernels" / f"{name}.so"
    try:
        if not library.exists():
            library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Workers start at the same time: one compiles, the others wait for it.
            with (library.parent / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not library.exists():
                    progress("compiling CPU kernels (once)")
                    _compile([compiler, *flags], library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NoKernels(f"{library}: {error.strerror or error}") from error


def _compile(command: list[str], library: Path) -> None:
    """Compile to a file beside `library` and move it there: it appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".making-") as work:
        out = Path(work) / "cpu.so"
        done = subprocess.run([*command, str(SOURCE), "-o", str(out)], capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.splitlines()
            reason = next((line for line in lines if "error" in line), f"exit code {done.returncode}")
            raise NoKernels(f"{command[0]} failed: {reason.strip()}")
        os.replace(out, library)
