"""What the checks of a GPU are made of, as far as a CPU can run it: references, counts of bytes and operations, reading
a profile, and graphs against eager steps with FlashInfer's calls replaced by reference math."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from miniserve.model.config import ModelConfig
from miniserve.ops.cuda_ops import CudaOps
from miniserve.ops.decoder import Sizes
from miniserve.worker import build
from miniserve.worker.graphs import Replay, StepGraphs
from scripts.gpu import capture, checks, early, machine, parity, speed, trace, variants
from scripts.gpu.ceilings import Ceilings
from scripts.gpu.checks import STAGES
from scripts.gpu.common import model_folder, read_json
from scripts.gpu.kernels import exact
from scripts.gpu.setting import Figure, Setting
from tests.support.kv_pools import memory_as_on_a_gpu
from tests.support.reference_flashinfer import delta, real, reference

CPU = torch.device("cpu")


def cuda_ops(device: Any, dtype: Any, sizes: Sizes, *rest: Any, **more: Any) -> tuple[CudaOps, str]:
    """As `make_ops`: CudaOps over reference math."""
    return CudaOps(CPU, dtype, sizes, reference(), (delta, None)), "flashinfer"


@pytest.fixture
def toy(tmp_path: Path) -> Setting:
    return Setting("cpu", True, tmp_path)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("new", "context"), [(1, 1), (1, 33), (7, 7), (5, 48)])
def test_the_exact_attention_is_torchs(new: int, context: int, group: int) -> None:
    torch.manual_seed(new)
    q, keys, values = (torch.randn(n, h, 64, dtype=torch.float64) for n, h in ((new, 2 * group), *[(context, 2)] * 2))
    for window in (0, 3):
        behind = torch.arange(context - new, context).unsqueeze(1) - torch.arange(context)
        seen = (behind >= 0) & (behind < (window or context))
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
        wanted = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=seen).transpose(0, 1)
        torch.testing.assert_close(exact(q, keys, values, window), wanted)


def test_every_check_has_its_function() -> None:
    for check in (check for stage in STAGES for check in stage.checks):
        module, name = check.function.split(":")
        inspect.signature(getattr(import_module(module), name)).bind(None, **check.arguments)
    assert set(checks.DENSE + checks.NEWER) == set(parity.ARCHITECTURES)
    assert {speed.LLAMA} == {checks.LLAMA, early.LLAMA}


def test_flashinfers_modules_are_asked_for_as_it_has_them() -> None:
    real()
    for name, load in machine.modules().items():
        file, getter, *of = load.args
        module = import_module(f"flashinfer.{file}")
        made = inspect.unwrap(getattr(module, getter))
        if of and "batch" in getter:  # it takes anything, and hands it on
            made = getattr(module, getter.replace("get_", "gen_"))
        inspect.signature(made).bind(*of), name


def test_a_module_that_is_missing_is_named() -> None:
    def missing() -> None:
        raise RuntimeError("no compiled kernel\nfor this dtype")

    assert machine.outcome(missing) == "RuntimeError: no compiled kernel"
    assert machine.outcome(lambda: None) == "loaded"


def test_a_row_with_another_expert_is_no_typical_error() -> None:
    error = torch.full((9, 4), 0.5)
    error[3] = 30.0
    assert parity.typical(error, experts=True) == 0.5
    assert parity.typical(error, experts=False) == pytest.approx((8 * 0.25 / 9 + 100) ** 0.5)


# --- speed ----------------------------------------------------------------------------------------------------------


def llama(run: Setting, layers: int = 0) -> ModelConfig:
    full = Setting("cpu", False, run.folder)
    return ModelConfig.from_hf(read_json(model_folder(full, speed.LLAMA, layers) / "config.json"))


def test_bytes_and_operations(toy: Setting) -> None:
    model = llama(toy)
    matrices = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    head = 128256 * 4096
    assert speed.weight_bytes(model) == 2 * (matrices + head)
    assert speed.read_bytes(model, 100) == speed.weight_bytes(model) + 100 * 32 * 2 * 8 * 128 * 2
    scores = 4 * 32 * 32 * 128 * 8192**2 / 2
    assert speed.operations(model, 8192) == 2 * matrices * 8192 + scores + 2 * head
    assert len(llama(toy, layers=4).layers) == 4


def test_the_whole_is_predicted_from_two_sizes() -> None:
    assert early.whole(more=5.0 + 4 * 2.0, fewer=5.0 + 2 * 2.0, layers=32) == 5.0 + 32 * 2.0


@pytest.mark.slow
def test_an_early_look_at_speed(toy: Setting) -> None:
    """The prediction has all three measures, also in a process that has measured nothing before."""
    toy.kept["ceilings"] = Ceilings(1e10, 1e10, 1e11)
    figures = {figure.name: figure for figure in early.prediction(toy)}
    assert {"batch 8: a layer", "batch 2: share of the bandwidth roofline"} <= figures.keys()
    assert {"512 tokens: share of the matmul rate", "append: times a decode step's bytes"} <= figures.keys()
    assert not any(figure.rule for figure in figures.values()), "an estimate is never a verdict"
    assert [f.name for f in early.kernels(toy)] == ["not run"]


def test_variants_are_measured_over_both_pools(toy: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.kept["ceilings"] = Ceilings(1e10, 1e10, 1e11)
    assert len([figure for figure in variants.check(toy) if figure.unit == "us"]) == 8
    monkeypatch.setattr(variants, "make_ops", cuda_ops)
    pools = [variants.pool(toy, 6, 2, page_major) for page_major in (True, False)]
    assert pools[0].shape == pools[1].shape
    assert [pool.stride(0) > pool.stride(1) for pool in pools] == [True, False], "which index moves farther"
    for pool in pools:
        assert variants.layer_seconds(toy, pool, 16, [1, 1], [40, 40]) > 0
    stored = [pool.abs().sum((2, 3, 4, 5)) > 0 for pool in pools]
    assert stored[0].equal(stored[1])
    assert stored[0].sum(0).tolist() == [2, 2], "of each layer one page of each sequence"


def event(name: str, start: int, length: int, launch: int, gpu: bool = True) -> SimpleNamespace:
    kinds = torch.autograd.DeviceType
    values = {"device_type": kinds.CUDA if gpu else kinds.CPU, "start_ns": start, "duration_ns": length}
    values |= {"correlation_id": launch, "name": name}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def profile_of(*events: SimpleNamespace) -> SimpleNamespace:
    results = SimpleNamespace(events=lambda: list(events))
    return SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))


def test_a_profile_is_read() -> None:
    """A launch is at work from its first to its last kernel, as a graph is; what overlaps counts once."""
    profile = profile_of(
        event("cudaGraphLaunch", 0, 500, 1, gpu=False),
        event("void ns::decode<128, float>(int)", 0, 100, 1),
        event("void ns::decode<64, float>(int)", 200, 100, 1),
        event("nvjet_tst_128x64", 250, 150, 2),
        event("nvjet_tst_128x64", 500, 100, 3),
    )
    busy, whole = trace.at_work(profile)
    assert (busy, whole) == (500e-9, 600e-9)
    assert trace.by_kernel(profile) == {"nvjet_tst_128x64": (250e-9, 2), "ns::decode": (200e-9, 2)}
    with pytest.raises(RuntimeError, match="saw no kernel"):
        trace.by_kernel(profile_of(event("cpu", 0, 5, 1, gpu=False)))
    assert trace.plain_name("void (anonymous namespace)::elementwise<4>(int)") == "elementwise"
    assert trace.plain_name("<unknown>") == "<unknown>"


# --- graphs ---------------------------------------------------------------------------------------------------------


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, record: Callable[[Callable[[], object]], Replay]) -> None:
    """Engines compute with CudaOps over reference math, and replay what `record` makes."""

    monkeypatch.setattr(build, "KVMemory", memory_as_on_a_gpu)
    monkeypatch.setattr(build, "make_ops", cuda_ops)
    monkeypatch.setattr(build, "StepGraphs", lambda *args: StepGraphs(*args, record=record))


def compute_again(compute: Callable[[], object]) -> Replay:
    compute()

    def replay() -> None:
        compute()

    return replay


def never_again(compute: Callable[[], object]) -> Replay:
    """A graph that reads nothing new."""
    compute()
    return lambda: None


@pytest.mark.parametrize(("record", "right"), [(compute_again, True), (never_again, False)])
def test_graphs_are_held_against_eager_steps(
    toy: Setting, monkeypatch: pytest.MonkeyPatch, record: Callable[..., Replay], right: bool
) -> None:
    as_on_a_gpu(monkeypatch, record)
    built = speed.engine_for(toy, speed.LLAMA, capture.LAYERS)
    figures = list(capture.against_eager(toy, built, ([1], [1] * 8, [1] * 7, [9], [1, 1, 15], [1])))
    graphs = built.runner.graphs
    sizes = len(graphs.decodes) + len(graphs.appends)
    assert [f.name for f in figures if f.unit == "s"] == [f"recording {sizes} graphs"]
    judged = [figure for figure in figures if figure.rule]
    assert len(judged) == 12
    assert all(figure.ok for figure in judged) == right


def test_figures_within_limits() -> None:
    assert Figure("", 1.0).ok
    assert Figure("", 0.2, "", "<=", 0.2).ok
    assert not Figure("", 0.2, "", ">=", 0.3).ok
    assert not Figure("", float("nan"), "", "<=", 1.0).ok
    assert not Figure("", "no number", "", "<=", 1.0).ok
    assert Figure("", "mapped", "", "==", "mapped").ok
