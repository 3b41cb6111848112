"""`miniserve serve` as users run it: real processes, a real socket, the stock OpenAI client, the default model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import openai
import psutil
import pytest
import torch

from miniserve.cli.banner import places, ways
from tests.support.server_process import Running, server

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is the capital of France? Answer in one sentence.",
    "And which river flows through it?",
    "Name three other cities in that country.",
    "Write one sentence about the first of them.",
    "Thank you! What did I ask you first?",
]


def gone(processes: list[psutil.Process], runtime: Path) -> bool:
    """Whether all `processes` end soon, and no socket is left."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    return not alive and not list(runtime.glob("miniserve-*/*"))


# --- the default model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_folder, tmp_path_factory):
    runtime = tmp_path_factory.mktemp("run")
    flags = ["--topology", "1P1D", "--policy", "conserve", "--dtype", "float32"]
    with server(smollm2_folder, *flags, "--max-model-len", "2048", runtime=runtime) as running:
        yield running


def test_five_turns_move_once_and_equal_transformers(smollm2, smollm2_plain):
    """The stock client, streaming, resending its history: the KV moves once, later turns find theirs, and the text is
    what transformers says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_plain, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_plain)
    messages: list[dict] = []
    prompt_tokens = pages = 0
    for number, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question})
        stream = smollm2.client.chat.completions.create(
            model="m",
            messages=messages,
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        usage = chunks[-1].usage
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert usage.prompt_tokens == len(ids)
        with torch.inference_mode():
            want = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :]
        assert text == tokenizer.decode(want, skip_special_tokens=True)
        cached = usage.prompt_tokens_details.cached_tokens
        if number == 0:
            assert cached == 0
        else:
            assert cached >= prompt_tokens // 16 * 16
        prompt_tokens = usage.prompt_tokens
        messages.append({"role": "assistant", "content": text})
        pages = pages or -(-len(ids) // 16)
    assert "Paris" in messages[1]["content"]
    assert smollm2.metric("miniserve:handoffs_total", source="p0", destination="d0") == 1
    assert smollm2.metric("miniserve:handoff_pages_total") == pages
    assert smollm2.metric("miniserve:handoff_bytes_total") == pages * 16 * 30 * 2 * 3 * 64 * 4
    assert smollm2.metric("miniserve:placements_total", prefill_worker="p0", home="d0") == 1
    assert smollm2.metric("miniserve:placements_total", prefill_worker="d0", home="d0") == 4
    assert smollm2.metric("vllm:request_success_total") == 5


@pytest.mark.parametrize("stream", [False, True])
def test_responses_go_on_where_their_kv_is(smollm2, stream):
    """With the stock client: only what is new is sent and computed, in one conversation; a chat would say the same."""
    client, ask = smollm2.client, {"model": "m", "temperature": 0, "max_output_tokens": 24}
    before, history, known = None, [], 0
    for question in QUESTIONS[:3]:
        question = f"{question} ({stream})"  # a conversation of this test's own
        history.append({"role": "user", "content": question})
        if stream:
            with client.responses.stream(input=question, previous_response_id=before, **ask) as events:
                answer = events.until_done().get_final_response()
        else:
            answer = client.responses.create(input=question, previous_response_id=before, **ask)
        cached = answer.usage.input_tokens_details.cached_tokens
        assert cached >= known // 16 * 16
        before, known = answer.id, answer.usage.total_tokens - 1
        chat = client.chat.completions.create(messages=history, model="m", temperature=0, max_tokens=24)
        assert chat.choices[0].message.content == answer.output_text
        history.append({"role": "assistant", "content": answer.output_text})
    assert cached > 0


def test_a_disconnect_frees_the_kv(smollm2):
    stream = smollm2.client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Count to one thousand."}],
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _, chunk in zip(range(4), stream, strict=False):  # the first one says only who speaks
        assert chunk.choices
    assert smollm2.metric("vllm:num_requests_running") == 1
    assert smollm2.metric("miniserve:kv_pages", state="held") > 0
    stream.close()
    deadline = time.monotonic() + 5
    while smollm2.metric("miniserve:kv_pages", state="held") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert smollm2.metric("miniserve:kv_pages", state="held") == 0
    assert smollm2.metric("vllm:num_requests_running") == 0


def test_n_choices_and_logprobs(smollm2):
    answer = smollm2.client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Say a colour."}],
        n=3,
        seed=1,
        temperature=1.5,
        max_tokens=12,
        logprobs=True,
        top_logprobs=2,
    )
    texts = [c.message.content for c in answer.choices]
    assert len(set(texts)) > 1
    again = smollm2.client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Say a colour."}],
        n=3,
        seed=1,
        temperature=1.5,
        max_tokens=12,
    )
    assert [c.message.content for c in again.choices] == texts
    for choice in answer.choices:
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)


# --- ends -----------------------------------------------------------------------------------------------------------


def long_stream(running: Running) -> tuple[threading.Thread, list]:
    """A stream of eight choices of 500 tokens in a thread, a second or more; its chunks, the last one an exception if
    there was one."""
    chunks: list = []

    def read() -> None:
        try:
            for chunk in running.client.completions.create(
                model="m", prompt="abc", max_tokens=500, n=8, stream=True, extra_body={"ignore_eos": True}
            ):
                chunks.append(chunk)
        except Exception as error:
            chunks.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while not chunks:
        time.sleep(0.01)
    return thread, chunks


def test_sigterm_drains(tiny_folder, tmp_path):
    with server(tiny_folder, "--topology", "1P1D", runtime=tmp_path) as running:
        workers = running.workers
        for worker in workers:  # supervisors signal the whole group
            worker.terminate()
        time.sleep(0.2)
        # Looked at one by one: a worker that had died of it would soon be replaced.
        assert not any(worker.status() == psutil.STATUS_ZOMBIE for worker in workers)
        thread, chunks = long_stream(running)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        with pytest.raises(openai.APIStatusError) as refused:
            running.client.completions.create(model="m", prompt="abc")
        assert refused.value.status_code == 503
        thread.join(30)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert running.process.wait(10) == 0
        assert gone(workers, tmp_path)


def test_it_drains_when_nobody_reads_what_it_says(tiny_folder, tmp_path):
    """`miniserve serve 2>&1 | tee log`: Ctrl-C ends tee as well."""
    reader, writer = os.pipe()
    with server(tiny_folder, "--max-num-batched-tokens", "8", runtime=tmp_path, stderr=writer) as running:
        os.close(writer)
        thread, chunks = long_stream(running)
        os.close(reader)
        running.process.send_signal(signal.SIGINT)
        thread.join(30)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert running.process.wait(10) == 0


@pytest.mark.parametrize("how", ["second signal", "timeout"])
def test_draining_ends(tiny_folder, tmp_path, how):
    timeout = "60" if how == "second signal" else "0.3"
    with server(
        tiny_folder, "--shutdown-timeout", timeout, "--max-num-batched-tokens", "8", runtime=tmp_path
    ) as running:
        workers = running.workers
        threads = [long_stream(running) for _ in range(12)]
        running.process.send_signal(signal.SIGTERM)
        if how == "second signal":
            time.sleep(0.1)
            running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(8) == 0
        for thread, _ in threads:
            thread.join(5)
            assert not thread.is_alive()
        assert gone(workers, tmp_path)


def test_a_body_that_never_ends_delays_no_shutdown(tiny_folder, tmp_path, capfd):
    with server(tiny_folder, "--shutdown-timeout", "60", runtime=tmp_path) as running:
        workers = running.workers
        with socket.create_connection(("127.0.0.1", int(running.url.rsplit(":", 1)[1]))) as client:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f'{head}Content-Length: 100\r\n\r\n{{"prompt": '.encode())
            running.get("/health")
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(8) == 0
        assert gone(workers, tmp_path)
    assert "Traceback" not in capfd.readouterr().err


def test_kill_9_leaves_nothing(tiny_folder, tmp_path):
    shm = set(os.listdir("/dev/shm"))
    with server(tiny_folder, "--topology", "1P2D", runtime=tmp_path) as running:
        workers = running.workers
        assert len(workers) == 3
        long_stream(running)
        running.process.kill()
        assert gone(workers, tmp_path)
    assert set(os.listdir("/dev/shm")) <= shm


def test_startup_failures_are_one_line(tiny_folder, tmp_path):
    def fail(*flags: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "miniserve", "serve", str(tiny_folder), "--port", "0", *flags],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert "--max-model-len" in fail("--max-model-len", "100k")
    assert "room for" in fail("--kv-cache-memory", "10k")
    assert not list(tmp_path.glob("miniserve-*/*"))


def test_how_kv_travels_is_one_line():
    mapped = dict.fromkeys(
        [("p0", "d0"), ("d0", "p0"), ("p0", "d1"), ("d1", "p0"), ("d0", "d1"), ("d1", "d0")], "mapped"
    )
    assert ways({}) == "none needed"
    assert ways(mapped) == "mapped between all workers"
    assert ways(mapped | {("p0", "d1"): "none"}) == "mapped between all workers but p0->d1 none"


def test_where_workers_run_in_one_line() -> None:
    def on(**devices: str) -> dict[str, SimpleNamespace]:
        return {name: SimpleNamespace(device=device) for name, device in devices.items()}

    assert places(on(p0="cpu", d0="cpu")) == "cpu"
    assert places(on(d0="cuda:0")) == "cuda:0 (d0)"
    assert places(on(p0="cuda:0", d0="cuda:1", d1="cuda:0")) == "cuda:0 (p0, d1 share its memory), cuda:1 (d0)"
