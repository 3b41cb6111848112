"""Sizes, topologies, and settings that travel to the workers."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniserve.config import (
    ConfigError,
    EngineConfig,
    Role,
    Topology,
    cache_dir,
    format_bytes,
    parse_bytes,
    parse_graph_sizes,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1073741824", 2**30),
        ("2GiB", 2 * 2**30),
        ("2 gib", 2 * 2**30),
        (" 512M ", 512 * 10**6),
        ("512MiB", 512 * 2**20),
        ("512Mi", 512 * 2**20),
        ("1.5g", 1_500_000_000),
        ("1.5GB", 1_500_000_000),
        (".5k", 500),
        ("3KiB", 3072),
        ("2TiB", 2 * 2**40),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "1e9", "2PiB", "1.2.3M", "two", "1 000", "1G G", "nan", "inf"])
def test_what_is_no_size_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like 2GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "0", "1,,2", "513", "1.5", "1 2", "all"])
def test_what_is_no_graph_size_says_how_to_write_some(text: str) -> None:
    with pytest.raises(ConfigError, match="a batch size from 1 to 512: write them like 1,2,4,8"):
        parse_graph_sizes(text)


@given(prefillers=st.integers(0, 64), decoders=st.integers(1, 64))
def test_a_topology_reads_as_it_is_written(prefillers: int, decoders: int) -> None:
    topology = Topology(prefillers, decoders)
    assert Topology.parse(str(topology)) == topology
    assert len(topology.roles) == prefillers + decoders
    assert list(topology.roles.values()) == [Role.PREFILLER] * prefillers + [Role.DECODER] * decoders


@pytest.mark.parametrize(
    ("text", "workers", "written"),
    [
        ("1D", ["d0"], "1D"),
        ("2d", ["d0", "d1"], "2D"),
        (" 1p2D ", ["p0", "d0", "d1"], "1P2D"),
        ("0P1D", ["d0"], "1D"),
    ],
)
def test_topologies(text: str, workers: list[str], written: str) -> None:
    topology = Topology.parse(text)
    assert (list(topology.roles), str(topology)) == (workers, written)


@pytest.mark.parametrize("text", ["", "1P", "0D", "1P0D", "D", "2", "1D1P", "1P1D1", "-1D", "1P 1D", "1.5D"])
def test_what_is_no_topology_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not understood: write .* like 1D, 2D, 1P1D"):
        Topology.parse(text)


def test_a_worker_reads_the_settings_it_was_sent() -> None:
    config = EngineConfig(model="/models/x", dtype="float32", kv_cache_memory=2**30, enable_prefix_caching=False)
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MINISERVE_CACHE", "~/own")
    assert cache_dir() == Path.home() / "own"
    monkeypatch.delenv("MINISERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "miniserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "miniserve"


@given(st.integers(0, 2**45))
def test_sizes_are_written_as_they_are_read(size: int) -> None:
    low, high = parse_bytes(format_bytes(size)), parse_bytes(format_bytes(size, up=True))
    assert low <= size <= high
    assert high - low <= max(size // 50, 11)


def test_how_sizes_are_written() -> None:
    assert [format_bytes(n) for n in (0, 2**20, 3 * 2**29, 20 * 2**30 + 1)] == ["0KiB", "1MiB", "1.5GiB", "20GiB"]
