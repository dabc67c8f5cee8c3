"""An artifact in a notebook: `tokenrec.load(path)` of an exported run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.errors import InputError
from tokenrec.serving.encoded import EncodedRetrieval
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.retrieval_request import parse_retrieval
from tokenrec.serving.retriever import Retrieved, Retriever
from tokenrec.serving.scorer import Scorer, open_artifact


class LoadedArtifact:
    """An exported run in memory. Made by `tokenrec.load`.

    Attributes:
      scorer: encodes requests and answers them: a `Scorer` of a ranking run, or a
        `Retriever` of a retrieval run.
      manifest: contents of `manifest.json`.
      checkpoint_step: step of the checkpoint that was exported.

    Args:
      path: folder of the artifact.
      allow_missing: features whose columns a request may leave out.

    Raises:
      InputError: see `open_artifact`.
    """

    def __init__(self, path: Path, allow_missing: Sequence[str] = ()) -> None:
        self.scorer: Scorer | Retriever = open_artifact(
            path, allow_missing=allow_missing
        )
        self.manifest = self.scorer.artifact.manifest
        self.checkpoint_step: int = self.manifest["step"]

    def score(
        self, requests: Iterable[dict[str, Any]], limits: Limits | None = None
    ) -> list[dict[str, np.ndarray]]:
        """Score the candidates of requests, with a ranking run.

        Args:
          requests: as the server takes them (docs/guides/serving.md).
          limits: the most that one may hold; None for those of `Limits`.

        Returns:
          Of each request the scores `[C] float32` by name, such as "score_click".

        Raises:
          BadRequest: a request cannot be scored.
          InputError: the run is one of retrieval.
        """
        bounds, scorer = limits or Limits(), self.scorer
        if isinstance(scorer, Retriever):
            raise InputError(
                "the artifact is of a retrieval run, which scores no candidates; call "
                "`retrieve`"
            )
        encoded = [
            scorer.encode(parse_request(request, bounds)) for request in requests
        ]
        return [
            {name: scores[:, i] for i, name in enumerate(scorer.outputs)}
            for scores in scorer.score(encoded)
        ]

    def retrieve(
        self, requests: Iterable[dict[str, Any]], limits: Limits | None = None
    ) -> list[Retrieved]:
        """Find the best items of requests, with a retrieval run.

        Args:
          requests: as the server takes them (docs/guides/serving.md).
          limits: the most that one may hold; None for those of `Limits`.

        Returns:
          Of each request `items` and `scores`, best first.

        Raises:
          BadRequest: a request cannot be answered.
          InputError: the run is one of ranking.
        """
        retriever, encoded = self._encode(requests, limits)
        prefixes = retriever.prefill(encoded)
        return retriever.retrieve(list(zip(prefixes, encoded, strict=True)))

    def user_vectors(
        self, requests: Iterable[dict[str, Any]], limits: Limits | None = None
    ) -> np.ndarray:
        """Vectors of requests, `[B, d] float32`, with a run of the next item.

        The score of an item is the product with its vector of `item_vectors`. With
        `head.copy` the items of the history have a bonus besides.

        Args:
          requests: as for `retrieve`.
          limits: likewise.

        Raises:
          BadRequest: a request is wrong.
          InputError: the run has no such vectors.
        """
        retriever, encoded = self._encode(requests, limits)
        return retriever.user_vectors(encoded)

    def item_vectors(self) -> pa.Table:
        """Ids and vectors of the items, with a run of the next item.

        Returns:
          `item_id` and `vector: [V, d] float32`, in the order of the catalogue; with
          `head.cosine` of length 1.

        Raises:
          InputError: the run has no such vectors.
        """
        retriever = self._retriever()
        vectors = retriever.item_vectors()
        flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
        ids = pa.array(retriever.item_ids(), retriever.item_type)
        columns = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        return pa.table({"item_id": ids, "vector": columns})

    def _encode(
        self, requests: Iterable[dict[str, Any]], limits: Limits | None
    ) -> tuple[Retriever, list[EncodedRetrieval]]:
        retriever, bounds = self._retriever(), limits or Limits()
        return retriever, [
            retriever.encode(parse_retrieval(request, bounds)) for request in requests
        ]

    def _retriever(self) -> Retriever:
        if isinstance(self.scorer, Scorer):
            raise InputError(
                "the artifact is of a ranking run, which finds no items; call `score`"
            )
        return self.scorer
