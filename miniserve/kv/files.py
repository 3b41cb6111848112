"""Pieces of conversations as files of a folder: the `Store` of a worker.

All workers of a machine that serve the same model share the folder, and every run of the server. A file is written
under a name of its own, then renamed, so no worker reads half of one; checksums find what a crash or a person has left
of it. It begins with the length of a `Piece` in msgpack and a checksum of that, four bytes each; then come the `Piece`
and the pages. The name is that of the piece. Nothing in it is text: tokens are only there as hashes.
"""

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np

from miniserve.kv.disk import Piece, Pieces
from miniserve.kv.hashing import HASH_BYTES

SCAN_SECONDS = 0.5
"""How often a worker looks for what others have written or deleted."""
ABANDONED = 600.0
"""Seconds after which no worker writes any more to a file that has not got its name."""
HEAD, MOST_HEAD = 8, 1 << 20
"""Bytes before a `Piece`, and those that one takes at most."""
NAME = re.compile(f"[0-9a-f]{{{4 * HASH_BYTES}}}")
DAMAGED = (ValueError, msgspec.MsgspecError)
"""Of a file that is of no use. An OSError may pass."""


class Folder:
    """At most `size` bytes of files in `path`, shared with others. `memory` is the uint8 `[slot, byte]` of host memory.
    A thread reads; another one writes, deletes and learns what others did. Raises OSError."""

    def __init__(self, path: Path, size: int, memory: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._size, self._memory = path, size, memory
        self._pieces = Pieces()
        self._reader, self._writer = ThreadPoolExecutor(1, "disk-reader"), ThreadPoolExecutor(1, "disk-writer")
        self._page_seconds, self._read_at = 0.0, 0.0
        """A running average, 0 before the first, and when it was last observed."""
        self._scanning: Future[None] | None = None
        self._asked, self._changed = time.monotonic(), 0
        """When it was last asked what there is; when the folder had last changed then, in ns since the epoch."""
        self._scan()

    @property
    def page_seconds(self) -> float:
        # Half of it is forgotten every minute: a disk that was slow once is tried again.
        return self._page_seconds * 0.5 ** ((time.monotonic() - self._read_at) / 60)

    def find(self, hashes: list[bytes]) -> int:
        return self._pieces.find(hashes)

    def refresh(self) -> None:
        if time.monotonic() - self._asked > SCAN_SECONDS and (self._scanning is None or self._scanning.done()):
            self._asked = time.monotonic()
            self._scanning = self._writer.submit(self._scan)

    def read(self, hashes: list[bytes], slots: list[int], ready: Callable[[], None]) -> Future[int]:
        return self._reader.submit(self._read, hashes, slots, ready)

    def write(self, piece: Piece, slots: list[int], ready: Callable[[], None], age: float) -> Future[int]:
        return self._writer.submit(self._write, piece, slots, ready, time.time() - age)

    def _read(self, hashes: list[bytes], slots: list[int], ready: Callable[[], None]) -> int:
        ready()
        at, started = 0, time.perf_counter()
        while at < len(hashes):
            try:
                name = self._pieces[hashes[at]].name
                with self._file(name).open("rb") as file:
                    count = self._read_piece(file, hashes[at:], slots[at:])
            except (*DAMAGED, FileNotFoundError):
                count = 0
            except (KeyError, OSError):
                break  # it was forgotten meanwhile, or can be read later
            if not count:
                self._writer.submit(self._delete, name)
                break
            at += count
        if at:
            seconds = (time.perf_counter() - started) / at
            self._page_seconds += (seconds - self._page_seconds) / (8 if self._page_seconds else 1)
            self._read_at = time.monotonic()
        return at

    def _read_piece(self, file: BufferedReader, hashes: list[bytes], slots: list[int]) -> int:
        """Read the pages that the file has of the chain `hashes`; how many, up to one that is damaged."""
        piece = _head(file)
        skip = piece.hashes.index(hashes[0])
        file.seek(skip * self._memory.shape[1], os.SEEK_CUR)
        count = 0
        for have, digest, total, slot in zip(piece.hashes[skip:], hashes, piece.sums[skip:], slots, strict=False):
            row = self._memory[slot].data
            if have != digest or file.readinto(row) != len(row) or _sum(digest, row) != total:
                break
            count += 1
        return count

    def _write(self, piece: Piece, slots: list[int], ready: Callable[[], None], end: float) -> int:
        ready()
        rows = [self._memory[slot].data for slot in slots]
        sums = [_sum(digest, row) for digest, row in zip(piece.hashes, rows, strict=True)]
        piece = msgspec.structs.replace(piece, sums=sums, end=end)
        head = msgspec.msgpack.encode(piece)
        size = HEAD + len(head) + sum(len(row) for row in rows)
        self._scan()
        if self._pieces.find(piece.hashes) == len(slots):
            return len(slots)  # another worker was quicker
        for name in self._pieces.surplus(self._size - size, time.time(), piece):
            self._delete(name)
        if self._pieces.total + size > self._size:
            return 0
        made = self._path / f".{os.getpid()}-{time.monotonic_ns()}"
        try:
            with open(made, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(len(head).to_bytes(4) + crc32(head).to_bytes(4) + head)
                for row in rows:
                    file.write(row)
            made.rename(self._file(piece.name))
        except OSError:
            made.unlink(missing_ok=True)
            raise
        self._pieces.add(piece, size)
        return len(slots)

    def _scan(self) -> None:
        """Learn what others have written and deleted since."""
        # A person may have deleted it. Not what it lies in, which may be a disk that is not mounted any more.
        self._path.mkdir(mode=0o700, exist_ok=True)
        if (changed := self._path.stat().st_mtime_ns) == self._changed:
            return
        there = set()
        for file in self._path.iterdir():
            try:
                if file.name.startswith("."):
                    if time.time() - file.stat().st_mtime > ABANDONED:
                        file.unlink()
                elif NAME.fullmatch(file.name):
                    name = bytes.fromhex(file.name)
                    if name not in self._pieces.sizes:
                        self._learn(name, file)
                    there.add(name)
            except OSError:
                continue  # it is gone, or no file
        for name in self._pieces.sizes.keys() - there:
            self._pieces.drop(name)
        self._changed = changed

    def _learn(self, name: bytes, path: Path) -> None:
        """Take in a piece, or delete the file if it holds none."""
        try:
            with path.open("rb") as file:
                piece = _head(file)
            if piece.name != name:
                raise ValueError("it holds another piece")
            self._pieces.add(piece, path.stat().st_size)
        except DAMAGED:
            path.unlink()

    def _delete(self, name: bytes) -> None:
        self._pieces.drop(name)
        self._file(name).unlink(missing_ok=True)

    def _file(self, name: bytes) -> Path:
        return self._path / name.hex()


def _head(file: BufferedReader) -> Piece:
    """What the pages are that come next. Raises what is in `DAMAGED`, and OSError."""
    size, total = int.from_bytes(file.read(4)), int.from_bytes(file.read(4))
    head = file.read(min(size, MOST_HEAD))
    if crc32(head) != total:
        raise ValueError("the head is damaged")
    return msgspec.msgpack.decode(head, type=Piece)


def _sum(digest: bytes, page: memoryview) -> int:
    """CRC-32 of a page and its name: against what disks and crashes do. Only the folder's owner may write there."""
    return crc32(page, crc32(digest))
