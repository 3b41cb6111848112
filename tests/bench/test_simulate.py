"""The simulator: known answers, and what must hold of any run."""

from __future__ import annotations

import gc
import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import msgspec
import psutil
import pytest

from miniserve.bench import commands as evaluate
from miniserve.bench.replay.metrics import latency
from miniserve.bench.replay.workload import ARRIVALS, Shape, Spread, Task, TurnSize, arrivals
from miniserve.bench.simulate.cluster import Simulation
from miniserve.bench.simulate.hardware import PRESETS, Hardware, load_hardware, load_roles
from miniserve.bench.simulate.profile import Measured, fit, quality
from miniserve.bench.simulate.run import Setting, alone, simulate
from miniserve.cli import main as cli
from miniserve.config import ConfigError, Topology
from miniserve.scheduler.baselines import POLICIES, make_policy

A40 = PRESETS["a40-qwen3-0.6b"]
PLAIN = Hardware(
    name="plain",
    source="a test",
    base=0.01,
    per_token=0.001,
    per_pair=0.0,
    kv_bytes_per_token=1000,
    kv_tokens=4096,
    max_num_batched_tokens=100,
    page_tokens=16,
    transfer_bytes_per_second=1e6,
    busy_watts=100.0,
    idle_watts=10.0,
)
"""A step takes 10 ms and 1 ms for each token of a prompt; a token's KV travels in 1 ms."""


def tasks(count: int, turns: int = 3, first: int = 300, gap: float = 0.0) -> list[Task]:
    sizes = [TurnSize(first, 20), *(TurnSize(30 + n, 10 + n, gap) for n in range(turns - 1))]
    return [Task(f"t{n}", tuple(sizes)) for n in range(count)]


def setting(work: list[Task], topology: str, policy: str, rate: float = 2.0, hardware=PLAIN, **more) -> Setting:
    return Setting(
        tasks=work,
        starts=arrivals("poisson", rate, len(work), 5),
        topology=Topology.parse(topology),
        hardware=(hardware, hardware),
        policy=policy,
        rate=rate,
        **more,
    )


def simulation(work: list[Task], topology: str, policy: str, hardware=PLAIN, rate: float = 2.0, **more) -> Simulation:
    starts = arrivals("poisson", rate, len(work), 5)
    made = Simulation(
        work, starts, Topology.parse(topology), (hardware, hardware), make_policy(policy, 0.2), seed=5, **more
    )
    made.run()
    return made


# --- known answers --------------------------------------------------------------------------------------------------


def test_a_step_takes_what_the_formula_says():
    hardware = msgspec.structs.replace(
        PLAIN, per_pair=1e-6, per_context=1e-5, per_sequence=0.002, per_kv_token=1e-5, overhead=0.001, floor=0.015
    )
    assert hardware.step_seconds((), 1, 100) == pytest.approx(0.001 + 0.015), "the floor"
    assert hardware.step_seconds((), 4, 1000) == pytest.approx(0.001 + 0.01 + 0.008 + 0.01)
    both = 0.001 + 0.01 + (0.05 + 1e-6 * 50 * (200 + 25) + 0.002) + 0.008 + 0.01
    assert hardware.step_seconds([(50, 200)], 4, 1000) == pytest.approx(both)


@pytest.mark.parametrize(("tokens", "published"), [(1000, 36.5), (4000, 107), (8000, 232), (16000, 622), (32000, 1977)])
def test_the_a40_prefills_as_published(tokens: int, published: float):
    """The published times include one decode step."""
    seconds = A40.step_seconds([(tokens, 0)], 0, 0) + A40.step_seconds((), 1, tokens)
    assert 1e3 * seconds == pytest.approx(published, rel=0.07)


def test_the_a40_appends_and_decodes_as_published():
    assert 1e3 * A40.step_seconds([(67, 16_000)], 0, 0) == pytest.approx(0.95e-3 * 16_000 + 5.6, rel=0.06)
    assert 1e3 * A40.step_seconds((), 1, 1000) == 14.3
    assert 1e3 * A40.step_seconds((), 16, 256_000) == pytest.approx(5.7 + 0.06 * 16 + 1.85e-4 * 256_000)


def test_one_conversation_by_hand():
    """300 tokens in chunks of 100, then decodes; the next turn finds 304 of 320 tokens and computes 46."""
    work = [Task("t", (TurnSize(300, 20), TurnSize(30, 5)))]
    found = alone(work[0], PLAIN)
    assert found.ttft == pytest.approx((3 * 0.11, 0.01 + 0.046))
    assert found.ttfet == pytest.approx(0.33 + 19 * 0.01 + 0.056)
    assert found.tbt == pytest.approx(0.01)
    assert found.e2e == pytest.approx(found.ttfet + 4 * 0.01)


@pytest.mark.parametrize("hardware", [PLAIN, msgspec.structs.replace(A40, page_tokens=16)])
@pytest.mark.parametrize("policy", ["colocated", "observe"])
def test_alone_is_what_the_simulator_does_with_one(hardware: Hardware, policy: str):
    work = [Task("t", (TurnSize(700, 33), TurnSize(1, 7), TurnSize(65, 1, 2.0), TurnSize(250, 80)))]
    found = latency(simulation(work, "1D", policy, hardware).times[0])
    wanted = alone(work[0], hardware)
    assert found.ttft == pytest.approx(wanted.ttft)
    assert found[1:] == pytest.approx(wanted[1:])


def test_a_handoff_overlaps_with_the_prefill():
    """P computes 300 tokens in 0.33 s; their KV takes 0.3 s on the way: all but that of the last chunk is hidden."""
    found = simulation([Task("t", (TurnSize(300, 5),))], "1P1D", "conserve").times[0]
    assert found.turns[0].first == pytest.approx(0.33, abs=0.002), "the first token comes from P at once"
    rest = 4 * 0.01
    last = 0.33 + (304 - 192) * 0.001  # 12 pages of the first two chunks have been there before
    assert found.turns[0].last == pytest.approx(last + rest, abs=0.012)


def test_conserve_moves_each_first_prompt_once():
    result = simulate(setting(tasks(10), "1P2D", "conserve"))
    assert result["kv_transfer"]["bytes"] == 10 * 19 * 16 * 1000
    assert sum(n for place, n in result["placements"].items() if place.startswith("p0->")) == 10
    assert sum(n for place, n in result["placements"].items() if "->" not in place) == 20


def test_energy_counts_busy_and_idle_time():
    result = simulate(setting([Task("t", (TurnSize(100, 11),))], "2D", "colocated"))
    busy = 0.11 + 10 * 0.01
    assert result["duration_s"] == pytest.approx(busy)
    assert result["energy"]["joules"] == pytest.approx(busy * (100 + 10))
    assert result["energy"]["tokens_per_joule"] == pytest.approx(111 / (busy * 110))
    nobody = simulate(setting(tasks(1), "1D", "colocated", hardware=msgspec.structs.replace(PLAIN, busy_watts=None)))
    assert nobody["energy"] == {"joules": None, "tokens_per_joule": None, "output_tokens_per_joule": None}


def test_without_prefix_caching_nothing_is_found():
    assert simulate(setting(tasks(5), "1D", "colocated", caching=False))["cached_tokens"] == 0
    assert simulate(setting(tasks(5), "1D", "colocated"))["cached_tokens"] > 0


def test_the_same_prompt_is_computed_once():
    work = [Shape(same_prompt=True).apply(task, 0) for task in tasks(8, turns=1, first=1536)]
    room = msgspec.structs.replace(PLAIN, kv_tokens=65536)
    cached = [task.turns[0].cached for task in simulation(work, "1D", "colocated", room, rate=0.1).times]
    assert cached[0] == 0
    assert set(cached[1:]) == {1520}


# --- what must hold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["1D", "3D", "1P1D", "2P2D"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_token_of_the_trace_is_served_once(policy: str, topology: str):
    """On pools that are far too small, with gaps and appends; afterwards nothing is held, reserved or expected."""
    shape = Shape(gap=Spread.parse("0..3"), append=Spread.parse("log:5..200"))
    work = [shape.apply(task, 3) for task in tasks(25, turns=4, first=500)]
    small = msgspec.structs.replace(PLAIN, kv_tokens=2048)
    made = simulation(work, topology, policy, small)
    assert sorted(t.key for t in made.times) == sorted(t.key for t in work)
    for times in made.times:
        sizes = next(task.turns for task in work if task.key == times.key)
        assert [turn.output for turn in times.turns] == [size.output for size in sizes]
        prompts = [sum(s.new + s.output for s in sizes[:n]) + sizes[n].new for n in range(len(sizes))]
        assert [turn.prompt for turn in times.turns] == prompts
        assert all(turn.sent < turn.first <= turn.last for turn in times.turns)
        waits = [later.sent - turn.last for turn, later in pairwise(times.turns)]
        assert waits == pytest.approx([size.gap for size in sizes[1:]])
    for _ in range(60):  # acks and reports that are still under way, then everybody is late
        made.step()
    made.now += 1e6
    made.scheduler.on_tick(made.now)
    for name, worker in made.workers.items():
        worker.pool.check()
        view = made.scheduler.workers[name]
        assert (worker.pool.num_held, view.reserved, view.turns) == (0, 0, 0)
        assert view.wanted == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_means_one_result(policy: str):
    one, other = (simulate(setting(tasks(12), "1P2D", policy, mispredict=0.3)) for _ in range(2))
    assert json.dumps(one) == json.dumps(other)


def test_observe_waits_rather_than_computes_again():
    """More conversations than fit: those that come later wait, and what was computed is found."""
    work = [Task(f"t{n}", (TurnSize(900, 30), *[TurnSize(20, 30)] * 4)) for n in range(20)]
    found = {policy: simulate(setting(work, "2D", policy, rate=5.0)) for policy in ("colocated", "observe")}
    again = {policy: result["prompt_tokens"] - result["cached_tokens"] for policy, result in found.items()}
    assert again["observe"] < 0.7 * again["colocated"]
    assert found["observe"]["ttfet_s"]["p95"] < found["colocated"]["ttfet_s"]["p95"]


def test_a_timeline_shows_what_workers_did():
    result = simulate(setting(tasks(10), "1P1D", "conserve", window=(1.0, 3.0)))
    timeline = result["timeline"]
    assert timeline["window"] == [1.0, 3.0]
    kinds = {worker: {kind for _, _, kind in spans} for worker, spans in timeline["spans"].items()}
    assert kinds["p0"] == {"prefill"}
    assert kinds["d0"] >= {"decode", "transfer"}
    for spans in timeline["spans"].values():
        steps = sorted(span for span in spans if span[2] != "transfer")
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(steps)), "one step at a time"
        assert all(end > 1.0 and start < 3.0 for start, end, _ in steps)
    assert all(0 <= h <= kv["total"] for kv in timeline["kv"].values() for h in kv["held"])


def test_memory_does_not_grow_with_what_is_over():
    """Of a conversation that is over, a few kilobytes are left, whatever its length."""

    def used(count: int) -> int:
        gc.collect()
        tracemalloc.start()
        made = simulation(tasks(count, first=2000), "1D", "colocated", rate=0.2)
        gc.collect()
        now, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(made.times) == count
        return now

    used(5)  # what is loaded once
    few, many = used(10), used(40)
    assert (many - few) / 30 < 8_000


# --- hardware -------------------------------------------------------------------------------------------------------


def test_roles_have_hardware_of_their_own(tmp_path: Path):
    assert load_roles("a40-qwen3-0.6b") == (A40, A40)
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(PLAIN))
    assert load_hardware(str(path)) == PLAIN
    assert load_roles("P=a40-qwen3-0.6b,D=a40-qwen3-0.6b-200w")[1].name == "a40-qwen3-0.6b-200w"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("h100", "No hardware profile 'h100': use a40-qwen3-0.6b, "),
        ("P=a40-qwen3-0.6b", "write one profile, or P=...,D=..."),
        ("P=a40-qwen3-0.6b,X=a40-qwen3-0.6b", "write one profile, or P=...,D=..."),
        ("P=a40-qwen3-0.6b,D={plain}", "KV pages of different sizes"),
        ("{broken}", "is not a hardware profile"),
    ],
)
def test_a_wrong_hardware_says_how_to_mend_it(tmp_path: Path, text: str, complaint: str):
    (tmp_path / "plain.json").write_bytes(msgspec.json.encode(PLAIN))
    (tmp_path / "broken.json").write_text('{"name": "x"}')
    text = text.replace("{plain}", str(tmp_path / "plain.json")).replace("{broken}", str(tmp_path / "broken.json"))
    with pytest.raises(ConfigError) as caught:
        load_roles(text)
    assert complaint in str(caught.value)


def test_a_fit_finds_the_constants_again():
    true = msgspec.structs.replace(PLAIN, per_pair=1e-6, per_sequence=0.002, per_kv_token=1e-5)
    shapes = [(n, c, 0, 0) for n in (16, 64, 256) for c in (0, 500, 2000)]
    shapes += [(0, 0, b, s) for b in (1, 4, 16) for s in (100, 4000)] + [(64, 500, 4, 1000)]
    steps = [(n, c, b, s, true.step_seconds([(n, c)] if n else [], b, s)) for n, c, b, s in shapes]
    found = [Measured("cpu", "float32", 1000, 4096, 16, 256, 1e9, 0.002, steps)] * 2
    fitted = fit(found, "mine", 2)
    for name in ("base", "per_token", "per_pair", "per_sequence", "per_kv_token"):
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=1e-6), name
    assert fitted.per_context == pytest.approx(0, abs=1e-9)
    assert fitted.overhead == 0.002
    assert quality(fitted, found) == ["32 steps; the profile is off by 0% (median), 0% (p95)"]
    down = [(n, c, b, s, 1.0 - n / 1000) for n, c, b, s, _ in steps]
    assert fit([Measured("cpu", "float32", 1000, 4096, 16, 256, 1e9, 0.0, down)], "x", 1).per_token == 0.0


# --- the command line -----------------------------------------------------------------------------------------------


def test_every_way_to_arrive_can_be_chosen():
    assert evaluate.ARRIVALS == ARRIVALS


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


def test_a_comparison(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    command = "compare chat --conversations 6 --policies conserve,colocated@1D --topology 1P1D --rates 1,2 --seeds 1,2"
    assert cli.main([*command.split(), "--out", str(tmp_path), "--window", "0..60"]) == 0
    assert (tmp_path / "timeline-conserve-1P1D.svg").stat().st_size > 1000
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [(c["label"], c["rate"], c["seed"]) for c in cells] == [
        (label, rate, seed) for label in ("conserve 1P1D", "colocated 1D") for rate in (1, 2) for seed in (1, 2)
    ]
    assert cells[0]["command"].startswith("miniserve simulate chat --rate 1 --arrivals poisson --seed 1")
    assert "conserve 1P1D" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "latency.png").stat().st_size > 10_000
    assert "conserve 1P1D" in capsys.readouterr().out
    again = cells[0]["command"].split()[1:]
    assert cli.main([*again, "--json", str(tmp_path / "again.json")]) == 0, "each cell can be repeated"
    told = json.loads((tmp_path / "again.json").read_text())
    assert told["ttfet_s"] == cells[0]["ttfet_s"]


def test_a_comparison_on_real_workers(tiny_folder: Path, tmp_path: Path, capsys):
    """Each cell has a server of its own, which is gone afterwards."""
    pytest.importorskip("aiohttp")
    trace = tmp_path / "t.csv"
    trace.write_text("conversation_id,turn,new_input_tokens,output_tokens\na,0,40,6\na,1,8,6\nb,0,30,5\n")
    command = f"compare {trace} --policies colocated,conserve --topology 1P1D --rates 5 --serve {tiny_folder}"
    assert cli.main([*command.split(), "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [(c["label"], c["output_tokens"], c["errors"]) for c in cells] == [
        ("colocated 2D", 17, 0),
        ("conserve 1P1D", 17, 0),
    ]
    assert cells[1]["placements"] == {"p0->d0": 2, "d0": 1}
    assert str(tiny_folder) in cells[0]["server_command"]
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tiny_folder) in " ".join(p.info["cmdline"] or ())]
    assert cli.main([*command.split()[:-1], str(tmp_path / "nothing")]) == 1
    assert "did not start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--policies best", "'best' is not one of colocated"),
        ("--policies conserve@3X", "is not understood"),
        ("--out {nowhere}", "is not a folder"),
        ("--window 1..2", "use it with --out"),
        ("--hardware h100 --policies conserve", "No hardware profile"),
    ],
)
def test_a_comparison_that_cannot_be(tmp_path: Path, capsys, flags: str, complaint: str):
    flags = flags.replace("{nowhere}", str(tmp_path / "nowhere"))
    assert cli.main(["compare", "chat", "--conversations", "2", *flags.split()]) == 1
    assert complaint in capsys.readouterr().err


def test_a_profile_of_this_machine(tiny_folder: Path, tmp_path: Path, capfd):
    """Two copies at once, of a tiny model; the simulator takes what it writes."""
    path = tmp_path / "here.json"
    assert cli.main(["profile", str(tiny_folder), "--workers", "2", "--threads", "1", "--out", str(path)]) == 0
    assert "steps; the profile is off by" in capfd.readouterr().err
    here = load_hardware(str(path))
    assert here.base > 0
    assert here.overhead > 0
    assert 1e-6 < here.step_seconds([(64, 0)], 0, 0) < 1.0
    result = simulate(setting(tasks(3, first=100), "1P1D", "observe", hardware=here))
    assert result["errors"] == 0
    assert cli.main(["profile", str(tmp_path / "nothing"), "--out", str(path)]) == 1
    assert "nothing" in capfd.readouterr().err
