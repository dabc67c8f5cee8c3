"""Large recommendation transformers on JAX: prepare data, train, evaluate, predict.

    import tokenrec

    tokenrec.prepare("synthetic", "data/synthetic", rows=60_000)
    config = tokenrec.load_config("synthetic", ["data.path=data/synthetic"])
    tokenrec.train(config, "runs/first")
    run = tokenrec.load("runs/first")
    print(run.evaluate("valid")["macro_auc"])
    scores = run.predict("valid")

The names below are imported on first use: `import tokenrec` imports no JAX, so that flags
and environment variables can be set after it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenrec.api import (
        LoadedRun,
        compile,
        describe,
        evaluate,
        load,
        predict,
        prepare,
        train,
    )
    from tokenrec.config import (
        Config,
        DataConfig,
        HeadConfig,
        MeshConfig,
        ModelConfig,
        OptimConfig,
        TokensConfig,
        TrainConfig,
    )
    from tokenrec.config.load import load_config
    from tokenrec.data.dataset import open_dataset
    from tokenrec.errors import InputError

__version__ = "0.2.0"

# Public name -> module that defines it.
_PUBLIC = {
    "Config": "tokenrec.config",
    "DataConfig": "tokenrec.config",
    "HeadConfig": "tokenrec.config",
    "InputError": "tokenrec.errors",
    "LoadedRun": "tokenrec.api",
    "MeshConfig": "tokenrec.config",
    "ModelConfig": "tokenrec.config",
    "OptimConfig": "tokenrec.config",
    "TokensConfig": "tokenrec.config",
    "TrainConfig": "tokenrec.config",
    "compile": "tokenrec.api",
    "describe": "tokenrec.api",
    "evaluate": "tokenrec.api",
    "load": "tokenrec.api",
    "load_config": "tokenrec.config.load",
    "open_dataset": "tokenrec.data.dataset",
    "predict": "tokenrec.api",
    "prepare": "tokenrec.api",
    "train": "tokenrec.api",
}

__all__ = [
    "Config",
    "DataConfig",
    "HeadConfig",
    "InputError",
    "LoadedRun",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "TokensConfig",
    "TrainConfig",
    "__version__",
    "compile",
    "describe",
    "evaluate",
    "load",
    "load_config",
    "open_dataset",
    "predict",
    "prepare",
    "train",
]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'tokenrec' has no attribute '{name}'")
    value = getattr(importlib.import_module(module), name)
    # Later look-ups find it in the module itself.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))
