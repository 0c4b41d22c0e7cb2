"""What clouds and Kubernetes are given: Ray's own schema, Kubernetes' for pods, KubeRay's fields; who may come in."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from tests.cluster.conftest import REPOSITORY

FOLDER = REPOSITORY / "cluster"
LAUNCHED = ["ray-cluster-aws.yaml", "ray-cluster-gcp.yaml", "ray-cluster-onprem.yaml"]


def fields(required: list[str], **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object with these fields and no others."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object", "required": ["spec"]}
"""A pod's template, which Kubernetes' own schema is for."""
GROUP = {"rayStartParams": TEXTS, "template": POD}
CLUSTER = fields(
    ["headGroupSpec"],
    rayVersion=TEXT,
    authOptions=fields([], mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields([], idleTimeoutSeconds=COUNT),
    headGroupSpec=fields(["template"], **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ["groupName", "minReplicas", "maxReplicas", "template"],
            **{"groupName": TEXT, "minReplicas": COUNT, "replicas": COUNT, "maxReplicas": COUNT, **GROUP},
        ),
    },
)
JOB = fields(
    [],
    entrypoint=TEXT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=CLUSTER,
)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB}
"""The fields that our files use, of those that KubeRay's API reference (ray.io/v1) has."""


def read(name: str) -> dict[str, Any]:
    """A file of ``cluster/``."""
    content: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_up_takes_it(name: str) -> None:
    """As it stands, and with the defaults that the launcher fills in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(read(name), schema)
    validate_config(prepare_config(copy.deepcopy(read(name))))


@pytest.mark.parametrize("name", LAUNCHED)
def test_its_nodes_ask_for_the_token(name: str) -> None:
    """Set before Ray starts, on every node; the file is nobody else's; the dashboard stays on the head's loopback."""
    config = read(name)
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command.split("ray start")[0]
            assert "--dashboard-host" not in command
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_it_copies_is_what_an_installation_needs(name: str) -> None:
    source = "/home/ubuntu/source/"
    mounts = {to: path for to, path in read(name)["file_mounts"].items() if to.startswith(source)}
    assert all(to == source + path and (REPOSITORY / path).exists() for to, path in mounts.items())
    assert set(mounts.values()) == {"pyproject.toml", "README.md", "LICENSE", "distributed_eg"}


@pytest.mark.parametrize("name", LAUNCHED[:2])
def test_a_run_can_begin_at_once_and_grow(name: str) -> None:
    """Workers that no node can hold are refused at once: there is one from the beginning, and the head holds none."""
    types = read(name)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert types["worker"]["min_workers"] == 1


@pytest.mark.parametrize("name", ["kuberay-raycluster.yaml", "kuberay-rayjob.yaml"])
def test_kuberay_takes_it(name: str) -> None:
    manifest = read(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    jsonschema.validate(manifest["spec"], SPECS[manifest["kind"]])
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", ["kuberay-raycluster.yaml", "kuberay-rayjob.yaml"])
def test_kubernetes_takes_its_pods(name: str) -> None:
    """Strictly: a field that it does not know is an error."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    spec = read(name)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.30", strict=True)
        assert pod["spec"]["securityContext"]["runAsNonRoot"]


def test_the_job_runs_on_the_cluster_of_the_other_file() -> None:
    assert read("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"] == read("kuberay-raycluster.yaml")["spec"]


def test_the_version_of_ray_is_one_that_is_installed() -> None:
    version = read("kuberay-raycluster.yaml")["spec"]["rayVersion"]
    assert re.match(r"(\d+\.\d+)\.", version)[1] == re.match(r"(\d+\.\d+)\.", ray.__version__)[1]  # type: ignore[index]
