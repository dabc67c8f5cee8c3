"""Render a job as a shell script for TPU VMs: its variables, then tpu_vm.sh."""

from __future__ import annotations

import dataclasses
import re
from importlib import resources
from pathlib import PurePosixPath

from tokenrec.errors import InputError
from tokenrec.launch.job import (
    FINAL_EXITS,
    MOUNT,
    STOPPED_EXITS,
    USER_ID,
    LaunchJob,
)
from tokenrec.launch.shell import assignment
from tokenrec.launch.slices import Slice

# Cloud Storage FUSE, which mounts the bucket on hosts that do not have it.
GCSFUSE_VERSION = "3.4.4"
INSTALLED = "installed"

# Flag -> pattern of its values, and the command that lists them.
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


@dataclasses.dataclass(frozen=True)
class TpuVmOptions:
    """What only the TPU VM service asks for.

    Attributes:
      project: project of Google Cloud.
      zone: zone of the TPU VMs.
      service_account: e-mail of an account that may read and write the bucket; None:
        the default account of the project.
      gcsfuse_sha256: digest of the package of gcsfuse, which every host installs as
        root; "installed": the hosts have it.
    """

    project: str | None = None
    zone: str | None = None
    service_account: str | None = None
    gcsfuse_sha256: str | None = None


def script(job: LaunchJob, options: TpuVmOptions) -> str:
    """Render a job as a shell script whose verbs call gcloud.

    Args:
      job: the job.
      options: what only the TPU VM service asks for.

    Raises:
      InputError: project, zone or digest is missing or malformed, or the TPU VM service
        does not serve the slice.
    """
    machines = job.machines
    assert isinstance(machines, Slice)
    assert job.image
    # The script copies the config there, and every host reads it.
    config_file = f"{job.workdir}/launch_config.py"
    variables: dict[str, str | list[str]] = {
        "NAME": job.name,
        "PROJECT": _check_field("project", options.project),
        "ZONE": _check_field("zone", options.zone),
        "ACCELERATOR_TYPE": machines.accelerator_type,
        "RUNTIME_VERSION": machines.generation.runtime,
        "NODES": _node_flags(job, options.service_account),
        "BUCKET": job.bucket,
        "IMAGE": job.image,
        "DATA": PurePosixPath(job.data).name,
        "MOUNT": str(MOUNT),
        "USER_ID": str(USER_ID),
        "GCSFUSE_VERSION": GCSFUSE_VERSION,
        "GCSFUSE_SHA256": _check_digest(options.gcsfuse_sha256),
        "CONFIG_OBJECT": "" if job.config_text is None else config_file,
        "CONFIG_TEXT": job.config_text or "",
        "ENVIRONMENT": [
            f"--env={name}={value}" for name, value in job.environment.items()
        ],
        "COMMAND": job.command(config_file),
        "FINAL_EXITS": " ".join(map(str, FINAL_EXITS)),
        "STOPPED_EXITS": " ".join(str(int(code)) for code in STOPPED_EXITS),
        "MAX_RESTARTS": str(job.max_restarts),
        "GRACE_SECONDS": str(job.grace_seconds),
    }
    lines = [assignment(name, value) for name, value in variables.items()]
    template = resources.files(__package__).joinpath("tpu_vm.sh").read_text()
    shebang, _, rest = template.partition("\n")
    return "\n".join([shebang, *lines, rest])


def _node_flags(job: LaunchJob, service_account: str | None) -> list[str]:
    """Flags of `gcloud compute tpus queued-resources create`."""
    # One node has an id; several are numbered after a prefix.
    flags = ["--node-id", job.name]
    if job.slices > 1:
        flags = ["--node-count", str(job.slices), "--node-prefix", job.name]
    if service_account:
        account = _check_field("service_account", service_account)
        flags += ["--service-account", account]
    if job.spot:
        flags.append("--spot")
    return flags


def _check_field(field: str, value: str | None) -> str:
    pattern, list_command = _FIELDS[field]
    if not value:
        raise InputError(
            f"{field} is not given; target='tpu-vm' needs --{field}; `{list_command}` "
            "lists them"
        )
    if not pattern.fullmatch(value):
        raise InputError(
            f"{field}='{value}' is not one of Google Cloud's; `{list_command}` lists "
            "them"
        )
    return value


def _check_digest(value: str | None) -> str:
    package = f"gcsfuse_{GCSFUSE_VERSION}_amd64.deb"
    if not value:
        raise InputError(
            "gcsfuse_sha256 is not given; target='tpu-vm' needs --gcsfuse-sha256, the "
            f"SHA-256 of {package}, because every host installs it as root: download it "
            "from https://github.com/GoogleCloudPlatform/gcsfuse/releases, check where "
            "it comes from, and run `sha256sum` on it; or give "
            f"--gcsfuse-sha256={INSTALLED} if the image of the hosts has gcsfuse"
        )
    if value != INSTALLED and not re.fullmatch(r"[0-9a-f]{64}", value):
        raise InputError(
            f"gcsfuse_sha256='{value}' is not a SHA-256 of 64 digits 0-9 and a-f; take "
            f"it from `sha256sum {package}`, or give {INSTALLED}"
        )
    return value
