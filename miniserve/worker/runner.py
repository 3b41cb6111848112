"""From scheduled sequences to tensors, through the model, to sampled tokens."""

from dataclasses import dataclass

import torch

from miniserve.kv.memory import KVMemory
from miniserve.model.transformer import Transformer
from miniserve.ops.batch import Batch, State
from miniserve.worker.graphs import DecodeGraphs
from miniserve.worker.sampler import SCORED_LOGITS, Sampler, Samples, put, score
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import Sampled, Work


class DeviceStep:
    """A step on the device. Behind it, what it scores and samples is already on its way to the host."""

    def __init__(self, samples: list[Samples], device: torch.device) -> None:
        self._samples = samples
        self._done: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._samples = [part.to_host() for part in samples]
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> Sampled:
        """Block until it is done; what it has sampled. Pages that it filled may be shown to others from then on."""
        if self._done is not None:
            self._done.synchronize()
        return [found for part in self._samples for found in part.read()]


@dataclass(eq=False)
class ModelRunner:
    """The model, the bytes of the KV pool and of the recurrent `state`, and the sampler of one device. `eos` are the
    ids that end a turn; with `graphs` batches of decodes are replayed."""

    transformer: Transformer
    memory: KVMemory
    eos: frozenset[int]
    device: torch.device
    graphs: DecodeGraphs | None = None
    state: State | None = None

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.eos, self.transformer.ops)
        self._latest: tuple[dict[Sequence, int], torch.Tensor] | None = None
        """What the step launched last samples: the row of each sequence, and the tokens."""

    @torch.inference_mode()
    def launch(self, batch: list[Work]) -> DeviceStep:
        """Begin a step. Nothing in here waits for the device."""
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
        model_batch = Batch(
            tokens=self._put(tokens),
            positions=self._put(positions),
            outputs=self._put([row for row, *_ in scored] + outputs),
            lengths=[work.count + len(work.draft) for work in batch],
            contexts=[work.start + work.count + len(work.draft) for work in batch],
            pages=[work.sequence.pages for work in batch],
            slots=[work.sequence.slot for work in batch if work.sequence.slot is not None],
        )
        if fed:
            assert self._latest is not None
            rows, sampled = self._latest
            wanted = sampled[self._put([rows[sequence] for _, sequence in fed])]
            model_batch.tokens.index_copy_(0, self._put([row for row, _ in fed]), wanted)
        model, parts = self.transformer, list[Samples]()

        def head(hidden: torch.Tensor) -> torch.Tensor:
            """Scores the first rows, block by block, and makes logits of the others."""
            size = max(SCORED_LOGITS // model.config.vocab_size, 1)
            for start in range(0, len(scored), size):
                rows, tokens, counts = zip(*scored[start : start + size], strict=True)
                parts.append(score(model.head(hidden[start : start + len(rows)]), [*tokens], [*counts]))
            return model.head(hidden[len(scored) :])

        logits = self.graphs.logits(model_batch) if self.graphs is not None and not scored else None
        if logits is None:
            logits = model.forward(model_batch, self.memory.pages, self.state, head if scored else None)
        samples = self._sampler.sample(logits, complete, ahead) if complete else None
        rows_of = {sequence: row for row, sequence in enumerate(complete)}
        self._latest = (rows_of, samples.tokens) if samples is not None else None
        return DeviceStep([*parts, samples] if samples is not None else parts, self.device)

    def _put(self, values: list[int]) -> torch.Tensor:
        return put(values, self.device)
