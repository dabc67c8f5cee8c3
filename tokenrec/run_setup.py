"""Derive a run from its config, the same in all processes, before anything trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from tokenrec.checkpoint.run_folder import create_or_check_run, run_identity
from tokenrec.config import Config, data_directory, semantic_ids_path
from tokenrec.config.validate import validate
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.pipeline import task_names
from tokenrec.models.backbones.mesh_check import check_mesh
from tokenrec.runtime import distributed
from tokenrec.runtime.paths import as_path
from tokenrec.sharding import check_batch_sizes, make_mesh
from tokenrec.state import ModelSpec, build_model


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of before it starts; the same in all processes.

    Attributes:
      config: the validated config.
      workdir: the run's folder.
      dataset: the prepared data set.
      model: the static half of the model.
      mesh: all devices.
    """

    config: Config
    workdir: Path
    dataset: Dataset
    model: ModelSpec
    mesh: Mesh

    @property
    def last_step(self) -> int:
        """Step after which the loop ends."""
        return self.config.train.stop_at or self.config.optim.steps

    @property
    def has_eval_split(self) -> bool:
        """Whether the data set has the split that the run is evaluated on."""
        return self.config.train.eval_split in self.dataset.splits


def set_up(config: Config, workdir: Path) -> Setup:
    """Validate the config, open the data set, and create or check the run's folder.

    Raises:
      InputError: on all processes, if the config, the data set, the mesh or the run in
        `workdir` do not fit together on any of them.
    """
    with distributed.raise_on_all_processes():
        config = validate(config)
        dataset = open_dataset(
            data_directory(config), config.data.exclude, semantic_ids_path(config)
        )
        tasks = task_names(dataset.schema, config.data)
        model = build_model(config, dataset.schema, tasks)
        mesh = make_mesh(config.mesh)
        check_batch_sizes(config, mesh)
        check_mesh(config.model, mesh)
    distributed.assert_same_on_all_processes(run_identity(config, dataset))
    create_or_check_run(config, dataset.schema, workdir)
    return Setup(config, as_path(workdir), dataset, model, mesh)
