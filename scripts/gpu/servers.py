"""Real `miniserve serve` processes, all of them on one device."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from scripts.gpu.common import ROOT, drop_engine, environment, model_folder, read_json
from scripts.gpu.kernels import short
from scripts.gpu.parity import Truth, disagreements, logit_error, model, paths
from scripts.gpu.setting import Figure, Figures, Setting
from tests.support.engines import prompts

START = 120.0
"""Seconds that a server may take to start."""
TRACES = [folder / "shared" / "traces" / "swe_agent.csv" for folder in (ROOT, ROOT.parent)]
"""Where the recorded trace may lie; without it one like it is made up."""
TOPOLOGIES = {"1D": "colocated", "2D": "observe", "1P1D": "conserve", "1P2D": "conserve"}
"""Each with a policy that uses all of it."""


@contextmanager
def start(run: Setting, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server process with its output in a file; ended afterwards."""
    log = run.folder / f"serve-{time.monotonic_ns()}.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "miniserve", "serve", *flags, "--port", "0", "--device", run.device]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment())
    process.log = log  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ready(process: Any) -> tuple[str, str]:
    """Wait for a server; its address (without /v1) and its banner. Raises RuntimeError with its words."""
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        said = process.log.read_text("utf-8", "replace")
        if found := re.search(r"^API: +(http\S+)/v1$", said, re.MULTILINE):
            return found[1], said
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{process.log.read_text('utf-8', 'replace')[-3000:]}")


def said(banner: str, row: str) -> str:
    """A row of a banner."""
    found = re.search(rf"^{row}: *(.*)$", banner, re.MULTILINE)
    return found[1] if found else ""


def ask(url: str, prompt: list[int], max_tokens: int) -> list[int]:
    """The tokens of a greedy completion."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["token_ids"]


def total(url: str, name: str) -> float:
    """A counter of a server, over all labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return sum(map(float, re.findall(rf"^miniserve:{name}_total(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))


def topologies(run: Setting) -> Figures:
    """Every topology answers two turns of each conversation as transformers does, and KV goes by the mapped way."""
    drop_engine(run)
    dtype, count = run.half, 6 if run.small else 16
    folder = model(run, "qwen3", dtype)
    items = prompts(count, seed=3, longest=300)
    tokens = 16
    truth = paths(run, folder, items, tokens)
    tolerance, _ = logit_error(run, folder, dtype, items[-1] * 2 + truth[-1].tokens)
    flags = ["--dtype", {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype], "--kv-cache-memory", "64MiB"]
    flags += ["--max-num-batched-tokens", "64", "--threads", "1"]
    answers: dict[str, list[list[int]]] = {}
    with ExitStack() as stack:
        running = {  # all start side by side: starting takes longest
            topology: stack.enter_context(start(run, str(folder), "--topology", topology, "--policy", policy, *flags))
            for topology, policy in TOPOLOGIES.items()
        }
        for topology, process in running.items():
            url, banner = ready(process)
            with ThreadPoolExecutor(count) as pool:
                first = list(pool.map(lambda item, url=url: ask(url, item, tokens), items))
                longer = [item + answer + [5, 6, 7] for item, answer in zip(items, first, strict=True)]
                second = list(pool.map(lambda item, url=url: ask(url, item, tokens), longer))
            wrong, compared = disagreements(first, truth, tolerance)
            more, after = disagreements(second, _paths(run, folder, longer, tokens), tolerance)
            yield Figure(f"{topology}: answers off transformers' path", wrong + more, f"of {2 * count}", "==", 0)
            yield Figure(f"{topology}: tokens compared", compared + after, "", ">=", count * tokens)
            answers[topology] = first
            same = sum(a == b for a, b in zip(answers["1D"], first, strict=True))
            rule = "==" if dtype is torch.float32 else ""  # chunks of other sizes round differently
            yield Figure(f"{topology}: answers equal to those of 1D ({short(dtype)})", same, "", rule, count)
            if "P" in topology:
                yield Figure(f"{topology}: transfer", said(banner, "transfer"), "", "==", "mapped between all workers")
                yield Figure(f"{topology}: bytes handed over", total(url, "handoff_bytes"), "", ">=", 1)
    run.release()


def _paths(run: Setting, folder: Any, items: list[list[int]], tokens: int) -> list[Truth]:
    """Kept: servers that answered the same are asked the same next."""
    known = run.keep("second turns", dict)
    for item in items:
        if tuple(item) not in known:
            known[tuple(item)] = paths(run, folder, [item], tokens)[0]
    return [known[tuple(item)] for item in items]


def replay(run: Setting, topology: str) -> Figures:
    """Coding agents against a server with Qwen3-0.6B's shape: every turn answered, and how long they waited."""
    drop_engine(run)
    folder = model_folder(run, "qwen3-0.6b")
    trace = next((str(path) for path in TRACES if path.exists()), "swe-agent")
    out = run.folder / f"replay-{topology}.json"
    flags = ["--topology", topology, "--policy", "conserve" if "P" in topology else "observe"]
    flags += ["--load-format", "dummy"]
    workload = ["--conversations", "4", "--max-turns", "3", "--rate", "4", "--scale-tokens", "0.02"]
    if run.small:
        flags += ["--kv-cache-memory", "64MiB", "--max-model-len", "1024", "--threads", "1"]
    else:
        flags += ["--dtype", "bfloat16"]
        workload = ["--conversations", "24", "--max-turns", "5", "--rate", "3"]
    with start(run, str(folder), *flags) as process:
        url, banner = ready(process)
        command = [sys.executable, "-m", "miniserve", "replay", trace, "--url", url, "--json", str(out)]
        command += [*workload, "--standalone", "2", "--seed", "0"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=START)
        if done.returncode or not out.exists():
            words = process.log.read_text("utf-8", "replace")  # type: ignore[attr-defined]
            raise RuntimeError(f"replay failed:\n{done.stderr[-2000:]}\n{words[-2000:]}")
    result = read_json(out)
    yield Figure("trace", trace.rsplit("/", 1)[-1])
    yield Figure("transfer", said(banner, "transfer"))
    yield Figure("conversations", result["conversations"], "", "==", 4 if run.small else 24)
    yield Figure("turns", result["turns"])
    for name in ("errors", "unfinished", "short_turns", "stale_cached_tokens"):
        yield Figure(name.replace("_", " "), result[name], "", "==", 0)
    yield Figure("duration", result["duration_s"], "s")
    yield Figure("output", result["throughput"]["output_tokens_per_s"], "tokens/s")
    for name in ("ttft", "ttfet", "last_turn_tbt", "e2e"):
        for which in ("p50", "p95"):
            if spread := result[f"{name}_s"]:  # None where there are too few tokens
                yield Figure(f"{name} {which}", spread[which] * 1e3, "ms")
    for name in ("ttfet", "last_turn_tbt", "e2e"):
        if spread := result[f"{name}_norm"]:
            yield Figure(f"{name} beside an idle server, gmean", spread["gmean"], "times")
    if "P" in topology:
        yield Figure("KV handed over", result["kv_transfer"]["bytes"], "bytes", ">=", 1)
    yield Figure("placements", ", ".join(f"{way} {n}" for way, n in result["placements"].items()))
