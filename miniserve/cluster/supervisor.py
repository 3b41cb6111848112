"""The workers of one run: started, watched, started again. Nothing here knows of turns, or of where workers run."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import msgspec
import zmq

from miniserve.cluster.channels import Inbox, Keys, Outboxes
from miniserve.cluster.health import Health
from miniserve.cluster.launch import Launcher, RunDir, Started, StartupError, WorkerSpec
from miniserve.cluster.messages import Envelope, Loading, Message, Peer, Ready, Report, Shutdown, StartFailed
from miniserve.config import EngineConfig

log = logging.getLogger("miniserve.workers")

WATCH_SECONDS = 0.5
WATCH_START_SECONDS = 0.1
"""Between two looks at the processes, later and while a person waits for the first start."""


@dataclass(eq=False)
class Supervisor:
    """Owns the workers that `launcher` starts, the run's directory and the sockets, on an event loop it never blocks.
    The owner is called back: `up` when a worker serves (at the first start when all do), `report` with what it reports
    from then on, `down` when it has ended, even while it loads, and whether it returns; `loading` at first.
    `engines`: each worker's settings by its name, in order. Those silent for `timeout` seconds start again."""

    engines: dict[str, EngineConfig]
    timeout: float
    launcher: Launcher
    _: KW_ONLY
    up: Callable[[Peer], None]
    down: Callable[[str, bool], None]
    report: Callable[[str, Report], None]
    loading: Callable[[str, Loading], None]

    def __post_init__(self) -> None:
        self.processes: dict[str, Started] = {}
        """The latest incarnation of each worker, dead or alive."""
        self.ready: dict[str, Ready] = {}
        """What each worker has said of itself when it was last up, also while it starts again."""
        self.failed: dict[str, str] = {}
        """Why a worker does not serve, by its latest end; those that do serve have no entry."""
        self._explained: set[str] = set()
        """Workers whose present incarnation has said, or was found to have, a reason to end."""
        self.run_dir: RunDir | None = None
        self._keys, self._health = Keys.make(), Health(self.timeout)
        self._restarts: dict[str, float | None] = {}
        """Workers that are dead, and when each will be started again; None: no more."""
        self._started = False
        """Whether all workers have served once. Until then one that ends is not replaced: the start has failed."""
        self._changed = asyncio.Event()
        self._watching: asyncio.Task | None = None

    async def start(self) -> None:
        """Spawn the workers and wait, however long, until all are ready. Raises `StartupError`; then nothing runs."""
        try:
            self.engines = await asyncio.to_thread(self.launcher.prepare, self.engines)
            self._spawn()
            while len(self.ready) < len(self.processes):
                await self._changed.wait()
                self._changed.clear()
                if self.failed:
                    # The same model and flags everywhere: one worker's reason is that of all.
                    raise StartupError(next(iter(self.failed.values())))
        except BaseException:
            await self.stop()
            raise
        self._started = True
        for name in self.ready:
            self._admit(name)

    def _spawn(self) -> None:
        try:
            self.run_dir = RunDir(self.launcher.base)
            self._context = zmq.Context()
            self._outboxes = Outboxes(self._context, "frontend", 0, self._keys)
            self._inbox = Inbox(self._context, self.run_dir.address("frontend"), self._keys, self.launcher.address)
        except (OSError, zmq.ZMQError) as error:
            raise StartupError(f"No place for sockets: {error}") from error
        self._watching = asyncio.create_task(self._watch())
        asyncio.get_running_loop().add_reader(self._inbox.socket.fileno(), self._receive)
        for name in self.engines:
            self._start_worker(name, 1)

    def _start_worker(self, name: str, epoch: int) -> None:
        assert self.run_dir is not None
        engine = self.engines[name]
        if ready := self.ready.get(name):
            # It was there before, and what is free now is what it and the others have left: the pool it had is right.
            engine = msgspec.structs.replace(engine, kv_cache_memory=ready.pool.num_pages * ready.pool.page_bytes)
        inboxes = self.run_dir.address(f"{name}.{epoch}"), self.run_dir.address("frontend")
        spec = WorkerSpec(name, epoch, str(self.run_dir.path), *inboxes, engine, self._keys, self.launcher.host)
        self.processes[name] = self.launcher.start(spec, self._inbox.far)
        self._health.started(name, time.monotonic())

    async def add(self, name: str, engine: EngineConfig) -> None:
        """Start one more worker, and wait until it serves. Raises `StartupError`; then it is not there."""
        self.engines[name] = engine  # at once: its device is not for another one
        try:
            self.engines |= await asyncio.to_thread(self.launcher.prepare, {name: engine})
        except BaseException:
            del self.engines[name]
            raise
        self._start_worker(name, 1)
        while name not in self.ready and name not in self.failed and name in self.processes:
            await asyncio.sleep(WATCH_START_SECONDS)
        if name not in self.ready:
            reason = self.failed.get(name, "The server is shutting down.")
            if name in self.processes:
                await self.remove(name)
            raise StartupError(reason)

    async def remove(self, name: str) -> None:
        """End a worker for good."""
        self.send(name, Shutdown())
        address, process = self._address(name), self.processes.pop(name)
        for books in (self.ready, self._restarts, self.failed):
            books.pop(name, None)
        self._explained.discard(name)
        self._health.forget(name)
        await asyncio.to_thread(process.stop, 2.0)
        self._outboxes.forget(address)
        self.launcher.release(name)
        self.engines.pop(name, None)  # not before: its device is free now

    def _admit(self, name: str) -> None:
        """A worker is up: the owner makes it known to the others."""
        spec, ready = self.processes[name].spec, self.ready[name]
        self.failed.pop(name, None)
        self.up(Peer(name, spec.epoch, spec.address, ready.pool, spec.engine.role, ready.far))

    async def stop(self) -> None:
        """Tell the workers to leave, end those that do not, remove the run's directory. Safe at any time, and twice."""
        if self._watching is not None:
            asyncio.get_running_loop().remove_reader(self._inbox.socket.fileno())
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        for name in self.processes:
            self.send(name, Shutdown())
        await asyncio.gather(*(asyncio.to_thread(process.stop, 2.0) for process in self.processes.values()))
        self.processes.clear()
        if self.run_dir is not None:
            self._outboxes.close()
            self._context.destroy(linger=0)
            await asyncio.to_thread(self.launcher.close)
            self.run_dir.remove()
            self.run_dir = None

    def send(self, name: str, message: Message) -> None:
        """Queue a message for a worker; returns at once. A worker that is not there is none to wait for."""
        if name in self.processes:
            self._outboxes.send(self._address(name), message)

    def _address(self, name: str) -> str:
        """The inbox of a worker, as it is reached from here."""
        ready = self.ready.get(name)
        if ready is None or ready.pool.host == self.launcher.host:
            return self.processes[name].spec.address
        return ready.far

    def _receive(self) -> None:
        """Take in all that has come. The event loop calls it when something has since: ZeroMQ says that only once."""
        for envelope in self._inbox.receive():
            try:
                self._handle(envelope)
            except Exception:
                # Whatever is wrong with one message, the next ones are for other people's turns.
                log.exception("a %s from %s was not handled", type(envelope.body).__name__, envelope.sender)

    def _handle(self, envelope: Envelope) -> None:
        name, now = envelope.sender, time.monotonic()
        process = self.processes.get(name)
        if process is None or process.spec.epoch != envelope.epoch or name in self._restarts:
            return  # of an incarnation that is over
        match envelope.body:
            case Report() as report:
                self._health.heard(name, now)
                if self._started:
                    self.report(name, report)
            case Loading() as loading:
                self._health.heard(name, now)
                if not self._started:  # no progress is shown when a worker starts again
                    self.loading(name, loading)
            case Ready() as ready:
                self._health.ready(name, now)
                self.ready[name] = ready
                self._changed.set()
                if self._started:  # not the first start, which waits for all
                    self._admit(name)
            case StartFailed(reason, trace):
                if trace:
                    log.log(logging.ERROR if self._started else logging.DEBUG, "%s: %s", name, trace)
                self._explain(name, reason)

    def _explain(self, name: str, reason: str) -> None:
        self.failed[name] = reason
        self._explained.add(name)
        self._changed.set()

    async def _watch(self) -> None:
        while True:
            rest = WATCH_SECONDS if self._started else WATCH_START_SECONDS
            before = time.monotonic()
            await asyncio.sleep(rest)
            if (late := time.monotonic() - before - rest) > 1.0:
                # We were stopped, perhaps all of us: what workers have said meanwhile is still to be read.
                self._health.excuse(late)
            try:
                await self._bury_the_dead()
                self._replace(time.monotonic())
            except Exception:
                log.exception("the watch over the workers stumbled and goes on")

    async def _bury_the_dead(self) -> None:
        """End the silent, and tell of workers that have ended, whether or not they could still say why."""
        now = time.monotonic()
        broken = self._outboxes.broken()
        reasons = {name: "cannot be reached any more" for name in self.ready if self._address(name) in broken}
        for name, seconds in self._health.silent(now).items():
            if self.processes[name].placed:
                reasons[name] = f"was silent for {seconds:.0f} s"
            else:
                self._health.started(name, now)
        for name, reason in reasons.items():
            if name not in self.processes:
                continue  # removed meanwhile
            log.error("worker %s %s: it is ended", name, reason)
            self._explain(name, f"The worker {name} {reason} and was ended.")
            await asyncio.to_thread(self.processes[name].kill)
        for name, process in list(self.processes.items()):
            if name in self._restarts or (end := process.ended) is None:
                continue
            # What it still had to say may lie in the inbox: a reason is better than an exit code.
            await asyncio.sleep(0.1)
            if name not in self.processes:
                continue  # removed meanwhile
            if name not in self._explained:
                self._explain(name, f"The worker {name} {end}.")
            self._explained.remove(name)
            delay = self._health.died(name, now) if self._started else None
            self._restarts[name] = None if delay is None else now + delay
            what = "it is not started again" if delay is None else f"it is started again in {delay:g} s"
            if self._started:  # else it is what the command ends with
                log.error("worker %s is gone, %s: %s", name, what, self.failed[name])
            self._outboxes.forget(self._address(name))
            self.down(name, delay is not None)

    def _replace(self, now: float) -> None:
        for name, at in list(self._restarts.items()):
            if at is not None and at <= now:
                self._start_worker(name, self.processes[name].spec.epoch + 1)
                del self._restarts[name]  # not before: where no process could be made, that was no death
