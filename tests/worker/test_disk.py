"""KV on disk: conversations find it after their workers and the server are gone, and what is damaged is computed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from math import nextafter
from pathlib import Path

import msgspec
import pytest
import torch

from miniserve.cluster.messages import Keep
from miniserve.config import ConfigError
from miniserve.kv import disk as disks
from miniserve.kv import swap as swapping
from miniserve.kv.disk import Disk, Piece, Pieces
from miniserve.kv.eviction import ExpectedNeed
from miniserve.kv.files import Folder
from miniserve.kv.host import HostPool
from miniserve.kv.memory import KVMemory
from miniserve.kv.pages import Evicted, PagePool
from miniserve.kv.swap import SwapSpace
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence
from tests.kv.test_side import LazyStream
from tests.support.kv_pools import DEVICE_PAGES, device_memory
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
def left(tiny_folder: Path, tmp_path: Path) -> tuple[Path, list[int], list[int]]:
    """A folder with the KV of a conversation's first turn, what its second turn says, and the answer to that."""
    prompt = prompts(1, seed=41, shortest=100, longest=100)[0]
    first = turn(make(tiny_folder, tmp_path), "one", prompt)
    second = [*first.tokens, *[7] * 9]
    return tmp_path, second, reference(tiny_folder, [second], ANSWER)[0]


def test_another_engine_finds_what_one_has_left(tiny_folder: Path, left: tuple[Path, list[int], list[int]]) -> None:
    disk, second, answer = left
    engine = make(tiny_folder, disk)
    again = turn(engine, "a conversation of another name", second)
    assert again.tokens[again.given :] == answer
    assert again.cached == (100 + ANSWER - 1) // 16 * 16
    assert (engine.disk.loaded, engine.disk.saved) == (7, 2)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (disk, *pieces(disk)) if path != disk)


@pytest.mark.parametrize("what", ["torn", "page", "name", "head", "length", "empty", "gone", "folder", "all"])
def test_what_is_damaged_is_computed(tiny_folder: Path, left: tuple[Path, list[int], list[int]], what: str) -> None:
    disk, second, answer = left
    engine = make(tiny_folder, disk)  # it has seen the files as they were
    (piece,) = pieces(disk)
    data = piece.read_bytes()
    damage = {
        "torn": data[: len(data) // 2],
        "page": data[: -PAGE_BYTES * 6] + bytes([data[-PAGE_BYTES * 6] ^ 1]) + data[-PAGE_BYTES * 6 + 1 :],
        "name": data.replace(bytes.fromhex(piece.name)[:16], bytes(16), 1),
        "head": data[:4] + os.urandom(len(data) - 4),
        "length": b"\xff" + data[1:],
        "empty": b"",
    }
    piece.unlink()
    if what == "all":
        shutil.rmtree(piece.parent)
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
    tiny_folder: Path, left: tuple[Path, list[int], list[int]]
) -> None:
    disk, second, _ = left
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
    tiny_folder: Path, left: tuple[Path, list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, second, answer = left
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


def test_an_abort_while_pages_come(tiny_folder: Path, left: tuple[Path, list[int], list[int]]) -> None:
    disk, second, _ = left
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


@pytest.mark.parametrize("dearer", [0.0, 0.001, -0.001])
def test_what_has_to_go_is_found_in_time_for_each_piece(monkeypatch: pytest.MonkeyPatch, dearer: float) -> None:
    """Not for all pairs of a long conversation, of which later pages take longer to compute than the first ones."""
    made, chain = Pieces(), [number.to_bytes(4) for number in range(500)]
    for number, (parent, digest) in enumerate(zip([None, *chain], chain, strict=False)):
        keep = Keep("one", gap=10.0, chance=0.5, page_seconds=1 + dearer * number)
        made.add(Piece([digest], parent, [], keep, 0.0), 1)
    raised: list[float] = []
    monkeypatch.setattr(disks, "nextafter", lambda *of: raised.append(of[0]) or nextafter(*of))
    found = made.surplus(400, 20.0, Piece([b"new"], None, [], Keep(), 20.0))
    assert found == [digest + digest for digest in reversed(chain[500 - len(found) :])]
    assert len(found) >= 100
    assert len(raised) <= len(chain)


def test_what_is_computed_sooner_is_not_read(tiny_folder: Path, left: tuple[Path, list[int], list[int]]) -> None:
    disk, second, answer = left
    engine = make(tiny_folder, disk)
    engine.disk.store._page_seconds, engine.disk.store._read_at = 1.0, time.monotonic()
    one = turn(engine, "one", second, Keep("one", gap=100.0, page_seconds=0.9))
    assert one.cached == 0
    assert one.tokens[one.given :] == answer


def test_turns_with_the_same_beginning_read_it_once(tiny_folder: Path, left: tuple[Path, list[int], list[int]]) -> None:
    disk, second, _ = left
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


def test_what_a_writer_left_behind_goes(tiny_folder: Path, left: tuple[Path, list[int], list[int]]) -> None:
    disk, second, _ = left
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


# --- review: each of these shows a fault ------------------------------------------------------------------------------


def rewrite(path: Path, **changes) -> None:
    """The same file with another head."""
    data = path.read_bytes()
    size = int.from_bytes(data[:4])
    piece = msgspec.structs.replace(msgspec.msgpack.decode(data[8 : 8 + size], type=Piece), **changes)
    head = msgspec.msgpack.encode(piece)
    path.write_bytes(len(head).to_bytes(4) + data[4:8] + head + data[8 + size :])


def test_a_conversation_that_is_larger_than_the_folder_is_not_written_for_ever(
    tiny_folder: Path, tmp_path: Path
) -> None:
    engine = make(tiny_folder, tmp_path, size=12 * (PAGE_BYTES + 64))
    engine.add(sequence("one", prompts(1, seed=41, shortest=220, longest=220)[0], KEEP))
    limit = time.monotonic() + 5
    while (engine.waiting or engine.running or engine.expecting) and time.monotonic() < limit:
        engine.admit()
        engine.step()
    assert engine.disk.saved <= 14, "every page once at most"
    assert not engine.expecting


def test_a_conversation_that_is_needed_least_is_not_written_for_ever(tiny_folder: Path, tmp_path: Path) -> None:
    """It fits the folder, which is full of what is needed sooner."""
    engine = make(tiny_folder, tmp_path, size=32 * (PAGE_BYTES + 64))
    for i in range(5):
        text = prompts(1, seed=50 + i, shortest=100, longest=100)[0]
        turn(engine, str(i), text, Keep(str(i), gap=10.0))
    before = engine.disk.saved
    engine.add(sequence("long", prompts(1, seed=41, shortest=220, longest=220)[0], Keep("long", gap=1e6)))
    limit = time.monotonic() + 5
    while (engine.waiting or engine.running or engine.expecting) and time.monotonic() < limit:
        engine.admit()
        engine.step()
    assert engine.disk.saved - before <= 14, "every page once at most"
    assert not engine.expecting


def test_conversations_with_the_same_beginning_get_their_own_ends_too(tiny_folder: Path, tmp_path: Path) -> None:
    shared = prompts(1, seed=43, shortest=64, longest=64)[0]
    ends = [prompts(1, seed=60 + i, shortest=60, longest=60)[0] for i in range(2)]
    first = make(tiny_folder, tmp_path)
    for i, end in enumerate(ends):
        turn(first, str(i), [*shared, *end])
    engine = make(tiny_folder, tmp_path, pages=64, slots=64)
    turns = [sequence(str(i), [*shared, *end], Keep(str(i), gap=9.0)) for i, end in enumerate(ends)]
    run(engine, *turns)
    assert [one.cached for one in turns] == [112, 112]


def test_two_workers_that_write_the_same_beginning_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    shared = prompts(1, seed=43, shortest=64, longest=64)[0]
    ends = [prompts(1, seed=60 + i, shortest=60, longest=60)[0] for i in range(2)]
    engines = [make(tiny_folder, tmp_path) for _ in ends]
    for i, (engine, end) in enumerate(zip(engines, ends, strict=True)):
        engine.disk.store._asked = time.monotonic() + 100  # both end before either has looked again
        turn(engine, str(i), [*shared, *end])
    found = [turn(make(tiny_folder, tmp_path), "new", [*shared, *end]).cached for end in ends]
    assert found == [112, 112]


def test_a_stale_index_deletes_no_good_file(tiny_folder: Path, tmp_path: Path) -> None:
    shared = prompts(1, seed=43, shortest=64, longest=64)[0]
    ends = [prompts(1, seed=60 + i, shortest=60, longest=60)[0] for i in range(2)]
    engines = [make(tiny_folder, tmp_path) for _ in ends]
    for i, (engine, end) in enumerate(zip(engines, ends, strict=True)):
        engine.disk.store._asked = time.monotonic() + 100
        turn(engine, str(i), [*shared, *end])
    inodes = {piece: piece.stat().st_ino for piece in pieces(tmp_path)}
    assert len(inodes) == 2
    engines[0].pool.clear()
    engines[0].host.clear()
    engines[0].add(sequence("again", [*shared, *ends[0]], KEEP))
    engines[0].admit()
    engines[0].disk._loads[0].job.result()
    engines[0].disk.store._writer.submit(lambda: None).result()
    assert {piece: piece.stat().st_ino for piece in pieces(tmp_path)} == inodes


@pytest.mark.parametrize("changes", [{"hashes": []}, {"keep": Keep("one", gap=-100.0), "end": 1.7e9}])
def test_a_head_that_says_nonsense_stops_no_worker(
    tiny_folder: Path, left: tuple[Path, list[int], list[int]], changes: dict
) -> None:
    disk, _, _ = left
    rewrite(pieces(disk)[0], **changes)
    engine = make(tiny_folder, disk, size=10 * (PAGE_BYTES + 64))
    one = turn(engine, "two", prompts(1, seed=45, shortest=100, longest=100)[0])
    assert len(one.tokens) == one.given + ANSWER


def test_one_slow_read_does_not_end_the_disk(tiny_folder: Path, left: tuple[Path, list[int], list[int]]) -> None:
    disk, second, _ = left
    engine = make(tiny_folder, disk)
    engine.disk.store._page_seconds = 3.0  # what a disk that had to spin up has left of its first page
    for i in range(20):
        engine.disk.store._read_at = time.monotonic() - 60.0 * i
        engine.pool.clear()
        engine.host.clear()
        again = turn(engine, "one", [*second, i], Keep("one", gap=100.0, page_seconds=0.1))
        if again.cached:
            return
    pytest.fail("not read, so never measured again")


def test_a_failure_that_passes_deletes_nothing(
    tiny_folder: Path, left: tuple[Path, list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, second, _ = left
    engine = make(tiny_folder, disk)

    def busy(*_, **__) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    (piece,) = pieces(disk)
    inode = piece.stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", busy)
        engine.add(sequence("one", second, KEEP))
        engine.admit()
        engine.disk._loads[0].job.result()
        engine.disk.store._writer.submit(lambda: None).result()
    assert piece.exists()
    assert piece.stat().st_ino == inode


def test_a_disk_that_hangs_gathers_no_work(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(tiny_folder, tmp_path)
    store, go = engine.disk.store, threading.Event()
    monkeypatch.setattr(Folder, "_scan", lambda self: go.wait(20))
    for _ in range(10):
        store._asked = -1.0
        engine.admit()
    waiting = store._writer._work_queue.qsize()
    go.set()
    assert waiting <= 1


def test_only_the_first_turn_waits_for_a_disk_that_hangs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = prompts(2, seed=46, shortest=60, longest=60)
    first = make(tiny_folder, tmp_path)
    for i, text in enumerate(texts):
        turn(first, str(i), text)
    engine, go = make(tiny_folder, tmp_path), threading.Event()
    monkeypatch.setattr(Folder, "_read", lambda self, *what: go.wait(20) and 0)
    engine.add(sequence("0", texts[0], KEEP))
    engine.admit()
    engine.clock.now += 11.0
    engine.admit()
    assert len(engine.running) == 1
    engine.add(sequence("1", texts[1], KEEP))
    engine.admit()
    late = len(engine.running)
    go.set()
    assert late == 2, "it has not answered for 11 seconds"


def test_what_cannot_be_read_counts_for_the_size(tiny_folder: Path, tmp_path: Path) -> None:
    size = 20 * (PAGE_BYTES + 64)
    for i in range(6):
        engine = make(tiny_folder, tmp_path, size=size)
        turn(engine, str(i), prompts(1, seed=70 + i, shortest=100, longest=100)[0])
        for piece in pieces(tmp_path):
            with piece.open("r+b") as file:
                file.write(b"\xff")  # a torn first block
    assert sum(piece.stat().st_size for piece in pieces(tmp_path)) <= size


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[KVMemory, HostPool, Disk, LazyStream]:
    """Host memory of a GPU whose copies have only begun, and a disk below it."""
    monkeypatch.setattr(LazyStream, "made", [])
    monkeypatch.setattr(swapping, "SideStream", LazyStream)
    monkeypatch.setattr(swapping, "pin", lambda memory: None)
    monkeypatch.setattr(LazyStream, "lead", lambda self: None)  # the host does not wait
    memory = device_memory(1)
    swap = SwapSpace(memory, 2)
    host = HostPool(swap, ExpectedNeed())
    rows = swap.pages.view(torch.uint8).view(2, -1).numpy()
    disk = Disk(Folder(tmp_path, 1 << 20, rows), host, PagePool(DEVICE_PAGES, ExpectedNeed()))
    return memory, host, disk, LazyStream.made[-1]


def digest(page: int) -> bytes:
    return bytes([page]) * 16


def save(disk: Disk, page: int) -> None:
    disk.leave([digest(page)], KEEP, 0.0)
    disk.poll(0.0)
    while disk.busy:
        time.sleep(0.001)
        disk.poll(0.0)


def save_three(host: HostPool, disk: Disk, stream: LazyStream) -> None:
    """Write pages 3, 4 and 5: host memory, of two slots, has the last two then."""
    for page in (3, 4, 5):
        host.store(Evicted(page, digest(page), None, KEEP, 0.0), 0.0)
        stream.drain()
        save(disk, page)


def test_what_is_written_has_come_from_the_gpu(lazy: tuple[KVMemory, HostPool, Disk, LazyStream]) -> None:
    memory, host, disk, stream = lazy
    host.store(Evicted(3, digest(3), None, KEEP, 0.0), 0.0)  # on its way when its turn is written
    save(disk, 3)
    stream.drain()
    host.clear()
    load = disk.load("a turn", [digest(3)], KEEP, 1.0)
    load.job.result()
    assert disk.store._memory[load.slots[0]].tobytes() == memory.bytes[3].numpy().tobytes()


def test_a_slot_is_restored_before_it_is_read_into(lazy: tuple[KVMemory, HostPool, Disk, LazyStream]) -> None:
    memory, host, disk, stream = lazy
    save_three(host, disk, stream)
    kept = memory.bytes[5].numpy().tobytes()
    host.restore(host.match([digest(5)]), [6], 1.0)  # the GPU begins with it when the step that runs now has ended
    load = disk.load("a turn", [digest(3)], KEEP, 1.0)
    load.job.result()
    stream.drain()
    assert memory.bytes[6].numpy().tobytes() == kept


def test_a_late_copy_does_not_overwrite_what_was_read(lazy: tuple[KVMemory, HostPool, Disk, LazyStream]) -> None:
    memory, host, disk, stream = lazy
    save_three(host, disk, stream)
    host.clear()
    for page in (7, 2):
        host.store(Evicted(page, digest(page), None, Keep("other", gap=1e6), 0.0), 1.0)
    load = disk.load("a turn", [digest(3)], KEEP, 1.0)
    load.job.result()
    stream.drain()
    assert disk.store._memory[load.slots[0]].tobytes() == memory.bytes[3].numpy().tobytes()


def test_turns_that_come_back_together_all_get_their_pages(tiny_folder: Path, tmp_path: Path) -> None:
    """Host memory holds two of the longest prompts, as the docs advise."""
    texts = prompts(5, seed=80, shortest=100, longest=100)
    first = make(tiny_folder, tmp_path)
    for i, text in enumerate(texts):
        turn(first, str(i), text)
    engine = make(tiny_folder, tmp_path, pages=64, slots=16)
    turns = [sequence(str(i), text, Keep(str(i), gap=9.0)) for i, text in enumerate(texts)]
    run(engine, *turns)
    assert [one.cached for one in turns] == [96] * 5
