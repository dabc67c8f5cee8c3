"""Run configuration: the dataclasses and their JSON.

`tokenrec.config.load` reads config files and command-line overrides,
`tokenrec.config.validate` checks them, `tokenrec.config.reference` lists the fields.
"""

from tokenrec.config.config import (
    Config,
    data_directory,
    data_location,
    semantic_ids_path,
)
from tokenrec.config.data_config import DataConfig
from tokenrec.config.json_format import from_json, read_config, to_json
from tokenrec.config.model_config import (
    DecoderConfig,
    HeadConfig,
    ModelConfig,
    Remat,
)
from tokenrec.config.tokens_config import Compression, TokensConfig
from tokenrec.config.train_config import MeshConfig, OptimConfig, TrainConfig
from tokenrec.config.tuning_config import TuningConfig

__all__ = [
    "Compression",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "HeadConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Remat",
    "TokensConfig",
    "TrainConfig",
    "TuningConfig",
    "data_directory",
    "data_location",
    "from_json",
    "read_config",
    "semantic_ids_path",
    "to_json",
]
