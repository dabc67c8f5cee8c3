"""A training job on slices, before any cloud: what it runs, where its files lie, and what may not be asked of it."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path, PurePosixPath

from tokenrec.config import Config, data_directory
from tokenrec.config.load import shipped_configs
from tokenrec.errors import (
    EXIT_BAD_STEPS,
    EXIT_INPUT,
    EXIT_MEMORY,
    EXIT_PREEMPTED,
    InputError,
)
from tokenrec.launch.slices import Slice, parse_slice

# Where a host mounts the two folders of the bucket, by Cloud Storage FUSE: tokenrec, Orbax and ArrayRecord take plain
# paths. Data do not change, so that what is known of them is kept. Of a run, every host must see at once what another
# wrote, and folders are renamed when a checkpoint is whole: the mount keeps nothing, and may rename large folders.
MOUNT = PurePosixPath("/gcs")
DATA, RUNS = "data", "runs"
MOST_RENAMED = 200_000

# The user of launch/Dockerfile, to whom the mounts belong.
USER_ID = 1000

# What a restart cannot mend, and what it is for. Any other failure restarts, a counted number of times.
FINAL_EXITS = (EXIT_INPUT, EXIT_MEMORY, EXIT_BAD_STEPS)
SAVED_EXIT = EXIT_PREEMPTED

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_LENGTH = 63
_BUCKET = re.compile(r"[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]")
_IMAGE = re.compile(
    r"(?P<host>[a-z0-9.-]+(:\d+)?)(/[a-z0-9._-]+)+(:(?P<tag>\w[\w.-]*)|@sha256:[0-9a-f]{64})"
)


@dataclasses.dataclass(frozen=True)
class LaunchJob:
    """A run of `tokenrec train` on `slices` equal slices.

    Attributes:
      name: of the job in the cloud, and of the run's folder in the bucket.
      config: shipped config's name, or what stands in `config_text`.
      config_text: the config file, if it is not one that is installed with tokenrec.
      overrides: "model.width=128", as on the command line.
      data: folder of the prepared data set under `data/` in the bucket.
      max_restarts: after failures that say nothing of their cause; a saved preemption does not count.
      grace_seconds: from the signal to stop until the process is ended.
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
    def workdir(self) -> PurePosixPath:
        return MOUNT / RUNS / self.name

    def command(self, config_file: PurePosixPath) -> list[str]:
        """What every host runs; `config_file` is where `config_text` lies there."""
        config = self.config if self.config_text is None else str(config_file)
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
        """Ours alone: GKE and the TPU VM service set what says which host of which slice a process is."""
        return {
            "JAX_PLATFORMS": "tpu",  # without its TPU a process must fail, not train on its CPU
            "JAX_COMPILATION_CACHE_DIR": str(MOUNT / RUNS / "jax_cache"),
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
    """Checks what is asked for, and returns it as a `LaunchJob`.

    Args:
      config: of `source` with `overrides` applied.
      source: the value of --config.
      name: None takes that of the config.

    Raises:
      InputError: what cannot run, or what a cloud would refuse.
    """
    piece = parse_slice(topology)
    _check_slices(piece, slices)
    check_mesh(config, piece.devices * slices, slices)
    if Path(config.data.semantic_ids).is_absolute():
        raise InputError(
            f"data.semantic_ids='{config.data.semantic_ids}' is a path of this machine; name it relative to "
            f"TOKENREC_DATA, which is gs://BUCKET/{DATA} on the slices"
        )
    stem, text = _config_file(source)
    # A pod's name is the longest: JobSet, replicated job, slice and host, and five characters of Kubernetes' own.
    longest = _LABEL_LENGTH - len(f"-slice-{slices - 1}-{piece.hosts - 1}-xxxxx")
    return LaunchJob(
        name=check_label("name", name or stem.replace("_", "-").lower(), longest),
        image=_check_image(image),
        bucket=_check_bucket(bucket),
        slice=piece,
        slices=slices,
        config=stem,
        config_text=text,
        overrides=overrides,
        data=Path(os.path.abspath(data_directory(config))).name,
        max_restarts=max_restarts,
        grace_seconds=grace_seconds,
        spot=spot,
    )


def check_mesh(config: Config, devices: int, slices: int) -> None:
    """Checks that the mesh covers the devices, a slice at a time, and that batches split over it.

    Raises:
      InputError: they do not.
    """
    mesh = config.mesh
    inside = mesh.fsdp * mesh.tensor
    named = f"mesh.data={mesh.data} mesh.fsdp={mesh.fsdp} mesh.tensor={mesh.tensor}"
    data = devices // inside if mesh.data == -1 else mesh.data
    if data * inside != devices:
        raise InputError(
            f"{named} do not multiply to the {devices} devices of {slices} slices; use mesh.data=-1, and sizes of fsdp "
            f"and tensor whose product divides {devices // slices}"
        )
    if data % slices:
        raise InputError(
            f"{named}: data={data} is not a multiple of slices={slices}, and only data may reach across slices; "
            f"lower fsdp x tensor to a divisor of {devices // slices}"
        )
    shards = data * mesh.fsdp
    for field, size in (
        (
            "data.batch_size / optim.accumulate",
            config.data.batch_size // config.optim.accumulate,
        ),
        ("data.eval_batch_size", config.data.eval_batch_size),
    ):
        if size % shards:
            raise InputError(
                f"{field} = {size} is not a multiple of the {shards} devices that share a batch; the next one is "
                f"{-(-size // shards) * shards}"
            )


def _check_slices(piece: Slice, slices: int) -> None:
    if slices < 1:
        raise InputError(f"slices={slices} must be at least 1")
    if slices > 1 and piece.hosts == 1:
        raise InputError(
            f"slices={slices} of {piece.kind}:{piece.shape}, which is one host: several slices are joined only if each "
            "has several hosts; use one larger slice"
        )


def _config_file(source: str) -> tuple[str, str | None]:
    """The config's name, and its text unless it is installed with tokenrec."""
    path = Path(source)
    shipped = {file.resolve() for file in shipped_configs().values()}
    return (
        path.stem,
        path.read_text() if path.is_file() and path.resolve() not in shipped else None,
    )


def check_label(field: str, value: str, longest: int = _LABEL_LENGTH) -> str:
    """Returns a value that can be a name in Kubernetes, and in the TPU VM service.

    Raises:
      InputError: it cannot.
    """
    if not _LABEL.fullmatch(value) or len(value) > longest:
        raise InputError(
            f"{field}='{value}' is refused by Kubernetes (RFC 1123): use small letters, digits and '-', begin with a "
            f"letter, end with a letter or digit, and use {longest} characters at most"
        )
    return value


def _check_image(image: str | None) -> str:
    if not image:
        raise InputError(
            "image is not given; build launch/Dockerfile, push it, and give --image HOST/PATH/NAME:TAG"
        )
    found = _IMAGE.fullmatch(image)
    if not found or found["tag"] == "latest":
        raise InputError(
            f"image='{image}' is not HOST/PATH/NAME:TAG or @sha256:DIGEST with a tag other than latest: a restart must "
            "get the program that the run began with"
        )
    return image


def _check_bucket(bucket: str | None) -> str:
    if not bucket:
        raise InputError(
            "bucket is not given; make one for data and runs, and give --bucket NAME (launch/README.md)"
        )
    if not _BUCKET.fullmatch(bucket):
        raise InputError(
            f"bucket='{bucket}' is not the name of a bucket; give the name alone, without gs:// or folder"
        )
    return bucket
