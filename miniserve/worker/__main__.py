"""`python -m miniserve.worker`: reads its specification from stdin; `run` builds the engine, and serves."""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import msgspec
import zmq

from miniserve.cluster.channels import Inbox, Outboxes
from miniserve.cluster.launch import WorkerSpec, sweep
from miniserve.cluster.messages import Loading, StartFailed
from miniserve.config import ConfigError
from miniserve.worker.ranks import Ranks, follow

_born = time.monotonic()
SWEEPS = 20
"""How often a worker tries to delete the run's directory: a killed frontend's lock may outlive its pipe a little."""


def main() -> int:
    """The exit code of `run`."""
    line = sys.stdin.buffer.readline()
    if not line:
        return 0  # the frontend is gone already
    spec = msgspec.json.decode(line, type=WorkerSpec)
    # Ctrl-C goes to the whole terminal, and supervisors stop whole groups; the frontend drains, then sends `Shutdown`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_leave_with_frontend, args=(spec,), daemon=True).start()
    return run(spec)


def run(spec: WorkerSpec) -> int:
    """Be the worker that `spec` describes, or a rank of it: 0 after a shutdown, 1 if it could not start or broke."""
    logging.basicConfig(level=logging.WARNING, format=f"{spec.name}: %(message)s")
    logging.getLogger("miniserve").setLevel(logging.INFO)
    logging.getLogger("miniserve.text").setLevel(logging.ERROR)  # the frontend reads the same and has said so
    context = zmq.Context()
    inbox = Inbox(context, spec.address, spec.keys, spec.listen)
    outboxes = Outboxes(context, spec.name, spec.epoch, spec.keys)
    failures, ranks = list[Exception](), Ranks(spec, outboxes)

    def tell(phase: str, done: int, total: int) -> None:
        if not spec.rank:
            outboxes.send(spec.frontend, Loading(phase, done, total))

    try:
        tell("imports", 0, 0)
        from miniserve.kv.hashing import root_hash
        from miniserve.worker.build import build, warm_up
        from miniserve.worker.process import serve

        imported = time.monotonic()
        built = build(spec.engine, tell, ranks.spec, ranks.tell)
        if spec.rank:
            follow(spec, built, inbox, outboxes)
        ranks.meet(inbox)
        tell("warm-up", 0, 0)
        warming = time.monotonic()
        warm_up(built.engine, root_hash(built.layout))
        built.facts.phases.update({"imports": imported - _born, "warm-up": time.monotonic() - warming})
        serve(spec, built, inbox, outboxes, ranks)
    except Exception as error:
        reason, trace = str(error), ""
        if not isinstance(error, ConfigError):
            broken = f"A worker broke: {type(error).__name__}: {error} (--log-level debug shows where)."
            reason = " ".join(broken.split())
            trace = traceback.format_exc()
        outboxes.send(spec.frontend, StartFailed(reason, trace))
        # Kept until the frontend has it: torch may abort the process when a broken device's tensors go.
        failures.append(error)
    ranks.close()
    inbox.close()
    outboxes.close(linger_ms=1000 if failures else 200)
    context.term()
    return int(bool(failures))


def _leave_with_frontend(spec: WorkerSpec) -> None:
    """Block until stdin closes: the frontend, or rank 0, has stopped us, or died however it did."""
    # os.read, not sys.stdin: nothing else must wait for a lock of the interpreter's own stdin at exit.
    while os.read(0, 1):
        pass
    for _ in range(SWEEPS):
        if spec.rank or sweep(Path(spec.run_dir)):
            break
        time.sleep(0.01)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
