"""A policy that no server has: any placement that the ledger allows, at random. Text must not depend on it."""

from __future__ import annotations

import random

from miniserve.scheduler.placement import Need, Option, Placement, Policy
from miniserve.scheduler.workers import Cluster, WorkerView


class Anywhere(Policy):
    """Any home, any prefiller, history from anywhere or nowhere: conversations are forced to move all the time."""

    def __init__(self, pick: random.Random) -> None:
        self._pick = pick
        self._patience = pick.choice([0.0, 1.0, 20.0])

    def patience(self, need: Need, cluster: Cluster) -> float:
        return self._patience

    def elsewhere(self, worker: WorkerView) -> float:
        return 1e9

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        workers = [*cluster.prefillers, *cluster.decoders]
        homes = [w.name for w in workers if w.name in cluster.open and w.fits(need.pages)]
        if not homes or self._pick.random() < 0.1:
            return None
        home = self._pick.choice(homes)
        others = ["", *(w.name for w in workers if w.name != home)]
        option = Option(home, self._pick.choice(others), self._pick.choice(others))
        return Placement(option, share_history=self._pick.random() < 0.5)
