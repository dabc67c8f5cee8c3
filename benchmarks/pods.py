"""Compile five configs for TPU pods, and one of them for 16 to 512 chips.

    python -m benchmarks.pods [--configs NAME ...] [--pods TOPOLOGY ...]
                                                       three configs on five pods, and
                                                       language models on two
    python -m benchmarks.pods --weak-scaling           lrm_1b on 16 to 512 chips of v5p

No TPU is needed, and nothing is run. Each table row is `tokenrec compile` of the config
in bfloat16, with the streams per chip, the mesh and `model.remat` that `PLANS` has for
the kind of chip. Table sizes are those of the prepared data set under `TOKENREC_DATA`,
or else of a planned schema in configs/schemas/ ("planned"). `NAME+lora` is a language
model with `tuning.method=lora`: its weights are frozen, adapters are trained.
`NAME+text` is one whose history is the words of its titles, with fewer streams of a
chip, which are some ten times as long. Columns:

- `schedule_ms` and its parts, and `mfu_by_schedule`: what the compiler expects of its
  own schedule, with ring times for the network (tokenrec/planner/schedule.py);
- `compute_ms`, `memory_ms`, `network_ms`, `mfu_bound`: lower bounds by arithmetic
  (tokenrec/planner/roofline.py);
- bytes and FLOPs: of the compiled program.

`fsdp` has the chips of one or two whole axes of the torus, 64 at most, and `data` the
rest: over three axes XLA would not scatter gradients. In weak scaling the streams per
chip stay the same; `per_chip` is the rate of a chip over that of a chip of the smallest
pod, by the bound and by the schedule.

A finished table row is written at once, and skipped when the command is given again;
delete the result files to start over. Weak scaling takes the row of v5p:8x8x8 from the
first table if it is there. Some minutes a table row on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import kept_rows, run_script, write_result
from tokenrec.config import Config, MeshConfig
from tokenrec.config.load import load_config, shipped_configs
from tokenrec.planner.compile import compile_config
from tokenrec.planner.report import mesh_text

PODS = (
    ("v5p:4x4x4", 1),
    ("v5e:16x16", 1),
    ("v6e:16x16", 1),
    ("v5p:8x8x8", 1),
    ("v5p:4x4x8", 2),
)
SCALE = ("v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x8")
SCALED = "lrm_1b"
LONGEST_FSDP = 64


class Plan(NamedTuple):
    """How a kind of chip runs a config.

    Attributes:
      streams: streams of a chip.
      fsdp: most chips along `mesh.fsdp`.
      remat: `model.remat`.
      schema: planned schema where the data set is not prepared.
      pods: topologies to compile for; () for all of `PODS`.
    """

    streams: int
    fsdp: int
    remat: str
    schema: str = "kuairand_27k.json"
    pods: tuple[str, ...] = ()


PLANS = {
    ("lrm_1b", "v5p"): Plan(4, LONGEST_FSDP, "dots"),
    ("lrm_1b", "v5e"): Plan(4, LONGEST_FSDP, "dots"),
    ("lrm_1b", "v6e"): Plan(4, LONGEST_FSDP, "dots"),
    ("kuairand_27k", "v5p"): Plan(2, 1, "none"),
    ("kuairand_27k", "v5e"): Plan(2, 1, "none"),
    ("kuairand_27k", "v6e"): Plan(2, 1, "none"),
    ("kuairand_pure_uc", "v5p"): Plan(64, 1, "none"),
    ("kuairand_pure_uc", "v5e"): Plan(64, 1, "none"),
    ("kuairand_pure_uc", "v6e"): Plan(64, 1, "none"),
    **{
        (name + variant, kind): Plan(
            streams, LONGEST_FSDP, "dots", "complete_journey.json", pods
        )
        for name, kind, streams, pods in (
            ("lrm_gemma3_1b", "v5p", 16, ("v5p:4x4x4",)),
            ("lrm_gemma3_1b", "v5e", 16, ("v5e:16x16",)),
            ("lrm_qwen3_4b", "v5p", 16, ("v5p:4x4x4",)),
            # 16 streams need 24 of a chip's 16 GiB.
            ("lrm_qwen3_4b", "v5e", 8, ("v5e:16x16",)),
        )
        for variant in ("", "+lora")
    },
    ("lrm_gemma3_1b+text", "v5e"): Plan(
        1, LONGEST_FSDP, "dots", "complete_journey.json", ("v5e:16x16",)
    ),
}


def pod_row(name: str, topology: str, slices: int) -> dict[str, Any]:
    """Compile one config for one pod.

    Args:
      name: of the config; with "+lora" or "+text" behind it, a variant of it.
      topology: of each slice.
      slices: number of slices.

    Returns:
      A row of the table.
    """
    kind, _, size = topology.partition(":")
    plan = PLANS[name, kind]
    chips = slices * math.prod(map(int, size.split("x")))
    base, _, variant = name.partition("+")
    config = with_variant(load_config(str(shipped_configs()[base])), variant)
    fsdp = fsdp_chips([int(length) for length in size.split("x")], plan.fsdp)
    config = planned(config, plan, chips, MeshConfig(data=chips // fsdp, fsdp=fsdp))
    compiled = compile_config(config, topology, slices)
    by_part = compiled["bytes_per_device"]
    row = {
        "config": name,
        "topology": topology,
        "slices": slices,
        "chips": compiled["devices"],
        "mesh": mesh_text(compiled["mesh"]),
        "streams": plan.streams,
        "remat": plan.remat,
        "schema": compiled["schema"].split()[0],
        "compile_seconds": round(compiled["compile_seconds"], 1),
        "fits": compiled["fits"],
        "memory_share": by_part["total"]
        and by_part["total"] / compiled["memory_per_device"],
        **{
            f"{part}_mib": size and size / 2**20
            for part, size in by_part.items()
            if part not in ("inputs", "program")
        },
    }
    if "problem" in compiled:
        return row | {"problem": compiled["problem"].partition("\n")[0]}
    return row | {
        "tflop": compiled["flops_per_device"] / 1e12,
        "model_tflop": compiled["model_flops_per_device"] / 1e12,
        "collective_mib": sum(compiled["collective_bytes"].values()) / 2**20,
        "by_axis": ", ".join(
            f"{axes} {sum(kinds.values()) / 2**20:,.0f}"
            for axes, kinds in compiled["collective_bytes_by_axis"].items()
        ),
        "compute_ms": 1e3 * compiled["compute_seconds"],
        "memory_ms": 1e3 * compiled["memory_seconds"],
        "network_ms": 1e3 * compiled["network_seconds"],
        "bound": compiled["bound"],
        "mfu_bound": compiled["mfu_bound"],
        "examples_per_second": compiled["examples_per_second"],
        **_schedule_columns(compiled),
    }


def with_variant(config: Config, variant: str) -> Config:
    """Change a config to a variant: "lora", "text", or "" for itself.

    Raises:
      ValueError: the variant is unknown.
    """
    if variant == "lora":
        tuning = dataclasses.replace(config.tuning, method="lora")
        return dataclasses.replace(config, tuning=tuning)
    if variant == "text":
        tokens = dataclasses.replace(config.tokens, text={"history": ("title",)})
        return dataclasses.replace(config, tokens=tokens)
    if variant:
        raise ValueError(f"variant {variant!r} is not 'lora' or 'text'")
    return config


def _schedule_columns(compiled: dict[str, Any]) -> dict[str, Any]:
    """Columns of the schedule of a compiled step."""
    schedule = compiled["schedule"]
    parts = schedule["work"] | {
        f"waits_{name.replace(' ', '_')}": seconds
        for name, seconds in schedule["exposed"].items()
    }
    return {
        "schedule_ms": 1e3 * compiled["schedule_seconds"],
        **{f"{name}_ms": 1e3 * seconds for name, seconds in parts.items()},
        "network_hidden_ms": 1e3 * schedule["network_hidden"],
        "mfu_by_schedule": compiled["mfu_by_schedule"],
        "examples_per_second_by_schedule": compiled["examples_per_second_by_schedule"],
        "unpriced": ", ".join(schedule["unpriced"]) or "none",
    }


def fsdp_chips(torus: Sequence[int], most: int) -> int:
    """Count the chips that one or two whole axes of a torus hold, `most` at most.

    >>> fsdp_chips((4, 4, 8), 64), fsdp_chips((16, 16), 64), fsdp_chips((8, 8, 8), 1)
    (32, 16, 1)
    """
    sizes = [1, *torus, *(a * b for a, b in itertools.combinations(torus, 2))]
    return max(chips for chips in sizes if chips <= most)


def planned(config: Config, plan: Plan, chips: int, mesh: MeshConfig) -> Config:
    """Apply a plan to a config.

    Args:
      config: a config.
      plan: streams per chip, `model.remat` and planned schema.
      chips: number of chips, all slices together.
      mesh: mesh to compile for.

    Returns:
      The config; without a prepared data set it uses the plan's schema.
    """
    streams = plan.streams * chips
    data = dataclasses.replace(
        config.data,
        batch_size=streams,
        eval_batch_size=streams,
        schema=plan.schema,
    )
    model = dataclasses.replace(config.model, dtype="bfloat16", remat=plan.remat)
    return dataclasses.replace(config, data=data, model=model, mesh=mesh)


def with_efficiency(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort table rows by chips, and add each chip's rate relative to the first row."""
    rows = sorted(rows, key=lambda row: row["chips"])
    kinds = {
        "per_chip_bound": "examples_per_second",
        "per_chip_by_schedule": "examples_per_second_by_schedule",
    }
    return [
        row
        | {
            name: (row[rate] / row["chips"]) / (rows[0][rate] / rows[0]["chips"])
            for name, rate in kinds.items()
        }
        for row in rows
    ]


def _is_planned(name: str, topology: str) -> bool:
    plan = PLANS.get((name, topology.partition(":")[0]))
    return plan is not None and (not plan.pods or topology in plan.pods)


def _missing(
    rows: list[dict[str, Any]], wanted: Iterable[tuple[str, str, int]]
) -> Iterator[tuple[str, str, int]]:
    done = {(row["config"], row["topology"], row["slices"]) for row in rows}
    yield from (target for target in wanted if target not in done)


def _kept(stem: Path) -> list[dict[str, Any]]:
    file = stem.with_name(stem.name + ".json")
    return kept_rows(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted({name for name, _ in PLANS})
    parser.add_argument("--configs", nargs="+", default=names, choices=names)
    topologies = [topology for topology, _ in PODS]
    parser.add_argument("--pods", nargs="+", default=topologies, choices=topologies)
    parser.add_argument("--weak-scaling", action="store_true")
    parser.add_argument(
        "--out",
        type=Path,
        help="stem of the result files (default: in benchmarks/results)",
    )
    flags = parser.parse_args()
    if flags.weak_scaling:
        stem, title, wanted = (
            "pods_weak_scaling",
            f"{SCALED} on more and more chips",
            [(SCALED, t, 1) for t in SCALE],
        )
    else:
        stem, title = "pods", "Configs on pods"
        wanted = [
            (name, topology, slices)
            for name in flags.configs
            for topology, slices in PODS
            if topology in flags.pods and _is_planned(name, topology)
        ]
    out = flags.out or Path(__file__).parent / "results" / stem
    rows = _kept(out)
    if flags.weak_scaling:
        have = {row["topology"] for row in rows}
        table = _kept(out.with_name(out.name.removesuffix("_weak_scaling")))
        rows += [
            r
            for r in table
            if (r["config"], r["topology"], r["slices"]) in wanted
            and r["topology"] not in have
        ]
    for target in _missing(rows, wanted):
        rows.append(pod_row(*target))
        print(rows[-1], file=sys.stderr)
        write_result(
            out,
            with_efficiency(rows) if flags.weak_scaling else rows,
            {"dtype": "bfloat16", "batch": "streams x chips", "streams": "the longest"},
            "python -m benchmarks.pods"
            + (" --weak-scaling" if flags.weak_scaling else ""),
            title=f"{title}, compiled: nothing was run",
            packages=("tokenrec", "jax", "jaxlib", "libtpu", "flax", "optax"),
        )
    print(out.with_name(out.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)
