"""The simulator: known answers, and what must hold of any run."""

from __future__ import annotations

import gc
import json
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from miniserve.bench.replay.generators import WorkloadConfig
from miniserve.bench.replay.metrics import groups, latency
from miniserve.bench.replay.workload import WHOLE, Distribution, Script, TurnSize
from miniserve.bench.simulate.cluster import Agent, Simulation
from miniserve.bench.simulate.hardware import PRESETS, Hardware
from miniserve.bench.simulate.run import alone, simulate
from miniserve.bench.simulate.worker import LONGEST_STRIDE, SimulatedWorker
from miniserve.cli import main as cli
from miniserve.scheduler.baselines import POLICIES
from miniserve.worker.step import Launched, Work
from scripts.figures.timeline import timeline
from tests.support.simulated import PLAIN, scripts, simulated
from tests.support.whole import check_pool

pytestmark = pytest.mark.slow

A40 = PRESETS["a40-qwen3-0.6b"]


def simulation(
    work: list[Script], topology: str, policy: str, hardware: Hardware = PLAIN, rate: float = 2.0
) -> Simulation:
    made = Simulation(simulated(work, topology, policy, rate, hardware, mispredict=0.2))
    made.run()
    return made


@pytest.mark.parametrize("policy", ["colocated", "conserve", "observe"])
def test_a_stride_is_its_steps(policy: str, monkeypatch: pytest.MonkeyPatch):
    """The same tokens at the same times as with a call for each step, and far fewer calls. What `observe` has measured
    of steps it knows later, so it may place a turn elsewhere."""
    counts, found = [], []
    launch = SimulatedWorker.launch

    def counted(self: SimulatedWorker, batch: list[Work]) -> Launched:
        counts[-1] += 1
        return launch(self, batch)

    monkeypatch.setattr(SimulatedWorker, "launch", counted)
    for longest in (1, LONGEST_STRIDE):
        monkeypatch.setattr("miniserve.bench.simulate.worker.LONGEST_STRIDE", longest)
        counts.append(0)
        found.append(simulation(scripts(60, turns=4), "1P2D", policy, A40, rate=3.0))
    assert counts[1] < counts[0] / 3
    one, many = ({times.key: latency(times) for times in made.times} for made in found)
    near = 0.05 if policy == "observe" else 1e-6
    for key, times in one.items():
        assert many[key].ttfet == pytest.approx(times.ttfet, rel=near)
        assert many[key].e2e == pytest.approx(times.e2e, rel=near)
        assert many[key].ttft == pytest.approx(times.ttft, rel=2 * near, abs=0.05 * (policy == "observe"))
    assert sum(found[1].gaps) == pytest.approx(sum(found[0].gaps), rel=near)
    assert len(found[1].gaps) == len(found[0].gaps)


def test_a_stride_paces_prompts_as_its_steps_do(monkeypatch: pytest.MonkeyPatch):
    """A long prompt beside a stream that went on in strides takes no longer steps than beside one that did not."""
    work = [Script("stream", (TurnSize(100, 600),)), Script("prompt", (TurnSize(30_000, 50),))]
    config = simulated(work, "1D", "observe", 0.5, A40)
    found = []
    for longest in (1, LONGEST_STRIDE):
        monkeypatch.setattr("miniserve.bench.simulate.worker.LONGEST_STRIDE", longest)
        made = Simulation(replace(config, workload=replace(config.workload, starts=[0.0, 2.0])))
        made.run()
        found.append((max(made.gaps), [latency(times).ttfet for times in made.times]))
    (gap, ttfet), many = found
    assert many == (pytest.approx(gap, rel=0.01), pytest.approx(ttfet, rel=0.01))


# --- known answers --------------------------------------------------------------------------------------------------


def test_one_conversation_by_hand():
    """300 tokens in chunks of 100, then decodes; the next turn finds 304 of 320 tokens and computes 46."""
    work = [Script("t", (TurnSize(300, 20), TurnSize(30, 5)))]
    found = alone(work[0], PLAIN)
    assert found.ttft == pytest.approx((3 * 0.11, 0.01 + 0.046))
    assert found.ttfet == pytest.approx(0.33 + 19 * 0.01 + 0.056)
    assert found.tbt == pytest.approx(0.01)
    assert found.e2e == pytest.approx(found.ttfet + 4 * 0.01)


@pytest.mark.parametrize("hardware", [PLAIN, msgspec.structs.replace(A40, page_tokens=16)])
@pytest.mark.parametrize("policy", ["colocated", "observe"])
def test_alone_is_what_the_simulator_does_with_one(hardware: Hardware, policy: str):
    work = [Script("t", (TurnSize(700, 33), TurnSize(1, 7), TurnSize(65, 1, 2.0), TurnSize(250, 80)))]
    found = latency(simulation(work, "1D", policy, hardware).times[0])
    wanted = alone(work[0], hardware)
    assert found.ttft == pytest.approx(wanted.ttft)
    assert found[1:] == pytest.approx(wanted[1:])


def test_a_handoff_overlaps_with_the_prefill():
    """P computes 300 tokens in 0.33 s; their KV takes 0.3 s on the way: all but that of the last chunk is hidden."""
    found = simulation([Script("t", (TurnSize(300, 5),))], "1P1D", "conserve").times[0]
    assert found.turns[0].first == pytest.approx(0.33, abs=0.002), "the first token comes from P at once"
    rest = 4 * 0.01
    last = 0.33 + (304 - 192) * 0.001  # 12 pages of the first two chunks have been there before
    assert found.turns[0].last == pytest.approx(last + rest, abs=0.012)


def test_conserve_moves_each_first_prompt_once():
    result = simulate(simulated(scripts(10), "1P2D", "conserve"))
    assert result["kv_transfer"]["bytes"] == 10 * 19 * 16 * 1000
    assert sum(n for place, n in result["placements"].items() if place.startswith("p0->")) == 10
    assert sum(n for place, n in result["placements"].items() if "->" not in place) == 20


def test_links_between_hosts_are_slower_and_workers_are_spread_evenly():
    """Two hosts with a prefiller and two decoders each; the first ones of each role share a host."""
    far = msgspec.structs.replace(PLAIN, devices_per_host=3, far_bytes_per_second=1e5)
    made = simulation(scripts(30), "2P4D", "conserve", far)
    hosts = {name: worker.host for name, worker in made.workers.items()}
    assert hosts == {"p0": "h0", "p1": "h1", "d0": "h0", "d1": "h0", "d2": "h1", "d3": "h1"}
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for (source, destination), link in made.scheduler.links.items():
        speeds[hosts[source] == hosts[destination]].append(link.bytes / link.seconds)
    assert speeds[True] == pytest.approx([1e6] * len(speeds[True]))
    assert speeds[False] == pytest.approx([1e5] * len(speeds[False]))
    assert all(speeds.values())


def test_energy_counts_busy_and_idle_time():
    result = simulate(simulated([Script("t", (TurnSize(100, 11),))], "2D", "colocated"))
    busy = 0.11 + 10 * 0.01
    assert result["duration_s"] == pytest.approx(busy)
    assert result["energy"]["joules"] == pytest.approx(busy * (100 + 10))
    assert result["energy"]["tokens_per_joule"] == pytest.approx(111 / (busy * 110))
    unknown = msgspec.structs.replace(PLAIN, busy_watts=None)
    result = simulate(simulated(scripts(1), "1D", "colocated", hardware=unknown))
    assert result["energy"] is None


def test_without_prefix_caching_nothing_is_found():
    assert simulate(simulated(scripts(5), "1D", "colocated", enable_prefix_caching=False))["cached_tokens"] == 0
    assert simulate(simulated(scripts(5), "1D", "colocated"))["cached_tokens"] > 0


def test_the_same_prompt_is_computed_once():
    work = [WorkloadConfig(trace="t", same_prompt=True).apply(script, 0) for script in scripts(8, turns=1, first=1536)]
    room = msgspec.structs.replace(PLAIN, kv_tokens=65536)
    cached = [script.turns[0].cached for script in simulation(work, "1D", "colocated", room, rate=0.1).times]
    assert cached[0] == 0
    assert set(cached[1:]) == {1520}


# --- kept prefixes and sub-agents ----------------------------------------------------------------------------------


def test_a_compacted_conversation_computes_only_what_it_lost():
    """Of 320 tokens 100 stay, of which 96 are found; the next turn finds the full pages of what there is then."""
    work = [Script("t", (TurnSize(300, 20), TurnSize(30, 5, 1.0, 100), TurnSize(10, 3)))]
    found = simulation(work, "1D", "observe").times[0]
    assert [(turn.prompt, turn.cached) for turn in found.turns] == [(300, 0), (130, 96), (145, 128)]
    assert latency(found)[1:] == pytest.approx(alone(work[0], PLAIN)[1:])
    assert latency(found).ttft == pytest.approx(alone(work[0], PLAIN).ttft)


def test_sub_agents_run_side_by_side_and_their_parent_waits():
    """Two begin after the parent's first turn, one of them with its tokens, and a third one runs in the background."""
    near = Script("t/0", (TurnSize(10, 30, 0.5), TurnSize(20, 30, 1.0)), until=1, prefix=200)
    other = Script("t/1", (TurnSize(50, 10),), until=2)
    behind = Script("t/2", (TurnSize(40, 900),), after=1, until=9)
    parent = Script(
        "t", (TurnSize(300, 20), TurnSize(30, 5, 0.2), TurnSize(10, 3, 0.1, 50)), agents=(near, other, behind)
    )
    made = simulation([parent, Script("u", (TurnSize(20, 2),))], "2D", "observe")
    times = {one.key: one for one in made.times}
    assert times.keys() == {"t", "t/0", "t/1", "t/2", "u"}
    t, sub = times["t"], times["t/0"]
    assert (sub.parent, t.parent, times["u"].parent) == (t, None, None)
    assert sub.arrival == pytest.approx(t.turns[0].last + 0.5)
    assert [(turn.prompt, turn.cached) for turn in sub.turns] == [(210, 192), (260, 224)]
    assert times["t/1"].arrival == t.turns[0].last
    assert (times["t/1"].turns[0].prompt, times["t/1"].turns[0].cached) == (50, 0)
    assert t.turns[1].sent == sub.turns[1].last > times["t/1"].turns[0].last
    assert t.turns[2].sent == pytest.approx(t.turns[1].last + 0.1), "what runs in the background is not waited for"
    assert times["t/2"].turns[0].last > t.turns[2].last
    assert (t.tools, sub.tools) == pytest.approx((0.3, 1.0))
    assert t.gaps == pytest.approx(0.1 + sub.turns[1].last - t.turns[0].last)
    took = [times["t/2"].turns[0].last - t.arrival - 0.3, times["u"].turns[0].last - times["u"].arrival]
    assert sorted(groups(made.times)) == pytest.approx(sorted(took))


def test_sub_agents_have_sub_agents():
    """Each level begins with all that the one above has said; each waits for the one below."""
    lowest = Script("t/0/0", (TurnSize(10, 4),), prefix=400)
    middle = Script("t/0", (TurnSize(20, 4), TurnSize(5, 4)), agents=(lowest,), prefix=400)
    made = simulation([Script("t", (TurnSize(100, 4), TurnSize(5, 4)), agents=(middle,))], "1D", "observe")
    top, mid, low = made.times
    assert [turn.prompt for times in (top, mid, low) for turn in times.turns] == [100, 109, 124, 133, 138]
    assert top.turns[0].last == mid.turns[0].sent < mid.turns[0].last == low.turns[0].sent
    assert low.turns[0].last == mid.turns[1].sent < mid.turns[1].last == top.turns[1].sent
    assert low.root is mid.root is top
    assert groups(made.times) == [top.turns[1].last - top.arrival]


def test_sub_agents_are_named_where_that_is_asked_for():
    child = Script("t/0", (TurnSize(10, 3), TurnSize(5, 3)), prefix=64)
    work = [Script("t", (TurnSize(100, 3), TurnSize(10, 3)), agents=(child,))]
    for named in (False, True):
        made = Simulation(simulated(work, "1D", "observe", name_groups=named))
        made.run()
        found = {c.key: (c.group, c.by, c.turns) for c in made.scheduler.conversations}
        assert found == ({"t": ("t", "", 2), "t/0": ("t", "header", 2)} if named else {1: (1, "", 2), 2: (2, "", 2)})


# --- what must hold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["1D", "3D", "1P1D", "2P2D"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_token_of_the_trace_is_served_once(policy: str, topology: str):
    """On pools that are far too small, with gaps and appends; afterwards nothing is held, reserved or expected."""
    shape = WorkloadConfig(trace="t", gap=Distribution.parse("0..3"), append=Distribution.parse("log:5..200"))
    work = [shape.apply(script, 3) for script in scripts(25, turns=4, first=500)]
    small = msgspec.structs.replace(PLAIN, kv_tokens=2048)
    made = simulation(work, topology, policy, small)
    assert sorted(t.key for t in made.times) == sorted(t.key for t in work)
    for times in made.times:
        sizes = next(script.turns for script in work if script.key == times.key)
        assert [turn.output for turn in times.turns] == [size.output for size in sizes]
        prompts = [sum(s.new + s.output for s in sizes[:n]) + sizes[n].new for n in range(len(sizes))]
        assert [turn.prompt for turn in times.turns] == prompts
        assert all(turn.sent < turn.first <= turn.last for turn in times.turns)
        waits = [later.sent - turn.last for turn, later in pairwise(times.turns)]
        assert waits == pytest.approx([size.gap for size in sizes[1:]])
    for _ in range(60):  # acks and reports that are still under way, then all deadlines pass
        made.step()
    made.now += 1e6
    made.scheduler.on_tick(made.now)
    for name, worker in made.workers.items():
        check_pool(worker.pool)
        view = made.scheduler.workers[name]
        assert (worker.pool.num_held, view.reserved, view.turns) == (0, 0, 0)
        assert view.wanted == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_means_one_result(policy: str):
    one, other = (simulate(simulated(scripts(12), "1P2D", policy, mispredict=0.3)) for _ in range(2))
    assert json.dumps(one) == json.dumps(other)


def test_coding_agents_end_on_small_pools_and_leave_nothing():
    """Compaction, sub-agents and waits of hours, scaled down; the same seed means the same result."""
    shape = WorkloadConfig(trace="coding-agent", conversations=12, scale_tokens=0.008, max_turns=150, max_gap=20)
    workload = shape.load(0.5, seed=2)
    keys = [script.key for script in workload.conversations]
    assert len(keys) > 12, "some have sub-agents"
    assert any(turn.keep < WHOLE for script in workload.conversations for turn in script.turns)
    room = msgspec.structs.replace(PLAIN, kv_tokens=2 * 8192)
    config = replace(simulated([], "1P2D", "observe", hardware=room), workload=workload)
    made = Simulation(config)
    made.run()
    assert sorted(times.key for times in made.times) == sorted(keys)
    sizes = {script.key: script for script in workload.conversations}
    for times in made.times:
        length = sizes[times.key].prefix
        for turn, size in zip(times.turns, sizes[times.key].turns, strict=True):
            length = min(length, size.keep) + size.new
            assert turn.prompt == length
            length += turn.output
    assert json.dumps(simulate(config)) == json.dumps(simulate(config))


def test_observe_waits_rather_than_computes_again():
    """More conversations than fit: those that come later wait, and what was computed is found."""
    work = [Script(f"t{n}", (TurnSize(900, 30), *[TurnSize(20, 30)] * 4)) for n in range(20)]
    found = {policy: simulate(simulated(work, "2D", policy, rate=5.0)) for policy in ("colocated", "observe")}
    again = {policy: result["prompt_tokens"] - result["cached_tokens"] for policy, result in found.items()}
    assert again["observe"] < 0.7 * again["colocated"]
    assert found["observe"]["ttfet_s"]["p95"] < found["colocated"]["ttfet_s"]["p95"]


@pytest.mark.parametrize(("share", "counted"), [(0.0, 10), (0.35, 7), (1.0, 1)])
def test_conversations_that_come_first_are_not_counted(share: float, counted: int) -> None:
    result = simulate(simulated(scripts(10), "1P1D", "observe", warm_up=share))
    assert result["conversations"] == counted
    assert result["turns"] == 3 * counted


def test_a_timeline_shows_what_workers_did():
    shown = timeline(simulated(scripts(10), "1P1D", "conserve"), 1.0, 3.0)
    assert shown["window"] == [1.0, 3.0]
    kinds = {worker: {kind for _, _, kind in spans} for worker, spans in shown["spans"].items()}
    assert kinds["p0"] == {"prefill"}
    assert kinds["d0"] >= {"decode", "transfer"}
    for spans in shown["spans"].values():
        steps = sorted(span for span in spans if span[2] != "transfer")
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(steps)), "one step at a time"
        assert all(end > 1.0 and start < 3.0 for start, end, _ in steps)
    assert all(0 <= held <= shown["pages"][name] for name, kv in shown["kv"].items() for _, held, _ in kv)


def test_memory_does_not_grow_with_what_is_over():
    """Of a conversation that is over, a few kilobytes are left, though the command collects no circles."""

    def used(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        gc.disable()
        made = simulation(scripts(count, first=2000), "1D", "colocated", rate=0.2)
        gc.enable()
        now, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(made.times) == count
        return now

    used(5)  # what is loaded once
    few, many = used(10), used(40)
    assert (many - few) / 30 < 10_000


def test_an_agent_that_has_ended_holds_no_tokens_while_its_sub_agents_run():
    child = Script("", (TurnSize(9, 3), TurnSize(9, 3, 10_000.0)), after=1, until=9, prefix=20)
    work = [replace(one, agents=(child.renamed(f"{one.key}/0"),)) for one in scripts(5, first=2000)]
    ended: list[int] = []
    made = Simulation(simulated(work, "1D", "colocated", rate=0.2), lambda: ended.append(1))
    while len(ended) < 5:
        made.step()
    agents = [found for found in gc.get_objects() if type(found) is Agent]
    assert sorted(len(agent.text.said) for agent in agents) == [0] * 5 + [32] * 5
    agents.clear()
    made.run()
    assert not [found for found in gc.get_objects() if type(found) is Agent]


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys):
    trace = tmp_path / "t.csv"
    rows = [f"{c},{t},{200 if t == 0 else 20},12" for c in range(6) for t in range(3)]
    trace.write_text("\n".join(["conversation_id,turn,new_input_tokens,output_tokens", *rows]) + "\n")
    command = f"simulate {trace} --topology 1P1D --policy conserve --rate 2 --max-turns 2 --seed 4 --json {{}}"
    assert cli.main(command.format(tmp_path / "r.json").split()) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["policy"], result["topology"], result["rate"], result["seed"]) == ("conserve", "1P1D", 2.0, 4)
    assert (result["conversations"], result["turns"], result["output_tokens"]) == (6, 12, 144)
    assert {"ttft_s", "ttfet_norm", "slo_violation", "throughput", "kv_transfer", "placements", "energy"} <= set(result)
    assert cli.main(command.format(tmp_path / "none" / "r.json").split()) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert cli.main(["simulate", str(tmp_path / "nothing.csv")]) == 1
    assert "nothing.csv" in capsys.readouterr().err


# --- host memory ----------------------------------------------------------------------------------------------------

PAGE = PLAIN.page_tokens * PLAIN.kv_bytes_per_token


def with_host(pages: int) -> Simulation:
    """60 conversations with pauses of a minute on two workers that have room for half of them."""
    hardware = msgspec.structs.replace(PLAIN, host_bytes_per_second=1e7, swap_space=pages * PAGE)
    made = Simulation(
        simulated(scripts(60, turns=4, first=300, gap=60.0), "2D", "observe", rate=1.0, hardware=hardware)
    )
    made.run()
    for worker in made.workers.values():
        check_pool(worker.pool)
        assert worker.num_pages == pages
    return made


def later_ttft(made: Simulation) -> float:
    return sum(turn.first - turn.sent for times in made.times for turn in times.turns[1:])


def test_what_does_not_fit_gains_from_host_memory():
    without, some, much = (with_host(pages) for pages in (0, 300, 1000))
    assert sum(worker.worker._stats().restored for worker in some.workers.values()) > 500
    assert later_ttft(some) < 0.8 * later_ttft(without)
    assert later_ttft(much) < 0.8 * later_ttft(some)


def test_with_host_memory_it_is_the_same_each_time():
    assert [times.turns for times in with_host(300).times] == [times.turns for times in with_host(300).times]


def test_copies_to_host_memory_by_hand():
    """A token has 1000 bytes, a page 16 tokens."""
    hardware = msgspec.structs.replace(PLAIN, host_latency=0.5)
    assert hardware.host_seconds(3) == pytest.approx(0.5 + 3 * 0.016), "as fast as to another device"
    assert msgspec.structs.replace(hardware, host_bytes_per_second=1e5).host_seconds(1) == pytest.approx(0.5 + 0.16)


def test_the_flag_of_serve_gives_host_memory(tmp_path: Path):
    profile = tmp_path / "small.json"
    profile.write_bytes(msgspec.json.encode(msgspec.structs.replace(PLAIN, name="small", kv_tokens=12_000)))
    args = (
        f"simulate swe-agent --topology 2D --hardware {profile} --scale-tokens 0.3 --rate 1 --conversations 12 --gap 20"
    )

    def cached(*flags: str) -> int:
        assert cli.main([*args.split(), "--max-turns", "4", *flags, "--json", str(tmp_path / "out")]) == 0
        return json.loads((tmp_path / "out").read_text())["cached_tokens"]

    assert cached("--swap-space", "16GiB") > 1.1 * cached()


# --- a disk ---------------------------------------------------------------------------------------------------------


def with_disk(pages: int, rate: float = 1e7) -> Simulation:
    """As `with_host(100)`, and a disk that holds `pages`."""
    hardware = msgspec.structs.replace(PLAIN, host_bytes_per_second=1e7, swap_space=100 * PAGE, disk_space=pages * PAGE)
    hardware = msgspec.structs.replace(hardware, disk_bytes_per_second=rate)
    made = Simulation(
        simulated(scripts(60, turns=4, first=300, gap=60.0), "2D", "observe", rate=1.0, hardware=hardware)
    )
    made.run()
    for worker in made.workers.values():
        assert worker.disk.pieces.total <= pages * PAGE
        check_pool(worker.pool)
    return made


def test_what_host_memory_lacks_room_for_comes_back_from_disk():
    without, some, much = (with_disk(pages) for pages in (0, 600, 5000))
    read = [sum(worker.worker._stats().loaded for worker in made.workers.values()) for made in (without, some, much)]
    assert 0 == read[0] < read[1] < read[2]
    assert later_ttft(some) < 0.9 * later_ttft(without)
    assert later_ttft(much) < 0.8 * later_ttft(some)
    assert [times.turns for times in with_disk(600).times] == [times.turns for times in some.times]


def test_a_slow_disk_is_left_alone():
    slow = with_disk(5000, rate=10.0)
    assert sum(worker.worker._stats().loaded for worker in slow.workers.values()) == 0
