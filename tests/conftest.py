"""Fixtures of all tests: tiny models made once, a cache of their own, and the default model where it can be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from miniserve.cluster.launch import DEFAULTS

if TYPE_CHECKING:
    from miniserve.text.tokenizer import Tokenizer

# How long an example takes says nothing on a machine that is shared. CI asks whether a change broke something, so its
# examples are always the same; new ones are looked for by everybody who runs the tests.
hypothesis.settings.register_profile("miniserve", deadline=None, print_blob=True, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("miniserve")

# Read by huggingface_hub when it is imported: no test asks the network for a model by accident.
os.environ["HF_HUB_OFFLINE"] = "1"

# Read when torch is imported. Engines in this process then wait as workers do: on busy cores
# their tests take half as long.
os.environ.update(DEFAULTS)

# Clusters of Ray that tests start write no token into this user's home, and ask for none.
os.environ["RAY_AUTH_MODE"] = "disabled"

FIRST = ("test_hosts.py", "test_cluster.py", "test_parity.py", "test_ops.py", "test_server.py", "test_interleavings.py")
"""Files that take longest: what begins last would keep one core busy alone."""
USERS_CACHE = os.environ.get("MINISERVE_CACHE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache is not read or written (but by `smollm2_folder`)."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISERVE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random models: every architecture, both config shapes, tied and untied, one and several files."""
    import torch
    import transformers

    from tests.support import tiny

    torch.set_num_threads(1)  # more of them only get in each other's way here
    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": tiny.make_model(root / "llama", "llama", tie=True, old_config_shape=True),
        "llama3": tiny.make_model(root / "llama3", "llama", rope_scaling="llama3", shards=3, seed=1),
        "qwen2": tiny.make_model(root / "qwen2", "qwen2", old_config_shape=True, seed=5),
        "qwen3": tiny.make_model(root / "qwen3", "qwen3", head_dim=32, tie=True, seed=3),
        "mistral": tiny.make_model(root / "mistral", "mistral", shards=2, seed=4),
    }


@pytest.fixture(scope="session")
def newer_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same of the families with experts, recurrent layers or windows shorter than the tests' prompts."""
    import torch
    import transformers

    from tests.support import tiny

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("newer")
    return {arch: tiny.make_model(root / arch, arch, seed=7) for arch in tiny.NEWER}


@pytest.fixture(scope="session")
def hybrid_folder(newer_models: dict[str, Path]) -> Path:
    """A tiny model with recurrent layers and attention."""
    return newer_models["qwen3_5"]


@pytest.fixture(scope="session")
def tiny_folder(tiny_models: dict[str, Path]) -> Path:
    """One of the tiny models, for tests that do not care which."""
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer of models with random weights: bytes are tokens, and messages are rendered as "role: content"."""
    from miniserve.hub import resolve
    from miniserve.text.tokenizer import Tokenizer

    return Tokenizer.load(resolve.resolve("smollm2-135m", load_format="dummy").folder)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """One for each format of tool calls."""
    from tests.support import dialects

    root = tmp_path_factory.mktemp("dialects")
    return {form: dialects.tokenizer(root / form, form) for form in dialects.FORMS}


@pytest.fixture(scope="session")
def hermes(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """A tokenizer of a model that reasons and calls tools."""
    return tokenizers["hermes"]


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The default model from the user's own cache, fetched there if need be; skips where that cannot be done."""
    from miniserve.config import ConfigError
    from miniserve.hub.resolve import resolve

    with pytest.MonkeyPatch.context() as patch:
        if USERS_CACHE is None:
            patch.delenv("MINISERVE_CACHE")
        else:
            patch.setenv("MINISERVE_CACHE", USERS_CACHE)
        try:
            return resolve("smollm2-135m").folder
        except ConfigError as error:
            pytest.skip(f"needs the default model: {error}")


@pytest.fixture(scope="session")
def smollm2_plain(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The numbers of the default model in fp32, which transformers reads."""
    from tests.support.gguf_files import plain_copy

    return plain_copy(smollm2_folder, tmp_path_factory.mktemp("plain") / "smollm2")


@pytest.fixture
def compiled_kernels() -> None:
    """Skips a test where the native kernels of a CPU cannot be compiled."""
    from miniserve.ops.native import NoKernels, load

    try:
        load()
    except NoKernels as reason:
        pytest.skip(str(reason))
