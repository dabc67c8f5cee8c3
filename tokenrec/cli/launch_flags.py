"""Flags of the verb `launch`, in one group for each target that takes them."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from tokenrec.cli.arguments import (
    FlagHolder,
    add_config_flags,
    memory_size,
    whole_number,
)
from tokenrec.cli.parser import Parser
from tokenrec.launch.server_job import SERVER_LIMITS

SERVING = "serving"
TARGETS = ("gke", "tpu-vm", "slurm", SERVING)
_TRAINING = ("gke", "tpu-vm", "slurm")


def add_flags(parser: Parser) -> None:
    """Add all flags of the verb.

    The parsed arguments then have `flag_groups`: pairs of the targets that take the
    flags of a group, and the defaults of these flags.
    """
    parser.add_argument(
        "--target",
        choices=TARGETS,
        required=True,
        help="what to start: a training job on GKE, on TPU VMs or under Slurm, or "
        "servers on Kubernetes",
    )
    _add_shared_flags(parser)
    groups: list[tuple[tuple[str, ...], dict[str, object]]] = []
    for title, targets, add in _GROUPS:
        group = parser.add_argument_group(title)
        add(group)
        groups.append((targets, _defaults(group)))
    parser.set_defaults(flag_groups=groups)


def _defaults(group: argparse._ArgumentGroup) -> dict[str, object]:
    """Default of every flag of a group."""
    return {action.dest: action.default for action in group._group_actions}


def _add_shared_flags(parser: Parser) -> None:
    parser.add_argument(
        "--name",
        help="name of the job, and of its folder in the bucket or in --runs (default: "
        "that of the config; of servers: that of the artifact's folder)",
    )
    parser.add_argument(
        "--image",
        help="container image, HOST/PATH/NAME:TAG; launch/Dockerfile builds one for "
        "training, launch/serving/Dockerfile one for serving; under Slurm also a file, "
        "/PATH/FILE.sqsh",
    )
    parser.add_argument(
        "--topology",
        help="TPU topology of each slice, such as v5e:16x16 or v5p:8x8x8; or GPUs, "
        "nodes x GPUs of a node, such as h100:2x8; of each server a TPU, such as "
        "v5e:1x1 (default of servers: no TPU)",
    )
    parser.add_argument(
        "--grace-seconds",
        type=whole_number,
        help="seconds from the signal to stop until the process is killed, in which it "
        "saves a checkpoint (default: 300) or finishes requests (default: 60)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the job and start nothing"
    )


def _add_account_flags(group: FlagHolder) -> None:
    group.add_argument(
        "--service-account",
        help="account that may use the bucket: its name on Kubernetes, its e-mail "
        "address on TPU VMs",
    )


def _add_namespace_flags(group: FlagHolder) -> None:
    group.add_argument("--namespace", help="Kubernetes namespace (default: default)")


def _add_training_flags(group: FlagHolder) -> None:
    add_config_flags(group, required=False)
    group.add_argument(
        "--slices",
        type=whole_number,
        default=1,
        help="number of equal TPU slices, joined by the data-centre network "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--max-restarts",
        type=whole_number,
        default=10,
        help="restarts after a crash; preemptions do not count (default: %(default)s)",
    )
    group.add_argument(
        "--skip-compile",
        action="store_true",
        help="do not compile the train step first; for GPUs it never is",
    )


def _add_cloud_flags(group: FlagHolder) -> None:
    group.add_argument(
        "--bucket",
        help="Cloud Storage bucket: data sets in data/, checkpoints and logs in runs/",
    )
    group.add_argument(
        "--spot",
        action="store_true",
        help="use Spot capacity, which is cheaper and may be taken away",
    )


def _add_gke_flags(group: FlagHolder) -> None:
    group.add_argument(
        "--kueue-queue",
        help="local queue of Kueue, which holds the job back until there is room for "
        "all of it (default: no queue)",
    )
    group.add_argument(
        "--priority-class",
        help="WorkloadPriorityClass of Kueue with --kueue-queue, else PriorityClass of the "
        "pods (default: that of the cluster)",
    )
    group.add_argument(
        "--ttl-seconds",
        type=whole_number,
        help="seconds until a job that has ended is deleted, its logs too (default: "
        "never)",
    )
    group.add_argument(
        "--host-network",
        action=argparse.BooleanOptionalAction,
        help="use the network of the hosts, which is faster between slices; then the "
        "account of the nodes must be allowed to write the bucket (default: with "
        "several slices)",
    )


def _add_tpu_vm_flags(group: FlagHolder) -> None:
    group.add_argument("--project", help="Google Cloud project")
    group.add_argument("--zone", help="Google Cloud zone")
    group.add_argument(
        "--gcsfuse-sha256",
        metavar="DIGEST",
        help="SHA-256 of the package of gcsfuse that TPU VMs install "
        "(launch/README.md); 'installed' if their image has it",
    )


def _add_slurm_flags(group: FlagHolder) -> None:
    group.add_argument(
        "--runs",
        help="folder of the runs, which all nodes see, or gs://BUCKET/FOLDER",
    )
    group.add_argument(
        "--venv",
        metavar="DIR",
        help="Python environment with tokenrec, which all nodes see; or give --image",
    )
    group.add_argument("--partition", help="partition (default: that of the cluster)")
    group.add_argument(
        "--account", help="account that pays (default: that of the user)"
    )
    group.add_argument(
        "--time-limit",
        help="time after which the job is queued again, such as 12:00:00 or 2-12 "
        "(default: that of the partition)",
    )
    group.add_argument(
        "--cpus-per-gpu",
        type=whole_number,
        default=8,
        help="CPU cores for each GPU (default: %(default)s)",
    )
    group.add_argument(
        "--min-nodes",
        type=whole_number,
        help="nodes of --topology that are enough to start with, for a run with "
        "train.elastic (default: all)",
    )


def _add_serving_flags(group: FlagHolder) -> None:
    group.add_argument(
        "--model",
        help="folder that `tokenrec export` wrote: pvc://CLAIM/FOLDER in a "
        "PersistentVolumeClaim, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER",
    )
    group.add_argument(
        "--fetch-image",
        help="container image with gcloud or aws, which copies a --model from its "
        "bucket",
    )
    group.add_argument(
        "--replicas",
        type=whole_number,
        default=2,
        help="number of servers (default: %(default)s)",
    )
    group.add_argument(
        "--max-replicas",
        type=whole_number,
        help="let Kubernetes add servers up to this number when their CPUs are busy",
    )
    group.add_argument(
        "--cpus",
        type=whole_number,
        default=2,
        help="CPUs that a server requests (default: %(default)s)",
    )
    group.add_argument(
        "--memory",
        type=memory_size,
        default=memory_size("4GiB"),
        help="memory of a server, such as 4GiB, the default",
    )
    group.add_argument("--gpu", action="store_true", help="one NVIDIA GPU a server")
    group.add_argument(
        "--compile-cache-claim",
        metavar="CLAIM",
        help="PersistentVolumeClaim that keeps compiled programs, written by all "
        "servers (default: a folder that lives as long as its pod)",
    )
    for flag in SERVER_LIMITS:
        group.add_argument(
            f"--{flag}",
            type=whole_number,
            help=f"--{flag} of `tokenrec serve` (default: its default)",
        )
    group.add_argument(
        "--allow-missing",
        metavar="FEATURES",
        help="--allow-missing of `tokenrec serve` (default: no feature)",
    )


_GROUPS: tuple[tuple[str, tuple[str, ...], Callable[[FlagHolder], None]], ...] = (
    ("training (gke, tpu-vm, slurm)", _TRAINING, _add_training_flags),
    ("Google Cloud (gke, tpu-vm)", ("gke", "tpu-vm"), _add_cloud_flags),
    ("accounts (gke, tpu-vm, serving)", ("gke", "tpu-vm", SERVING), _add_account_flags),
    ("Kubernetes (gke, serving)", ("gke", SERVING), _add_namespace_flags),
    ("GKE (gke)", ("gke",), _add_gke_flags),
    ("TPU VMs (tpu-vm)", ("tpu-vm",), _add_tpu_vm_flags),
    ("Slurm (slurm)", ("slurm",), _add_slurm_flags),
    ("serving", (SERVING,), _add_serving_flags),
)
