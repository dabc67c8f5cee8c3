"""Runs on one device: a program for it compiles in less time than one for eight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import pytest

from tokenrec import run_setup, sharding
from tokenrec.config import Config
from tokenrec.evaluation import evaluate, predict


@contextlib.contextmanager
def lone_device() -> Iterator[None]:
    """Let runs in this process take the first device alone."""

    def first_alone(config: Config) -> jax.sharding.Mesh:
        return sharding.make_mesh(config.mesh, jax.devices()[:1])

    with pytest.MonkeyPatch.context() as patch:
        for module in (sharding, run_setup, evaluate, predict):
            patch.setattr(module, "make_run_mesh", first_alone)
        yield
