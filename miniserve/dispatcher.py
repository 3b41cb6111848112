"""Runs the scheduler over the workers of a cluster, and makes streams of what it delivers."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from itertools import permutations

import msgspec

from miniserve.cluster.devices import one_more, place
from miniserve.cluster.launch import Launcher
from miniserve.cluster.messages import Ended, Failed, Loading, Report, TurnOutput
from miniserve.cluster.supervisor import Supervisor
from miniserve.config import ConfigError, Role, ServeConfig, problem
from miniserve.hub.resolve import ModelFiles
from miniserve.kv.transfer.interface import way
from miniserve.sampling_params import ParameterError, SamplingParams
from miniserve.scheduler.baselines import make_policy
from miniserve.scheduler.conversation import UNSAID, Change, Said
from miniserve.scheduler.scheduler import NoDecoder, Scheduler
from miniserve.scheduler.turns import Command, Deliver, Note, Record, Send

log = logging.getLogger("miniserve.dispatcher")

TICK_SECONDS = 0.5
RETIRE_SECONDS = 0.05
"""Between two looks at whether a worker has nothing left to do."""


class EngineError(RuntimeError):
    """The engine cannot serve now."""


@dataclass(eq=False)
class TurnStream:
    """The outputs of one turn, in order, `Ended` or `Failed` last. It is turn number `number` of the conversation with
    the key `conversation`, as the scheduler found; `change` is how its prompt differs from what it could begin with."""

    id: str
    _cancel: Callable[[str], None]
    conversation: str | int = ""
    number: int = 0
    change: Change | None = None
    _outputs: asyncio.Queue[TurnOutput] = field(default_factory=asyncio.Queue)
    _ended: bool = False

    def put(self, output: TurnOutput) -> None:
        """Add the next output; ignored after the last one."""
        if not self._ended:
            self._ended = isinstance(output, Ended | Failed)
            self._outputs.put_nowait(output)

    def cancel(self) -> None:
        """Stop generating and free the KV at once. Does nothing when the turn has ended."""
        if not self._ended:
            self.put(Ended(self.id, -1, [], finish="abort"))
            self._cancel(self.id)

    async def __aiter__(self) -> AsyncIterator[TurnOutput]:
        while True:
            output = await self._outputs.get()
            yield output
            if isinstance(output, Ended | Failed):
                return


class Dispatcher:
    """Owns the scheduler and the streams of its turns, and has the workers started, on an event loop it never blocks.
    After `start`, `ready` holds each worker's facts. `observers` get a record of each decision and outcome, those added
    later while `scheduler.notes` is set. Raises `ConfigError` for devices or a policy that cannot be."""

    def __init__(
        self,
        config: ServeConfig,
        files: ModelFiles,
        on_progress: Callable[[str, Loading], None] = lambda worker, loading: None,
        observers: Iterable[Callable[[Record], None]] = (),
    ) -> None:
        self.max_model_len = 0
        self.vocab_size = 0
        self.observers = list(observers)
        self.watchers: list[Callable[[str, Report], None]] = []
        """Called with each report of a worker."""
        self._kv_transfer = config.engine.kv_transfer
        policy = make_policy(config.policy, config.mispredict)
        stretch = policy.step_stretch if config.engine.step_stretch is None else config.engine.step_stretch
        engine = msgspec.structs.replace(config.engine, model=str(files.folder.resolve()), step_stretch=stretch)
        self.scheduler = Scheduler(policy, engine.block_size, engine.max_num_seqs, config.max_num_queued_reqs)
        self.scheduler.notes = bool(self.observers)
        elsewhere = config.launcher == "ray"
        self.topology, engines = place(config.topology, config.devices, engine, elsewhere=elsewhere)
        self.workers = Supervisor(
            engines,
            config.worker_timeout,
            _launcher(config) if elsewhere else Launcher(),
            up=lambda peer: self._carry_out(self.scheduler.worker_up(peer, now=time.monotonic())),
            down=self._worker_down,
            report=self._on_report,
            loading=on_progress,
        )
        self.ready = self.workers.ready
        self._streams: dict[str, TurnStream] = {}
        self._ticking: asyncio.Task | None = None
        self._added = 0
        """Workers that were added since the start."""
        self._draining = self._stopped = False

    async def start(self) -> None:
        """Spawn the workers and wait until all are ready. Raises `StartupError`; then nothing is left running."""
        await self.workers.start()
        first = next(iter(self.ready.values()))
        self.max_model_len, self.vocab_size = first.max_model_len, first.vocab_size
        self._ticking = asyncio.create_task(self._tick())

    def drain(self) -> None:
        """Refuse new requests; those that run go on, with all the turns they still want to submit."""
        self._draining = True

    async def stop(self) -> None:
        """End all turns, stop the workers, remove the run's directory. Safe to call at any time, and twice."""
        self._draining = self._stopped = True
        for stream in list(self._streams.values()):
            stream.cancel()
        if self._ticking is not None:
            self._ticking.cancel()
        await self.workers.stop()

    async def add_worker(self, role: Role) -> str:
        """Start one more worker; its name, once it serves. Raises `ConfigError`, and `StartupError` if it does not."""
        self._added += 1
        name = f"{role.value[0]}{len(self.topology.roles) + self._added}"
        await self.workers.add(name, one_more(self.workers.engines, role))
        return name

    async def remove_worker(self, name: str) -> None:
        """Let a worker go: its turns end, its conversations move. Raises `NoDecoder`, at once, for the last decoder."""
        self._carry_out(self.scheduler.retire(name, time.monotonic()))
        while not self.scheduler.retired(name):
            await asyncio.sleep(RETIRE_SECONDS)
        if name in self.ready:  # else it is removed already
            await self.workers.remove(name)
            self._worker_down(name, returns=False)

    def check_room(self) -> None:
        """Raises `QueueFull` or `EngineError` where a new request should be refused."""
        if self._draining:
            raise EngineError(self.unhealthy_reason)
        self.scheduler.check_room(time.monotonic())

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        *,
        conversation: str | int = "",
        salt: str = "",
        request_id: str = "",
        said: Said = UNSAID,
    ) -> TurnStream:
        """Start a turn: one choice, `params.n` does not count. `max_tokens` None means up to the context's end.
        `conversation` is the client's key or a former turn's, if any; `said` is what else the client says of the turn.
        Raises `EngineError`, or `ParameterError` for a prompt that leaves no room for an output."""
        if not 0 < len(tokens) < self.max_model_len:
            raise ParameterError("prompt", problem("llm.long_prompt", tokens=len(tokens), limit=self.max_model_len))
        if self._stopped:
            raise EngineError(self.unhealthy_reason)
        stream = TurnStream(f"{request_id or 'turn'}-{uuid.uuid4().hex[:12]}", self._cancel)
        seed = uuid.uuid4().int >> 65 if params.seed is None else params.seed
        try:
            now = time.monotonic()
            commands = self.scheduler.submit(stream.id, tokens, params, seed, conversation, salt, now, said)
        except NoDecoder as error:
            raise EngineError(self.unhealthy_reason or str(error)) from error
        self._streams[stream.id] = stream
        if (turn := self.scheduler.turns.get(stream.id)) is not None:
            stream.conversation, stream.number, stream.change = turn.conversation.key, turn.number, turn.change
        self._carry_out(commands)
        return stream

    def _cancel(self, turn: str) -> None:
        self._streams.pop(turn, None)
        self._carry_out(self.scheduler.cancel(turn, time.monotonic()))

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Send(worker, message):
                    self.workers.send(worker, message)
                case Note(record):
                    for observe in self.observers:
                        observe(record)
                case Deliver(turn, output):
                    stream = self._streams.get(turn)
                    if isinstance(output, Ended | Failed):
                        self._streams.pop(turn, None)
                    if stream is not None:
                        stream.put(output)

    @property
    def unhealthy_reason(self) -> str:
        """Empty while all workers that are needed live."""
        if self._draining:
            return "The server is shutting down."
        if self.scheduler.cluster.decoders:
            return ""
        if not self.max_model_len:
            return "The workers are starting."
        dead = ", ".join(f"{name}: {reason.rstrip('.')}" for name, reason in self.workers.failed.items())
        what = "one is being started again" if self.scheduler.can_serve else "restart the server"
        return f"No decoder is alive, {what} ({dead})."

    @property
    def transfer(self) -> dict[tuple[str, str], str]:
        """(from, to) -> how KV travels, for all pairs: a conversation's history may move from any worker to any."""

        def how(source: str, home: str) -> str:
            one, other = self.ready[source].pool, self.ready[home].pool
            kind = way(one, other, self._kv_transfer)
            why = next((f", CUDA IPC: {p.cuda.refused}" for p in (one, other) if p.cuda and p.cuda.refused), "")
            if kind is None or kind == "mapped":
                return kind or f"none (prefills at home{why})"
            why = (why or ", their GPUs cannot read each other") if self._kv_transfer == "auto" else ""
            why = ", between hosts" if one.host != other.host else why
            return f"collective ({'NCCL' if kind == 'nccl' else kind}{why})"

        return {(source, home): how(source, home) for source, home in permutations(self.ready, 2)}

    def _worker_down(self, name: str, returns: bool) -> None:
        self._carry_out(self.scheduler.worker_down(name, returns=returns, now=time.monotonic()))

    def _on_report(self, name: str, report: Report) -> None:
        self._carry_out(self.scheduler.on_report(name, report, time.monotonic()))
        for watch in self.watchers:
            watch(name, report)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                self._carry_out(self.scheduler.on_tick(time.monotonic()))
            except Exception:
                log.exception("the scheduler stumbled and goes on")


def _launcher(config: ServeConfig) -> Launcher:
    """Raises `ConfigError` where Ray is not installed, `StartupError` where there is no cluster."""
    try:
        from miniserve.cluster.ray_launcher import RayLauncher
    except ImportError as error:
        raise ConfigError("--launcher ray needs Ray: pip install 'miniserve[ray]' on all hosts.") from error
    return RayLauncher(config.ray_address, config.placement, config.advertise_host)
