"""Keep compiled programs in the run's folder, so that a restart loads them."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from tokenrec.runtime.paths import absolute

COMPILED_FOLDER = "compiled"


@contextlib.contextmanager
def persistent_compilation_cache(workdir: Path, wanted: bool) -> Iterator[None]:
    """Put JAX's persistent compilation cache in `WORKDIR/compiled` inside the block.

    JAX keeps programs that took more than a second to compile, compressed with a
    checksum, and compiles again what it cannot read. Its cache key covers the program,
    the compiler options, the devices and the versions.

    Args:
      workdir: folder of the run.
      wanted: `train.keep_compiled`; False changes nothing. Nothing changes either if a
        cache is in use already, such as that of `JAX_COMPILATION_CACHE_DIR`.
    """
    if not wanted or jax.config.jax_compilation_cache_dir:
        yield
        return
    folder = absolute(workdir) / COMPILED_FOLDER
    # Machines with different processors may share the folder of a run.
    if jax.default_backend() == "cpu":
        folder /= _processor_hash()
    # JAX reads the setting once per process, unless the cache is reset.
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


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
