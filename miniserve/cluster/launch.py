"""Where workers run, and the directory of a run. `Launcher` is for this host, `cluster/ray_launcher.py` for several."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Protocol

import msgspec

from miniserve.cluster.channels import Keys
from miniserve.config import EngineConfig

DEFAULTS = {"GOMP_SPINCOUNT": "1000", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""Of a worker's environment. A thread of OpenMP's spins for its next piece of work before it sleeps: by default so long
that on a machine with anything else to do one waits for another that does not even run. Streams that share one of the
GPU's queues wait for each other: by default there are 8, and a worker has a stream for each direction of each peer."""

KILL_SECONDS = 5.0
"""How long a killed process is waited for."""


class StartupError(RuntimeError):
    """A worker could not start; the message is for a person."""


class WorkerSpec(msgspec.Struct, frozen=True):
    """What a worker process has to know. Its inbox is bound at `address`, the frontend's is at `frontend`. `host` names
    the host it is on, "" for a local one; with a `listen`, an address of that host, it can be reached from others. Of a
    worker of several ranks `leader` is the inbox of rank 0, and `region` the file that all of them map."""

    name: str
    epoch: int
    run_dir: str
    address: str
    frontend: str
    engine: EngineConfig
    keys: Keys
    host: str = ""
    listen: str = ""
    rank: int = 0
    leader: str = ""
    region: str = ""


class Started(Protocol):
    """A worker that was started. No call blocks for longer than it says."""

    spec: WorkerSpec

    @property
    def placed(self) -> bool:
        """Whether it has a place to run: while it waits for one, nothing is wrong."""

    @property
    def ended(self) -> str | None:
        """How it has ended, as a verb and more; None while it runs."""

    def stop(self, timeout: float) -> None:
        """Give a worker that the supervisor has sent `Shutdown` up to `timeout` seconds, then end it."""

    def kill(self) -> None:
        """End it at once, and all that belongs to it."""


class RunDir:
    """A directory of one run that only this user can enter, for its sockets: a new one in `base`, or that at `path`. It
    goes when all processes that have it as a `RunDir` have gone, or one has removed it."""

    def __init__(self, base: Path, path: Path | None = None) -> None:
        """Raises OSError."""
        base.mkdir(mode=0o700, exist_ok=True)
        found = base.lstat()  # a link of someone else may lead to what is ours: it has all permissions
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise OSError(f"{base} is not a private directory of this user: remove it, or set XDG_RUNTIME_DIR.")
        # One process at a time, so that none sweeps away what another has made and not locked yet.
        handle = os.open(base, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            for left in base.iterdir():
                sweep(left)
            self.path = path or Path(tempfile.mkdtemp(dir=base))
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._lock = (self.path / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        finally:
            os.close(handle)

    def address(self, name: str) -> str:
        return f"ipc://{self.path}/{name}"

    def remove(self) -> None:
        """Delete it, unless others still have it; safe to call twice."""
        self._lock.close()
        sweep(self.path)


def sweep(path: Path) -> bool:
    """Delete the directory of a run whose processes have gone; whether it is not there any more."""
    with contextlib.suppress(OSError), (path / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


class WorkerProcess(subprocess.Popen[bytes]):
    """A spawned `python -m miniserve.worker`, which cannot outlive this process.

    Its stdin is a pipe. It carries the worker's specification and then nothing; when it closes, whatever killed this
    process, the worker removes the run's directory and leaves. KV pools are anonymous memory, sockets lie in the
    directory: nothing else could be left behind.
    """

    placed = True

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        # One thread pool of torch's is enough; the others only cost start-up time and memory.
        ours = {"TOKENIZERS_PARALLELISM": "false", "PYTHONSAFEPATH": "1"} | import_path()
        super().__init__(
            [sys.executable, "-m", "miniserve.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=DEFAULTS | os.environ | ours,
        )
        assert self.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: see `ended`
            self.stdin.write(msgspec.json.encode(spec) + b"\n")
            self.stdin.flush()

    @property
    def ended(self) -> str | None:
        code = self.poll()
        return None if code is None else f"ended with exit code {code}"

    def stop(self, timeout: float) -> None:
        assert self.stdin is not None
        with contextlib.suppress(OSError):
            self.stdin.close()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        super().kill()
        try:
            self.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.returncode = -signal.SIGKILL  # a driver that hangs holds it; nothing of it runs any more


class Launcher:
    """Starts workers as processes on this host, which share its memory and cores; one for elsewhere derives from this.
    The frontend is on the `host` of this name, "" where all is local; with an `address` of it the frontend can be
    reached from other hosts. The run's directory, of the same path on all hosts, is made in `base`."""

    host = address = ""

    def __init__(self) -> None:
        self.base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"miniserve-{os.getuid()}"

    def prepare(self, engines: dict[str, EngineConfig]) -> dict[str, EngineConfig]:
        """Make room for workers with these settings; those they start with. May block. Raises `StartupError`."""
        return engines

    def start(self, spec: WorkerSpec, far: str) -> Started:
        """Start a worker. The frontend's inbox is at `far` for those that are on another host."""
        return WorkerProcess(spec)

    def release(self, name: str) -> None:
        """A worker has ended for good."""

    def close(self) -> None:
        """All workers have ended."""


def import_path() -> dict[str, str]:
    """Processes with this environment import the same miniserve as this one, from wherever it was started."""
    here = str(Path(__file__).resolve().parents[2])
    rest = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{here}{os.pathsep}{rest}" if rest else here}
