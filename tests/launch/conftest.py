"""A command line of `tokenrec launch`, with any of its flags replaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokenrec.cli.main import main

FLAGS = {
    "config": "synthetic",
    "topology": "v5e:4x4",
    "target": "gke",
    "image": "europe-docker.pkg.dev/my-project/tokenrec/train:0.1.0",
    "bucket": "my-bucket",
}
TPU_VM = {
    "target": "tpu-vm",
    "project": "my-project",
    "zone": "us-west4-a",
    "gcsfuse_sha256": "installed",
}
SLURM = {
    "target": "slurm",
    "topology": "h100:2x8",
    "image": None,
    "bucket": None,
    "data": "/shared/data/synthetic",
    "runs": "/shared/runs",
    "venv": "/shared/venv",
}
SERVING = {
    "config": None,
    "topology": None,
    "bucket": None,
    "target": "serving",
    "image": "europe-docker.pkg.dev/my-project/tokenrec/serve:0.1.0",
    "model": "pvc://models/ranker",
}

Launch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def launch(capsys: pytest.CaptureFixture[str]) -> Launch:
    """Run the verb, and return its exit code, stdout and stderr.

    A flag that is None is left out.
    """

    def run(*more: str, **flags: str | None) -> tuple[int, str, str]:
        given = {
            name: value for name, value in (FLAGS | flags).items() if value is not None
        }
        argv = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        code = main(["launch", *argv, *more])
        return code, *capsys.readouterr()

    return run
