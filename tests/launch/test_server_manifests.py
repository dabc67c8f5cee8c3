"""Manifests of servers: valid by the schemas of Kubernetes, no gap, no privileges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.launch.conftest import SERVING, Launch
from tests.launch.schemas import MODELS, check
from tokenrec.launch.server_job import DRAIN_SECONDS

TOOLS = "europe-docker.pkg.dev/my-project/tools/cloud:1"
VARIANTS = {
    "claim": {},
    "gs": {"model": "gs://my-bucket/ranker/v1", "fetch_image": TOOLS, "name": "ranker"},
    "s3": {"model": "s3://my-bucket/ranker/v1", "fetch_image": TOOLS, "name": "ranker"},
    "autoscaled": {"max_replicas": "8", "compile_cache_claim": "programs"},
    "tpu": {"topology": "v5e:1x1"},
}

Manifests = dict[tuple[str, str], dict[str, Any]]


def rendered(launch: Launch, *more: str, **flags: str | None) -> Manifests:
    """Manifests by kind and name."""
    code, out, err = launch("--dry-run", *more, **SERVING | flags)
    assert code == 0, err
    documents = list(yaml.safe_load_all(out))
    return {(one["kind"], one["metadata"]["name"]): one for one in documents}


def pod_of(manifests: Manifests) -> dict[str, Any]:
    return manifests["Deployment", "ranker"]["spec"]["template"]["spec"]


@pytest.fixture
def manifests(launch: Launch) -> Manifests:
    return rendered(launch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_manifests_are_valid_by_their_schemas(launch: Launch, variant: str) -> None:
    made = rendered(launch, **VARIANTS[variant])
    for manifest in made.values():
        check(manifest)
    kinds = {kind for kind, _ in made}
    assert kinds == set(MODELS) - (
        set() if variant == "autoscaled" else {"HorizontalPodAutoscaler"}
    )


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("ranker", ("spec", "strategy", "rollingUpdate", "maxUnavailble"), 0),
        ("ranker", ("spec", "template", "spec", "nodeSelectors"), {}),
        ("ranker", ("spec", "template", "spec", "volumes", 0, "claim"), "models"),
        ("ranker", ("spec", "replicas"), "2"),
    ],
)
def test_the_schema_refuses_what_a_cluster_would(
    manifests: Manifests, name: str, path: tuple[Any, ...], value: Any
) -> None:
    broken = copy.deepcopy(manifests["Deployment", name])
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValidationError, match=str(path[-1])):
        check(broken)


def test_selectors_name_the_pods_and_nothing_else(launch: Launch) -> None:
    made = rendered(launch, max_replicas="8")
    spec = made["Deployment", "ranker"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == "ranker"
    assert spec["selector"]["matchLabels"] == labels
    for name in ("ranker", "ranker-pods"):
        assert made["Service", name]["spec"]["selector"] == labels
    budget = made["PodDisruptionBudget", "ranker"]["spec"]
    assert budget["selector"]["matchLabels"] == labels
    target = made["HorizontalPodAutoscaler", "ranker"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "ranker"}


def test_a_rollout_and_a_stop_leave_no_gap(manifests: Manifests) -> None:
    update = manifests["Deployment", "ranker"]["spec"]["strategy"]["rollingUpdate"]
    assert update == {"maxUnavailable": 0, "maxSurge": 1}
    pod = pod_of(manifests)
    (container,) = pod["containers"]
    (word, seconds) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    # The grace period holds the hook, the drain, and some time to end the process.
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + DRAIN_SECONDS


def test_probes_ask_the_port_on_which_the_server_listens(manifests: Manifests) -> None:
    (container,) = pod_of(manifests)["containers"]
    (port,) = container["ports"]
    assert f"--port={port['containerPort']}" in container["args"]
    paths = {
        name: container[name]["httpGet"]
        for name in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {
        "startupProbe": {"path": "/readyz", "port": port["name"]},
        "readinessProbe": {"path": "/readyz", "port": port["name"]},
        "livenessProbe": {"path": "/healthz", "port": port["name"]},
    }
    headless = manifests["Service", "ranker-pods"]["spec"]
    assert headless["clusterIP"] == "None"
    # DNS gives the addresses of the pods, so that the ports must be those of the pods.
    assert [one["port"] for one in headless["ports"]] == [port["containerPort"]]


@pytest.mark.parametrize("variant", ["claim", "gs"])
def test_containers_have_no_privileges(launch: Launch, variant: str) -> None:
    pod = pod_of(rendered(launch, **VARIANTS[variant]))
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        # With a root file system that is read only, HOME must be a mounted folder.
        environment = {one["name"]: one["value"] for one in container["env"]}
        mounts = [one["mountPath"] for one in container["volumeMounts"]]
        assert environment["HOME"] in mounts


def test_every_mount_has_its_volume_and_its_folder(manifests: Manifests) -> None:
    pod = pod_of(manifests)
    (container,) = pod["containers"]
    mounts = {one["name"]: one for one in container["volumeMounts"]}
    assert set(mounts) == {one["name"] for one in pod["volumes"]}
    assert mounts["models"]["readOnly"] is True
    assert (
        f"--compile-cache={mounts['compile-cache']['mountPath']}" in (container["args"])
    )
    assert f"--model={mounts['models']['mountPath']}/ranker" in container["args"]


def test_an_artifact_of_a_claim_is_mounted_and_one_of_a_bucket_copied(
    launch: Launch,
) -> None:
    pod = pod_of(rendered(launch))
    assert "initContainers" not in pod
    claim = {"claimName": "models", "readOnly": True}
    assert {"name": "models", "persistentVolumeClaim": claim} in pod["volumes"]
    for store, words in (
        ("gs", ["gs://my-bucket/ranker/v1", "/models/v1"]),
        ("s3", ["s3://my-bucket/ranker/v1", "/models/v1"]),
    ):
        pod = pod_of(rendered(launch, **VARIANTS[store]))
        (fetch,) = pod["initContainers"]
        assert fetch["command"][-2:] == words
        assert {"name": "models", "emptyDir": {}} in pod["volumes"]
        assert "--model=/models/v1" in pod["containers"][0]["args"]


def test_compiled_programs_outlive_a_pod_only_in_a_claim(launch: Launch) -> None:
    name = "compile-cache"
    assert {"name": name, "emptyDir": {}} in pod_of(rendered(launch))["volumes"]
    pod = pod_of(rendered(launch, compile_cache_claim="programs"))
    claim = {"claimName": "programs"}
    assert {"name": name, "persistentVolumeClaim": claim} in pod["volumes"]


def test_an_autoscaler_owns_the_number_of_pods(launch: Launch) -> None:
    assert rendered(launch)["Deployment", "ranker"]["spec"]["replicas"] == 2
    made = rendered(launch, replicas="3", max_replicas="8")
    assert "replicas" not in made["Deployment", "ranker"]["spec"]
    spec = made["HorizontalPodAutoscaler", "ranker"]["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 8)


@pytest.mark.parametrize(
    ("more", "flags", "device", "platform"),
    [
        ((), {}, {}, "cpu"),
        (("--gpu",), {}, {"nvidia.com/gpu": "1"}, "cuda"),
        ((), {"topology": "v6e:1x1"}, {"google.com/tpu": "1"}, "tpu"),
    ],
)
def test_a_pod_requests_its_device_and_fails_without_it(
    launch: Launch,
    more: tuple[str, ...],
    flags: dict[str, str],
    device: dict[str, str],
    platform: str,
) -> None:
    pod = pod_of(rendered(launch, *more, memory="8GiB", cpus="4", **flags))
    (container,) = pod["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "4", "memory": "8192Mi", **device},
        "limits": {"memory": "8192Mi", **device},
    }
    assert {"name": "JAX_PLATFORMS", "value": platform} in container["env"]
    if platform == "tpu":
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "1x1"
