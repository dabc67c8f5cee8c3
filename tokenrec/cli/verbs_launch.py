"""The verb `launch`: a training job on TPUs or GPUs, or servers on Kubernetes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tokenrec.cli.arguments import config_from_flags
from tokenrec.cli.launch_flags import SERVING, add_flags
from tokenrec.cli.parser import Parser, add_verb
from tokenrec.errors import InputError
from tokenrec.launch.server_job import SERVER_LIMITS

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers
    from tokenrec.launch.start import Options


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verb of this module; return its parser by its name."""
    return {"launch": _add_launch(verbs)}


def _add_launch(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "launch",
        _launch,
        "start a training job on TPUs or GPUs, or servers of an exported run",
        "A train step is compiled for the TPU topology first, to see that it fits.",
    )
    add_flags(parser)
    return parser


def _refuse_foreign_flags(args: argparse.Namespace) -> None:
    """Refuse flags that were given and do not belong to the target."""
    for targets, defaults in args.flag_groups:
        for name, default in {} if args.target in targets else defaults.items():
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
    _refuse_foreign_flags(args)
    if args.target != SERVING:
        _require(args, "config", "topology")
        _launch_training(args)
        return
    if args.overrides:
        raise InputError(
            f"config.{args.overrides[0]} does not apply to target='{SERVING}': "
            "the config of a run is in its artifact; leave --config out"
        )
    _launch_servers(args)


def _launch_training(args: argparse.Namespace) -> None:
    config = config_from_flags(args)
    from tokenrec.launch.job import GRACE_SECONDS, plan_job
    from tokenrec.launch.slurm import SlurmOptions, check_min_nodes, check_paths
    from tokenrec.launch.start import check_fits, find_tool, render, start

    grace = args.grace_seconds
    job = plan_job(
        config,
        args.target,
        source=args.config,
        overrides=tuple(args.overrides),
        topology=args.topology,
        slices=args.slices,
        name=args.name,
        image=args.image,
        bucket=args.bucket,
        runs=args.runs,
        max_restarts=args.max_restarts,
        grace_seconds=GRACE_SECONDS if grace is None else grace,
        spot=args.spot,
    )
    options = _options(args)
    if isinstance(options, SlurmOptions):
        check_min_nodes(config, job.machines, options.min_nodes)
    text = render(job, options)
    # The tool is looked for before the step is compiled, which takes minutes.
    tool = None if args.dry_run else find_tool(args.target)
    if tool and isinstance(options, SlurmOptions):
        check_paths(job, options)
    if job.machines.platform == "tpu" and not args.skip_compile:
        print(check_fits(config, args.topology, args.slices), file=sys.stderr)
    if tool is None:
        print(text, end="")
    else:
        start(text, Path(job.name), args.target, tool)


def _options(args: argparse.Namespace) -> Options:
    """What only the target asks for."""
    from tokenrec.launch.gke_pod import GkeOptions
    from tokenrec.launch.slurm import SlurmOptions
    from tokenrec.launch.tpu_vm import TpuVmOptions

    if args.target == "gke":
        return GkeOptions(
            namespace=args.namespace or "default",
            service_account=args.service_account or "default",
            kueue_queue=args.kueue_queue,
            priority_class=args.priority_class,
            ttl_seconds=args.ttl_seconds,
            host_network=args.host_network,
        )
    if args.target == "tpu-vm":
        return TpuVmOptions(
            project=args.project,
            zone=args.zone,
            service_account=args.service_account,
            gcsfuse_sha256=args.gcsfuse_sha256,
        )
    return SlurmOptions(
        venv=args.venv,
        partition=args.partition,
        account=args.account,
        time_limit=args.time_limit,
        cpus_per_gpu=args.cpus_per_gpu,
        min_nodes=args.min_nodes,
    )


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
