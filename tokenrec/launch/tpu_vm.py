"""A job as a shell script for TPU VMs: variables, then `tpu_vm.sh` as it stands."""

from __future__ import annotations

import re
import shlex
from importlib import resources

from tokenrec.errors import InputError
from tokenrec.launch.job import (
    FINAL_EXITS,
    MOST_RENAMED,
    MOUNT,
    SAVED_EXIT,
    USER_ID,
    LaunchJob,
)

_FIELDS = {
    "project": (
        re.compile(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]"),
        "gcloud projects list",
    ),
    "zone": (
        re.compile(r"[a-z]+-[a-z]+\d+-[a-z]"),
        "gcloud compute tpus locations list",
    ),
    "service_account": (
        re.compile(r"[-.\w]+@[-.\w]+"),
        "gcloud iam service-accounts list",
    ),
}


def script(
    job: LaunchJob,
    *,
    project: str | None,
    zone: str | None,
    service_account: str | None,
) -> str:
    """The job as a shell script whose verbs call gcloud.

    Args:
      service_account: e-mail of one that may read and write the bucket; None is the project's default.

    Raises:
      InputError: a missing or malformed project or zone, or a slice that the TPU VM service does not serve.
    """
    nodes = (
        ["--node-id", job.name]
        if job.slices == 1
        else ["--node-count", str(job.slices), "--node-prefix", job.name]
    )
    account = (
        ["--service-account", _checked("service_account", service_account)]
        if service_account
        else []
    )
    config_file = job.workdir / "launch_config.py"
    variables: dict[str, str | list[str]] = {
        "NAME": job.name,
        "PROJECT": _checked("project", project),
        "ZONE": _checked("zone", zone),
        "ACCELERATOR_TYPE": job.slice.accelerator_type,
        "RUNTIME_VERSION": job.slice.generation.runtime,
        "NODES": [*nodes, *account, *(["--spot"] if job.spot else [])],
        "BUCKET": job.bucket,
        "IMAGE": job.image,
        "DATA": job.data,
        "MOUNT": str(MOUNT),
        "USER_ID": str(USER_ID),
        "MOST_RENAMED": str(MOST_RENAMED),
        "CONFIG_OBJECT": str(config_file.relative_to(MOUNT))
        if job.config_text is not None
        else "",
        "CONFIG_TEXT": job.config_text or "",
        "ENVIRONMENT": [
            f"--env={name}={value}" for name, value in job.environment.items()
        ],
        "COMMAND": job.command(config_file),
        "FINAL_EXITS": " ".join(map(str, FINAL_EXITS)),
        "SAVED_EXIT": str(SAVED_EXIT),
        "MAX_RESTARTS": str(job.max_restarts),
        "GRACE_SECONDS": str(job.grace_seconds),
    }
    lines = [f"{name}={_shell_value(value)}" for name, value in variables.items()]
    body = resources.files(__package__).joinpath("tpu_vm.sh").read_text()
    shebang, _, rest = body.partition("\n")
    return "\n".join([shebang, *lines, rest])


def _shell_value(value: str | list[str]) -> str:
    if isinstance(value, str):
        return shlex.quote(value)
    return f"({shlex.join(value)})"


def _checked(field: str, value: str | None) -> str:
    pattern, remedy = _FIELDS[field]
    if not value:
        raise InputError(
            f"{field} is not given; target='tpu-vm' needs --{field}; `{remedy}` lists them"
        )
    if not pattern.fullmatch(value):
        raise InputError(
            f"{field}='{value}' is not one of Google Cloud's; `{remedy}` lists them"
        )
    return value
