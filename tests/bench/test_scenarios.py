"""The scenarios that compare servers, against miniserve's app over a fake engine; and the script that runs them."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from miniserve.bench.replay.answer import Answer, TurnError, session
from miniserve.bench.replay.metrics import TurnTimes
from miniserve.bench.replay.server import describe
from miniserve.client import ApiClient
from miniserve.hub import resolve as hub
from miniserve.text.tokenizer import Tokenizer
from scripts import bench_peers
from scripts.scenarios import Figures, RandomPrompts, Scenarios, side_by_side
from tests.support.spoken import SpokenEngine, asking_for, serving, spoken

pytestmark = pytest.mark.slow

PAUSE = 0.005


@pytest.fixture(scope="module")
def folder() -> Path:
    return hub.resolve("smollm2-135m", load_format="dummy").folder


def run(url: str, folder: Path, scenario: Callable[[Scenarios], Awaitable[Figures]]) -> Figures:
    async def on_server() -> Figures:
        async with session(None) as http:
            return await scenario(
                Scenarios(http, describe(ApiClient.around(url, None), None), RandomPrompts(folder, 1), timeout=5.0)
            )

    return asyncio.run(on_server())


def test_prompts_have_the_length_asked_for_and_share_only_the_template(folder: Path, tokenizer: Tokenizer) -> None:
    prompts = RandomPrompts(folder, 1)
    chats = [prompts.chat(count) for count in (64, 512, 512, 2048)]
    assert [len(ids) for ids in chats] == [64, 512, 512, 2048]
    assert len(prompts.words(33)) == 33
    assert len({tuple(ids[:16]) for ids in chats}) == 4
    text = tokenizer.decode(chats[0], skip_special_tokens=False)
    assert text.startswith("system: Chat ")
    assert text.endswith("\nassistant:")
    assert RandomPrompts(folder, 1).chat(64) == chats[0] != RandomPrompts(folder, 2).chat(64)


def test_prefill_counts_the_prompt_until_the_first_token(folder: Path, tokenizer: Tokenizer) -> None:
    engine = SpokenEngine(PAUSE)
    with serving(engine, tokenizer) as url:
        found = run(url, folder, lambda on: on.prefill(512))
    (turn,) = engine.turns
    assert (len(turn.tokens), turn.params.max_tokens) == (512, 1)
    assert (found["prompt_tokens"], found["cached_tokens"]) == (512, 0)
    assert found["ttft_s"] >= PAUSE
    assert found["prefill_tok_s"] == 512 / found["ttft_s"]


def test_decode_counts_tokens_after_the_first(folder: Path, tokenizer: Tokenizer) -> None:
    engine = SpokenEngine(PAUSE)
    with serving(engine, tokenizer) as url:
        found = run(url, folder, lambda on: on.decode(40))
    assert found["output_tokens"] == engine.turns[0].given == 40
    assert engine.turns[0].params.ignore_eos
    assert found["e2e_s"] == pytest.approx(found["ttft_s"] + 39 / found["decode_tok_s"])
    assert found["ttft_s"] >= PAUSE
    assert found["e2e_s"] >= 40 * PAUSE
    assert 0 < found["gap_p50_s"] <= found["gap_p99_s"]


def test_concurrent_streams_start_together_and_share_nothing(folder: Path, tokenizer: Tokenizer) -> None:
    engine = SpokenEngine(PAUSE)
    with serving(engine, tokenizer) as url:
        found = run(url, folder, lambda on: on.concurrent(5))
    assert len({tuple(turn.tokens[:16]) for turn in engine.turns}) == found["streams"] == 5
    assert (found["errors"], found["output_tokens"]) == (0, 5 * 64)
    assert 0 < found["output_tok_s"] <= 5 / PAUSE
    assert PAUSE <= found["ttft_p50_s"] <= found["ttft_max_s"]


def test_streams_side_by_side() -> None:
    """One from 0 to 4 seconds, one from 1 to 6: both decode from 3 to 4."""
    one = TurnTimes(sent=0.0, first=1.0, last=4.0, prompt=64, cached=None, output=8)
    other = TurnTimes(sent=1.0, first=3.0, last=6.0, prompt=64, cached=0, output=4)
    times = [1.0, 3.5, 3.9, 4.0], [3.0, 4.0, 5.0, 6.0]  # of events; the first stream has two tokens in each
    found = side_by_side([(turn, Answer(64, times=at)) for turn, at in zip((one, other), times, strict=True)])
    assert found == {
        "output_tokens": 12,
        "output_tok_s": 2.0,
        "decode_tok_s": pytest.approx(7 / 3 + 3 / 3),
        "steady_tok_s": pytest.approx(4 * 12 / 8),  # of 8 events 4 are within, and an event has 1.5 tokens
        "ttft_p50_s": 1.5,
        "ttft_max_s": 2.0,
    }


def test_streams_that_fail_are_errors_and_all_of_them_raise(folder: Path, tokenizer: Tokenizer) -> None:
    engine = SpokenEngine(PAUSE)
    failure = {"finish": "error", "error": "out of luck"}
    engine.trouble = lambda tokens: failure if len(engine.turns) % 2 else {}
    with serving(engine, tokenizer) as url:
        found = run(url, folder, lambda on: on.concurrent(4))
        assert (found["errors"], found["output_tokens"]) == (2, 2 * 64)
        engine.trouble = lambda tokens: failure
        with pytest.raises(TurnError, match="out of luck"):
            run(url, folder, lambda on: on.concurrent(2))


@pytest.mark.parametrize("ids", ["returned", "missing"])
def test_a_second_turn_goes_on_from_the_first(folder: Path, tokenizer: Tokenizer, ids: str) -> None:
    engine = SpokenEngine(PAUSE)
    engine.trouble = lambda tokens: {"cached": 288 if len(engine.turns) == 1 else 0}
    with serving(engine, tokenizer) as url, asking_for(ids):
        found = run(url, folder, lambda on: on.turn2(history=300, new=20, output=4))
    first, second, cold = engine.turns
    assert second.tokens[:300] == first.tokens
    assert (second.tokens[300:304] == spoken(first.tokens, 4)) == (ids == "returned")
    assert len(second.tokens) == len(cold.tokens) == found["turn2_prompt_tokens"] == 324
    assert cold.tokens[:16] != first.tokens[:16]
    assert found["turn2_cached_tokens"] == 288
    assert found["speedup"] == found["cold_ttft_s"] / found["turn2_ttft_s"]


def test_the_script_compares_servers_in_turns(
    folder: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_peers, "MOST_DISTURBED", 100.0)  # a run that other tests disturb counts, too
    fast, slow, out = SpokenEngine(0.0), SpokenEngine(0.0), tmp_path / "out.json"
    slow.trouble = lambda tokens: {"pause": 0.4 if len(tokens) == 512 else 0.0}
    with serving(fast, tokenizer) as one, serving(slow, tokenizer) as other:
        servers = [f"fast={one}/v1,tiny,{os.getpid()}", f"slow={other},tiny,{os.getpid()}"]
        flags = ["--tokenizer", str(folder), "--rounds", "2", "--only", "prefill 512", "--json", str(out)]
        assert bench_peers.main([*flags, *servers]) == 0
    found = json.loads(out.read_text())
    assert {name: server["kind"] for name, server in found["servers"].items()} == dict.fromkeys(
        ("fast", "slow"), "miniserve"
    )
    table = found["scenarios"]["prefill 512, tok/s"]
    assert all(before > 1 and after > 1 for before, after in found["memory, MB"].values())
    assert [len(runs) for runs in table["runs"].values()] == [2, 2]
    assert table["disturbed"] == []
    for runs in table["figures"].values():
        assert [(run["prompt_tokens"], run["cached_tokens"]) for run in runs] == [(512, 0)] * 4
        assert all("others_cpu" in run for run in runs)
    assert table["median"]["fast"] > table["median"]["slow"] < 512 / 0.4
    assert table["ratio"]["slow"] == table["median"]["fast"] / table["median"]["slow"]
    # A round is a warm-up and two runs on each server; the second round goes backwards.
    order = sorted([(at, "fast") for at in fast.times] + [(at, "slow") for at in slow.times])
    assert [name for _, name in order] == ["fast"] * 3 + ["slow"] * 6 + ["fast"] * 3


def test_the_script_ends_at_a_stream_that_fails(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_peers, "MOST_DISTURBED", 100.0)
    engine = SpokenEngine(0.0)
    engine.trouble = lambda tokens: {"finish": "error", "error": "out of luck"} if len(engine.turns) == 3 else {}
    flags = ["--tokenizer", str(folder), "--rounds", "1", "--only", "8 streams"]
    with serving(engine, tokenizer) as url, pytest.raises(TurnError, match="1 of 8 streams failed"):
        bench_peers.main([*flags, f"one={url},tiny,{os.getpid()}"])
