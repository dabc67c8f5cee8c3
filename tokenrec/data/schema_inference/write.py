"""Write a proposal: schema.json, README.md with the reasons, and the next commands."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenrec.data.schema import Feature
from tokenrec.data.schema_inference.labels import Label
from tokenrec.data.schema_inference.proposal import Proposal
from tokenrec.data.sources.csv_text import ATOMIC_SUFFIXES
from tokenrec.errors import InputError

SCHEMA_FILE = "schema.json"
REASONS_FILE = "README.md"
# Above this many test rows an evaluation scores a part of them, spread evenly.
_TEST_SAMPLES = 20_000
# A share of repeats below this means that users do not take an item twice.
_NO_REPEATS = 0.01


def write_proposal(proposal: Proposal, out: Path, *, overwrite: bool = False) -> None:
    """Write `schema.json` and `README.md`.

    Raises:
      InputError: there is a schema, and `overwrite` is False.
    """
    path = out / SCHEMA_FILE
    if path.exists() and not overwrite:
        raise InputError(
            f"{path} exists; name another --out, or add --overwrite to replace it"
        )
    out.mkdir(parents=True, exist_ok=True)
    value = schema_json(proposal, out)
    if proposal.statistics.value:
        value["statistics"] = proposal.statistics.value
    path.write_text(_format_json(value), encoding="utf-8")
    (out / REASONS_FILE).write_text(reasons_text(proposal, out), encoding="utf-8")


def schema_json(proposal: Proposal, out: Path) -> dict[str, Any]:
    """Make the schema file's value; paths are relative to `out`."""
    columns: dict[str, str] = {}
    key_types: dict[str, str] = {}

    def name_column(name: str, column: str) -> None:
        if name != column:
            columns[name] = column

    for name, key in proposal.keys.items():
        # `request` is read only where it is named.
        if name == "request":
            columns[name] = key.profile.column
        name_column(name, key.profile.column)
    for decision in proposal.decisions:
        if decision.role in ("user", "item"):
            key_types[f"{decision.role}_id"] = decision.key_type
        if decision.role == "feature" and decision.feature is not None:
            name_column(decision.feature.name, decision.column)
            if decision.key_type == "int64":
                key_types[decision.feature.name] = "int64"
    labels = {label.task: label.expression for label in proposal.labels}
    for label in proposal.labels:
        if not label.expression:
            name_column(label.task, label.profile.column)
    value: dict[str, Any] = {
        "features": [
            _feature_json(d.feature) for d in proposal.features if d.feature is not None
        ],
        "tasks": [_task_json(label) for label in proposal.labels],
        "columns": columns,
        "key_types": {
            name: kind for name, kind in key_types.items() if kind == "int64"
        },
        "separators": {
            d.feature.name: d.separator
            for d in proposal.features
            if d.feature is not None and d.separator not in ("", "|")
        },
        "labels": {task: text for task, text in labels.items() if text},
        "files": _files_json(proposal, out),
    }
    if unit := proposal.keys["time_ms"].unit:
        value["time"] = {"unit": unit}
    return {name: part for name, part in value.items() if part or name == "tasks"}


def commands(proposal: Proposal, out: Path) -> list[str]:
    """Return the three commands that come next, complete."""
    schema, data, run = (
        shlex.quote(str(out / name)) for name in (SCHEMA_FILE, "data", "run")
    )
    train = f"tokenrec train --config={proposal.config} --data {data} --workdir {run}"
    if proposal.config == "retriever" and proposal.repeats < _NO_REPEATS:
        train += " --config.head.drop_seen=True"
    if proposal.config == "ranker" and proposal.rows_per_request > 1:
        candidates = min(round(proposal.rows_per_request) + 1, 32)
        train += f" --config.data.candidates={candidates}"
    evaluate = f"tokenrec evaluate --workdir {run} --split test --baselines"
    if proposal.splits.shares[2] * proposal.samples["log"].rows > 3 * _TEST_SAMPLES:
        evaluate += f" --samples {_TEST_SAMPLES}"
    prepare = f"tokenrec prepare delimited --schema {schema} --out {data}"
    paths = [p for sample in proposal.samples.values() for p in sample.paths]
    # Without it such files are taken for those of `prepare recbole`.
    if any(path.suffix.lower() in ATOMIC_SUFFIXES for path in paths):
        prepare += " --delimiter tab"
    return [
        prepare,
        train,
        evaluate,
    ]


def reasons_text(proposal: Proposal, out: Path) -> str:
    """Say what was assumed, on what evidence, and where to look; Markdown."""
    lines = ["# What `tokenrec init` found", ""]
    for name, sample in proposal.samples.items():
        paths = ", ".join(f"`{path}`" for path in sample.paths)
        lines.append(f"- {name}: {paths}; looked at {sample.describe()}")
    lines += [f"- {remark}" for remark in proposal.remarks]
    lines += ["", "## Next", "", "```sh", *commands(proposal, out), "```", ""]
    lines += ["## Look here first", "", *_check_lines(proposal), ""]
    for table in proposal.samples:
        lines += [f"## Columns of the {table}", "", "| column | is | because |"]
        lines += ["|---|---|---|"]
        lines += [
            f"| `{d.column}` | {_role(d.role, d.feature)} | {_cell(d.reason)} |"
            for d in proposal.decisions
            if d.table == table
        ]
        lines.append("")
    if proposal.statistics.value:
        lines += ["## Statistics of the past", ""]
        lines += ["Of strictly earlier rows: rates of each label, and counts.", ""]
        lines += ["| counted by | because |", "|---|---|"]
        lines += [
            f"| `{what}` | {_cell(reason)} |"
            for what, reason in proposal.statistics.reasons
        ]
        lines.append("")
    lines += [
        "Change `schema.json` where this is wrong: `action` is what is known only after",
        "the item was shown, and the model sees it for earlier rows only; `context` is",
        "known before. A statistic over the whole log looks into the future: remove it.",
        "",
    ]
    return "\n".join(lines)


def summary_lines(proposal: Proposal) -> list[str]:
    """What was assumed, in a few lines for the terminal."""
    keys = proposal.keys
    lines = [
        f"{role}: column '{keys[name].profile.column}'; {keys[name].reason}"
        for role, name in (
            ("user", "user_id"),
            ("item", "item_id"),
            ("time", "time_ms"),
        )
    ]
    lines += [
        f"label {label.task}: {label.expression or label.profile.column}; "
        f"{label.reason}"
        for label in proposal.labels
    ]
    if not proposal.labels:
        lines.append("label: none found, so every row is an item that a user took")
    lines.append(f"split: {proposal.splits.reason}")
    used = [d for d in proposal.decisions if d.role == "feature"]
    for entity in ("user", "item", "context", "action"):
        names = [
            d.feature.name for d in used if d.feature and d.feature.entity == entity
        ]
        if names:
            lines.append(f"{entity} features: {', '.join(names)}")
    if proposal.statistics.value:
        counted = [what for what, _ in proposal.statistics.reasons]
        lines.append(f"statistics of the past: {', '.join(counted)}")
    left = [d.column for d in proposal.decisions if d.role == "left out"]
    if left:
        lines.append(f"left out: {', '.join(left)}")
    return lines + proposal.remarks


def _check_lines(proposal: Proposal) -> list[str]:
    lines = [f"- Split: {proposal.splits.reason}."]
    if not proposal.labels:
        lines.append(
            "- No label was found, so every row is an item that a user took, and the "
            "config is `retriever`. Name a label with `--label` if there is one."
        )
    return lines + [
        f"- `{d.column}` ({d.table}) is {_role(d.role, d.feature)}: {d.reason}."
        for d in proposal.decisions
        if d.check
    ]


def _role(role: str, feature: Feature | None) -> str:
    if role != "feature" or feature is None:
        return role if role == "left out" else f"the {role}"
    entity = feature.entity + (" (per row)" if feature.per_row else "")
    return f"{feature.kind} feature of {entity}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _task_json(label: Label) -> dict[str, Any]:
    if label.kind == "binary":
        return {"name": label.task}
    value: dict[str, Any] = {"name": label.task, "kind": label.kind}
    if label.classes:
        value["classes"] = list(label.classes)
    return value


def _feature_json(feature: Feature) -> dict[str, Any]:
    """The fields of a feature that differ from their defaults."""
    plain = Feature(feature.name, feature.kind, feature.entity)
    value: dict[str, Any] = {
        "name": feature.name,
        "kind": feature.kind,
        "entity": feature.entity,
    }
    for field in ("length", "codes", "transform", "per_row"):
        if getattr(feature, field) != getattr(plain, field):
            value[field] = getattr(feature, field)
    if feature.kind in ("multi_valued", "embedding", "text"):
        value["length"] = feature.length
    return value


def _files_json(proposal: Proposal, out: Path) -> dict[str, Any]:
    value: dict[str, Any] = {
        "log": _relative(proposal.samples["log"].paths, out),
    }
    for table in ("users", "items"):
        if table in proposal.samples:
            (value[table],) = _relative(proposal.samples[table].paths, out)
    value["valid_from"] = proposal.splits.valid_from
    value["test_from"] = proposal.splits.test_from
    return value


def _relative(paths: Sequence[Path], out: Path) -> list[str]:
    return [
        Path(os.path.relpath(path.absolute(), out.absolute())).as_posix()
        for path in paths
    ]


def _format_json(value: dict[str, Any]) -> str:
    """JSON with a line for each feature."""
    parts = []
    for name, part in value.items():
        if isinstance(part, list):
            rows = ",\n".join(
                f"    {json.dumps(row, ensure_ascii=False)}" for row in part
            )
            text = f"[\n{rows}\n  ]" if part else "[]"
        else:
            rows = ",\n".join(
                f"    {json.dumps(key, ensure_ascii=False)}: "
                f"{json.dumps(entry, ensure_ascii=False)}"
                for key, entry in part.items()
            )
            text = f"{{\n{rows}\n  }}"
        parts.append(f'  "{name}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
