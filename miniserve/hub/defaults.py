"""Sampling defaults that a model brings along."""

import json
from pathlib import Path
from typing import Any

from miniserve.config import ConfigError


def generation_defaults(folder: Path, source: str) -> dict[str, Any]:
    """What the model's generation_config.json asks for; empty where `source` is not "auto" or nothing is said.

    A model that says `do_sample: false` still samples at the client's temperature, as with other servers.
    Raises `ConfigError` for a file that is no JSON object.
    """
    path = folder / "generation_config.json"
    if source != "auto" or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}. Mend it, or use --generation-config vllm.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object. Mend it, or use --generation-config vllm.")
    # Hugging Face writes null, and 1.0 or 0 for filters that are off.
    return {name: value for name, value in found.items() if value is not None}
