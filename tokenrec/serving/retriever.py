"""Answer requests for items with the programs of an artifact.

    retriever = open_artifact(path)
    encoded = retriever.encode(parse_retrieval(value, Limits()))
    (prefix,) = retriever.prefill([encoded])            # keep it for the next request
    (found,) = retriever.retrieve([(prefix, encoded)])  # items and scores, best first

Requests are computed together, filled up to the next size of `batch_buckets`. `warm`
compiles all of them before the first request.

Letters: B requests, V items, n items of an answer, d model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import pyarrow as pa

from tokenrec.errors import InputError
from tokenrec.serving.artifact import Artifact
from tokenrec.serving.device_programs import (
    BATCH_BUCKETS,
    Arrays,
    DevicePrograms,
    Prefix,
    Shape,
    batch_shapes,
    bucket,
    fill_up,
    slices,
)
from tokenrec.serving.encoded import EncodedRetrieval
from tokenrec.serving.retrieval_encoder import RetrievalEncoder
from tokenrec.serving.retrieval_request import ItemId, RetrievalRequest
from tokenrec.serving.serving_data import read_column


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """The answer to a request, best item first.

    Attributes:
      items: n original ids, n <= k: fewer where fewer items are allowed.
      scores: `[n] float32`. Next item: the score of the head. Semantic id: the
        log-probability of the item.
    """

    items: list[ItemId]
    scores: np.ndarray


class Retriever:
    """The programs and weights of a retrieval artifact on one device.

    `encode` may be called from any thread, the others from one at a time.

    Attributes:
      artifact: the artifact.
      digest: its digest.
      objective: "retrieval".
      head: "next_item" or "semantic_id".
      has_prefix: there is `prefill`.
      max_k: the longest answer.
      programs: the programs and weights on the device.
      batch_buckets: numbers of requests that programs are compiled for.
    """

    objective = "retrieval"
    has_prefix = True

    def __init__(
        self, artifact: Artifact, device: jax.Device, allow_missing: Sequence[str] = ()
    ) -> None:
        self.artifact = artifact
        self.digest = artifact.digest
        self.head: str = artifact.manifest["head"]
        self.max_k: int = artifact.manifest["max_k"]
        self.batch_buckets: tuple[int, ...] = BATCH_BUCKETS
        self._items = read_column(artifact, "items/item_id.parquet")
        self._count: int = artifact.manifest["items"]
        self._encoder = RetrievalEncoder(artifact, allow_missing)
        parts = ("params", "tables", "catalogue")
        self.programs = DevicePrograms(artifact, device, parts)

    @property
    def compiles(self) -> int:
        """Programs compiled so far, one for each size."""
        return self.programs.compiles

    def encode(self, request: RetrievalRequest) -> EncodedRetrieval:
        """Encode a request.

        Raises:
          BadRequest: a column is missing or unknown, a value does not fit, `k` is above
            `max_k`, or a condition of the filter is wrong.
        """
        return self._encoder.encode(request)

    def prefill(self, requests: Sequence[EncodedRetrieval]) -> list[Prefix]:
        """Compute what requests keep, whatever they allow."""
        prefixes = [encoded.prefix for encoded in requests]
        return self.programs.prefill(prefixes, self.batch_buckets)

    def retrieve(
        self, requests: Sequence[tuple[Prefix, EncodedRetrieval]]
    ) -> list[Retrieved]:
        """Find the best allowed items of requests.

        Raises:
          ArithmeticError: a score is not finite.
        """
        answers: list[Retrieved] = []
        for part in slices(requests, self.batch_buckets[-1]):
            size = bucket(len(part), self.batch_buckets)
            filled = fill_up(part, size)
            inputs = self.programs.join([prefix for prefix, _ in filled], size)
            name = "retrieve"
            if any(encoded.allowed is not None for _, encoded in part):
                name = "retrieve_allowed"
                inputs["allowed"] = self._allowed([encoded for _, encoded in filled])
            found = self.programs.run(name, inputs, size)
            items, scores = np.asarray(found["items"]), np.asarray(found["scores"])
            for row, (_, encoded) in enumerate(part):
                answers.append(self._answer(items[row], scores[row], encoded.k))
        return answers

    def user_vectors(self, requests: Sequence[EncodedRetrieval]) -> np.ndarray:
        """Vectors of requests, `[B, d] float32`, that items are scored with.

        A score is the product with a row of `item_vectors`, and with `head.copy` a
        bonus for the items of the history.

        Raises:
          InputError: the head has no such vectors.
        """
        self._check_vectors()
        kept = self.prefill(requests)
        return np.concatenate([np.asarray(prefix.arrays["query"]) for prefix in kept])

    def item_vectors(self) -> np.ndarray:
        """Vectors of the items, `[V, d] float32`, of length 1 with `head.cosine`.

        Raises:
          InputError: the head has no such vectors.
        """
        self._check_vectors()
        manifest, read = self.artifact.manifest, self.artifact.read_array
        for name in ("keys", "vectors"):
            if name in manifest["catalogue"]:
                return read(manifest["catalogue"][name])
        return read(manifest["params"]["head/items"])

    @property
    def item_type(self) -> pa.DataType:
        """Type of the original ids."""
        return self._items.type

    def item_ids(self) -> list[ItemId]:
        """Ids of the items, in the order of `item_vectors`."""
        ids: list[ItemId] = self._items.slice(0, self._count).to_pylist()
        return ids

    def warm(self, batches: Sequence[int] = BATCH_BUCKETS) -> int:
        """Compile the programs of all sizes, which become those of the buckets.

        Args:
          batches: numbers of requests.

        Returns:
          The number of programs that were compiled.
        """
        before = self.compiles
        self.batch_buckets = tuple(sorted(set(batches)))
        blank = self._encoder.blank()
        self.programs.compile_all(self._jobs(blank))
        if not self.programs.on_host:
            # Prefixes are taken apart and joined on the device, too.
            for size in self.batch_buckets:
                self.programs.join(self.prefill([blank] * size), size)
        return self.compiles - before

    def _jobs(self, blank: EncodedRetrieval) -> Iterator[tuple[Shape, Arrays]]:
        """Yield the programs of all sizes, with the shapes of their inputs."""
        (one,) = self.prefill([blank])
        kept = {name: array[0] for name, array in one.arrays.items()}
        for size in self.batch_buckets:
            shapes = batch_shapes(kept, size)
            yield ("prefill", size), batch_shapes(blank.prefix, size)
            yield ("retrieve", size), shapes
            allowed = jax.ShapeDtypeStruct((size, self._count), bool)
            yield ("retrieve_allowed", size), shapes | {"allowed": allowed}

    def _allowed(self, requests: Sequence[EncodedRetrieval]) -> np.ndarray:
        allowed = np.ones((len(requests), self._count), bool)
        for row, encoded in enumerate(requests):
            if encoded.allowed is not None:
                allowed[row] = encoded.allowed
        return allowed

    def _answer(self, items: np.ndarray, scores: np.ndarray, k: int) -> Retrieved:
        """The first k items of what the program found for a request."""
        # -inf marks a place that no item takes; such places stand last.
        exists = scores != -np.inf
        if not np.isfinite(scores[exists]).all():
            raise ArithmeticError(
                "a score is not finite; look for numbers of the request that are far "
                "outside of the training data, or export the run again"
            )
        count = min(k, int(exists.sum()))
        ids = self._items.take(items[:count]).to_pylist()
        # A copy: a view would keep the other answers in memory.
        return Retrieved(ids, scores[:count].copy())

    def _check_vectors(self) -> None:
        if self.head != "next_item":
            raise InputError(
                f"artifact '{self.artifact.path}': a head of semantic ids searches codes, "
                "and has no vectors of items; use head.retrieval='next_item'"
            )
