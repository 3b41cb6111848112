"""What is in a model's folder: whether miniserve can serve it.

Weights are safetensors only, and code that comes with a model is never run.
"""

import json
from pathlib import Path
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")


class ModelError(ValueError):
    """A model that cannot be served; the message says why and what to do."""


def check_folder(folder: Path, dummy: bool) -> dict[str, Any]:
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
