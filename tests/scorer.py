"""A model whose every input matters, and the scores that it gives to a data set's impressions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.worlds import one_device
from tokenrec.config import Config, DataConfig, ModelConfig, TokensConfig
from tokenrec.config.validate import validate
from tokenrec.data.batch import Batch
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.pipeline import task_names
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.source import Source
from tokenrec.evaluation.evaluate import jit_eval_step, score_split
from tokenrec.sharding import to_devices
from tokenrec.state import TrainState, build_model, init_state

Key = tuple[int | str, int | str, int]  # user, item, time
Scored = dict[Key, np.ndarray]  # impression -> [K] probabilities


class Scorer:
    """One model with random weights, for every data set of one schema and every stream length of one paradigm."""

    def __init__(self, data: DataConfig, dataset: Dataset) -> None:
        model = ModelConfig(width=8, heads=1, layers=2, windows=(4,))
        self.config = validate(
            Config(
                data=data,
                tokens=TokensConfig(embedding_dim=4, user_tokens=2, maker="linear"),
                model=model,
            )
        )
        self.schema, self.mesh = dataset.schema, one_device()
        with jax.set_mesh(self.mesh):
            built = build_model(
                self.config, dataset.schema, task_names(dataset.schema, data)
            )
            self.state = _shaken(init_state(built, 0))
            self.step = jit_eval_step(built)

    def __call__(
        self, dataset: Dataset, data: DataConfig | None = None, split: str = "valid"
    ) -> Scored:
        assert (
            dataset.schema == self.schema
        )  # vocabularies and moments are those of train, which no test changes
        config = (
            self.config if data is None else dataclasses.replace(self.config, data=data)
        )
        found: Scored = {}
        with jax.set_mesh(self.mesh):
            for part in score_split(
                self.step, self.state, config, dataset, split, self.mesh
            ):
                keys = list(
                    zip(
                        part.user_id.tolist(),
                        part.item_id.tolist(),
                        part.time.tolist(),
                        strict=True,
                    )
                )
                assert len({*keys, *found}) == len(keys) + len(found), (
                    "an impression is scored twice"
                )
                found |= dict(zip(keys, part.probabilities, strict=True))
        return found

    def on(self, batch: Batch) -> np.ndarray:
        with jax.set_mesh(self.mesh):
            return np.asarray(self.step(self.state, to_devices(batch, self.mesh)))


def _shaken(state: TrainState) -> TrainState:
    """The state with noise on every weight: at the start some are zero (gates), or too small to matter (tables)."""

    def shake(
        deviation: float, weights: dict[str, jax.Array], seed: int
    ) -> dict[str, jax.Array]:
        random = np.random.default_rng(seed)
        return {
            name: w + jnp.asarray(random.normal(0, deviation, w.shape), w.dtype)
            for name, w in weights.items()
        }

    return dataclasses.replace(
        state, params=shake(0.2, state.params, 1), tables=shake(1.0, state.tables, 2)
    )


def changed(before: Scored, after: Scored) -> set[Key]:
    """Impressions of both whose scores differ, by as little as a bit."""
    return {
        key
        for key in before.keys() & after.keys()
        if not np.array_equal(before[key], after[key])
    }


def prepared(source: Source, folder: Path) -> Dataset:
    prepare(source, folder)
    return open_dataset(folder)
