"""Processes: the run's directory, and worker processes that cannot outlive the frontend.

A worker's stdin is a pipe from the frontend. It carries the worker's specification and then nothing; when it closes,
whatever killed the frontend, the worker removes the run's directory and leaves. KV pools are anonymous memory, sockets
lie in the directory: nothing else could be left behind.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from miniserve.config import EngineConfig

SPINNING = {"GOMP_SPINCOUNT": "1000"}
"""How long a thread of OpenMP's spins for its next piece of work before it sleeps. By default so long that on a machine
with anything else to do one waits for another that does not even run."""
CUDA_QUEUES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""Streams that share one of the GPU's queues wait for each other. By default there are 8, and a worker has a stream for
each direction of each peer, some of which wait for that peer."""


class WorkerSpec(msgspec.Struct, frozen=True):
    """What a worker process reads from stdin, as one line of JSON. Its inbox is bound at `address`. Where it is one of
    several ranks, `leader` is the inbox of rank 0, and `region` the file that all of them map."""

    name: str
    epoch: int
    run_dir: str
    address: str
    frontend: str
    engine: EngineConfig
    rank: int = 0
    leader: str = ""
    region: str = ""


class RunDir:
    """A directory of this run that only this user can enter, for its sockets."""

    def __init__(self) -> None:
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"miniserve-{os.getuid()}"
        base.mkdir(mode=0o700, exist_ok=True)
        if base.stat().st_uid != os.getuid() or base.stat().st_mode & 0o077:
            raise OSError(f"{base} is not a private directory of this user: remove it, or set XDG_RUNTIME_DIR.")
        # One process at a time, so that none sweeps away what another has made and not locked yet.
        handle = os.open(base, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            _sweep(base)
            self.path = Path(tempfile.mkdtemp(dir=base))
            self._lock = (self.path / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        finally:
            os.close(handle)

    def address(self, name: str) -> str:
        return f"ipc://{self.path}/{name}"

    def remove(self) -> None:
        """Delete it; safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _sweep(base: Path) -> None:
    for path in base.iterdir():
        with contextlib.suppress(OSError), (path / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


class WorkerProcess:
    """A spawned `python -m miniserve.worker`."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        # One thread pool of torch's is enough; the others only cost start-up time and memory.
        ours = {"TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "1"} | import_path()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "miniserve.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=SPINNING | CUDA_QUEUES | os.environ | ours,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: see `exit_code`
            self._process.stdin.write(msgspec.json.encode(spec) + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Block until it has ended: its exit code."""
        return self._process.wait()

    def stop(self, timeout: float) -> None:
        """Close its stdin, wait up to `timeout` seconds, then kill."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def import_path() -> dict[str, str]:
    """Processes with this environment import the same miniserve as this one, from wherever it was started."""
    here = str(Path(__file__).resolve().parents[2])
    rest = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{here}{os.pathsep}{rest}" if rest else here}
