"""Render a planned job, check that it fits, write it to a file, and start it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from tokenrec.config import Config
from tokenrec.errors import InputError
from tokenrec.launch import gke, slurm, tpu_vm
from tokenrec.launch.gke_pod import GkeOptions
from tokenrec.launch.job import LaunchJob
from tokenrec.launch.machines import TrainingTarget
from tokenrec.launch.slurm import SlurmOptions
from tokenrec.launch.tpu_vm import TpuVmOptions
from tokenrec.runtime.files import write_text_atomically

Target = TrainingTarget | Literal["serving"]
# What only one of the services asks for.
Options = GkeOptions | TpuVmOptions | SlurmOptions

_KUBECTL = "install it (https://kubernetes.io/docs/tasks/tools)"
# Target -> command that starts a job, the remedy if it is missing, and the suffix of its file.
_TOOLS = {
    "gke": ("kubectl", _KUBECTL, ".yaml"),
    "serving": ("kubectl", _KUBECTL, ".yaml"),
    "tpu-vm": (
        "gcloud",
        "install it (https://cloud.google.com/sdk/docs/install)",
        ".sh",
    ),
    "slurm": ("sbatch", "run this on a login node of the cluster", ".sbatch"),
}


def render(job: LaunchJob, options: Options) -> str:
    """Render a training job: YAML for GKE, a script for TPU VMs and for Slurm.

    Args:
      job: the job.
      options: what only its service asks for.

    Raises:
      InputError: an argument is missing or malformed.
    """
    if isinstance(options, GkeOptions):
        return gke.manifests(job, options)
    if isinstance(options, TpuVmOptions):
        return tpu_vm.script(job, options)
    return slurm.script(job, options)


def check_fits(config: Config, topology: str, slices: int) -> str:
    """Compile the train step for the slices, and return the report of the compilation.

    Args:
      config: the run's config.
      topology: of each slice, such as "v5p:8x8x8".
      slices: number of slices.

    Raises:
      InputError: the config cannot be compiled for them.
      MemoryError: the step does not fit in memory; the message names the largest
        arrays.
    """
    # Imported here: rendering alone needs no JAX.
    from tokenrec.planner.compile import compile_config
    from tokenrec.planner.report import to_text

    report = compile_config(config, topology, slices)
    if not report["fits"]:
        raise MemoryError(to_text(report))
    return to_text(report)


def find_tool(target: Target) -> str:
    """Find the command that starts a job, and return its path.

    Raises:
      InputError: it is not installed.
    """
    name, remedy, _ = _TOOLS[target]
    path = shutil.which(name)
    if path is None:
        raise InputError(
            f"target='{target}' needs '{name}', which is not installed here; {remedy}, "
            "or add --dry-run and start the job where it is installed"
        )
    return path


def start(text: str, path: Path, target: Target, tool: str) -> None:
    """Write a rendered job to a file, and start it.

    Servers that run already are updated: their file is replaced.

    Args:
      text: the rendered job.
      path: file to write, without its suffix, which is `.yaml`, `.sh` or `.sbatch`.
      target: service that runs the job.
      tool: path of the command that starts it.

    Raises:
      InputError: the file holds another job, or the command fails.
    """
    # The file stays: it is what stops or deletes the job later, and it shows what runs.
    # Writing the same job again does no harm.
    path = path.with_name(path.name + _TOOLS[target][2])
    if path.exists() and not _may_replace(path.read_text(), text, target):
        raise InputError(
            f"'{path}' holds another job; remove it if that one has ended, or give "
            "another --name"
        )
    write_text_atomically(path, text)
    command = [tool, "apply", "--filename", str(path)]
    if target == "tpu-vm":
        command = ["bash", str(path), "up"]
    if target == "slurm":
        command = [tool, str(path)]
    code = subprocess.run(command, check=False).returncode
    # The command has printed its own message.
    if code:
        raise InputError(
            f"`{shlex.join(command)}` failed with exit code {code}; its own message "
            "says why"
        )


def _may_replace(old: str, text: str, target: Target) -> bool:
    """Whether a file may be replaced: by the same job, or servers by new servers."""
    if target != "serving":
        return old == text
    # The first line names the kind of the first object's API: no training job has it.
    return old.partition("\n")[0] == text.partition("\n")[0]
