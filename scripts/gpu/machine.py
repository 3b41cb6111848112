"""What is installed on the machine, and whether FlashInfer's kernels are there: without them torch would compute, and
every later figure would be another program's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch

from miniserve.ops import make_ops
from miniserve.ops.decoder import Sizes
from scripts.gpu.kernels import DIMS
from scripts.gpu.report import PACKAGES, installed
from scripts.gpu.setting import Figure, Figures, Setting

VARIABLES = ("FLASHINFER_CUDA_ARCH_LIST", "FLASHINFER_DISABLE_JIT", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_VISIBLE_DEVICES")


def versions(run: Setting) -> Figures:
    """Of the device and of what computes on it."""
    for package in PACKAGES:
        yield Figure(package, installed(package))
    for variable in VARIABLES:
        yield Figure(variable, os.environ.get(variable, "not set"))
    if not run.cuda:
        yield Figure("device", "no GPU")
        return
    of = torch.cuda.get_device_properties(run.device)
    free, total = torch.cuda.mem_get_info(run.device)
    yield Figure("device", of.name)
    yield Figure("compute capability", f"{of.major}.{of.minor}")
    yield Figure("multiprocessors", of.multi_processor_count)
    yield Figure("memory", total / 2**30, "GiB")
    yield Figure("memory that is free", free / 2**30, "GiB")
    yield Figure("devices", torch.cuda.device_count())
    yield Figure("CUDA of torch", str(torch.version.cuda))
    yield Figure("cuDNN", str(torch.backends.cudnn.version()))
    yield Figure("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def flashinfer(run: Setting) -> Figures:
    """Each module that a plain decoder needs is loaded, and `make_ops` serves with them."""
    if not run.cuda:
        yield Figure("not run", "needs a GPU")
        return
    kernels: dict[int, str] = {}
    for dim in DIMS:  # first, since it sets what FlashInfer's import reads
        begun = time.perf_counter()
        kernels[dim] = make_ops(torch.device(run.device), torch.bfloat16, Sizes(8, dim, [8 * dim]))[1]
        yield Figure(f"kernels for heads of {dim}", kernels[dim], "", "==", "flashinfer")
        yield Figure(f"time to have them, heads of {dim}", time.perf_counter() - begun, "s")
    for name, load in modules().items():
        begun = time.perf_counter()
        yield Figure(f"module {name}", outcome(load), "", "==", "loaded")
        yield Figure(f"module {name}: time", time.perf_counter() - begun, "s")


def modules() -> dict[str, Callable[[], Any]]:
    """How each module is loaded: by the functions that FlashInfer's own calls use, so that each is loaded once."""
    number, index = torch.bfloat16, torch.int32

    def load(file: str, getter: str, *of: Any) -> Any:
        return getattr(import_module(f"flashinfer.{file}"), getter)(*of)

    found: dict[str, Callable[[], Any]] = {
        "norm": partial(load, "norm", "get_norm_module"),
        "rope": partial(load, "rope", "get_rope_module"),
        "page": partial(load, "page", "get_page_module"),
        "silu_and_mul": partial(load, "activation", "get_act_and_mul_module", "silu"),
        "sampling": partial(load, "sampling", "get_sampling_module"),
    }
    for dim in DIMS:
        shape = number, number, number, index, dim, dim, 0, False, False
        found[f"decode, heads of {dim}"] = partial(load, "decode", "get_batch_decode_module", *shape)
        found[f"prefill, heads of {dim}"] = partial(load, "prefill", "get_batch_prefill_module", "fa2", *shape, False)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] == 9:
        found["fresh prompts, heads of 128"] = partial(
            load, "prefill", "get_batch_prefill_module", "fa3", *shape, False
        )
    return found


def outcome(load: Callable[[], Any]) -> str:
    """`loaded`, or the first line of why not: one that is missing does not hide the others."""
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return "loaded"
