"""From scheduled sequences to tensors, through the model, to sampled tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from miniserve.cluster.rank_messages import Forward
from miniserve.kv.memory import KVMemory
from miniserve.model.transformer import Transformer
from miniserve.ops.decoder import Batch, State
from miniserve.worker.graphs import StepGraphs
from miniserve.worker.sampler import SCORED_LOGITS, Sampler, Samples, put, score
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import Launched, Sampled, Work


@dataclass(eq=False)
class ModelRunner:
    """The model, the bytes of the KV pool and of the recurrent `state`, and the sampler of one device. `eos` are the
    ids that end a turn; with `graphs` small batches are replayed. `tell` hears of each batch before it is
    computed: other ranks `follow`."""

    transformer: Transformer
    memory: KVMemory
    eos: frozenset[int]
    graphs: StepGraphs | None = None
    state: State | None = None
    tell: Callable[[Forward], None] = lambda forward: None

    def __post_init__(self) -> None:
        self._device = self.transformer.device
        self._sampler = Sampler(self.eos, self.transformer.ops)

    @torch.inference_mode()
    def launch(self, batch: list[Work]) -> Launched:
        """Begin a step; nothing in here waits for the device. Pages may be shown to others when the step is done."""
        tokens: list[int] = []
        positions: list[int] = []
        outputs: list[int] = []
        complete: list[Sequence] = []
        ahead: list[int] = []
        scored: list[tuple[int, int, int]] = []
        fed: list[tuple[int, Sequence]] = []
        for work in batch:
            sequence, end = work.sequence, work.start + work.count
            known = sequence.tokens[work.start : end]
            if not known:  # what is being sampled
                known = [0]
                fed.append((len(tokens), sequence))
            following = sequence.tokens[work.start + 1 :][: work.scored]
            count = sequence.params.prompt_logprobs or 0
            scored += [(row, token, count) for row, token in enumerate(following, len(tokens))]
            if work.samples:
                last = len(tokens) + work.count - 1
                outputs += range(last, last + work.num_sampled)
                complete += [sequence] * work.num_sampled
                ahead += range(work.num_sampled)
            tokens += known + work.draft
            positions += range(work.start, end + len(work.draft))
        forward = Forward(
            tokens,
            positions,
            [row for row, *_ in scored] + outputs,
            lengths=[work.count + len(work.draft) for work in batch],
            contexts=[work.start + work.count + len(work.draft) for work in batch],
            pages=[work.sequence.pages for work in batch],
            slots=[work.sequence.slot for work in batch if work.sequence.slot is not None],
            scored=len(scored),
            fed=bool(fed),
        )
        self.tell(forward)
        model_batch = self._batch(forward)
        if fed:
            wanted = self._sampler.latest([sequence for _, sequence in fed])
            model_batch.tokens.index_copy_(0, put([row for row, _ in fed], self._device), wanted)
        parts = list[Samples]()

        def take(first: int, logits: torch.Tensor) -> None:
            _, tokens, counts = zip(*scored[first : first + len(logits)], strict=True)
            parts.append(score(logits, [*tokens], [*counts]))

        logits = self._forward(model_batch, forward, take)
        return self._brought([*parts, self._sampler.sample(logits, complete, ahead)] if complete else parts)

    @torch.inference_mode()
    def follow(self, forward: Forward) -> None:
        """Compute this rank's part of what rank 0 launches."""
        self._forward(self._batch(forward), forward, lambda first, logits: None)

    def settle(self) -> None:
        """Block until the device has done all it was given, on every rank of which each calls this."""
        self.transformer.group.gather(torch.empty(0, 1, device=self._device))
        if self._device.type == "cuda":  # it is the last that the device was given, on all ranks
            torch.cuda.synchronize(self._device)

    def _batch(self, forward: Forward) -> Batch:
        new = forward.tokens, forward.positions, forward.outputs
        tokens, positions, outputs = (put(numbers, self._device) for numbers in new)
        return Batch(tokens, positions, outputs, forward.lengths, forward.contexts, forward.pages, forward.slots)

    def _forward(self, batch: Batch, forward: Forward, take: Callable[[int, torch.Tensor], None]) -> torch.Tensor:
        """The logits that are sampled. Those of the first rows, which are scored, `take` gets before, block by block,
        with the first row of each."""
        model, scored = self.transformer, forward.scored
        if forward.fed and model.group.ranks > 1:  # only rank 0 has the tokens
            ours = batch.tokens.float()
            batch.tokens.copy_(model.group.sum(ours.zero_() if model.group.rank else ours))

        def head(hidden: torch.Tensor) -> torch.Tensor:
            size = max(SCORED_LOGITS // model.config.vocab_size, 1)
            for start in range(0, scored, size):
                take(start, model.head(hidden[start : min(start + size, scored)]))
            return model.head(hidden[scored:])

        logits = self.graphs.logits(batch) if self.graphs is not None and not scored else None
        if logits is None:
            logits = model.forward(batch, self.memory.pages, self.state, head if scored else None)
        return logits

    def _brought(self, samples: list[Samples]) -> Launched:
        """What was scored and sampled, already on its way to the host."""
        if self._device.type != "cuda":
            return lambda: [found for part in samples for found in part.read()]
        parts, done = [part.to_host() for part in samples], torch.cuda.Event()
        done.record()

        def wait() -> Sampled:
            done.synchronize()
            return [found for part in parts for found in part.read()]

        return wait
