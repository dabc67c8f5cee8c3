"""Every test runs on eight virtual CPU devices, and treats a warning as an error (pyproject.toml)."""

import os

# Tests compile many small programs that run once: quick compilation beats quick code.
_FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which nobody parses under pytest.
