"""From a planned job to the cloud: rendered, compiled to see that it fits, kept in a file and started."""

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

Target = Literal["gke", "tpu-vm"]

_INSTALL = {
    "kubectl": "https://kubernetes.io/docs/tasks/tools",
    "gcloud": "https://cloud.google.com/sdk/docs/install",
}


def render(
    job: LaunchJob,
    target: Target,
    *,
    service_account: str | None,
    namespace: str | None,
    project: str | None,
    zone: str | None,
) -> str:
    """What starts the job: YAML for "gke", a shell script for "tpu-vm".

    Raises:
      InputError: something is missing, malformed, or belongs to the other target.
    """
    if target == "gke":
        _refuse(target, project=project, zone=zone)
        return gke.manifests(
            job,
            namespace=namespace or "default",
            service_account=service_account or "default",
        )
    _refuse(target, namespace=namespace)
    return tpu_vm.script(
        job, project=project, zone=zone, service_account=service_account
    )


def _refuse(target: Target, **given: str | None) -> None:
    for field, value in given.items():
        if value is not None:
            raise InputError(
                f"{field}='{value}' says nothing to target='{target}'; leave --{field} out"
            )


def check_fits(config: Config, topology: str, slices: int) -> str:
    """Compiles the train step for the slices, and returns what `tokenrec compile` says of it.

    Raises:
      InputError: the config cannot be compiled for them.
      MemoryError: it does not fit; the message names the largest arrays.
    """
    from tokenrec.planner.compile import compile_config
    from tokenrec.planner.report import to_text

    found = compile_config(config, topology, slices)
    if not found["fits"]:
        raise MemoryError(to_text(found))
    return to_text(found)


def find_tool(target: Target) -> str:
    """Path of the command that starts a job.

    Raises:
      InputError: it is not installed.
    """
    name = {"gke": "kubectl", "tpu-vm": "gcloud"}[target]
    path = shutil.which(name)
    if path is None:
        raise InputError(
            f"target='{target}' needs '{name}', which is not installed here; install it ({_INSTALL[name]}), or add "
            "--dry-run and start the job where it is"
        )
    return path


def start(text: str, path: Path, target: Target, tool: str) -> None:
    """Keeps a rendered job beside `path`, with the suffix of its kind, and hands it to the cloud.

    Raises:
      InputError: another job is kept there, or the cloud's command fails.
    """
    path = path.with_name(path.name + {"gke": ".yaml", "tpu-vm": ".sh"}[target])
    if path.exists() and path.read_text() != text:
        raise InputError(
            f"'{path}' holds another job; remove it if that one has ended, or give another --name"
        )
    write_text_atomically(path, text)
    command = (
        [tool, "apply", "--filename", str(path)]
        if target == "gke"
        else ["bash", str(path), "up"]
    )
    code = subprocess.run(command, check=False).returncode
    if code:
        raise InputError(
            f"`{shlex.join(command)}` failed with exit code {code}; its own message says why"
        )
