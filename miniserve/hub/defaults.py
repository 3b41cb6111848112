"""Sampling defaults that a model brings along."""

from pathlib import Path
from typing import Any

from miniserve.config import read_object


def generation_defaults(folder: Path, source: str) -> dict[str, Any]:
    """What the model's generation_config.json asks for; empty where `source` is not "auto" or nothing is said.

    A model that says `do_sample: false` still samples at the client's temperature, as with other servers.
    Raises `ConfigError` for a file that is no JSON object.
    """
    found = read_object(folder / "generation_config.json") if source == "auto" else {}
    # Hugging Face writes null, and 1.0 or 0 for filters that are off.
    return {name: value for name, value in found.items() if value is not None}
