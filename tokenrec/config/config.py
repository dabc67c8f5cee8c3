"""The run configuration, and the paths that it names; `validate` checks it."""

# ml_collections reads the annotations as types: they must not be postponed.

import dataclasses
import os
from pathlib import Path

from tokenrec.config.data_config import DataConfig
from tokenrec.config.fields import field
from tokenrec.config.model_config import HeadConfig, ModelConfig
from tokenrec.config.tokens_config import TokensConfig
from tokenrec.config.train_config import MeshConfig, OptimConfig, TrainConfig
from tokenrec.config.tuning_config import TuningConfig
from tokenrec.errors import InputError
from tokenrec.runtime.local_copy import local_copy
from tokenrec.runtime.paths import as_path, is_remote


@dataclasses.dataclass
class Config:
    """Configuration of a run: the data, the model and how to train it."""

    seed: int = field(0, at_least=0)
    """Random seed of initial weights, sample order, dropout and negatives. A run is
    equal bit for bit to another one with its seed on the same mesh."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokens: TokensConfig = dataclasses.field(default_factory=TokensConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    tuning: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def data_directory(config: Config) -> Path:
    """Local folder of the prepared data set; one in an object store is downloaded.

    Raises:
      InputError: see `data_location` and `local_copy`.
      StorageError: see `local_copy`.
    """
    return local_copy(data_location(config))


def data_location(config: Config) -> Path:
    """Folder of the prepared data set, here or in an object store.

    It is `data.path`, or else `data.name` under `TOKENREC_DATA` or `data/`.

    Raises:
      InputError: both fields are empty, or the path is a URL of another kind.
    """
    if config.data.path:
        return as_path(config.data.path)
    if config.data.name:
        return _data_root() / config.data.name
    raise InputError(
        "data.path and data.name are empty, so there is no data set; "
        "give --data DIR or --config.data.path=DIR"
    )


def semantic_ids_path(config: Config) -> str:
    """Local path of `data.semantic_ids`; empty without semantic ids.

    A path that does not exist is looked up under `TOKENREC_DATA` or `data/`. One in an
    object store is downloaded.
    """
    given = config.data.semantic_ids
    if not given:
        return given
    path = as_path(given)
    if not is_remote(path) and not path.exists():
        under_root = _data_root() / given
        path = under_root if under_root.exists() else path
    return str(local_copy(path))


def _data_root() -> Path:
    return as_path(os.environ.get("TOKENREC_DATA", "data"))
