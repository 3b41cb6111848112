"""The command line: what flags become, what a wrong one says, and how fast help comes."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name

import pytest

from miniserve import __version__
from miniserve.cli import main as cli
from miniserve.config import ConfigError, EngineConfig, ServeConfig, Topology, tables
from miniserve.hub.fetch import DEFAULT_MODEL
from miniserve.scheduler.baselines import POLICIES


def run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miniserve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


def config(line: str) -> ServeConfig:
    """The settings of `miniserve serve LINE`."""
    return cli.asked(cli.make_parser().parse_args(["serve", *shlex.split(line)]))


# --- processes ------------------------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_package() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert f'version = "{__version__}"' in pyproject
    assert run("--version").stdout == f"miniserve {__version__}\n"


@pytest.mark.parametrize(
    ("command", "says"), [([], "examples:"), (["serve"], "examples:"), (["chat"], "--system"), (["top"], "backlog")]
)
def test_help_needs_no_heavy_import(command: list[str], says: str) -> None:
    """Time on a shared machine says little; what is imported says it all."""
    heavy = "{'torch', 'transformers', 'fastapi', 'uvicorn', 'zmq', 'numpy', 'huggingface_hub', 'rich', 'httpx'}"
    program = (
        "import sys, miniserve.cli.main as cli\n"
        "try:\n    cli.main([*sys.argv[1:], '--help'])\n"
        f"except SystemExit as end:\n    sys.exit(end.code or sorted({heavy} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert says in done.stdout


def test_every_command_of_the_table_is_a_function_that_is_there() -> None:
    for name, row in tables("cli/commands.toml")["commands"].items():
        assert list(signature(resolve_name(row["run"])).parameters) == ["args"], name


def test_a_wrong_flag_is_one_line_and_exit_code_2() -> None:
    done = run("serve", "--port", "http")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "miniserve serve: argument --port: 'http' is not a port from 0 to 65535 (see miniserve serve --help)"
    ]


def test_a_model_that_is_not_there_is_one_line_and_exit_code_1() -> None:
    done = run("serve", "smolm2-135m")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "Did you mean smollm2-135m" in done.stderr


def test_a_port_in_use_is_an_error_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("serve", "smollm2-135m", "--load-format", "dummy", "--port", str(port))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"Port {port} on 127.0.0.1 is taken" in done.stderr
    assert "--port" in done.stderr


# --- flags to settings ----------------------------------------------------------------------------------------------


def test_without_flags_the_defaults_are_those_of_the_settings() -> None:
    assert config("") == ServeConfig(engine=EngineConfig(model=DEFAULT_MODEL), served_model_names=[DEFAULT_MODEL])


def test_every_flag_arrives() -> None:
    assert config(
        "my/model --load-format dummy --dtype bfloat16 --device cpu --max-model-len 32K --block-size 32 "
        "--kv-cache-memory 2GiB --gpu-memory-utilization 0.5 --max-num-batched-tokens 2k --max-num-seqs 7 "
        "--no-enable-prefix-caching --swap-space 4GiB --kv-eviction lru "
        "--threads 3 --handoff-deadline 5 --topology 1P3D --devices 0,cuda:2 --policy colocated "
        "--served-model-name a b --host 0.0.0.0 --port 0 --api-key secret --chat-template x.jinja "
        "--generation-config vllm --max-num-queued-reqs 9 --shutdown-timeout 1.5 --log-level debug "
        "--cpu-kernels torch --kv-transfer collective --worker-timeout 7 --decision-log log.jsonl --mispredict 0.25 "
        "--revision main --no-prompt-lookup --enforce-eager --cuda-graph-sizes 8,1,4 --strict-gpu --async-scheduling "
        "--step-stretch 2 --tool-call-parser hermes --reasoning-parser none --uds /tmp/s --root-path /llm "
        "--allowed-origins http://a http://b --log-prompts --conversation-header X-One X-Two "
        "--conversation-header X-Three"
    ) == ServeConfig(
        engine=EngineConfig(
            model="my/model",
            load_format="dummy",
            dtype="bfloat16",
            device="cpu",
            max_model_len=32768,
            block_size=32,
            kv_cache_memory=2 * 2**30,
            gpu_memory_utilization=0.5,
            max_num_batched_tokens=2000,
            max_num_seqs=7,
            enable_prefix_caching=False,
            swap_space=4 * 2**30,
            kv_eviction="lru",
            threads=3,
            handoff_deadline=5.0,
            cpu_kernels="torch",
            kv_transfer="collective",
            prompt_lookup=False,
            enforce_eager=True,
            cuda_graph_sizes=[1, 4, 8],
            strict_gpu=True,
            async_scheduling=True,
            step_stretch=2.0,
        ),
        topology=Topology(1, 3),
        devices=["cuda:0", "cuda:2"],
        policy="colocated",
        served_model_names=["a", "b"],
        host="0.0.0.0",
        port=0,
        api_key="secret",
        chat_template="x.jinja",
        generation_config="vllm",
        max_num_queued_reqs=9,
        shutdown_timeout=1.5,
        log_level="debug",
        worker_timeout=7.0,
        decision_log="log.jsonl",
        mispredict=0.25,
        revision="main",
        tool_call_parser="hermes",
        reasoning_parser="none",
        uds="/tmp/s",
        root_path="/llm",
        allowed_origins=["http://a", "http://b"],
        conversation_headers=["X-One", "X-Two", "X-Three"],
        log_prompts=True,
    )


def test_prompts_are_shown_behind_a_key_only() -> None:
    with pytest.raises(ConfigError, match="give --api-key too"):
        config("--log-prompts")


def test_every_setting_has_a_flag_but_these() -> None:
    known = vars(cli.make_parser().parse_args(["serve"])).keys() - {"run", "positional_model"}
    without = {"engine", "role", "workers", "sharing", "max_body_bytes"}
    assert known == {*ServeConfig.__struct_fields__, *EngineConfig.__struct_fields__} - without


@pytest.mark.parametrize(
    ("text", "tokens"), [("8192", 8192), ("32k", 32000), ("32K", 32768), ("8K", 8192), ("1.5k", 1500), ("1M", 2**20)]
)
def test_counts_of_tokens(text: str, tokens: int) -> None:
    assert config(f"--max-model-len {text}").engine.max_model_len == tokens


def test_the_model_is_named_either_way_but_not_twice() -> None:
    assert config("a/b").engine == config("--model a/b").engine
    args = cli.make_parser().parse_args(["serve", "a/b", "--model", "c/d"])
    with pytest.raises(ConfigError, match="Two models"):
        args.run(args)


def test_vllms_name_for_kv_cache_memory() -> None:
    assert config("--kv-cache-memory-bytes 1073741824").engine.kv_cache_memory == 2**30


@pytest.mark.parametrize("how", ["auto", "mapped", "collective"])
def test_every_way_of_kv_can_be_chosen(how: str) -> None:
    assert config(f"--kv-transfer {how}").engine.kv_transfer == how


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_none_or_all_decisions_may_be_turned_around(share: float) -> None:
    assert config(f"--mispredict {share}").mispredict == share


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_can_be_chosen(policy: str) -> None:
    assert config(f"--policy {policy}").policy == policy


def test_the_key_comes_from_the_flag_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config("").api_key is None
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert config("").api_key == "theirs"
    monkeypatch.setenv("MINISERVE_API_KEY", "ours")
    assert config("").api_key == "ours"
    assert config("--api-key flag").api_key == "flag"


def test_white_space_around_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINISERVE_API_KEY", "from a file\n")
    assert config("").api_key == "from a file"
    assert config("--api-key ' flag\t'").api_key == "flag"


@pytest.mark.parametrize("command", ["serve", "chat"])
@pytest.mark.parametrize(
    ("key", "says"),
    [("", "is empty"), (" \n", "is empty"), ("Schlüssel", "printable ASCII"), ("a\nb", "printable ASCII")],
)
@pytest.mark.parametrize("source", ["--api-key", "MINISERVE_API_KEY", "VLLM_API_KEY"])
def test_a_key_that_cannot_work_is_one_line(
    command: str, key: str, says: str, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Above all an unset variable does not open the server to everybody."""
    if source != "--api-key":
        monkeypatch.setenv(source, key)
    assert cli.main([command, *(["--api-key", key] if source == "--api-key" else [])]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"The API key in {source} " in err
    assert says in err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("serve --port 65536", "a port from 0 to 65535"),
        ("serve --max-model-len inf", "like 8192 or 32k"),
        ("serve --max-model-len nan", "like 8192 or 32k"),
        ("serve --max-model-len 0", "like 8192 or 32k"),
        ("serve --max-model-len 8kk", "like 8192 or 32k"),
        ("serve --max-num-seqs 0", "a whole number above 0"),
        ("serve --block-size 1.5", "a whole number above 0"),
        ("serve --gpu-memory-utilization 1.1", "a fraction"),
        ("serve --gpu-memory-utilization nan", "a fraction"),
        ("serve --mispredict 1.5", "a share from 0 to 1"),
        ("serve --mispredict -0.1", "a share from 0 to 1"),
        ("serve --mispredict nan", "a share from 0 to 1"),
        ("serve --kv-transfer pigeon", "choose from 'auto', 'mapped', 'collective'"),
        ("serve --shutdown-timeout -1", "a number of seconds"),
        ("serve --shutdown-timeout inf", "a number of seconds"),
        ("serve --kv-cache-memory lots", "write it like 2GiB"),
        ("serve --topology 1P", "1P1D"),
        ("serve --devices cpu", "write them like cuda:0,cuda:1 or 0,1"),
        ("serve --devices 0,,1", "write them like"),
        ("serve --policy best", "choose from 'colocated', 'disaggregated'"),
        ("serve --dtype int8", "invalid choice"),
        ("serve --tool-call-parser x", "choose from 'auto', 'hermes'"),
        ("serve --reasoning-parser x", "choose from 'auto', 'none', 'qwen3'"),
        ("serve --no-such-flag", "--no-such-flag"),
        ("serve --no-enforce-eager", "--no-enforce-eager"),
        ("serve --served-model-name", "expected at least one argument"),
        ("serve one two", "two"),
        ("dance", "'dance'"),
        ("", "COMMAND"),
    ],
)
def test_wrong_values_are_one_line(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert says in err


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("miniserve.hub.resolve.resolve", interrupted)
    assert cli.main(["serve"]) == 130


def test_the_package_offers_its_library_lazily() -> None:
    program = (
        "import sys, miniserve; assert 'torch' not in sys.modules; miniserve.SamplingParams; print(miniserve.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.stdout.strip() == "['LLM', 'SamplingParams', '__version__']"
