"""Keep compiled programs in the run's folder, so that a restart loads them."""

from __future__ import annotations

import contextlib
import grp
import hashlib
import os
import platform
import pwd
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax
from jax.experimental.compilation_cache import compilation_cache

from tokenrec.runtime.paths import absolute, is_remote

COMPILED_FOLDER = "compiled"

# How JAX begins its warnings about a cache that it cannot read or write.
_WARNINGS = (
    "Error reading persistent compilation cache entry",
    "Error writing persistent compilation cache entry",
)


@contextlib.contextmanager
def persistent_compilation_cache(
    workdir: Path,
    wanted: bool,
    *,
    every_program: bool = False,
    remedy: str = "train.keep_compiled=False hides this message",
) -> Iterator[None]:
    """Put JAX's persistent compilation cache in `WORKDIR/compiled` inside the block.

    JAX keeps programs that took more than a second to compile, compressed with a
    checksum, and compiles again what it cannot read. Its cache key covers the program,
    the compiler options, the devices and the versions.

    The programs are native code, which JAX runs without a check of its origin. So the
    folder is not used, with a message, where another user could have written it. A
    cache that cannot be read or written costs a message and the time to compile.

    Args:
      workdir: folder of the run.
      wanted: `train.keep_compiled`; False changes nothing. Nothing changes either if a
        cache is in use already, such as that of `JAX_COMPILATION_CACHE_DIR`.
      every_program: keep programs that took less than a second to compile, too.
      remedy: end of the message about a folder that is not used.
    """
    with _short_warnings(), _every_program(every_program):
        if not wanted or jax.config.jax_compilation_cache_dir:
            yield
            return
        folder = absolute(workdir) / COMPILED_FOLDER
        # Machines with different processors may share the folder of a run.
        if jax.default_backend() == "cpu":
            folder /= _processor_hash()
        problem = _prepare(folder, absolute(workdir))
        if problem:
            print(
                f"tokenrec: compiled programs are not kept: {problem}; the run goes on "
                f"and compiles at each start; {remedy}",
                file=sys.stderr,
            )
            yield
            return
        # JAX reads the setting once per process, unless the cache is reset.
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()


@contextlib.contextmanager
def _every_program(wanted: bool) -> Iterator[None]:
    """Keep programs of any compile time inside the block."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    if wanted:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def _prepare(folder: Path, workdir: Path) -> str:
    """Make the folder of the cache; return why it cannot be used, else ""."""
    if is_remote(workdir):
        # Who may write there is decided by the rights of the bucket.
        return ""
    try:
        # Whatever the umask allows, nobody else shall write here.
        for path in (workdir / COMPILED_FOLDER, folder):
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
        return _describe_other_writer(folder, workdir)
    except OSError as error:
        return f"'{folder}': {error.strerror}"


def _describe_other_writer(folder: Path, workdir: Path) -> str:
    """Say which other user could have written a program in the folder, else "".

    Args:
      folder: folder of the cache.
      workdir: folder of the run, which holds it; above it, the user is trusted to know
        who can write.
    """
    parents = [folder, *folder.parents]
    for path in parents[: parents.index(workdir) + 1]:
        # Who can write the folder of a run may rename what is in it, unless it is
        # sticky as /tmp is. In the cache itself a new file is enough.
        problem = _describe_access(path, sticky_is_safe=path == workdir)
        if problem:
            return problem
    with os.scandir(folder) as entries:
        for entry in entries:
            problem = _describe_access(Path(entry.path), sticky_is_safe=False)
            if problem:
                return problem
    return ""


def _describe_access(path: Path, *, sticky_is_safe: bool) -> str:
    # The run's folder itself may be a link of its owner; a link below it is no place
    # where JAX would put a program.
    status = path.stat() if sticky_is_safe else path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"'{path}' is a symbolic link; remove it"
    # Root can write everything anyway.
    if status.st_uid not in (os.geteuid(), 0):
        return (
            f"'{path}' belongs to user {status.st_uid}, who could put other code there; "
            "remove it, or use a --workdir of your own"
        )
    if sticky_is_safe and status.st_mode & stat.S_ISVTX:
        return ""
    others = stat.S_IWOTH
    if not _is_private_group(status.st_gid, status.st_uid):
        others |= stat.S_IWGRP
    if status.st_mode & others:
        return (
            f"other users can write '{path}' (mode {stat.S_IMODE(status.st_mode):o}), "
            f"and put other code there; `chmod go-w '{path}'`, and remove "
            f"{COMPILED_FOLDER} if you do not trust them"
        )
    return ""


def _is_private_group(group: int, user: int) -> bool:
    """Whether the group is the user's own, which has the user's name and no members."""
    try:
        entry, name = grp.getgrgid(group), pwd.getpwuid(user).pw_name
    except KeyError:
        return False
    return entry.gr_name == name and set(entry.gr_mem) <= {name}


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Print one line about a cache that fails, not two for each program."""
    show = warnings.showwarning
    has_warned = False

    def show_once(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        nonlocal has_warned
        text = str(message)
        if not text.startswith(_WARNINGS):
            show(message, category, filename, lineno, file, line)
        elif not has_warned:
            has_warned = True
            print(
                f"tokenrec: the cache of compiled programs fails, so that a restart may "
                "compile again; the run goes on; if each restart says so, remove the "
                f"cache: {text.partition(chr(10))[0][:300]}",
                file=sys.stderr,
            )

    warnings.showwarning = show_once
    try:
        yield
    finally:
        warnings.showwarning = show


def _processor_hash() -> str:
    """Hash of the processor's model and instruction set.

    XLA compiles for the processor at hand, which JAX's cache key does not cover: on
    another one the program could contain instructions that it does not have.
    """
    features = {platform.machine(), platform.processor()}
    # Only Linux has this file.
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            field = line.split("\t")[0].strip().lower()
            if field in ("flags", "features", "model name"):
                features.add(line)
    return hashlib.sha256("\n".join(sorted(features)).encode()).hexdigest()[:12]
