"""What is in a model's folder: whether miniserve can serve it, and which of its files count (docs/models.md).

Weights are safetensors, or a GGUF that `gguf.py` has indexed, and code that comes with a model is never run. Of weights
only headers are read, so that what is wrong is said before a worker starts. Where a folder says a thing twice,
transformers' choice is ours.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from miniserve.config import LFS_POINTER, ConfigError, problem, read_object, tables
from miniserve.families import FAMILIES, text_model

ARCHITECTURES = {kind: arch for arch, family in FAMILIES.items() for kind in family.types}
"""By config.json's `model_type`."""
TEXT_MODELS = {other: arch for arch, family in FAMILIES.items() for other in (arch, *family.also)}
"""The architecture of the text model, by that of the whole."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
GGUF, GGUF_INDEX = "model.gguf", "model.json"
"""A GGUF, and where each tensor is in it: {name: [offset, bytes, kind, shape, heads whose rows have GGUF's order]}."""
GGUF_SEEN = "seen.json"
"""The size of a GGUF outside its folder, and the time of its last change, when it was indexed."""
TABLES = tables("hub/check.toml")
MATHS = re.compile(TABLES["maths"])


@dataclass
class Checked:
    """A folder that can be served. `config` is config.json, with `architectures` and `dtype` filled in; `weights` are
    the files that hold the model's tensors, and `notes` tell where the folder contradicts itself.

    `method` is what --quantization calls weights that are quantized, and `format` says it to people. `bits` is what a
    number takes in the layers' matrices and in the head with its share of the scales; None: as much as in the dtype.
    """

    config: dict[str, Any]
    weights: list[Path] = field(default_factory=list)
    method: str = ""
    format: str = ""
    bits: tuple[float | None, float | None] = (None, None)
    notes: list[str] = field(default_factory=list)


def check_folder(folder: Path, dummy: bool) -> Checked:
    """What the folder holds. Raises `ConfigError`, in one line, if miniserve cannot serve it."""
    try:
        if not (folder / "config.json").is_file():
            raise ConfigError(_instead(folder, "config.json"))
        found = Checked(text_model(read_object(folder / "config.json")))
        _check_config(folder, found)
        if not dummy:
            _check_weights(folder, found)
        return found
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from error


def generation_defaults(folder: Path, source: str) -> dict[str, Any]:
    """The sampling defaults in the model's generation_config.json, if `source` is "auto". With `do_sample: false` too
    the client's temperature counts, as with other servers. Raises `ConfigError` for a file that is no JSON object."""
    found = read_object(folder / "generation_config.json") if source == "auto" else {}
    # Hugging Face writes null, and 1.0 or 0 for filters that are off.
    return {name: value for name, value in found.items() if value is not None}


def _check_config(folder: Path, found: Checked) -> None:
    config, notes = found.config, found.notes
    named, kind = config.get("architectures") or [], config.get("model_type")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ConfigError(f"{folder}/config.json: `architectures` must be a list of names, not {named!r:.60}.")
    by_type = ARCHITECTURES.get(str(kind))
    arch = str(TEXT_MODELS.get(named[0], named[0]) if named else by_type or f"model of type {kind!r}")
    # A model that also names remote code (`auto_map`) is served by our own model or not at all.
    if arch not in ARCHITECTURES.values():
        about = " (it makes embeddings, not text)" if (folder / "modules.json").is_file() else ""
        served = ", ".join(name.removesuffix("ForCausalLM") for name in FAMILIES)
        raise ConfigError(f"{folder} is a {arch}{about}; miniserve serves {served} (ForCausalLM).")
    if by_type != arch and kind is not None:
        if by_type is None:
            raise ConfigError(problem("hub.contradiction", folder=folder, arch=arch, kind=kind))
        notes.append(f"config.json has the architecture {arch} and the type {kind!r}: it is taken for a {by_type}.")
    arch = by_type or arch
    config["architectures"] = [arch, *named[1:]]
    for key in ("quantization", "compression_config"):
        if config.get(key):
            method = "MLX" if key == "quantization" else key
            raise ConfigError(problem("hub.quantized", folder=folder, method=method))
    if said := config.get("quantization_config"):
        _check_packing(folder, said if isinstance(said, dict) else {}, found)
    for first, second in (("dtype", "torch_dtype"), ("rope_scaling", "rope_parameters")):
        if config.get(first) and config.get(second) and config[first] != config[second]:
            notes.append(f"config.json has {first} {config[first]} and {second} {config[second]}: the first counts.")
    known = {*FAMILIES[arch].defaults, "num_local_experts"}
    for key, value in config.items():
        if MATHS.search(key) and key not in known and value not in (None, False, 0, 1):
            notes.append(f"config.json has {key} {value!r:.60}, which a {arch} knows nothing of: it is ignored.")


def _check_packing(folder: Path, said: dict[str, Any], found: Checked) -> None:
    """Take from config.json's `quantization_config` how the weights are packed. Raises `ConfigError`."""
    kind = found.method = str(said.get("quant_method") or "quantization_config")
    bits, symmetric, served = said.get("bits"), said.get("sym", True), False
    match found.method:
        case "awq":
            kind, symmetric = f"awq {said.get('version') or 'gemm'}".lower(), False
            served = kind == "awq gemm" and bits == 4
        case "gptq":
            kind = str(said.get("checkpoint_format") or "gptq")
            served = kind in ("gptq", "gptq_v2") and bits in (4, 8)
        case "fp8":
            bits, served = "fp8", said.get("weight_block_size") in (None, [128, 128])
        case "compressed-tensors":
            groups = (said.get("config_groups") or {}).values()
            weights = [group.get("weights") or {} for group in groups]
            kinds = [f"{w.get('type')}{w.get('num_bits')}" for w in weights]
            bits = {kind.replace("float8", "fp8").removeprefix("int") for kind in kinds}
            bits = int(bits.pop()) if bits in ({"4"}, {"8"}) else ", ".join(sorted(bits))
            symmetric = all(w.get("symmetric", True) for w in weights)
            forms = {group.get("format") or said.get("format") for group in groups}
            rounded = bits != "fp8" and any(group.get("input_activations") for group in groups)
            kind = ", ".join([kind, *map(str, forms), *["integer activations"] * rounded])
            served = bits in (4, 8, "fp8") and forms <= {*TABLES["forms"]} and not rounded
    if not served:
        method = f"{kind}, {bits} bits" if isinstance(bits, int) else kind
        raise ConfigError(problem("hub.quantized", folder=folder, method=method))
    found.format = "FP8, dequantized" if bits == "fp8" else f"{bits}-bit ({found.method})"
    if bits == 4 or (bits == 8 and symmetric):
        found.bits = 5.0 if bits == 4 else 8.5, None


def _check_weights(folder: Path, found: Checked) -> None:
    """Find the safetensors files that count: model.safetensors, else those that its index names. Look whether they are
    whole and not quantized, and which dtype the tensors have."""
    read, dtypes = {SINGLE}, TABLES["dtypes"]
    if (folder / GGUF_INDEX).is_file() and not (folder / SINGLE).is_file():
        _check_gguf(folder, found)
        return
    if not (folder / SINGLE).is_file():
        if not (folder / INDEX).is_file():
            raise ConfigError(_instead(folder, SINGLE))
        where = read_object(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
            raise ConfigError(f"{folder}/{INDEX} cannot be read: it has no `weight_map` of files.")
        read = set(where.values())
        if missing := sorted(name for name in read if not (folder / name).is_file()):
            lost, begun = ", ".join(missing[:3]), _unfinished(folder)
            raise ConfigError(f"{folder} lacks {lost}, named in its index{begun}: download the model again.")
    found.weights = [folder / name for name in sorted(read)]
    strays = {path.name for path in folder.glob("*.safetensors*")} - read - ({INDEX} if read != {SINGLE} else set())
    strays |= {path.name for path in folder.glob("adapter_config.json")}
    if strays:
        found.notes.append(f"Not a part of the model, and not read: {', '.join(sorted(strays)[:4])}.")
    headers = [_header(path) for path in found.weights]
    for ending, method in TABLES["packed"].items():
        if not found.method and any(name.endswith(f".{ending}") for header in headers for name in header):
            method += f": it has tensors named *.{ending}"
            raise ConfigError(problem("hub.quantized", folder=folder, method=method))
    dtype = next((dtypes[kind] for kind in headers[0].values() if kind in dtypes), None)
    said = found.config.get("dtype") or found.config.get("torch_dtype")
    if said != dtype and said is not None:
        found.notes.append(f"config.json has the dtype {said}, the tensors are {dtype}: a known one there counts.")
    if said not in dtypes.values():
        found.config["dtype"] = dtype


def _check_gguf(folder: Path, found: Checked) -> None:
    found.weights = [folder / GGUF]
    index, bits_of = read_object(folder / GGUF_INDEX), TABLES["gguf_bits"]
    file, seen = found.weights[0].stat(), read_object(folder / GGUF_SEEN)
    now = {"size": file.st_size, "time": file.st_mtime_ns}
    if (seen or now) != now or file.st_size < max(offset + size for offset, size, *_ in index.values()):
        raise ConfigError(f"{found.weights[0].resolve()} has changed since it was indexed: start the server again.")
    matrices = {name: (kind, math.prod(shape)) for name, (_, _, kind, shape, _) in index.items() if len(shape) > 1}
    head = matrices.get("lm_head.weight", matrices["model.embed_tokens.weight"])
    layers = Counter[str]()
    for name, (kind, numbers) in matrices.items():
        layers[kind] += numbers if name.startswith("model.layers.") else 0
    usual = layers.most_common(1)[0][0]
    if {usual, head[0]} - {"F32", "F16", "BF16"}:
        found.method = "gguf"
        found.format = f"{usual[1]}-bit ({usual})" if usual in bits_of else f"{usual}, dequantized"
        # Other kinds become bf16, or fp32 at the most.
        bits = sum(numbers * bits_of.get(kind, 32) for kind, numbers in layers.items()) / layers.total()
        found.bits = bits, bits_of.get(head[0])


def _header(path: Path) -> dict[str, str]:
    """Name -> dtype of the tensors in a safetensors file, sorted by name."""
    with path.open("rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ConfigError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` there.")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_dtype() for name in sorted(file.keys())}
    except SafetensorError as error:
        what = f"{path.stat().st_size} bytes that are no whole safetensors file{_unfinished(path.parent)}"
        raise ConfigError(f"{path} has {what} ({error}): download the model again.") from error


def _unfinished(folder: Path) -> str:
    begun = [*folder.glob("*.incomplete"), *folder.glob(".cache/huggingface/download/**/*.incomplete")]
    return f" (a download has begun and not ended: {begun[0].name})" if begun else ""


def _instead(folder: Path, lacks: str) -> str:
    """Why there is no file `lacks`, judged by what else is there."""
    if (path := folder / lacks).is_symlink():
        return f"{path} is a link to {path.readlink()}, where no file is: download the model again."
    if (folder / "adapter_config.json").is_file():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path", "another model")
        return problem("hub.adapter", folder=folder, base=base)
    inside = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
    if inside and lacks == "config.json":
        return f"{folder} has no config.json: the model lies in {inside[-1].parent}, give that folder."
    stray = sorted(found.name for found in folder.glob("*.safetensors"))
    if stray and lacks == SINGLE:
        return problem("hub.stray", folder=folder, stray=stray[0], unfinished=_unfinished(folder))
    if others := [found.name for kind in TABLES["others"] for found in sorted(folder.glob(kind))]:
        return problem("hub.not_safetensors", folder=folder, names=", ".join(others[:3]))
    if lacks == "config.json":
        return f"{folder} has no config.json{_unfinished(folder)}: give the folder of a Hugging Face model."
    return f"{folder} has no weights{_unfinished(folder)}: add its *.safetensors, or use --load-format dummy."
