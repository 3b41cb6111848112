"""miniserve as an application of Ray Serve: a replica is the frontend of a whole cluster, whose workers are in the
other bundles of the placement group of the replica.

`serve run miniserve.serve_app:app model=llama-3-8b topology=1P1D`, or in a Serve config `import_path` and `args`: names
and values of flags of `miniserve serve`.
"""

from typing import Any, cast

import msgspec
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send

from miniserve.cli.main import asked, found, make_parser
from miniserve.cli.serve import http_app
from miniserve.config import ServeConfig, Topology
from miniserve.dispatcher import Dispatcher
from miniserve.monitor.events import Feed

MOST_REQUESTS = 10_000
"""Requests that Serve sends to a replica at a time: the scheduler queues, and says when there are too many."""


def app(args: dict[str, str]) -> serve.Application:
    """The application with the flags `args`. Raises `ConfigError`."""
    flags = [part for name, value in args.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    config = asked(make_parser().parse_args(["serve", *flags]))
    topology = config.topology or Topology(0, 1)
    kind = "CPU" if config.engine.device == "cpu" else "GPU"
    worker = {kind: float(config.engine.tensor_parallel_size)}
    config = msgspec.structs.replace(config, topology=topology, launcher="ray")
    deployment: Any = serve.deployment(
        serve.ingress(lambda: _replica(config))(),
        name="miniserve",
        max_ongoing_requests=MOST_REQUESTS,
        ray_actor_options={"num_cpus": 1},
        placement_group_bundles=[{"CPU": 1.0}, *([worker] * len(topology.roles))],
        placement_group_strategy=config.placement,
    )
    return cast(serve.Application, deployment.bind())


def _replica(config: ServeConfig) -> ASGIApp:
    """A replica's ASGI application, which starts its workers when Serve starts it."""
    files = found(config)
    client = Dispatcher(config, files)
    feed = Feed(client.scheduler)
    client.observers.append(feed.note)
    http = http_app(config, files, client, feed)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await http(scope, receive, send)
            return
        await receive()
        await client.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        feed.close()
        await client.stop()
        await send({"type": "lifespan.shutdown.complete"})

    return application
