"""Which folders can be served, and why the others are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from miniserve.config import ConfigError
from miniserve.hub.resolve import resolve
from miniserve.text.tokenizer import Tokenizer
from tests.support import tiny


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a model in several files that a test may spoil."""
    return Path(shutil.copytree(tiny_models["llama3"], tmp_path / "model"))


def refusal(model: str | Path) -> str:
    with pytest.raises(ConfigError) as raised:
        resolve(str(model))
    return str(raised.value)


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "mistral"])
def test_a_folder_is_served_as_it_is(tiny_models: dict[str, Path], name: str) -> None:
    found = resolve(str(tiny_models[name]))
    assert found.folder == tiny_models[name]
    assert found.config == json.loads((found.folder / "config.json").read_text())
    assert str(found.folder) in found.source


def test_the_architecture_may_be_told_by_the_model_type(folder: Path) -> None:
    tiny.edit_json(folder / "config.json", architectures=None)
    assert resolve(str(folder)).config["architectures"] == ["LlamaForCausalLM"]
    tiny.edit_json(folder / "config.json", model_type="mamba")
    assert "'mamba'" in refusal(folder)


def test_another_architecture_is_refused(folder: Path) -> None:
    tiny.edit_json(folder / "config.json", architectures=["GPT2LMHeadModel"])
    message = refusal(folder)
    assert "is a GPT2LMHeadModel" in message
    assert "miniserve serves Llama, Mistral, Qwen2, Qwen3, Mixtral, " in message


def test_weights_that_are_quantized_in_another_way_are_refused(folder: Path) -> None:
    tiny.edit_json(folder / "config.json", quantization_config={"quant_method": "hqq", "bits": 4})
    assert "quantized (hqq, 4 bits)" in refusal(folder)


def test_code_that_comes_with_a_model_is_never_run(folder: Path) -> None:
    ran = folder.parent / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Model: pass\n")
    named = {"AutoModelForCausalLM": "modeling_own.Model", "AutoConfig": "modeling_own.Model"}
    tiny.edit_json(folder / "config.json", auto_map=named)
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
        (["m.Q4_0.gguf"], ["m.Q4_0.gguf is no GGUF file", "download it again"]),
        (["pytorch_model.bin"], ["only pytorch_model.bin", "safetensors and GGUF", "from_pretrained(FOLDER)"]),
    ],
)
def test_weights_are_safetensors_or_a_gguf(folder: Path, files: list[str], said: list[str]) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for name in files:
        (folder / name).touch()
    message = refusal(folder)
    assert all(words in message for words in said), message
    if "m.Q4_0.gguf" not in files:
        assert resolve(str(folder), load_format="dummy").folder == folder


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"lacks {shard.name}" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}'])
def test_a_broken_index_is_named(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json cannot be read" in refusal(folder)
