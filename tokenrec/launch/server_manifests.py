"""Render servers as Kubernetes manifests.

- A Deployment: the pods, replaced one by one without a gap.
- A Service, which spreads requests over the pods that are ready.
- A headless Service, whose name resolves to the addresses of the pods, for routers that
  send every request of a user to the same pod (docs/guides/server_deployment.md).
- A PodDisruptionBudget, so that drained nodes take one pod at a time.
- With `max_replicas` a HorizontalPodAutoscaler.
"""

from __future__ import annotations

from typing import Any

from tokenrec.launch.checks import check_label
from tokenrec.launch.kubernetes_yaml import to_yaml
from tokenrec.launch.server_job import PORT, ServerJob
from tokenrec.launch.server_pod import pod_labels, pod_template

# Seconds in which a rollout must make progress: the start of a pod, and the copy of its
# image and artifact before that.
_ROLLOUT_SECONDS = 1_200
# Share of the requested CPUs, in per cent, that the autoscaler aims at.
_CPU_SHARE = 60


def manifests(job: ServerJob, *, namespace: str, service_account: str) -> str:
    """Render servers as YAML for `kubectl apply`.

    Args:
      job: the servers.
      namespace: namespace of Kubernetes.
      service_account: service account of Kubernetes; it needs no right but that to read
        a bucket.

    Raises:
      InputError: Kubernetes would refuse a name.
    """
    check_label("namespace", namespace)
    check_label("service_account", service_account)
    documents = [
        deployment(job, namespace, service_account),
        _service(job, namespace),
        _headless_service(job, namespace),
        _disruption_budget(job, namespace),
    ]
    if job.max_replicas is not None:
        documents.append(_autoscaler(job, job.max_replicas, namespace))
    return to_yaml(documents)


def deployment(job: ServerJob, namespace: str, service_account: str) -> dict[str, Any]:
    """Build the Deployment.

    Args:
      job: the servers.
      namespace: namespace of Kubernetes.
      service_account: service account of the pods.
    """
    spec: dict[str, Any] = {
        "selector": {"matchLabels": pod_labels(job)},
        # A new pod must be ready before an old one stops.
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
        },
        "progressDeadlineSeconds": _ROLLOUT_SECONDS,
        "template": pod_template(job, service_account),
    }
    # With an autoscaler, a number here would undo its choice at every `kubectl apply`.
    if job.max_replicas is None:
        spec = {"replicas": job.replicas, **spec}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(job.name, job, namespace),
        "spec": spec,
    }


def _metadata(name: str, job: ServerJob, namespace: str) -> dict[str, Any]:
    return {"name": name, "namespace": namespace, "labels": pod_labels(job)}


def _service(job: ServerJob, namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job.name, job, namespace),
        "spec": {
            "type": "ClusterIP",
            "selector": pod_labels(job),
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }


def _headless_service(job: ServerJob, namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(f"{job.name}-pods", job, namespace),
        "spec": {
            "clusterIP": "None",
            "selector": pod_labels(job),
            "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
        },
    }


def _disruption_budget(job: ServerJob, namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(job.name, job, namespace),
        # Not `minAvailable`, with which a single replica could never leave its node.
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": pod_labels(job)}},
    }


def _autoscaler(job: ServerJob, most: int, namespace: str) -> dict[str, Any]:
    use = {"type": "Utilization", "averageUtilization": _CPU_SHARE}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(job.name, job, namespace),
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "name": job.name,
            },
            "minReplicas": job.replicas,
            "maxReplicas": most,
            "metrics": [
                {"type": "Resource", "resource": {"name": "cpu", "target": use}}
            ],
            # A pod that leaves moves its users to pods that have not cached them.
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 600}},
        },
    }
