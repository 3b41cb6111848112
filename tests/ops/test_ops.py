"""Kernels against the same sums in float64, over random shapes, page tables and ragged lengths."""

from __future__ import annotations

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.ops import StepOps, make_ops, native
from miniserve.ops.cpu_ops import CpuOps
from miniserve.ops.decoder import Batch, Sizes
from miniserve.ops.quantized import GROUP, Quantized
from miniserve.ops.torch_ops import native_bf16
from tests.support.native_kernels import NativeKernels
from tests.support.parts import attention_part

CPU = torch.device("cpu")
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}
"""Largest error, as a part of the largest value: a few units in the last place of the dtype (2^-23, 2^-8)."""


ISAS = [*native.ISAS]
"""The kernels of this CPU, those of lesser ones as far as it can run them, and tiles in plain C++."""
fp32, bf16 = torch.float32, torch.bfloat16
CASES = [("native", fp32), ("avx2", fp32), ("torch", fp32)]
CASES += [(kind, bf16) for kind in ("native", "avx512", "tiles-emulated", "torch") if native_bf16()]
"""Kinds of kernels, of which torch are the reference, and dtypes that these compute differently."""
every_kind = pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)


def ops(kind: str, dtype: torch.dtype, head_dim: int = 64, width: int = 64, page: int = 16) -> StepOps:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISERVE_CPU_ISA", kind if kind in ISAS else "")
        made, said = make_ops(CPU, dtype, Sizes(4, head_dim, (width,)), page, native=kind in ISAS)
    if kind in ISAS and not isinstance(made, CpuOps):
        pytest.skip(said)
    return NativeKernels(made) if isinstance(made, CpuOps) else made


def assert_close(
    found: torch.Tensor, wanted: torch.Tensor, limit: float = 0.0, size: torch.Tensor | None = None
) -> None:
    """Relative to the largest number that is wanted, or to a `size`: that of what was added up, of which little may be
    left."""
    error = (found.double() - wanted).abs().max() / (wanted.abs().max() if size is None else size)
    assert error < (limit or LIMIT[found.dtype]), f"relative error {error:.2e}"


def in_order(kernels: StepOps, kv: torch.Tensor) -> torch.Tensor:
    """The pool as `[page, layer, k/v, slot, kv_head, head_dim]`, from the order in which the kernels keep it."""
    if not isinstance(kernels, CpuOps):
        return kv
    pages, layers, _, size, heads, dim = kv.shape
    lanes, per = int(re.findall(r"\d+", kernels.layout)[0]), 4 // kv.itemsize
    keys, values = kv.view(pages, layers, 2, heads, size // lanes, -1).unbind(2)
    keys = keys.view(pages, layers, heads, -1, dim // per, lanes, per).permute(0, 1, 3, 5, 2, 4, 6)
    values = values.view(pages, layers, heads, -1, lanes // per, dim, per).permute(0, 1, 3, 4, 6, 2, 5)
    return torch.stack([half.reshape(pages, layers, size, heads, dim) for half in (keys, values)], 2)


def put(kv: torch.Tensor, layer: int, tables: list, lengths: list, contexts: list, k, v) -> None:
    """New keys and values of some sequences into a pool that is in order."""
    start, size = 0, kv.shape[3]
    for table, new, context in zip(tables, lengths, contexts, strict=True):
        for i in range(new):
            page, slot = table[(context - new + i) // size], (context - new + i) % size
            kv[page, layer, 0, slot], kv[page, layer, 1, slot] = k[start + i], v[start + i]
        start += new


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int, int, int, int, int, int]:
    """(new tokens, tokens with these) of each sequence; heads, kv heads, head size, page size, window, seed."""
    pairs = draw(st.lists(st.tuples(st.integers(1, 140), st.integers(0, 200)), min_size=1, max_size=5))
    decodes = draw(st.lists(st.integers(1, 300), max_size=3))
    sequences = [(new, new + before) for new, before in pairs] + [(1, context) for context in decodes]
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 3, 4, 7]))
    return (
        draw(st.permutations(sequences)),
        kv_heads * group,
        kv_heads,
        draw(st.sampled_from([32, 64, 96, 128])),
        draw(st.sampled_from([16, 32, 48])),
        draw(st.sampled_from([0, 0, 1, 17, 64, 100])),
        draw(st.integers(0, 2**31)),
    )


@every_kind
@settings(max_examples=25)
@given(case=batches())
def test_paged_attention(kind: str, dtype: torch.dtype, case) -> None:
    sequences, heads, kv_heads, dim, size, window, seed = case
    if kind == "torch":
        size //= 16  # any will do there
    torch.manual_seed(seed)
    layers, layer = 3, seed % 3
    counts = [-(-context // size) for _, context in sequences]
    numbers = list(range(sum(counts) + 2))
    random.Random(seed).shuffle(numbers)
    pages = [[numbers.pop() for _ in range(count)] for count in counts]
    kernels = ops(kind, dtype, dim, page=size)
    # What others left behind, in slots that are not written yet too, must not be seen.
    kv = torch.full((sum(counts) + 2, layers, 2, size, kv_heads, dim), torch.nan).to(dtype)

    def attend(lengths: list[int], contexts: list[int], tables: list[list[int]]) -> tuple[torch.Tensor, ...]:
        total = sum(lengths)
        # As the model has them: slices of one matrix.
        qkv = torch.randn(total, heads + 2 * kv_heads, dim).to(dtype)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
        rows = torch.zeros(total, dtype=torch.int64)
        batch = Batch(rows, rows, rows[:1], lengths, contexts, tables)
        return q, k, v, kernels.attention(kernels.plan(batch, kv), attention_part(layer, dim**-0.5, window), q, k, v)

    old = [(context - new, table) for (new, context), table in zip(sequences, pages, strict=True) if context > new]
    wanted = in_order(kernels, kv).clone()
    if old:
        lengths, tables = [length for length, _ in old], [table[: -(-length // size)] for length, table in old]
        _, k, v, _ = attend(lengths, lengths, tables)
        put(wanted, layer, tables, lengths, lengths, k, v)
    lengths, contexts = [new for new, _ in sequences], [context for _, context in sequences]
    q, k, v, out = attend(lengths, contexts, pages)
    put(wanted, layer, pages, lengths, contexts, k, v)

    start = 0
    for (new, context), table in zip(sequences, pages, strict=True):
        keys, values = wanted[table][:, layer].transpose(0, 1).reshape(2, -1, kv_heads, dim)[:, :context].double()
        queries = q[start : start + new].double().view(new, kv_heads, -1, dim)
        scores = torch.einsum("nhgd,mhd->hgnm", queries, keys) * dim**-0.5
        back = torch.arange(context - new, context).unsqueeze(1) - torch.arange(context)
        weights = scores.masked_fill((back < 0) | (back >= (window or context)), -torch.inf).softmax(-1)
        right = torch.einsum("hgnm,mhd->nhgd", weights, values).reshape(new, heads, dim)
        # The rounding of a score, a sum of `dim` products, is a relative error of its weight: in fp32 the median case
        # is off by 8e-7, one in 600 by 2e-6. The torch kernels also round scores and weights to bf16.
        limit = {torch.float32: 5e-6, torch.bfloat16: LIMIT[dtype] if kind in ISAS else 5e-2}[dtype]
        assert_close(out[start : start + new], right, limit)
        start += new
    found = in_order(kernels, kv)
    found[wanted.isnan()] = torch.nan  # the first token of a page or vector makes zeros of what comes after it
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7)), "all in its slot, and nothing else has changed"


@every_kind
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_what_lies_between_the_matrix_products(kind: str, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    kernels = ops(kind, dtype, width=576)
    x, weight = torch.randn(rows, 576).to(dtype) * 3, torch.randn(576).to(dtype)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()

    assert_close(kernels.rms_norm(x, weight, 1e-5), norm(x, weight))
    qkv = torch.randn(rows, 7, 64).to(dtype)
    assert_close(kernels.rms_norm(qkv[:, 1:5], weight[:64], 1e-5), norm(qkv[:, 1:5], weight[:64]))

    # Gates far out on both sides: silu is 0 there, or the gate itself.
    far = torch.linspace(-30, 30, 96).unsqueeze(1)
    weight, bias = (
        torch.cat((torch.randn(96, 576) * far / 24, torch.randn(96, 576) / 24)).to(dtype),
        torch.randn(192).to(dtype),
    )
    gate, up = (x.double() @ weight.double().T + bias.double()).to(dtype).double().chunk(2, -1)
    assert_close(kernels.gated(weight, bias)(x), torch.nn.functional.silu(gate) * up)
    wanted = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert_close(kernels.gated(weight, bias, "gelu_tanh")(x), wanted)


@every_kind
@pytest.mark.parametrize("size", [64, 32, 20, 2])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_rotary_positions(kind: str, dtype: torch.dtype, size: int, rows: int) -> None:
    """Of the first numbers of each head, how few they may be."""
    torch.manual_seed(rows)
    kernels, qkv = ops(kind, dtype), torch.randn(rows, 7, 64).to(dtype)
    angles = torch.rand(rows + 9, size // 2) * 6
    positions = torch.randint(rows + 9, (rows,))
    c, s = (x.to(dtype).double()[positions, None] for x in (angles.cos(), angles.sin()))

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high, rest = x.double().split((size // 2, size // 2, 64 - size), -1)
        return torch.cat((low * c - high * s, high * c + low * s, rest), -1)

    q, k = qkv[:, :5], qkv[:, 5:]
    wanted = turned(q), turned(k)
    for got, want in zip(kernels.rope(q, k, kernels.rotary(angles, dtype)(positions)), wanted, strict=True):
        assert_close(got, want)


@every_kind
@pytest.mark.parametrize(("columns", "size"), [(32, 32), (64, 576), (96, 160), (208, 1536)])
def test_matrix_products(kind: str, dtype: torch.dtype, columns: int, size: int) -> None:
    torch.manual_seed(columns)
    weight, bias = torch.randn(columns, size).to(dtype), torch.randn(columns).to(dtype)
    x, residual = torch.randn(200, size).to(dtype), torch.randn(200, columns).to(dtype)
    kernels = ops(kind, dtype, width=size)
    product = x.double() @ weight.double().T
    for rows in (1, 5, 6, 7, 95, 96, 97, 200):
        plain, biased = kernels.linear(weight.clone()), kernels.linear(weight.clone(), bias)
        assert_close(plain(x[:rows]), product[:rows])
        assert_close(plain(x[:rows], residual[:rows]), (product + residual)[:rows])
        assert_close(biased(x[:rows], residual[:rows]), (product + bias + residual)[:rows])
        if kind in ISAS:
            assert torch.equal(plain(x[:rows])[-1], plain(x[rows - 1 : rows])[0]), "a row is the same in any company"


@st.composite
def quantized(draw: st.DrawFn, bits: int) -> tuple[Quantized, int]:
    """A weight, and a seed."""
    columns, groups, seed = draw(st.integers(1, 200)), draw(st.integers(1, 40)), draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    shape, lifted = (columns, groups), bits == 4 and draw(st.booleans())
    low, high = (0, 16) if lifted else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    codes = torch.randint(low, high, (columns, groups * GROUP), dtype=torch.int8)
    scales = torch.randn(shape).exp() * draw(st.sampled_from([1e-6, 1e-2, 30.0]))  # the smallest are subnormal
    return Quantized(bits, codes, scales.half(), (scales * -8 * torch.rand(shape)).half() if lifted else None), seed


@every_kind
@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=25)
@given(data=st.data())
def test_products_of_quantized_weights(kind: str, bits: int, dtype: torch.dtype, data: st.DataObject) -> None:
    weight, seed = data.draw(quantized(bits))
    columns, size = weight.shape
    kernels = ops(kind, dtype, width=size)
    torch.manual_seed(seed)
    x, bias = torch.randn(120, size).to(dtype), torch.randn(columns).to(dtype)
    exact = weight.codes.double().view(columns, -1, GROUP) * weight.scales.double().unsqueeze(-1)
    terms = exact.abs()
    if weight.minimums is not None:
        exact += weight.minimums.double().unsqueeze(-1)
        terms += weight.minimums.double().abs().unsqueeze(-1)
    wanted = x.double() @ exact.view(columns, size).T
    # Sums in fp32 are off by a part of what they add up, however little is left of it.
    added = (x.double().abs() @ terms.view(columns, size).T).max() + bias.double().abs().max()
    # Weights that are rounded are off by a part of what such terms add up to at random, however much of that cancels.
    random = (x.double().square() @ terms.view(columns, size).square().T).sqrt().max()
    linear, head = kernels.linear(weight, bias), kernels.head(weight)
    for rows in {1, data.draw(st.integers(2, 16)), data.draw(st.integers(17, 120))}:
        in_fp32 = dtype is torch.float32
        limit = 1e-6 if in_fp32 else 3e-2 if kind == "torch" else 0  # there weights are rounded too
        biased = (wanted + bias.double())[:rows]
        assert_close(linear(x[:rows]), biased, limit, added if in_fp32 else torch.maximum(random, biased.abs().max()))
        # Codes are multiplied as they are, unless there are many rows: then they are rounded to the dtype first.
        few = rows <= 64 // bits
        rounded = not in_fp32 and (kind == "torch" or not few)
        if kind in ISAS and (in_fp32 or few):
            assert torch.equal(linear(x[:rows])[-1], linear(x[rows - 1 : rows])[0]), "the same in any such company"
        if rounded:
            assert_close(
                head(x[:rows]),
                wanted[:rows],
                max(LIMIT[dtype], limit),
                torch.maximum(random, wanted[:rows].abs().max()),
            )
        else:
            assert_close(head(x[:rows]), wanted[:rows], 1e-6, added)


@every_kind
@pytest.mark.parametrize("vocab", [1, 64, 200])
def test_logits(kind: str, dtype: torch.dtype, vocab: int) -> None:
    torch.manual_seed(vocab)
    weight, x = torch.randn(vocab, 96).to(dtype), torch.randn(17, 96).to(dtype)
    head = ops(kind, dtype, width=96).head(weight)
    wanted = x.double() @ weight.double().T
    for rows in (0, 1, 6, 7, 17):
        found = head(x[:rows])
        assert found.shape == (rows, vocab)
        assert found.dtype is torch.float32
        if rows:
            limit = LIMIT[torch.float32] if kind in ISAS else LIMIT[dtype]
            assert (found.double() - wanted[:rows]).abs().max() / wanted.abs().max() < limit


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    made, said = make_ops(CPU, torch.float32, Sizes(4, 64, (64,)))
    assert not isinstance(made, CpuOps)
    assert "no g++ found" in said


def test_the_reason_names_what_the_compiler_says(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'cpu.cpp:1: error: not today' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MINISERVE_CACHE", str(tmp_path))
    with pytest.raises(native.NoKernels, match="not today"):
        native.load()
    assert not list((tmp_path / "kernels").glob("*.so"))


def test_every_header_is_part_of_the_name_of_what_was_compiled() -> None:
    texts = [path.read_text() for path in (native.SOURCE, *native.HEADERS)]
    included = {name for text in texts for name in re.findall(r'#include "(.*)"', text)}
    assert included == {path.name for path in native.HEADERS}


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("MINISERVE_CACHE", str(tmp_path))
    lines: list[str] = []
    for _ in range(2):
        try:
            native.load(lines.append)
        except native.NoKernels as reason:
            pytest.skip(str(reason))
    assert lines == ["compiling CPU kernels (once)"]


def test_sizes_that_do_not_fill_vectors_are_left_to_torch() -> None:
    assert not isinstance(make_ops(CPU, torch.float32, Sizes(4, 40, (64,)))[0], CpuOps)
    assert not isinstance(make_ops(CPU, torch.float16, Sizes(4, 64, (64,)))[0], CpuOps)
    assert not isinstance(make_ops(CPU, torch.float32, Sizes(4, 64, (64,)), 12)[0], CpuOps)
    made, said = make_ops(CPU, torch.float32, Sizes(4, 64, (64,), (32, 36)))
    assert not isinstance(made, CpuOps)
    assert "g++" in said or "recurrent state of 32 and 36 numbers do not fill vectors" in said
