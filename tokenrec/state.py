"""The train state and the one description of it; the only place that splits and merges modules."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from tokenrec.config import Config, data_directory
from tokenrec.config.prompt import parse_prompt
from tokenrec.data.schema import Schema
from tokenrec.data.tokenizer import encode_text, load_tokenizer
from tokenrec.errors import InputError
from tokenrec.models.recommender import Literals, Recommender, stream_layout
from tokenrec.ops.layers import draw_uniform
from tokenrec.ops.tables.api import storage_spec
from tokenrec.ops.tables.lookup import RowsState
from tokenrec.optim import dense_optimizer
from tokenrec.sharding import RULES
from tokenrec.tokens.embed import Embedder
from tokenrec.tokens.layout import Layout

TABLE_DEVIATION = 0.05  # of the numbers that table rows start from


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    Attributes:
      step: `[] int32`, updates made.
      params: dense weights by name ("backbone/blocks/0/gate/bias").
      tables: stacks of embedding tables, `[rows, width]`, as they are stored (ops/tables.py).
      opt_state: `{"dense": optax state, "rows": {stack: RowsState}}`, and with `optim.spike_norm` `"norm": []`, the
        running mean of gradient norms, 0 before the first.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    tables: dict[str, jax.Array]
    opt_state: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSpec:
    """The static half of a run: what does not change from step to step."""

    config: Config
    schema: Schema
    tasks: tuple[str, ...]
    embedder: Embedder
    literals: Literals = ()

    def layout(
        self,
        events: int,
        *,
        serving: bool = False,
        candidates: int | None = None,
        codes: int | None = None,
    ) -> Layout:
        """`stream_layout` of this model."""
        return stream_layout(
            self.config,
            self.schema,
            events,
            self.literals,
            serving=serving,
            candidates=candidates,
            codes=codes,
        )


def build_model(config: Config, schema: Schema, tasks: tuple[str, ...]) -> ModelSpec:
    """The model of a config on a data set; `schema` is without the excluded features.

    Raises:
      InputError: the prompt has literal text, and the data set no tokenizer; or the last window holds no event.
    """
    model = ModelSpec(
        config, schema, tasks, Embedder.build(schema, config), prompt_literals(config)
    )
    _check_window(model)
    return model


def _check_window(model: ModelSpec) -> None:
    """How many rows a candidate has, a title's words among them, is known once the data set is."""
    config = model.config
    sliding = [window for window in config.model.windows if window]
    if (
        config.data.objective != "ranking"
        or config.data.paradigm != "nio"
        or not sliding
    ):
        return
    own = int(np.sum(model.layout(config.data.events, candidates=1).candidate == 0))
    if sliding[-1] <= own + 1:
        raise InputError(
            f"model.windows: {sliding[-1]} holds no event: a candidate of this prompt has {own} "
            f"tokens; use at least {own + 2}, or drop the window"
        )


def prompt_literals(config: Config) -> Literals:
    """Token ids of the literal texts of the prompt, by the tokenizer of the data set."""
    texts = [segment.text for segment in parse_prompt(config) if segment.kind == "text"]
    if not texts:
        return ()
    tokenizer = load_tokenizer(data_directory(config))
    return tuple(tuple(encode_text(tokenizer, text).tolist()) for text in texts)


def _module(model: ModelSpec, key: jax.Array) -> Recommender:
    return Recommender(
        model.config,
        model.schema,
        len(model.tasks),
        model.literals,
        rngs=nnx.Rngs(params=key),
    )


@functools.lru_cache(maxsize=16)
def _structure(model: ModelSpec) -> tuple[Any, tuple[tuple[Any, ...], ...]]:
    """The graph of the model's modules and the path of each weight in it."""
    graph, weights = nnx.split(
        nnx.eval_shape(lambda: _module(model, jax.random.key(0)))
    )
    return graph, tuple(path for path, _ in nnx.to_flat_state(weights))


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def bind_params(model: ModelSpec, params: dict[str, jax.Array]) -> Recommender:
    """The module with these weights. Cheap and pure: call it inside a traced function."""
    graph, paths = _structure(model)
    return nnx.merge(
        graph,
        nnx.from_flat_state([(path, nnx.Param(params[_name(path)])) for path in paths]),
    )


def init_state(model: ModelSpec, seed: int) -> TrainState:
    """A fresh state, under the mesh in use: every array is made where it will lie."""
    weights_key, tables_key = jax.random.split(jax.random.key(seed))
    _, weights = nnx.split(_module(model, weights_key))
    params = {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(weights)}
    tables, rows = {}, {}
    for number, (name, stack) in enumerate(sorted(model.embedder.stacks.items())):
        key = jax.random.fold_in(tables_key, number)
        shape, spec = storage_spec(stack)
        tables[name] = draw_uniform(key, shape, TABLE_DEVIATION, spec)
        rows[name] = RowsState(
            jnp.zeros(shape[:1], out_sharding=PartitionSpec(spec[0]))
        )
    opt_state: dict[str, Any] = {
        "dense": dense_optimizer(model.config.optim).init(params),
        "rows": rows,
    }
    if model.config.optim.spike_norm:
        opt_state["norm"] = jnp.zeros((), out_sharding=RULES())
    return TrainState(
        jnp.zeros((), jnp.int32, out_sharding=RULES()), params, tables, opt_state
    )


def abstract_state(model: ModelSpec) -> TrainState:
    """Shapes, dtypes and shardings of the state, under the mesh in use: the source for restore and compile."""
    mesh = jax.sharding.get_mesh()

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = (
            RULES() if leaf.sharding is None else leaf.sharding.spec
        )  # a scalar carries none
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec)
        )

    return jax.tree.map(placed, jax.eval_shape(lambda: init_state(model, 0)))
