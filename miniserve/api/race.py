"""A race between work and what ends it: a client that leaves, a signal."""

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """What ends work came before the work was done."""


async def unless(ends: Coroutine[Any, Any, object], work: Awaitable[T]) -> T:
    """The result of `work`. Raises `Stopped` if `ends` comes to its end first; `work` is cancelled then."""
    tasks = doing, _ = asyncio.ensure_future(work), asyncio.create_task(ends)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Stopped
        return doing.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
