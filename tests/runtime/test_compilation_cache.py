"""Compiled programs in a run's folder are used again, unless they are damaged."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from tokenrec.runtime.compilation_cache import (
    COMPILED_FOLDER,
    persistent_compilation_cache,
)

HIT = "/jax/compilation_cache/cache_hits"


@pytest.fixture
def hits() -> Iterator[list[str]]:
    """A list that grows with each program that the cache returns; starts without one."""
    events: list[str] = []

    def record(event: str, **_: str | int) -> None:
        if event == HIT:
            events.append(event)

    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    monitoring.register_event_listener(record)
    yield events
    monitoring.unregister_event_listener(record)
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
    compilation_cache.reset_cache()


def run(workdir: Path, wanted: bool = True) -> float:
    with persistent_compilation_cache(workdir, wanted):
        return float(
            jax.jit(lambda x: jnp.cumsum(jnp.sin(x))[-1] * 3.25)(jnp.arange(5.0))
        )


def programs(workdir: Path) -> list[Path]:
    return sorted(path for path in (workdir / COMPILED_FOLDER).rglob("*-cache"))


def test_a_program_is_compiled_once_and_the_setting_is_undone(
    tmp_path: Path, hits: list[str]
) -> None:
    first = run(tmp_path)
    assert programs(tmp_path)
    assert not hits
    assert run(tmp_path) == first
    assert hits
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_is_in_use_already_stays_in_use(
    tmp_path: Path, hits: list[str]
) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "shared"))
    run(tmp_path)
    run(tmp_path / "other", wanted=False)
    assert not (tmp_path / COMPILED_FOLDER).exists()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")


@pytest.mark.parametrize("damage", ["bits", "end"])
def test_a_damaged_program_is_compiled_again(
    tmp_path: Path, hits: list[str], damage: str
) -> None:
    first = run(tmp_path)
    for path in programs(tmp_path):
        data = bytearray(path.read_bytes())
        if damage == "bits":
            data[len(data) // 2] ^= 4
        else:
            del data[len(data) // 2 :]
        path.write_bytes(data)
    assert run(tmp_path) == first
    assert not hits
