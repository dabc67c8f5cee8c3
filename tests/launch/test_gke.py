"""Manifests for GKE: valid by the schemas of JobSet and Kubernetes, right restarts."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_core_v1_config_map import (
    IoK8sApiCoreV1ConfigMap,
)
from kubeflow_trainer_api.models.jobset_v1alpha2_failure_policy_rule import (
    JobsetV1alpha2FailurePolicyRule,
)
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

from tests.launch.conftest import Launch
from tests.launch.schemas import wrap_quantities

LARGE = (
    "--config.data.batch_size=1024",
    "--config.data.eval_batch_size=1024",
    "--config.mesh.fsdp=512",
)


@pytest.fixture
def job_set(launch: Launch) -> dict[str, Any]:
    code, out, _ = launch(
        *LARGE,
        "--dry-run",
        "--skip-compile",
        "--spot",
        topology="v5p:8x8x8",
        slices="2",
    )
    assert code == 0
    return yaml.safe_load(out)


def check(manifest: dict[str, Any]) -> None:
    """Validate by the schemas of JobSet and Kubernetes; unknown fields are errors."""
    manifest = copy.deepcopy(manifest)
    for container in spec_of(manifest)["template"]["spec"]["containers"]:
        wrap_quantities(container)
    JobsetV1alpha2JobSet.model_validate(
        manifest, strict=True, extra="forbid", by_alias=True, by_name=False
    )


def spec_of(job_set: dict[str, Any]) -> dict[str, Any]:
    return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_the_job_set_is_one_by_its_schema(job_set: dict[str, Any]) -> None:
    check(job_set)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicatedJobs", 0, "replicas"), "2"),
        (("spec", "failurePolicy", "rules", 0, "onExitCodes"), [2]),
        (
            (
                "spec",
                "replicatedJobs",
                0,
                "template",
                "spec",
                "podFailurePolicy",
                "rules",
                0,
                "action",
            ),
            "Fail",
        ),
        (
            (
                "spec",
                "replicatedJobs",
                0,
                "template",
                "spec",
                "template",
                "spec",
                "nodeSelectors",
            ),
            {},
        ),
    ],
)
def test_the_schema_refuses_what_a_cluster_would(
    job_set: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    broken = copy.deepcopy(job_set)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValidationError, match=str(path[-1])):
        check(broken)


def test_what_the_schema_only_describes_holds_too(job_set: dict[str, Any]) -> None:
    assert (job_set["apiVersion"], job_set["kind"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
    )
    policy = job_set["spec"]["failurePolicy"]
    assert policy["restartStrategy"] in (
        "Recreate",
        "BlockingRecreate",
        "InPlaceRestart",
    )
    fields = JobsetV1alpha2FailurePolicyRule.model_fields
    actions = re.findall(
        r"\w+JobSet\w*|RestartJob\w*", fields["action"].description or ""
    )
    for rule in policy["rules"]:
        assert rule["action"] in actions
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    assert (
        spec_of(job_set)["template"]["spec"]["restartPolicy"] == "Never"
    )  # or podFailurePolicy is refused


def test_a_config_map_is_one_by_its_schema(launch: Launch, tmp_path: Any) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from tokenrec.config import Config\n\n\ndef get_config() -> Config:\n    return Config()\n"
    )
    sizes = ("--config.data.name=set", "--config.mesh.fsdp=16")
    code, out, err = launch("--dry-run", "--skip-compile", *sizes, config=str(file))
    assert code == 0, err
    config_map, job_set = yaml.safe_load_all(out)
    IoK8sApiCoreV1ConfigMap.model_validate(
        config_map, strict=True, extra="forbid", by_alias=True, by_name=False
    )
    check(job_set)
    assert "    def get_config() -> Config:\n" in out  # readable, not one quoted line


def test_every_slice_is_a_job_and_every_host_a_pod_with_all_its_chips(
    job_set: dict[str, Any],
) -> None:
    (replicated,) = job_set["spec"]["replicatedJobs"]
    spec, pod = spec_of(job_set), spec_of(job_set)["template"]["spec"]
    assert (replicated["replicas"], spec["parallelism"], spec["completions"]) == (
        2,
        128,
        128,
    )
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "8x8x8",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {
        "limits": {"google.com/tpu": "4"},
        "requests": {"google.com/tpu": "4"},
    }
    assert [port["containerPort"] for port in container["ports"]] == [8471, 8080]
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert job_set["metadata"]["annotations"] == {key: "cloud.google.com/gke-nodepool"}


def test_slices_of_one_host_share_a_node_pool(launch: Launch) -> None:
    _, out, _ = launch("--dry-run", "--skip-compile", topology="v5e:2x4")
    manifest = yaml.safe_load(out)
    (container,) = spec_of(manifest)["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": "8"}
    assert spec_of(manifest)["parallelism"] == 1
    assert "annotations" not in manifest["metadata"]
    check(manifest)


def test_data_are_mounted_read_only_and_runs_need_no_mount(
    job_set: dict[str, Any],
) -> None:
    template = spec_of(job_set)["template"]
    # The sidecar that mounts the bucket may use what it needs.
    assert template["metadata"]["annotations"] == {
        "gke-gcsfuse/volumes": "true",
        "gke-gcsfuse/cpu-limit": "0",
        "gke-gcsfuse/memory-limit": "0",
        "gke-gcsfuse/ephemeral-storage-limit": "0",
    }
    volumes = {volume["name"]: volume["csi"] for volume in template["spec"]["volumes"]}
    mounts = {
        mount["name"]: mount
        for mount in template["spec"]["containers"][0]["volumeMounts"]
    }
    assert {name: mount["mountPath"] for name, mount in mounts.items()} == {
        "data": "/gcs/data"
    }
    assert volumes["data"]["readOnly"] is True
    assert mounts["data"]["readOnly"] is True
    attributes = volumes["data"]["volumeAttributes"]
    assert attributes["bucketName"] == "my-bucket"
    assert "only-dir=data" in attributes["mountOptions"].split(",")
    arguments = template["spec"]["containers"][0]["args"]
    assert any(one.startswith("--workdir=gs://my-bucket/runs/") for one in arguments)
    environment = {
        one["name"]: one["value"] for one in template["spec"]["containers"][0]["env"]
    }
    assert environment["JAX_PLATFORMS"] == "tpu"
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "gs://my-bucket/runs/jax_cache"


def manifest_of(launch: Launch, *more: str, **flags: str | None) -> dict[str, Any]:
    code, out, err = launch("--dry-run", "--skip-compile", *more, **flags)
    assert code == 0, err
    manifest = yaml.safe_load(out)
    check(manifest)
    return manifest


@pytest.mark.parametrize(
    ("more", "slices", "expected"),
    [
        ((), "1", False),
        ((), "2", True),
        (("--host-network",), "1", True),
        (("--no-host-network",), "2", False),
    ],
)
def test_several_slices_use_the_network_of_their_hosts(
    launch: Launch, more: tuple[str, ...], slices: str, expected: bool
) -> None:
    sizes = ("--config.data.batch_size=64", "--config.data.eval_batch_size=64")
    manifest = manifest_of(launch, *sizes, *more, slices=slices)
    pod = spec_of(manifest)["template"]["spec"]
    (volume,) = pod["volumes"]
    attributes = volume["csi"]["volumeAttributes"]
    if expected:
        # Other pods keep their names, and the bucket is that of the pod's account.
        assert (pod["hostNetwork"], pod["dnsPolicy"]) == (
            True,
            "ClusterFirstWithHostNet",
        )
        assert attributes["hostNetworkPodKSA"] == "true"
    else:
        assert not {"hostNetwork", "dnsPolicy"} & set(pod)
        assert "hostNetworkPodKSA" not in attributes


def test_a_queue_a_priority_and_the_time_to_keep_are_those_of_the_job(
    launch: Launch,
) -> None:
    flags = {"kueue_queue": "team-a", "priority_class": "urgent", "ttl_seconds": "600"}
    manifest = manifest_of(launch, **flags)
    assert manifest["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "team-a",
        "kueue.x-k8s.io/priority-class": "urgent",
    }
    assert manifest["spec"]["ttlSecondsAfterFinished"] == 600
    assert "priorityClassName" not in spec_of(manifest)["template"]["spec"]
    # Without Kueue it is the priority of the pods.
    alone = manifest_of(launch, priority_class="urgent")
    assert "labels" not in alone["metadata"]
    assert spec_of(alone)["template"]["spec"]["priorityClassName"] == "urgent"
    assert "ttlSecondsAfterFinished" not in alone["spec"]


def test_gpu_nodes_are_the_pods_of_one_job_and_find_the_first(launch: Launch) -> None:
    manifest = manifest_of(launch, "--spot", topology="h100:2x8", name="trial")
    (replicated,) = manifest["spec"]["replicatedJobs"]
    spec, pod = spec_of(manifest), spec_of(manifest)["template"]["spec"]
    assert (replicated["replicas"], spec["parallelism"], spec["completions"]) == (
        *(1, 2, 2),
    )
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-h100-80gb",
        "cloud.google.com/gke-spot": "true",
    }
    # A pool of GPU nodes is not one machine, as that of a TPU slice is.
    assert "annotations" not in manifest["metadata"]
    (container,) = pod["containers"]
    assert container["resources"] == {
        "limits": {"nvidia.com/gpu": "8"},
        "requests": {"nvidia.com/gpu": "8"},
    }
    environment = {one["name"]: one for one in container["env"]}
    assert environment["JAX_PLATFORMS"]["value"] == "cuda"
    assert environment["JAX_NUM_PROCESSES"]["value"] == "2"
    # JobSet names pods JOBSET-JOB-NUMBER-INDEX, in the domain JOBSET.
    host, port = environment["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"trial-{replicated['name']}-0-0.trial"
    assert container["ports"] == [{"containerPort": int(port)}]
    # Kubernetes writes the number of a pod of an indexed job into this annotation.
    assert spec["completionMode"] == "Indexed"
    assert environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == (
        "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    )
    # The driver lies where no linker looks by itself, and NCCL exchanges in /dev/shm.
    assert environment["LD_LIBRARY_PATH"]["value"] == "/usr/local/nvidia/lib64"
    memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    assert memory in pod["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert decide(manifest, 75, False) == "RestartJobSetAndIgnoreMaxRestarts"


def decide(job_set: dict[str, Any], code: int, evicted: bool) -> str:
    """Decide as Kubernetes and JobSet do when a pod ends: the first matching rule."""
    message = ""
    for index, rule in enumerate(spec_of(job_set)["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        if code in rule.get("onExitCodes", {}).get("values", []):
            # As the Job controller words it in
            # kubernetes/pkg/controller/job/pod_failure_policy.go.
            message = (
                f"Container tokenrec for pod ns/p failed with exit code {code} "
                f"matching FailJob rule at index {index}"
            )
            break
        if evicted and "onPodConditions" in rule:
            message = (
                "Pod ns/p has condition DisruptionTarget matching FailJob rule at "
                f"index {index}"
            )
            break
    reason = "PodFailurePolicy" if message else "BackoffLimitExceeded"
    for rule in job_set["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in patterns
        ):
            return rule["action"]
    return "RestartJobSet"  # JobSet's default, which counts


@pytest.mark.parametrize(
    ("code", "evicted", "action"),
    [
        (2, False, "FailJobSet"),
        (3, False, "FailJobSet"),
        (4, False, "FailJobSet"),
        (2, True, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (143, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (74, False, "RestartJobSet"),
        (5, False, "RestartJobSet"),
        (1, False, "RestartJobSet"),
        (134, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
    ],
)
def test_a_restart_follows_only_where_it_can_help(
    job_set: dict[str, Any], code: int, evicted: bool, action: str
) -> None:
    assert spec_of(job_set)["backoffLimit"] == 0
    assert decide(job_set, code, evicted) == action


def test_restarts_and_grace_are_those_that_were_asked_for(launch: Launch) -> None:
    _, out, _ = launch(
        "--dry-run",
        "--skip-compile",
        max_restarts="3",
        grace_seconds="900",
        namespace="team",
    )
    manifest = yaml.safe_load(out)
    assert manifest["metadata"]["namespace"] == "team"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert spec_of(manifest)["template"]["spec"]["terminationGracePeriodSeconds"] == 900
