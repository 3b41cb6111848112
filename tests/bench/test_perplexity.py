"""The script that measures perplexities: against transformers in fp32, by transformers' own rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from miniserve.text.tokenizer import Tokenizer
from scripts import perplexity
from tests.support.tiny import make_model

pytestmark = pytest.mark.slow

WINDOW, STRIDE = 64, 24


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(perplexity.TEXT.read_text("utf-8")[:700])
    return path


def run(text: Path, out: Path, *models: str) -> dict[str, Any]:
    flags = ["--text", str(text), "--window", str(WINDOW), "--stride", str(STRIDE), "--json", str(out)]
    assert perplexity.main([*flags, *(flag for model in models for flag in ("--model", model))]) == 0
    return json.loads(out.read_text())


@torch.no_grad()
def transformers_perplexity(folder: Path, text: Path) -> float:
    """As its guide "Perplexity of fixed-length models" computes it, window by window, with its own loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([Tokenizer.load(folder).encode(text.read_text())])
    total, counted, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], STRIDE):
        end = min(begin + WINDOW, ids.shape[1])
        window = ids[:, begin:end]
        labels = window.clone()
        if before:
            labels[:, : before - end] = -100
        count = int((labels[:, 1:] != -100).sum())
        total += model(window, labels=labels).loss.item() * count
        counted, before = counted + count, end
        if end == ids.shape[1]:
            break
    assert counted == ids.shape[1] - 1
    return math.exp(total / counted)


def test_it_is_that_of_transformers(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    found = run(text, tmp_path / "out.json", str(tiny_folder))
    wanted = transformers_perplexity(tiny_folder, text)
    assert found["models"][str(tiny_folder)]["perplexity"] == pytest.approx(wanted, rel=1e-4)


def test_fewer_bits_are_fewer_bytes_and_other_text(
    tiny_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, int8, int4 = models = [str(tiny_folder), f"{tiny_folder}:int8", f"{tiny_folder}:int4"]
    rows = run(text, tmp_path / "out.json", *models)["models"]
    assert rows[plain]["read_mib"] > rows[int8]["read_mib"] > rows[int4]["read_mib"]
    assert (rows[plain]["loss"], rows[plain]["same"]) == (0, 1)
    assert 1 > rows[int8]["same"] > rows[int4]["same"] > 0.1
    assert 0 < rows[int8]["loss_error"] < rows[int4]["loss_error"]
    for model in models:
        assert rows[model]["perplexity"] == pytest.approx(rows[plain]["perplexity"] * (1 + rows[model]["loss"]))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {Path(model).name}" for model in models]


def test_a_step_reads_the_tied_matrix_once(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    rows = run(text, tmp_path / "out.json", str(tiny_folder), f"{tiny_folder}:int8")["models"]
    plain, packed = (row["read_mib"] * 2**20 for row in rows.values())
    norms = 5 * 128 * 4
    assert packed - norms == pytest.approx((plain - norms) * 8.5 / 32)


@pytest.mark.parametrize(("count", "size", "stride"), [(1, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 3), (50, 16, 15)])
def test_each_token_but_the_first_counts_once(count: int, size: int, stride: int) -> None:
    cut = perplexity.windows(count, size, stride)
    assert [token for _, end, first in cut for token in range(first, end)] == [*range(1, count)]
    assert all(end - begin <= size for begin, end, _ in cut)
    assert all(first - begin >= size - stride for begin, _, first in cut[1:])


def test_models_with_other_tokens_are_not_compared(
    tiny_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", "llama", vocab=420)
    with pytest.raises(SystemExit):
        run(text, tmp_path / "out.json", str(tiny_folder), str(other))
    assert "cut the text into other tokens" in capsys.readouterr().err
