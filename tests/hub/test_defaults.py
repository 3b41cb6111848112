"""What a model's generation_config.json sets for requests that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from miniserve.config import ConfigError
from miniserve.hub.check import generation_defaults


def test_the_models_sampling_defaults(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path, "auto") == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.6, "top_k": 20, "top_p": null}')
    assert generation_defaults(tmp_path, "auto") == {"temperature": 0.6, "top_k": 20}
    assert generation_defaults(tmp_path, "vllm") == {}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_broken_sampling_defaults_name_the_file_and_the_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json .*[mM]end it"):
        generation_defaults(tmp_path, "auto")
    assert generation_defaults(tmp_path, "vllm") == {}
