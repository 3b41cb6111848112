"""Made-up workloads have the sizes they promise, and a name or a path leads to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miniserve.bench.replay.generators import COUNT, WorkloadConfig, generate, load
from miniserve.bench.replay.traces import read_trace
from miniserve.bench.replay.workload import choose
from miniserve.config import ConfigError, tables

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


@pytest.mark.slow
def test_coding_agents_do_what_tracelab_saw() -> None:
    """Published numbers, within what docs/evaluation.md says of them; how long KV is worth keeping was not fitted."""
    scripts = generate("coding-agent", 2000, seed=1)
    counts = [len(script.turns) for script in scripts]
    assert np.percentile(counts, (25, 50, 90, 99)) == pytest.approx((5, 16, 152, 1236), rel=0.25)
    assert np.mean(counts) == pytest.approx(82.5, rel=0.15)
    rows = []
    compacted = []
    for script in scripts:
        said = last = 0
        drops = [False]
        for turn in script.turns:
            kept = min(said, turn.keep)
            rows.append((kept, turn.new, turn.output, turn.gap))
            drops.append(last - kept - turn.new >= 50_000)
            last, said = kept + turn.new, kept + turn.new + turn.output
        compacted.append(any(drops))
    kept, new, output, gap = np.array(rows).T
    assert np.percentile(kept, 50) == pytest.approx(121_000, rel=0.1)
    assert np.percentile(kept, 99) == pytest.approx(880_000, rel=0.1)
    assert np.percentile(new, 50) == pytest.approx(870, rel=0.1)
    assert np.mean((new >= 256) & (new <= 8000)) > 0.75
    assert np.percentile(output, 50) == pytest.approx(210, rel=0.15)
    assert np.percentile(output, 90) < 1700
    assert 0.045 < np.mean(compacted) < 0.184
    prompts = (kept + new).sum()
    hits = [kept[gap <= seconds].sum() / prompts for seconds in (60, 300, 3600)]
    assert hits == pytest.approx((0.854, 0.94, 0.986), abs=0.025)
    agents = [agent for script in scripts for agent in script.agents]
    assert len(agents) > 500
    assert all(agent.until == agent.after + 1 and agent.prefix for agent in agents)
    assert all(agent.turns[0].gap == 0 and agent.key.startswith("coding-agent-") for agent in agents)
    assert max(script.tokens for script in scripts) < 1_000_000


def test_tools_and_people_take_as_long_as_tracelab_saw() -> None:
    def shares(name: str, kind: dict[str, Any], *limits: float) -> list[float]:
        """The share of waits below each limit, and of the time."""
        quantiles, values = zip(*kind[name], strict=True)
        waits = np.exp(np.interp(np.linspace(0, 1, 1_000_001), quantiles, np.log(values)))
        below = [waits < limit for limit in limits]
        return [*(float(np.mean(some)) for some in below), float(waits[below[-1]].sum() / waits.sum())]

    claude, codex = tables("bench/replay/agents.toml")["coding-agent"]
    assert shares("tool", claude, 0.129, 1, 60) == pytest.approx([0.5, 0.7, 0.951, 0.08], abs=0.01)
    assert shares("tool", codex, 0.626, 10, 60) == pytest.approx([0.5, 0.88, 0.969, 0.39], abs=0.01)
    assert shares("tool", claude, 1)[-1] < 0.01
    assert shares("person", claude, 300, 3600)[:2] == pytest.approx([0.796, 0.964], abs=0.01)
    assert shares("person", codex, 300, 3600)[:2] == pytest.approx([0.698, 0.949], abs=0.01)
    assert claude["share"] + codex["share"] == 1


@pytest.mark.parametrize("name", ["swe-agent", "chat", "deep-research", "coding-agent", "mix:swe-agent=1,chat=3"])
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
        with pytest.raises(ConfigError, match=r"swe-agent, chat, deep-research, coding-agent, or a mix|cannot be read"):
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
