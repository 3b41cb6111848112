"""Hardware profiles: the formula of a step, the presets against published figures, files and roles."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from miniserve.bench.simulate.hardware import PRESETS, load_hardware, load_roles
from miniserve.config import ConfigError
from tests.support.simulated import PLAIN

A40 = PRESETS["a40-qwen3-0.6b"]


def test_a_step_takes_what_the_formula_says():
    hardware = msgspec.structs.replace(
        PLAIN, per_pair=1e-6, per_context=1e-5, per_sequence=0.002, per_kv_token=1e-5, overhead=0.001, floor=0.015
    )
    assert hardware.step_seconds((), 1, 100) == pytest.approx(0.001 + 0.015), "the floor"
    assert hardware.step_seconds((), 4, 1000) == pytest.approx(0.001 + 0.01 + 0.008 + 0.01)
    both = 0.001 + 0.01 + (0.05 + 1e-6 * 50 * (200 + 25) + 0.002) + 0.008 + 0.01
    assert hardware.step_seconds([(50, 200)], 4, 1000) == pytest.approx(both)


@pytest.mark.parametrize(("tokens", "published"), [(1000, 36.5), (4000, 107), (8000, 232), (16000, 622), (32000, 1977)])
def test_the_a40_prefills_as_published(tokens: int, published: float):
    """The published times include one decode step."""
    seconds = A40.step_seconds([(tokens, 0)], 0, 0) + A40.step_seconds((), 1, tokens)
    assert 1e3 * seconds == pytest.approx(published, rel=0.07)


def test_the_a40_appends_and_decodes_as_published():
    assert 1e3 * A40.step_seconds([(67, 16_000)], 0, 0) == pytest.approx(0.95e-3 * 16_000 + 5.6, rel=0.06)
    assert 1e3 * A40.step_seconds((), 1, 1000) == 14.3
    assert 1e3 * A40.step_seconds((), 16, 256_000) == pytest.approx(5.7 + 0.06 * 16 + 1.85e-4 * 256_000)


def test_a_divided_model_computes_in_parts_and_adds_them_up():
    two = A40.divided(2)
    assert A40.divided(1) == A40
    token = 2 * 28 * 1024 * 2 / A40.transfer_bytes_per_second  # two sums a layer, each of which sends all numbers once
    assert two.per_token == pytest.approx(A40.per_token / 2 + token)
    assert two.base == pytest.approx(A40.base / 2 + 2 * 28 * 2 * A40.hop_seconds)
    assert (two.per_kv_token, two.kv_tokens) == (A40.per_kv_token / 2, 2 * A40.kv_tokens)
    assert two.transfer_seconds(9) < A40.transfer_seconds(9)
    assert 0.5 < two.step_seconds([(8000, 0)], 0, 0) / A40.step_seconds([(8000, 0)], 0, 0) < 0.7
    assert load_roles(A40.name, 2) == (two, two)
    assert load_roles(A40.name, 2, 10**9)[0].swap_space == 2 * 10**9, "as with serve, each rank has so much"
    with pytest.raises(ConfigError, match="no layers and hidden_size"):
        PLAIN.divided(2)


def test_roles_have_hardware_of_their_own(tmp_path: Path):
    assert load_roles("a40-qwen3-0.6b") == (A40, A40)
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(PLAIN))
    assert load_hardware(str(path)) == PLAIN
    assert load_roles("P=a40-qwen3-0.6b,D=a40-qwen3-0.6b-200w")[1].name == "a40-qwen3-0.6b-200w"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("h100", "No hardware profile 'h100': use a40-qwen3-0.6b, "),
        ("P=a40-qwen3-0.6b", "write one profile, or P=...,D=..."),
        ("P=a40-qwen3-0.6b,X=a40-qwen3-0.6b", "write one profile, or P=...,D=..."),
        ("P=a40-qwen3-0.6b,D={plain}", "KV pages of different sizes"),
        ("{broken}", "is not a hardware profile"),
    ],
)
def test_a_wrong_hardware_says_how_to_mend_it(tmp_path: Path, text: str, complaint: str):
    (tmp_path / "plain.json").write_bytes(msgspec.json.encode(PLAIN))
    (tmp_path / "broken.json").write_text('{"name": "x"}')
    text = text.replace("{plain}", str(tmp_path / "plain.json")).replace("{broken}", str(tmp_path / "broken.json"))
    with pytest.raises(ConfigError) as caught:
        load_roles(text)
    assert complaint in str(caught.value)


def test_a_transfer_to_another_host_takes_longer() -> None:
    some = msgspec.structs.replace(PLAIN, far_bytes_per_second=1e5, far_latency=0.5)
    assert some.transfer_seconds(1) == pytest.approx(16 * 1000 / 1e6)
    assert some.transfer_seconds(1, near=False) == pytest.approx(16 * 1000 / 1e5 + 0.5)
    assert PLAIN.transfer_seconds(1, near=False) == PLAIN.transfer_seconds(1)
