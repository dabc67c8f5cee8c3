"""Compiled programs in a run's folder are used again, unless they are damaged."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from tokenrec.runtime import compilation_cache as cache_module
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


def test_quick_programs_are_kept_where_every_program_is_wanted(
    tmp_path: Path, hits: list[str]
) -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1_000)
    for folder, every_program in (("slow", False), ("all", True)):
        with persistent_compilation_cache(
            tmp_path / folder, True, every_program=every_program
        ):
            jax.jit(lambda x: jnp.cos(x) * 1.75)(jnp.arange(7.0))
    assert not programs(tmp_path / "slow")
    assert programs(tmp_path / "all")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1_000


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


@pytest.mark.parametrize("place", ["", COMPILED_FOLDER, "inside", "file"])
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_a_cache_that_others_can_write_is_not_used_and_says_so(
    tmp_path: Path,
    hits: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    bits: int,
) -> None:
    # The group of the tests' user is its own, which would be allowed.
    monkeypatch.setattr(cache_module, "_is_private_group", lambda group, user: False)
    first = run(tmp_path)
    assert programs(tmp_path)
    open_to_others = {
        "inside": programs(tmp_path)[0].parent,
        "file": programs(tmp_path)[0],
    }.get(place, tmp_path / place)
    open_to_others.chmod(open_to_others.stat().st_mode | bits)
    assert run(tmp_path) == first
    assert not hits
    error = capsys.readouterr().err
    assert error.startswith("tokenrec: compiled programs are not kept: other users can")
    assert f"'{open_to_others}'" in error
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_of_another_user_or_behind_a_link_is_not_used(
    tmp_path: Path,
    hits: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "geteuid", lambda: 12_345)
        if tmp_path.stat().st_uid != 0:
            run(tmp_path)
            assert "belongs to user" in capsys.readouterr().err
    (tmp_path / COMPILED_FOLDER).rename(tmp_path / "elsewhere")
    (tmp_path / COMPILED_FOLDER).symlink_to(tmp_path / "elsewhere")
    run(tmp_path)
    assert "is a symbolic link" in capsys.readouterr().err
    assert not hits


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_folder_that_belongs_to_somebody_else_is_named(
    tmp_path: Path, hits: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    os.chown(tmp_path / COMPILED_FOLDER, 12_345, -1)
    run(tmp_path)
    assert "belongs to user 12345" in capsys.readouterr().err
    assert not hits


def test_a_sticky_folder_and_the_user_s_own_group_are_trusted(
    tmp_path: Path, hits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o1777)
    run(tmp_path)
    run(tmp_path)
    assert len(hits) >= 1
    monkeypatch.setattr(cache_module, "_is_private_group", lambda group, user: True)
    tmp_path.chmod(0o775)
    before = len(hits)
    run(tmp_path)
    assert len(hits) > before


def test_the_folder_is_closed_to_others_whatever_the_umask(
    tmp_path: Path, hits: list[str]
) -> None:
    before = os.umask(0)
    try:
        run(tmp_path)
    finally:
        os.umask(before)
    folder = programs(tmp_path)[0].parent
    assert folder.stat().st_mode & 0o022 == 0
    assert folder.parent.stat().st_mode & 0o022 == 0


def test_a_cache_that_cannot_be_written_is_one_line_and_the_run_goes_on(
    tmp_path: Path,
    hits: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / COMPILED_FOLDER).write_text("not a folder")
    assert run(tmp_path) == pytest.approx(3.25 * 1.1349, abs=0.01)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert COMPILED_FOLDER in error


def test_errors_of_jax_s_own_cache_are_one_line_in_all(
    tmp_path: Path,
    hits: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(
        warnings, "showwarning", lambda message, *_: shown.append(str(message))
    )
    (tmp_path / "cache").write_text("not a folder")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    compilation_cache.reset_cache()
    # The tests raise warnings as errors, which a run does not.
    warnings.simplefilter("default")
    with persistent_compilation_cache(tmp_path / "run", True):
        for factor in range(2, 5):
            jax.jit(lambda x, factor=factor: jnp.sin(x) * factor)(jnp.arange(5.0))
        warnings.warn("another one", UserWarning, stacklevel=1)
    error = capsys.readouterr().err
    assert error.count("the cache of compiled programs fails") == 1
    assert shown == ["another one"]
