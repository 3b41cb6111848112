"""`miniserve serve`: start the workers, say what is running, serve, drain, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Iterator
from typing import TypeVar

import uvicorn
import uvloop

from miniserve.api.app import create_app
from miniserve.api.heads import BoundedHeads
from miniserve.cluster.messages import Loading, Ready
from miniserve.cluster.supervisor import StartupError
from miniserve.config import ConfigError, ServeConfig, format_bytes
from miniserve.dispatcher import Dispatcher
from miniserve.hub.defaults import generation_defaults
from miniserve.hub.resolve import ModelFiles
from miniserve.monitor.decision_log import DecisionLog
from miniserve.monitor.events import Feed
from miniserve.sampling_params import ParameterError
from miniserve.text.tokenizer import Tokenizer

T = TypeVar("T")
FLUSH_SECONDS = 2.0
"""How long clients have to take what is still on its way to them when the server ends."""


class Stopped(Exception):
    """A signal asked to stop before the server was ready, or for the second time."""


def serve(config: ServeConfig, files: ModelFiles) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises `ConfigError` if it cannot start."""
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    # Before anything slow: a port that is taken should be told at once.
    listener = bind(config.host, config.port)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, files, listener))
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at `host` and `port` (0: any). Raises `ConfigError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Clients that come while workers load wait for an answer instead of being refused.
        listener.listen(2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} on {host} is taken: is another server running? Use another --port (0: any free one)."
            ) from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"Port {port} is not open to this user: use --port 8000.") from error
        raise ConfigError(f"--host {host!r} cannot be listened at: {error.strerror or error}.") from error
    listener.setblocking(False)
    return listener


class Signals:
    """SIGTERM and SIGINT: the first asks to drain, the second to stop."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._caught)

    def _caught(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    async def unless(self, event: asyncio.Event, work: Awaitable[T]) -> T:
        """The result of `work`. Raises `Stopped` if `event` comes first; `work` is cancelled then."""
        doing = asyncio.ensure_future(work)
        waiting = asyncio.create_task(event.wait())
        try:
            await asyncio.wait((doing, waiting), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise Stopped
            return doing.result()
        finally:
            doing.cancel()
            waiting.cancel()
            await asyncio.gather(doing, waiting, return_exceptions=True)


class HttpServer(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


async def _serve(config: ServeConfig, files: ModelFiles, listener: socket.socket) -> int:
    signals = Signals()
    progress = LoadingLines()
    log = DecisionLog(config.decision_log, config.policy, time.monotonic()) if config.decision_log else None
    client = Dispatcher(config, files, progress.show, [log.write] if log else [])
    feed = Feed(client.scheduler, config.policy)
    client.observers.append(feed.note)
    started = time.monotonic()
    try:
        try:
            defaults = generation_defaults(files.folder, config.generation_config)
            tokenizer, _ = await signals.unless(
                signals.first,
                asyncio.gather(asyncio.to_thread(_tokenizer, config, files), client.start()),
            )
        except (StartupError, ParameterError) as error:
            raise ConfigError(str(error)) from error
        except Stopped:
            return 130
        finally:
            progress.end()
        app = create_app(config, client, feed, tokenizer, defaults)
        http = HttpServer(
            uvicorn.Config(
                app,
                http=BoundedHeads,
                log_level=config.log_level,
                access_log=config.log_level in ("debug", "info"),
                lifespan="off",
            )
        )
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        with contextlib.suppress(OSError):
            print(banner(config, files, client, listener.getsockname()[1], time.monotonic() - started), flush=True)
        try:
            await signals.unless(signals.first, asyncio.shield(serving))
        except Stopped:
            await _drain(config, client, feed, http, signals)
        http.should_exit = True
        http.force_exit = True
        await serving
        feed.close()
        await client.stop()  # requests that still run are told so
        await _hang_up(http)
        return 0
    finally:
        feed.close()
        await client.stop()
        if log:
            log.close()


def _tokenizer(config: ServeConfig, files: ModelFiles) -> Tokenizer:
    """The tokenizer, and while nobody waits yet what compiles grammars for it. Raises `ParameterError`."""
    tokenizer = Tokenizer.load(files.folder, config.chat_template)
    _ = tokenizer.compiler
    return tokenizer


async def _drain(config: ServeConfig, client: Dispatcher, feed: Feed, http: HttpServer, signals: Signals) -> None:
    """Let running requests end, for a while."""
    client.drain()
    if client.scheduler.active:
        _say(
            f"Draining {client.scheduler.active} running requests for up to {config.shutdown_timeout:g} s; "
            "again to stop now."
        )

    async def ended() -> None:
        while client.scheduler.active:
            await asyncio.sleep(0.05)
        feed.close()  # nothing more happens; else those who listen would be waited for
        # What has been generated is still on its way to clients.
        await _tasks_ended(http, FLUSH_SECONDS)

    try:
        await signals.unless(signals.second, asyncio.wait_for(ended(), config.shutdown_timeout))
    except (TimeoutError, Stopped):
        if client.scheduler.active:
            _say(f"Ending {client.scheduler.active} requests that still run.")


async def _hang_up(http: HttpServer) -> None:
    """Close what is still open: a request that was never sent to its end then ends as with any client that goes."""
    for connection in list(http.server_state.connections):
        connection.transport.abort()
    await _tasks_ended(http, FLUSH_SECONDS)


async def _tasks_ended(http: HttpServer, seconds: float) -> None:
    """Wait for all requests to end, but no longer than that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while http.server_state.tasks:
                await asyncio.sleep(0.01)


def _say(line: str, end: str = "\n") -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more (`| tee` dies of Ctrl-C too): no reason to stop
        print(line, end=end, file=sys.stderr, flush=True)


# --- what a person sees ---------------------------------------------------------------------------------------------


class LoadingLines:
    """Progress of all workers on one line of a terminal; on anything else a line for each phase."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._state: dict[str, str] = {}
        self._width = 0

    def show(self, worker: str, loading: Loading) -> None:
        """A worker has come further."""
        percent = f" {100 * loading.done // loading.total}%" if loading.total else ""
        state = f"{worker}: {loading.phase}{percent}"
        if self._live:
            self._state[worker] = state
            line = "  ".join(self._state.values())
            _say(f"\r{line:<{self._width}}", end="")
            self._width = len(line)
        elif loading.done == 0:
            _say(state)

    def end(self) -> None:
        """Clear the line."""
        if self._live and self._width:
            _say(f"\r{'':<{self._width}}\r", end="")


def banner(config: ServeConfig, files: ModelFiles, client: Dispatcher, port: int, seconds: float) -> str:
    """What runs, how it was sized, how long it took, and how to use it."""
    name = config.served_model_names[0]
    first: Ready = next(iter(client.ready.values()))
    room = {worker: ready.pool.num_pages * ready.page_tokens for worker, ready in client.ready.items()}
    least = min(room.values())
    tokens = f"{least:,}" if len(set(room.values())) == 1 else f"{least:,} to {max(room.values()):,}"
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    phases: dict[str, float] = {}
    for ready in client.ready.values():  # workers load side by side: the slowest counts
        for phase, took in ready.phases.items():
            phases[phase] = max(phases.get(phase, 0.0), took)
    rows = {
        "model": f"{name} ({files.source})",
        "dtype": f"{first.dtype} on {places(client.ready)}, {first.threads} threads a worker",
        "kernels": first.kernels,
        "topology": f"{client.topology}, policy {client.policy_name}",
        "transfer": ways(client.transfer),
        "weights": f"{format_bytes(first.weights_bytes)} a worker",
        "KV cache": f"{tokens} tokens a worker: {first.kv_note}",
        "concurrency": f"{least / client.max_model_len:.1f} x {client.max_model_len:,} tokens a worker",
        "started in": f"{seconds:.1f} s ({', '.join(f'{phase} {took:.1f}' for phase, took in phases.items())})",
        "API": url,
        "dashboard": url.removesuffix("v1"),
    }
    key = ' -H "Authorization: Bearer YOUR_KEY"' if config.api_key else ""
    curl = (
        f"curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d "
        f'\'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\''
    )
    return "\n".join([*(f"{label + ':':<13}{text}" for label, text in rows.items()), "try:", f"  {curl}", ""])


def places(workers: dict[str, Ready]) -> str:
    """The devices; on GPUs who is where, and who shares one."""
    at: dict[str, list[str]] = {}
    for name, ready in workers.items():
        at.setdefault(ready.device, []).append(name)
    return ", ".join(
        f"{device} ({', '.join(names)}{' share its memory' if len(names) > 1 else ''})" if "cuda" in device else device
        for device, names in at.items()
    )


def ways(transfer: dict[tuple[str, str], str]) -> str:
    """How KV travels between workers, in one line: the usual way, and the pairs that have another one."""
    if not transfer:
        return "none needed"
    usual, _ = Counter(transfer.values()).most_common(1)[0]
    others = [f"{source}->{home} {how}" for (source, home), how in sorted(transfer.items()) if how != usual]
    return f"{usual} between all workers" + (f" but {', '.join(others)}" if others else "")
