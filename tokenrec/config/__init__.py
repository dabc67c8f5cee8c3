"""Run configuration: dataclasses, loading, validation."""

from tokenrec.config.config import (
    Compression,
    Config,
    DataConfig,
    HeadConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Remat,
    TokensConfig,
    TrainConfig,
    data_directory,
    from_json,
    read_config,
    semantic_ids_path,
    to_json,
)

__all__ = [
    "Compression",
    "Config",
    "DataConfig",
    "HeadConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Remat",
    "TokensConfig",
    "TrainConfig",
    "data_directory",
    "from_json",
    "read_config",
    "semantic_ids_path",
    "to_json",
]
