"""Give Orbax a path without characters that it takes for a pattern.

Orbax lists its own folders by patterns that begin with their paths, so that it finds
nothing in `runs/lr=[1,2]` and loses the weights without an error. TensorStore refuses a
few further characters.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from tokenrec.checkpoint.object_storage import check_remote
from tokenrec.errors import InputError
from tokenrec.runtime.paths import is_remote

_SPECIAL = re.compile(r"[*?\[\]\\:]")


@contextlib.contextmanager
def orbax_path(folder: Path) -> Iterator[Path]:
    """Yield a path of `folder` that Orbax takes literally.

    It is `folder` itself, or a symbolic link to it in a temporary folder, which is
    removed at the end of the block.

    Args:
      folder: an existing folder, as an absolute path.

    Raises:
      InputError: a run of several processes needs the same path in all of them, which a
        temporary folder is not; or Orbax cannot save to this folder of an object store.
    """
    if is_remote(folder):
        check_remote(folder)
        yield folder
        return
    found = _SPECIAL.search(str(folder))
    if found is None:
        yield folder
        return
    if jax.process_count() > 1:
        raise InputError(
            f"--workdir: '{folder}' contains '{found.group()}', which Orbax takes for a "
            "pattern; give a run of several processes a --workdir without any of "
            r"* ? [ ] \ :"
        )
    with tempfile.TemporaryDirectory(prefix="tokenrec-") as temporary:
        link = Path(temporary) / "checkpoints"
        link.symlink_to(folder, target_is_directory=True)
        yield link
