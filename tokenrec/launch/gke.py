"""A job as Kubernetes manifests for GKE: a JobSet, and a ConfigMap for a config that is not installed.

JobSet (jobset.sigs.k8s.io) makes one Job a slice, gives hosts their names and restarts all slices together; GKE tells
libtpu which host of which slice it is on.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import yaml

from tokenrec.launch.job import (
    DATA,
    FINAL_EXITS,
    MOST_RENAMED,
    MOUNT,
    RUNS,
    SAVED_EXIT,
    USER_ID,
    LaunchJob,
    check_label,
)

_CONTAINER = "tokenrec"
_CONFIG_FILE = PurePosixPath("/config/config.py")
# libtpu between the hosts of a slice, and between slices.
_PORTS = (8471, 8080)
# As Kubernetes words the failure of a Job by its podFailurePolicy.
_FINAL_MESSAGE = f"exit code ({'|'.join(map(str, FINAL_EXITS))}) matching"


def manifests(job: LaunchJob, *, namespace: str, service_account: str) -> str:
    """The job as YAML for `kubectl apply`.

    Args:
      service_account: of Kubernetes, one that may read and write the bucket.

    Raises:
      InputError: a name that Kubernetes refuses.
    """
    check_label("namespace", namespace)
    check_label("service_account", service_account)
    documents = [_config_map(job, namespace)] if job.config_text is not None else []
    documents.append(job_set(job, namespace, service_account))
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1_000)


def job_set(job: LaunchJob, namespace: str, service_account: str) -> dict[str, Any]:
    """The JobSet: a Job for each slice, with a pod for each host."""
    hosts = job.slice.hosts
    replicated = {
        "name": "slice",
        "replicas": job.slices,
        "template": {
            "spec": {
                "parallelism": hosts,
                "completions": hosts,
                "completionMode": "Indexed",
                "backoffLimit": 0,  # a host that comes back alone finds nobody to train with
                "podFailurePolicy": {"rules": _pod_rules()},
                "template": _pod(job, service_account),
            }
        },
    }
    metadata: dict[str, Any] = {"name": job.name, "namespace": namespace}
    if hosts > 1:  # a node pool is one slice, so that no two Jobs may share one
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {"failurePolicy": _failure_policy(job), "replicatedJobs": [replicated]},
    }


def _failure_policy(job: LaunchJob) -> dict[str, Any]:
    """The first rule that matches decides; a failure that none matches restarts and counts."""
    return {
        "maxRestarts": job.max_restarts,
        "restartStrategy": "BlockingRecreate",  # a new host must not meet one of the run before
        "rules": [
            {
                "name": "noRestartMendsIt",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": [_FINAL_MESSAGE],
            },
            {
                "name": "preempted",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            },
        ],
    }


def _pod_rules() -> list[dict[str, Any]]:
    """What makes a Job fail with a reason that the JobSet's rules can tell from a crash."""
    by_exit = [
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": _CONTAINER,
                "operator": "In",
                "values": sorted(codes),
            },
        }
        for codes in (FINAL_EXITS, (SAVED_EXIT,))
    ]
    evicted = {
        "action": "FailJob",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    return [*by_exit, evicted]


def _pod(job: LaunchJob, service_account: str) -> dict[str, Any]:
    chips = str(job.slice.chips_per_host)
    container: dict[str, Any] = {
        "name": _CONTAINER,
        "image": job.image,
        "args": job.command(
            _CONFIG_FILE
        ),  # not `command`, which would replace the image's init
        "env": [
            {"name": name, "value": value} for name, value in job.environment.items()
        ],
        "ports": [{"containerPort": port} for port in _PORTS],
        "resources": {
            "limits": {"google.com/tpu": chips},
            "requests": {"google.com/tpu": chips},
        },
        "volumeMounts": [
            {"name": DATA, "mountPath": str(MOUNT / DATA), "readOnly": True},
            {"name": RUNS, "mountPath": str(MOUNT / RUNS)},
        ],
    }
    volumes: list[dict[str, Any]] = [
        _folder(job.bucket, DATA, "metadata-cache:ttl-secs:-1", read_only=True),
        _folder(
            job.bucket,
            RUNS,
            "metadata-cache:ttl-secs:0",
            "metadata-cache:negative-ttl-secs:0",
            f"rename-dir-limit={MOST_RENAMED}",
        ),
    ]
    if job.config_text is not None:
        container["volumeMounts"].append(
            {"name": "config", "mountPath": str(_CONFIG_FILE.parent)}
        )
        volumes.append({"name": "config", "configMap": {"name": f"{job.name}-config"}})
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.slice.generation.label,
        "cloud.google.com/gke-tpu-topology": job.slice.shape,
    }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    return {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": service_account,
            "terminationGracePeriodSeconds": job.grace_seconds,
            "nodeSelector": selector,
            "containers": [container],
            "volumes": volumes,
        },
    }


def _folder(
    bucket: str, folder: str, *options: str, read_only: bool = False
) -> dict[str, Any]:
    owner = (f"only-dir={folder}", "implicit-dirs", f"uid={USER_ID}", f"gid={USER_ID}")
    attributes = {"bucketName": bucket, "mountOptions": ",".join((*owner, *options))}
    csi = {
        "driver": "gcsfuse.csi.storage.gke.io",
        "readOnly": read_only,
        "volumeAttributes": attributes,
    }
    return {"name": folder, "csi": csi}


def _config_map(job: LaunchJob, namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-config", "namespace": namespace},
        "data": {_CONFIG_FILE.name: job.config_text},
    }


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Dumper.add_representer(str, _represent_text)
