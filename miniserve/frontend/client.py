"""The frontend's end of the cluster: starts the workers, runs the scheduler, and turns its deliveries into streams."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable

import msgspec
import zmq
import zmq.asyncio

from miniserve.cluster.channels import Outboxes, decode
from miniserve.cluster.health import Health
from miniserve.cluster.launch import RunDir, WorkerProcess, WorkerSpec
from miniserve.cluster.messages import (
    Envelope,
    Failed,
    Loading,
    Peer,
    Ready,
    Report,
    Shutdown,
    TurnOutput,
    WorkerStats,
)
from miniserve.config import ServeConfig
from miniserve.hub import ModelFiles
from miniserve.sampling import ParameterError, SamplingParams
from miniserve.scheduler.policies import POLICIES
from miniserve.scheduler.scheduler import (
    Command,
    Deliver,
    HandoffTotals,
    NoDecoder,
    QueueIsFull,
    Scheduler,
    Send,
)

log = logging.getLogger("miniserve.client")

TICK_SECONDS = 0.5


class EngineError(RuntimeError):
    """The engine cannot serve now."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class QueueFull(EngineError):
    """Too many requests wait already; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class StartupError(RuntimeError):
    """A worker could not start; the message is for a person."""


class Turn:
    """One running request. Iterating gives its outputs in order; the last one has `finish` set."""

    def __init__(self, id: str, cancel: Callable[[str], None]) -> None:
        self.id = id
        self._cancel = cancel
        self._outputs: asyncio.Queue[TurnOutput] = asyncio.Queue()
        self._ended = False

    def put(self, output: TurnOutput) -> None:
        """Called with each output, in order."""
        if not self._ended:
            self._ended = output.finish is not None
            self._outputs.put_nowait(output)

    def cancel(self) -> None:
        """Stop generating and free the KV at once. Does nothing when the turn has ended."""
        if not self._ended:
            self.put(TurnOutput(self.id, -1, [], finish="abort"))
            self._cancel(self.id)

    async def __aiter__(self) -> AsyncIterator[TurnOutput]:
        while True:
            output = await self._outputs.get()
            yield output
            if output.finish is not None:
                return


class EngineClient:
    """Owns the worker processes and the scheduler. All methods belong to one event loop; nothing here blocks it.

    After `start`, `ready` holds each worker's facts and `transfer` how KV travels between each prefiller and decoder.
    """

    def __init__(
        self, config: ServeConfig, files: ModelFiles, on_progress: Callable[[str, Loading], None] | None = None
    ) -> None:
        self.ready: dict[str, Ready] = {}
        self.transfer: dict[tuple[str, str], str] = {}
        self.policy_name = config.policy
        self.max_model_len = 0
        self.vocab_size = 0
        self._config = config
        self._engine = msgspec.structs.replace(
            config.engine, model=str(files.folder.resolve()), workers=len(config.topology.workers)
        )
        self._on_progress = on_progress or (lambda worker, loading: None)
        self._scheduler = Scheduler(
            POLICIES[config.policy](), config.engine.block_size, config.engine.max_num_seqs, config.max_num_queued_reqs
        )
        self._run_dir: RunDir | None = None
        self._processes: dict[str, WorkerProcess] = {}
        self._turns: dict[str, Turn] = {}
        self._failed: dict[str, str] = {}
        self._restarts: dict[str, float | None] = {}
        """Workers that are dead, and when each will be started again; None: no more."""
        self._health = Health(config.worker_timeout)
        self._tasks: list[asyncio.Task] = []
        self._changed = asyncio.Event()
        self._draining = self._stopped = False

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Spawn the workers and wait until all are ready. Raises `StartupError`; then nothing is left running."""
        try:
            self._spawn()
            while len(self.ready) < len(self._processes):
                await self._changed.wait()
                self._changed.clear()
                if self._failed:
                    # The same model and flags everywhere: one worker's reason is that of all.
                    raise StartupError(next(iter(self._failed.values())))
        except BaseException:
            await self.stop()
            raise
        self._join()

    def _spawn(self) -> None:
        try:
            self._run_dir = RunDir()
        except OSError as error:
            raise StartupError(f"No directory for sockets: {error}") from error
        self._context = zmq.asyncio.Context()
        self._outboxes = Outboxes(zmq.Context.shadow(self._context), "frontend", 0)
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.set_hwm(0)
        address = self._run_dir.address("frontend")
        self._inbox.bind(address)
        for name in self._config.topology.workers:
            self._start_worker(name, 1)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._tick())]

    def _start_worker(self, name: str, epoch: int) -> None:
        assert self._run_dir is not None
        spec = WorkerSpec(
            name=name,
            epoch=epoch,
            run_dir=str(self._run_dir.path),
            address=self._run_dir.address(f"{name}.{epoch}"),
            frontend=self._run_dir.address("frontend"),
            engine=self._engine,
        )
        self._processes[name] = WorkerProcess(spec)

    def _admit(self, name: str) -> None:
        """A worker is up: make it known to the others and to the scheduler."""
        spec = self._processes[name].spec
        self._failed.pop(name, None)
        self._health.heard(name, time.monotonic())
        peer = Peer(name, spec.epoch, spec.address, self.ready[name].pool)
        self._carry_out(self._scheduler.worker_up(peer, prefiller=name.startswith("p")))

    def _join(self) -> None:
        """All workers are up for the first time."""
        first = next(iter(self.ready.values()))
        self.max_model_len, self.vocab_size = first.max_model_len, first.vocab_size
        for name in self.ready:
            self._admit(name)
        prefillers = [name for name in self.ready if name.startswith("p")]
        for source in prefillers:
            for home in self.ready.keys() - set(prefillers):
                mapped = self.ready[source].pool.fd >= 0 and self.ready[home].pool.fd >= 0
                self.transfer[source, home] = "mapped" if mapped else "none (prefills at home)"

    def drain(self) -> None:
        """Let no new requests in; those that run go on, with all the turns they still want to submit."""
        self._draining = True

    async def stop(self) -> None:
        """End all turns, stop the workers, remove the run's directory. Safe to call at any time, and twice."""
        self._draining = self._stopped = True
        for turn in list(self._turns.values()):
            turn.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for process in self._processes.values():
            self._outboxes.send(process.spec.address, Shutdown())
        await asyncio.gather(*(asyncio.to_thread(process.stop, 2.0) for process in self._processes.values()))
        self._clean_up()

    def kill(self) -> None:
        """Stop everything now, whatever is running."""
        self._draining = self._stopped = True
        for process in self._processes.values():
            process.kill()
        self._clean_up()

    def _clean_up(self) -> None:
        self._processes.clear()
        if self._run_dir is not None:
            self._outboxes.close()
            self._inbox.close(0)
            self._context.term()
            self._run_dir.remove()
            self._run_dir = None

    # --- turns ------------------------------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Raises `QueueFull` or `EngineError` where a new request should not be let in."""
        if self._draining:
            raise EngineError(self.unhealthy_reason)
        try:
            self._scheduler.check_room(time.monotonic())
        except QueueIsFull as error:
            raise QueueFull(str(error), error.retry_after) from error

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        conversation: str = "",
        salt: str = "",
        request_id: str = "",
    ) -> Turn:
        """Start a turn: one choice, `params.n` does not count. `max_tokens` None means up to the context's end.

        Raises `EngineError`, or `ParameterError` for a prompt that leaves no room for an output.
        """
        if not 0 < len(tokens) < self.max_model_len:
            raise ParameterError(
                "prompt", f"The prompt has {len(tokens)} tokens; the maximum context length is {self.max_model_len}."
            )
        if self._stopped:
            raise EngineError(self.unhealthy_reason)
        turn = Turn(f"{request_id or 'turn'}-{uuid.uuid4().hex[:12]}", self._cancel)
        seed = uuid.uuid4().int >> 65 if params.seed is None else params.seed
        self._turns[turn.id] = turn
        try:
            commands = self._scheduler.submit(turn.id, tokens, params, seed, conversation, salt, time.monotonic())
        except NoDecoder as error:
            del self._turns[turn.id]
            raise EngineError(self.unhealthy_reason or str(error)) from error
        self._carry_out(commands)
        return turn

    def _cancel(self, turn: str) -> None:
        self._turns.pop(turn, None)
        self._carry_out(self._scheduler.cancel(turn, time.monotonic()))

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(worker, message):
                    if process := self._processes.get(worker):
                        self._outboxes.send(process.spec.address, message)
                case Deliver(name, output):
                    turn = self._turns.get(name)
                    if output.finish is not None:
                        self._turns.pop(name, None)
                    if turn is not None:
                        turn.put(output)

    # --- what is going on -------------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        """Whether new turns can be served."""
        return not self.unhealthy_reason

    @property
    def unhealthy_reason(self) -> str:
        """Empty while all workers that are needed live."""
        if self._draining:
            return "The server is shutting down."
        if self._scheduler.decoders:
            return ""
        if not self.max_model_len:
            return "The workers are starting."
        dead = ", ".join(f"{name}: {reason.rstrip('.')}" for name, reason in self._failed.items())
        what = "one is being started again" if self._scheduler.can_serve else "restart the server"
        return f"No decoder is alive, {what} ({dead})."

    @property
    def stats(self) -> dict[str, WorkerStats]:
        """The latest snapshot of each worker."""
        return self._scheduler.stats

    @property
    def handoffs(self) -> dict[tuple[str, str], HandoffTotals]:
        """(from, to) -> totals of KV moved."""
        return self._scheduler.handoffs

    @property
    def placements(self) -> dict[tuple[str, str], int]:
        """(prefilled at, home) -> turns."""
        return self._scheduler.placements

    @property
    def queued(self) -> int:
        """Turns that wait for a placement."""
        return self._scheduler.queued

    @property
    def running(self) -> int:
        """Turns placed on workers."""
        return self._scheduler.active - self._scheduler.queued

    @property
    def active(self) -> int:
        """Turns that wait or run."""
        return self._scheduler.active

    # --- background -------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            data = await self._inbox.recv()
            try:
                envelope = decode(data)
            except msgspec.MsgspecError as error:
                log.error("dropped a message that is none of ours: %s", error)
                continue
            try:
                self._handle(envelope)
            except Exception:
                # Whatever is wrong with one message, the next ones are for other people's turns.
                log.exception("a %s from %s was not handled", type(envelope.body).__name__, envelope.sender)

    def _handle(self, envelope: Envelope) -> None:
        process = self._processes.get(envelope.sender)
        if process is None or process.spec.epoch != envelope.epoch or envelope.sender in self._restarts:
            return  # of an incarnation that is over
        match envelope.body:
            case Report() as report:
                self._health.heard(envelope.sender, time.monotonic())
                self._carry_out(self._scheduler.on_report(envelope.sender, report, time.monotonic()))
            case Loading() as loading:
                if not self.max_model_len:  # nobody looks at a bar any more when a worker starts again
                    self._on_progress(envelope.sender, loading)
            case Ready() as ready:
                self.ready[envelope.sender] = ready
                self._changed.set()
                if self.max_model_len:  # not the first start, which waits for all
                    self._admit(envelope.sender)
            case Failed(reason):
                self._failed[envelope.sender] = reason
                self._changed.set()

    async def _tick(self) -> None:
        """Watch the processes; give the scheduler its time."""
        while True:
            await asyncio.sleep(TICK_SECONDS if self.max_model_len else 0.1)
            try:
                await self._bury_the_dead()
                self._carry_out(self._scheduler.on_tick(time.monotonic()))
            except Exception:
                log.exception("the watch over the workers stumbled and goes on")

    async def _bury_the_dead(self) -> None:
        """Tell the scheduler of workers that have ended, whether or not they could still say why, and replace them."""
        now = time.monotonic()
        for name in self._health.silent(now):
            log.error("worker %s has been silent for %g s: it is ended", name, self._config.worker_timeout)
            await asyncio.to_thread(self._processes[name].kill)
        for name, process in list(self._processes.items()):
            if name in self._restarts or (code := process.exit_code) is None:
                continue
            # What it still had to say may lie in the inbox: a reason is better than an exit code.
            await asyncio.sleep(0.1)
            self._failed.setdefault(name, f"The worker {name} ended with exit code {code}.")
            self._changed.set()
            delay = self._health.died(name, now) if self.max_model_len else None
            self._restarts[name] = None if delay is None else now + delay
            what = "it is not started again" if delay is None else f"it is started again in {delay:g} s"
            log.error("worker %s is gone, %s: %s", name, what, self._failed[name])
            self._outboxes.forget(process.spec.address)
            self._carry_out(self._scheduler.worker_down(name, returns=delay is not None))
        for name, at in list(self._restarts.items()):
            if at is not None and at <= now:
                del self._restarts[name]
                self._start_worker(name, self._processes[name].spec.epoch + 1)
