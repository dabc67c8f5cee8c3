"""Render a planned job, check that it fits, write it to a file, and start it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Literal

from tokenrec.config import Config
from tokenrec.errors import InputError
from tokenrec.launch import gke, tpu_vm
from tokenrec.launch.job import LaunchJob
from tokenrec.runtime.files import write_text_atomically

# Services that run a training job; servers run on Kubernetes ("serving").
TrainingTarget = Literal["gke", "tpu-vm"]
Target = Literal["gke", "tpu-vm", "serving"]

# Command of the cloud -> page that says how to install it.
_INSTALL = {
    "kubectl": "https://kubernetes.io/docs/tasks/tools",
    "gcloud": "https://cloud.google.com/sdk/docs/install",
}


def render(
    job: LaunchJob,
    target: TrainingTarget,
    *,
    service_account: str | None,
    namespace: str | None,
    project: str | None,
    zone: str | None,
    gcsfuse_sha256: str | None,
) -> str:
    """Render a training job: YAML for "gke", a shell script for "tpu-vm".

    Args:
      job: the job.
      target: service that runs the job.
      service_account: account that may use the bucket: a name for "gke", an e-mail for
        "tpu-vm"; None: the default one.
      namespace: namespace of Kubernetes; only for "gke"; None: "default".
      project: project of Google Cloud; only for "tpu-vm".
      zone: zone of the TPU VMs; only for "tpu-vm".
      gcsfuse_sha256: see `tpu_vm.script`; only for "tpu-vm".

    Raises:
      InputError: an argument is missing, malformed, or belongs to the other target.
    """
    if target == "gke":
        _refuse(target, project=project, zone=zone, gcsfuse_sha256=gcsfuse_sha256)
        return gke.manifests(
            job,
            namespace=namespace or "default",
            service_account=service_account or "default",
        )
    _refuse(target, namespace=namespace)
    return tpu_vm.script(
        job,
        project=project,
        zone=zone,
        service_account=service_account,
        gcsfuse_sha256=gcsfuse_sha256,
    )


def _refuse(target: TrainingTarget, **given: str | None) -> None:
    for field, value in given.items():
        if value is not None:
            raise InputError(
                f"{field}='{value}' does not apply to target='{target}'; leave "
                f"--{field.replace('_', '-')} out"
            )


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
    name = "gcloud" if target == "tpu-vm" else "kubectl"
    path = shutil.which(name)
    if path is None:
        raise InputError(
            f"target='{target}' needs '{name}', which is not installed here; install "
            f"it ({_INSTALL[name]}), or add --dry-run and start the job where it is "
            "installed"
        )
    return path


def start(text: str, path: Path, target: Target, tool: str) -> None:
    """Write a rendered job to a file, and start it.

    Servers that run already are updated: their file is replaced.

    Args:
      text: the rendered job.
      path: file to write, without its suffix, which is `.yaml` or `.sh`.
      target: service that runs the job.
      tool: path of the command that starts it.

    Raises:
      InputError: the file holds another job, or the command fails.
    """
    # The file stays: it is what stops or deletes the job later, and it shows what runs.
    # Writing the same job again does no harm.
    suffix = ".sh" if target == "tpu-vm" else ".yaml"
    path = path.with_name(path.name + suffix)
    if path.exists() and not _may_replace(path.read_text(), text, target):
        raise InputError(
            f"'{path}' holds another job; remove it if that one has ended, or give "
            "another --name"
        )
    write_text_atomically(path, text)
    command = [tool, "apply", "--filename", str(path)]
    if target == "tpu-vm":
        command = ["bash", str(path), "up"]
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
