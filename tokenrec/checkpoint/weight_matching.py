"""What of one run's weights stands for the same in another run: rows of tables by value, dense weights by name.

A vocabulary gives ids by sorted value, so that one new value moves the ids of all later ones: rows are matched by value
and never by number. Nothing here touches a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from flax import nnx

from tokenrec.config import MeshConfig
from tokenrec.data.dataset import ITEMS
from tokenrec.data.schema import FIRST_KNOWN, TEXT_TABLE
from tokenrec.data.semantic_id_feature import SEMANTIC_ID
from tokenrec.data.tokenizer import load_tokenizer
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError
from tokenrec.models.backbones.tokenformer import layer_windows, stack_sizes
from tokenrec.models.heads import CodeHead
from tokenrec.ops.tables.lookup import Stack
from tokenrec.sharding import make_mesh
from tokenrec.state import ModelSpec, TrainState, abstract_state, bind_params
from tokenrec.tokens.embed import ITEM_ROWS
from tokenrec.tokens.makers import Transforms
from tokenrec.tokens.textual import TextMaker


class Keys(NamedTuple):
    """What the rows of a table, or the entries of a weight along `axis`, stand for.

    Attributes:
      kind: rows of another kind are not the same, whatever their values are.
      values: `[n]`, of the rows behind the `reserved` first ones, which are the same in every data set; None where a
        row is what its number says.
      rows: all of them.
    """

    kind: str
    values: pa.Array | None
    rows: int
    reserved: int = 0
    axis: int = 0

    @staticmethod
    def of(kind: str, values: Any, reserved: int = 0, axis: int = 0) -> Keys:
        held = pa.array(values)
        return Keys(kind, held, reserved + len(held), reserved, axis)


class MatchedRows(NamedTuple):
    """Rows that stand for the same: `source` there, `target` here, `[n] int64` each; `known` are not reserved ones."""

    source: np.ndarray
    target: np.ndarray
    known: int


class WeightLocation(NamedTuple):
    """Where a dense weight lies: an array of the state, and the layer in it where layers are stacked."""

    array: str
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """One of the two runs. Made by `describe_run_weights`.

    Attributes:
      data: folder of the data set that its rows are named by.
      abstract: its state, on one device.
      places: of the dense weights; those of the backbone are named by layer, stacked or not.
      keys: of the dense weights whose entries have names.
      makers: weights that begin with a name are made for these features, or codes.
    """

    model: ModelSpec
    data: Path
    abstract: TrainState
    places: dict[str, WeightLocation]
    keys: dict[str, Keys]
    makers: dict[str, tuple[str, ...]]

    def shape(self, weight: str) -> tuple[int, ...]:
        place = self.places[weight]
        shape = self.abstract.params[place.array].shape
        return shape if place.layer is None else shape[1:]


def describe_run_weights(model: ModelSpec, data: Path) -> RunWeights:
    """Raises InputError if the data set lacks what names the entries of a weight."""
    # One device holds any shape: the mesh in use need not divide what that of the other run did.
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        abstract = abstract_state(model)
    return RunWeights(
        model,
        data,
        abstract,
        _places(model, abstract),
        _weight_keys(model, data),
        _makers(model, abstract),
    )


def match_keys(there: Keys, here: Keys) -> MatchedRows | str:
    """The rows that stand for the same on both sides, or why none can.

    >>> match_keys(Keys.of("values", ["a", "c"], 2), Keys.of("values", ["a", "b", "c"], 2)).target
    array([0, 1, 2, 4])
    """
    if there.kind != here.kind:
        return f"{there.kind} there, {here.kind} here"
    if there.values is None or here.values is None:
        rows = np.arange(here.rows)
        same = there.rows == here.rows
        return (
            MatchedRows(rows, rows, len(rows))
            if same
            else f"{there.rows} rows there, {here.rows} here"
        )
    if there.values.type != here.values.type and len(there.values) and len(here.values):
        return f"{there.kind} are {there.values.type} there, {here.values.type} here"
    found = pc.fill_null(
        pc.index_in(here.values, value_set=there.values), -1
    ).to_numpy()
    target, reserved = np.flatnonzero(found >= 0), np.arange(here.reserved)
    source = np.concatenate([reserved, there.reserved + found[target]])
    return MatchedRows(
        source, np.concatenate([reserved, here.reserved + target]), len(target)
    )


def stack_of(model: ModelSpec, table: str) -> Stack:
    """The stack that holds a table."""
    return next(
        stack for stack in model.embedder.stacks.values() if table in stack.offsets
    )


def match_table(name: str, there: RunWeights, here: RunWeights) -> MatchedRows | str:
    """Rows of a table of the model here that are in the one there, or why none is.

    Raises:
      InputError: a vocabulary is not there, or is not that of the table.
    """
    if name not in there.model.embedder.tables:
        return "not there"
    widths = [stack_of(side.model, name).width for side in (there, here)]
    if widths[0] != widths[1]:
        return f"width {widths[0]} there, {widths[1]} here"
    return match_keys(_table_keys(name, there), _table_keys(name, here))


def match_weight(
    name: str, there: RunWeights, here: RunWeights
) -> MatchedRows | str | None:
    """Entries of a dense weight, along the axis of its keys, that are there; None: it is the same as a whole; or why it
    is not.
    """
    if name not in there.places:
        return "not there"
    for prefix, features in here.makers.items():
        if name.startswith(prefix + "/") and there.makers.get(prefix) != features:
            return _difference(there.makers.get(prefix, ()), features)
    shapes = there.shape(name), here.shape(name)
    if name in here.keys and name in there.keys:
        axis = here.keys[name].axis
        if np.delete(shapes[0], axis).tolist() == np.delete(shapes[1], axis).tolist():
            matched = match_keys(there.keys[name], here.keys[name])
            none = f"none of its {here.keys[name].kind} is there"
            return (
                none
                if isinstance(matched, MatchedRows) and not matched.known
                else matched
            )
    return (
        None if shapes[0] == shapes[1] else f"shape {shapes[0]} there, {shapes[1]} here"
    )


def other_window(name: str, there: RunWeights, here: RunWeights) -> str:
    """What to say of a weight of a layer whose window is another; empty otherwise."""
    parts = name.split("/")
    if parts[:2] != ["backbone", "layers"]:
        return ""
    windows = [
        layer_windows(side.model.config.model)[int(parts[2])] for side in (there, here)
    ]
    said = ["all rows" if window is None else f"window {window}" for window in windows]
    return f"{said[0]} there, {said[1]} here" if said[0] != said[1] else ""


def _difference(before: tuple[str, ...], now: tuple[str, ...]) -> str:
    only = [
        ", ".join(name for name in one if name not in other)
        for one, other in ((before, now), (now, before))
    ]
    if not any(only):
        return "made of the same features in another order"
    return "made of other features: " + "; ".join(
        f"only {where} {names}"
        for where, names in zip(("there", "here"), only, strict=True)
        if names
    )


def _places(model: ModelSpec, abstract: TrainState) -> dict[str, WeightLocation]:
    sizes, kind = stack_sizes(model.config.model), model.config.model.kind
    first = np.cumsum([0, *sizes]).tolist()
    found = {}
    for name in abstract.params:
        if kind != "tokenformer" and name.startswith("backbone/"):
            # Weights of one name mean something else in a backbone of another kind.
            found[f"{kind}/{name}"] = WeightLocation(name)
            continue
        if not name.startswith("backbone/blocks/"):
            found[name] = WeightLocation(name)
            continue
        number, rest = name.removeprefix("backbone/blocks/").split("/", 1)
        size = sizes[int(number)]
        for layer in range(size):
            place = WeightLocation(name, layer if size > 1 else None)
            found[f"backbone/layers/{first[int(number)] + layer}/{rest}"] = place
    return found


def _weight_keys(model: ModelSpec, data: Path) -> dict[str, Keys]:
    config, keys = model.config, {}
    if config.data.objective == "ranking":
        keys = {
            "head/kernel": Keys.of("tasks", model.tasks, axis=1),
            "head/bias": Keys.of("tasks", model.tasks),
        }
    elif config.head.retrieval == "next_item" and not config.head.negatives:
        keys = {"head/items": _item_keys(data)}
    words = sorted({word for text in model.literals for word in text})
    if words:
        tokens = _tokens(data)
        keys["words"] = Keys.of(
            "tokens", [tokens[word - FIRST_KNOWN] for word in words]
        )
    return keys


def _makers(model: ModelSpec, abstract: TrainState) -> dict[str, tuple[str, ...]]:
    found = {}
    module = bind_params(model, abstract.params)  # of shapes instead of weights
    for path, part in nnx.iter_modules(module):
        if isinstance(part, Transforms):
            made_of = tuple(
                f"{f.feature.name} ({f.feature.kind}, {f.width} wide)"
                for f in part.items
            )
            found["/".join(map(str, path[:-1]))] = made_of
        elif isinstance(part, TextMaker):
            found["/".join(map(str, path))] = tuple(
                f"{f.name} ({f.kind}, {f.length} tokens)" for f in part.features
            )
    if isinstance(module.head, CodeHead):
        levels = " x ".join(map(str, model.schema.levels))
        found["head"] = (f"codes {levels} of digest {model.schema.codes_digest[:12]}",)
    return found


def _table_keys(name: str, side: RunWeights) -> Keys:
    model, rows = side.model, side.model.embedder.tables[name]
    features = [
        f for f in model.schema.features if f.is_integer and f.table_name == name
    ]
    if name == ITEM_ROWS.name and not features:
        keys = _item_keys(side.data)
    elif name == TEXT_TABLE and features[0].kind == "text":
        keys = Keys.of("tokens", _tokens(side.data), FIRST_KNOWN)
    elif features[0].kind == "semantic_id":
        digest = (
            model.schema.codes_digest
            if any(f.name == SEMANTIC_ID for f in features)
            else ""
        )
        hashed = (
            " by hashed prefix" if model.config.tokens.semantic_id == "prefix" else ""
        )
        kind = f"semantic ids of {features[0].length} levels of {features[0].codes} codes{hashed}"
        return Keys(kind + (f", digest {digest[:12]}" if digest else ""), None, rows)
    else:
        keys = Keys.of("values", load_vocabulary(side.data, name), FIRST_KNOWN)
    if keys.rows != rows:
        raise InputError(
            f"table '{name}' has {rows:,} rows, but what names them in '{side.data}' is for {keys.rows:,}: the data "
            "set was prepared again since; give the folder that the run was trained on"
        )
    return keys


def _item_keys(data: Path) -> Keys:
    path = data / ITEMS / "item_id.npy"
    if not path.is_file():
        raise InputError(
            f"data '{data}' lacks {ITEMS}/{path.name}, which names its items; prepare it again"
        )
    return Keys.of("items", np.load(path, allow_pickle=False))


def _tokens(data: Path) -> list[str]:
    """Tokens of a data set's texts, by number."""
    numbers: Mapping[str, int] = load_tokenizer(data).get_vocab()
    return sorted(numbers, key=numbers.__getitem__)
