"""Render a pod of servers: the container, its probes, volumes and privileges."""

from __future__ import annotations

from typing import Any

from tokenrec.launch.job import USER_ID
from tokenrec.launch.server_job import (
    COMPILE_CACHE,
    LEAVE_SECONDS,
    MODELS,
    PORT,
    TMP,
    ArtifactSource,
    ServerJob,
)

_CONTAINER = "tokenrec"
# Seconds that a server may take until it is ready: nothing is compiled yet at the first
# start.
_START_SECONDS = 600
_NO_PRIVILEGES = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def pod_labels(job: ServerJob) -> dict[str, str]:
    """Labels by which the other objects select the pods."""
    return {
        "app.kubernetes.io/name": "tokenrec-serve",
        "app.kubernetes.io/instance": job.name,
    }


def pod_template(job: ServerJob, service_account: str) -> dict[str, Any]:
    """Build the template of the pods.

    Args:
      job: the servers.
      service_account: service account of the pods.
    """
    spec: dict[str, Any] = {
        "serviceAccountName": service_account,
        # A server does not call Kubernetes.
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": job.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": pod_labels(job)},
            }
        ],
    }
    if job.slice is not None:
        spec["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": job.slice.generation.label,
            "cloud.google.com/gke-tpu-topology": job.slice.shape,
        }
    if job.fetch_image is not None:
        spec["initContainers"] = [_fetch(job, job.fetch_image)]
    return {
        "metadata": {
            "labels": pod_labels(job),
            "annotations": {
                "prometheus.io/scrape": "true",
                "prometheus.io/port": str(PORT),
                "prometheus.io/path": "/metrics",
            },
        },
        "spec": {**spec, "containers": [_container(job)], "volumes": _volumes(job)},
    }


def _container(job: ServerJob) -> dict[str, Any]:
    return {
        "name": _CONTAINER,
        "image": job.image,
        # `args` and not `command`, which would replace the image's init.
        "args": job.command,
        "env": [
            # A server that does not find its accelerator must fail, not use its CPU.
            {"name": "JAX_PLATFORMS", "value": job.platform},
            {"name": "HOME", "value": str(TMP)},
        ],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": _resources(job),
        **_probes(),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVE_SECONDS)]}}},
        "securityContext": _NO_PRIVILEGES,
        "volumeMounts": [
            {"name": "models", "mountPath": str(MODELS), "readOnly": True},
            {"name": "compile-cache", "mountPath": str(COMPILE_CACHE)},
            {"name": "tmp", "mountPath": str(TMP)},
        ],
    }


def _probes() -> dict[str, Any]:
    """Probes: is the process alive, and may it get requests."""

    def get(path: str) -> dict[str, Any]:
        return {"httpGet": {"path": path, "port": "http"}}

    every = 5
    return {
        # Loading, warming and the golden requests; only then do the other probes begin.
        "startupProbe": {
            **get("/readyz"),
            "periodSeconds": every,
            "timeoutSeconds": 2,
            "failureThreshold": _START_SECONDS // every,
        },
        # A pod that is not ready gets no requests, and is not restarted.
        "readinessProbe": {
            **get("/readyz"),
            "periodSeconds": 2,
            "timeoutSeconds": 2,
            "failureThreshold": 3,
        },
        # A restart loses the cache and cannot help against load: be slow to do it.
        "livenessProbe": {
            **get("/healthz"),
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
    }


def _resources(job: ServerJob) -> dict[str, Any]:
    memory = f"{job.memory // 2**20}Mi"
    # No limit of CPUs: it would stop the server for parts of a period of 100 ms.
    limits = {"memory": memory}
    device: dict[str, str] = {}
    if job.gpu:
        device = {"nvidia.com/gpu": "1"}
    elif job.slice is not None:
        device = {"google.com/tpu": str(job.slice.chips_per_host)}
    return {
        "requests": {"cpu": str(job.cpus), "memory": memory, **device},
        "limits": {**limits, **device},
    }


def _volumes(job: ServerJob) -> list[dict[str, Any]]:
    models: dict[str, Any] = {"emptyDir": {}}
    if job.artifact.kind == "pvc":
        models = {
            "persistentVolumeClaim": {"claimName": job.artifact.place, "readOnly": True}
        }
    cache: dict[str, Any] = {"emptyDir": {}}
    if job.compile_cache_claim is not None:
        cache = {"persistentVolumeClaim": {"claimName": job.compile_cache_claim}}
    return [
        {"name": "models", **models},
        {"name": "compile-cache", **cache},
        {"name": "tmp", "emptyDir": {}},
    ]


def _fetch(job: ServerJob, image: str) -> dict[str, Any]:
    """Init container that copies the artifact from an object store.

    An incomplete copy ends with an error and is tried again. The server checks the
    digest of every file.
    """
    return {
        "name": "fetch",
        "image": image,
        "command": _fetch_command(job.artifact),
        # The tools keep their state in HOME, and the root file system is read only.
        "env": [{"name": "HOME", "value": str(TMP)}],
        "resources": {
            "requests": {"cpu": "1", "memory": "512Mi"},
            "limits": {"memory": "512Mi"},
        },
        "securityContext": _NO_PRIVILEGES,
        "volumeMounts": [
            {"name": "models", "mountPath": str(MODELS)},
            {"name": "tmp", "mountPath": str(TMP)},
        ],
    }


def _fetch_command(artifact: ArtifactSource) -> list[str]:
    target = str(artifact.path)
    if artifact.kind == "gs":
        # gcloud wants the target of a folder to exist.
        copy = 'mkdir -p "$1" && exec gcloud storage rsync --recursive "$0" "$1"'
        return ["sh", "-c", copy, artifact.url, target]
    return ["aws", "s3", "sync", "--no-progress", artifact.url, target]
