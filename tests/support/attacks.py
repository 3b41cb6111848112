"""A server to attack, how requests and bytes are sent to it, and another client whose stream must go on meanwhile."""

from __future__ import annotations

import json
import re
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import dialects, tiny
from tests.support.server_process import Running, server

SECONDS = 20.0
"""The longest an answer may take; the machine may be a slow one that is shared."""
GAPS_BEFORE = 2000
"""How many gaps of the other client's stream are measured before the attacks."""


class Victim:
    """Another client: it streams, request after request, and notes the gaps between pieces."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.gaps: dict[str, list[float]] = {"before": [], "during": []}
        self.phase = "before"
        self.errors: list[str] = []
        self._thread.start()

    def _read(self) -> None:
        body = {"model": "m", "prompt": "Once upon", "max_tokens": 3000, "stream": True, "ignore_eos": True}
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                with client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
                    if answer.status_code != 200:
                        self.errors.append(f"status {answer.status_code}")
                        return
                    last = None
                    for line in answer.iter_lines():
                        if '"error"' in line:
                            self.errors.append(line)
                        if self._stop.is_set():
                            break
                        if not line:
                            continue
                        now = time.perf_counter()
                        if last is not None:
                            self.gaps[self.phase].append(now - last)
                        last = now

    def stop(self) -> None:
        """Hang up."""
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def attacked_server(root: Path) -> Iterator[Running]:
    """A server of a tiny model with tools, and room for long prompts."""
    folder = tiny.make_model(root / "tiny", "llama", max_len=8192)
    template = dialects.TEMPLATES["hermes"]
    flags = ["--kv-cache-memory", "32M", "--reasoning-parser", "none", "--chat-template", template]
    (root / "run").mkdir()
    with server(folder, *flags, runtime=root / "run") as running:
        yield running


@contextmanager
def streaming_victim(attacked: Running) -> Iterator[Victim]:
    """Another client's stream, which has gone on for a while already."""
    victim = Victim(attacked.url)
    wait_for(lambda: len(victim.gaps["before"]) >= GAPS_BEFORE, seconds=60)
    victim.phase = "during"
    yield victim
    if victim._thread.is_alive():
        victim.stop()


def wait_for(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def check_unharmed(attacked: Running, victim: Victim, capsys: pytest.CaptureFixture[str]) -> None:
    """The other client's stream has gone on throughout, and no page is left behind."""
    assert not victim.errors
    with capsys.disabled():
        print()
        for phase, gaps in victim.gaps.items():
            ordered = sorted(gaps)
            print(
                f"gaps between tokens {phase} the attacks: {len(ordered)}, "
                f"median {1e3 * statistics.median(ordered):.1f} ms, "
                f"p99 {1e3 * ordered[int(0.99 * len(ordered))]:.1f} ms, longest {1e3 * ordered[-1]:.0f} ms"
            )
    before, during = (sorted(victim.gaps[phase]) for phase in ("before", "during"))
    assert statistics.median(during) < 5 * statistics.median(before) + 0.02
    assert during[int(0.99 * len(during))] < 10 * before[int(0.99 * len(before))] + 0.1
    assert during[-1] < 3.0
    victim.stop()
    wait_for(lambda: attacked.metric("vllm:num_requests_running") == 0)
    wait_for(lambda: attacked.metric("miniserve:kv_pages", state="held") == 0)
    (worker,) = json.loads(attacked.get("/v1/workers"))["data"]
    pages = {name: attacked.metric("miniserve:kv_pages", state=name) for name in ("free", "cached", "held")}
    assert sum(pages.values()) == worker["kv"]["total"]
    assert len(attacked.workers) == 1, "the worker that was there at first"


# --- how attacks are sent ---------------------------------------------------------------------------------------------


def post(running: Running, path: str, body: Any) -> httpx.Response:
    """The answer to `body`, JSON text or what becomes it: soon, and never the server's failure."""
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    started = time.monotonic()
    answer = httpx.post(
        running.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=SECONDS
    )
    assert answer.status_code < 500 or answer.json()["error"]["code"] == "queue_full", answer.text
    assert time.monotonic() - started < SECONDS
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"]
        assert len(error["message"]) < 1000, "a clear error is a short one"
    return answer


def chat(running: Running, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
    return post(running, "/v1/chat/completions", {**body, **fields})


def raw(running: Running, data: bytes, wait: float = SECONDS, half_close: bool = False) -> list[int]:
    """The statuses of the answers to bytes that may be no HTTP, until the server hangs up or says nothing more."""
    got = b""
    with socket.create_connection(address(running), timeout=wait) as client:
        with suppress(OSError):  # it may hang up before all is sent
            client.sendall(data)
            if half_close:
                client.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            client.settimeout(1.0)
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline and (more := client.recv(65536)):
                got += more
    statuses = [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3})", got)]
    assert all(status < 500 for status in statuses), got[:500]
    return statuses


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def address(running: Running) -> tuple[str, int]:
    return "127.0.0.1", int(running.url.rsplit(":", 1)[1])
