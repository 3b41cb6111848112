"""Mixtures of experts and the delta net against the same sums in float64, over random shapes and ragged batches."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.ops import StepOps
from miniserve.ops.decoder import Batch, DeltaNet, Experts, Mlp, State
from miniserve.ops.quantized import Quantized, dense
from tests.ops.test_ops import ISAS, assert_close, every_kind, ops

Gated = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def experts(kernels: StepOps, weights: list[tuple[Any, Any]], chosen: int, activation: str = "silu") -> Experts:
    made = [Mlp(kernels.gated(up, None, activation), kernels.linear(down)) for up, down in weights]
    part: Any = {"router": None, "shared": None, "shared_gate": None}
    return Experts(chosen=chosen, renormed=True, experts=made, **part)


@every_kind
@settings(max_examples=25)
@given(data=st.data())
def test_mixture(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    chosen, rows = data.draw(st.integers(1, count)), data.draw(st.sampled_from([1, 2, 5, 17, 40, 200]))
    hidden, inner = data.draw(st.sampled_from([32, 96, 160])), data.draw(st.sampled_from([32, 64, 96]))
    bits, activation = data.draw(st.sampled_from([None, 4, 8])), data.draw(st.sampled_from([*Gated]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randn(rows, hidden).to(dtype)
    weights: list[Any] = [
        [torch.randn(shape).to(dtype) / 8 for shape in ((2 * inner, hidden), (hidden, inner))] for _ in range(count)
    ]
    if bits:
        weights = [[Quantized.of(weight, bits) for weight in pair] for pair in weights]
    crowded = torch.rand(rows, count) + 3 * torch.rand(count)  # some experts have many rows, others none
    ids = crowded.topk(chosen).indices
    shares = torch.rand(rows, chosen)

    kernels = ops(kind, dtype, width=hidden)
    part = experts(kernels, weights, chosen, activation)
    found = kernels.mixture(part, x, ids, shares)
    exact = [[dense(weight, torch.float32).double() for weight in pair] for pair in weights]
    wanted = torch.zeros(rows, hidden, dtype=torch.float64)
    for (up, down), expert in zip(exact, range(count), strict=True):
        share = (shares * (ids == expert)).sum(-1, keepdim=True).double()
        gate, value = (x.double() @ up.T).chunk(2, -1)
        wanted += share * ((Gated[activation](gate) * value) @ down.T)
    # The torch kernels round quantized weights and what is added to the dtype.
    assert_close(found, wanted, 5e-6 if dtype is torch.float32 else 2e-2 if kind in ISAS else 5e-2)
    if kind in ISAS and (not bits or dtype is torch.float32):
        alone = kernels.mixture(part, x[-1:].contiguous(), ids[-1:], shares[-1:])
        assert torch.equal(alone[0], found[-1]), "a row is the same in any company"


class Net:
    """A delta net with random numbers, and a state for some sequences that lies in a larger memory."""

    def __init__(self, dtype: torch.dtype, k_heads: int, shared: int, k_dim: int, v_dim: int, taps: int) -> None:
        v_heads, unused = k_heads * shared, {"qkvz": None, "ba": None, "out": None}
        self.part = DeltaNet(
            index=1,
            k_heads=k_heads,
            v_heads=v_heads,
            k_dim=k_dim,
            v_dim=v_dim,
            taps=taps,
            conv=torch.randn(taps, k_heads * (2 * k_dim + shared * v_dim)).to(dtype),
            rate=-torch.rand(v_heads),
            bias=torch.randn(v_heads),
            norm=torch.ones(v_dim, dtype=dtype),
            **unused,  # type: ignore[arg-type]
        )
        self.dtype, self.taps = dtype, taps

    def fresh(self, slots: int) -> State:
        conv = torch.zeros(slots, 4, self.taps - 1, self.part.channels, dtype=self.dtype)[:, 1:]
        delta = torch.zeros(slots, 3, self.part.v_heads, self.part.k_dim, self.part.v_dim)[:, :2]
        return State(conv, delta)

    def run(self, kernels: StepOps, state: State, slots: list[int], pieces: list[Any], before: list[int]) -> list[Any]:
        """What is read for `pieces` (qkv, ba) of some sequences, each behind so many tokens."""
        lengths = [len(qkv) for qkv, _ in pieces]
        ends = [*accumulate(lengths)]
        contexts = [old + new for old, new in zip(before, lengths, strict=True)]
        rows = torch.zeros(ends[-1], dtype=torch.int64)
        pages = [[0] * (context // 16 + 1) for context in contexts]
        batch = Batch(rows, rows, rows[:1], lengths, contexts, pages, slots)
        plan = kernels.plan(batch, torch.zeros(1, 1, 2, 16, 1, 64, dtype=self.dtype), state)
        qkv, ba = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        wide = torch.cat((qkv, qkv), 1)[:, : self.part.channels]  # as the model has it: a part of wider rows
        read = kernels.delta(plan, self.part, wide, ba)
        return [read[start:end] for start, end in pairwise([0, *ends])]

    def exact(self, qkv: torch.Tensor, ba: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read for one sequence from its first token on, and the state behind it, token by token in float64."""
        part = self.part
        padded = torch.cat((torch.zeros(self.taps - 1, qkv.shape[1]), qkv.float())).double()
        mixed = F.silu(sum(padded[i : i + len(qkv)] * tap for i, tap in enumerate(part.conv.double())))
        q, k, v = mixed.split((part.k_heads * part.k_dim,) * 2 + (part.v_heads * part.v_dim,), -1)
        state, out = torch.zeros(part.v_heads, part.k_dim, part.v_dim, dtype=torch.float64), []
        learned, rates = ba.double().chunk(2, -1)
        decay = (part.rate.double() * F.softplus(rates + part.bias)).exp()
        for t in range(len(qkv)):
            qt, kt = (x[t].view(part.k_heads, -1) for x in (q, k))
            qt, kt = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (qt, kt))
            shared = part.v_heads // part.k_heads
            qt, kt = qt.repeat_interleave(shared, 0) * part.k_dim**-0.5, kt.repeat_interleave(shared, 0)
            state *= decay[t].view(-1, 1, 1)
            known = torch.einsum("hkv,hk->hv", state, kt)
            new = learned[t].sigmoid().unsqueeze(-1) * (v[t].view(part.v_heads, -1) - known)
            state += kt.unsqueeze(-1) * new.unsqueeze(1)
            out.append(torch.einsum("hkv,hk->hv", state, qt))
        return torch.stack(out), state


@every_kind
@settings(max_examples=25)
@given(data=st.data())
def test_delta_net(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """Sequences side by side, in pieces of any length: each goes on where it stood."""
    k_heads, shared = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 2, 3]))
    k_dim, v_dim = data.draw(st.sampled_from([16, 32, 64])), data.draw(st.sampled_from([16, 48, 64]))
    lengths = data.draw(st.lists(st.integers(2, 150), min_size=1, max_size=4))
    cuts = [data.draw(st.integers(1, length - 1)) for length in lengths]
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    net, kernels = Net(dtype, k_heads, shared, k_dim, v_dim, data.draw(st.sampled_from([2, 4]))), ops(kind, dtype)
    inputs = [
        (torch.randn(length, net.part.channels).to(dtype), torch.randn(length, 2 * net.part.v_heads).to(dtype))
        for length in lengths
    ]
    slots = torch.randperm(6)[: len(lengths)].tolist()
    state = net.fresh(6)
    first = [(qkv[:cut], ba[:cut]) for (qkv, ba), cut in zip(inputs, cuts, strict=True)]
    second = [(qkv[cut:], ba[cut:]) for (qkv, ba), cut in zip(inputs, cuts, strict=True)]
    read = net.run(kernels, state, slots, first, [0] * len(lengths))
    read = [torch.cat(both) for both in zip(read, net.run(kernels, state, slots, second, cuts), strict=True)]
    limit = 1e-5 if dtype is torch.float32 else 2e-2 if kind in ISAS else 5e-2
    for (qkv, ba), slot, found in zip(inputs, slots, read, strict=True):
        wanted, memory = net.exact(qkv, ba)
        assert_close(found, wanted, limit)
        assert_close(state.delta[slot, 1], memory, limit)
        padded = torch.cat((torch.zeros(net.taps, net.part.channels, dtype=dtype), qkv))
        assert torch.equal(state.conv[slot, 1], padded[1 - net.taps :])
        if kind in ISAS:
            whole = net.fresh(6)
            alone = net.run(kernels, whole, [slot], [(qkv, ba)], [0])[0]
            assert torch.equal(alone, found), "a row is the same in any company and in any pieces"
            assert torch.equal(whole.delta[slot], state.delta[slot])
            assert torch.equal(whole.conv[slot], state.conv[slot])
    idle = [slot for slot in range(6) if slot not in slots]
    assert not state.delta[idle].any()
    assert not state.delta[:, 0].any(), "other layers have not changed"
