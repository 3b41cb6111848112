"""The decision log over a real scheduler: what is written, and what becomes of serving when it cannot be."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from miniserve.cluster.messages import Peer, PoolInfo, Report
from miniserve.config import ConfigError, EngineConfig, ServeConfig
from miniserve.dispatcher import Dispatcher
from miniserve.hub.resolve import ModelFiles
from miniserve.monitor.events import DecisionLog
from miniserve.monitor.views import SCHEMAS
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.turns import Note
from tests.support.fake_engine import STATS, Played
from tests.support.outputs import outputs


def write(log: DecisionLog, play: Played) -> None:
    """What the scheduler has noted since the last time."""
    for command in play.commands:
        if isinstance(command, Note):
            log.write(command.record)
    play.commands.clear()


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text("utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def records(path: Path) -> list[SimpleNamespace]:
    """All but the first line, which has a form of its own. The others are as OpenAPI says."""
    found = lines(path)[1:]
    for record in found:
        kind = record["kind"].title()
        jsonschema.validate(record, {"$ref": f"#/components/schemas/{kind}", "components": {"schemas": SCHEMAS}})
        assert record.keys() == SCHEMAS[kind]["properties"].keys()
    return [SimpleNamespace(**record) for record in found]


def two_turns(play: Played) -> None:
    play.submit("a", [1] * 60, "c1")
    play.submit("b", [2] * 60, "team/a")  # waits for the first one
    play.first("a", waited=0.25, prefill=1.0, exposed=0.5)
    play.end("a", decode=1.0)
    play.first("b", waited=0.0, prefill=1.0, exposed=0.25)
    play.end("b", decode=1.0)


# --- what is written ------------------------------------------------------------------------------------------------


def test_a_decision_and_an_outcome_of_each_turn(tmp_path: Path) -> None:
    path, play = tmp_path / "log.jsonl", Played(1000.0, notes=True)
    log = DecisionLog(str(path), "conserve", 1000.0)
    two_turns(play)
    write(log, play)
    start = lines(path)[0]
    assert (start["kind"], start["policy"], start["time"]) == ("start", "conserve", 1000.0)
    assert start["unix_time"] == pytest.approx(time.time(), abs=60)
    decided, ended, decided_later, ended_later = records(path)
    kinds = [record.kind for record in (decided, ended, decided_later, ended_later)]
    assert kinds == ["decision", "outcome", "decision", "outcome"]
    assert (decided.run, decided_later.run) == (ended.run, ended_later.run) == ("a.1", "b.1")
    assert (decided.conversation, decided_later.conversation) == ("c1", "team/a")
    assert (decided.home, decided.prefill_at, decided.reason) == ("d0", "p0", "first turn")
    assert (decided.tokens, decided.turn, decided.policy, decided.workers.keys()) == (60, 1, "conserve", {"p0", "d0"})
    assert (decided.queued, decided_later.queued) == (0.0, pytest.approx(2.25))
    assert (ended.finish, ended.output, ended.runs, ended.moved_pages) == ("stop", 3, 1, 4)
    assert ended.waited + ended.prefill == pytest.approx(ended.first_token)
    assert ended.time == pytest.approx(decided.time + ended.first_token + ended.decode)


def test_a_turn_that_never_ran_has_no_outcome(tmp_path: Path) -> None:
    path, play = tmp_path / "log.jsonl", Played(1000.0, notes=True)
    log = DecisionLog(str(path), "conserve", 1000.0)
    play.submit("a", [1] * 60)
    play.submit("b", [2] * 60)
    play.commands += play.scheduler.cancel("b", play.now)
    play.commands += play.scheduler.cancel("a", play.now)
    write(log, play)
    decided, ended = records(path)
    assert ended.kind == "outcome"
    assert (decided.run, ended.run, ended.finish, ended.conversation) == ("a.1", "a.1", "abort", 1)


def test_a_turn_that_runs_again_has_a_decision_for_each_run(tmp_path: Path) -> None:
    path, play = tmp_path / "log.jsonl", Played(1000.0, notes=True)
    log = DecisionLog(str(path), "conserve", 1000.0)
    play.submit("a", [1] * 60)
    play.commands += play.scheduler.worker_down("d0", returns=True, now=play.now)
    again = Peer("d0", 2, "d0", PoolInfo(1, 1, 100, 4096, ""))
    play.commands += play.scheduler.worker_up(again, now=play.now)
    play.report("d0", outputs("a.2", 0, [7], cached_tokens=0, finish="length"))
    write(log, play)
    assert [(record.kind, record.run) for record in records(path)] == [
        ("decision", "a.1"),
        ("decision", "a.2"),
        ("outcome", "a.2"),
    ]


def test_nothing_is_noted_without_a_log() -> None:
    play = Played(1000.0)
    two_turns(play)
    assert not any(isinstance(command, Note) for command in play.commands)


def test_two_runs_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for policy, started in (("conserve", 1000.0), ("observe", 5.0)):
        play = Played(started, notes=True)
        log = DecisionLog(str(path), policy, started)
        two_turns(play)
        write(log, play)
        log.close()
        log.close()
    written = lines(path)
    assert [line["kind"] for line in written] == ["start", *("decision", "outcome") * 2] * 2
    assert [line["policy"] for line in written if line["kind"] == "start"] == ["conserve", "observe"]


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [".", "missing/log.jsonl", "file/log.jsonl"])
def test_a_path_that_cannot_be_written_to(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--decision-log .* cannot be written to"):
        DecisionLog(str(tmp_path / path), "observe", 0.0)


def test_a_disk_that_fills_up_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, play = tmp_path / "log.jsonl", Played(1000.0, notes=True)
    log = DecisionLog(str(path), "conserve", 1000.0)
    play.submit("a", [1] * 60)
    write(log, play)
    with open("/dev/full", "ab", buffering=0) as full:
        monkeypatch.setattr(log, "_file", full)
        play.first("a", waited=0.0, prefill=1.0, exposed=0.5)
        play.end("a", decode=1.0)
        play.submit("b", [2] * 60)
        with caplog.at_level(logging.ERROR):
            write(log, play)
    assert [r.message for r in caplog.records] == ["the decision log ends here: [Errno 28] No space left on device"]
    assert [line["kind"] for line in lines(path)] == ["start", "decision"]


@pytest.mark.parametrize("full", [False, True])
async def test_serving_goes_on_whether_or_not_there_is_room(tmp_path: Path, full: bool) -> None:
    """A dispatcher whose worker is made up: what it reports comes to the stream of the turn."""
    path = Path("/dev/full") if full else tmp_path / "log.jsonl"
    log = DecisionLog(str(path), "observe", 0.0)
    config = ServeConfig(engine=EngineConfig(model="tiny"))
    dispatcher = Dispatcher(config, ModelFiles(Path("."), {}, "nowhere"), observers=[log.write])
    dispatcher.max_model_len = 100
    dispatcher.scheduler.worker_up(Peer("d0", 1, "d0", PoolInfo(1, 1, 100, 4096, "")))
    ends = dispatcher.submit([1] * 60, SamplingParams(max_tokens=4))
    stays = dispatcher.submit([2] * 60, SamplingParams(max_tokens=4))
    said = outputs(f"{ends.id}.1", 0, [7], cached_tokens=0, finish="stop")
    dispatcher._on_report("d0", Report(said, [], STATS))
    assert [out.tokens async for out in ends] == [[], [7]]
    await dispatcher.stop()
    assert [out.finish async for out in stays] == ["abort"]
    log.close()
    if not full:
        written = [(line["kind"], line.get("run"), line.get("finish")) for line in lines(path)]
        assert written == [
            ("start", None, None),
            ("decision", f"{ends.id}.1", None),
            ("decision", f"{stays.id}.1", None),
            ("outcome", f"{ends.id}.1", "stop"),
            ("outcome", f"{stays.id}.1", "abort"),
        ]
