"""CUDA graphs of decodes against the same steps launched kernel by kernel."""

from __future__ import annotations

import random

import torch

from miniserve.ops.decoder import Batch
from miniserve.worker.build import Built
from scripts.gpu.kernels import ROUNDED, relative
from scripts.gpu.setting import Figure, Figures, Setting
from scripts.gpu.speed import LLAMA, engine_for

COUNTS = (1, 8, 7, 256, 255, 1)
"""Of sequences: graphs of 1, 8 and 256, two of them with a row left over, and at last the first one again, since all
share their memory."""
LAYERS = 4
"""Of the shape of Llama-3-8B: enough to see what a layer takes."""


def check(run: Setting) -> Figures:
    """In the engine that is measured next."""
    yield from against_eager(run, engine_for(run, LLAMA, LAYERS), COUNTS)


@torch.inference_mode()
def against_eager(run: Setting, built: Built, counts: tuple[int, ...]) -> Figures:
    """Logits of batches of decodes over random KV. Both ways store the same keys and values in the same places."""
    graphs, transformer, pages = built.runner.graphs, built.runner.transformer, built.memory.pages
    if graphs is None:
        yield Figure("not run", "needs a GPU")
        return
    longest = 40 if run.small else 500
    yield Figure(f"recording {len(graphs.recorded)} graphs", built.facts.phases["graphs"], "s")
    for number, count in enumerate(counts):
        batch = decodes(run, built, count, longest, seed=number)
        used = max(page for table in batch.pages for page in table) + 1
        pages[:used].normal_()
        eager = transformer.forward(batch, pages)
        run.sync()
        first = graphs.logits(batch)
        if first is None:
            raise RuntimeError(f"no graph is for {count} decodes")
        first = first.clone()
        again = graphs.logits(batch)
        assert again is not None
        name = f"{count} decodes"
        yield Figure(f"{name}: logits off eager ones", relative(first, eager.double()), "relative error", "<=", ROUNDED)
        yield Figure(f"{name}: the same when replayed", int(torch.equal(first, again)), "", "==", 1)


def decodes(run: Setting, built: Built, count: int, longest: int, seed: int) -> Batch:
    """A batch of `count` sequences that decode, of up to `longest` tokens each, none of which share a page."""
    pick, size = random.Random(seed), built.memory.shape.page_tokens
    contexts = [pick.randint(1, longest) for _ in range(count)]
    order = list(range(sum(-(-context // size) for context in contexts)))
    pick.shuffle(order)
    tables = [[order.pop() for _ in range(-(-context // size))] for context in contexts]
    tokens = torch.tensor([pick.randrange(built.model.vocab_size) for _ in contexts], device=run.device)
    positions = torch.tensor(contexts, device=run.device) - 1
    rows = torch.arange(count, device=run.device)
    return Batch(tokens, positions, rows, [1] * count, contexts, tables)
