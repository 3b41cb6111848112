"""How much of a prompt goes into a step, beside streams and beside other prompts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.cluster.messages import StepTime
from miniserve.kv.eviction import ExpectedNeed
from miniserve.kv.pages import PagePool
from miniserve.sampling_params import SamplingParams
from miniserve.worker.batching import LEAST_SHARE, Pace
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import Launched, Work

LONE, TOKEN = 0.01, 0.001


def step(pace: Pace, rest: int = 10_000, streams: float = 0.0) -> float:
    """A step with as much of a prompt as it may take, beside streams that take `streams` seconds more than a lone one;
    how long it took."""
    tokens = min(pace.tokens, rest)
    seconds = LONE + streams + TOKEN * tokens
    pace.observe(StepTime(tokens, 0, 2, 100, seconds))
    return seconds


def lone(pace: Pace, seconds: float = LONE) -> None:
    pace.observe(StepTime(0, 0, 1, 100, seconds))


@pytest.mark.parametrize("streams", [0.0, 0.005, 0.015])
def test_steps_come_to_rest_at_the_stretch(streams: float) -> None:
    pace = Pace(512, 6.0)
    assert pace.tokens == 512
    lone(pace)
    lone(pace, 0.02)  # the shortest counts
    for _ in range(12):
        seconds = step(pace, streams=streams)
    assert seconds == pytest.approx(6 * LONE, rel=0.05)


def test_a_prompt_always_gets_on() -> None:
    pace = Pace(512, 6.0)
    lone(pace)
    for _ in range(20):
        step(pace, streams=0.5)
    assert pace.tokens == 512 // LEAST_SHARE
    for _ in range(20):
        step(pace)
    assert pace.tokens == pytest.approx(50, abs=2), "and more when the streams are gone"


def test_the_short_rest_of_a_prompt_says_nothing() -> None:
    pace = Pace(512, 6.0)
    lone(pace)
    for _ in range(12):
        step(pace)
    before = pace.tokens
    for _ in range(50):
        step(pace, rest=3)
    assert pace.tokens == before


def test_without_a_stream_s_step_to_compare_with_nothing_changes() -> None:
    pace = Pace(512, 6.0)
    step(pace)
    assert pace.tokens == 512


def test_what_is_shortest_is_forgotten_in_time() -> None:
    """A machine that has become slower: after some thousand steps its lone steps count."""
    pace = Pace(512, 6.0)
    lone(pace)
    for _ in range(2000):
        lone(pace, 0.03)
    for _ in range(12):
        seconds = step(pace)
    assert seconds == pytest.approx(6 * 0.03, rel=0.05)


def test_steps_keep_to_the_stretch_whatever_a_token_costs() -> None:
    """Random machines: where the stretch leaves more than the least share, steps come close to it from both sides."""
    pick = random.Random(5)
    for _ in range(200):
        budget, stretch, lone_step = pick.choice([512, 2048, 8192]), pick.uniform(1.5, 8), 10 ** pick.uniform(-4, -1)
        beside = lone_step * pick.uniform(0, 0.8) * (stretch - 1)  # what more streams add
        token = lone_step * 10 ** pick.uniform(-4, -1)
        fits = (stretch * lone_step - lone_step - beside) / token
        pace = Pace(budget, stretch)
        pace.observe(StepTime(0, 0, 1, 100, lone_step))
        pace.tokens = pick.choice([budget, budget // LEAST_SHARE])
        for _ in range(100):
            taken = pace.tokens
            assert budget // LEAST_SHARE <= taken <= budget
            pace.observe(StepTime(taken, 0, 4, 100, lone_step + beside + token * taken))
        seconds = lone_step + beside + token * pace.tokens
        if budget // LEAST_SHARE < fits < budget:
            assert seconds == pytest.approx(stretch * lone_step, rel=0.05)
        else:
            assert pace.tokens == pytest.approx(min(max(fits, budget // LEAST_SHARE), budget), rel=0.2)


def test_one_slow_step_halves_the_share_and_is_soon_forgotten() -> None:
    """A machine that stands still for a second: nothing is learned of it beyond a few steps."""
    pace = Pace(512, 12.0)
    lone(pace)
    for _ in range(12):
        step(pace)
    before = pace.tokens
    pace.observe(StepTime(pace.tokens, 0, 2, 100, 100 * LONE))
    assert pace.tokens == pytest.approx(before / 2, abs=1)
    for _ in range(4):
        step(pace)
    assert pace.tokens == pytest.approx(before, abs=2)


def test_a_step_without_time_teaches_nothing() -> None:
    pace = Pace(512, 6.0)
    lone(pace)
    pace.observe(StepTime(512, 0, 2, 100, 0.0))
    assert pace.tokens == 512


class Machine:
    """A runner on which each step takes LONE and TOKEN for each token of a prompt; it notes what it was given."""

    eos: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.now = 0.0
        self.steps: list[tuple[int, int, float]] = []
        self.shares: list[dict[str, int]] = []

    def launch(self, batch: list[Work]) -> Launched:
        prompts = sum(work.count for work in batch if not work.is_decode)
        streams = sum(work.is_decode for work in batch)
        seconds = LONE + TOKEN * prompts
        self.now += seconds
        self.steps.append((prompts, streams, seconds))
        self.shares.append({work.sequence.turn: work.count for work in batch})
        sampled = [(7, None) for work in batch if work.samples]
        return lambda: sampled


@pytest.mark.parametrize("stretch", [5.0, 9.0])
def test_the_engine_takes_prompts_beside_streams_as_the_pace_says(stretch: float) -> None:
    machine = Machine()
    engine = Engine(
        machine,
        PagePool(1000, ExpectedNeed()),
        page_tokens=16,
        max_num_batched_tokens=512,
        max_num_seqs=8,
        max_model_len=8000,
        pace=Pace(512, stretch),
        clock=lambda: machine.now,
    )

    def steps(count: int) -> list[tuple[int, int, float]]:
        before = len(machine.steps)
        for _ in range(count):
            engine.admit()
            engine.step()
        return machine.steps[before:]

    def add(name: str, length: int, output: int) -> None:
        engine.add(Sequence(name, [len(name)] * length, SamplingParams(max_tokens=output), 0, name.encode()))

    add("prompt", 2000, 1)
    assert [prompts for prompts, _, _ in steps(4)] == [512, 512, 512, 464], "with nobody beside it all goes in"
    add("stream", 16, 1000)
    steps(10)
    add("append", 7000, 1)
    beside = steps(20)
    assert all(streams == 1 for _, streams, _ in beside)
    assert all(prompts for prompts, _, _ in beside), "both get on in each step"
    assert beside[-1][2] == pytest.approx(stretch * LONE, rel=0.06)
    engine.abort("stream")
    assert steps(1)[0][0] == 512, "the stream is gone"


def test_one_slow_step_with_a_short_rest_only_halves_the_share() -> None:
    pace = Pace(2048, 6.0)
    lone(pace)
    pace.observe(StepTime(3, 0, 2, 100, 1.0))
    assert pace.tokens == 1024


def test_a_small_budget_does_not_stick_at_one_token() -> None:
    pace = Pace(16, 6.0)
    lone(pace)
    for _ in range(20):
        step(pace, streams=1.0)
    assert pace.tokens == 1
    for _ in range(20):
        step(pace, streams=0.02)
    assert pace.tokens == 16


def small_engine(machine: Machine, pace: Pace | None = None) -> Engine:
    """One that takes 64 tokens a step."""
    return Engine(
        machine,
        PagePool(1000, ExpectedNeed()),
        page_tokens=16,
        max_num_batched_tokens=64,
        max_num_seqs=99,
        max_model_len=8000,
        pace=pace,
        clock=lambda: machine.now,
    )


def shares(*prompts: tuple[str, int], streams: int = 0) -> list[dict[str, int]]:
    """What each step computes of prompts that came in this order, 64 tokens a step, until the last one is computed."""
    machine = Machine()
    engine = small_engine(machine)
    for n in range(streams):
        engine.add(Sequence(f"s{n}", [n] * 2, SamplingParams(max_tokens=999), 0, bytes([n])))
    while streams and (not machine.steps or machine.steps[-1][1] < streams):
        engine.admit()
        engine.step()
    for name, length in prompts:
        engine.add(Sequence(name, [ord(name)] * length, SamplingParams(max_tokens=1), 0, name.encode()))
    done: list[dict[str, int]] = []
    while any(engine.find(name) for name, _ in prompts):
        engine.admit()
        engine.step()
        done.append({name: count for name, count in machine.shares[-1].items() if name in dict(prompts)})
    return done


def test_a_short_prompt_makes_the_step_of_a_long_one_before_it_short() -> None:
    assert shares(("a", 128), ("b", 20)) == [{"a": 6, "b": 20}, {"a": 64}, {"a": 58}]
    assert shares(("a", 128), ("b", 3)) == [{"a": 4, "b": 3}, {"a": 64}, {"a": 60}], "the least share of 64"
    assert shares(("a", 128), ("b", 32), ("c", 32)) == [
        {"a": 16, "b": 32, "c": 16},
        {"a": 5, "c": 16},
        {"a": 64},
        {"a": 43},
    ], "they get three quarters of a step, no more"


def test_prompts_of_a_kind_come_one_after_the_other() -> None:
    assert shares(("a", 100), ("b", 100)) == [{"a": 64}, {"a": 36, "b": 28}, {"b": 64}, {"b": 8}]
    assert shares(("a", 30), ("b", 30), ("c", 30)) == [{"a": 30, "b": 30, "c": 4}, {"c": 26}]


def test_a_long_prompt_gets_on_however_many_short_ones_there_are() -> None:
    steps = shares(("a", 256), *((chr(98 + n), 32) for n in range(12)))
    assert [step["a"] for step in steps[:8]] == [16] * 8
    assert len(steps) == (256 + 12 * 32) // 64, "no token of a step is lost"


def test_a_step_with_little_room_serves_the_oldest() -> None:
    steps = shares(("a", 40), ("b", 5), streams=63)
    assert steps[0] == {"a": 1}, "half of one token is none"
    assert sum(step.get("a", 0) for step in steps) == 40
    assert sum(step.get("b", 0) for step in steps) == 5


@settings(max_examples=200, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 12), st.integers(2, 300)), min_size=1, max_size=12),
    streams=st.integers(0, 9),
    pace=st.sampled_from([None, 1.5, 12.0]),
)
def test_each_step_serves_short_prompts_first_and_lets_long_ones_get_on(
    arrivals: list[tuple[int, int]], streams: int, pace: float | None
) -> None:
    """Random prompts that come at random steps beside streams."""
    machine = Machine()
    engine = small_engine(machine, Pace(64, pace) if pace else None)
    for n in range(streams):
        engine.add(Sequence(f"s{n}", [n] * 2, SamplingParams(max_tokens=999), 0, bytes([n])))
    while streams and (not machine.steps or machine.steps[-1][1] < streams):
        engine.admit()
        engine.step()
    turn = 0
    while turn <= 12 or len(engine.running) > streams:
        for n, (at, length) in enumerate(arrivals):
            if at == turn:
                engine.add(Sequence(f"p{n}", [n] * length, SamplingParams(max_tokens=1), 0, bytes([99, n])))
        engine.admit()
        wanted = {s.turn: s.to_launch for s in engine.running if s.to_launch > 1}
        decodes = len(engine.running) - len(wanted)
        room = min(64 - decodes, engine.pace.tokens if engine.pace and decodes else 64)
        engine.step()
        turn += 1
        if not wanted:
            continue
        given = {name: machine.shares[-1].get(name, 0) for name in wanted}
        short = {name for name, tokens in wanted.items() if tokens <= 32}
        for_short, for_long = (sum(given[n] for n in wanted if (n in short) == want) for want in (True, False))
        assert for_short + for_long <= room
        assert given[next(iter(wanted))], "the oldest one gets on in each step, long or short"
        if not short or room == 1:
            assert sum(given.values()) == min(room, sum(wanted.values())), "nothing is lost"
        else:
            first = min(short, key=list(wanted).index)
            assert given[first] >= min(wanted[first], int(0.75 * room)), "the oldest short one comes first"
            assert for_long <= max(for_short / 3, 4)
