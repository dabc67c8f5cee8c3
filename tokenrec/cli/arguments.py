"""Flags that several verbs share, and the types of argument values."""

from __future__ import annotations

import argparse
import dataclasses
import re
from datetime import date

from tokenrec.config import Config, MeshConfig
from tokenrec.config.load import load_config, shipped_configs
from tokenrec.data.source import SPLITS
from tokenrec.runtime.paths import path_argument

_AXES = [field.name for field in dataclasses.fields(MeshConfig)]


type FlagHolder = argparse.ArgumentParser | argparse._ArgumentGroup


def add_config_flags(parser: FlagHolder, *, required: bool = True) -> None:
    """Add `--config` and `--data`; `config_from_flags` reads them."""
    parser.add_argument(
        "--config",
        required=required,
        help="Python config file, which is run; a run's config.json; or one of "
        f"{', '.join(shipped_configs())}. --config.FIELD=VALUE overrides a field "
        "(`tokenrec config` lists the fields)",
    )
    parser.add_argument(
        "--data", help="folder of the prepared data set; overrides data.path"
    )


def config_from_flags(args: argparse.Namespace) -> Config:
    """Load the config that the flags of `add_config_flags` name.

    Raises:
      InputError: there is no such config, or it has problems.
    """
    return load_config(args.config, args.overrides, args.data or "")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a trained run, its checkpoint, and a split."""
    add_workdir_flag(parser, "folder of the run")
    parser.add_argument(
        "--split",
        choices=SPLITS,
        help="split of the data set (default: the one that it has, if it has one alone)",
    )
    parser.add_argument(
        "--checkpoint",
        type=checkpoint,
        default="best",
        help="best, latest, or the step of a checkpoint (default: %(default)s)",
    )
    add_run_data_flag(parser)
    add_distributed_flag(parser)


def add_workdir_flag(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--workdir`, the folder of a run."""
    parser.add_argument("--workdir", type=path_argument, required=True, help=text)


def add_run_data_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--data`, which replaces the data set of a run."""
    parser.add_argument(
        "--data",
        type=path_argument,
        help="folder of the prepared data set (default: that of the run)",
    )


def add_distributed_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--distributed`."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of a pod or cluster; start all of them with "
        "this same command",
    )


def add_topology_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--topology` and `--slices`, the TPU slices of a job."""
    parser.add_argument(
        "--topology",
        required=True,
        help="TPU topology of each slice, such as v5e:16x16 or v5p:8x8x8",
    )
    parser.add_argument(
        "--slices",
        type=whole_number,
        default=1,
        help="number of equal slices, joined by the data-centre network "
        "(default: %(default)s)",
    )


def whole_number(text: str) -> int:
    """Parse a whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 0 or more")
    return int(text)


def memory_size(text: str) -> int:
    """Parse a number of bytes with a unit.

    >>> memory_size("2GiB"), memory_size("512MiB"), memory_size("1.5GB")
    (2147483648, 536870912, 1500000000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a size of memory; write it as 2GiB or 512MiB"
        )
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit) + 1))


def mesh(text: str) -> MeshConfig:
    """Parse the sizes of mesh axes; axes that are not named keep their defaults.

    >>> mesh("data=4,fsdp=8")
    MeshConfig(data=4, fsdp=8, tensor=1, context=1)
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in _AXES or axis in sizes or not re.fullmatch(r"-?\d+", size):
            raise argparse.ArgumentTypeError(
                f"'{part}' is not AXIS=SIZE; write data=4,fsdp=8,tensor=1"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def day(text: str) -> str:
    """Parse a day."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a day; write YYYY-MM-DD"
        ) from None


def week_range(text: str) -> tuple[int, int]:
    """Parse weeks, such as 1-47 or 48."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()):
        raise argparse.ArgumentTypeError(
            f"'{text}' are no weeks; write FIRST-LAST, such as 1-47, or one week"
        )
    return int(first), int(last or first)


def checkpoint(text: str) -> str:
    """Parse the name of a checkpoint."""
    if text not in ("best", "latest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is neither best, latest nor a step")
    return text
