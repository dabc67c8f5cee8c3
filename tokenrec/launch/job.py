"""Plan a training job on TPU slices, and check it before anything is compiled.

A `LaunchJob` holds what all targets share: the command that every host runs, the
folders of the bucket, and the restart policy. gke.py and tpu_vm.py render it.

| exit code of `tokenrec train` | meaning | restart |
|---|---|---|
| 0 | done | no |
| 2, 3, 4 | wrong input, out of memory, a step that is not finite | no |
| 75 | saved on the signal to stop | yes, not counted |
| 143 | stopped by the signal before Python could catch it | yes, not counted |
| any other | crashed, hung (5), or a storage fault that persists (74) | at most `max_restarts` times |

After 2, 3 and 4 a restart would fail in the same way.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from pathlib import Path, PurePosixPath

from tokenrec.config import Config, data_location
from tokenrec.config.load import shipped_configs
from tokenrec.config.train_config import mesh_fields
from tokenrec.elastic import fit_axes, full_devices, split_step
from tokenrec.errors import (
    EXIT_BAD_STEPS,
    EXIT_INPUT,
    EXIT_MEMORY,
    EXIT_PREEMPTED,
    InputError,
)
from tokenrec.launch.slices import Slice, parse_slice
from tokenrec.runtime.paths import is_remote

# Hosts mount the data sets of the bucket here with Cloud Storage FUSE, because ArrayRecord
# takes plain paths, and a host may lack the disk for a copy. Data do not change, so what
# is known of them may be cached. Runs need no mount: tokenrec writes them to `gs://`.
MOUNT = PurePosixPath("/gcs")
DATA = "data"
RUNS = "runs"

# The user of launch/Dockerfile, who owns the mount.
USER_ID = 1000

# Seconds from the signal to stop until the process is killed.
GRACE_SECONDS = 300

# Exit codes after which a restart cannot help, and those after which it is free. A shell
# and an init report a process that SIGTERM killed as 128 + 15.
FINAL_EXITS = (EXIT_INPUT, EXIT_MEMORY, EXIT_BAD_STEPS)
STOPPED_EXITS = (EXIT_PREEMPTED, 128 + signal.SIGTERM)

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_LENGTH = 63
_BUCKET = re.compile(r"[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]")
_IMAGE = re.compile(
    r"(?P<host>[a-z0-9.-]+(:\d+)?)(/[a-z0-9._-]+)+"
    r"(:(?P<tag>\w[\w.-]*)|@sha256:[0-9a-f]{64})"
)


@dataclasses.dataclass(frozen=True)
class LaunchJob:
    """A run of `tokenrec train` on equal slices.

    Attributes:
      name: name of the job in the cloud, and of the run's folder in the bucket.
      image: container image, with a tag or a digest.
      bucket: Cloud Storage bucket, without `gs://`.
      slice: one of the slices.
      slices: number of slices.
      config: name of the config.
      config_text: text of the config file; None for one that is installed with
        tokenrec.
      overrides: such as "model.width=128", as on the command line.
      data: folder of the prepared data set under `data/` in the bucket.
      max_restarts: restarts after failures that do not tell their cause; a saved
        preemption does not count.
      grace_seconds: time from the signal to stop until the process is killed.
      spot: use Spot capacity.
    """

    name: str
    image: str
    bucket: str
    slice: Slice
    slices: int
    config: str
    config_text: str | None
    overrides: tuple[str, ...]
    data: str
    max_restarts: int
    grace_seconds: int
    spot: bool

    @property
    def workdir(self) -> str:
        """Folder of the run, in the bucket."""
        return f"gs://{self.bucket}/{RUNS}/{self.name}"

    def command(self, config_file: str) -> list[str]:
        """Build the command that every host runs.

        Args:
          config_file: path of `config_text`, on the hosts or in the bucket.
        """
        config = self.config if self.config_text is None else config_file
        return [
            *("tokenrec", "train", "--distributed", f"--config={config}"),
            *(f"--config.{override}" for override in self.overrides),
            *(
                f"--data={MOUNT / DATA / self.data}",
                f"--workdir={self.workdir}",
                "--quiet",
            ),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the hosts.

        GKE and the TPU VM service set those that tell a process its host and slice.
        """
        return {
            # A process that does not find its TPU must fail, not train on its CPU.
            "JAX_PLATFORMS": "tpu",
            "JAX_COMPILATION_CACHE_DIR": f"gs://{self.bucket}/{RUNS}/jax_cache",
            "TOKENREC_DATA": str(MOUNT / DATA),
        }


def plan_job(
    config: Config,
    *,
    source: str,
    overrides: tuple[str, ...],
    topology: str,
    slices: int,
    name: str | None,
    image: str | None,
    bucket: str | None,
    max_restarts: int,
    grace_seconds: int,
    spot: bool,
) -> LaunchJob:
    """Check the arguments of `tokenrec launch`, and build the job.

    Args:
      config: the config of `source`, with `overrides` applied.
      source: value of --config.
      overrides: such as "model.width=128".
      topology: of each slice, such as "v5p:8x8x8".
      slices: number of slices.
      name: name of the job; None: that of the config.
      image: container image, HOST/PATH/NAME:TAG.
      bucket: Cloud Storage bucket.
      max_restarts: see `LaunchJob`.
      grace_seconds: see `LaunchJob`.
      spot: use Spot capacity.

    Raises:
      InputError: the job cannot run, or a cloud would refuse it.
    """
    one_slice = parse_slice(topology)
    _check_slices(one_slice, slices)
    check_mesh(config, one_slice.devices * slices, slices)
    if Path(config.data.semantic_ids).is_absolute():
        raise InputError(
            f"data.semantic_ids='{config.data.semantic_ids}' is a path of this "
            f"machine; name it relative to TOKENREC_DATA, which is gs://BUCKET/{DATA} "
            "on the slices"
        )
    config_name, config_text = _config_file(source)
    # The longest name that is derived from it is that of a pod: JobSet, replicated job,
    # slice, host, and five characters that Kubernetes adds.
    suffix = f"-slice-{slices - 1}-{one_slice.hosts - 1}-xxxxx"
    longest = _LABEL_LENGTH - len(suffix)
    label = name or config_name.replace("_", "-").lower()
    return LaunchJob(
        name=check_label("name", label, longest),
        image=check_image(image),
        bucket=_check_bucket(bucket),
        slice=one_slice,
        slices=slices,
        config=config_name,
        config_text=config_text,
        overrides=overrides,
        data=_data_name(config),
        max_restarts=max_restarts,
        grace_seconds=grace_seconds,
        spot=spot,
    )


def check_mesh(config: Config, devices: int, slices: int) -> None:
    """Check that the mesh fits the slices, and that batches split over it.

    Args:
      config: its mesh and batch sizes are read; an elastic mesh is fitted first.
      devices: JAX devices of all slices.
      slices: number of slices.

    Raises:
      InputError: the mesh does not cover the devices, a slice has not the same share of
        `mesh.data`, or a batch does not split evenly.
    """
    mesh = fit_axes(config, devices)
    per_slice = devices // slices
    inside = mesh.fsdp * mesh.context * mesh.tensor
    sizes = mesh_fields(mesh)
    data = devices // inside if mesh.data == -1 else mesh.data
    if data * inside != devices:
        raise InputError(
            f"{sizes} do not multiply to the {devices} devices of {slices} slices; use "
            "mesh.data=-1, and sizes of fsdp, context and tensor whose product divides "
            f"{per_slice}"
        )
    # The network between slices is slow: only the sum of gradients over `data` may
    # cross it.
    if data % slices:
        raise InputError(
            f"{sizes}: data={data} is not a multiple of slices={slices}, and only data "
            "may reach across slices; lower fsdp x tensor to a divisor of "
            f"{per_slice}"
        )
    shards = data * mesh.fsdp
    full = full_devices(config, devices, None)
    split = split_step(config, devices=devices, shards=shards, full=full)
    step_batch = config.data.batch_size // (split.accumulate * split.updates)
    for field, size in (
        ("data.batch_size / optim.accumulate", step_batch),
        ("data.eval_batch_size", config.data.eval_batch_size),
    ):
        if size % shards:
            next_size = -(-size // shards) * shards
            raise InputError(
                f"{field} = {size} is not a multiple of the {shards} devices that "
                f"share a batch; use {next_size}, the next one"
            )


def _check_slices(one_slice: Slice, slices: int) -> None:
    if slices < 1:
        raise InputError(f"slices={slices} must be at least 1")
    if slices > 1 and one_slice.hosts == 1:
        raise InputError(
            f"slices={slices} of {one_slice.kind}:{one_slice.shape}, which is one "
            "host: several slices are joined only if each has several hosts; use one "
            "larger slice"
        )


def _data_name(config: Config) -> str:
    """Name of the data set, the last part of its path."""
    location = data_location(config)
    # The path may be that of the current folder, ".".
    return (
        location.name if is_remote(location) else Path(os.path.abspath(location)).name
    )


def _config_file(source: str) -> tuple[str, str | None]:
    """Name of the config, and its text unless it is installed with tokenrec."""
    # A shipped config may be given by its name or by its path in a clone.
    path = Path(source)
    shipped = {file.resolve() for file in shipped_configs().values()}
    is_shipped = not path.is_file() or path.resolve() in shipped
    return path.stem, None if is_shipped else path.read_text()


def check_label(field: str, value: str, longest: int = _LABEL_LENGTH) -> str:
    """Check a name for Kubernetes and the TPU VM service, and return it.

    Args:
      field: flag of the value, for the message.
      value: the name.
      longest: the most characters.

    Raises:
      InputError: they would refuse it.
    """
    if not _LABEL.fullmatch(value) or len(value) > longest:
        raise InputError(
            f"{field}='{value}' is refused by Kubernetes (RFC 1123): use small "
            "letters, digits and '-', begin with a letter, end with a letter or digit, "
            f"and use {longest} characters at most"
        )
    return value


def check_image(
    image: str | None, dockerfile: str = "launch/Dockerfile", field: str = "image"
) -> str:
    """Check the name of a container image, and return it.

    Args:
      image: its name; None if it was not given.
      dockerfile: file that builds it, for the message.
      field: flag of the value, for the message.

    Raises:
      InputError: it is missing, or does not name one image for good.
    """
    if not image:
        raise InputError(
            f"{field} is not given; build {dockerfile}, push it, and give --{field} "
            "HOST/PATH/NAME:TAG"
        )
    match = _IMAGE.fullmatch(image)
    if not match or match["tag"] == "latest":
        raise InputError(
            f"{field}='{image}' is not HOST/PATH/NAME:TAG or @sha256:DIGEST with a tag "
            "other than latest: a restart must get the program that the run began with"
        )
    return image


def _check_bucket(bucket: str | None) -> str:
    if not bucket:
        raise InputError(
            "bucket is not given; make one for data and runs, and give --bucket NAME "
            "(launch/README.md)"
        )
    if not _BUCKET.fullmatch(bucket):
        raise InputError(
            f"bucket='{bucket}' is not the name of a bucket; give the name alone, "
            "without gs:// or folder"
        )
    return bucket
