"""Grammars applied to logits: of each row, the tokens that may not come next are ruled out."""

import numpy as np
import torch
from llguidance import LLExecutor
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

from miniserve.text.grammar import failure
from miniserve.worker.sequence import Sequence


class Masks:
    """Keeps the rows of a batch within their grammars."""

    def __init__(self) -> None:
        self._executor = LLExecutor()

    def apply(self, logits: torch.Tensor, sequences: list[Sequence], ends: frozenset[int]) -> None:
        """Rule out what may not come next: minus infinity in `logits` (float32 `[n, vocab]`, changed in place), of
        sequences that have a grammar only. Before `min_tokens` that is an end (of the ids `ends`, and stop tokens) too,
        unless nothing else may come. A grammar that fails lets everything through; its matcher says so."""
        found = [(row, s, s.matcher) for row, s in enumerate(sequences) if s.matcher is not None]
        if not found:
            return
        vocab = logits.shape[1]
        for _, sequence, matcher in found:
            matcher.follow(sequence.outputs)
        size = found[0][2].vocab_size
        bits = allocate_token_bitmask(len(found), size)
        fill_next_token_bitmask_par(self._executor, [(m.matcher, i) for i, (_, _, m) in enumerate(found)], bits)
        pinned = logits.device.type == "cuda"
        ruled_out = torch.empty(len(found), vocab, dtype=torch.bool, pin_memory=pinned)
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=vocab, bitorder="little")
        for i, (_, sequence, matcher) in enumerate(found):
            matcher.error = matcher.error or failure(matcher.matcher)
            if sequence.num_outputs < sequence.params.min_tokens:
                _without(allowed[i], [*ends, *sequence.params.stop_token_ids])
            if matcher.error or not allowed[i].any():
                matcher.error = matcher.error or "no token of this model may come next."
                allowed[i] = 1
        np.equal(allowed, 0, out=ruled_out.numpy())
        mask = ruled_out.to(logits.device, non_blocking=True)
        if len(found) == len(sequences):
            logits.masked_fill_(mask, -torch.inf)
            return
        rows = torch.tensor([row for row, _, _ in found], pin_memory=pinned).to(logits.device, non_blocking=True)
        logits.index_copy_(0, rows, logits[rows].masked_fill_(mask, -torch.inf))


def _without(allowed: np.ndarray, tokens: list[int]) -> None:
    """Rule out `tokens` in one row, unless that leaves nothing."""
    rest = allowed.copy()
    rest[tokens] = 0
    if rest.any():
        allowed[:] = rest
