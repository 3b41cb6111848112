"""`miniserve serve` where it listens at something else than an address: a real process and a tiny model."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from miniserve.cli.serve import bind_path
from tests.monitor.test_vllm_dashboard import PANELS, asked, samples

pytestmark = pytest.mark.slow
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "ignore_eos": True}


@contextmanager
def serving(folder: Path, *flags: str, runtime: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str], str]]:
    """A server that listens, the rows of its banner and what it has said before."""
    command = [sys.executable, "-m", "miniserve", "serve", str(folder), "--served-model-name", "m", "--threads", "1"]
    with subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XDG_RUNTIME_DIR": str(runtime)},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            lines = list(iter(process.stdout.readline, "\n"))
            assert len(lines) > 5, process.stderr.read()
            rows = dict(re.split(r": +", line.strip(), maxsplit=1) for line in lines if re.match(r"[\w ]+: +", line))
            yield process, rows, "".join(lines)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_a_unix_socket_from_the_first_request_to_the_end(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    bind_path(str(path)).close()  # one that a server left behind
    flags = ["--uds", str(path), "--root-path", "/llm", "--allowed-origins", "*", "--enable-auto-tool-choice"]
    with serving(tiny_folder, *flags, "--tensor_parallel_size=1", runtime=tmp_path) as (_, rows, banner):
        assert rows["API"] == f"http://localhost/v1 at {path}"
        assert f"curl --unix-socket {path} http://localhost/v1/chat/completions" in banner
        with httpx.Client(
            transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=30
        ) as http:
            for at in ("", "/llm"):
                answer = http.post(f"{at}/v1/chat/completions", json=CHAT, headers={"Origin": "http://a"})
                assert answer.json()["usage"]["completion_tokens"] == 8
                assert answer.headers["access-control-allow-origin"] == "*"
            with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as stream:
                assert "data: [DONE]" in stream.read().decode()
            found = samples(http.get("/metrics").text)
        empty = [query for query in PANELS if not asked(query.replace('num_gpu_blocks="100"', ""), found, "m")]
        assert not empty, "no panel of vLLM's dashboards"
        [computed] = asked('vllm:iteration_tokens_total_sum{engine="d0"}', found, "m")
        [prompts] = asked('miniserve:worker_prompt_tokens_total{worker="d0"}', found, "m")
        assert computed >= prompts + 3 * 7, "prompts once, and each token but a turn's last is computed from"
        busy = asked('vllm:request_inference_time_seconds_sum{model_name="m"}', found, "m")[0]
        assert 0 < asked('vllm:request_prefill_time_seconds_sum{model_name="m"}', found, "m")[0] < busy
    assert not path.exists()


def test_localhost_is_reached_by_both_kinds_of_addresses(tiny_folder: Path, tmp_path: Path) -> None:
    with serving(tiny_folder, "--host", "localhost", "--port", "0", runtime=tmp_path) as (_, rows, _banner):
        port = int(re.fullmatch(r"http://localhost:(\d+)/v1", rows["API"])[1])
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        try:
            socket.create_connection(("::1", port), 5).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
        assert httpx.head(f"http://[::1]:{port}/v1/models").status_code == 200
