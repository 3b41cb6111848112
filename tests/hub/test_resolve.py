"""From a model's name to a folder, and what the error says when there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from miniserve.config import ConfigError
from miniserve.hub.fetch import DEFAULT_MODEL
from miniserve.hub.resolve import presets, resolve
from miniserve.model.config import ModelConfig
from miniserve.text.tokenizer import Tokenizer

ALIASES = {
    "gemma-3-1b": 1.000,
    "gemma-3-4b": 3.880,
    "llama-3-8b": 8.030,
    "llama-3.1-8b": 8.030,
    "mistral-7b": 7.248,
    "mixtral-8x7b": 46.703,
    "qwen2.5-7b": 7.616,
    "qwen3-0.6b": 0.596,
    "qwen3-30b-a3b": 30.532,
    "qwen3-8b": 8.191,
    "qwen3-coder-30b-a3b": 30.532,
    "qwen3-next-80b-a3b": 79.674,
    "qwen3.5-0.8b": 0.752,
    "qwen3.5-35b-a3b": 34.661,
    "smollm2-135m": 0.135,
}
"""The parameters of the text model, in billions, as transformers counts them."""


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a model in several files that a test may spoil."""
    return Path(shutil.copytree(tiny_models["llama3"], tmp_path / "model"))


def refusal(model: str | Path, **how: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        resolve(str(model), **how)
    return str(raised.value)


def test_a_folder_comes_before_an_alias(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename("qwen3-8b")
    assert resolve("qwen3-8b").folder == Path("qwen3-8b")


@pytest.mark.parametrize(
    ("model", "close"), [("qwen3-06b", "qwen3-0.6b"), ("LLama3-8b", "llama-3-8b"), ("smollm", "smollm2-135m")]
)
def test_a_slip_of_the_pen_gets_a_suggestion(model: str, close: str) -> None:
    message = refusal(model)
    assert "Did you mean" in message
    assert close in message.partition("Give a folder")[0]


@pytest.mark.parametrize("model", ["./nothing", "/no/where", "~/nothing", "a/b/c", "zzz"])
def test_an_unknown_name_gets_the_choices(model: str) -> None:
    message = refusal(model)
    assert "no such folder" in message
    assert all(alias in message for alias in ALIASES)


@pytest.mark.parametrize("model", ["a/b c", "--/x", "-a/b"])
def test_what_cannot_be_a_hub_id_is_an_unknown_name(model: str) -> None:
    assert "not an alias" in refusal(model)


def test_the_presets() -> None:
    assert presets().keys() == ALIASES.keys()
    assert DEFAULT_MODEL in ALIASES


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_a_preset_is_a_model_that_can_be_served(alias: str, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    preset = presets()[alias]
    assert preset["hub"].count("/") == 1
    assert preset["notes"]
    found = resolve(alias, load_format="dummy")
    assert not caplog.records
    model = ModelConfig.from_hf(found.config)
    assert model.num_parameters == pytest.approx(ALIASES[alias] * 1e9, rel=0.002 if alias != "smollm2-135m" else 0.005)
    eos = preset["generation_config"]["eos_token_id"]
    ends = set(eos if isinstance(eos, list) else [eos])
    assert all(0 <= i < model.vocab_size for i in ends)
    assert Tokenizer.load(found.folder).eos_token_ids >= ends


def test_an_alias_with_dummy_weights_needs_nothing(own_cache: Path) -> None:
    found = resolve(" Qwen3-0.6B ", load_format="dummy")
    assert found.folder.parent == own_cache / "dummy"
    assert found.config == presets()["qwen3-0.6b"]["config"]
    assert "random weights" in found.source
    tokenizer = Tokenizer.load(found.folder)
    assert tokenizer.eos_token_ids == {151645, 151643}
    assert tokenizer.vocab_size == found.config["vocab_size"]
    ids = tokenizer.chat([{"role": "user", "content": "é"}])
    assert tokenizer.decode(ids) == "user: é\nassistant:"
    made = (found.folder / "tokenizer.json").stat().st_mtime_ns
    again = resolve("qwen3-0.6b", load_format="dummy").folder
    assert (again, (again / "tokenizer.json").stat().st_mtime_ns) == (found.folder, made)


# --- the hub --------------------------------------------------------------------------------------------------------


def fake_hub(monkeypatch: pytest.MonkeyPatch, cached: Path | None, fetched: Path | Exception) -> list[dict[str, Any]]:
    """Stand in for the hub's client: `cached` is what lies here, `fetched` what the network gives. Notes all calls."""
    calls = []

    def snapshot_download(repo_id: str, **how: Any) -> str:
        calls.append({"repo_id": repo_id, **how})
        if how.get("local_files_only"):
            if cached is None:
                raise errors.LocalEntryNotFoundError("not here")
            return str(cached)
        if isinstance(fetched, Exception):
            raise fetched
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def http_error(kind: Callable[..., Exception], status: int) -> Exception:
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co")))


def test_without_network_a_hub_id_says_how_to_bring_it_here() -> None:
    message = refusal("Nobody/Has-This-1B")
    assert "not in the local cache and HF_HUB_OFFLINE is set" in message
    assert "hf download Nobody/Has-This-1B" in message
    assert "smollm2-135m" in message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx.ConnectError("no route"), "hub cannot be reached"),
        (ConnectionResetError("peer"), "hub cannot be reached"),
        (OSError(28, "No space left on device"), "HF_HOME"),
        (http_error(errors.GatedRepoError, 403), "accept its licence on https://huggingface.co/Big/Model"),
        (http_error(errors.RepositoryNotFoundError, 404), "has no model 'Big/Model'"),
        (http_error(errors.RevisionNotFoundError, 404), "no revision 'v9'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_refuses_is_explained(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fake_hub(monkeypatch, None, error)
    assert said in refusal("Big/Model", revision="v9")


def test_a_bug_is_not_taken_for_a_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, None, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        resolve("Big/Model")


def test_what_is_in_the_hubs_cache_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    calls = fake_hub(monkeypatch, folder, AssertionError("the network was asked"))
    found = resolve("Big/Model", revision="v1")
    assert found.folder == folder
    assert [call["revision"] for call in calls] == ["v1"]


def test_half_a_model_in_the_cache_is_completed(
    monkeypatch: pytest.MonkeyPatch, tiny_models: dict[str, Path], folder: Path
) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()
    lines: list[str] = []
    calls = fake_hub(monkeypatch, folder, tiny_models["llama3"])
    assert resolve("Big/Model", progress=lines.append).folder == tiny_models["llama3"]
    assert [call.get("local_files_only", False) for call in calls] == [True, False]
    assert lines == ["Downloading Big/Model from the Hugging Face hub"]


def test_an_alias_without_a_source_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    calls = fake_hub(monkeypatch, folder, AssertionError("the network was asked"))
    assert resolve("llama-3-8b").folder == folder
    assert calls[0]["repo_id"] == "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_only_safetensors_and_text_are_fetched(monkeypatch: pytest.MonkeyPatch, folder: Path, load_format: str) -> None:
    calls = fake_hub(monkeypatch, None, folder)
    resolve("Big/Model", load_format=load_format)
    for call in calls:
        patterns = call["allow_patterns"]
        assert ("*.safetensors" in patterns) == (load_format == "auto")
        files = ["modeling_own.py", "pytorch_model.bin", "model.gguf", "model.pt"]
        assert not any(Path(name).match(pattern) for name in files for pattern in patterns)
