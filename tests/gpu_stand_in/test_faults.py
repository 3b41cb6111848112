"""CUDA refuses something: an engine that starts says what, and a worker that serves ends and is started again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_cuda.stand_in import StandIn

pytestmark = pytest.mark.long

SHAPE = {
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "num_hidden_layers": 2,
}
FLAGS = ["--load-format", "dummy", "--device", "cuda", "--max-model-len", "4096", "--kv-cache-memory", "16MiB"]
PATIENCE = 60.0
"""Seconds for a worker to end, and to load again."""


@pytest.fixture(scope="module")
def said(stand_in: StandIn) -> dict[str, Any]:
    result = stand_in.run("faults")
    assert not result.problems
    return result.found


@pytest.mark.parametrize(("fault", "words"), [("alloc", "out of memory"), ("host", "cudaErrorMemoryAllocation")])
def test_an_engine_that_gets_no_memory_says_so(said: dict[str, Any], fault: str, words: str) -> None:
    """Or it works without FlashInfer, and says why."""
    assert len(said[fault]) > 1
    assert not [line for line in said[fault] if words not in line]


@pytest.fixture(scope="module")
def fallbacks(stand_in: StandIn) -> dict[str, Any]:
    result = stand_in.run("fallback")
    assert result.problems == ["while a graph is recorded: cudaStreamSynchronize"] * 2
    return result.found


@pytest.mark.parametrize(
    ("fault", "reason"), [("waits", "CUDA error: cudaError 900"), ("no memory", "CUDA out of memory")]
)
def test_graphs_that_cannot_be_recorded_are_left_out(fallbacks: dict[str, Any], fault: str, reason: str) -> None:
    """In the middle of the third one, with nothing else changed; or that ends the start."""
    seen = fallbacks[fault]
    assert seen["sizes"] == [8, 4, 2]
    assert seen["same stream"]
    assert seen["kernels"] == f"flashinfer, without CUDA graphs: {reason}"
    assert seen["strict"].startswith(f"--strict-gpu does not let a worker serve with {seen['kernels']}. Mend that")


def test_a_strict_start_needs_flashinfer(fallbacks: dict[str, Any]) -> None:
    assert (
        "serve with torch, slower than native ones: FlashInfer has no kernels for float32 heads of 128. Mend"
        in (fallbacks["without FlashInfer"])
    )
    assert fallbacks["fine"] == "flashinfer"


def test_another_process_tries_out_whether_a_pool_can_be_mapped(fallbacks: dict[str, Any]) -> None:
    assert fallbacks["shared"] == [[0], ""]
    assert fallbacks["not mapped"] == [[], "cudaErrorMapBufferObjectFailed"]
    assert fallbacks["not exported"] == [[], "operation not supported"]


@pytest.fixture
def serve(stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Starts `miniserve serve` on the stand-in, with its words in `tmp_path / "stderr"`."""
    from miniserve.hub import resolve as hub
    from tests.support.server_process import server

    for name, value in stand_in.environment().items():
        monkeypatch.setenv(name, value)
    preset = hub.presets()["llama-3-8b"]
    folder = hub.dummy_folder(tmp_path, "llama", preset | {"config": preset["config"] | SHAPE})
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)

    @contextmanager
    def start(*flags: str) -> Iterator[Any]:
        with (
            (tmp_path / "stderr").open("wb") as words,
            server(folder, *FLAGS, *flags, runtime=runtime, stderr=words.fileno()) as running,
        ):
            yield running

    yield start
    stand_in.fault.unlink(missing_ok=True)


def ask(running: Any, length: int) -> str:
    """Why a completion of a prompt of so many tokens ended, or the error that the client got."""
    import openai

    prompt = [i % 500 + 10 for i in range(length)]
    try:
        reply = running.client.completions.create(model="m", prompt=prompt, max_tokens=8, timeout=PATIENCE)
        return str(reply.choices[0].finish_reason)
    except openai.OpenAIError as error:
        return f"{type(error).__name__}: {error}"


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("launch 0 1", "cudaErrorLaunchFailure"),
        ("alloc 0 1000", "CUDA out of memory"),
        ("host 0 1000", "cudaErrorMemoryAllocation"),
    ],
)
def test_a_worker_that_breaks_says_why_and_is_started_again(
    stand_in: StandIn, serve: Any, tmp_path: Path, fault: str, reason: str
) -> None:
    with serve() as running:
        assert ask(running, 20) == "length"
        before = running.workers[0].pid
        stand_in.fault.write_text(fault)
        ask(running, 3000)
        until(lambda: "is gone" in (tmp_path / "stderr").read_text())
        until(lambda: ask(running, 30) == "length")
        assert [worker.pid for worker in running.workers] != [before]
    words = (tmp_path / "stderr").read_text()
    (line,) = [line for line in words.splitlines() if "is gone" in line]
    assert "A worker broke" in line
    assert reason in line
    assert "it is started again" in line


def test_pages_of_a_pool_that_cannot_be_mapped_go_another_way(stand_in: StandIn, serve: Any, tmp_path: Path) -> None:
    """The banner says which, and why."""
    stand_in.fault.write_text("ipc 0 -1")
    with serve("--topology", "1P1D", "--policy", "conserve") as running:
        assert "transfer:    collective (sockets, CUDA IPC: cudaErrorMapBufferObjectFailed)" in running.banner
        assert ask(running, 2000) == "length"
        assert running.metric("miniserve:handoff_bytes_total") > 0
    assert "is gone" not in (tmp_path / "stderr").read_text()


def test_a_pool_that_cannot_be_mapped_ends_a_strict_start(stand_in: StandIn, serve: Any, tmp_path: Path) -> None:
    stand_in.fault.write_text("ipc 0 -1")
    with pytest.raises(AssertionError, match="it ended with 1"), serve("--topology", "1P1D", "--strict-gpu"):
        pass
    words = (tmp_path / "stderr").read_text()
    assert "--strict-gpu does not let a worker serve with a KV pool that no other process can map by CUDA IPC" in words
    assert "cudaErrorMapBufferObjectFailed" in words
    stand_in.fault.unlink()
    with serve("--strict-gpu") as running:
        assert "kernels:     flashinfer\n" in running.banner


def test_pages_go_from_one_process_to_another(serve: Any, tmp_path: Path) -> None:
    with serve("--topology", "1P1D", "--policy", "conserve") as running:
        assert ask(running, 2000) == "length"
        assert running.metric("miniserve:handoff_bytes_total") > 0
    assert "FAKE CUDA" not in (tmp_path / "stderr").read_text()
