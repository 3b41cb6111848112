"""All ranks of a worker as threads of this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from miniserve.cluster.channels import Keys
from miniserve.cluster.launch import WorkerSpec
from miniserve.cluster.messages import TurnOutput
from miniserve.config import EngineConfig
from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import Built, build
from miniserve.worker.engine import Engine
from miniserve.worker.peers import PeerTable
from miniserve.worker.ranks import Follower
from miniserve.worker.sequence import Sequence
from tests.support.whole import check_pool


@contextmanager
def region() -> Iterator[str]:
    """Memory for a `SharedGroup`."""
    handle = os.memfd_create("ranks")
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


@contextmanager
def several(folder: Path, ranks: int, **engine) -> Iterator[list[Built]]:
    """Built ranks, of which all but the first follow that one."""
    settings = {"kv_cache_memory": 2**21, "threads": 1, "dtype": "float32", "tensor_parallel_size": ranks}
    config = EngineConfig(model=str(folder), **settings | engine)
    told = [SimpleQueue() for _ in range(1, ranks)]

    def tell(command) -> None:
        for queue in told:
            queue.put(command)

    def make(rank: int) -> Built:
        spec = WorkerSpec("d0", 1, str(folder), "", "", config, Keys("", ""), rank=rank, region=path)
        return build(config, spec=spec, tell=(lambda command: None) if rank else tell)

    def follow(rank: int) -> None:
        follower = Follower(rank, built[rank], PeerTable(lambda peer: None), lambda message: None)
        while (command := told[rank - 1].get()) is not None:
            follower.do(command)

    with region() as path, ThreadPoolExecutor(ranks) as pool:
        built = [*pool.map(make, range(ranks))]
    threads = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(1, ranks)]
    for thread in threads:
        thread.start()
    yield built
    tell(None)
    for thread in threads:
        thread.join(10)


def generate(engine: Engine, items: list[list[int]], params: SamplingParams) -> list[list[TurnOutput]]:
    """The outputs of each, all computed together. No page is held at the end."""
    found: list[list[TurnOutput]] = [[] for _ in items]
    for i, item in enumerate(items):
        engine.add(Sequence(str(i), item, params, 0, b"root"))
    while engine.waiting or engine.running or engine.has_work:
        engine.admit()
        for output in engine.step().outputs:
            found[int(output.turn)].append(output)
    check_pool(engine.pool)
    assert engine.pool.num_held == 0
    return found


def greedy(engine: Engine, items: list[list[int]], max_tokens: int) -> list[list[int]]:
    """What the engine continues each with."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [[token for output in outputs for token in output.tokens] for outputs in generate(engine, items, params)]
