"""The verb `launch`: a training job on TPUs, or servers on Kubernetes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tokenrec.cli.arguments import (
    FlagHolder,
    add_config_flags,
    config_from_flags,
    memory_size,
    whole_number,
)
from tokenrec.cli.parser import Parser, add_verb
from tokenrec.errors import InputError
from tokenrec.launch.server_job import SERVER_LIMITS

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers

_SERVING = "serving"


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verb of this module; return its parser by its name."""
    return {"launch": _add_launch(verbs)}


def _add_launch(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "launch",
        _launch,
        "start a training job on Cloud TPUs, or servers of an exported run",
        "A train step is compiled for the topology first, to see that it fits.",
    )
    parser.add_argument(
        "--target",
        choices=("gke", "tpu-vm", _SERVING),
        required=True,
        help="what to start: a training job on GKE or on TPU VMs, or servers on "
        "Kubernetes",
    )
    _add_shared_flags(parser)
    training = parser.add_argument_group("training (gke, tpu-vm)")
    _add_training_flags(training)
    serving = parser.add_argument_group("serving")
    _add_serving_flags(serving)
    parser.set_defaults(
        training_flags=_defaults(training), serving_flags=_defaults(serving)
    )
    return parser


def _add_shared_flags(parser: Parser) -> None:
    parser.add_argument(
        "--name",
        help="name of the job, and of its folder in the bucket (default: that of the "
        "config; of servers: that of the artifact's folder)",
    )
    parser.add_argument(
        "--image",
        help="container image, HOST/PATH/NAME:TAG; launch/Dockerfile builds one for "
        "training, launch/serving/Dockerfile one for serving",
    )
    parser.add_argument(
        "--topology",
        help="TPU topology of each slice, such as v5e:16x16 or v5p:8x8x8; of each "
        "server, such as v5e:1x1 (default of servers: no TPU)",
    )
    parser.add_argument(
        "--service-account",
        help="account that may use the bucket: its name on Kubernetes, its e-mail "
        "address on TPU VMs",
    )
    parser.add_argument(
        "--namespace", help="Kubernetes namespace (default: default); not for TPU VMs"
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


def _add_training_flags(group: FlagHolder) -> None:
    add_config_flags(group, required=False)
    group.add_argument(
        "--slices",
        type=whole_number,
        default=1,
        help="number of equal slices, joined by the data-centre network "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--bucket",
        help="Cloud Storage bucket: data sets in data/, checkpoints and logs in runs/",
    )
    group.add_argument("--project", help="Google Cloud project, for TPU VMs")
    group.add_argument("--zone", help="Google Cloud zone, for TPU VMs")
    group.add_argument(
        "--gcsfuse-sha256",
        metavar="DIGEST",
        help="SHA-256 of the package of gcsfuse that TPU VMs install "
        "(launch/README.md); 'installed' if their image has it",
    )
    group.add_argument(
        "--spot",
        action="store_true",
        help="use Spot capacity, which is cheaper and may be taken away",
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
        help="do not compile the train step first",
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


def _defaults(group: argparse._ArgumentGroup) -> dict[str, object]:
    """Default of every flag of a group."""
    return {action.dest: action.default for action in group._group_actions}


def _refuse(args: argparse.Namespace, flags: dict[str, object]) -> None:
    """Refuse flags that were given and do not belong to the target."""
    for name, default in flags.items():
        value = getattr(args, name)
        if value != default:
            raise InputError(
                f"{name}='{value}' does not apply to target='{args.target}'; leave "
                f"--{name.replace('_', '-')} out"
            )


def _require(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            raise InputError(
                f"{name} is not given; target='{args.target}' needs --{name}"
            )


def _launch(args: argparse.Namespace) -> None:
    if args.target == _SERVING:
        _refuse(args, args.training_flags)
        if args.overrides:
            raise InputError(
                f"config.{args.overrides[0]} does not apply to target='{_SERVING}': "
                "the config of a run is in its artifact; leave --config out"
            )
        _launch_servers(args)
    else:
        _refuse(args, args.serving_flags)
        _require(args, "config", "topology")
        _launch_training(args)


def _launch_training(args: argparse.Namespace) -> None:
    config = config_from_flags(args)
    from tokenrec.launch.job import GRACE_SECONDS, plan_job
    from tokenrec.launch.start import check_fits, find_tool, render, start

    grace = args.grace_seconds
    job = plan_job(
        config,
        source=args.config,
        overrides=tuple(args.overrides),
        topology=args.topology,
        slices=args.slices,
        name=args.name,
        image=args.image,
        bucket=args.bucket,
        max_restarts=args.max_restarts,
        grace_seconds=GRACE_SECONDS if grace is None else grace,
        spot=args.spot,
    )
    text = render(
        job,
        args.target,
        service_account=args.service_account,
        namespace=args.namespace,
        project=args.project,
        zone=args.zone,
        gcsfuse_sha256=args.gcsfuse_sha256,
    )
    # The tool is looked for before the step is compiled, which takes minutes.
    tool = None if args.dry_run else find_tool(args.target)
    if not args.skip_compile:
        print(check_fits(config, args.topology, args.slices), file=sys.stderr)
    if tool is None:
        print(text, end="")
    else:
        start(text, Path(job.name), args.target, tool)


def _launch_servers(args: argparse.Namespace) -> None:
    from tokenrec.launch import server_manifests
    from tokenrec.launch.server_job import plan_server
    from tokenrec.launch.start import find_tool, start

    job = plan_server(
        model=args.model,
        name=args.name,
        image=args.image,
        fetch_image=args.fetch_image,
        replicas=args.replicas,
        max_replicas=args.max_replicas,
        cpus=args.cpus,
        memory=args.memory,
        gpu=args.gpu,
        topology=args.topology,
        compile_cache_claim=args.compile_cache_claim,
        grace_seconds=args.grace_seconds,
        limits={flag: getattr(args, flag.replace("-", "_")) for flag in SERVER_LIMITS},
        allow_missing=args.allow_missing,
    )
    text = server_manifests.manifests(
        job,
        namespace=args.namespace or "default",
        service_account=args.service_account or "default",
    )
    if args.dry_run:
        print(text, end="")
    else:
        start(text, Path(job.name), args.target, find_tool(args.target))
