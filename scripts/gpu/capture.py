"""CUDA graphs of decodes and of appends against the same steps launched kernel by kernel."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import accumulate

import torch

from miniserve.ops.decoder import Batch
from miniserve.worker.build import Built
from scripts.gpu.kernels import ROUNDED, relative
from scripts.gpu.setting import Figure, Figures, Setting
from scripts.gpu.speed import LLAMA, engine_for

DECODES = (1, 8, 7, 256, 255)
"""Of sequences: graphs of 1, 8 and 256, two of them with a row left over."""
APPENDS = ([67], [1, 1, 1, 200], [4, 12], [16] * 16)
"""Tokens of sequences that go on: graphs of 128, 256 and 16 rows, the first two with rows left over."""
STEPS = (*([1] * count for count in DECODES), *APPENDS, [1])
"""At last the first one again, since all share their memory."""
LAYERS = 4
"""Of the shape of Llama-3-8B: enough to see what a layer takes."""


def check(run: Setting) -> Figures:
    """In the engine that is measured next."""
    yield from against_eager(run, engine_for(run, LLAMA, LAYERS), STEPS)


@torch.inference_mode()
def against_eager(run: Setting, built: Built, steps: Iterable[list[int]]) -> Figures:
    """Logits of batches over random KV. Both ways store the same keys and values in the same places."""
    graphs, transformer, pages = built.runner.graphs, built.runner.transformer, built.memory.pages
    if graphs is None:
        yield Figure("not run", "needs a GPU")
        return
    longest = 40 if run.small else 500
    yield Figure(f"recording {len(graphs.decodes) + len(graphs.appends)} graphs", built.facts.phases["graphs"], "s")
    for number, lengths in enumerate(steps):
        batch = batch_of(run, built, lengths, longest, seed=number)
        name = f"{len(lengths)} {'decodes' if max(lengths) == 1 else f'sequences of {sum(lengths)} rows'}"
        used = max(page for table in batch.pages for page in table) + 1
        pages[:used].normal_()
        eager = transformer.forward(batch, pages)
        run.sync()
        first = graphs.logits(batch)
        if first is None:
            raise RuntimeError(f"no graph is for {name}")
        first = first.clone()
        again = graphs.logits(batch)
        assert again is not None
        yield Figure(f"{name}: logits off eager ones", relative(first, eager.double()), "relative error", "<=", ROUNDED)
        yield Figure(f"{name}: the same when replayed", int(torch.equal(first, again)), "", "==", 1)


def batch_of(run: Setting, built: Built, lengths: list[int], longest: int, seed: int) -> Batch:
    """A batch of sequences with so many new tokens, after less than `longest`, none of which share a page. The logits
    after each one's last token are wanted."""
    pick, size = random.Random(seed), built.memory.shape.page_tokens
    contexts = [pick.randrange(longest) + length for length in lengths]
    order = list(range(sum(-(-context // size) for context in contexts)))
    pick.shuffle(order)
    tables = [[order.pop() for _ in range(-(-context // size))] for context in contexts]
    positions = [
        at for length, context in zip(lengths, contexts, strict=True) for at in range(context - length, context)
    ]
    tokens = [pick.randrange(built.model.vocab_size) for _ in positions]
    outputs = [end - 1 for end in accumulate(lengths)]
    numbers = (torch.tensor(some, device=run.device) for some in (tokens, positions, outputs))
    return Batch(*numbers, lengths, contexts, tables)
