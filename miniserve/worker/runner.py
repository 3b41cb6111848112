"""From scheduled sequences to tensors, through the model, to sampled tokens."""

from __future__ import annotations

import torch

from miniserve.cluster.messages import TokenLogprob
from miniserve.kv.memory import KVMemory
from miniserve.model.transformer import Transformer
from miniserve.ops.batch import Batch
from miniserve.worker.sampler import Sampler
from miniserve.worker.sequence import Sequence


class Runner:
    """The model, the bytes of the KV pool and the sampler of one device. `eos` are the ids that end a turn."""

    def __init__(self, transformer: Transformer, memory: KVMemory, eos: frozenset[int], device: torch.device) -> None:
        self.memory = memory
        self.eos = eos
        self._transformer = transformer
        self._device = device
        self._sampler = Sampler(eos)

    def run(self, work: list[tuple[Sequence, int]]) -> tuple[list[int], list[TokenLogprob | None]]:
        """Compute the next `count` tokens of each (sequence, count).

        Returns a sampled token, and perhaps its log-probability, for each sequence that is complete with this, in the
        order of `work`.
        """
        tokens: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        complete: list[Sequence] = []
        for sequence, count in work:
            end = sequence.computed + count
            tokens += sequence.tokens[sequence.computed : end]
            positions += range(sequence.computed, end)
            if end == len(sequence.tokens):
                outputs.append(len(tokens) - 1)
                complete.append(sequence)
        batch = Batch(
            tokens=torch.tensor(tokens, device=self._device),
            positions=torch.tensor(positions, device=self._device),
            outputs=torch.tensor(outputs, dtype=torch.int64, device=self._device),
            lengths=[count for _, count in work],
            contexts=[sequence.computed + count for sequence, count in work],
            pages=[sequence.pages for sequence, _ in work],
        )
        logits = self._transformer.forward(batch, self.memory.pages)
        if not complete:
            return [], []
        return self._sampler.sample(logits, complete)
