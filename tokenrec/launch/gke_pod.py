"""Render the pod of a host for GKE: its container, its nodes and its volumes."""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath
from typing import Any

from tokenrec.launch.checks import check_label
from tokenrec.launch.gpus import GpuNodes
from tokenrec.launch.job import DATA, MOUNT, USER_ID, LaunchJob

CONTAINER = "tokenrec"
CONFIG_FILE = PurePosixPath("/config/config.py")

# Ports of libtpu: between the hosts of a slice, and between slices.
_TPU_PORTS = (8471, 8080)
# Port of JAX's coordinator, process 0. GKE sets one up for TPUs, and none for GPUs.
_COORDINATOR_PORT = 8476
# GKE mounts the driver of the GPUs here, where the linker does not look by itself.
_GPU_LIBRARIES = "/usr/local/nvidia/lib64"


@dataclasses.dataclass(frozen=True)
class GkeOptions:
    """What only GKE asks for.

    Attributes:
      namespace: namespace of Kubernetes.
      service_account: service account of Kubernetes that may read and write the bucket.
      kueue_queue: local queue of Kueue; None: the job does not wait in a queue.
      priority_class: WorkloadPriorityClass of Kueue if there is a queue, else
        PriorityClass of the pods; None: the default one.
      ttl_seconds: seconds until a job that has ended is deleted; None: never.
      host_network: use the network of the host; None: for several TPU slices.
    """

    namespace: str = "default"
    service_account: str = "default"
    kueue_queue: str | None = None
    priority_class: str | None = None
    ttl_seconds: int | None = None
    host_network: bool | None = None

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
          InputError: Kubernetes would refuse a name.
        """
        for name in ("namespace", "service_account", "kueue_queue", "priority_class"):
            value = getattr(self, name)
            if value is not None:
                check_label(name, value)

    def on_host_network(self, job: LaunchJob) -> bool:
        """Whether the pods use the network of their host."""
        # The traffic between slices goes through it: without, every packet would take
        # the bridge and the address translation of the pods' network.
        return job.slices > 1 if self.host_network is None else self.host_network


def pod(job: LaunchJob, options: GkeOptions) -> dict[str, Any]:
    """Build the template of the pods.

    Args:
      job: the job.
      options: what only GKE asks for.

    Raises:
      InputError: Google Cloud has no such GPU nodes.
    """
    container = _container(job)
    on_host_network = options.on_host_network(job)
    volumes = [_data_volume(job.bucket, on_host_network)]
    if job.config_text is not None:
        mount = {"name": "config", "mountPath": str(CONFIG_FILE.parent)}
        container["volumeMounts"].append(mount)
        volumes.append({"name": "config", "configMap": {"name": f"{job.name}-config"}})
    if isinstance(job.machines, GpuNodes):
        # NCCL exchanges through shared memory, of which a container has 64 MiB.
        container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    spec: dict[str, Any] = {
        # Kubernetes accepts a podFailurePolicy only with this.
        "restartPolicy": "Never",
        "serviceAccountName": options.service_account,
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": _node_selector(job),
        "containers": [container],
        "volumes": volumes,
    }
    if on_host_network:
        # Names of other pods are still those of the cluster.
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if options.priority_class and not options.kueue_queue:
        spec["priorityClassName"] = options.priority_class
    return {"metadata": {"annotations": _annotations()}, "spec": spec}


def _annotations() -> dict[str, str]:
    """Make GKE add the sidecar that mounts the bucket, without a limit.

    Otherwise the driver sets limits by its version, down to a quarter of a CPU, and
    training waits for its data. 0 means no limit, on Standard clusters
    (gcs-fuse-csi-driver, docs/troubleshooting.md).
    """
    limits = ("cpu", "memory", "ephemeral-storage")
    return {
        "gke-gcsfuse/volumes": "true",
        **{f"gke-gcsfuse/{resource}-limit": "0" for resource in limits},
    }


def _node_selector(job: LaunchJob) -> dict[str, str]:
    machines = job.machines
    if isinstance(machines, GpuNodes):
        selector = {"cloud.google.com/gke-accelerator": machines.gke_label}
    else:
        # Nodes of slices of this generation and shape.
        selector = {
            "cloud.google.com/gke-tpu-accelerator": machines.generation.label,
            "cloud.google.com/gke-tpu-topology": machines.shape,
        }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    return selector


def _container(job: LaunchJob) -> dict[str, Any]:
    machines = job.machines
    environment: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in job.environment.items()
    ]
    if isinstance(machines, GpuNodes):
        environment += _gpu_environment(job)
        resources = {"nvidia.com/gpu": str(machines.per_node)}
        ports: tuple[int, ...] = (_COORDINATOR_PORT,)
    else:
        resources = {"google.com/tpu": str(machines.chips_per_host)}
        ports = _TPU_PORTS
    return {
        "name": CONTAINER,
        "image": job.image,
        # `args` and not `command`, which would replace the image's init.
        "args": job.command(str(CONFIG_FILE)),
        "env": environment,
        "ports": [{"containerPort": port} for port in ports],
        "resources": {"limits": resources, "requests": resources},
        "volumeMounts": [
            {"name": DATA, "mountPath": str(MOUNT / DATA), "readOnly": True},
        ],
    }


def _gpu_environment(job: LaunchJob) -> list[dict[str, Any]]:
    """Variables by which the processes find each other (runtime/distributed.py).

    JAX could ask Kubernetes, with a package and a right that the pods need not have.
    """
    # JobSet names a pod after its set, job and numbers, in a domain named as the set.
    first = f"{job.name}-{job.machines.role}-0-0.{job.name}"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "LD_LIBRARY_PATH", "value": _GPU_LIBRARIES},
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{first}:{_COORDINATOR_PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(job.machines.hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def _data_volume(bucket: str, on_host_network: bool) -> dict[str, Any]:
    """Volume of the data sets in the bucket, mounted by Cloud Storage FUSE."""
    mount_options = (
        f"only-dir={DATA}",
        "implicit-dirs",
        f"uid={USER_ID}",
        f"gid={USER_ID}",
        "metadata-cache:ttl-secs:-1",
    )
    attributes = {"bucketName": bucket, "mountOptions": ",".join(mount_options)}
    if on_host_network:
        # The sidecar then takes the token of the pod's service account from a volume:
        # on the host's network, the metadata server answers with the node's account
        # (gcs-fuse-csi-driver, docs/authentication.md, and its pull request 460).
        attributes["hostNetworkPodKSA"] = "true"
    csi = {
        "driver": "gcsfuse.csi.storage.gke.io",
        "readOnly": True,
        "volumeAttributes": attributes,
    }
    return {"name": DATA, "csi": csi}
