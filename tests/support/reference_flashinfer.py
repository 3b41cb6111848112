"""FlashInfer as plain math on a CPU: what `CudaOps` calls, each call held against the signature in the package.

Attention here reads pages slot by slot from the tables it was planned with, in float64: it shares nothing with
`TorchOps`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miniserve.ops import torch_ops
from miniserve.ops.decoder import DeltaNet, State


def real() -> Any:
    """The package itself, which imports without a GPU if it knows what to build for."""
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    return pytest.importorskip("flashinfer", reason="flashinfer-python is not installed (scripts/setup.sh does it)")


def checked(function: Callable[..., Any], like: Callable[..., Any], positional: int = 0) -> Callable[..., Any]:
    """`function`, called with names that `like` knows: its first `positional` arguments may come without."""
    signature = inspect.signature(inspect.unwrap(like))

    def call(*args: Any, **kwargs: Any) -> Any:
        assert len(args) <= positional, "arguments by name only"
        signature.bind(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class Wrapper:
    """Attention of either kind. `plan` keeps what it is given, in the buffers of a fixed wrapper if it is one."""

    def __init__(self, fi: Any, decode: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kind = fi.BatchDecodeWithPagedKVCacheWrapper if decode else fi.BatchPrefillWithPagedKVCacheWrapper
        inspect.signature(inspect.unwrap(self.kind.__init__)).bind(None, *args, **kwargs)
        assert kwargs["backend"] == "fa2", "auto would take another module"
        self.fixed = kwargs if kwargs.get("use_cuda_graph") else None
        self.decode = decode
        self.planned: dict[str, Any] = {}
        self.rows: int | None = None

    def plan(self, **kwargs: Any) -> None:
        plan = self.kind._plan_impl if self.decode else self.kind.plan  # decode's own takes any keyword
        inspect.signature(inspect.unwrap(plan)).bind(None, **kwargs)
        for value in kwargs.values():
            if isinstance(value, torch.Tensor):
                assert value.dtype == torch.int32
        indptr = kwargs["indptr" if self.decode else "paged_kv_indptr"]
        indices = kwargs["indices" if self.decode else "paged_kv_indices"]
        last = kwargs["last_page_len" if self.decode else "paged_kv_last_page_len"]
        assert indptr[0] == 0
        assert indptr[-1] == len(indices)
        assert len(last) == len(indptr) - 1
        assert bool((last >= 1).all())
        assert bool((last <= kwargs["page_size"]).all())
        starts = torch.arange(len(last) + 1) if self.decode else kwargs["qo_indptr"]
        if self.fixed is not None:
            names = ("paged_kv_indptr", "paged_kv_last_page_len", "paged_kv_indices", "qo_indptr")
            suffix = "buffer" if self.decode else "buf"
            fixed = [self.fixed[f"{name}_{suffix}"] for name in names[: 3 if self.decode else 4]]
            fixed[2] = fixed[2][: len(indices)]
            for buffer, given in zip(fixed, (indptr, last, indices, starts), strict=False):
                assert len(buffer) == len(given), "there are always as many sequences"
                buffer.copy_(given)
            (indptr, last, indices), starts = fixed[:3], starts if self.decode else fixed[3]
            assert self.rows in (None, int(starts[-1])), "what is launched was planned for other rows"
            self.rows = int(starts[-1])
        if not self.decode:
            assert kwargs["causal"]
            contexts = (indptr[1:] - indptr[:-1] - 1) * kwargs["page_size"] + last
            assert torch.equal(kwargs["seq_lens"], contexts)
            assert bool((starts[1:] - starts[:-1] <= contexts).all()), "a row would see nothing"
        self.planned = kwargs | {"tables": (indptr, indices, last, starts)}

    def run(self, **kwargs: Any) -> torch.Tensor:
        inspect.signature(inspect.unwrap(self.kind.run)).bind(None, **kwargs)
        q, (keys, values), out = kwargs["q"], kwargs["paged_kv_cache"], kwargs["out"]
        indptr, indices, last, starts = self.planned["tables"]
        size, group = self.planned["page_size"], self.planned["num_qo_heads"] // self.planned["num_kv_heads"]
        dtypes = {self.planned["q_data_type"], self.planned["kv_data_type"], q.dtype, keys.dtype, out.dtype}
        assert len(dtypes) == 1, "its default is fp16"
        assert q.shape[0] == starts[-1]
        assert q.shape[1:] == (self.planned["num_qo_heads"], self.planned["head_dim" if self.decode else "head_dim_qk"])
        for i in range(len(last)):
            pages = indices[indptr[i] : indptr[i + 1]].long()
            tokens = (len(pages) - 1) * size + int(last[i])
            k, v = (x[pages].flatten(0, 1)[:tokens].double().repeat_interleave(group, 1) for x in (keys, values))
            mine = q[starts[i] : starts[i + 1]].double()
            scores = torch.einsum("qhd,khd->hqk", mine, k) * self.planned["sm_scale"]
            position = torch.arange(tokens - len(mine), tokens)
            scores.masked_fill_(torch.arange(tokens) > position[:, None], -torch.inf)
            if (left := self.planned.get("window_left", -1)) >= 0:  # so many before the query are seen
                scores.masked_fill_(torch.arange(tokens) < position[:, None] - left, -torch.inf)
            out[starts[i] : starts[i + 1]] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
        return out


class Ragged:
    """Attention of prompts with nothing before them."""

    def __init__(self, fi: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kind = fi.BatchPrefillWithRaggedKVCacheWrapper
        inspect.signature(inspect.unwrap(self.kind.__init__)).bind(None, *args, **kwargs)
        assert kwargs["backend"] == "fa3", "auto would take another module"
        self.planned: dict[str, Any] = {}

    def plan(self, **kwargs: Any) -> None:
        inspect.signature(inspect.unwrap(self.kind.plan)).bind(None, **kwargs)
        assert kwargs["causal"]
        assert kwargs["head_dim_qk"] == 128, "no other module is shipped"
        assert torch.equal(kwargs["qo_indptr"], kwargs["kv_indptr"])
        self.planned = kwargs

    def run(self, **kwargs: Any) -> torch.Tensor:
        inspect.signature(inspect.unwrap(self.kind.run)).bind(None, **kwargs)
        planned, out, group = self.planned, kwargs["out"], self.planned["num_qo_heads"] // self.planned["num_kv_heads"]
        assert {planned["q_data_type"], planned["kv_data_type"]} == {kwargs[x].dtype for x in ("q", "k", "v", "out")}
        assert all(len(kwargs[x]) == planned["qo_indptr"][-1] for x in ("q", "k", "v", "out"))
        assert all(kwargs[x].stride(-1) == 1 for x in ("q", "k", "v", "out"))
        for begin, end in pairwise(planned["qo_indptr"].tolist()):
            q, k, v = (kwargs[x][begin:end].double() for x in ("q", "k", "v"))
            scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * planned["sm_scale"]
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(group, 1)).to(
                out.dtype
            )
        return out


def rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    assert len(input), "a grid of no rows is an error of CUDA's"
    x = input.double()
    return out.copy_(x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double())


def rope(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    assert cos_sin_cache.dtype == torch.float32
    assert is_neox
    cos, sin = cos_sin_cache[positions.long(), None].double().chunk(2, -1)
    for x in (query, key):
        heads = x.view(x.shape[0], -1, head_size)[..., : cos_sin_cache.shape[1]]  # the others stay as they are
        low, high = heads.double().chunk(2, -1)
        heads.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), -1))


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:
    assert len(input), "a grid of no rows is an error of CUDA's"
    gate, up = input.double().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def gelu_tanh_and_mul(input: torch.Tensor) -> torch.Tensor:
    assert len(input), "a grid of no rows is an error of CUDA's"
    gate, up = input.double().chunk(2, -1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(input.dtype)


def append(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str,
) -> None:
    keys, values = paged_kv_cache
    assert kv_layout == "NHD"
    assert keys.stride() == values.stride()
    assert len(kv_last_page_len) == len(kv_indptr) - 1
    for x in (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    for row, (i, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        page = kv_indices[kv_indptr[i] + position // keys.shape[1]]
        keys[page, position % keys.shape[1]] = append_key[row]
        values[page, position % keys.shape[1]] = append_value[row]


def top_k_renorm(probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    assert top_k.shape == probs.shape[:1]
    rows = zip(probs, top_k.tolist(), strict=True)
    kept = torch.stack([torch.where(row >= row.topk(k).values[-1], row, 0) for row, k in rows])
    return kept / kept.sum(-1, keepdim=True)


def top_p_renorm(probs: torch.Tensor, top_p: torch.Tensor, is_deterministic: bool) -> torch.Tensor:
    assert top_p.shape == probs.shape[:1]
    ordered, ids = probs.sort(-1, descending=True)
    keep = (ordered.cumsum(-1) - ordered) < top_p[:, None]
    kept = torch.zeros_like(probs).scatter(1, ids, ordered * keep)
    return kept / kept.sum(-1, keepdim=True)


def delta(
    state: State, slots: torch.Tensor, starts: torch.Tensor, part: DeltaNet, qkv: torch.Tensor, ba: torch.Tensor
) -> torch.Tensor:
    """What `CudaOps` takes for the kernel of `ops/cuda_delta.py`."""
    assert slots.dtype == starts.dtype == torch.int32
    assert len(slots) == len(starts) - 1
    rows = [slice(*ends) for ends in pairwise(starts.tolist())]
    return torch_ops.delta(state, list(zip(slots.tolist(), rows, strict=True)), part, qkv, ba)


def reference() -> Any:
    """What `CudaOps` takes for the module flashinfer."""
    fi = real()
    return SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=lambda *args, **kwargs: Wrapper(fi, True, args, kwargs),
        BatchPrefillWithPagedKVCacheWrapper=lambda *args, **kwargs: Wrapper(fi, False, args, kwargs),
        BatchPrefillWithRaggedKVCacheWrapper=lambda *args, **kwargs: Ragged(fi, args, kwargs),
        norm=SimpleNamespace(rmsnorm=checked(rmsnorm, fi.norm.rmsnorm)),
        rope=SimpleNamespace(
            apply_rope_with_cos_sin_cache_inplace=checked(rope, fi.rope.apply_rope_with_cos_sin_cache_inplace)
        ),
        activation=SimpleNamespace(
            silu_and_mul=checked(silu_and_mul, fi.activation.silu_and_mul),
            gelu_tanh_and_mul=checked(gelu_tanh_and_mul, fi.activation.gelu_tanh_and_mul),
        ),
        page=SimpleNamespace(append_paged_kv_cache=checked(append, fi.page.append_paged_kv_cache)),
        sampling=SimpleNamespace(
            top_k_renorm_probs=checked(top_k_renorm, fi.sampling.top_k_renorm_probs),
            top_p_renorm_probs=checked(top_p_renorm, fi.sampling.top_p_renorm_probs),
        ),
    )
