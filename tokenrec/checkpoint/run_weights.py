"""Describe the weights of a run: where they are stored, and what their entries mean.

A vocabulary numbers its values in sorted order, so one new value shifts the ids of all
later ones. Table rows of two runs are therefore matched by value (`EntryKeys`), and
dense weights by name, with the layers of the backbone counted from the bottom. Nothing
here reads a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from flax import nnx

from tokenrec.config import MeshConfig
from tokenrec.data.dataset import ITEMS
from tokenrec.data.schema import FIRST_KNOWN, TEXT_TABLE
from tokenrec.data.semantic_id_feature import SEMANTIC_ID
from tokenrec.data.tokenizer import load_tokenizer
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError
from tokenrec.models.backbones.tokenformer import stack_sizes
from tokenrec.models.heads import SemanticIdHead
from tokenrec.ops.tables.lookup import Stack
from tokenrec.sharding import make_mesh
from tokenrec.state import ModelSpec, TrainState, abstract_state, bind_params
from tokenrec.task_plan import output_names
from tokenrec.tokens.discrete_tokens import DiscreteTokenMaker
from tokenrec.tokens.makers import FeatureTransforms
from tokenrec.tokens.output_vectors import ITEM_ROWS, PREFIX


class EntryKeys(NamedTuple):
    """Keys of the rows of a table, or of the entries of a weight along one axis.

    Attributes:
      kind: kind of the values; entries of different kinds never match.
      values: `[n]`, the value of each entry after the `reserved` first ones. None if an
        entry is identified by its number, as in a table of codes.
      rows: number of entries, with the reserved ones.
      reserved: first entries, which mean the same in every data set (padding, unknown).
      axis: axis of the weight.
    """

    kind: str
    values: pa.Array | None
    rows: int
    reserved: int = 0
    axis: int = 0

    @staticmethod
    def of(kind: str, values: Any, reserved: int = 0, axis: int = 0) -> EntryKeys:
        """Make the keys of entries that have values; arguments as the attributes."""
        array = pa.array(values)
        return EntryKeys(kind, array, reserved + len(array), reserved, axis)


class WeightLocation(NamedTuple):
    """Location of a dense weight in the state.

    Attributes:
      array: name of the array in `TrainState.params`.
      layer: index along the first axis if the array stacks several layers, else None.
    """

    array: str
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """Description of the weights of a run, as `describe_run_weights` makes it.

    Attributes:
      model: the model, without weights.
      data: folder of the data set whose vocabularies name the table rows.
      abstract: shapes and types of the state, on one device.
      places: weight name -> where it is stored. Weights of the backbone are named by
        layer, whether layers are stacked or not.
      keys: weight name -> keys of its entries, for weights whose entries have keys.
      makers: prefix of weight names -> the features or codes that these weights read.
    """

    model: ModelSpec
    data: Path
    abstract: TrainState
    places: dict[str, WeightLocation]
    keys: dict[str, EntryKeys]
    makers: dict[str, tuple[str, ...]]

    def shape(self, weight: str) -> tuple[int, ...]:
        """Shape of a dense weight, without the axis that stacks layers."""
        place = self.places[weight]
        shape = self.abstract.params[place.array].shape
        return shape if place.layer is None else shape[1:]


def describe_run_weights(model: ModelSpec, data: Path) -> RunWeights:
    """Describe the weights of a run.

    Args:
      model: the model of the run.
      data: folder of its data set.

    Raises:
      InputError: the data set lacks a file that holds the keys of a weight.
    """
    # One device: the mesh in use need not divide the shapes of another run.
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        abstract = abstract_state(model)
    return RunWeights(
        model,
        data,
        abstract,
        _weight_locations(model, abstract),
        _weight_keys(model, data),
        _maker_inputs(model, abstract),
    )


def stack_of(model: ModelSpec, table: str) -> Stack:
    """The stack that holds a table."""
    return next(
        stack for stack in model.embedder.stacks.values() if table in stack.offsets
    )


def table_keys(name: str, run: RunWeights) -> EntryKeys:
    """Keys of the rows of a table.

    Args:
      name: name of the table.
      run: the run that has it.

    Raises:
      InputError: the vocabulary is missing, or has another number of values than the
        table has rows.
    """
    model, rows = run.model, run.model.embedder.tables[name]
    features = [
        feature
        for feature in model.schema.features
        if feature.is_integer and feature.table_name == name
    ]
    # The output vectors of items have no feature, but the ids of the catalogue, and
    # those of `head.item_features` the values of the features' own tables.
    if name == ITEM_ROWS.name and not features:
        keys = _item_keys(run.data)
    elif not features:
        values = load_vocabulary(run.data, name.removeprefix(PREFIX))
        keys = EntryKeys.of("values", values, FIRST_KNOWN)
    elif name == TEXT_TABLE and features[0].kind == "text":
        keys = EntryKeys.of("tokens", _tokens(run.data), FIRST_KNOWN)
    elif features[0].kind == "semantic_id":
        # Codes have no values of their own: rows match if the same codes are used.
        kind = (
            f"semantic ids of {features[0].length} levels of {features[0].codes} codes"
        )
        if model.config.tokens.semantic_id == "prefix":
            kind += " by hashed prefix"
        if any(feature.name == SEMANTIC_ID for feature in features):
            digest = model.schema.codes_digest[:12]
            kind += f", digest {digest}" if digest else ""
        keys = EntryKeys(kind, None, rows)
    else:
        keys = EntryKeys.of("values", load_vocabulary(run.data, name), FIRST_KNOWN)
    # Vocabulary and table come from the same preparation, unless the folder changed.
    if keys.rows != rows:
        raise InputError(
            f"table '{name}' has {rows:,} rows, but its vocabulary in '{run.data}' is "
            f"for {keys.rows:,}: the data set was prepared again since; give the folder "
            "that the run was trained on"
        )
    return keys


def _weight_locations(
    model: ModelSpec, abstract: TrainState
) -> dict[str, WeightLocation]:
    kind = model.config.model.kind
    sizes = stack_sizes(model.config.model)
    first_layers = np.cumsum([0, *sizes]).tolist()
    locations = {}
    for name in abstract.params:
        if kind != "tokenformer" and name.startswith("backbone/"):
            # The same name means another weight in a backbone of another kind.
            locations[f"{kind}/{name}"] = WeightLocation(name)
            continue
        if name.startswith("branch/"):
            # Likewise: branches of two kinds read other features at the same place.
            location = f"{model.config.model.branch}/{name}"
            locations[location] = WeightLocation(name)
            continue
        if not name.startswith("backbone/blocks/"):
            locations[name] = WeightLocation(name)
            continue
        # A block is a layer, or a stack of `size` layers along the first axis.
        number, rest = name.removeprefix("backbone/blocks/").split("/", 1)
        size = sizes[int(number)]
        for layer in range(size):
            place = WeightLocation(name, layer if size > 1 else None)
            index = first_layers[int(number)] + layer
            locations[f"backbone/layers/{index}/{rest}"] = place
    return locations


def _weight_keys(model: ModelSpec, data: Path) -> dict[str, EntryKeys]:
    config = model.config
    keys: dict[str, EntryKeys] = {}
    if config.data.objective == "ranking":
        outputs = output_names(model.task_plans)
        keys = {
            "head/kernel": EntryKeys.of("tasks", outputs, axis=1),
            "head/bias": EntryKeys.of("tasks", outputs),
        }
    elif config.head.retrieval == "next_item" and not config.head.negatives:
        keys = {"head/items": _item_keys(data)}
    # Each distinct token of the prompt's literal texts has a trained vector.
    words = sorted({word for text in model.literals for word in text})
    if words:
        tokens = _tokens(data)
        prompt_tokens = [tokens[word - FIRST_KNOWN] for word in words]
        keys["words"] = EntryKeys.of("tokens", prompt_tokens)
    return keys


def _maker_inputs(model: ModelSpec, abstract: TrainState) -> dict[str, tuple[str, ...]]:
    """Features or codes that weights read, by the prefix of the weights' names."""
    inputs: dict[str, tuple[str, ...]] = {}
    # A module of shapes instead of weights, whose parts are examined.
    module = bind_params(model, abstract.params)
    # Weights of a maker begin with the path of its module.
    for path, part in nnx.iter_modules(module):
        if isinstance(part, FeatureTransforms):
            inputs["/".join(map(str, path[:-1]))] = tuple(
                f"{item.feature.name} ({item.feature.kind}, {item.width} wide)"
                for item in part.items
            )
        elif isinstance(part, DiscreteTokenMaker):
            inputs["/".join(map(str, path))] = tuple(
                f"{feature.name} ({feature.kind}, {feature.length} tokens)"
                for feature in part.features
            )
    if isinstance(module.head, SemanticIdHead):
        levels = " x ".join(map(str, model.schema.levels))
        digest = model.schema.codes_digest[:12]
        inputs["head"] = (f"codes {levels} of digest {digest}",)
    return inputs


def _item_keys(data: Path) -> EntryKeys:
    path = data / ITEMS / "item_id.npy"
    if not path.is_file():
        raise InputError(
            f"data '{data}' lacks {ITEMS}/{path.name}, the ids of its items; prepare it "
            "again"
        )
    return EntryKeys.of("items", np.load(path, allow_pickle=False))


def _tokens(data: Path) -> list[str]:
    """Tokens of a data set's texts, in the order of their numbers.

    Numbers of no token, which a model's tokenizer may have, get a name of their own.
    """
    numbers: Mapping[str, int] = load_tokenizer(data).get_vocab()
    tokens = [f"\0{number}" for number in range(max(numbers.values(), default=-1) + 1)]
    for token, number in numbers.items():
        tokens[number] = token
    return tokens
