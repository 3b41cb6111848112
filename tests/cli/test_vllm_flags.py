"""A line that starts vLLM starts this server too, or says in one line why not."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from miniserve.cli import main as cli
from miniserve.config import ConfigError, ServeConfig

TABLE = tomllib.loads((Path(cli.__file__).parent / "vllm_flags.toml").read_text("utf-8"))


def config(line: str) -> ServeConfig:
    args = cli.make_parser().parse_args(["serve", *shlex.split(line)])
    return cli.asked(args)


def started(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """`miniserve serve LINE` until it would look for the model."""

    def found(*args: object, **more: object) -> None:
        raise ConfigError("that far")

    monkeypatch.setattr("miniserve.hub.resolve.resolve", found)
    return cli.main(["serve", *shlex.split(line)])


@pytest.mark.parametrize(
    "line",
    [
        "--enable-auto-tool-choice --tool-call-parser hermes",
        "--trust-remote-code",
        "--enable-chunked-prefill",
        "--no-enable-chunked-prefill",
        "--disable-log-requests --disable-log-stats",
        "--no-enable-log-requests",
        "--pipeline-parallel-size=1",
        "-pp 1",
        "--data-parallel-size 1 --api-server-count 1",
        "--seed 0",
        "--seed=42",
        "--max-logprobs 10",
        "--uvicorn-log-level=debug",
        "--enable_auto_tool_choice --pipeline_parallel_size=1",
        "--kv-cache-dtype auto --runner generate",
        "--chat-template-content-format auto",
        "--compilation-config '{\"level\": 3}'",
    ],
)
def test_what_changes_nothing_is_taken_and_told(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = config("my/model --max-model-len 2k --tool-call-parser hermes")
    assert config(f"my/model {line} --max-model-len 2k --tool-call-parser hermes") == without
    assert started(f"my/model {line}", monkeypatch) == 1
    *told, last = capsys.readouterr().err.splitlines()
    assert last == "miniserve: that far"
    flags = [word.partition("=")[0].replace("_", "-") for word in line.split() if word.startswith("-")]
    assert [words.split()[1] for words in told] == [flag for flag in flags if flag != "--tool-call-parser"]
    assert all(" changes nothing here: " in words for words in told)


def test_a_flag_that_is_given_twice_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started("--seed 1 --trust-remote-code --seed 2 --trust-remote-code", monkeypatch)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()[:-1]] == ["--seed", "--trust-remote-code"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--pipeline-parallel-size 2", "--pipeline-parallel-size 2 .*--tensor-parallel-size N"),
        ("-pp=2", "-pp 2 .*--tensor-parallel-size N"),
        ("--pipeline_parallel_size=2", "--tensor-parallel-size N"),
        ("--tensor-parallel-size 0", "whole number above 0"),
        ("--data-parallel-size 4", "--topology"),
        ("--quantization bitsandbytes", "'bitsandbytes' is not int8, int4 or .*awq"),
        ("-q nf4", "'nf4' is not int8, int4"),
        ("--enable-lora", "adapters"),
        ("--lora-modules a=b c=d", "adapters"),
        ('--speculative-config \'{"method": "ngram"}\'', "--prompt-lookup"),
        ("--chat-template-content-format openai", "template"),
        ("--kv-cache-dtype fp8", "dtype"),
        ("--tokenizer other/model", "model's folder"),
        ("--ssl-keyfile key.pem", "proxy"),
        ("--seed", "expected one argument"),
        ("--max_model_lens 5", "unrecognized arguments: --max-model-lens"),
    ],
)
def test_what_cannot_be_had_is_one_line(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", *shlex.split(line)])
    assert end.value.code == 2
    [told] = capsys.readouterr().err.splitlines()
    assert re.search(says, told), told


def test_underscores_are_dashes_but_not_in_values() -> None:
    settings = config("--served_model_name my_model --max_model_len=2k --api-key=sk_--a_b --root_path /a_b")
    assert (settings.served_model_names, settings.api_key, settings.root_path) == (["my_model"], "sk_--a_b", "/a_b")
    assert settings.engine.max_model_len == 2000


@pytest.mark.parametrize("names", TABLE["never"])
def test_what_is_never_had_is_an_error_with_and_without_values(names: str) -> None:
    for name in names.split():
        for line in (name, f"{name} x", f"{name}=x"):
            with pytest.raises(SystemExit) as end:
                cli.make_parser().parse_args(["serve", *line.split()])
            assert end.value.code == 2


def test_help_is_about_our_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    told = capsys.readouterr().out
    assert "--uds" in told
    assert "--pipeline-parallel-size" not in told


@pytest.mark.parametrize(
    ("text", "size"),
    [("4", 4 * 2**30), ("0.5", 2**29), ("0", 0), ("4GiB", 4 * 2**30), ("512M", 512 * 10**6), ("4294967296", 2**32)],
)
def test_a_small_bare_swap_space_is_in_gib_as_in_vllm(text: str, size: int) -> None:
    assert config(f"--swap-space {text}").engine.swap_space == size


@pytest.mark.parametrize("line", ["--tensor-parallel-size 2", "-tp 2", "-tp=2", "--tensor_parallel_size=2"])
def test_ranks_of_a_worker(line: str) -> None:
    assert config(line).engine.tensor_parallel_size == 2


# --- origins and prefixes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "origins"),
    [
        ("", []),
        ("--allowed-origins http://a:3000 https://b.example", ["http://a:3000", "https://b.example"]),
        ("""--allowed-origins '["http://a:3000", "https://b.example"]'""", ["http://a:3000", "https://b.example"]),
        ("""--allowed-origins '["*"]'""", ["*"]),
        ("--allowed-origins *", ["*"]),
        ("--allowed_origins chrome-extension://abc", ["chrome-extension://abc"]),
        ("--allowed-origins '[]'", []),
    ],
)
def test_origins(line: str, origins: list[str]) -> None:
    assert config(line).allowed_origins == origins


@pytest.mark.parametrize(
    "text", ["http://a/", "localhost:3000", "http://", "[http://a]", '["a"]', "[1]", '{"a": 1}', ""]
)
def test_what_is_no_origin_says_how_to_write_one(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--allowed-origins", text])
    [told] = capsys.readouterr().err.splitlines()
    assert "write it like http://localhost:3000" in told


@pytest.mark.parametrize(
    ("text", "root"), [("/llm", "/llm"), ("/llm/", "/llm"), ("llm", "/llm"), ("/a/b", "/a/b"), ("/", ""), ("", "")]
)
def test_prefixes(text: str, root: str) -> None:
    assert config(f"--root-path '{text}'").root_path == root
