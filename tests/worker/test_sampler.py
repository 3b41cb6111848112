"""What is drawn for a request is its own affair."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from miniserve.ops.torch_ops import TorchOps
from miniserve.sampling_params import SamplingParams
from miniserve.worker.sampler import Sampler
from miniserve.worker.sequence import Sequence

KINDS: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.01}, {"temperature": 0}, {"top_k": 1}]


@pytest.mark.parametrize("vocab", [60, 3000])
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
