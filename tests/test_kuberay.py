"""The manifest for KubeRay says what KubeRay, Kubernetes, Ray Serve and miniserve understand, and its parts agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from miniserve.cli.main import asked, make_parser
from miniserve.config import ServeConfig

ROOT = Path(__file__).resolve().parents[1]
CLAIM, SERVICE = yaml.safe_load_all((ROOT / "docs/cluster/rayservice.yaml").read_text("utf-8"))
SCHEMA = json.loads((ROOT / "tests/support/rayservice.schema.json").read_text("utf-8"))
SERVE: dict[str, Any] = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
ARGS: dict[str, str] = SERVE["applications"][0]["args"]
HEAD = SERVICE["spec"]["rayClusterConfig"]["headGroupSpec"]
(WORKERS,) = SERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"]
PODS = [group["template"]["spec"] for group in (HEAD, WORKERS)]


def settings() -> ServeConfig:
    """What the manifest's flags ask for."""
    flags = [part for name, value in ARGS.items() for part in (f"--{name}", value)]
    return asked(make_parser().parse_args(["serve", *flags]))


def test_kuberay_takes_the_manifest() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(SERVICE, SCHEMA)


PLACES: dict[str, tuple[Any, ...]] = {
    "serveConfigV2": ("spec",),
    "rayStartParams": ("spec", "rayClusterConfig", "headGroupSpec"),
    "minReplicas": ("spec", "rayClusterConfig", "workerGroupSpecs", 0),
    "volumeMounts": ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0),
    "emptyDir": ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "volumes", 1),
}


@pytest.mark.parametrize("field", PLACES)
def test_a_misspelt_field_is_refused(field: str) -> None:
    wrong = json.loads(json.dumps(SERVICE))
    place = wrong
    for key in PLACES[field]:
        place = place[key]
    place[field + "s"] = place.pop(field)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def test_a_number_where_ray_wants_a_string_is_refused() -> None:
    wrong = json.loads(json.dumps(SERVICE))
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(jsonschema.ValidationError, match="not of type 'string'"):
        jsonschema.validate(wrong, SCHEMA)


def test_each_worker_has_a_pod_with_its_gpus() -> None:
    config = settings()
    assert config.topology is not None
    gpus = int(PODS[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus == config.engine.tensor_parallel_size
    workers = len(config.topology.roles)
    assert WORKERS["replicas"] == WORKERS["minReplicas"] == WORKERS["maxReplicas"] == workers
    assert "nvidia.com/gpu" not in PODS[0]["containers"][0]["resources"]["limits"]


def test_all_pods_find_the_model_at_the_same_path() -> None:
    for pod in PODS:
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/models"]]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
        assert set(mounts.values()) == set(volumes)
        places = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert places["HF_HOME"].startswith("/models/")
        assert places["MINISERVE_CACHE"].startswith("/models/")
    assert len({pod["containers"][0]["image"] for pod in PODS}) == 1
    assert PODS[0]["securityContext"] == PODS[1]["securityContext"]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]


def test_gpu_pods_have_shared_memory_within_their_own() -> None:
    (container,) = PODS[1]["containers"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    (shm,) = (volume for volume in PODS[1]["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    size, limit = shm["emptyDir"]["sizeLimit"], container["resources"]["limits"]["memory"]
    assert int(size.removesuffix("Gi")) < int(limit.removesuffix("Gi"))


def test_ray_serve_takes_its_part() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    (application,) = schema.ServeDeploySchema.model_validate(SERVE).applications
    assert application.import_path == "miniserve.serve_app:app"
    assert application.args == ARGS


def test_the_application_asks_ray_for_the_workers_gpus() -> None:
    pytest.importorskip("ray.serve")
    from miniserve.serve_app import app

    deployment = app(ARGS)._bound_deployment
    made = deployment._deployment_config, deployment._replica_config
    assert made[1].placement_group_bundles == [{"CPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}]
    assert made[1].placement_group_strategy == "SPREAD"
    assert made[1].ray_actor_options["num_cpus"] == 1
    assert made[0].num_replicas == 1
