"""Plan a warm start: open the source run and match its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokenrec.checkpoint.run_folder import SCHEMA_FILE, load_run_config
from tokenrec.checkpoint.run_weights import RunWeights, describe_run_weights
from tokenrec.checkpoint.weight_matching import (
    MatchedRows,
    match_table,
    match_weight,
)
from tokenrec.config import Config, data_directory
from tokenrec.data.metadata import Metadata
from tokenrec.data.pipeline import task_names
from tokenrec.data.schema import Schema
from tokenrec.data.semantic_id_feature import SEMANTIC_ID
from tokenrec.errors import InputError
from tokenrec.runtime.paths import as_path
from tokenrec.state import build_model

# Weights in one line of a text.
_MAX_LISTED = 8


class WarmStartPlan(NamedTuple):
    """Rows and weights that a warm start carries over.

    Attributes:
      tables: table of the target -> its matched rows, or the reason why it has none.
      weights: dense weight of the target -> its matched entries, None if it matches as
        a whole, or the reason why it does not match.
    """

    tables: dict[str, MatchedRows | str]
    weights: dict[str, MatchedRows | str | None]


def open_source_run(workdir: str, data: str) -> RunWeights:
    """Describe the weights of the run that a warm start reads.

    Args:
      workdir: `train.warm_start`, folder of the run.
      data: `train.warm_start_data`, folder of its data set; empty for the one in the
        run's config.

    Raises:
      InputError: the run does not exist, or its data set is missing or another one.
    """
    try:
        config = load_run_config(as_path(workdir), as_path(data) if data else None)
        path = as_path(workdir) / SCHEMA_FILE
        if not path.is_file():
            raise InputError(
                f"it has no {SCHEMA_FILE}; give the folder that `tokenrec train` wrote"
            )
        schema = Schema.from_json(json.loads(path.read_text()))
        data_folder = data_directory(config)
        # The vocabularies must be those under which the rows were learned.
        _check_data(data_folder, schema, config)
        model = build_model(config, schema, task_names(schema, config.data))
        return describe_run_weights(model, data_folder)
    except InputError as error:
        raise InputError(f"train.warm_start='{workdir}': {error}") from error


def _check_data(data: Path, schema: Schema, config: Config) -> None:
    """Raise InputError if a data set is not the one with the run's vocabularies.

    A folder that was prepared again has other vocabularies than those under which the
    table rows were learned.
    """
    try:
        current = Metadata.load(data).schema
    except InputError as error:
        raise InputError(
            f"{error}; if it was moved, set train.warm_start_data to its folder"
        ) from error
    # The feature of `data.semantic_ids` is in the run's schema only.
    added = {SEMANTIC_ID} if config.data.semantic_ids else set()
    features = [feature for feature in schema.features if feature.name not in added]
    tables = {feature.table_name for feature in features if feature.is_integer}
    is_same = (
        current.items == schema.items
        and all(feature in current.features for feature in features)
        and all(current.tables.get(name) == schema.tables[name] for name in tables)
    )
    if not is_same:
        raise InputError(
            f"'{data}' is not the data set that it was trained on (the run's "
            f"{SCHEMA_FILE} has other features, table sizes or normalisation), which "
            "the rows of its tables need; set train.warm_start_data to the folder of "
            "that data set"
        )


def plan_warm_start(source: RunWeights, target: RunWeights) -> WarmStartPlan:
    """Match all tables and dense weights of the target.

    Args:
      source: the run that has been trained.
      target: the run that starts from it.

    Raises:
      InputError: nothing matches, or a vocabulary is missing.
    """
    plan = WarmStartPlan(
        {
            name: match_table(name, source, target)
            for name in target.model.embedder.tables
        },
        {name: match_weight(name, source, target) for name in target.places},
    )
    # Reserved rows match in any two runs, so they do not count here.
    has_rows = any(
        isinstance(match, MatchedRows) and match.known for match in plan.tables.values()
    )
    if not has_rows and all(isinstance(match, str) for match in plan.weights.values()):
        reasons = list_reasons((plan.tables | plan.weights).items())
        raise InputError(
            f"train.warm_start='{target.model.config.train.warm_start}': no weights of "
            f"that run match this one: {reasons}; choose another run, or leave the "
            "field empty"
        )
    return plan


def list_reasons(reasons: Iterable[tuple[str, Any]]) -> str:
    """List names with their reasons in one line; a long list is cut."""
    texts = [f"{name}: {reason}" if reason else name for name, reason in reasons]
    listed = "; ".join(texts[:_MAX_LISTED])
    if len(texts) > _MAX_LISTED:
        listed += f"; and {len(texts) - _MAX_LISTED} more"
    return listed
