"""Write the logs of a run whose folder lies in an object store.

Nothing can be appended to an object. The writers therefore write to a local folder, from
which whole files are uploaded: every `UPLOAD_SECONDS`, before each checkpoint, and at the
end. A run that is killed loses the lines since the last upload, but none from before its
last checkpoint, where it resumes.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import threading
import time
from pathlib import Path

from tokenrec.runtime.paths import filesystem, is_remote
from tokenrec.runtime.retry import retry

UPLOAD_SECONDS = 30.0
# An upload may take at most one part in so many of the time: logs grow, and are uploaded
# whole.
_PAUSE_PER_UPLOAD = 20
# Files that an earlier start of the run left, and that the writers continue.
_CONTINUED = ("metrics.jsonl", "trackers.json", "mlflow.db")


class LogMirror:
    """A local folder whose files are uploaded to the folder of a run.

    For a local folder of a run it is that folder, and nothing is uploaded.

    Args:
      workdir: folder of the run.

    Attributes:
      folder: where the logs are to be written.

    Raises:
      StorageError: the log of an earlier start cannot be downloaded.
    """

    def __init__(self, workdir: Path) -> None:
        self._remote = workdir
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_warned = False
        self.folder = workdir
        if not is_remote(workdir):
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="tokenrec-logs-")
        # Trackers name the run by the name of its folder.
        self.folder = Path(self._temporary.name) / workdir.name
        self.folder.mkdir()
        for name in _CONTINUED:
            retry(functools.partial(self._download, name), workdir / name)
        self._thread = threading.Thread(
            target=self._upload_until_closed, name="upload of the logs", daemon=True
        )
        self._thread.start()

    def sync(self) -> None:
        """Upload what has changed, before a checkpoint with which a run can resume.

        Raises:
          StorageError: it cannot be uploaded.
        """
        if self._thread is not None:
            retry(self._upload, self._remote)

    def close(self) -> None:
        """Upload the rest, and delete the local folder; further calls do nothing.

        Raises:
          StorageError: it cannot be uploaded.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closed.set()
        thread.join()
        try:
            retry(self._upload, self._remote)
        finally:
            self._temporary.cleanup()

    def _download(self, name: str) -> None:
        try:
            data = (self._remote / name).read_bytes()
        except FileNotFoundError:
            return
        (self.folder / name).write_bytes(data)

    def _upload_until_closed(self) -> None:
        pause = UPLOAD_SECONDS
        while not self._closed.wait(pause):
            began = time.monotonic()
            try:
                self._upload()
            # The next upload may succeed; that before a checkpoint raises its error.
            except Exception as error:  # noqa: BLE001 - each store has errors of its own
                self._warn(error)
            pause = max(UPLOAD_SECONDS, _PAUSE_PER_UPLOAD * (time.monotonic() - began))

    def _upload(self) -> None:
        """Upload the files that have changed since their last upload."""
        with self._lock:
            for path in sorted(self.folder.rglob("*")):
                if not path.is_file() or path.name.startswith("."):
                    continue
                name = path.relative_to(self.folder).as_posix()
                status = path.stat()
                state = (status.st_size, status.st_mtime_ns)
                if self._uploaded.get(name) == state:
                    continue
                remote = self._remote / name
                # Read before it is sent, for it may grow meanwhile.
                filesystem(remote).pipe_file(str(remote), path.read_bytes())
                self._uploaded[name] = state

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            print(
                f"tokenrec: the logs cannot be uploaded to '{self._remote}': {error}; "
                "the run goes on and tries again",
                file=sys.stderr,
            )
