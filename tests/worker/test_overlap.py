"""A step is launched before the one before it has told what it sampled: what is known when, and what is dropped."""

from __future__ import annotations

import pytest

from miniserve.kv.eviction import ExpectedNeed
from miniserve.kv.pages import PagePool
from miniserve.sampling_params import Grammar, SamplingParams
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import Launched, Sampled, Work
from tests.support.engines import prompts, small
from tests.support.whole import check_pool

END = 99


class Device:
    """A runner that says 1, 2, 3, ... in each turn, `END` as number `end_at`; `log` tells what was launched and waited
    for."""

    eos = frozenset({END})

    def __init__(self, end_at: int = 1000) -> None:
        self.log: list[str] = []
        self._end_at = end_at
        self._said: dict[str, int] = {}

    def launch(self, batch: list[Work]) -> Launched:
        number = sum(line.startswith("launch") for line in self.log)
        self.log.append(f"launch {number}: " + ", ".join(f"{w.sequence.turn} {w.count}" for w in batch))
        tokens = []
        for work in batch:
            if work.samples:
                turn = work.sequence.turn
                said = self._said[turn] = self._said.get(turn, 0) + 1
                tokens.append(END if said == self._end_at else said)

        def wait() -> Sampled:
            self.log.append(f"wait {number}")
            return [(token, None) for token in tokens]

        return wait


def engine(device: Device, pages: int = 100) -> Engine:
    return Engine(
        device,
        PagePool(pages, ExpectedNeed()),
        page_tokens=4,
        max_num_batched_tokens=16,
        max_num_seqs=8,
        max_model_len=64,
        overlap=True,
    )


def add(made: Engine, name: str, length: int, **params) -> None:
    made.add(Sequence(name, [ord(name)] * length, SamplingParams(temperature=0, **params), 0, name.encode()))


def rounds(made: Engine, said: dict[str, list[int]], most: int) -> dict[str, list[int]]:
    """At most so many rounds; adds to what each turn has said."""
    while most and (made.waiting or made.has_work):
        most -= 1
        made.admit()
        for output in made.step().outputs:
            said.setdefault(output.turn, []).extend(output.tokens)
            assert len(said[output.turn]) == output.index + len(output.tokens)
    return said


def run(made: Engine) -> dict[str, list[int]]:
    """Until nothing is left; what each turn said."""
    said = rounds(made, {}, 1000)
    check_pool(made.pool)
    assert made.pool.num_held == 0
    return said


@pytest.mark.parametrize("penalty", ["", "repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_a_step_is_always_launched_before_the_one_before_it_is_waited_for(penalty: str) -> None:
    device = Device()
    made = engine(device)
    add(made, "a", 20, max_tokens=4, **({penalty: 1.5} if penalty else {}))
    assert run(made) == {"a": [1, 2, 3, 4]}
    assert device.log == [
        "launch 0: a 16",
        "launch 1: a 4",
        "wait 0",
        "launch 2: a 1",
        "wait 1",
        "launch 3: a 1",
        "wait 2",
        "launch 4: a 1",
        "wait 3",
        "wait 4",
    ], "the last token is known to be the last: no step too many"


def test_the_step_after_an_end_is_dropped() -> None:
    device = Device(end_at=3)
    made = engine(device)
    add(made, "a", 4)
    add(made, "b", 4)
    assert run(made) == {"a": [1, 2, END], "b": [1, 2, END]}
    assert device.log[-3:] == ["launch 3: a 1, b 1", "wait 2", "wait 3"]


def test_an_abort_between_launch_and_wait() -> None:
    device = Device()
    made = engine(device)
    add(made, "a", 4, max_tokens=5)
    add(made, "b", 4, max_tokens=5)
    said = rounds(made, {}, 2)
    assert said == {"a": [1], "b": [1]}
    made.abort("a")
    assert made.pool.num_held == 2, "b's: its prompt, and the token that is under way"
    assert rounds(made, said, 100) == {"a": [1], "b": [1, 2, 3, 4, 5]}
    check_pool(made.pool)
    assert made.pool.num_held == 0


def test_the_length_limit_is_seen_ahead() -> None:
    device = Device()
    made = engine(device)
    add(made, "a", 61)
    assert run(made) == {"a": [1, 2, 3]}, "64 tokens in all"
    assert device.log[-1] == f"wait {sum(line.startswith('launch') for line in device.log) - 1}"
    assert made.counters.steps == 4 + 2


def test_who_has_a_grammar_waits_for_each_token() -> None:
    device = Device()
    made = engine(device)
    add(made, "a", 4, max_tokens=3, grammar=Grammar("regex", ".*"))
    add(made, "b", 4, max_tokens=4)
    assert run(made) == {"a": [1, 2, 3], "b": [1, 2, 3, 4]}
    assert device.log[:6] == [
        "launch 0: a 4, b 4",
        "launch 1: b 1",
        "wait 0",
        "launch 2: a 1, b 1",
        "wait 1",
        "launch 3: b 1",
    ]


def test_preemption_while_a_token_is_under_way() -> None:
    """Three grow in a pool for two: the youngest gives way, in the middle of a step, and loses no token."""
    device = Device()
    made = engine(device, pages=9)
    for name in "abc":
        add(made, name, 8, max_tokens=8)
    assert run(made) == {name: [1, 2, 3, 4, 5, 6, 7, 8] for name in "abc"}
    assert made.counters.preemptions > 0


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "seed": 5, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "logprobs": 4},
        {"temperature": 0.0, "logprobs": 0},
        {"temperature": 0.7, "seed": 1, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
        {"temperature": 0.0, "logit_bias": {5: 3.0, 7: -9.0}, "min_tokens": 9, "stop_token_ids": [11, 12, 13]},
    ],
    ids=str,
)
def test_what_is_sampled_is_the_same(tiny_models, params) -> None:
    items = prompts(6, seed=8)
    found = []
    for overlap in (False, True):
        llm = small(tiny_models["llama"], async_scheduling=overlap)
        all_params = [SamplingParams(max_tokens=20, **params) for _ in items]
        found.append([g.outputs for g in llm.generate(items, all_params, progress=False)])
        check_pool(llm.engine.pool)
    assert found[0] == found[1]
