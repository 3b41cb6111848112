"""Which accesses to pages nothing puts in order: from marks that a program leaves on streams, and the clocks of these.

An access is marked where it begins and where it ends, as operations of the stream that makes it. One comes before
another if its end is in the clock of the other's beginning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.support.fake_cuda.log import Clock, Line

Page = tuple[str, int]
"""The name of a pool, and a number."""


@dataclass
class Access:
    """What a thread does with pages on a stream, after what is in `begin`. It lasts until operation `end`."""

    name: str
    stream: int
    begin: Clock
    reads: list[Page]
    writes: list[Page]
    end: int = 0

    def before(self, other: Access) -> bool:
        """Whether this one has ended when the other begins."""
        return self.end > 0 and other.begin.get(self.stream, 0) >= self.end


@dataclass
class History:
    """Of one page: who wrote it last, and who has read it since."""

    write: Access | None = None
    reads: list[Access] = field(default_factory=list)


def begins(number: int, name: str, reads: Iterable[Page], writes: Iterable[Page]) -> str:
    """The mark of a beginning."""
    return f"begin {number} {json.dumps([name, [*reads], [*writes]])}"


def ends(number: int) -> str:
    """The mark of an end."""
    return f"end {number}"


def drops(number: int) -> str:
    """The mark that what an access has read is not wanted any more, whatever it was."""
    return f"drop {number}"


def accesses(lines: Iterable[Line]) -> list[Access]:
    """Those that are marked, in the order in which the host gave them to streams."""
    found: dict[str, Access] = {}
    for line in lines:
        note, _, mark = line.what.partition(" ")
        if note != "note":
            continue
        kind, number, *rest = mark.split(" ", 2)
        if kind == "begin":
            name, reads, writes = json.loads(rest[0])
            pages = ([(pool, page) for pool, page in part] for part in (reads, writes))
            found[number] = Access(name, line.stream, line.clock, *pages)
        elif kind == "end":
            found[number].end = line.number
        else:
            found[number].reads.clear()
    return list(found.values())


def unordered(lines: Iterable[Line]) -> list[str]:
    """Pairs of accesses to a page, at least one of which writes, that may be made in either order or at once."""
    pages: dict[Page, History] = {}
    wrong: list[str] = []
    for access in accesses(lines):
        for page in {*access.reads, *access.writes}:
            history = pages.setdefault(page, History())
            against = [history.write] if history.write else []
            if page in access.writes:
                against += history.reads
            wrong += [f"{access.name} after {other.name}: {page}" for other in against if not other.before(access)]
        for page in access.reads:
            pages[page].reads.append(access)
        for page in access.writes:
            pages[page] = History(access)
    return wrong
