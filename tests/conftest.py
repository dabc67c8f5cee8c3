"""Every test runs on eight virtual CPU devices, and treats a warning as an error (pyproject.toml)."""

import importlib.util
import os

# Tests compile many small programs that run once: quick compilation beats quick code.
_FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
os.environ["JAX_PLATFORMS"] = "cpu"

import pytest  # noqa: E402
from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which nobody parses under pytest.

# Apache Beam lives in an environment of its own (constraints-beam.txt); `make test-beam` runs this file there.
collect_ignore = [] if importlib.util.find_spec("apache_beam") else ["test_beam.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in collect_ignore:
        terminalreporter.write_line(f"tests/{name} is left out, because apache_beam is not installed: make test-beam")
