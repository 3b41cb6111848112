"""What is drawn for a request is its own affair."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from miniserve.ops.torch_ops import BLOCK, TorchOps, draw
from miniserve.sampling_params import SamplingParams
from miniserve.worker.sampler import Sampler
from miniserve.worker.sequence import Sequence

KINDS: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.01}, {"temperature": 0}, {"top_k": 1}]


@pytest.mark.parametrize("vocab", [60, 3000, 20011])
def test_what_is_drawn_does_not_depend_on_the_batch(vocab: int) -> None:
    """Filters want tokens in the order of their odds, other draws take them as they come in the vocabulary."""
    sampler = Sampler(frozenset(), TorchOps(torch.device("cpu"), torch.float32))
    sequences = [Sequence(str(n), [1], SamplingParams(**KINDS[n % 6]), n, b"") for n in range(60)]
    logits = torch.randn(60, vocab, generator=torch.Generator().manual_seed(0))
    together = sampler.sample(logits.clone(), sequences).tokens.tolist()
    for kind in range(6):
        alike = sampler.sample(logits[kind::6].clone(), sequences[kind::6]).tokens.tolist()
        assert alike == together[kind::6]
    alone = [sampler.sample(logits[n : n + 1].clone(), [one]).tokens.item() for n, one in enumerate(sequences)]
    assert alone == together


@pytest.mark.parametrize("width", [1, 700, 16 * BLOCK, 16 * BLOCK + 1, 20 * BLOCK, 30011])
def test_a_draw_inverts_the_running_sum(width: int) -> None:
    """In one search or in two, with half of all weights zero; those can never be drawn."""
    numbers = torch.Generator().manual_seed(width)
    weights = torch.rand(40, width, generator=numbers) * (torch.rand(40, width, generator=numbers) < 0.5)
    weights[:, width // 2] = 1.0
    ends = torch.tensor([[[0.0]], [[1 - 2**-53]]], dtype=torch.float64)
    for points in (torch.rand(40, 1, generator=numbers, dtype=torch.float64), *ends.expand(2, 40, 1)):
        sums = weights.double().cumsum(-1)
        drawn = draw(weights, None, points)
        assert bool((weights.gather(1, drawn) > 0).all())
        slack = 1e-12 * sums[:, -1:]
        assert bool((sums.gather(1, drawn) + slack >= points * sums[:, -1:]).all())
        assert bool((sums.gather(1, drawn) - weights.gather(1, drawn).double() - slack <= points * sums[:, -1:]).all())


@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 20 * BLOCK])
def test_the_only_weight_is_drawn(at: int) -> None:
    weights = torch.zeros(3, 20 * BLOCK + 1)
    weights[:, at] = 0.25
    assert draw(weights, None, torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)).tolist() == [[at]] * 3


@pytest.mark.parametrize("width", [60, 20 * BLOCK + 1])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", [{}, {"top_p": 0.9}], ids=["drawn", "filtered"])
def test_a_row_of_no_numbers_harms_no_other(width: int, wrong: float, kind: dict[str, Any]) -> None:
    """As a model overflows in fp16: that row has some token of the vocabulary, and the others theirs."""
    sampler = Sampler(frozenset(), TorchOps(torch.device("cpu"), torch.float32))
    logits = torch.randn(3, width, generator=torch.Generator().manual_seed(3))
    sequences = [Sequence(f"{n}", [1], SamplingParams(**kind), 40 + n, b"") for n in range(3)]
    sound = sampler.sample(logits.clone(), sequences).tokens.tolist()
    logits[1, 5] = wrong
    first, middle, last = sampler.sample(logits, sequences).tokens.tolist()
    assert [first, last] == [sound[0], sound[2]]
    assert 0 <= middle < width
