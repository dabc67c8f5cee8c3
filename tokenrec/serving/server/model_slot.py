"""The model that serves, and its replacement while requests are in flight."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenrec.errors import InputError
from tokenrec.serving.server.metrics import ServerMetrics
from tokenrec.serving.server.prefix_store import PrefixStore

_LOG = logging.getLogger("tokenrec.serving")

MANIFEST = "manifest.json"

_SERIALS = itertools.count()

# What a link points to: the folder, and the identity of its manifest.
type Target = tuple[str, int, int, int]


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model that is ready: its shapes compiled, its golden scores replayed.

    Attributes:
      scorer: its scorer.
      path: folder of the artifact, links resolved.
      ready_ms: time at which it was ready, in milliseconds since 1970.
      compiles: shapes that were compiled by then.
      serial: number of the load, which no other model of this process has.
      live: histories and counters that events keep up to date; None without them.
    """

    scorer: Any
    path: Path
    ready_ms: int
    compiles: int
    serial: int
    live: Any = None

    @property
    def name(self) -> str:
        """Name of this load of the artifact.

        A prefix belongs to the arrays of one load: when an artifact serves again, late
        prefixes of its first load must not be taken for its own.
        """
        return f"{self.scorer.digest}:{self.serial}"

    def compiles_since_ready(self) -> int:
        """Return the number of shapes that were compiled while it served."""
        return int(self.scorer.compiles) - self.compiles


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """How the newest load of a model ended.

    Attributes:
      name: name of the artifact's folder.
      outcome: "ok", or "failed": then the model before it goes on to serve.
      error: why it failed; "" if it did not.
      time_ms: when it ended, in milliseconds since 1970.
    """

    name: str
    outcome: str
    error: str
    time_ms: int


class ModelSlot:
    """The place of the model that serves.

    A request reads `model` once and keeps it to its end, so that a swap never mixes two
    models in one answer.

    Args:
      path: folder of an artifact, or a link to one.
      load: opens, warms and checks an artifact; raises if anything is wrong with it.
      store: prefixes; those of a model that no longer serves are dropped.
      metrics: where loads are counted.

    Raises:
      Exception: the first load failed.
    """

    def __init__(
        self,
        path: Path,
        load: Callable[[Path], ServedModel],
        store: PrefixStore[Any],
        metrics: ServerMetrics,
    ) -> None:
        self.path = path
        self._load, self._store, self._metrics = load, store, metrics
        self._target = read_target(path)
        if self._target is None:
            raise InputError(
                f"--model '{path}': there is no {MANIFEST} in it; make an artifact with "
                "`tokenrec export`"
            )
        folder = Path(self._target[0])
        self._manifest = _digest_manifest(folder)
        self.model = load(folder)
        self._record("ok", self.model.path, "")

    def check(self) -> bool:
        """Load what the path leads to, if it is another artifact; return whether it is.

        A failure leaves the model in place, and is reported. It is not tried again until
        the path leads elsewhere.
        """
        target = read_target(self.path)
        # While a link is replaced there may be none for a moment.
        if target is None or target == self._target:
            return False
        self._target = target
        folder = Path(target[0])
        try:
            manifest = _digest_manifest(folder)
            if manifest == self._manifest:
                # The artifact that serves, in another place or back again.
                self._record("ok", folder, "")
                return False
            model = self._load(folder)
        except Exception as error:  # noqa: BLE001 - the old model goes on to serve
            self._record("failed", folder, f"{type(error).__name__}: {error}")
            _LOG.error(
                "%s cannot serve, and %s goes on: %s",
                folder,
                self.model.path.name,
                error,
            )
            return True
        old, self.model, self._manifest = self.model, model, manifest
        self._record("ok", model.path, "")
        _LOG.info("%s serves in place of %s", model.path, old.path.name)
        self._store.drop_model(old.name)
        if old.live is not None:
            # Its journal is free then for a later load of the same artifact.
            old.live.close()
        return True

    def _record(self, outcome: str, path: Path, error: str) -> None:
        self.last_load = LoadReport(path.name, outcome, error, _now_ms())
        self._metrics.swaps.add(1, outcome)


class Watcher:
    """Thread that looks at the path of a slot again and again.

    Args:
      slot: the slot.
      seconds: time between two looks.
      after_load: called after each load, whether it failed or not.
    """

    def __init__(
        self, slot: ModelSlot, seconds: float, after_load: Callable[[], None]
    ) -> None:
        self._slot, self._seconds, self._after_load = slot, seconds, after_load
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def start(self) -> None:
        """Start to look."""
        self._thread.start()

    def close(self, seconds: float) -> bool:
        """Stop to look; return whether the thread ended within this time.

        It does not while a load is under way.
        """
        self._closing.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _watch(self) -> None:
        while not self._closing.wait(self._seconds):
            if self._slot.check():
                self._after_load()


def ready(scorer: Any, path: Path, live: Any = None) -> ServedModel:
    """Return a scorer that has been warmed and checked as the model to serve."""
    compiles = int(scorer.compiles)
    return ServedModel(scorer, path, _now_ms(), compiles, next(_SERIALS), live)


def read_target(path: Path) -> Target | None:
    """Return what a path leads to now; None if there is no artifact."""
    try:
        folder = path.resolve(strict=True)
        status = os.stat(folder / MANIFEST)
    except OSError:
        return None
    return (str(folder), status.st_ino, status.st_mtime_ns, status.st_size)


def _digest_manifest(folder: Path) -> bytes:
    """Digest of the file that holds the digests of all files of an artifact."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).digest()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
