"""Plan a training job, and check it before anything is compiled.

A `LaunchJob` holds what all targets share: the machines, the command that every host
runs, the folders of data and runs, and the restart policy. gke.py, tpu_vm.py and
slurm.py render it.

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
from tokenrec.launch.checks import (
    LABEL_LENGTH,
    check_bucket,
    check_file_name,
    check_image,
    check_label,
)
from tokenrec.launch.machines import (
    Machines,
    TrainingTarget,
    check_slices,
    parse_machines,
)
from tokenrec.runtime.paths import absolute, as_path, is_remote

# Hosts of a cloud mount the data sets of the bucket here with Cloud Storage FUSE, because
# ArrayRecord takes plain paths, and a host may lack the disk for a copy. Data do not
# change, so what is known of them may be cached. Runs need no mount: tokenrec writes them
# to `gs://`.
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


@dataclasses.dataclass(frozen=True)
class LaunchJob:
    """A run of `tokenrec train` on equal machines.

    Attributes:
      name: name of the job at its service, and of the run's folder.
      image: container image, with a tag or a digest; None: a Python environment that
        the hosts have.
      bucket: Cloud Storage bucket, without `gs://`; empty for Slurm.
      machines: one of the TPU slices, or all GPU nodes.
      slices: number of TPU slices; 1 for GPUs.
      config: name of the config.
      config_text: text of the config file; None for one that is installed with
        tokenrec.
      overrides: such as "model.width=128", as on the command line.
      data: prepared data set, as the hosts see it.
      runs: folder of the runs, as the hosts see it.
      max_restarts: restarts after failures that do not tell their cause; a saved
        preemption does not count.
      grace_seconds: time from the signal to stop until the process is killed.
      spot: use Spot capacity.
    """

    name: str
    image: str | None
    bucket: str
    machines: Machines
    slices: int
    config: str
    config_text: str | None
    overrides: tuple[str, ...]
    data: str
    runs: str
    max_restarts: int
    grace_seconds: int
    spot: bool

    @property
    def workdir(self) -> str:
        """Folder of the run."""
        return f"{self.runs}/{self.name}"

    def command(self, config_file: str) -> list[str]:
        """Build the command that every host runs.

        Args:
          config_file: path of `config_text`, on the hosts or in the bucket.
        """
        config = self.config if self.config_text is None else config_file
        return [
            *("tokenrec", "train", "--distributed", f"--config={config}"),
            *(f"--config.{override}" for override in self.overrides),
            *(f"--data={self.data}", f"--workdir={self.workdir}", "--quiet"),
        ]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the hosts.

        GKE and the TPU VM service set those that tell a process its TPU host and slice.
        """
        return {
            # A process that does not find its chips must fail, not train on its CPU.
            "JAX_PLATFORMS": self.machines.platform,
            "JAX_COMPILATION_CACHE_DIR": f"{self.runs}/jax_cache",
            "TOKENREC_DATA": self.data.rpartition("/")[0],
        }


def plan_job(
    config: Config,
    target: TrainingTarget,
    *,
    source: str,
    overrides: tuple[str, ...],
    topology: str,
    slices: int,
    name: str | None,
    image: str | None,
    bucket: str | None,
    runs: str | None,
    max_restarts: int,
    grace_seconds: int,
    spot: bool,
) -> LaunchJob:
    """Check the arguments of `tokenrec launch`, and build the job.

    Args:
      config: the config of `source`, with `overrides` applied.
      target: service that runs the job.
      source: value of --config.
      overrides: such as "model.width=128".
      topology: of each TPU slice, such as "v5p:8x8x8", or of all GPU nodes, such as
        "h100:2x8".
      slices: number of slices.
      name: name of the job; None: that of the config.
      image: container image, HOST/PATH/NAME:TAG; under Slurm it may be left out.
      bucket: Cloud Storage bucket; not under Slurm.
      runs: folder of the runs, which all hosts see; only under Slurm.
      max_restarts: see `LaunchJob`.
      grace_seconds: see `LaunchJob`.
      spot: use Spot capacity.

    Raises:
      InputError: the job cannot run, or its service would refuse it.
    """
    machines = parse_machines(topology, target)
    check_slices(machines, slices)
    check_mesh(config, machines, slices)
    if target == "slurm":
        data, runs = os.fspath(absolute(data_location(config))), _check_runs(runs)
        bucket = ""
    else:
        _check_semantic_ids(config)
        data, bucket = f"{MOUNT / DATA}/{_data_name(config)}", check_bucket(bucket)
        runs = f"gs://{bucket}/{RUNS}"
    config_name, config_text = _config_file(source)
    label = name or config_name.replace("_", "-").lower()
    return LaunchJob(
        name=_check_name(label, target, machines, slices),
        image=check_image(image) if target != "slurm" else image,
        bucket=bucket,
        machines=machines,
        slices=slices,
        config=config_name,
        config_text=config_text,
        overrides=overrides,
        data=data,
        runs=runs,
        max_restarts=max_restarts,
        grace_seconds=grace_seconds,
        spot=spot,
    )


def check_mesh(config: Config, machines: Machines, slices: int) -> None:
    """Check that the mesh fits the machines, and that batches split over it.

    Args:
      config: its mesh and batch sizes are read; an elastic mesh is fitted first.
      machines: one of the TPU slices, or all GPU nodes.
      slices: number of slices.

    Raises:
      InputError: the mesh does not cover the devices, a slice has not the same share of
        `mesh.data`, or a batch does not split evenly.
    """
    per_slice = machines.devices
    devices = per_slice * slices
    mesh = fit_axes(config, devices)
    inside = mesh.fsdp * mesh.context * mesh.tensor
    sizes = mesh_fields(mesh)
    data = devices // inside if mesh.data == -1 else mesh.data
    where = f"{slices} slices" if machines.platform == "tpu" else machines.topology
    if data * inside != devices:
        raise InputError(
            f"{sizes} do not multiply to the {devices} devices of {where}; use "
            "mesh.data=-1, and sizes of fsdp, context and tensor whose product divides "
            f"{per_slice}"
        )
    # The network between slices is slow: only the sum of gradients over `data` may
    # cross it.
    if data % slices:
        raise InputError(
            f"{sizes}: data={data} is not a multiple of slices={slices}, and only data "
            "may reach across slices; lower fsdp x context x tensor to a divisor of "
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


def _check_name(
    name: str, target: TrainingTarget, machines: Machines, slices: int
) -> str:
    if target == "slurm":
        return check_file_name("name", name)
    # The longest name that is derived from it is that of a pod: JobSet, replicated job,
    # slice, host, and five characters that Kubernetes adds.
    suffix = f"-{machines.role}-{slices - 1}-{machines.hosts - 1}-xxxxx"
    return check_label("name", name, LABEL_LENGTH - len(suffix))


def _check_semantic_ids(config: Config) -> None:
    if Path(config.data.semantic_ids).is_absolute():
        raise InputError(
            f"data.semantic_ids='{config.data.semantic_ids}' is a path of this "
            f"machine; name it relative to TOKENREC_DATA, which is gs://BUCKET/{DATA} "
            "on the hosts"
        )


def _check_runs(runs: str | None) -> str:
    if not runs:
        raise InputError(
            "runs is not given; target='slurm' needs --runs, a folder that all nodes "
            "see, or gs://BUCKET/FOLDER"
        )
    return os.fspath(absolute(as_path(runs)))


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
