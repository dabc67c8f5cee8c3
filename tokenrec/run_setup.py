"""Derive a run from its config, the same in all processes, before anything trains."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
from jax.sharding import Mesh

from tokenrec.checkpoint.device_history import DeviceUse, read_history
from tokenrec.checkpoint.pretrained import check_pretrained
from tokenrec.checkpoint.run_folder import run_identity, steps_of_run, use_id_counts
from tokenrec.config import Config, data_directory, semantic_ids_path
from tokenrec.config.validate import validate
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.pipeline import steps_per_epoch, task_names
from tokenrec.elastic import with_split
from tokenrec.errors import InputError, suggest
from tokenrec.models.backbones.mesh_check import check_mesh
from tokenrec.run_length import with_steps
from tokenrec.runtime import distributed
from tokenrec.runtime.paths import as_path
from tokenrec.sharding import check_batch_sizes, make_run_mesh, split_batch
from tokenrec.state import ModelSpec, build_model


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of before it starts; the same in all processes.

    Attributes:
      config: the validated config.
      workdir: the run's folder.
      dataset: the prepared data set.
      model: the static half of the model; its config has the micro-batches that fit
        the mesh (elastic.py).
      mesh: all devices.
    """

    config: Config
    workdir: Path
    dataset: Dataset
    model: ModelSpec
    mesh: Mesh

    @property
    def device_use(self) -> DeviceUse:
        """How this start computes its steps."""
        return DeviceUse(
            devices=self.mesh.size,
            processes=jax.process_count(),
            mesh=dict(self.mesh.shape),
            elastic=self.config.train.elastic,
            accumulate=self.model.config.optim.accumulate,
            updates=self.model.updates,
        )

    @property
    def last_step(self) -> int:
        """Step after which the loop ends."""
        return self.config.train.stop_at or self.config.optim.steps

    @property
    def evaluates(self) -> bool:
        """Whether the run is evaluated: `train.eval_split` names a split."""
        return bool(self.config.train.eval_split)


def set_up(config: Config, workdir: Path) -> Setup:
    """Validate the config, open the data set, build the model and the mesh.

    Nothing is written. Of a run in `workdir` only what follows from its data set is
    read, the steps of `optim.epochs` and the counts of ids of `tokens.min_count`, and
    the devices of its first start.

    Raises:
      InputError: on all processes, if the config, the data set and the mesh do not fit
        together on any of them.
    """
    with distributed.raise_on_all_processes():
        config = validate(config)
        dataset = open_dataset(
            data_directory(config), config.data.exclude, semantic_ids_path(config)
        )
        _check_eval_split(config.train.eval_split, dataset)
        use_id_counts(config, dataset, as_path(workdir), trained=False)
        epoch_steps = count_epoch_steps(config, dataset)
        config = _use_steps(config, dataset, as_path(workdir), epoch_steps)
        mesh = make_run_mesh(config)
        history = read_history(as_path(workdir))
        first = history.first_devices if history else None
        split = split_batch(config, mesh, first)
        tasks = task_names(dataset.schema, config.data)
        model = build_model(
            with_split(config, split),
            dataset.schema,
            tasks,
            epoch_steps=epoch_steps,
            updates=split.updates,
            catalogue=dataset.catalogue,
        )
        check_pretrained(model)
        check_batch_sizes(model.config, mesh)
        check_mesh(config.model, mesh)
    distributed.assert_same_on_all_processes(
        run_identity(config, dataset) | {"devices of the run's first start": first}
    )
    return Setup(config, as_path(workdir), dataset, model, mesh)


def count_epoch_steps(config: Config, dataset: Dataset) -> int:
    """Steps of an epoch, for `ModelSpec.epoch_steps`; 0 if the config does not ask."""
    # Counting the samples of a large data set takes a while.
    return steps_per_epoch(dataset, config.data) if config.optim.table_rates else 0


def _use_steps(
    config: Config, dataset: Dataset, workdir: Path, epoch_steps: int
) -> Config:
    """Set the steps of `optim.epochs`: those of the run in `workdir`, or counted now.

    Args:
      config: the validated config.
      dataset: the data set.
      workdir: folder of the run.
      epoch_steps: steps of an epoch, 0 if they have not been counted.
    """
    optim = config.optim
    if not optim.epochs:
        return config
    kept = steps_of_run(workdir, optim.epochs)
    if kept and optim.steps in (0, kept):
        # Checked as a config with steps is.
        kept_optim = dataclasses.replace(optim, steps=kept)
        config = validate(dataclasses.replace(config, optim=kept_optim))
        origin = "by the config of the run"
    elif kept:
        # Other steps than those of the run: `create_or_check_run` refuses them.
        return config
    else:
        config = with_steps(config, dataset, epoch_steps=epoch_steps)
        origin = "by the training samples of the data set"
    if distributed.is_first_process():
        print(
            f"tokenrec: optim.epochs={optim.epochs:g} is {config.optim.steps:,} steps, "
            f"{origin}",
            file=sys.stderr,
        )
    return config


def _check_eval_split(split: str, dataset: Dataset) -> None:
    """Raise InputError if the data set lacks the split that evaluations read.

    Without evaluations no checkpoint is the best one and the run never stops early, so
    that a misspelt split would waste it.
    """
    if split and split not in dataset.splits:
        raise InputError(
            f"train.eval_split='{split}' is no split of the data set "
            f"'{dataset.directory}'{suggest(split, dataset.splits)}; "
            "train.eval_split='' trains without evaluation"
        )
