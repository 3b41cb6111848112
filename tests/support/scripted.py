"""HTTP servers on the loopback that answer from a script."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from miniserve.cli.screen import Snapshot
from miniserve.monitor.views import conversation_list, worker_list
from tests.support.fake_engine import played


class Replies(BaseHTTPRequestHandler):
    """Answers requests; a subclass says how."""

    protocol_version = "HTTP/1.1"

    def reply(self, status: int, body: bytes) -> None:
        with contextlib.suppress(OSError):  # the client may have given up
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class ScriptedServer:
    """A server whose requests are answered by `replies`, in threads."""

    def __init__(self, replies: type[Replies], port: int = 0) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", port), replies)
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def snapshot(now: float = 1000.0) -> Snapshot:
    """What a server with two workers and five conversations says of itself."""
    scheduler = played(now)
    return Snapshot(worker_list(scheduler, now), conversation_list(scheduler, now, 100))


class WatchedServer(ScriptedServer):
    """A server with the answers of `snapshot()`, or what `answer` gives for a path: a status and a body."""

    def __init__(self, port: int = 0) -> None:
        seen = snapshot()
        bodies = {"/v1/workers": seen.workers, "/conversations": seen.conversations}
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.answer: Callable[[str], tuple[int, bytes]] = lambda path: (200, json.dumps(bodies[path]).encode())
        script = self

        class Answers(Replies):
            def do_GET(self) -> None:
                script.paths.append(self.path)
                script.keys.append(self.headers["Authorization"])
                self.reply(*script.answer(self.path.partition("?")[0]))

        super().__init__(Answers, port)
