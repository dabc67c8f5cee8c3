"""The functions of `import tokenrec`: each verb of the command line as a call.

Everything is imported inside the functions, so that `import tokenrec` stays light.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import is_file
from tokenrec.runtime.paths import as_path, local_path

if TYPE_CHECKING:
    import pyarrow as pa
    from jax.sharding import Mesh

    from tokenrec.checkpoint.run_folder import OpenedRun
    from tokenrec.config import Config, MeshConfig
    from tokenrec.data.batch import Batch
    from tokenrec.data.metadata import Metadata
    from tokenrec.data.source import Source


def prepare(
    source: str | Source,
    out: str | Path,
    *,
    overwrite: bool = False,
    like: str | Path | None = None,
    statistics: str | None = None,
    tokenizer: str | Path | None = None,
    **options: Any,
) -> Metadata:
    """Prepare a data set.

    Args:
      source: a `Source`, or the name of one: "synthetic", "complete_journey", "kuairand",
        "amazon", "recbole", "tfds", "delimited".
      out: folder to make.
      overwrite: replace the prepared data set in `out`.
      like: folder of a data set, or of a run, that the new one goes on from; see
        `tokenrec.data.preparation.prepare.prepare`.
      statistics: of a named source: JSON file that declares statistics of the past, or
        "none"; None for those that are shipped for the source, if any, as the flag
        `--statistics`.
      tokenizer: `tokenizer.json` of a pretrained language model, or its folder: texts
        are encoded with it instead of a tokenizer that is trained on them.
      options: arguments of the named source, such as `rows` of `SyntheticSource`.

    Returns:
      Metadata of the data set: schema, counts, provenance.

    Raises:
      InputError: an unknown name, or anything that the source refuses.
    """
    from tokenrec.data.preparation.prepare import prepare as prepare_source

    if isinstance(source, str):
        if source == "delimited" and like is not None:
            # Its rows need no split then.
            options = {"like": True, **options}
        from tokenrec.data.past.shipped import add_statistics

        source = add_statistics(_make_source(source, options), source, statistics)
    elif options or statistics is not None:
        names = ", ".join([*options, *(["statistics"] if statistics else [])])
        raise InputError(f"{names}: arguments of a named source; source is an object")
    return prepare_source(
        source,
        local_path(out, "out"),
        overwrite=overwrite,
        like=data_folder(like),
        tokenizer=None if tokenizer is None else local_path(tokenizer, "tokenizer"),
    )


def train(
    config: Config, workdir: str | Path, *, progress: bool = True
) -> dict[str, Any]:
    """Train a run, or resume it where `workdir` holds one.

    Args:
      config: what to train.
      workdir: folder of the run.
      progress: show a progress bar.

    Returns:
      See `tokenrec.train_loop.train`.
    """
    from tokenrec.analysis.watch import make_state_logger
    from tokenrec.train_loop import train as train_run

    return train_run(
        config, as_path(workdir), progress=progress, make_state_logger=make_state_logger
    )


def evaluate(
    workdir: str | Path,
    split: str = "valid",
    *,
    checkpoint: str = "best",
    data: str | Path | None = None,
    baselines: bool = False,
    samples: int = 0,
    freeze_at: str | None = None,
) -> dict[str, Any]:
    """Compute the metrics of a run on a split.

    Args:
      workdir: folder of the run.
      split: "train", "valid" or "test".
      checkpoint: "best", "latest" or a step.
      data: folder of the data set, if it has moved.
      baselines: add the metrics of baselines on the same log rows.
      samples: evaluate this many samples, spread evenly over the split; 0 for all.
      freeze_at: ranking: add the metrics with histories that end at this time, as the
        flag `--freeze-at` reads it.

    Returns:
      The JSON value that `tokenrec evaluate --json` writes.
    """
    from tokenrec.evaluation.evaluate import evaluate_run

    return evaluate_run(
        as_path(workdir),
        split,
        checkpoint,
        _optional_path(data),
        baselines=baselines,
        limit=samples,
        freeze_at=freeze_at,
    )


def predict(
    workdir: str | Path,
    split: str | None,
    out: str | Path,
    *,
    checkpoint: str = "best",
    data: str | Path | None = None,
    freeze_at: str | None = None,
) -> int:
    """Write the scores of a split to a Parquet file.

    Args:
      workdir: folder of the run.
      split: "train", "valid" or "test"; None is the only one of the data set.
      out: file to write.
      checkpoint: "best", "latest" or a step.
      data: folder of the data set, if it has moved, or of another one that the run can
        read, such as one prepared with `like`.
      freeze_at: score with histories and statistics of the past that end at this time,
        as in `evaluate`.

    Returns:
      The number of log rows, or of recommended items.
    """
    from tokenrec.evaluation.predict import predict_run

    return predict_run(
        as_path(workdir),
        split,
        checkpoint,
        _optional_path(data),
        as_path(out),
        freeze_at=freeze_at,
    )


def describe(config: Config) -> dict[str, Any]:
    """Count parameters, tokens and FLOPs of a config; see `tokenrec describe --json`."""
    from tokenrec.planner.describe import describe as describe_config
    from tokenrec.planner.planned_schema import resolve_schema, resolve_steps

    schema, _ = resolve_schema(config)
    return describe_config(resolve_steps(config), schema)


def compile(
    config: Config,
    topology: str,
    *,
    slices: int = 1,
    mesh: MeshConfig | None = None,
) -> dict[str, Any]:
    """Compile the train step ahead of time for a TPU topology; no TPU is needed.

    Args:
      config: what to compile.
      topology: chips of a slice, such as "v5p:8x8x8".
      slices: number of slices.
      mesh: replaces the mesh of the config.

    Returns:
      Bytes, FLOPs, collectives and bounds per device; see `tokenrec compile --json`.
    """
    from tokenrec.planner.compile import compile_config

    return compile_config(config, topology, slices, mesh)


def load(
    workdir: str | Path, checkpoint: str = "best", *, data: str | Path | None = None
) -> LoadedRun | Any:
    """Load a trained run, or an artifact that `tokenrec export` wrote.

    Args:
      workdir: folder of the run, or of the artifact.
      checkpoint: of a run: "best", "latest" or a step.
      data: of a run: folder of the data set, if it has moved.

    Returns:
      A `LoadedRun`; of an artifact a `tokenrec.serving.loaded.LoadedArtifact`, whose
      `score(requests)` and `retrieve(requests)` need no data set.

    Raises:
      InputError: there is no such run or checkpoint, the data set does not fit it, or
        the artifact is damaged.
    """
    from tokenrec.serving.artifact import is_artifact

    if is_artifact(as_path(workdir)):
        from tokenrec.serving.loaded import LoadedArtifact

        return LoadedArtifact(as_path(workdir))
    import jax

    from tokenrec.checkpoint.run_folder import load_run_config, open_run
    from tokenrec.sharding import make_run_mesh

    folder = as_path(workdir)
    config = load_run_config(folder, _optional_path(data))
    mesh = make_run_mesh(config)
    with jax.set_mesh(mesh):
        return LoadedRun(open_run(folder, checkpoint, _optional_path(data)), mesh)


class LoadedRun:
    """A trained run in memory. Made by `tokenrec.load`.

    Attributes:
      config: config that the run was trained with.
      checkpoint_step: step of the loaded checkpoint.
      dataset: the data set.
      mesh: devices that hold the weights.
    """

    def __init__(self, run: OpenedRun, mesh: Mesh) -> None:
        self.config = run.model.config
        self.checkpoint_step = run.step
        self.dataset = run.dataset
        self.mesh = mesh
        self._run = run
        self._jitted_step: Any = None

    def evaluate(
        self,
        split: str = "valid",
        *,
        baselines: bool = False,
        samples: int = 0,
        freeze_at: str | None = None,
    ) -> dict[str, Any]:
        """Compute metrics of a split; see `tokenrec.evaluate`."""
        from tokenrec.evaluation.evaluate import evaluate_opened

        report = evaluate_opened(
            self._run,
            self.mesh,
            split,
            baselines=baselines,
            limit=samples,
            freeze_at=freeze_at,
        )
        return {"split": split, "step": self.checkpoint_step} | report

    def predict(self, split: str = "valid") -> pa.Table:
        """Score a split.

        Returns:
          Ranking: a row per impression with `user_id, item_id, time_ms`, and
          `label_TASK` and `score_TASK` of each task; of a task of classes
          `score_TASK_CLASS` of each class. Retrieval: `head.top_k` rows per
          request with `user_id, rank, item_id, score, time_ms`.
        """
        import jax
        import pyarrow as pa

        from tokenrec.evaluation.predict import prediction_tables

        with jax.set_mesh(self.mesh):
            return pa.concat_tables(prediction_tables(self._run, split, self.mesh))

    def item_vectors(self) -> pa.Table:
        """Vectors of the catalogue.

        For retrieval of the next item these are the vectors that a read-out is scored
        against. For other runs they are the embedding of the item's id, if the data set
        has such a feature.

        Returns:
          Columns `item_id`, the original ids in the order of the catalogue, and
          `vector`, `[d] float32`.

        Raises:
          InputError: the model has no vector per item.
        """
        import jax

        from tokenrec.evaluation.item_vectors import item_vectors

        with jax.set_mesh(self.mesh):
            return item_vectors(self._run)

    def batches(self, split: str = "valid", *, samples: int = 0) -> Iterator[Batch]:
        """Batches of a split as NumPy arrays, for `step`.

        Args:
          split: "train", "valid" or "test".
          samples: number of samples, spread evenly over the split; 0 for all.
        """
        from tokenrec.config.backbones import reads_event_ages
        from tokenrec.data.pipeline import eval_batches

        ages = reads_event_ages(self.config.model)
        for host, _ in eval_batches(
            self.dataset, self.config.data, split, limit=samples, ages=ages
        ):
            yield host.batch

    def step(self, batch: Batch) -> Any:
        """Run the model on one batch.

        Args:
          batch: NumPy arrays, as `batches` yields them.

        Returns:
          Ranking: predictions `[B, N, O] float32` of the scored positions, one of each
          task (probabilities of binary tasks, numbers in the unit of the label) and one
          of each class; those with `batch.weight` 0 are padding. Retrieval: a `RetrievalResult` with items and
          scores `[B, k]`.
        """
        import jax

        from tokenrec.evaluation.evaluate import jit_eval_step, make_retrieval_step
        from tokenrec.sharding import to_devices, to_host

        with jax.set_mesh(self.mesh):
            if self._jitted_step is None:
                ranking = self.config.data.objective == "ranking"
                self._jitted_step = (
                    jit_eval_step(self._run.model)
                    if ranking
                    else make_retrieval_step(self._run.model, self.dataset)
                )
            return to_host(
                self._jitted_step(self._run.state, to_devices(batch, self.mesh))
            )


def _make_source(name: str, options: dict[str, Any]) -> Source:
    from tokenrec.data.sources.amazon import AmazonSource
    from tokenrec.data.sources.complete_journey import CompleteJourneySource
    from tokenrec.data.sources.delimited import DelimitedSource
    from tokenrec.data.sources.kuairand import KuaiRandSource
    from tokenrec.data.sources.recbole import RecBoleSource
    from tokenrec.data.sources.synthetic import SyntheticSource
    from tokenrec.data.sources.tfds import TfdsSource

    sources: dict[str, Any] = {
        "amazon": AmazonSource,
        "complete_journey": CompleteJourneySource,
        "delimited": DelimitedSource,
        "kuairand": KuaiRandSource,
        "recbole": RecBoleSource,
        "synthetic": SyntheticSource,
        "tfds": TfdsSource,
    }
    if name not in sources:
        raise InputError(f"source='{name}' does not exist{suggest(name, sources)}")
    try:
        return sources[name](**options)
    except TypeError as error:
        raise InputError(
            f"source='{name}': {error}; see {sources[name].__name__}"
        ) from error


def data_folder(like: str | Path | None) -> Path | None:
    """Find the data set that `like` names, by itself or by the run trained on it.

    One in an object store is downloaded.

    Raises:
      InputError: it is a run whose data set is gone or another.
    """
    path = _optional_path(like)
    if path is None:
        return None
    if is_file(path / "config.json"):
        from tokenrec.checkpoint.run_folder import data_of_run

        return data_of_run(path)
    from tokenrec.runtime.local_copy import local_copy

    return local_copy(path)


def _optional_path(path: str | Path | None) -> Path | None:
    return None if path is None else as_path(path)
