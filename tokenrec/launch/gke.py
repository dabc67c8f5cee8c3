"""Render a job as Kubernetes manifests for GKE.

The main manifest is a JobSet (jobset.sigs.k8s.io): it makes one Job per slice, names
the hosts, and restarts all slices together. GKE tells libtpu which host of which slice
a process is on. A config that is not installed with tokenrec travels in a ConfigMap.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from tokenrec.launch.job import (
    DATA,
    FINAL_EXITS,
    MOUNT,
    STOPPED_EXITS,
    USER_ID,
    LaunchJob,
    check_label,
)
from tokenrec.launch.kubernetes_yaml import to_yaml

_EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
_CONTAINER = "tokenrec"
_CONFIG_FILE = PurePosixPath("/config/config.py")
# Ports of libtpu: between the hosts of a slice, and between slices.
_PORTS = (8471, 8080)
# Part of the message with which Kubernetes fails a Job by its podFailurePolicy.
_FINAL_MESSAGE = f"exit code ({'|'.join(map(str, FINAL_EXITS))}) matching"


def manifests(job: LaunchJob, *, namespace: str, service_account: str) -> str:
    """Render a job as YAML for `kubectl apply`.

    Args:
      job: the job.
      namespace: namespace of Kubernetes.
      service_account: service account of Kubernetes that may read and write the bucket.

    Raises:
      InputError: Kubernetes would refuse a name.
    """
    check_label("namespace", namespace)
    check_label("service_account", service_account)
    documents = []
    if job.config_text is not None:
        documents.append(_config_map(job, namespace))
    documents.append(job_set(job, namespace, service_account))
    return to_yaml(documents)


def job_set(job: LaunchJob, namespace: str, service_account: str) -> dict[str, Any]:
    """Build the JobSet: a Job for each slice, with a pod for each host.

    Args:
      job: the job.
      namespace: namespace of Kubernetes.
      service_account: service account of the pods.
    """
    hosts = job.slice.hosts
    replicated = {
        "name": "slice",
        "replicas": job.slices,
        "template": {
            "spec": {
                "parallelism": hosts,
                "completions": hosts,
                "completionMode": "Indexed",
                # A host that restarted alone would find nobody to train with.
                "backoffLimit": 0,
                "podFailurePolicy": {"rules": _pod_rules()},
                "template": _pod(job, service_account),
            }
        },
    }
    metadata: dict[str, Any] = {"name": job.name, "namespace": namespace}
    if hosts > 1:
        # A node pool is one slice, so no two Jobs may share one.
        metadata["annotations"] = {_EXCLUSIVE: "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {"failurePolicy": _failure_policy(job), "replicatedJobs": [replicated]},
    }


def _failure_policy(job: LaunchJob) -> dict[str, Any]:
    """Restart policy of the JobSet.

    The first rule that matches decides. A failure that no rule matches restarts all
    slices and counts.
    """
    return {
        "maxRestarts": job.max_restarts,
        # Wait for the old pods to end: a new host must not meet one of the old run.
        "restartStrategy": "BlockingRecreate",
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
    """Failure policy of the pods.

    A rule that matches fails the Job with the reason `PodFailurePolicy`, by which the
    rules of the JobSet tell it from a crash.
    """
    # The order matters: an eviction with a final exit code is final.
    by_exit = [
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": _CONTAINER,
                "operator": "In",
                "values": sorted(codes),
            },
        }
        for codes in (FINAL_EXITS, STOPPED_EXITS)
    ]
    evicted = {
        "action": "FailJob",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    return [*by_exit, evicted]


def _pod(job: LaunchJob, service_account: str) -> dict[str, Any]:
    container = _container(job)
    volumes = [_data_volume(job.bucket)]
    if job.config_text is not None:
        mount = {"name": "config", "mountPath": str(_CONFIG_FILE.parent)}
        container["volumeMounts"].append(mount)
        volumes.append({"name": "config", "configMap": {"name": f"{job.name}-config"}})
    # Nodes of slices of this generation and shape.
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.slice.generation.label,
        "cloud.google.com/gke-tpu-topology": job.slice.shape,
    }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    return {
        # Makes GKE add the sidecar that mounts the bucket.
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
        "spec": {
            # Kubernetes accepts a podFailurePolicy only with this.
            "restartPolicy": "Never",
            "serviceAccountName": service_account,
            "terminationGracePeriodSeconds": job.grace_seconds,
            "nodeSelector": selector,
            "containers": [container],
            "volumes": volumes,
        },
    }


def _container(job: LaunchJob) -> dict[str, Any]:
    chips = str(job.slice.chips_per_host)
    return {
        "name": _CONTAINER,
        "image": job.image,
        # `args` and not `command`, which would replace the image's init.
        "args": job.command(str(_CONFIG_FILE)),
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
        ],
    }


def _data_volume(bucket: str) -> dict[str, Any]:
    """Volume of the data sets in the bucket, mounted by Cloud Storage FUSE."""
    options = (
        f"only-dir={DATA}",
        "implicit-dirs",
        f"uid={USER_ID}",
        f"gid={USER_ID}",
        "metadata-cache:ttl-secs:-1",
    )
    csi = {
        "driver": "gcsfuse.csi.storage.gke.io",
        "readOnly": True,
        "volumeAttributes": {"bucketName": bucket, "mountOptions": ",".join(options)},
    }
    return {"name": DATA, "csi": csi}


def _config_map(job: LaunchJob, namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-config", "namespace": namespace},
        "data": {_CONFIG_FILE.name: job.config_text},
    }
