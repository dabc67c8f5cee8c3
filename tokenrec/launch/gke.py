"""Render a job as Kubernetes manifests for GKE.

The main manifest is a JobSet (jobset.sigs.k8s.io): it makes one Job per TPU slice, or
one of all GPU nodes, names the hosts, and restarts all of them together. GKE tells
libtpu which host of which slice a process is on. A config that is not installed with
tokenrec travels in a ConfigMap.
"""

from __future__ import annotations

from typing import Any

from tokenrec.launch.gke_pod import CONFIG_FILE, CONTAINER, GkeOptions, pod
from tokenrec.launch.job import FINAL_EXITS, STOPPED_EXITS, LaunchJob
from tokenrec.launch.kubernetes_yaml import to_yaml

_EXCLUSIVE = "alpha.jobset.sigs.k8s.io/exclusive-topology"
# Part of the message with which Kubernetes fails a Job by its podFailurePolicy.
_FINAL_MESSAGE = f"exit code ({'|'.join(map(str, FINAL_EXITS))}) matching"


def manifests(job: LaunchJob, options: GkeOptions) -> str:
    """Render a job as YAML for `kubectl apply`.

    Args:
      job: the job.
      options: what only GKE asks for.

    Raises:
      InputError: Google Cloud has no such GPU nodes.
    """
    documents = []
    if job.config_text is not None:
        documents.append(_config_map(job, options.namespace))
    documents.append(job_set(job, options))
    return to_yaml(documents)


def job_set(job: LaunchJob, options: GkeOptions) -> dict[str, Any]:
    """Build the JobSet: a Job for each slice, with a pod for each host.

    Args:
      job: the job.
      options: what only GKE asks for.
    """
    hosts = job.machines.hosts
    replicated = {
        "name": job.machines.role,
        "replicas": job.slices,
        "template": {
            "spec": {
                "parallelism": hosts,
                "completions": hosts,
                "completionMode": "Indexed",
                # A host that restarted alone would find nobody to train with.
                "backoffLimit": 0,
                "podFailurePolicy": {"rules": _pod_rules()},
                "template": pod(job, options),
            }
        },
    }
    spec: dict[str, Any] = {"failurePolicy": _failure_policy(job)}
    if options.ttl_seconds is not None:
        spec["ttlSecondsAfterFinished"] = options.ttl_seconds
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job, options),
        "spec": spec | {"replicatedJobs": [replicated]},
    }


def _metadata(job: LaunchJob, options: GkeOptions) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": job.name, "namespace": options.namespace}
    if options.kueue_queue:
        # Kueue holds the JobSet back until there is room for all of its pods.
        labels = {"kueue.x-k8s.io/queue-name": options.kueue_queue}
        if options.priority_class:
            labels["kueue.x-k8s.io/priority-class"] = options.priority_class
        metadata["labels"] = labels
    if job.machines.platform == "tpu" and job.machines.hosts > 1:
        # A node pool is one slice, so no two Jobs may share one.
        metadata["annotations"] = {_EXCLUSIVE: "cloud.google.com/gke-nodepool"}
    return metadata


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
                "containerName": CONTAINER,
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


def _config_map(job: LaunchJob, namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-config", "namespace": namespace},
        "data": {CONFIG_FILE.name: job.config_text},
    }
