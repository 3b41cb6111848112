"""The wire: every message comes back as it was sent, and nothing else is taken for one."""

from __future__ import annotations

import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.cluster import messages as m
from miniserve.cluster import rank_messages as r
from miniserve.cluster.channels import decode
from miniserve.sampling_params import SamplingParams

PARAMS = SamplingParams(
    n=2,
    temperature=0.5,
    seed=-(2**63),
    logit_bias={7: -100.0, 8: 1.5},
    max_tokens=None,
    stop=["\n", "é😀"],
    stop_token_ids=[1, 2],
    logprobs=3,
    prompt_logprobs=2,
)
POOL = m.PoolInfo(pid=1234, fd=7, num_pages=2048, page_bytes=2**21, layout="llama-bf16-16")
STATS = m.WorkerStats(10, 4, 3, 3, 2, 1, 512, 1, steps=9, preemptions=1, prefix_hits=16, busy_seconds=0.25)
LOGPROBS = [m.TokenLogprob(5, -0.5, 1, [(5, -0.5), (9, -1.5)]), m.TokenLogprob(6, -2.0, 3, [])]
FIRST = m.FirstToken("t1", 3, [5, 6], cached_tokens=32, prefill=0.25, logprobs=LOGPROBS)
OUTPUTS: list[m.TurnOutput] = [
    FIRST,
    m.FirstToken("t1", 0, [], cached_tokens=0, prefill=0.5, prompt_logprobs=LOGPROBS),
    m.Tokens("t1", 5, [7]),
    m.Tokens("t1", 6, [5, 6], LOGPROBS),
    m.Ended("t1", 8, [5, 6], "stop", 6, LOGPROBS),
    m.Ended("t2", 0, [], "abort"),
    m.Failed("t2", 0, "lost"),
    m.Failed("t2", 3, "the grammar", invalid=True),
]
MESSAGES: list[m.Message] = [
    m.Peers([m.Peer("d0", 1, "ipc:///run/d0", POOL)]),
    m.Peers([m.Peer("d0", 1, "", msgspec.structs.replace(POOL, others=[POOL, POOL]))]),
    m.Peers([]),
    m.Run("t1", [1, 2, 3], PARAMS, seed=2**63, salt="tenant", prior=1, prefill_at="p0"),
    m.Run("t1", [1], PARAMS, 0, share_history=True, history_at="d1", keep=m.Keep("c", 1.5, 0.5, 0.01)),
    m.Run("t2", [1], SamplingParams(), seed=0),
    m.Abort("t1"),
    m.Shutdown(),
    m.Prefill("t1", [1, 2, 3], PARAMS, seed=1, salt="", prior=0, have=16),
    m.Publish("t1", 0, [4, 5], [b"\x00" * 16, b"\xff" * 16], finished_at=12340.5, deadline=12345.5),
    m.Publish("t1", 2, [], [], finished_at=0.0, deadline=0.0, last=True, commit=FIRST),
    m.Fetch("t1", 3, [b"\x00" * 16]),
    m.Release("t1"),
    m.PrefillRefused("t1", "no pages"),
    r.Forward([1, 2], [3, 4], [1], [2], [5], [[7, 8]], [0], scored=1, fed=True),
    r.Copied("save", [1], [4, 5]),
    r.Store(3, "p0", [1, 2], [3, 4], 12345.5),
    r.Abandon(3),
    r.Settle(),
    r.Stored(3, "the peer is gone"),
    m.RankReady(1, POOL),
    m.Loading("weights", 3, 30),
    m.Ready(
        *("bfloat16", "cpu", "native", 2, 2**28, 16, 8192, 49152, {"weights": 0.5}, "1 GiB / 2 MiB = 512 pages"),
        pool=POOL,
    ),
    m.StartFailed("no memory: use --kv-cache-memory 1GiB"),
    m.Report(OUTPUTS, [m.Move("t1", "p0", 3, 9, 0.1)], STATS),
]
BYTES = [msgspec.msgpack.encode(m.Envelope("d0", 3, body)) for body in MESSAGES]


@pytest.mark.parametrize("body", MESSAGES, ids=lambda body: type(body).__name__)
def test_a_message_comes_back_as_it_was_sent(body: m.Message) -> None:
    envelope = m.Envelope("d0", 3, body)
    assert decode(msgspec.msgpack.encode(envelope)) == envelope


def test_every_kind_of_message_is_tested() -> None:
    assert {type(body) for body in MESSAGES} == set(typing.get_args(m.Message))


def test_messages_are_immutable() -> None:
    with pytest.raises(AttributeError):
        m.Abort("t1").turn = "t2"  # type: ignore[misc]


@pytest.mark.parametrize(
    "body",
    [
        ["Unknown", "t1"],
        ["Commit", 1],  # ours, but never by itself
        ["Abort"],
        ["Abort", 5],
        ["Run", "t1", ["1"], {}, 0],
        ["Run", "t1", [1], {"top_k": "many"}, 0],
        ["Ended", "t1", 0, [], "finished"],
        ["Tokens", "t1", 0, [], None],  # an output, but never by itself
        [],
        None,
        "Shutdown",
        {"type": "Shutdown"},
    ],
    ids=repr,
)
def test_what_is_no_message_is_rejected(body: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(msgspec.msgpack.encode(["d0", 3, body]))


@pytest.mark.parametrize("envelope", [["d0", "3", ["Shutdown"]], ["d0", 3], [], {"sender": "d0"}, 7], ids=repr)
def test_what_is_no_envelope_is_rejected(envelope: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(msgspec.msgpack.encode(envelope))


@given(data=st.binary(max_size=64))
def test_garbage_is_rejected(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode(data)


@given(data=st.sampled_from(BYTES), at=st.integers(0, 10_000), byte=st.integers(0, 255))
@settings(max_examples=500)
def test_damaged_messages_are_rejected_or_read_as_messages(data: bytes, at: int, byte: int) -> None:
    """Whatever the damage is, it never raises another error than the one that readers expect."""
    at %= len(data)
    damaged = data[:at] + bytes([byte]) + data[at + 1 :]
    try:
        envelope = decode(damaged)
    except msgspec.MsgspecError:
        return
    assert isinstance(envelope.body, typing.get_args(m.Message))


@given(data=st.sampled_from(BYTES), at=st.integers(0, 10_000))
def test_messages_cut_short_are_rejected(data: bytes, at: int) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode(data[: at % len(data)])
