"""The directory of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from miniserve.cluster.launch import RunDir


def test_a_link_in_place_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    """Anyone may make one in /tmp, to a directory of ours in which nothing is to be swept away."""
    ours = tmp_path / "ours"
    ours.mkdir(mode=0o700)
    (ours / "kept").mkdir()
    (ours / "kept" / "lock").touch()
    (tmp_path / "base").symlink_to(ours)
    with pytest.raises(OSError, match="not a private directory"):
        RunDir(tmp_path / "base")
    assert (ours / "kept" / "lock").exists()
