"""An artifact in a notebook: `tokenrec.load(path)` of an exported run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.scorer import Scorer, open_artifact


class LoadedArtifact:
    """An exported run in memory. Made by `tokenrec.load`.

    Attributes:
      scorer: encodes and scores requests.
      manifest: contents of `manifest.json`.
      checkpoint_step: step of the checkpoint that was exported.

    Args:
      path: folder of the artifact.
      allow_missing: features whose columns a request may leave out.

    Raises:
      InputError: see `open_artifact`.
    """

    def __init__(self, path: Path, allow_missing: Sequence[str] = ()) -> None:
        self.scorer: Scorer = open_artifact(path, allow_missing=allow_missing)
        self.manifest = self.scorer.artifact.manifest
        self.checkpoint_step: int = self.manifest["step"]

    def score(
        self, requests: Iterable[dict[str, Any]], limits: Limits | None = None
    ) -> list[dict[str, np.ndarray]]:
        """Score requests.

        Args:
          requests: as the server takes them (docs/guides/serving.md).
          limits: the most that one may hold; None for those of `Limits`.

        Returns:
          Of each request the scores `[C] float32` by name, such as "score_click".

        Raises:
          BadRequest: a request cannot be scored.
        """
        bounds = limits or Limits()
        encoded = [
            self.scorer.encode(parse_request(request, bounds)) for request in requests
        ]
        return [
            {name: scores[:, i] for i, name in enumerate(self.scorer.outputs)}
            for scores in self.scorer.score(encoded)
        ]
