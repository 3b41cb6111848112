"""The CUDA backend on a CPU: page tables, plans, padding and sampling, with FlashInfer's calls replaced by reference
math of the same signatures. The kernels themselves are checked on a GPU (scripts/gpu_check.py)."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miniserve.config import ConfigError, parse_graph_sizes
from miniserve.llm import LLM
from miniserve.ops.cuda_ops import CudaOps
from miniserve.ops.cuda_plan import MOST_DECODES, page_tables, workspace_bytes
from miniserve.ops.decoder import Attention, Batch, Experts, Mlp, Sizes
from miniserve.ops.native import NoKernels
from miniserve.ops.torch_ops import TorchOps
from miniserve.sampling_params import SamplingParams
from miniserve.worker import build
from miniserve.worker.graphs import APPENDS, LADDER, SEQUENCES, Replay, StepGraphs
from miniserve.worker.sampler import Sampler
from miniserve.worker.sequence import Sequence
from tests.support import reference_fused, tiny
from tests.support.engines import clean, greedy, prompts
from tests.support.kv_pools import memory_as_on_a_gpu
from tests.support.parts import attention_part
from tests.support.reference_flashinfer import delta, reference

CPU = torch.device("cpu")
BF16 = torch.bfloat16
PAGE = 4
WINDOWS = [0, 3]
BOTH = [(False, False), (False, True), (True, False), (True, True)]


def ops(heads: int = 4, head_dim: int = 64) -> CudaOps:
    return CudaOps(CPU, BF16, Sizes(heads, head_dim, (), windows=WINDOWS), reference(), (delta, None))


def batch_of(lengths: list[int], contexts: list[int], pool: int, seed: int) -> Batch:
    """Sequences in random pages of a pool, the tables longer than what is used of them."""
    pick = random.Random(seed)
    free = pick.sample(range(pool), pool)
    tables = [[free.pop() for _ in range(-(-context // PAGE) + pick.randrange(2))] for context in contexts]
    positions = [p for length, context in zip(lengths, contexts, strict=True) for p in range(context - length, context)]
    return Batch(
        tokens=torch.tensor([pick.randrange(256) for _ in positions]),
        positions=torch.tensor(positions),
        outputs=torch.tensor([sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]),
        lengths=lengths,
        contexts=contexts,
        pages=tables,
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("lengths", "contexts"),
    [
        ([1], [1]),
        ([1, 1, 1], [1, 9, 4]),
        ([7], [7]),
        ([5, 3], [13, 3]),
        ([1, 1, 6, 2], [12, 5, 6, 17]),
        ([1, 4, 1, 3], [8, 4, 5, 9]),
    ],
)
def test_attention_equals_the_reference_path(lengths: list[int], contexts: list[int], kv_heads: int) -> None:
    """Decodes, chunks and both in one step, in any order, over a strided pool, with windows in a layer."""
    torch.manual_seed(len(lengths))
    kv = torch.randn(40, 3, 2, PAGE, kv_heads, 64).to(BF16)
    batch = batch_of(lengths, contexts, 39, sum(contexts))
    rows = sum(lengths)
    qkv = torch.randn(rows, 4 + 2 * kv_heads, 64).to(BF16)
    q, k, v = qkv.split((4, kv_heads, kv_heads), 1)
    found = []
    for made in (ops(), TorchOps(CPU)):
        pool = kv.clone()
        plan = made.plan(batch, pool)
        parts = [attention_part(layer, 64**-0.5, WINDOWS[layer % 2]) for layer in range(3)]
        layers = [made.attention(plan, part, q, k, v) for part in parts]
        found.append((torch.stack(layers), pool))
    pools = found[0][1], found[1][1]
    for context, pages in zip(contexts, batch.pages, strict=True):
        for pool in pools if context % PAGE else ():  # the torch kernels clear what comes after the last token
            pool[pages[-(-context // PAGE) - 1], :, :, context % PAGE :] = 0
    assert torch.equal(*pools), "the same KV in the same slots"
    torch.testing.assert_close(found[0][0].float(), found[1][0].float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("fused", [None, reference_fused])
@pytest.mark.parametrize(
    ("lengths", "contexts", "fresh"),
    [
        ([1, 1, 16, 5], [9, 4, 16, 5], True),
        ([30], [30], True),
        ([15], [15], False),  # short
        ([16, 5], [16, 9], False),  # something is before one of them
    ],
)
def test_fresh_prompts_read_their_own_keys(lengths, contexts, fresh: bool, fused: Any, monkeypatch) -> None:
    """Prompts without a cached prefix: what they find is what they would find in the pool, where it is stored too."""
    monkeypatch.setattr("miniserve.ops.cuda_plan.FRESH", 16)
    torch.manual_seed(sum(contexts))
    kv, rows = torch.randn(40, 1, 2, PAGE, 2, 128).to(BF16), sum(lengths)
    batch, x = batch_of(lengths, contexts, 39, 1), torch.randn(rows, 64).to(BF16)
    weight, norm = torch.randn(8 * 128, 64).to(BF16) / 8, torch.rand(64).to(BF16)
    angles, found = torch.rand(64, 64), []
    for apart in (True, False):
        made = CudaOps(CPU, BF16, Sizes(4, 128, (), kv_heads=2), reference(), (delta, fused))
        if not apart:
            made._fresh = {}
        pool = kv.clone()
        plan = made.plan(batch, pool)
        assert plan.fresh is (fresh and apart)
        part = Attention(0, 4, 2, 128, 128**-0.5, 0, 0, False, made.linear(weight), None, None, made.linear(weight))
        found.append((made.attend(plan, part, x, norm, 1e-6, made.rotary(angles, BF16)(batch.positions)), pool))
    torch.testing.assert_close(found[0][0].float(), found[1][0].float(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(found[0][1].float(), found[1][1].float(), rtol=0.02, atol=0.02)


def test_the_other_kernels() -> None:
    made, plain = ops(), TorchOps(CPU)
    torch.manual_seed(0)
    qkv = torch.randn(9, 6, 64).to(BF16)
    weight = torch.rand(64).to(BF16)
    close = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(
        made.rms_norm(qkv[:, :4], weight, 1e-5), plain.rms_norm(qkv[:, :4], weight, 1e-5), **close
    )
    h, gate_up = torch.randn(9, 64).to(BF16), torch.randn(256, 64).to(BF16)
    for activation in ("silu", "gelu_tanh"):
        wanted = plain.gated(gate_up, None, activation)(h)
        torch.testing.assert_close(made.gated(gate_up, None, activation)(h), wanted, **close)
    positions = torch.randint(50, (9,))
    for rotating in (64, 16):
        angles = torch.rand(50, rotating // 2) * 6
        q, k = qkv.clone().split((4, 2), 1)
        wanted = plain.rope(q, k, plain.rotary(angles, BF16)(positions))
        got = made.rope(q, k, made.rotary(angles, BF16)(positions))
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)
    x, w, bias, residual = (torch.randn(*s).to(BF16) for s in ((9, 64), (32, 64), (32,), (9, 32)))
    for b in (None, bias):
        torch.testing.assert_close(made.linear(w, b)(x), plain.linear(w, b)(x), **close)
        wanted = plain.linear(w, b)(x, residual)
        torch.testing.assert_close(made.linear(w, b)(x, residual.clone()), wanted, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_experts_together_are_those_one_by_one(rows: int) -> None:
    """Of 6 experts 2 work on a row, and none on some."""
    torch.manual_seed(rows)
    made, plain = ops(), TorchOps(CPU)
    matrices = [(torch.randn(64, 48) / 7, torch.randn(48, 32) / 6) for _ in range(6)]
    together, single = (
        [Mlp(some.gated(up.to(BF16)), some.linear(down.to(BF16))) for up, down in matrices] for some in (made, plain)
    )
    x, ids = torch.randn(rows, 48).to(BF16), torch.randn(rows, 5).topk(2).indices  # never the last one
    weights = torch.rand(rows, 2)
    router = plain.head(x)
    wanted = plain.mixture(Experts(2, True, router, single, None, None), x, ids, weights)
    got = made.mixture(Experts(2, True, router, made.stack(together), None, None), x, ids, weights)
    torch.testing.assert_close(got, wanted, rtol=0.03, atol=0.03)


def test_tables() -> None:
    made = page_tables([1, 4, 5, 12], [[7, 8], [1], [2, 3], [4, 5, 6]], 4)
    assert made == ([0, 1, 2, 4, 7], [1, 4, 1, 4], [7, 1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (BF16, 80)])
def test_other_dtypes_and_sizes_have_no_kernels(dtype: torch.dtype, dim: int) -> None:
    with pytest.raises(NoKernels, match="FlashInfer has no kernels for"):
        CudaOps(CPU, dtype, Sizes(4, dim, ()))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "fits"),
    [(32, 8, 128, True), (28, 4, 128, True), (64, 8, 128, False), (64, 4, 128, False), (48, 1, 128, False)],
)
def test_the_workspace_is_as_large_as_flashinfer_wants(heads: int, kv_heads: int, dim: int, fits: bool) -> None:
    """On an H200, of 132 multiprocessors; those that do not fit 384 MiB overflowed when they did not have more."""
    assert (workspace_bytes(heads, kv_heads, dim, 132) <= 384 * 2**20) == fits


def test_the_workspace_by_hand() -> None:
    # Graphs of 512 decodes of 4 heads a key: 128 full tiles of 16 rows, and 511 that may be begun. 33 blocks are less.
    assert workspace_bytes(32, 8, 128, 132) == 4 * 32 * 16 * (128 + 511) * 129 + 1024
    # 48 rows a decode: 384 full tiles of 64 rows, and 511 begun; 264 blocks of 128 rows of a prompt are less.
    assert workspace_bytes(48, 1, 128, 132) == 4 * 48 * 64 * (384 + 511) * 129 + 1024
    # 132 blocks of 128 rows of a prompt; 512 decodes make less.
    assert workspace_bytes(2, 2, 64, 132) == 4 * 2 * 128 * 132 * 65 + 1024


def test_kernels_are_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FlashInfer has none for these heads, torch computes, and the banner says why."""
    made = CudaOps(CPU, BF16, Sizes(4, 64, (), windows=WINDOWS, kv_heads=2), reference())
    made.try_out()

    def missing(self: Any, **kwargs: Any) -> None:
        raise RuntimeError("no module for head_dim 64, and no nvcc")

    monkeypatch.setattr("tests.support.reference_flashinfer.Wrapper.plan", missing)
    with pytest.raises(NoKernels, match=r"cannot attend here \(no module for head_dim 64"):
        made.try_out()


def test_without_triton_the_banner_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has no C compiler, or a kernel fails: then each operation has a kernel of its own."""
    made = CudaOps(CPU, BF16, Sizes(4, 64, (), windows=WINDOWS, kv_heads=2), reference())

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Failed to find\n C compiler")

    monkeypatch.setitem(sys.modules, "miniserve.ops.cuda_fused", None)
    assert made.try_out().startswith("flashinfer, slower without triton: ")
    monkeypatch.setitem(
        sys.modules, "miniserve.ops.cuda_fused", SimpleNamespace(ROWS=16, multiply=broken, queries=broken)
    )
    assert made.try_out() == "flashinfer, slower without triton: Failed to find C compiler"
    assert made.linear(torch.zeros(64, 64)).fused is None
    monkeypatch.setitem(sys.modules, "miniserve.ops.cuda_fused", reference_fused)
    assert made.try_out() == "flashinfer"
    assert made.linear(torch.zeros(64, 64)).fused is reference_fused


def test_without_fa3_the_banner_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then prompts without a cached prefix are attended as others are."""
    made = CudaOps(CPU, BF16, Sizes(4, 128, (), kv_heads=2), reference())
    monkeypatch.setitem(sys.modules, "miniserve.ops.cuda_fused", reference_fused)
    assert made.try_out() == "flashinfer"

    def missing(self: Any, **kwargs: Any) -> None:
        raise RuntimeError("no fa3 module")

    monkeypatch.setattr("tests.support.reference_flashinfer.Ragged.run", missing)
    assert made.try_out() == "flashinfer, long prompts without fa3: no fa3 module"
    batch = batch_of([2048], [2048], 4096 // PAGE, 1)
    assert not made.plan(batch, torch.zeros(4096 // PAGE, 1, 2, PAGE, 2, 128, dtype=BF16)).fresh


def test_in_fp16_a_norm_is_a_kernel_of_its_own() -> None:
    """Times the norm's weights, and not yet divided by the root of the mean square, x would overflow."""
    x, norm = torch.full((1, 64), 3e4, dtype=torch.float16), torch.full((64,), 4.0, dtype=torch.float16)
    weight = torch.eye(64, dtype=torch.float16)
    for dtype, kernel in ((torch.float16, False), (BF16, True)):
        norms: list[Any] = []
        spied = SimpleNamespace(ROWS=16, multiply=lambda *args, norms=norms: norms.append(args[4:5]) or args[0])
        made = CudaOps(CPU, dtype, Sizes(4, 64, ()), reference(), (delta, spied))
        found = made.product(made.linear(weight), x, norm, 1e-5)
        assert (norms == [(norm,)]) == kernel
        assert kernel or torch.equal(found, torch.full_like(x, 4.0))


def test_nothing_imports_flashinfer_on_a_cpu() -> None:
    code = "import miniserve.worker.build, miniserve.llm, sys; print('flashinfer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- graphs -------------------------------------------------------------------------------------------------------


class Recorder:
    """Replays by computing again. `sizes` are those that were recorded."""

    def __init__(self) -> None:
        self.replays = 0
        self.sizes: list[int] = []

    def __call__(self, compute: Callable[[], Any]) -> Replay:
        self.sizes.append(len(compute()))

        def replay() -> None:
            self.replays += 1
            compute()

        return replay


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[LLM, Recorder]]:
    """Makes an `LLM` whose engine computes with CudaOps and replays decodes, as on a GPU; in fp32, so that its text can
    be compared."""

    def make(folder: Path, *, eager: bool = False, fused: Any = reference_fused, **engine: Any) -> tuple[LLM, Recorder]:
        recorder = Recorder()

        def cuda_ops(device: Any, dtype: Any, sizes: Sizes, *rest: Any, **more: Any) -> tuple[CudaOps, str]:
            return CudaOps(CPU, dtype, sizes, reference(), (delta, fused)), "flashinfer"

        monkeypatch.setattr(build, "KVMemory", memory_as_on_a_gpu)
        monkeypatch.setattr(build, "make_ops", cuda_ops)
        monkeypatch.setattr(build, "StepGraphs", lambda *args: StepGraphs(*args, record=recorder))
        settings = {"kv_cache_memory": 2**22, **engine}
        made = LLM(folder, threads=1, enforce_eager=eager, dtype="float32", **settings)
        return made, recorder

    return make


@pytest.fixture(scope="module")
def models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random models, the newer families among them."""
    root = tmp_path_factory.mktemp("newer")
    return tiny_models | {arch: tiny.make_model(root / arch, arch, seed=7) for arch in tiny.NEWER}


WAYS = {f"{'eager' if eager else 'graphs'}{', overlap' * ahead}": (eager, ahead, True) for eager, ahead in BOTH}
WAYS |= {"graphs, without triton": (False, False, False)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", ["llama", "llama3", "qwen2", "qwen3", "mistral", *tiny.NEWER])
def test_greedy_text(models, as_on_a_gpu, arch: str, way: str) -> None:
    """Mixed steps of few rows and of many, padded decodes, steps ahead: the text is transformers'."""
    items, (eager, overlap, triton) = prompts(7, seed=11), WAYS[way]
    fused = reference_fused if triton else None
    llm, recorder = as_on_a_gpu(
        models[arch], eager=eager, fused=fused, async_scheduling=overlap, max_num_batched_tokens=40
    )
    assert greedy(llm, items, 12) == tiny.reference(models[arch], items, 12)
    assert (recorder.replays == 0) == eager
    assert clean(llm)


def test_graphs_are_recorded_before_anything_is_served(tiny_models, as_on_a_gpu) -> None:
    llm, recorder = as_on_a_gpu(tiny_models["llama"], max_num_seqs=9)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    graphs = llm.engine.runner.graphs
    assert (*graphs.decodes, *graphs.appends) == (9, 8, 4, 2, 1, *reversed(APPENDS)), "the largest first"
    assert recorder.sizes == [*graphs.decodes, *[9] * len(APPENDS)], "as many logits as sequences"
    assert llm._built.facts.phases["graphs"] > 0
    llm.generate([[1, 2]] * 3, params, progress=False)
    assert recorder.replays == 6, "prompts of 6 rows are padded to 16, three decodes to four"
    llm.generate([[1, 2]], params, progress=False)
    assert (recorder.replays, len(recorder.sizes)) == (12, 10)


def test_graph_sizes_may_be_named(tiny_models, as_on_a_gpu) -> None:
    """More decodes in a step than the last of them says are not replayed, nor are appends; none says more than may
    run."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    llm, recorder = as_on_a_gpu(tiny_models["llama"], cuda_graph_sizes=[3, 1])
    assert recorder.sizes == [3, 1]
    llm.generate([[1, 2]] * 4, params, progress=False)
    assert recorder.replays == 0
    llm.generate([[1, 2]] * 3, params, progress=False)
    assert recorder.replays == 5
    _, recorder = as_on_a_gpu(tiny_models["llama"], cuda_graph_sizes=[2, 4, 8, 16], max_num_seqs=7)
    assert recorder.sizes == [7, 4, 2]
    with pytest.raises(ConfigError, match="cuda_graph_sizes"):
        as_on_a_gpu(tiny_models["llama"], cuda_graph_sizes=[513])


def watched(llm: LLM) -> list[tuple[Batch, bool]]:
    """Each batch that will be computed without scores, and whether it is replayed."""
    graphs, seen = llm.engine.runner.graphs, list[tuple[Batch, bool]]()
    inner = graphs.logits

    def logits(batch: Batch) -> torch.Tensor | None:
        found = inner(batch)
        seen.append((batch, found is not None))
        return found

    graphs.logits = logits
    return seen


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "mixtral", "gemma3"])
def test_appends_are_replayed(models, as_on_a_gpu, arch: str, overlap: bool) -> None:
    """Turns go on with what is cached, several at a time, of one token to 200, while others decode: steps of all sizes,
    and the text of eager ones."""
    pick = random.Random(arch)
    histories = prompts(6, longest=100, seed=5)
    turns = [[pick.randrange(256) for _ in range(count)] for count in (1, 200, 20, 3, 67, 31)]
    texts, seen = [], []
    for eager in (True, False):
        llm, _ = as_on_a_gpu(models[arch], eager=eager, async_scheduling=overlap, max_num_batched_tokens=270)
        seen = [] if eager else watched(llm)
        first = greedy(llm, histories, 8)
        longer = [history + said + turn for history, said, turn in zip(histories, first, turns, strict=True)]
        params = [SamplingParams(temperature=0, max_tokens=5 * i + 1, ignore_eos=True) for i in range(6)]
        texts.append([first, [g.outputs[0].token_ids for g in llm.generate(longer, params, progress=False)]])
        # One after the other: a turn comes while others are in the midst of theirs.
        for i, turn in enumerate(longer):
            llm.engine.add(Sequence(str(i), [*turn, i], params[5], 0, b""))
            llm.engine.admit()
            for _ in range(3):
                texts[-1].append([(o.turn, o.tokens) for o in llm.engine.step().outputs])
        while llm.engine.has_work:
            texts[-1].append([(o.turn, o.tokens) for o in llm.engine.step().outputs])
        assert clean(llm)
    assert texts[0] == texts[1]
    assert all(replayed == (len(batch.tokens) <= APPENDS[-1]) for batch, replayed in seen)
    appends = [batch for batch, _ in seen if len(batch.tokens) > len(batch.lengths)]
    assert any(batch.contexts[-1] > batch.lengths[-1] > 1 for batch in appends), "something was cached"
    assert any(batch.lengths[0] == 1 < batch.lengths[-1] for batch in appends), "beside decodes"
    assert any(not len(batch.outputs) or len(batch.outputs) < len(batch.lengths) for batch in appends), "pieces"
    assert len({next(rows for rows in APPENDS if rows >= len(b.tokens)) for b in appends if len(b.tokens) <= 256}) > 2


def test_preempted_sequences_append(tiny_models, as_on_a_gpu) -> None:
    """They compute again what they lost, in steps of any size."""
    items, texts = prompts(12, longest=60, seed=9), []
    for eager in (True, False):
        llm, recorder = as_on_a_gpu(tiny_models["llama"], eager=eager, kv_cache_memory=3 * 2**16, max_model_len=192)
        texts.append(greedy(llm, items, 40))
        assert llm.engine.counters.preemptions > 0
        assert (recorder.replays > 0) == (not eager)
        assert clean(llm)
    assert texts[0] == texts[1]


def test_what_no_graph_is_for(tiny_models, as_on_a_gpu) -> None:
    """Too many rows or sequences, or scores of a prompt, which are not in a graph: such a step is computed eagerly, and
    the text is the same."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    items = [[i, 7, 9] for i in range(SEQUENCES + 1)]
    llm, recorder = as_on_a_gpu(tiny_models["llama"])
    seen = watched(llm)
    texts = [greedy(llm, items[:-1], 3), greedy(llm, items, 3)]
    assert texts[0] == texts[1][:-1]
    assert [(len(batch.lengths), replayed) for batch, replayed in seen] == [(16, True)] * 3 + [
        (17, False),
        *[(17, True)] * 2,
    ]
    before = recorder.replays
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    llm.generate([[5, 6, 7]], scored, progress=False)
    llm.generate([list(range(200)) + list(range(57))], params, progress=False)
    assert recorder.replays == before + 2, "decodes alone"


def test_rows_are_left_over_in_the_scratch_page(tiny_models, as_on_a_gpu) -> None:
    """Steps of as many rows as a graph has, and of fewer: none of those that are left over is in a sequence's pages."""
    llm, _ = as_on_a_gpu(tiny_models["llama"], enable_prefix_caching=False)
    graphs, pages = llm.engine.runner.graphs, llm._built.memory.pages
    transformer = llm.engine.runner.transformer
    for rows in (1, 16, 17, 33, 256):
        for lengths in ([rows], [1, rows - 2, 1], [1] * min(rows - 1, 15) + [rows - min(rows - 1, 15)]):
            if min(lengths) < 1:
                continue
            contexts = [length + 11 * i for i, length in enumerate(lengths)]
            size = pages.shape[3]
            order = iter(random.Random(rows).sample(range(llm.engine.pool.num_pages), llm.engine.pool.num_pages))
            tables = [[next(order) for _ in range(-(-context // size))] for context in contexts]
            positions = [p for n, context in zip(lengths, contexts, strict=True) for p in range(context - n, context)]
            numbers = torch.randint(256, (rows,)), torch.tensor(positions), torch.arange(rows)[-3::2]
            batch = Batch(*numbers, lengths, contexts, tables)
            pages[:-1].normal_()
            first = transformer.forward(batch, pages)
            wanted = pages[:-1].clone()
            found = graphs.logits(batch)
            torch.testing.assert_close(found, first, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(pages[:-1], wanted, rtol=1e-4, atol=1e-4)
            assert not bool(pages[-1, :, :, 1:].any())


def test_what_cannot_be_recorded_is_computed_without(tiny_models, as_on_a_gpu, monkeypatch) -> None:
    """Also where it is noticed after some sizes. The banner has the reason, and with --strict-gpu it ends the start."""
    recorded = Recorder.__call__

    def refuses(self: Recorder, compute: Callable[[], Any]) -> Replay:
        if len(self.sizes) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return recorded(self, compute)

    monkeypatch.setattr(Recorder, "__call__", refuses)
    items, folder = prompts(5, seed=3), tiny_models["llama"]
    llm, recorder = as_on_a_gpu(folder)
    reason = "flashinfer, without CUDA graphs: operation not permitted when stream is capturing"
    assert llm._built.facts.kernels == reason
    assert greedy(llm, items, 8) == tiny.reference(folder, items, 8)
    assert recorder.replays == 0
    with pytest.raises(ConfigError, match=f"--strict-gpu does not let a worker serve with {reason}. Mend that"):
        as_on_a_gpu(folder, strict_gpu=True)
    monkeypatch.setattr(Recorder, "__call__", recorded)
    llm, _ = as_on_a_gpu(folder, strict_gpu=True)
    assert llm._built.facts.kernels == "flashinfer"


def test_experts_that_make_the_host_wait_are_not_recorded(models, as_on_a_gpu, monkeypatch) -> None:
    monkeypatch.setattr(
        CudaOps, "records_mixtures", property(lambda ops: False, lambda ops, value: None), raising=False
    )
    for arch in ("mixtral", "llama"):
        llm, recorder = as_on_a_gpu(models[arch])
        greedy(llm, prompts(2), 4)
        assert (recorder.replays == 0) == (arch == "mixtral") == ("without CUDA graphs" in llm._built.facts.kernels)


def test_padding_takes_the_scratch_slot(models, as_on_a_gpu) -> None:
    """No sequence has it, and a slot without a sequence stays as it is."""
    llm, _ = as_on_a_gpu(models["qwen3_next"], max_num_seqs=6)
    state = llm.engine.runner.state
    greedy(llm, prompts(5, seed=2), 8)
    used = state.delta.flatten(1).any(1).tolist()
    assert len(used) == 7
    assert used[6]
    assert sum(used[:6]) == 5


def test_padding_writes_to_the_scratch_page_alone(tiny_models, as_on_a_gpu) -> None:
    """The rows that are added write to the scratch page alone, which no sequence ever gets."""
    llm, _ = as_on_a_gpu(tiny_models["llama"])
    pages = llm._built.memory.pages
    items = prompts(5, seed=2)
    greedy(llm, items, 8)
    assert pages.shape[0] == llm.engine.pool.num_pages + 1
    assert bool(pages[-1, :, :, 0].any())
    assert not bool(pages[-1, :, :, 1:].any()), "position 0 alone"


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "min_p": 0.02}],
    ids=str,
)
def test_filters_keep_the_same_candidates(params: dict[str, Any]) -> None:
    """The kernels that sort and those that do not draw from the same distribution."""
    torch.manual_seed(1)
    logits = (torch.randn(1, 50) * 2).expand(2000, -1)
    sequences = [Sequence(str(i), [1], SamplingParams(temperature=0.9, **params), i, b"") for i in range(2000)]
    counts = []
    for made in (ops(), TorchOps(CPU)):
        found = Sampler(frozenset(), made).sample(logits.clone(), sequences).read()
        counts.append(torch.tensor([token for token, _ in found]).bincount(minlength=50))
    assert bool(((counts[0] > 0) == (counts[1] > 0))[(counts[0] + counts[1]) > 30].all())
    assert (counts[0] - counts[1]).abs().max() < 100


def test_ladder() -> None:
    assert list(LADDER) == sorted(set(LADDER))
    assert LADDER[-1] == MOST_DECODES == max(parse_graph_sizes("512")), "what a flag may name"
    assert all(b - a <= b / 5 for a, b in pairwise(LADDER) if a >= 32)
