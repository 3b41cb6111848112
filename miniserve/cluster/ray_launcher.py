"""Workers as actors of a Ray cluster. Ray finds the hosts, reserves their devices, starts the processes and tells when
one has died; what follows from that is decided where it is for local ones. Imported only where it is asked for."""

import logging
import os
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miniserve.cluster.launch import DEFAULTS, Launcher, RunDir, StartupError, WorkerSpec
from miniserve.config import EngineConfig, problem

ROOM_SECONDS = 60.0
"""How long a cluster may take to make room for all workers; one that grows by itself (autoscaling) has more to do."""


class WorkerActor:
    """The process of a worker. Its `run` serves, so nothing is called after that."""

    def place(self) -> str:
        """The name of the host that it was given."""
        return str(ray.get_runtime_context().get_node_id())

    def run(self, data: bytes, base: str, host: str, frontend: str) -> int:
        """Be the worker that `data`, a `WorkerSpec`, describes. The frontend is on `host`; on others its inbox is at
        `frontend`, and the run's directory is made in `base`."""
        spec, here = msgspec.json.decode(data, type=WorkerSpec), self.place()
        os.environ.update(DEFAULTS | os.environ)
        engine = spec.engine
        if gpus := sorted(int(gpu) for gpu in ray.get_gpu_ids()):
            # Peers know GPUs by the numbers that all workers of a host see.
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            engine = msgspec.structs.replace(engine, device=f"cuda:{gpus[0]}")
        listen = ray.util.get_node_ip_address()
        inbox = spec.frontend if here == host else frontend
        spec = msgspec.structs.replace(spec, engine=engine, host=here, listen=listen, frontend=inbox)
        directory = RunDir(Path(base), Path(spec.run_dir))
        try:
            return int(import_module("miniserve.worker.__main__").run(spec))  # by its name, as processes are started
        finally:
            directory.remove()


class RayWorker:
    """A `Started` worker."""

    def __init__(self, spec: WorkerSpec, actor: Any, *where: str) -> None:
        """`where` are the further arguments of `WorkerActor.run`."""
        self.spec = spec
        self._actor = actor
        self._place: Any = actor.place.remote()
        self._run: Any = actor.run.remote(msgspec.json.encode(spec), *where)
        self._ended: str | None = None

    @property
    def placed(self) -> bool:
        return bool(ray.wait([self._place], timeout=0)[0])

    @property
    def ended(self) -> str | None:
        if self._ended is None and ray.wait([self._run], timeout=0)[0]:
            try:
                self._ended = f"ended with exit code {ray.get(self._run)}"
            except RayError as error:
                self._ended = f"has lost its process ({' '.join(str(error).split())[:300]})"
        return self._ended

    def stop(self, timeout: float) -> None:
        if self._ended is None:
            ray.wait([self._run], timeout=timeout)
            self.kill()

    def kill(self) -> None:
        """End it; one that cannot be reached counts as ended as well."""
        ray.kill(self._actor)
        self._ended = self._ended or "was ended"


class RayLauncher(Launcher):
    """Starts workers in bundles of placement groups: a bundle for each, with the GPUs of its ranks, or as many CPUs.
    All begin in one group; a worker that is added has one of its own. Within a group that Ray Serve has made for this
    process, the first bundle is this process's, and workers take the others."""

    def __init__(self, address: str, strategy: str, advertised: str) -> None:
        """The cluster is at `address`; this process is reached at the one that is `advertised`, "" for Ray's own."""
        self.address = advertised
        self.base = Path(f"/tmp/miniserve-{os.getuid()}")  # the same on all hosts
        self._cluster, self._strategy = address, strategy
        self._ours = False
        """Whether this launcher has joined the cluster, and leaves it."""
        self._groups: list[PlacementGroup] = []
        self._bundles: dict[str, tuple[PlacementGroup, int]] = {}

    def prepare(self, engines: dict[str, EngineConfig]) -> dict[str, EngineConfig]:
        """As `Launcher.prepare`. Workers are on GPUs where the cluster has enough of them."""
        if not self.host:
            self._join()
        ranks = sum(engine.tensor_parallel_size for engine in engines.values())
        on_gpus = ray.cluster_resources().get("GPU", 0) >= ranks
        kind = "GPU" if any(e.device == "cuda" or (e.device == "auto" and on_gpus) for e in engines.values()) else "CPU"
        wanted = [{kind: float(engine.tensor_parallel_size)} for engine in engines.values()]
        group, first = ray.util.get_current_placement_group(), 1
        if group is None or self._bundles:
            group, first = placement_group(wanted, strategy=self._strategy), 0
            self._groups.append(group)
            if not group.wait(ROOM_SECONDS):
                remove_placement_group(self._groups.pop())
                has = {name: count for name, count in ray.cluster_resources().items() if name in ("CPU", "GPU")}
                about = problem("cluster.no_room", wanted=wanted, how=self._strategy, has=has, hosts=len(ray.nodes()))
                raise StartupError(about)
        nodes = placement_group_table(group)["bundles_to_node_id"]
        self._bundles |= {name: (group, index) for index, name in enumerate(engines, first)}
        places = {name: nodes[self._bundles[name][1]] for name in engines}
        sharing = Counter(places[name] for name, engine in engines.items() for _ in range(engine.tensor_parallel_size))
        device = {"device": "cpu"} if kind == "CPU" else {}
        return {
            name: msgspec.structs.replace(engine, workers=sharing[places[name]], **device)
            for name, engine in engines.items()
        }

    def _join(self) -> None:
        # Not in the main thread, where Ray would take SIGTERM for itself.
        if not ray.is_initialized():
            try:
                ray.init(self._cluster, logging_level=logging.WARNING)
            except (ConnectionError, ValueError, RuntimeError) as error:
                why = " ".join(str(error).split())[:200]
                raise StartupError(problem("cluster.no_ray", address=self._cluster, why=why)) from error
            self._ours = True
        self.host = str(ray.get_runtime_context().get_node_id())
        self.address = self.address or str(ray.util.get_node_ip_address())

    def start(self, spec: WorkerSpec, far: str) -> RayWorker:
        group, index = self._bundles[spec.name]
        kind = "num_cpus" if spec.engine.device == "cpu" else "num_gpus"
        # Beside GPUs an actor would ask for a CPU, which the bundle does not have.
        options = {"num_cpus": 0, kind: spec.engine.tensor_parallel_size, "max_restarts": 0}
        place = PlacementGroupSchedulingStrategy(group, index)
        actor = ray.remote(WorkerActor).options(**options, scheduling_strategy=place).remote()
        return RayWorker(spec, actor, str(self.base), self.host, far)

    def release(self, name: str) -> None:
        """A bundle of a group that others have as well is not given back before they are."""
        group, _ = self._bundles.pop(name)
        if group in self._groups and all(group is not other for other, _ in self._bundles.values()):
            self._groups.remove(group)
            remove_placement_group(group)

    def close(self) -> None:
        for group in self._groups:
            remove_placement_group(group)
        if self._ours:
            ray.shutdown()
