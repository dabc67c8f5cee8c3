"""A tiny run, exported once for the tests of this folder."""

from pathlib import Path

import pytest

import tokenrec
from tests.lone_device import lone_device
from tests.shared_folder import shared_folder
from tokenrec import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)


@pytest.fixture(scope="session")
def exported_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a ranking run (NIO) and of its artifact."""
    pytest.importorskip("flatbuffers", reason="an artifact is written with it")
    folder = shared_folder(tmp_path_factory, "exported_run", export_tiny_run)
    return folder / "run", folder / "model"


def export_tiny_run(folder: Path) -> None:
    """Prepare a data set, train a run and export it, in a folder."""
    from tokenrec.serving.export.run import export_run

    tokenrec.prepare("synthetic", folder / "data", rows=2_000, users=40, items=24)
    config = Config(
        data=DataConfig(
            path=str(folder / "data"),
            events=6,
            candidates=3,
            batch_size=8,
            eval_batch_size=16,
        ),
        tokens=TokensConfig(embedding_dim=4, fused=True, user_tokens=1, min_count=5),
        model=ModelConfig(width=8, heads=1, layers=2, windows=(4,), branch="mean"),
        optim=OptimConfig(steps=2, warmup_steps=1),
        train=TrainConfig(log_every=2, eval_samples=8),
    )
    with lone_device():
        tokenrec.train(config, folder / "run", progress=False)
    export_run(folder / "run", folder / "model", platforms=("cpu",))


@pytest.fixture(scope="session")
def artifact(exported_run: tuple[Path, Path]) -> Path:
    """Folder of the artifact; copy it to change it."""
    return exported_run[1]
