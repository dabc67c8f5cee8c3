"""Plan servers on Kubernetes, and check the plan before anything is started.

A `ServerJob` holds the command that every pod runs, where the pods find the artifact,
and what they may use. server_manifests.py renders it.

The artifact lies in a volume, or an object store from which a pod copies it at its
start:

| --model | the pod |
|---|---|
| `pvc://CLAIM/FOLDER` | mounts the PersistentVolumeClaim, read only |
| `gs://BUCKET/FOLDER`, `s3://BUCKET/FOLDER` | copies the folder to its disk in an init container |
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from tokenrec.errors import InputError
from tokenrec.launch.checks import check_image, check_label
from tokenrec.launch.slices import Slice, parse_slice

DOCKERFILE = "launch/serving/Dockerfile"
PORT = 8000
# Folders of a pod. The root file system is read only.
MODELS = PurePosixPath("/models")
COMPILE_CACHE = PurePosixPath("/cache")
TMP = PurePosixPath("/tmp")

# Seconds that a pod goes on serving after Kubernetes has decided to stop it. The routers
# learn of that at the same time as the pod, and send it requests until they have.
LEAVE_SECONDS = 5
# Seconds that `tokenrec serve` then takes at most to finish the requests in flight.
DRAIN_SECONDS = 30
# Seconds from that decision until the process is killed.
GRACE_SECONDS = 60

# Flags of `tokenrec serve` that `tokenrec launch` hands on.
SERVER_LIMITS = ("max-candidates", "max-history", "max-batch", "queue", "cache-mb")

# The longest names that are derived from a job's: those of pods, with the hash of the
# ReplicaSet and five characters, and that of the headless Service.
_LONGEST_NAME = 63 - len("-0123456789-xxxxx")
_ARTIFACT = re.compile(
    r"(?P<kind>pvc|gs|s3)://(?P<place>[a-z0-9][-_.a-z0-9]{0,61}[a-z0-9])"
    r"/(?P<folder>[\w.-]+(/[\w.-]+)*)/?"
)
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class ArtifactSource:
    """Where the pods find the artifact.

    Attributes:
      kind: "pvc", "gs" or "s3".
      place: name of the PersistentVolumeClaim, or of the bucket.
      folder: folder of the artifact in it.
    """

    kind: str
    place: str
    folder: str

    @property
    def url(self) -> str:
        """The URL as it was given."""
        return f"{self.kind}://{self.place}/{self.folder}"

    @property
    def path(self) -> PurePosixPath:
        """Folder of the artifact in the pod.

        A claim is mounted whole: with a mount of the folder alone, a link in the claim
        that points to the current artifact could not be followed.
        """
        if self.kind == "pvc":
            return MODELS / self.folder
        return MODELS / PurePosixPath(self.folder).name


@dataclasses.dataclass(frozen=True)
class ServerJob:
    """Equal pods, each of which runs `tokenrec serve`.

    Attributes:
      name: name of the Deployment and of its Service.
      image: container image, with a tag or a digest.
      artifact: where the pods find the artifact.
      fetch_image: image of the init container that copies the artifact; None if the
        artifact is mounted.
      replicas: number of pods; the least number with `max_replicas`.
      max_replicas: most pods of the autoscaler; None: no autoscaler.
      cpus: CPUs that a pod requests.
      memory: bytes of memory of a pod, requested and at most.
      gpu: whether a pod has a GPU.
      slice: TPU slice of a pod, with one device; None: no TPU.
      compile_cache_claim: PersistentVolumeClaim that keeps compiled programs; None: a
        folder that lives as long as its pod.
      grace_seconds: time from the decision to stop a pod until its process is killed.
      options: flags of `tokenrec serve`, such as "--max-batch=16".
    """

    name: str
    image: str
    artifact: ArtifactSource
    fetch_image: str | None
    replicas: int
    max_replicas: int | None
    cpus: int
    memory: int
    gpu: bool
    slice: Slice | None
    compile_cache_claim: str | None
    grace_seconds: int
    options: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """Command that every pod runs."""
        return [
            *("tokenrec", "serve", f"--model={self.artifact.path}"),
            # The pod has an address of its own; only the cluster reaches it.
            *("--host=0.0.0.0", f"--port={PORT}", f"--compile-cache={COMPILE_CACHE}"),
            *self.options,
        ]

    @property
    def platform(self) -> str:
        """Platform of JAX."""
        return "cuda" if self.gpu else "tpu" if self.slice else "cpu"


def plan_server(
    *,
    model: str | None,
    name: str | None,
    image: str | None,
    fetch_image: str | None,
    replicas: int,
    max_replicas: int | None,
    cpus: int,
    memory: int,
    gpu: bool,
    topology: str | None,
    compile_cache_claim: str | None,
    grace_seconds: int | None,
    limits: Mapping[str, int | None],
    allow_missing: str | None,
) -> ServerJob:
    """Check the arguments of `tokenrec launch --target serving`, and build the job.

    Args:
      model: URL of the artifact (see `ArtifactSource`).
      name: name of the servers; None: that of the artifact's folder.
      image: container image, HOST/PATH/NAME:TAG.
      fetch_image: see `ServerJob`.
      replicas: see `ServerJob`.
      max_replicas: see `ServerJob`.
      cpus: see `ServerJob`.
      memory: see `ServerJob`.
      gpu: see `ServerJob`.
      topology: TPU slice of a pod, such as "v5e:1x1"; None: no TPU.
      compile_cache_claim: see `ServerJob`.
      grace_seconds: see `ServerJob`; None: `GRACE_SECONDS`.
      limits: flags of `tokenrec serve` that are numbers, by their names of `SERVER_LIMITS`;
        None: its default.
      allow_missing: flag of `tokenrec serve`; None: no feature.

    Raises:
      InputError: the servers cannot run, or Kubernetes would refuse them.
    """
    artifact = parse_artifact(model)
    label = name or PurePosixPath(artifact.folder).name.replace("_", "-").lower()
    if compile_cache_claim is not None:
        check_label("compile_cache_claim", compile_cache_claim)
    _check_replicas(replicas, max_replicas, on_accelerator=gpu or topology is not None)
    _check_memory(cpus, memory, limits["cache-mb"])
    return ServerJob(
        name=check_label("name", label, _LONGEST_NAME),
        image=check_image(image, DOCKERFILE),
        artifact=artifact,
        fetch_image=_check_fetch_image(artifact, fetch_image),
        replicas=replicas,
        max_replicas=max_replicas,
        cpus=cpus,
        memory=memory,
        gpu=gpu,
        slice=_parse_device(topology, gpu),
        compile_cache_claim=compile_cache_claim,
        grace_seconds=_check_grace(grace_seconds),
        options=(
            *(
                f"--{flag}={value}"
                for flag, value in limits.items()
                if value is not None
            ),
            *([] if allow_missing is None else [f"--allow-missing={allow_missing}"]),
        ),
    )


def parse_artifact(model: str | None) -> ArtifactSource:
    """Parse the URL of an artifact.

    >>> parse_artifact("pvc://models/ranker/2026-03-01").path
    PurePosixPath('/models/ranker/2026-03-01')
    >>> parse_artifact("gs://my-bucket/ranker/2026-03-01").path
    PurePosixPath('/models/2026-03-01')

    Raises:
      InputError: it is missing or malformed.
    """
    if model is None:
        raise InputError(
            "model is not given; target='serving' needs --model, the folder that "
            "`tokenrec export` wrote: pvc://CLAIM/FOLDER or gs://BUCKET/FOLDER"
        )
    match = _ARTIFACT.fullmatch(model)
    if not match or {".", ".."} & set(match["folder"].split("/")):
        raise InputError(
            f"model='{model}' is not the folder of an artifact that pods can reach; "
            "write pvc://CLAIM/FOLDER, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER"
        )
    return ArtifactSource(match["kind"], match["place"], match["folder"])


def _check_fetch_image(artifact: ArtifactSource, image: str | None) -> str | None:
    if artifact.kind == "pvc":
        if image is not None:
            raise InputError(
                f"fetch_image='{image}' does not apply to model='{artifact.url}', which "
                "is mounted; leave --fetch-image out"
            )
        check_label("model", artifact.place)
        return None
    if image is None:
        tool = {"gs": "gcloud", "s3": "aws"}[artifact.kind]
        raise InputError(
            f"fetch_image is not given; model='{artifact.url}' is copied by an init "
            f"container: give --fetch-image HOST/PATH/NAME:TAG with the command {tool}"
        )
    return check_image(image, field="fetch_image")


def _check_replicas(
    replicas: int, max_replicas: int | None, *, on_accelerator: bool
) -> None:
    if replicas < 1:
        raise InputError(f"replicas={replicas} must be at least 1")
    if max_replicas is None:
        return
    if max_replicas <= replicas:
        raise InputError(
            f"max_replicas={max_replicas} leaves the autoscaler no choice with "
            f"replicas={replicas}; raise it, or leave --max-replicas out"
        )
    if on_accelerator:
        raise InputError(
            f"max_replicas={max_replicas} does not apply to servers on a GPU or TPU: "
            "the autoscaler reads the use of CPUs, which does not tell how busy they "
            "are; leave --max-replicas out, and scale on a series of /metrics"
        )


def _check_memory(cpus: int, memory: int, cache_mb: int | None) -> None:
    if cpus < 1:
        raise InputError(f"cpus={cpus} must be at least 1")
    # Python, JAX and its compiler take most of a gibibyte before any weight is loaded.
    if memory < _GIB:
        raise InputError(
            f"memory={memory} bytes are too few for a server; give 1GiB or more"
        )
    if cache_mb is not None and cache_mb * 10**6 > memory / 2:
        raise InputError(
            f"cache_mb={cache_mb} is more than half of memory={memory} bytes, which "
            "also hold the weights and the batches in flight; raise --memory or lower "
            "--cache-mb"
        )


def _check_grace(grace_seconds: int | None) -> int:
    if grace_seconds is None:
        return GRACE_SECONDS
    if grace_seconds <= LEAVE_SECONDS + DRAIN_SECONDS:
        raise InputError(
            f"grace_seconds={grace_seconds} is too short: a pod goes on serving for "
            f"{LEAVE_SECONDS} s while routers forget it, and may take {DRAIN_SECONDS} s "
            f"to finish its requests; give {GRACE_SECONDS}"
        )
    return grace_seconds


def _parse_device(topology: str | None, gpu: bool) -> Slice | None:
    if topology is None:
        return None
    if gpu:
        raise InputError(
            f"topology='{topology}' is a TPU and does not go with --gpu; leave one out"
        )
    one_slice = parse_slice(topology)
    if one_slice.devices != 1:
        raise InputError(
            f"topology='{topology}' has {one_slice.devices} devices, and a server "
            "computes on one; use v5e:1x1 or v6e:1x1, and more --replicas"
        )
    return one_slice
