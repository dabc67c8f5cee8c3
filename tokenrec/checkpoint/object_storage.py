"""Let Orbax save to object stores.

Orbax writes `gs://` itself: the arrays through TensorStore, and the other files through
`etils.epath`. A folder cannot be renamed there, so Orbax writes under the final name and
adds `commit_success.txt` at the end: a folder without it is no checkpoint.

TensorStore writes `s3://` as well, but Orbax (0.12.8) builds its specs for `gs://` alone
(google/orbax#2739). `enable_s3` replaces the three functions that do it. S3 is not in
Orbax's list of stores without a rename either; `orbax_context` selects the commit file.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from tokenrec.errors import InputError
from tokenrec.runtime.paths import list_files, list_names, remove_folder

# Orbax writes it last.
COMMIT_FILE = "commit_success.txt"
_S3 = "s3://"
# Copies of an array on several devices save a part each. Below so many bytes a part takes longer than it saves: it is
# compiled as a program of its own, and is a chunk of its own in the files.
_SMALLEST_PART = 1 << 20


@contextlib.contextmanager
def orbax_context(folder: Path) -> Iterator[None]:
    """Make Orbax save and load as the store of `folder` needs, inside the block.

    Small arrays are saved whole, by the first of the devices that hold them.

    It holds for the calling thread.

    Args:
      folder: folder of the checkpoints.
    """
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = _SMALLEST_PART
    if os.fspath(folder).startswith(_S3):
        enable_s3()
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    else:
        # Where a folder cannot be made, the save fails at once, and not after the 300
        # seconds that its other threads would wait for the folder.
        context.asynchronous.create_directories_asynchronously = False
    with context:
        yield


def committed_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder of an object store, ascending."""
    return sorted(
        int(step)
        for step, _, name in (path.partition("/") for path in list_files(folder))
        if name == COMMIT_FILE and step.isdecimal()
    )


def uncommit(checkpoint: Path) -> None:
    """Make a folder in an object store no checkpoint any more, in one step.

    What is deleted or copied afterwards, object by object, is not taken for one.
    """
    (checkpoint / COMMIT_FILE).unlink(missing_ok=True)


def remove_uncommitted(folder: Path) -> None:
    """Delete what interrupted saves and deletions left in an object store."""
    complete = set(committed_steps(folder))
    for name in list_names(folder):
        if name.isdecimal() and int(name) not in complete:
            remove_folder(folder / name)


@functools.cache
def enable_s3() -> None:
    """Make Orbax build TensorStore specs for `s3://`.

    Raises:
      InputError: this version of Orbax builds them in another way.
    """
    modules = {
        "_use_gcs_driver": tensorstore_utils,
        "_normalize_path": tensorstore_utils,
        "get_kvstore_for_gcs": gcs_utils,
    }
    lacking = [name for name, module in modules.items() if not hasattr(module, name)]
    if lacking:
        raise InputError(
            f"s3:// checkpoints: this version of orbax-checkpoint has no {lacking[0]}; "
            "install 0.12.8, the version in constraints.txt"
        )
    use_driver = tensorstore_utils._use_gcs_driver
    normalize = tensorstore_utils._normalize_path
    gcs_spec = gcs_utils.get_kvstore_for_gcs

    def use_store_driver(directory: str) -> bool:
        return directory.startswith(_S3) or use_driver(directory)

    def normalize_path(path: str) -> str:
        # `os.path.normpath` makes one slash of two.
        return normalize(path).replace("s3:/", _S3)

    def store_spec(path: str) -> dict[str, Any]:
        return s3_spec(path) if path.startswith(_S3) else gcs_spec(path)

    tensorstore_utils._use_gcs_driver = use_store_driver
    tensorstore_utils._normalize_path = normalize_path
    gcs_utils.get_kvstore_for_gcs = store_spec


def s3_spec(path: str) -> dict[str, Any]:
    """Spec of TensorStore for a path in S3, with the settings that s3fs reads too."""
    bucket, _, key = path.removeprefix(_S3).partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get(
        "AWS_ENDPOINT_URL"
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        # TensorStore signs requests for a region, which other servers do not look at.
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        # Else TensorStore reports each place where it finds no credentials.
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def check_remote(folder: Path) -> None:
    """Check that Orbax can save to a folder in an object store.

    Raises:
      InputError: its path has a character that Orbax takes for a pattern, or it is in
        S3 and this version of Orbax cannot be made to write there.
    """
    found = next((mark for mark in os.fspath(folder) if mark in r"*?[]\\"), None)
    if found:
        raise InputError(
            f"--workdir: '{folder}' contains '{found}', which Orbax takes for a "
            r"pattern; give a --workdir without any of * ? [ ] \ "
        )
    if os.fspath(folder).startswith(_S3):
        enable_s3()
