"""A model from the Hugging Face hub."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from miniserve.hub.check import ModelError, check_folder
from miniserve.hub.pinned import DEFAULT_MODEL, Progress

TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "tekken.json")


def snapshot(hub_id: str, revision: str | None, dummy: bool, progress: Progress) -> Path:
    """The hub model's folder in huggingface_hub's own cache; the network is asked only for what is not there, and with
    `dummy` for no weights. Raises `ModelError`, and the library's
    `HFValidationError` for what cannot be an id."""
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    patterns = [*TEXT_FILES] if dummy else [*TEXT_FILES, "*.safetensors"]
    try:
        cached = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=True))
        check_folder(cached, dummy)
        return cached
    except (hub.LocalEntryNotFoundError, ModelError):
        pass  # nothing or only a part of it is here
    progress(f"Downloading {hub_id} from the Hugging Face hub")
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
