"""Every test runs on eight virtual CPU devices, and treats a warning as an error (pyproject.toml)."""

import atexit
import gc
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Tests compile many small programs that run once: quick compilation beats quick code.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
os.environ["JAX_PLATFORMS"] = "cpu"

# Many tests compile the same programs: a folder for all of them, that of the first process, which starts the workers.
# The small ones too: one takes some 50 ms to compile, and 10 ms to read.
_COMPILED = "JAX_COMPILATION_CACHE_DIR"
if _COMPILED not in os.environ:
    os.environ[_COMPILED] = tempfile.mkdtemp(prefix="tokenrec-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    atexit.register(shutil.rmtree, os.environ[_COMPILED], ignore_errors=True)

# The processes that tests start import the same modules: without their bytecode each one compiles them again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which nobody parses under pytest.

# Apache Beam lives in an environment of its own (constraints-beam.txt); `make test-beam` runs this file there.
collect_ignore = (
    [] if importlib.util.find_spec("apache_beam") else ["data/beam/test_beam.py"]
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Leave what is imported and collected out of every collection of garbage.

    It lives to the end, and walking it took 19 % of the time of collecting the tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        # Tracing makes very many small objects: collecting at each 2,000 of them took 5 % of the time of a compilation.
        gc.set_threshold(50_000, 20, 100)
        gc.enable()


# Every compiled program maps a few pieces of memory, and Linux gives a process 65,530; beyond that, compiling crashes.
_MEMORY_MAPS = Path("/proc/self/maps")
_MANY_MAPS = 25_000


@pytest.fixture(autouse=True, scope="module")
def drop_compiled_programs() -> Iterator[None]:
    """Drop the programs of earlier modules where a worker holds very many."""
    yield
    if _MEMORY_MAPS.exists():
        with _MEMORY_MAPS.open() as maps:
            count = sum(1 for _ in maps)
        if count > _MANY_MAPS:
            jax.clear_caches()
            gc.collect()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in collect_ignore:
        terminalreporter.write_line(
            f"tests/{name} is left out, because apache_beam is not installed: make test-beam"
        )


@pytest.fixture(scope="module", name="lone_device")
def runs_take_one_device() -> Iterator[None]:
    """For modules in which devices are not the matter; see tests/lone_device.py."""
    from tests.lone_device import lone_device

    with lone_device():
        yield
