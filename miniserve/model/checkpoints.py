"""The tensors of a checkpoint by the names that Hugging Face's unquantized models give them, from safetensors."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from miniserve.config import ConfigError, format_bytes
from miniserve.ops.quantized import Weight

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Read = Callable[[str, tuple[int, ...]], Weight]
"""The tensor of a name, which must have that shape. Raises `ConfigError`."""


class Costs:
    """What is stored in few bits, and served in many: tensors, numbers and stored bytes by the kind of tensor."""

    def __init__(self) -> None:
        self._kinds: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])

    def add(self, kind: str, numbers: int, stored: int) -> None:
        self._kinds[kind] = [a + b for a, b in zip(self._kinds[kind], (1, numbers, stored), strict=True)]

    def lines(self, dtype: torch.dtype) -> list[str]:
        name = str(dtype).removeprefix("torch.")
        return [
            f"{count} tensors ({kind}) are served as {name}: a step reads {format_bytes(numbers * dtype.itemsize)} of "
            f"them where the file has {format_bytes(stored)}."
            for kind, (count, numbers, stored) in self._kinds.items()
        ]


class Safetensors:
    """The tensors of open `files`. `names` are those of all weights; `unread` of tensors that nobody has asked for."""

    def __init__(self, folder: Path, files: list[Any], costs: Costs) -> None:
        self._folder, self._costs = folder, costs
        # Each in the last of the files that hold it. Files are mapped, not read at once.
        found = {name: (file, name) for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
        # Of a model that was saved without its head, as some are, names lack the first part.
        self._where = {n if n.startswith(("model.", "lm_head.")) else f"model.{n}": at for n, at in found.items()}
        self.names = set(self._where)
        self.unread = set(self._where)

    def read(self, name: str, shape: tuple[int, ...]) -> Weight:
        if name not in self._where:
            raise missing(self._folder, name)
        tensor = self._tensor(name)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ConfigError(f"{name} in {self._folder} is {tensor.dtype}: miniserve knows no such weights.")
        return checked(self._folder, name, tensor, shape)

    def _tensor(self, name: str) -> torch.Tensor:
        self.unread.discard(name)
        file, stored = self._where[name]
        return file.get_tensor(stored)


def missing(folder: Path, name: str) -> ConfigError:
    tied = "; if its matrix is also the head, set tie_word_embeddings in config.json" if name == HEAD else ""
    return ConfigError(f"{folder} has no tensor {name!r}: not complete, or another architecture{tied}.")


def checked(folder: Path, name: str, weight: Weight, shape: tuple[int, ...]) -> Weight:
    """`weight`, if it has the `shape` that the model's sizes ask for. Raises `ConfigError`."""
    if tuple(weight.shape) != shape:
        raise ConfigError(
            f"{name} in {folder} has the shape {tuple(weight.shape)}, but config.json says {shape}: the files do "
            "not belong together."
        )
    return weight
