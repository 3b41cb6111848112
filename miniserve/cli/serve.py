"""`miniserve serve`: start the workers, print the banner, serve, drain, leave nothing behind."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import time
from pathlib import Path

import uvloop
from starlette.types import ASGIApp
from uvicorn import Config, Server

from miniserve.api.race import Stopped, unless
from miniserve.cli.banner import LoadingLines, banner, say
from miniserve.cluster.launch import StartupError
from miniserve.config import ConfigError, ServeConfig, problem
from miniserve.dispatcher import Dispatcher
from miniserve.hub.check import generation_defaults
from miniserve.hub.resolve import ModelFiles
from miniserve.monitor.events import DecisionLog, Feed
from miniserve.sampling_params import ParameterError

BACKLOG = 2048
"""Clients that come while workers load wait for an answer instead of being refused."""
FLUSH_SECONDS = 2.0
"""How long clients have to take what is still on its way to them when the server ends."""


def serve(config: ServeConfig, files: ModelFiles) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises `ConfigError` if it cannot start."""
    # Before anything slow, so that an error about the port comes at once.
    listeners = [bind_path(config.uds)] if config.uds else bind(config.host, config.port)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, files, listeners))
    finally:
        for listener in listeners:
            listener.close()
        if config.uds:
            Path(config.uds).unlink(missing_ok=True)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at `port` (0: any) of `host`; localhost has an address of each kind. Raises `ConfigError`."""
    listeners: list[socket.socket] = []
    try:
        for name in ("127.0.0.1", "::1") if host == "localhost" else (host,):
            same = listeners[0].getsockname()[1] if listeners else port
            try:
                family, _, _, _, address = socket.getaddrinfo(name, same, type=socket.SOCK_STREAM)[0]
                both = address[0] == "::"  # every address of both kinds
                listeners.append(socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both))
            except OSError as error:
                if not listeners or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
    except OSError as error:
        for listener in listeners:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            if listeners and not port:  # free at one address, taken at the other
                return bind(host, port)
            raise ConfigError(problem("cli.port_taken", port=port, host=host)) from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"Port {port} is not open to this user: use --port 8000.") from error
        raise ConfigError(f"--host {host!r} cannot be listened at: {error.strerror or error}.") from error
    return listeners


def bind_path(path: str) -> socket.socket:
    """A Unix socket that listens at `path` for all users. One that was left behind makes way. Raises `ConfigError`."""
    file, listener = Path(path), socket.socket(socket.AF_UNIX)
    try:
        if file.is_socket() and not file.is_symlink():
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
                probe.settimeout(1)
                probe.connect(path)
                raise ConfigError(f"Another server listens at --uds {path}: give another path.")
            file.unlink()
        listener.bind(path)
        listener.listen(BACKLOG)
        file.chmod(0o666)  # like a port, it is open to every user of this machine
    except OSError as error:
        listener.close()
        raise ConfigError(f"--uds {path!r} cannot be listened at: {error.strerror or error}.") from error
    return listener


def heed(first: asyncio.Event, second: asyncio.Event) -> None:
    """Set the events at the first and second SIGTERM or SIGINT from now on, which libraries like Ray may have taken."""
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, lambda: (second if first.is_set() else first).set())


async def _serve(config: ServeConfig, files: ModelFiles, listeners: list[socket.socket]) -> int:
    drain, stop = asyncio.Event(), asyncio.Event()
    heed(drain, stop)
    progress = LoadingLines()
    log = DecisionLog(config.decision_log, config.policy, time.monotonic()) if config.decision_log else None
    client = Dispatcher(config, files, progress.show, [log.write] if log else [])
    feed = Feed(client.scheduler)
    client.observers.append(feed.note)
    started = time.monotonic()
    try:
        try:
            making = asyncio.to_thread(_http_server, config, files, client, feed)
            _, http = await unless(drain.wait(), asyncio.gather(client.start(), making))
        except Stopped:
            return 130
        except Exception as error:
            foreseen = isinstance(error, ConfigError | StartupError | ParameterError)
            logging.getLogger("miniserve").debug("the start failed", exc_info=not foreseen)
            broken = f"The server broke: {type(error).__name__}: {error} (--log-level debug shows where)."
            raise ConfigError(str(error) if foreseen else " ".join(broken.split())) from error
        finally:
            progress.end()
            heed(drain, stop)
        serving = asyncio.create_task(http.serve(sockets=listeners))
        with contextlib.suppress(OSError):
            bound = listeners[0].getsockname()[:2]
            print(banner(config, files, client, bound, time.monotonic() - started), flush=True)
        try:
            await unless(drain.wait(), asyncio.shield(serving))
        except Stopped:
            await _drain(config, client, feed, http, stop)
        http.should_exit = True
        http.force_exit = True
        await serving
        feed.close()
        await client.stop()  # ends requests that still run, each with an error
        # Close what is still open. A request whose body never came to its end then ends as if its client had gone.
        for connection in list(http.server_state.connections):
            connection.transport.abort()
        await _flushed(http)
        return 0
    finally:
        feed.close()
        await client.stop()
        if log:
            log.close()


def http_app(config: ServeConfig, files: ModelFiles, client: Dispatcher, feed: Feed) -> ASGIApp:
    """What answers requests, and all it needs. Raises `ConfigError` and `ParameterError`."""
    from miniserve.api.app import create_app
    from miniserve.api.service import Service
    from miniserve.text.grammar import Compiler
    from miniserve.text.tokenizer import Tokenizer

    defaults = generation_defaults(files.folder, config.generation_config)
    tokenizer = Tokenizer.load(files.folder, config.chat_template)
    return create_app(Service(config, client, tokenizer, defaults, Compiler(tokenizer)), feed)


def _http_server(config: ServeConfig, files: ModelFiles, client: Dispatcher, feed: Feed) -> Server:
    """The server, made while the workers load: imports alone take half a second. Raises as `http_app`."""
    from miniserve.api.middleware import Connection

    app = http_app(config, files, client, feed)
    level, shown = config.log_level, config.log_level in ("debug", "info")
    server = Server(Config(app, http=Connection, log_level=level, access_log=shown, lifespan="off"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]  # it leaves signals to us
    return server


async def _drain(config: ServeConfig, client: Dispatcher, feed: Feed, http: Server, stop: asyncio.Event) -> None:
    """Let running requests end, for a while, or until `stop`."""
    client.drain()
    if len(client.scheduler.turns):
        say(problem("cli.draining", active=len(client.scheduler.turns), seconds=config.shutdown_timeout))

    async def ended() -> None:
        while len(client.scheduler.turns):
            await asyncio.sleep(0.05)
        feed.close()  # the dashboard's streams of events count as requests, and would never end
        await _flushed(http)

    try:
        await unless(stop.wait(), asyncio.wait_for(ended(), config.shutdown_timeout))
    except (TimeoutError, Stopped):
        if len(client.scheduler.turns):
            say(f"Ending {len(client.scheduler.turns)} requests that still run.")


async def _flushed(http: Server) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FLUSH_SECONDS):
            while http.server_state.tasks:
                await asyncio.sleep(0.01)
