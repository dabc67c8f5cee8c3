"""Render a job as a batch script for Slurm: options, variables, then slurm.sh.

One process runs on each node and takes all of its GPUs. JAX would read Slurm's variables
itself, but then give each process one GPU, so that the script sets the variables of
`--distributed` (runtime/distributed.py) instead.
"""

from __future__ import annotations

import dataclasses
import os
import re
from importlib import resources
from pathlib import Path

from tokenrec.config import Config
from tokenrec.data.metadata import METADATA_FILE
from tokenrec.errors import InputError
from tokenrec.launch.checks import check_file_name, check_image
from tokenrec.launch.gpus import GpuNodes
from tokenrec.launch.job import FINAL_EXITS, STOPPED_EXITS, LaunchJob, check_mesh
from tokenrec.launch.machines import Machines
from tokenrec.launch.shell import assignment
from tokenrec.runtime.paths import is_remote

# The longest time before the end of a job at which Slurm can send a signal.
_LONGEST_GRACE = 65535
_TIME_LIMIT = re.compile(r"\d+|(\d+-)?\d{1,2}:\d{2}(:\d{2})?|\d+-\d{1,2}")


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """What only Slurm asks for.

    Attributes:
      venv: Python environment on the nodes that has tokenrec; None: in the image.
      partition: partition of the nodes; None: Slurm's default.
      account: account that pays; None: the user's default.
      time_limit: as `sbatch --time` takes it; None: that of the partition.
      cpus_per_gpu: CPU cores for each GPU.
      min_nodes: nodes that are enough to start with; None: all.
    """

    venv: str | None = None
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None
    cpus_per_gpu: int = 8
    min_nodes: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
          InputError: Slurm would refuse one.
        """
        for name in ("partition", "account"):
            # A job may name several partitions.
            for word in (getattr(self, name) or "x").split(","):
                check_file_name(name, word)
        if self.time_limit and not _TIME_LIMIT.fullmatch(self.time_limit):
            raise InputError(
                f"time_limit='{self.time_limit}' is not a time of Slurm; write minutes, "
                "HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 2-12"
            )
        if self.cpus_per_gpu < 1:
            raise InputError(f"cpus_per_gpu={self.cpus_per_gpu} must be at least 1")


def script(job: LaunchJob, options: SlurmOptions) -> str:
    """Render a job as a script for `sbatch`.

    Args:
      job: the job.
      options: what only Slurm asks for.

    Raises:
      InputError: Slurm would refuse the job, or it has both an image and a Python
        environment, or neither.
    """
    _check_program(job, options)
    variables: dict[str, str | list[str]] = {
        "NAME": job.name,
        "VENV": os.path.abspath(options.venv) if options.venv else "",
        "IMAGE": _image_uri(job),
        "MOUNTS": _mounts(job),
        "CONFIG_TEXT": job.config_text or "",
        "ENVIRONMENT": [f"{name}={value}" for name, value in job.environment.items()],
        # Every process runs in the folder of the job, which holds the config.
        "COMMAND": job.command("config.py"),
        "FINAL_EXITS": " ".join(map(str, FINAL_EXITS)),
        "STOPPED_EXITS": " ".join(str(int(code)) for code in STOPPED_EXITS),
        "MAX_RESTARTS": str(job.max_restarts),
    }
    lines = [assignment(name, value) for name, value in variables.items()]
    template = resources.files(__package__).joinpath("slurm.sh").read_text()
    shebang, _, rest = template.partition("\n")
    return "\n".join([shebang, *_sbatch_lines(job, options), *lines, rest])


def check_paths(job: LaunchJob, options: SlurmOptions) -> None:
    """Check what the nodes will look for, on a machine that sees the same folders.

    Raises:
      InputError: the data set or the Python environment is not there.
    """
    if not is_remote(job.data) and not Path(job.data, METADATA_FILE).is_file():
        raise InputError(
            f"data='{job.data}' is not a prepared data set on this machine (no "
            f"{METADATA_FILE}); give --data, a folder that all nodes see, or add "
            "--dry-run and submit the script where they are"
        )
    if options.venv and not Path(options.venv, "bin", "tokenrec").is_file():
        raise InputError(
            f"venv='{options.venv}' has no bin/tokenrec; give the folder of a Python "
            "environment in which tokenrec is installed, on a disk that all nodes see"
        )


def _check_program(job: LaunchJob, options: SlurmOptions) -> None:
    if bool(job.image) == bool(options.venv):
        given = "both are given" if job.image else "neither is given"
        raise InputError(
            f"image and venv: {given}; target='slurm' needs one of --venv DIR, a Python "
            "environment that all nodes see, and --image HOST/PATH/NAME:TAG or "
            "/PATH/FILE.sqsh, which needs the plugin pyxis"
        )
    if job.image and not job.image.endswith(".sqsh"):
        check_image(job.image)
    if job.image and job.image.endswith(".sqsh") and not Path(job.image).is_absolute():
        raise InputError(
            f"image='{job.image}' must begin with '/', because nodes do not know this "
            "folder; give its whole path"
        )
    if job.grace_seconds > _LONGEST_GRACE:
        raise InputError(
            f"grace_seconds={job.grace_seconds} is more than Slurm's {_LONGEST_GRACE}; "
            "give fewer"
        )


def _sbatch_lines(job: LaunchJob, options: SlurmOptions) -> list[str]:
    """Options of `sbatch`, which reads them from comments."""
    machines = job.machines
    assert isinstance(machines, GpuNodes)
    # Without the size of its memory: clusters name their GPUs by the short word.
    kind = machines.kind.partition("-")[0]
    values = {
        "job-name": job.name,
        "nodes": _nodes(machines, options),
        "ntasks-per-node": 1,
        "gpus-per-node": f"{kind}:{machines.per_node}",
        "cpus-per-gpu": options.cpus_per_gpu,
        "partition": options.partition,
        "account": options.account,
        "time": options.time_limit,
        # To the processes, before the time limit, or before a preemption if the cluster
        # sends such signals then.
        "signal": f"TERM@{job.grace_seconds}",
        "output": f"{job.name}-%j.log",
        # A requeued job keeps its number, and so its log.
        "open-mode": "append",
    }
    lines = [
        f"#SBATCH --{name}={value}"
        for name, value in values.items()
        if value is not None
    ]
    return [*lines, "#SBATCH --requeue"]


def _nodes(machines: GpuNodes, options: SlurmOptions) -> str:
    """Nodes as `sbatch --nodes` takes them: all, or the least and the most."""
    least = options.min_nodes
    return f"{least}-{machines.nodes}" if least else str(machines.nodes)


def check_min_nodes(config: Config, machines: Machines, least: int | None) -> None:
    """Check that a run can train on any number of nodes that Slurm may give it.

    Args:
      config: the config of the run.
      machines: all nodes.
      least: `SlurmOptions.min_nodes`.

    Raises:
      InputError: the number is out of range, or the config does not fit a number of
        nodes from it up to all.
    """
    if least is None:
        return
    assert isinstance(machines, GpuNodes)
    if not 1 <= least <= machines.nodes:
        raise InputError(
            f"min_nodes={least} is not between 1 and the {machines.nodes} nodes of "
            f"{machines.topology}; give a number of nodes in that range"
        )
    if config.train.elastic == "off" or not config.train.elastic_devices:
        kind = "accumulate" if config.train.elastic == "off" else config.train.elastic
        raise InputError(
            f"min_nodes={least} with train.elastic='{config.train.elastic}' and "
            f"train.elastic_devices={config.train.elastic_devices}: the batch is meant "
            f"for all nodes; add --config.train.elastic={kind} "
            f"--config.train.elastic_devices={machines.devices}"
        )
    for nodes in range(least, machines.nodes):
        fewer = dataclasses.replace(machines, nodes=nodes)
        try:
            check_mesh(config, fewer, 1)
        except InputError as error:
            raise InputError(
                f"min_nodes={least}: Slurm may start the run on {nodes} nodes, and "
                f"{error}; every number of nodes from --min-nodes on has to do, so that "
                "raising --min-nodes helps, too"
            ) from error


def _image_uri(job: LaunchJob) -> str:
    """Image as pyxis takes it (github.com/NVIDIA/pyxis); empty without an image."""
    image = job.image or ""
    # Enroot separates the registry from the path by '#'.
    return image if image.endswith(".sqsh") else image.replace("/", "#", 1)


def _mounts(job: LaunchJob) -> list[str]:
    """Folders of the nodes that a container sees, under their own names."""
    folders = [job.runs, job.data.rpartition("/")[0]]
    return list(dict.fromkeys(folder for folder in folders if not is_remote(folder)))
