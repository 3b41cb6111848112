"""Compiles `cpu.cpp` and its headers with the system's compiler, once, into the user's cache, and loads the result.
What its functions take and its structs hold is read from the sources."""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miniserve.config import cache_dir, make_once

SOURCE = Path(__file__).with_name("cpu.cpp")
PARTS = "vectors", "tiles", "matrix", "packing", "products", "experts", "attention", "delta", "group"
HEADERS = [SOURCE.with_name(f"cpu_{part}.h") for part in PARTS]
FUNCTION = re.compile(r'extern "C" void (\w+?)(_##NAME)?\((.*?)\) \{', re.DOTALL)
FIELDS = re.compile(r"^    (?:const )?(\w+)(?:<T>)?( ?\*)? ?(\w[\w, *]*);", re.MULTILINE)
"""A line of a struct: the type, whether it is a pointer, the names."""
DTYPES = "float32", "bfloat16"
"""Which a function may be there for, one for each."""
NUMBERS = {"int64_t": ctypes.c_int64, "float": ctypes.c_float} | dict.fromkeys(
    ("int", "int32_t", "uint32_t", "Gate"), ctypes.c_int32
)
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
    """The compiled kernels. `progress` gets a line if they have to be compiled first. Raises `NoKernels`. torch must
    have been imported: both then share one OpenMP runtime, and so one pool of threads."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        raise NoKernels("no g++ found (Debian and Ubuntu: sudo apt install g++)")
    isa = os.environ.get("MINISERVE_CPU_ISA") or "native"
    if isa not in ISAS:
        raise NoKernels(f"MINISERVE_CPU_ISA={isa} is unknown: use {', '.join(ISAS)}")
    flags = (*FLAGS, *ISAS[isa])
    # Machines of different kinds may share a home directory: what was compiled for one must not run on another.
    sources = read_sources()
    facts = ("flags", "Features", "model name")
    cpu = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(facts)}
    identity = [*sources, *flags, compiler, str(os.stat(compiler).st_mtime), platform.machine(), *sorted(cpu)]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    library = cache_dir() / "kernels" / f"{name}.so"

    def compile(out: Path) -> None:
        progress("compiling CPU kernels (once)")
        done = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(out)], capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.splitlines()
            reason = next((line for line in lines if "error" in line), f"exit code {done.returncode}")
            raise NoKernels(f"{compiler} failed: {reason.strip()}")

    try:
        return _declared(ctypes.CDLL(str(make_once(library, compile))), sources[0])
    except OSError as error:
        raise NoKernels(f"{library}: {error.strerror or error}") from error


def read_sources() -> list[str]:
    """The text of `cpu.cpp`, then that of its headers."""
    return [path.read_text("utf-8") for path in (SOURCE, *HEADERS)]


def _declared(library: ctypes.CDLL, source: str) -> ctypes.CDLL:
    """The library, whose functions take what `source` declares: numbers, and pointers to all else."""
    for name, each, arguments in FUNCTION.findall(source):
        kinds: list[Any] = [
            ctypes.c_void_p if "*" in argument else NUMBERS[argument.split()[-2]] for argument in arguments.split(",")
        ]
        for full in [f"{name}_{dtype}" for dtype in DTYPES] if each else [name]:
            if (function := getattr(library, full, None)) is not None:
                function.argtypes, function.restype = kinds, None
    return library


def _structs(*names: str) -> dict[str, Any]:
    """Those of these `names`, each after what it contains. Their fields end where a blank line follows."""
    source, made = "\n".join(read_sources()), dict[str, Any]()
    for name in names:
        body = source.partition(f"struct {name} {{\n")[2].partition("\n}")[0].partition("\n\n")[0]
        fields = [
            (field.strip(" *"), ctypes.c_void_p if pointer else made.get(kind) or NUMBERS[kind])
            for kind, pointer, listed in FIELDS.findall(body)
            for field in listed.split(",")
        ]
        made[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return made


STRUCTS = _structs("Batch", "Matrix", "Attention", "DeltaNet", "Mlp", "Experts", "Layer", "Model", "Group")
