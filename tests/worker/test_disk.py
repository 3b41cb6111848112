"""KV on disk: conversations find it after their workers and the server are gone, and what is damaged is computed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from miniserve.cluster.messages import Keep
from miniserve.config import ConfigError
from miniserve.kv.files import Folder
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence
from tests.support.tiny import prompts, reference
from tests.support.whole import check_pool
from tests.worker.test_keeping import ANSWER, PAGE_BYTES, Clock, built, sequence

KEEP = Keep("one", gap=100.0)


def make(folder: Path, disk: Path, pages: int = 32, slots: int = 32, size: int = 1 << 30, **engine) -> Engine:
    sizes = {"kv_cache_memory": pages * PAGE_BYTES, "swap_space": slots * PAGE_BYTES, "max_model_len": 256}
    engine = built(folder, kv_disk=str(disk), kv_disk_size=size, **sizes, **engine).engine
    engine.clock = Clock()
    return engine


def run(engine: Engine, *turns: Sequence) -> list[list[int]]:
    """Answers of turns that come together, once the disk is at rest again."""
    for turn in turns:
        engine.add(turn)
    limit = time.monotonic() + 60
    while engine.waiting or engine.running or engine.expecting:
        assert time.monotonic() < limit
        engine.admit()
        engine.step()
        if not engine.has_work:
            time.sleep(0.001)
    for pool in (engine.pool, engine.host):
        check_pool(pool)
        assert pool.num_held == 0
    return [turn.tokens[turn.given :] for turn in turns]


def turn(engine: Engine, conversation: str, tokens: list[int], keep: Keep | None = None) -> Sequence:
    one = sequence(f"{conversation}.{len(tokens)}", tokens, keep or Keep(conversation, gap=100.0))
    run(engine, one)
    return one


def pieces(disk: Path) -> list[Path]:
    return sorted(disk.glob("*/*"))


@pytest.fixture
def told(tiny_folder: Path, tmp_path: Path) -> tuple[Path, list[int], list[int]]:
    """A folder with the KV of a conversation's first turn, what its second turn says, and the answer to that."""
    prompt = prompts(1, seed=41, shortest=100, longest=100)[0]
    first = turn(make(tiny_folder, tmp_path), "one", prompt)
    second = [*first.tokens, *[7] * 9]
    return tmp_path, second, reference(tiny_folder, [second], ANSWER)[0]


def test_another_engine_finds_what_one_has_left(tiny_folder: Path, told: tuple[Path, list[int], list[int]]) -> None:
    disk, second, answer = told
    engine = make(tiny_folder, disk)
    again = turn(engine, "a conversation of another name", second)
    assert again.tokens[again.given :] == answer
    assert again.cached == (100 + ANSWER - 1) // 16 * 16
    assert (engine.disk.loaded, engine.disk.saved) == (7, 2)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (disk, *pieces(disk)) if path != disk)


@pytest.mark.parametrize("what", ["torn", "page", "name", "head", "length", "empty", "gone", "folder", "all"])
def test_what_is_damaged_is_computed(tiny_folder: Path, told: tuple[Path, list[int], list[int]], what: str) -> None:
    disk, second, answer = told
    engine = make(tiny_folder, disk)  # it has seen the files as they were
    (piece,) = pieces(disk)
    data = piece.read_bytes()
    damage = {
        "torn": data[: len(data) // 2],
        "page": data[: -PAGE_BYTES * 6] + bytes([data[-PAGE_BYTES * 6] ^ 1]) + data[-PAGE_BYTES * 6 + 1 :],
        "name": data.replace(bytes.fromhex(piece.name), bytes(16), 1),
        "head": data[:4] + os.urandom(len(data) - 4),
        "length": b"\xff" + data[1:],
        "empty": b"",
    }
    piece.unlink()
    if what == "all":
        shutil.rmtree(disk)
    elif what == "folder":
        piece.mkdir()
    elif what != "gone":
        piece.write_bytes(damage[what])
    one = turn(engine, "one", second)
    assert one.tokens[one.given :] == answer
    kept = {"torn": 3, "page": 1}.get(what, 0)
    assert one.cached == kept * 16
    fresh = turn(make(tiny_folder, disk), "one", [*second, *[1] * 20])
    assert fresh.cached == (0 if what == "folder" else len(second) // 16 * 16)
    assert fresh.tokens[fresh.given :] == reference(tiny_folder, [[*second, *[1] * 20]], ANSWER)[0]


def test_other_weights_in_the_same_folder_find_nothing(
    tiny_folder: Path, told: tuple[Path, list[int], list[int]]
) -> None:
    disk, second, _ = told
    (weights,) = tiny_folder.glob("*.safetensors")
    before = weights.stat()
    os.utime(weights, (before.st_atime + 9, before.st_mtime + 9))
    try:
        assert turn(make(tiny_folder, disk), "one", second).cached == 0
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_disk_that_is_full_costs_nothing_but_the_files(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Folder, *_) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    engine = make(tiny_folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "_write", full)
        prompt = prompts(1, seed=42, shortest=100, longest=100)[0]
        one = turn(engine, "one", prompt)
    assert one.tokens[one.given :] == reference(tiny_folder, [prompt], ANSWER)[0]
    again = turn(engine, "one", [*one.tokens, 5])
    assert (again.cached, engine.disk.saved) == (112, 0), "what is in memory is there; the disk has a pause"
    engine.clock.now += 61
    turn(engine, "one", [*again.tokens, 5])
    assert engine.disk.saved > 0


def test_a_turn_does_not_wait_for_a_disk_that_hangs(
    tiny_folder: Path, told: tuple[Path, list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, second, answer = told
    engine = make(tiny_folder, disk)
    read, hung = Folder._read, time.monotonic() + 1.5

    def hang(self: Folder, *what) -> int:
        time.sleep(max(0.0, hung - time.monotonic()))
        return read(self, *what)

    monkeypatch.setattr(Folder, "_read", hang)
    one, other = sequence("one", second, KEEP), sequence("other", second[50:90], Keep("other"))
    engine.add(one)
    engine.add(other)
    engine.admit()
    assert engine.running == [other], "it lets others pass"
    engine.clock.now += 10.0
    engine.admit()
    assert engine.running == [other, one]
    assert engine.host.num_held == 7, "until the disk is done with them"
    assert run(engine) == []
    assert one.tokens[one.given :] == answer
    assert one.cached == 0


def test_an_abort_while_pages_come(tiny_folder: Path, told: tuple[Path, list[int], list[int]]) -> None:
    disk, second, _ = told
    engine = make(tiny_folder, disk)
    engine.add(sequence("one", second, KEEP))
    engine.admit()
    engine.abort("one")
    run(engine)
    assert engine.disk.loaded == 7


def test_the_folder_stays_as_small_as_it_is_told(tiny_folder: Path, tmp_path: Path) -> None:
    """What is needed least goes first, but no beginning before what follows it."""
    size = 40 * (PAGE_BYTES + 64)
    engine = make(tiny_folder, tmp_path, pages=64, size=size)
    shared = prompts(1, seed=43, shortest=64, longest=64)[0]
    for i in range(12):
        gap = 10.0 if i == 3 else 10_000.0
        turn(engine, str(i), [*shared, *prompts(1, seed=50 + i, shortest=60, longest=60)[0]], Keep(str(i), gap=gap))
        assert sum(piece.stat().st_size for piece in pieces(tmp_path)) <= size
    fresh, found = make(tiny_folder, tmp_path), []
    for i in range(12):
        fresh.reset()
        found.append(turn(fresh, str(i), [*shared, *prompts(1, seed=50 + i, shortest=60, longest=60)[0]]).cached)
    assert found[3] == 112, "due in seconds"
    assert set(found) >= {64, 112}
    assert min(found) == 64, "what all begin with is there"


def test_what_is_computed_sooner_is_not_read(tiny_folder: Path, told: tuple[Path, list[int], list[int]]) -> None:
    disk, second, answer = told
    engine = make(tiny_folder, disk)
    engine.disk.store.page_seconds = 1.0
    one = turn(engine, "one", second, Keep("one", gap=100.0, page_seconds=0.9))
    assert one.cached == 0
    assert one.tokens[one.given :] == answer


def test_turns_with_the_same_beginning_read_it_once(tiny_folder: Path, told: tuple[Path, list[int], list[int]]) -> None:
    disk, second, _ = told
    engine = make(tiny_folder, disk, pages=48)
    turns = [sequence(str(i), [*second[:112], *[i] * 20], Keep(str(i), gap=9.0)) for i in range(3)]
    answers = run(engine, *turns)
    assert answers == reference(tiny_folder, [one.tokens[: one.given] for one in turns], ANSWER)
    assert [one.cached for one in turns] == [112] * 3
    assert engine.disk.loaded == 7


def test_two_engines_share_a_folder_that_someone_empties(tiny_folder: Path, tmp_path: Path) -> None:
    """Random conversations on two engines; files are damaged and deleted at any time: the text is always the same."""
    pick = random.Random(7)
    engines = [make(tiny_folder, tmp_path, pages=24, slots=12, size=60 * PAGE_BYTES) for _ in range(2)]
    histories = prompts(6, seed=44, shortest=40, longest=90)
    for _ in range(24):
        i = pick.randrange(6)
        if len(histories[i]) > 200:
            histories[i] = histories[i][:40]
        engine = pick.choice(engines)
        if pick.random() < 0.5:
            engine.disk.store._writer.submit(engine.disk.store._scan).result()
        one = turn(engine, str(i), histories[i], Keep(str(i), gap=pick.choice([1.0, 100.0])))
        assert one.tokens[one.given :] == reference(tiny_folder, [histories[i]], ANSWER)[0]
        histories[i] = [*one.tokens, *[i] * 5]
        engine.clock.now += pick.choice([0.1, 30.0])
        if (there := pieces(tmp_path)) and pick.random() < 0.4:
            piece = pick.choice(there)
            if pick.random() < 0.5:
                piece.unlink()
            else:
                data = bytearray(piece.read_bytes())
                data[pick.randrange(len(data))] ^= 0x55
                piece.write_bytes(data[: pick.choice([len(data), len(data) // 2])])
    assert sum(engine.disk.loaded for engine in engines) > 10


def test_what_a_writer_left_behind_goes(tiny_folder: Path, told: tuple[Path, list[int], list[int]]) -> None:
    disk, second, _ = told
    folder = pieces(disk)[0].parent
    old, new = folder / ".00-1", folder / ".00-2"
    for file in (old, new, folder / "notes.txt"):
        file.write_bytes(b"half")
    os.utime(old, (1.0, 1.0))
    turn(make(tiny_folder, disk), "one", second)
    assert {file.name for file in folder.iterdir()} >= {".00-2", "notes.txt"}
    assert not old.exists()


def test_a_disk_needs_host_memory_and_a_folder(tiny_folder: Path, tmp_path: Path, hybrid_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"passes through host memory.* like --swap-space 2GiB"):
        built(tiny_folder, kv_disk=str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--kv-disk .* cannot be used: .*Give a folder"):
        built(tiny_folder, kv_disk=str(tmp_path / "file"), swap_space=2**22)
    made = built(tiny_folder, kv_disk=str(tmp_path), swap_space=2**22)
    assert "; at most 16GiB on disk" in made.facts.kv_note
    without = built(hybrid_folder, kv_disk=str(tmp_path), swap_space=2**22)
    assert without.engine.disk is None
    assert "none on disk" in without.facts.kv_note
