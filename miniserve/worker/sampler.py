"""From logits to tokens. Stateless: what is drawn depends on the request's seed and the output's position only.

So the same request gives the same text whatever shares its batch, after a preemption, and on another worker.
"""

from __future__ import annotations

from hashlib import blake2b

import torch

from miniserve.cluster.messages import TokenLogprob
from miniserve.worker.sequence import Sequence

SORTED = 1024
"""Candidates that are sorted at first: nearly always enough for top_k, top_p and min_p, and far fewer than a
vocabulary."""


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that draws output number `position` of a request."""
    digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


class Sampler:
    """Chooses the next token of each sequence. `eos` are the ids that end a turn."""

    def __init__(self, eos: frozenset[int]) -> None:
        self._eos = eos

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> tuple[list[int], list[TokenLogprob | None]]:
        """One token for each row of `logits` (float32 `[n, vocab]`, changed in place), with its log-probability where
        the request asks for it."""
        raw = {
            row: logits[row].log_softmax(-1)
            for row, sequence in enumerate(sequences)
            if sequence.params.logprobs is not None
        }
        for row, sequence in enumerate(sequences):
            self._shape(logits[row], sequence)
        tokens = logits.argmax(-1).tolist()
        drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
        if drawn:
            picked = _draw(logits if len(drawn) == len(sequences) else logits[drawn], [sequences[r] for r in drawn])
            for row, token in zip(drawn, picked, strict=True):
                tokens[row] = token
        logprobs: list[TokenLogprob | None] = [None] * len(sequences)
        for row, values in raw.items():
            logprobs[row] = _logprob(values, tokens[row], sequences[row].params.logprobs or 0)
        return tokens, logprobs

    def _shape(self, row: torch.Tensor, sequence: Sequence) -> None:
        """Apply what a request wants changed in its logits: bias, penalties, no end before min_tokens."""
        params = sequence.params
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
            values = row[seen]
            # CTRL (arXiv 1909.05858), as transformers and vLLM do it: away from zero is always less likely.
            penalty = params.repetition_penalty
            row[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if params.presence_penalty or params.frequency_penalty:
            outputs = sequence.tokens[len(sequence.tokens) - sequence.num_outputs :]
            if outputs:
                ids, counts = torch.tensor(outputs, device=row.device).unique(return_counts=True)
                row[ids] -= params.frequency_penalty * counts + params.presence_penalty
        if params.logit_bias:
            row[torch.tensor(list(params.logit_bias), device=row.device)] += torch.tensor(
                list(params.logit_bias.values()), device=row.device
            )
        if sequence.num_outputs < params.min_tokens:
            ends = [*params.stop_token_ids, *(() if params.ignore_eos else self._eos)]
            row[torch.tensor(ends, dtype=torch.int64, device=row.device)] = -torch.inf


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """Draw one id a row by inverting the cumulative distribution at the request's own random number."""
    params = [sequence.params for sequence in sequences]

    def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device).unsqueeze(1)

    temperature = column([p.temperature for p in params])
    points = column([uniform(s.seed, s.num_outputs) for s in sequences], torch.float64)
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if all(p.top_k <= 0 and p.top_p >= 1 and p.min_p <= 0 for p in params):
        return _invert(probs, points).squeeze(1).tolist()
    vocab = probs.shape[1]
    top_k = column([p.top_k if p.top_k > 0 else vocab for p in params], torch.int64)
    top_p = column([p.top_p for p in params])
    min_p = column([p.min_p for p in params])
    for width in (min(SORTED, vocab), vocab):
        sorted_probs, ids = probs.topk(width)
        keep = sorted_probs >= min_p * sorted_probs[:, :1]
        keep &= torch.arange(width, device=logits.device) < top_k
        kept = sorted_probs * keep
        # top_p counts in what top_k and min_p left. The first candidate always stays. With the rest of the vocabulary
        # out of sight, its mass counts too unless the other two filters end before.
        total = torch.where(keep[:, -1:], probs.sum(-1, keepdim=True), kept.sum(-1, keepdim=True))
        before = kept.cumsum(-1) - kept
        keep &= (before < top_p * total) | (top_p >= 1)
        if width == vocab or not bool(keep[:, -1].any()):
            break
    return ids.gather(1, _invert(sorted_probs * keep, points)).squeeze(1).tolist()


def _invert(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Index of the first weight at which the running sum passes `points` (0 to 1) of the total, `[n, 1]`."""
    sums = weights.double().cumsum(-1)
    index = torch.searchsorted(sums, points * sums[:, -1:], right=True)
    # Rounding may land past the last weight that is not zero.
    last = (weights > 0).int().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(index, last)


def _logprob(values: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """What the API reports of a sampled token: log-probability, rank from 1, and the `count` likeliest."""
    top, ids = values.topk(count)
    rank = int((values > values[token]).sum()) + 1
    return TokenLogprob(token, float(values[token]), rank, list(zip(ids.tolist(), top.tolist(), strict=True)))
