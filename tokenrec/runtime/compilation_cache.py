"""Compiled programs, kept beside a run: it goes on without compiling them again."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "compiled"


@contextlib.contextmanager
def persistent_compilation_cache(workdir: Path, wanted: bool) -> Iterator[None]:
    """Within it JAX's persistent compilation cache lies in `WORKDIR/compiled`, unless it is not wanted or one is in use
    already, such as that of `JAX_COMPILATION_CACHE_DIR`.

    JAX keeps what took more than a second to compile, compressed with a checksum, and compiles again what it cannot
    read. Its key holds the program, the options, the devices and the versions.
    """
    if not wanted or jax.config.jax_compilation_cache_dir:
        yield
        return
    folder = Path(workdir).absolute() / FOLDER
    if jax.default_backend() == "cpu":
        folder /= _processor()
    compilation_cache.reset_cache()  # JAX looks for the folder once a process
    jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def _processor() -> str:
    """XLA compiles for the very processor that it runs on, which JAX's key does not hold: another one might meet
    instructions that it does not have.
    """
    told = {platform.machine(), platform.processor()}
    with contextlib.suppress(FileNotFoundError):  # Linux alone has the file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told |= {
            line
            for line in lines
            if line.split("\t")[0].strip().lower()
            in ("flags", "features", "model name")
        }
    return hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest()[:12]
