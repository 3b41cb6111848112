"""What there is to see of a running server: the dashboard's page, live events, conversations, workers, metrics."""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from miniserve.api.errors import ApiError
from miniserve.api.fields import RequestBody
from miniserve.api.service import Service
from miniserve.api.streaming import EventStream, json_answer
from miniserve.cluster.launch import StartupError
from miniserve.config import ConfigError, Role, problem, tables
from miniserve.monitor.events import Feed
from miniserve.monitor.metrics import CONTENT_TYPE
from miniserve.monitor.views import MOST_LISTED, conversation_detail, conversation_list, worker_list
from miniserve.scheduler.scheduler import NoDecoder

FOLDER = Path(str(files("miniserve.monitor"))) / "dashboard"
HEADERS: dict[str, str] = tables("api/dashboard.toml")["headers"]


class WorkerRequest(RequestBody):
    """What the worker is for."""

    role: Literal["decoder", "prefiller"] = "decoder"


class Views:
    """The routes at which a running server is seen."""

    def __init__(self, service: Service, feed: Feed) -> None:
        self._service, self._client, self._feed = service, service.client, feed
        self._files = StaticFiles(directory=FOLDER)
        self._under_way: set[asyncio.Task] = set()

    async def page(self, request: Request, name: str = "index.html") -> Response:
        """The dashboard's page, or one of its files."""
        answer = await self._files.get_response(name, request.scope)
        answer.headers.update(HEADERS)
        return answer

    async def conversations(self, limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100) -> Response:
        """The conversations that are known, the latest first: where their KV lives, and how many turns they had."""
        return json_answer(conversation_list(self._client.scheduler, time.monotonic(), limit))

    async def conversation(self, conversation: str) -> Response:
        """One of them: what was observed of its last turns, and where their time went."""
        found = conversation_detail(self._client.scheduler, self._service.doctor.misses, conversation, time.monotonic())
        if found is None:
            raise ApiError(404, problem("api.no_conversation", key=conversation[:128]), code="conversation_not_found")
        return json_answer(found)

    async def workers(self) -> Response:
        """The workers that live: KV, load, what was measured of them, and of KV that went between them."""
        return json_answer(worker_list(self._client.scheduler, time.monotonic()))

    async def add_worker(self, body: WorkerRequest) -> Response:
        """Start one more worker. The answer comes when it serves."""
        try:
            name = await self._finish(self._client.add_worker(Role(body.role)))
        except (ConfigError, StartupError) as error:
            raise ApiError(409, f"No worker could be added: {error}", code="worker_not_added") from error
        every = worker_list(self._client.scheduler, time.monotonic())["data"]
        return json_answer(next(card for card in every if card["name"] == name))

    async def remove_worker(self, worker: str) -> Response:
        """Let a worker go: its turns end there, its conversations move to others. The answer comes when it has gone."""
        if worker not in self._client.scheduler.workers:
            raise ApiError(404, f"No worker {worker[:64]!r} serves: see GET /v1/workers.", code="worker_not_found")
        try:
            await self._finish(self._client.remove_worker(worker))
        except NoDecoder as error:
            raise ApiError(409, str(error), code="last_decoder") from error
        return json_answer({"id": worker, "object": "worker.deleted", "deleted": True})

    async def _finish(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Its result; it goes on if the client does not wait."""
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def examined(self) -> Response:
        """What each client's turns computed that earlier ones had computed already, and why."""
        return json_answer(self._service.doctor.report(self._client.scheduler.reuse))

    async def events(self) -> Response:
        """What happens, as server-sent events: decisions and outcomes when they are made, once a second workers and
        turns. A client that does not keep up loses the oldest events, and an event says how many."""

        async def live() -> AsyncGenerator[bytes, None]:
            with self._feed.listener() as listener:
                while events := await listener.take():
                    yield b"".join(events)

        return EventStream(live())

    async def metrics(self) -> Response:
        """Prometheus metrics."""
        return Response(self._service.metrics.render(), headers={"Content-Type": CONTENT_TYPE})
