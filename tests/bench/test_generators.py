"""Made-up workloads have the sizes they promise, and a name or a path leads to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from miniserve.bench.replay.distributions import choose
from miniserve.bench.replay.generators import COUNT, WorkloadConfig, generate, load
from miniserve.bench.replay.traces import read_trace
from miniserve.config import ConfigError

HEADER = "conversation_id,turn,new_input_tokens,output_tokens"


def test_swe_agent_has_the_sizes_of_its_trace() -> None:
    """The figures are those of the trace (outputs) and the paper (first prompts); see the generator."""
    scripts = generate("swe-agent", 2000, seed=1)
    outputs = np.array([[turn.output for turn in script.turns] for script in scripts])
    first = [script.turns[0].new for script in scripts]
    assert np.percentile(first, (5, 50, 95)) == pytest.approx((12_240, 15_890, 17_295), rel=0.02)
    assert {turn.new for script in scripts for turn in script.turns[1:]} == {67}
    assert np.median(outputs, axis=0) == pytest.approx((102, 40, 49, 54, 105, 192, 250, 296, 316, 334), rel=0.1)
    assert np.mean(outputs) == pytest.approx(306, rel=0.08)
    for turns, share in ((5, 0.506), (10, 0.315)):
        total = np.sort(outputs[:, :turns].sum(axis=1))
        assert total[-200:].sum() / total.sum() == pytest.approx(share, abs=0.05)
    ranks = outputs[:, 3:].argsort(axis=0).argsort(axis=0)
    correlation = np.corrcoef(ranks.T)[np.triu_indices(7, 1)].mean()
    assert correlation == pytest.approx(0.125, abs=0.03)


def test_chat_and_deep_research_keep_to_their_ranges() -> None:
    chat = generate("chat", 1000, seed=1)
    assert np.percentile([script.turns[0].new for script in chat], (5, 50, 95)) == pytest.approx(
        (97, 220, 500), rel=0.15
    )
    assert np.mean([turn.output for script in chat for turn in script.turns]) == pytest.approx(248, rel=0.1)
    assert np.mean([len(script.turns) for script in chat]) == pytest.approx(3, rel=0.1)
    gaps = [turn.gap for script in chat for turn in script.turns[1:]]
    assert np.percentile(gaps, (5, 95)) == pytest.approx((10, 62), rel=0.15)

    research = generate("deep-research", 300, seed=1)
    later = [turn for script in research for turn in script.turns[1:]]
    assert {len(script.turns) for script in research} == set(range(5, 16))
    assert all(2000 <= script.turns[0].new <= 4000 for script in research)
    assert all(1000 <= turn.new <= 8000 and 100 <= turn.output <= 600 and 1 <= turn.gap <= 30 for turn in later)
    assert np.median([turn.new for turn in later]) == pytest.approx(8**0.5 * 1000, rel=0.1)


@pytest.mark.parametrize("name", ["swe-agent", "chat", "deep-research", "mix:swe-agent=1,chat=3"])
def test_a_script_depends_on_its_number_and_the_seed_only(name: str) -> None:
    scripts = generate(name, 40, seed=3)
    assert generate(name, 7, seed=3) == scripts[:7]
    assert len({script.key for script in scripts}) == 40
    assert {script.turns for script in generate(name, 40, seed=4)}.isdisjoint(script.turns for script in scripts)
    assert all(script.turns[0].gap == 0 and script.arrival is None and not script.shared for script in scripts)


def test_a_mix_has_its_shares() -> None:
    keys = [script.key for script in generate("mix:swe-agent=1, chat=3", 1000, seed=0)]
    assert sum(key.startswith("chat") for key in keys) == pytest.approx(750, abs=50)
    assert [int(key.rpartition("-")[2]) for key in keys] == list(range(1000))


@pytest.mark.parametrize("name", ["mix:", "mix:a=1", "mix:chat", "mix:chat=0", "mix:chat=nan", "mix:chat=1,chat=1"])
def test_a_mix_that_is_broken(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r} is no mix: .* known are swe-agent, chat, deep-research"):
        load(name, 1, seed=0)


def test_load_takes_a_path_or_a_name(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("\n".join([HEADER, *(f"{n},0,{n + 1},1" for n in range(20))]))
    assert load(str(file), None, seed=0) == read_trace(file)
    assert load(str(file), 5, seed=0) == choose(read_trace(file), 5, seed=0)
    assert load("chat", None, seed=2) == generate("chat", COUNT, seed=2)
    assert load("chat", 0, seed=2) == []
    for wrong in (str(tmp_path / "none.csv"), "swe_agent", ""):
        with pytest.raises(ConfigError, match=r"swe-agent, chat, deep-research, or a mix|cannot be read"):
            load(wrong, None, seed=0)


def test_a_workload_arrives_as_the_trace_says_or_at_a_rate(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(f"{HEADER},arrival_s\na,0,9,1,5\nb,0,9,1,7.5\n")
    config = WorkloadConfig(trace=str(file), arrivals="fixed", scale_tokens=2.0)
    found = config.load(None, seed=3)
    assert (found.starts, found.rate, found.seed) == ([0.0, 2.5], None, 3)
    assert [script.turns[0].new for script in found.scripts] == [18, 18]
    assert (config.load(4.0, seed=3).starts, config.load(4.0, seed=3).rate) == ([0.0, 0.25], 4.0)
    made_up = WorkloadConfig(trace="chat", arrivals="fixed", conversations=3).load(None, seed=0)
    assert (made_up.starts, made_up.rate) == ([0.0, 1.0, 2.0], 1.0)
