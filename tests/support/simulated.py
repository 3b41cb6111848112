"""Small simulated clusters with easy numbers."""

from __future__ import annotations

from typing import Any

from miniserve.bench.replay.workload import Script, TurnSize, Workload, arrivals
from miniserve.bench.simulate.cluster import SimulationConfig
from miniserve.bench.simulate.hardware import Hardware
from miniserve.config import Topology

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


def scripts(count: int, turns: int = 3, first: int = 300, gap: float = 0.0) -> list[Script]:
    """`count` equal conversations: a first prompt of `first` tokens, later ones of about 30."""
    sizes = [TurnSize(first, 20), *(TurnSize(30 + n, 10 + n, gap) for n in range(turns - 1))]
    return [Script(f"t{n}", tuple(sizes)) for n in range(count)]


def simulated(
    work: list[Script], topology: str, policy: str, rate: float = 2.0, hardware: Hardware = PLAIN, **more: Any
) -> SimulationConfig:
    """A simulation of `work`, which arrives at random."""
    return SimulationConfig(
        workload=Workload(scripts=work, starts=arrivals("poisson", rate, len(work), 5), rate=rate, seed=5),
        topology=Topology.parse(topology),
        hardware=(hardware, hardware),
        policy=policy,
        **more,
    )
