"""Clients that people really use, against a real server, with nothing fetched: `make test-clients`.

They live in an environment of their own (constraints-clients.txt), and each runs as its users run it: a script, or its
command line. docs/clients.md says the same for people.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miniserve.text.tokenizer import Tokenizer
from tests.support import dialects, tiny
from tests.support.server_process import Running, server

HERE = Path(__file__).parent
ENVIRONMENT = Path(os.environ.get("CLIENTS_VENV", HERE.parents[1] / ".venv-clients"))
NOWHERE = "http://127.0.0.1:9"
"""A proxy that refuses: whoever asks anybody but the server fails."""

pytestmark = pytest.mark.skipif(
    not (ENVIRONMENT / "bin" / "python").exists(), reason="needs .venv-clients: run `make test-clients`"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose template knows tools, with room for the long prompts of agents."""
    made = tiny.make_model(tmp_path_factory.mktemp("clients") / "tiny", "llama", max_len=16384)
    settings = json.loads((made / "tokenizer_config.json").read_text())
    settings["chat_template"] = dialects.TEMPLATES["hermes"]
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture(scope="module")
def running(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of it, of two workers. Answers are not reasoned about: nothing would end that."""
    flags = ["--topology", "1P1D", "--kv-cache-memory", "64M", "--reasoning-parser", "none"]
    with server(folder, *flags, runtime=tmp_path_factory.mktemp("run")) as up:
        yield up
        assert up.metric("miniserve:kv_pages", state="held") == 0


def run(tmp_path: Path, *command: str, **environment: str) -> str:
    """What a program of the clients' environment prints; it must end well, and finds no way out of this machine."""
    offline = {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HTTP_PROXY": NOWHERE,
        "HTTPS_PROXY": NOWHERE,
        "NO_PROXY": "127.0.0.1,localhost",
        "COLUMNS": "160",
    }
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        [str(ENVIRONMENT / "bin" / command[0]), *command[1:]],
        env=kept | offline | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize("client", ["openai", "litellm"])
def test_libraries(running: Running, tmp_path: Path, client: str) -> None:
    assert run(tmp_path, "python", str(HERE / f"with_{client}.py"), f"{running.url}/v1")


def test_openai_with_the_default_model(smollm2_folder: Path, tmp_path: Path) -> None:
    flags = ["--max-model-len", "2048", "--kv-cache-memory", "256M"]
    with server(smollm2_folder, *flags, runtime=tmp_path) as up:
        assert run(tmp_path, "python", str(HERE / "with_openai.py"), f"{up.url}/v1")


@pytest.mark.parametrize(
    ("config", "model", "ending"),
    [("mini", "ScriptedModel", "tool_calls"), ("mini_textbased", "ScriptedTextModel", "stop")],
)
def test_mini_swe_agent(running: Running, tmp_path: Path, config: str, model: str, ending: str) -> None:
    """A task of three commands: the agent's own prompts, loop and shell; see scripted.py for the model's part."""
    (tmp_path / "work").mkdir()
    settings: dict[str, Any] = {
        "model.model_kwargs.api_base": f"{running.url}/v1",
        "model.model_kwargs.api_key": "none",
        "model.model_kwargs.temperature": 0,
        "model.model_kwargs.max_tokens": 400,
        "environment.cwd": tmp_path / "work",
    }
    run(
        tmp_path,
        *["mini", "-m", "openai/m", "--model-class", f"scripted.{model}", "-t", "Count the lines with an o."],
        *["--yolo", "--exit-immediately", "--cost-limit", "0", "-o", str(tmp_path / "trajectory.json")],
        *["-c", f"{config}.yaml", *(word for key, value in settings.items() for word in ("-c", f"{key}={value}"))],
        PYTHONPATH=str(HERE),
        MSWEA_CONFIGURED="true",
        MSWEA_COST_TRACKING="ignore_errors",
        MSWEA_GLOBAL_CONFIG_DIR=str(tmp_path / "mswea"),
    )
    assert (tmp_path / "work" / "notes.txt").read_text() == "one\ntwo\n"
    trajectory = json.loads((tmp_path / "trajectory.json").read_text())
    assert trajectory["info"]["exit_status"] == "Submitted"
    assert trajectory["info"]["submission"] == "one\ntwo\n"
    answers = [m["extra"]["response"] for m in trajectory["messages"] if m["role"] == "assistant"]
    assert len(answers) == 3
    assert all(answer["choices"][0]["finish_reason"] == ending for answer in answers)


def test_aiperf(running: Running, folder: Path, tmp_path: Path) -> None:
    """Three conversations of two turns. While Hugging Face is offline it takes tokenizers from its cache only, no
    folder: so that is where this one lies."""
    cached = tmp_path / "huggingface" / "hub" / "models--local--tiny"
    shutil.copytree(folder, cached / "snapshots" / "1", ignore=shutil.ignore_patterns("*.safetensors"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    run(
        tmp_path,
        *["aiperf", "profile", "--model", "m", "--url", running.url, "--endpoint-type", "chat", "--streaming"],
        *["--tokenizer", "local/tiny", "--use-server-token-count", "--extra-inputs", "ignore_eos:true"],
        *["--conversation-num", "3", "--session-turns-mean", "2", "--session-turns-stddev", "0", "--concurrency", "2"],
        *["--isl", "64", "--osl", "8", "--random-seed", "1", "--workers-max", "1"],
        *["--ui", "none", "--no-gpu-telemetry", "--artifact-dir", str(tmp_path / "aiperf")],
    )
    report = json.loads((tmp_path / "aiperf" / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == 6
    assert not (report.get("error_request_count") or {}).get("avg")
    assert report["output_sequence_length"]["avg"] == 8
    assert report["time_to_first_token"]["avg"] > 0


WORDS = "the ring and hello were winging over the water whether anyone heard them there or not"
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
}
DOCS: dict[str, list[dict[str, Any]]] = {
    "choices": [
        {"question": WORDS[: 11 * i + 8].strip(), "choices": [" the", " and hello", " water", " over"], "answer": i % 4}
        for i in range(7)
    ],
    "pages": [{"page": " ".join(WORDS.split()[i:] + WORDS.split()[:i]) * (2 * i + 1)} for i in range(4)],
}


def test_lm_eval(
    smollm2_folder: Path, smollm2_plain: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Multiple choice and perplexity by log-probabilities of prompts: what transformers makes of the same weights."""
    for name, task in TASKS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS[name]))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / f"{name}.jsonl")}}}
        # YAML takes JSON.
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **files, **task}))
    flags = ["--topology", "1P1D", "--dtype", "float32", "--max-model-len", "256", "--kv-cache-memory", "64M"]
    with server(smollm2_folder, *flags, runtime=tmp_path_factory.mktemp("run")) as up:
        given = f"model=m,base_url={up.url}/v1/completions,tokenizer={smollm2_folder},tokenizer_backend=huggingface"
        run(
            tmp_path,
            *["lm_eval", "--model", "local-completions", "--model_args", f"{given},max_length=128,num_concurrent=3"],
            *["--tasks", "choices,pages", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "found")],
            "--log_samples",
            HF_DATASETS_OFFLINE="1",
        )
        assert up.metric("miniserve:kv_pages", state="held") == 0
    (results,) = (tmp_path / "found").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    tokenizer = Tokenizer.load(smollm2_folder)

    def likelihood(context: list[int], continuation: list[int]) -> float:
        logprobs = tiny.reference_logits(smollm2_plain, context + continuation).log_softmax(-1)
        rows = range(len(context) - 1, len(context) + len(continuation) - 1)
        return float(logprobs[rows, continuation].sum())

    right = 0
    (samples,) = (tmp_path / "found").rglob("samples_choices_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        doc = sample["doc"]
        start = tokenizer.encode(doc["question"])
        each = [likelihood(start, tokenizer.encode(doc["question"] + text)[len(start) :]) for text in doc["choices"]]
        assert [float(found) for found, _ in sample["filtered_resps"]] == pytest.approx(each, abs=1e-3)
        right += each.index(max(each)) == doc["answer"]
    assert scores["choices"]["acc,none"] == pytest.approx(right / len(DOCS["choices"]))
    settings = json.loads((smollm2_folder / "tokenizer_config.json").read_text())
    total, begin = 0.0, tokenizer.encode(settings["bos_token"])
    for doc in DOCS["pages"]:
        tokens = tokenizer.encode(doc["page"])
        # Windows of 126 tokens, each behind the token before it; the last one has as many before it as fit.
        for at in range(0, len(tokens), 126):
            window = tokens[at : at + 126]
            total += likelihood(tokens[at + len(window) - 127 : at] if at else begin, window)
    size = sum(len(doc["page"].encode()) for doc in DOCS["pages"])
    assert scores["pages"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-3)


def test_guidellm(running: Running, folder: Path, tmp_path: Path) -> None:
    run(
        tmp_path,
        *["guidellm", "run", "--backend", f"kind=openai_http,target={running.url},model=m"],
        *["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"],
        *["--tokenizer", f"kind=huggingface_auto,model={folder}"],
        *["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=8"],
        *["--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-console"],
    )
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0)
