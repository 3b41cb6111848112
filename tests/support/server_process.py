"""`miniserve serve` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil


class Running:
    """A server process and where it listens."""

    def __init__(self, process: subprocess.Popen, port: int, banner: str) -> None:
        self.process = process
        self.banner = banner
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    @property
    def workers(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children() if "miniserve.worker" in p.cmdline()]

    def get(self, path: str) -> str:
        return urllib.request.urlopen(self.url + path, timeout=10).read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have `labels`."""
        total = 0.0
        for line in self.get("/metrics").splitlines():
            if line.split("{")[0].split(" ")[0] == name and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total


@contextmanager
def server(folder: Path, *flags: str, runtime: Path, stderr: int | None = None) -> Iterator[Running]:
    """A server that is healthy. Its run directory lies in `runtime`, which must be empty when it has gone.

    Its workers have one thread each: there are other workers and the tests, and small models gain nothing from more.
    """
    command = [sys.executable, "-m", "miniserve", "serve", str(folder), "--served-model-name", "m", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--threads", "1", *flags],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | {"XDG_RUNTIME_DIR": str(runtime)},
    )
    try:
        assert process.stdout is not None
        port, banner = None, ""
        for line in process.stdout:
            banner += line
            if found := re.match(r"API: +http://127.0.0.1:(\d+)/v1", line):
                port = int(found[1])
            if line == "\n":
                break
        assert port is not None, f"it ended with {process.wait()}"
        running = Running(process, port, banner)
        assert running.get("/health")
        yield running
    finally:
        process.kill()
        process.wait()
