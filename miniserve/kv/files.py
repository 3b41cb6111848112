"""Pieces of conversations as files of a folder: the `Store` of a worker.

All workers of a machine that serve the same model share the folder, and every run of the server. A file is written
under a name of its own, then renamed, so nobody reads half of one; what a crash or a person leaves of it, the checksums
find. Its first four bytes are the length of a `Piece` in msgpack, which comes next, and then the pages. The name is
the hash of the first page. Nothing in it is text: tokens are only there as hashes.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np

from miniserve.kv.disk import Piece, Pieces

SCAN_SECONDS = 0.5
"""How often a worker looks for what others have written or deleted."""
ABANDONED = 600.0
"""Seconds after which a file without its name is nobody's any more."""
DAMAGED = (OSError, EOFError, ValueError, msgspec.MsgspecError)


class Folder:
    """At most `size` bytes of files in `path`, shared with others. `memory` is the uint8 `[slot, byte]` of host memory.
    A thread reads; another one writes, deletes and learns what others did. Raises OSError for a folder that cannot be
    used."""

    def __init__(self, path: Path, size: int, memory: np.ndarray) -> None:
        self._path, self._size, self._memory = path, size, memory
        self._pieces = Pieces()
        self._reader, self._writer = ThreadPoolExecutor(1, "disk-reader"), ThreadPoolExecutor(1, "disk-writer")
        self.page_seconds = 0.0
        """A running average; 0 before the first."""
        self._asked, self._changed = time.monotonic(), 0
        """When it was last asked what there is; when the folder had last changed then, in ns since the epoch."""
        self._scan()

    def find(self, hashes: list[bytes]) -> int:
        return self._pieces.find(hashes)

    def refresh(self) -> None:
        if time.monotonic() - self._asked > SCAN_SECONDS:
            self._asked = time.monotonic()
            self._writer.submit(self._scan)

    def read(self, hashes: list[bytes], slots: list[int]) -> Future[int]:
        return self._reader.submit(self._read, hashes, slots)

    def write(self, piece: Piece, slots: list[int], copied: Callable[[], None], age: float) -> Future[int]:
        return self._writer.submit(self._write, piece, slots, copied, time.time() - age)

    def _read(self, hashes: list[bytes], slots: list[int]) -> int:
        at, started = 0, time.perf_counter()
        while at < len(hashes):
            try:
                first = self._pieces[hashes[at]].hashes[0]
            except KeyError:
                break
            try:
                with self._file(first).open("rb") as file:
                    count = self._read_piece(file, hashes[at:], slots[at:])
            except DAMAGED:
                count = 0
            if not count:
                self._writer.submit(self._delete, first)
                break
            at += count
        if at:
            seconds = (time.perf_counter() - started) / at
            self.page_seconds += (seconds - self.page_seconds) / (8 if self.page_seconds else 1)
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

    def _write(self, piece: Piece, slots: list[int], copied: Callable[[], None], end: float) -> int:
        copied()
        rows = [self._memory[slot].data for slot in slots]
        sums = [_sum(digest, row) for digest, row in zip(piece.hashes, rows, strict=True)]
        piece = msgspec.structs.replace(piece, sums=sums, end=end)
        head = msgspec.msgpack.encode(piece)
        size = 4 + len(head) + sum(len(row) for row in rows)
        if size > self._size:
            raise OSError(f"{size} bytes at once are more than the {self._size} that KV may take on disk")
        self._scan()
        for first in self._pieces.surplus(self._size - size, time.time()):
            self._delete(first)
        made = self._path / f".{piece.hashes[0].hex()}-{os.getpid()}"
        try:
            with open(made, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.write(len(head).to_bytes(4))
                file.write(head)
                for row in rows:
                    file.write(row)
            made.rename(self._file(piece.hashes[0]))
        except OSError:
            made.unlink(missing_ok=True)
            raise
        self._pieces.add(piece, size)
        return len(slots)

    def _scan(self) -> None:
        """Learn what others have written and deleted since."""
        self._path.mkdir(parents=True, mode=0o700, exist_ok=True)  # somebody may have deleted it
        if (changed := self._path.stat().st_mtime_ns) == self._changed:
            return
        there = set()
        with os.scandir(self._path) as entries:
            for entry in entries:
                try:
                    if entry.name.startswith("."):
                        if time.time() - entry.stat().st_mtime > ABANDONED:
                            os.unlink(entry)
                        continue
                    first = bytes.fromhex(entry.name)
                    if first not in self._pieces.sizes:
                        with open(entry, "rb") as file:
                            piece = _head(file)
                        if piece.hashes[0] == first:
                            self._pieces.add(piece, entry.stat().st_size)
                    there.add(first)
                except DAMAGED:
                    continue  # not ours, or gone, or of no use
        for first in self._pieces.sizes.keys() - there:
            self._pieces.drop(first)
        self._changed = changed

    def _delete(self, first: bytes) -> None:
        self._pieces.drop(first)
        self._file(first).unlink(missing_ok=True)

    def _file(self, first: bytes) -> Path:
        return self._path / first.hex()


def _head(file: BufferedReader) -> Piece:
    """What the pages are that come next. Raises what is in `DAMAGED`."""
    size = int.from_bytes(file.read(4))
    if size > 1 << 20:
        raise ValueError("not a piece")
    return msgspec.msgpack.decode(file.read(size), type=Piece)


def _sum(digest: bytes, page: memoryview) -> int:
    """Of a page and its name. CRC-32 finds what disks and crashes do, at 3 GB/s; nobody else may write here."""
    return crc32(page, crc32(digest))
