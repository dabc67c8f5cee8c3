"""Verbs that plan a run before it starts: config, describe, compile.

A verb imports what it calls when it runs, so that the others need no JAX.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from tokenrec.cli.arguments import (
    add_config_flags,
    add_topology_flags,
    config_from_flags,
    mesh,
)
from tokenrec.cli.parser import Parser, add_verb
from tokenrec.config.load import load_config, shipped_configs
from tokenrec.runtime.files import write_json
from tokenrec.runtime.paths import path_argument

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verbs of this module; return their parsers by the words of the verb."""
    return {
        "config": _add_config(verbs),
        "describe": _add_describe(verbs),
        "compile": _add_compile(verbs),
    }


def _add_config(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "config",
        _config,
        "list the config fields: values, types, documentation",
    )
    parser.add_argument(
        "config",
        nargs="?",
        metavar="NAME_OR_FILE",
        help="config whose values are listed: a Python file, which is run; a run's "
        f"config.json; or one of {', '.join(shipped_configs())} (default: a config of "
        "all defaults). --config.FIELD=VALUE overrides a field",
    )
    parser.add_argument(
        "--diff",
        action="store_true",
        help="list only the fields that differ from their defaults",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list of the fields"
    )
    return parser


def _config(args: argparse.Namespace) -> None:
    from tokenrec.config import reference

    config = load_config(args.config, args.overrides)
    # Without a config and overrides the JSON documents the fields alone.
    has_values = bool(args.config or args.overrides)
    if args.json:
        records = reference.to_records(config if has_values else None, diff=args.diff)
        print(json.dumps(records, indent=1))
    elif args.diff:
        print(reference.to_diff(config))
    else:
        print(reference.to_text(config))


def _add_describe(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "describe",
        _describe,
        "print the size, token layout, attention and FLOPs of a config",
        "It reads the schema of the data set, or a planned schema (data.schema) if there "
        "is none, and runs no model.",
    )
    add_config_flags(parser)
    parser.add_argument(
        "--json", type=path_argument, help="write the figures to this file"
    )
    return parser


def _describe(args: argparse.Namespace) -> None:
    # A wrong config is reported before JAX is imported, which takes seconds.
    config = config_from_flags(args)
    from tokenrec.planner.describe import describe, to_text
    from tokenrec.planner.planned_schema import resolve_schema, resolve_steps

    schema, origin = resolve_schema(config)
    description = describe(resolve_steps(config), schema)
    if args.json:
        write_json(args.json, description)
    print(origin)
    print(to_text(description))


def _add_compile(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "compile",
        _compile,
        "compile the train step ahead of time for a TPU topology; no TPU needed",
        "It reports the memory of a device, the collectives and a roofline, and ends "
        "with exit code 3 if the step does not fit.",
    )
    add_config_flags(parser)
    add_topology_flags(parser)
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument(
        "--mesh",
        type=mesh,
        help="mesh to use instead of the config's, such as data=8,fsdp=64",
    )
    shapes.add_argument(
        "--sweep",
        action="store_true",
        help="rank meshes, model.remat and batches by a formula, compile the best five, "
        "and order them by the compiler's schedule",
    )
    parser.add_argument(
        "--json",
        type=path_argument,
        help="write the figures to this file; with --sweep a list of them",
    )
    return parser


def _compile(args: argparse.Namespace) -> None:
    config = config_from_flags(args)
    from tokenrec.planner.compile import compile_config
    from tokenrec.planner.report import sweep_text, to_text
    from tokenrec.planner.sweep import compile_best

    if args.sweep:
        results = compile_best(
            config,
            args.topology,
            args.slices,
            say=lambda line: print(line, file=sys.stderr),
        )
    else:
        results = [compile_config(config, args.topology, args.slices, args.mesh)]
    if args.json:
        write_json(args.json, results if args.sweep else results[0])
    print(sweep_text(results) if args.sweep else to_text(results[0]))
    if not any(result["fits"] for result in results):
        raise MemoryError(
            f"the train step does not fit {results[0]['device_kind']}; see the largest "
            "arrays above"
        )
