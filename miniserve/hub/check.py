"""What is in a model's folder: whether miniserve can serve it, and which of its files count (docs/models.md).

Weights are safetensors only, and code that comes with a model is never run. Only headers of weights are read here, so
that what is wrong is said before a worker starts. Where a folder says one thing twice, transformers' choice is ours.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miniserve.config import LFS_POINTER, ConfigError, read_object

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
"""By config.json's `model_type`."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
"""What config.json calls the dtypes of safetensors (nothing is computed in fp64)."""
PACKED = {"qweight": "GPTQ or AWQ", "scales": "MLX", "weight_scale": "FP8", "weight_scale_inv": "FP8", "absmax": "NF4"}
"""How names of tensors end that only quantized checkpoints have."""
MATHS = re.compile("rotary|multiplier|softcap|^logits?_scal|^scale_|^query_pre|qk_norm|no_rope|experts$")
"""Keys of config.json that other models compute with, but none of ours."""


class ModelError(ConfigError):
    """A model that cannot be served; the message says why and what to do."""


@dataclass
class Checked:
    """A folder that can be served. `config` is config.json, with `architectures` and `dtype` filled in; `weights` are
    the files that hold the model's tensors, and `notes` tell where the folder contradicts itself."""

    config: dict[str, Any]
    weights: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_folder(folder: Path, dummy: bool) -> Checked:
    """What the folder holds. Raises `ModelError`, in one line, if miniserve cannot serve it."""
    try:
        return _check(folder, dummy)
    except OSError as error:
        raise ModelError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from error
    except ModelError:
        raise
    except ConfigError as error:
        raise ModelError(str(error)) from error


def _check(folder: Path, dummy: bool) -> Checked:
    if not (folder / "config.json").is_file():
        raise ModelError(_instead(folder, "config.json"))
    config = read_object(folder / "config.json")
    notes: list[str] = []
    arch = _architecture(folder, config, notes)
    if not config.get("architectures") or arch != config["architectures"][0]:
        config["architectures"] = [arch]
    for key, kind in {"quantization": "MLX", "quantization_config": "", "compression_config": ""}.items():
        if found := config.get(key):
            raise _quantized(folder, kind or str((isinstance(found, dict) and found.get("quant_method")) or key))
    for first, second in (("dtype", "torch_dtype"), ("rope_scaling", "rope_parameters")):
        if config.get(first) and config.get(second) and config[first] != config[second]:
            notes.append(f"config.json has {first} {config[first]} and {second} {config[second]}: the first counts.")
    for key, value in config.items():
        if MATHS.search(key) and value not in (None, False, 0, 1):
            notes.append(f"config.json has {key} {value!r:.60}, which a {arch} knows nothing of: it is ignored.")
    if dummy:
        return Checked(config, notes=notes)
    weights = _weights(folder, notes)
    _check_tensors(folder, weights, config, notes)
    if (folder / "adapter_config.json").is_file():
        notes.append("The adapter (adapter_config.json) that lies in the folder is not applied: merge it to use it.")
    return Checked(config, weights, notes)


def _architecture(folder: Path, config: dict[str, Any], notes: list[str]) -> str:
    named, kind = config.get("architectures") or [], config.get("model_type")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ModelError(f"{folder}/config.json: `architectures` must be a list of names, not {named!r:.60}.")
    by_type = ARCHITECTURES.get(str(kind))
    arch = named[0] if named else by_type or f"model of type {kind!r}"
    # A model that also names remote code (`auto_map`) is served by our own model or not at all.
    if arch not in ARCHITECTURES.values():
        about = ""
        if (folder / "modules.json").is_file():
            about = " (of sentence-transformers: it makes embeddings, not text)"
        elif "vision_config" in config or "audio_config" in config:
            about = " (for more than text)"
        raise ModelError(f"{folder} is a {arch}{about}; miniserve serves {', '.join(ARCHITECTURES.values())}.")
    if kind is not None and by_type is None:
        raise ModelError(f"{folder}/config.json contradicts itself: the architecture is {arch}, the type {kind!r}.")
    if by_type is not None and by_type != arch:
        notes.append(f"config.json has the architecture {arch} and the type {kind!r}: it is taken for a {by_type}.")
    return by_type or arch


def _quantized(folder: Path, method: str) -> ModelError:
    return ModelError(
        f"{folder} is quantized ({method}): miniserve serves bf16, fp16 and fp32 weights only. Use the model's "
        "unquantized version."
    )


# --- weights --------------------------------------------------------------------------------------------------------


def _weights(folder: Path, notes: list[str]) -> list[Path]:
    """The safetensors files that count: model.safetensors, else those that its index names."""
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
        if (folder / INDEX).is_file():
            notes.append(f"The folder has {SINGLE} and {INDEX}: the first counts.")
    elif (folder / INDEX).is_file():
        where = read_object(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
            raise ModelError(f"{folder}/{INDEX} cannot be read: it has no `weight_map` of files.")
        files = [folder / name for name in sorted(set(where.values()))]
        if missing := [path.name for path in files if not path.is_file()]:
            raise ModelError(
                f"{folder} lacks {', '.join(missing[:3])}, named in its index{_unfinished(folder)}: download the model "
                "again."
            )
    else:
        raise ModelError(_instead(folder, SINGLE))
    if strays := sorted({path.name for path in folder.glob("*.safetensors")} - {path.name for path in files}):
        notes.append(f"Not a part of the model, and not read: {', '.join(strays[:3])}.")
    return files


def _check_tensors(folder: Path, weights: list[Path], config: dict[str, Any], notes: list[str]) -> None:
    """Look at the headers: whether the files are whole and not quantized, and which dtype the tensors have."""
    headers = [_header(path) for path in weights]
    names = {name for header in headers for name in header}
    for ending, method in PACKED.items():
        if any(name.endswith(f".{ending}") for name in names):
            raise _quantized(folder, f"{method}: it has tensors named *.{ending}")
    found = next((DTYPES[kind] for _, kind in sorted(headers[0].items()) if kind in DTYPES), None)
    said = config.get("dtype") or config.get("torch_dtype")
    if found is None or said == found:
        return
    if said not in DTYPES.values():
        config["dtype"] = found
    if said is not None:
        counts = "the first" if said in DTYPES.values() else "the second"
        notes.append(f"config.json has the dtype {said}, the tensors are {found}: {counts} counts.")


def _header(path: Path) -> dict[str, str]:
    """Name -> dtype of the tensors in a safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if LFS_POINTER.startswith(start) and size < 1024 and start:
            raise ModelError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` there.")
        length = int.from_bytes(start, "little")
        whole = size >= 8
        if whole and not 2 <= length <= 100_000_000:  # the format's own limit
            raise ModelError(f"{path} is no safetensors file: download the model again.")
        text = file.read(length) if whole else b""
    try:
        header = json.loads(text) if whole and len(text) == length else {}
        header.pop("__metadata__", None)
        dtypes = {str(name): str(tensor["dtype"]) for name, tensor in header.items()}
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=size)
        cut = 8 + length + end > size
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no safetensors file: download the model again.") from error
    if cut:
        raise ModelError(f"{path} is cut short ({size} bytes){_unfinished(path.parent)}: download the model again.")
    return dtypes


# --- what is there instead ------------------------------------------------------------------------------------------


def _unfinished(folder: Path) -> str:
    begun = [*folder.glob("*.incomplete"), *folder.glob(".cache/huggingface/download/**/*.incomplete")]
    return f" (a download has begun and not ended: {begun[0].name})" if begun else ""


def _instead(folder: Path, lacks: str) -> str:
    """Why there is no file `lacks`, judged by what else is there."""
    path = folder / lacks
    if path.is_symlink():
        return f"{path} is a link to {path.readlink()}, where no file is: download the model again."
    if (folder / "adapter_config.json").is_file():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path", "another model")
        return (
            f"{folder} is an adapter of {base} (adapter_config.json), not a model: merge the two with peft's "
            "merge_and_unload() and save_pretrained(), and serve the result."
        )
    inside = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
    if inside and lacks == "config.json":
        return f"{folder} has no config.json: the model lies in {inside[-1].parent}, give that folder."
    stray = sorted(found.name for found in folder.glob("*.safetensors"))
    if lacks == SINGLE and any("-of-" in name for name in stray):
        return f"{folder} lacks {INDEX}, which says what {stray[0]} is{_unfinished(folder)}: download the model again."
    if stray and lacks == SINGLE:
        return (
            f"{folder} has neither {SINGLE} nor {INDEX}, and {stray[0]} is something else: use the model's Hugging "
            f"Face version, or rename the file if it is {SINGLE}."
        )
    kinds = ("*.gguf", "*.bin", "*.pt", "*.pth", "*.onnx", "onnx/*.onnx", "*.h5", "*.msgpack", "*.npz")
    others = [found.name for kind in kinds for found in sorted(folder.glob(kind))]
    if others:
        return not_safetensors(folder, others)
    if lacks == "config.json":
        return f"{folder} has no config.json{_unfinished(folder)}: give the folder of a Hugging Face model."
    return f"{folder} has no weights{_unfinished(folder)}: add its *.safetensors, or use --load-format dummy."


def not_safetensors(folder: Path, names: list[str]) -> str:
    """That there is nothing but `names`, and how they become safetensors."""
    convert = "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
    if names[0].endswith(".gguf"):
        convert = convert.replace("(FOLDER)", f"(FOLDER, gguf_file={names[0]!r})")
    return (
        f"{folder} has only {', '.join(names[:3])}: miniserve reads safetensors only, since other formats can carry "
        f"code or packed weights. Use the model's safetensors version, or convert it with transformers: {convert}."
    )
