"""Score encoded requests with the programs of an artifact.

    scorer = open_artifact(path)
    encoded = scorer.encode(parse_request(value, Limits()))
    (prefix,) = scorer.prefill([encoded])               # keep it for the next request
    (scores,) = scorer.extend([(prefix, encoded)])      # [C, O]

Requests are computed together, and a program is compiled once for each pair of sizes:
requests are filled up to the next size of `batch_buckets`, candidates to the next of
`candidate_buckets`. `warm` compiles all of them before the first request.

Letters: B requests, C candidates, O predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokenrec.errors import InputError
from tokenrec.serving.artifact import Artifact, read_artifact
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
from tokenrec.serving.encoded import Encoded
from tokenrec.serving.encoder import Encoder
from tokenrec.serving.program_files import BACKENDS, program_platform
from tokenrec.serving.request import Request
from tokenrec.serving.retriever import Retriever

# Close together, because what fills a program up is computed too: 20 candidates in a
# program of 32 waste 37 %.
CANDIDATE_BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def open_artifact(
    path: Path,
    *,
    check: bool = True,
    platform: str | None = None,
    allow_missing: Sequence[str] = (),
) -> Scorer | Retriever:
    """Open an artifact, and put its weights on the device.

    Args:
      path: folder of the artifact.
      check: check the digests of all files.
      platform: "cpu", "cuda", "rocm" or "tpu"; None for that of JAX's first device.
      allow_missing: features whose columns a request may leave out.

    Returns:
      A `Scorer` of a ranking run, or a `Retriever` of a retrieval run.

    Raises:
      InputError: the folder holds no artifact, it is damaged, or it was not exported
        for this platform.
    """
    artifact = read_artifact(path, check=check)
    # JAX calls both GPU platforms "gpu", and its programs tell them apart.
    device = jax.devices(None if platform is None else BACKENDS[platform])[0]
    name = platform or program_platform(device)
    if name not in artifact.manifest["platforms"]:
        known = ", ".join(artifact.manifest["platforms"])
        raise InputError(
            f"artifact '{artifact.path}' was exported for {known}, and this process "
            f"runs on {name}; export it with --platforms {name}"
        )
    kind = Retriever if artifact.manifest["objective"] == "retrieval" else Scorer
    return kind(artifact, device, allow_missing)


def open_scorer(path: Path, **options: Any) -> Scorer:
    """Open an artifact of a ranking run, as `open_artifact`.

    Raises:
      InputError: as `open_artifact`, or the artifact is of a retrieval run.
    """
    opened = open_artifact(path, **options)
    if isinstance(opened, Retriever):
        raise InputError(
            f"artifact '{path}' is of a retrieval run, which finds items and scores no "
            "candidates; use an artifact of a ranking run"
        )
    return opened


def open_retriever(path: Path, **options: Any) -> Retriever:
    """Open an artifact of a retrieval run, as `open_artifact`.

    Raises:
      InputError: as `open_artifact`, or the artifact is of a ranking run.
    """
    opened = open_artifact(path, **options)
    if isinstance(opened, Scorer):
        raise InputError(
            f"artifact '{path}' is of a ranking run, which scores candidates and finds "
            "no items; use an artifact of a retrieval run"
        )
    return opened


class Scorer:
    """The programs and weights of an artifact on one device.

    `encode` may be called from any thread, the others from one at a time.

    Attributes:
      artifact: the artifact.
      digest: its digest.
      objective: "ranking".
      tasks: names of the tasks.
      outputs: O names of predictions, as the columns of `tokenrec predict`.
      has_prefix: there are `prefill` and `extend`; otherwise `score` alone.
      programs: the programs and weights on the device.
      batch_buckets: numbers of requests that programs are compiled for.
      candidate_buckets: numbers of candidates, likewise.
    """

    def __init__(
        self, artifact: Artifact, device: jax.Device, allow_missing: Sequence[str] = ()
    ) -> None:
        manifest = artifact.manifest
        self.artifact = artifact
        self.digest = artifact.digest
        self.objective: str = manifest["objective"]
        self.tasks: tuple[str, ...] = tuple(manifest["tasks"])
        self.outputs: tuple[str, ...] = tuple(manifest["outputs"])
        self.has_prefix = "prefill" in manifest["programs"]
        self.batch_buckets: tuple[int, ...] = BATCH_BUCKETS
        # Without a prefix, streams have the number of candidates of training.
        self._fixed: int = manifest["candidates"]
        self.candidate_buckets: tuple[int, ...] = (
            CANDIDATE_BUCKETS if self.has_prefix else (self._fixed,)
        )
        self._encoder = Encoder(artifact, allow_missing)
        self.programs = DevicePrograms(artifact, device, ("params", "tables"))

    @property
    def compiles(self) -> int:
        """Programs compiled so far, one for each pair of sizes."""
        return self.programs.compiles

    def encode(self, request: Request) -> Encoded:
        """Encode a request.

        Raises:
          BadRequest: a column is missing or unknown, or a value does not fit.
        """
        return self._encoder.encode(request)

    def prefill(self, requests: Sequence[Encoded]) -> list[Prefix]:
        """Compute what requests keep, whatever their candidates.

        Raises:
          InputError: the model has no prefix.
        """
        self._check_prefix()
        prefixes = [encoded.prefix for encoded in requests]
        return self.programs.prefill(prefixes, self.batch_buckets)

    def extend(self, requests: Sequence[tuple[Prefix, Encoded]]) -> list[np.ndarray]:
        """Score candidates, `[C, O] float32` of each request.

        Raises:
          InputError: the model has no prefix.
        """
        self._check_prefix()
        most = self.candidate_buckets[-1]
        jobs = [
            (place, prefix, encoded.part(start, start + most))
            for place, (prefix, encoded) in enumerate(requests)
            for start in range(0, encoded.candidates, most)
        ]
        scores: list[list[np.ndarray]] = [[] for _ in requests]
        for part in slices(jobs, self.batch_buckets[-1]):
            size = bucket(len(part), self.batch_buckets)
            filled = fill_up(part, size)
            count = max(encoded.candidates for _, _, encoded in part)
            count = bucket(count, self.candidate_buckets)
            inputs = self.programs.join([prefix for _, prefix, _ in filled], size)
            inputs |= _targets([encoded for _, _, encoded in filled], count)
            found = self.programs.run("extend", inputs, size, count)
            predictions = np.asarray(found["predictions"])
            for row, (place, _, encoded) in enumerate(part):
                scores[place].append(predictions[row, : encoded.candidates])
        return [self._concatenate(parts) for parts in scores]

    def score(self, requests: Sequence[Encoded]) -> list[np.ndarray]:
        """Score whole requests, `[C, O] float32` of each."""
        if self.has_prefix:
            prefixes = self.prefill(requests)
            return self.extend(list(zip(prefixes, requests, strict=True)))
        jobs = [
            (place, encoded.part(start, start + self._fixed))
            for place, encoded in enumerate(requests)
            for start in range(0, encoded.candidates, self._fixed)
        ]
        scores: list[list[np.ndarray]] = [[] for _ in requests]
        for part in slices(jobs, self.batch_buckets[-1]):
            size = bucket(len(part), self.batch_buckets)
            filled = fill_up(part, size)
            inputs = {
                name: np.stack([encoded.prefix[name] for _, encoded in filled])
                for name in _without_query(part[0][1].prefix)
            }
            inputs |= _targets([encoded for _, encoded in filled], self._fixed)
            found = self.programs.run("score", inputs, size)
            predictions = np.asarray(found["predictions"])
            for row, (place, encoded) in enumerate(part):
                scores[place].append(predictions[row, : encoded.candidates])
        return [self._concatenate(parts) for parts in scores]

    def warm(
        self,
        batches: Sequence[int] = BATCH_BUCKETS,
        candidates: Sequence[int] = CANDIDATE_BUCKETS,
    ) -> int:
        """Compile the programs of all sizes, which become those of the buckets.

        Args:
          batches: numbers of requests.
          candidates: numbers of candidates; not read without a prefix.

        Returns:
          The number of programs that were compiled.
        """
        before = self.compiles
        self.batch_buckets = tuple(sorted(set(batches)))
        if self.has_prefix:
            self.candidate_buckets = tuple(sorted(set(candidates)))
        blank = self._encoder.blank()
        self.programs.compile_all(self._jobs(blank))
        if self.has_prefix and not self.programs.on_host:
            # Prefixes are taken apart and joined on the device, too.
            for size in self.batch_buckets:
                self.programs.join(self.prefill([blank] * size), size)
        return self.compiles - before

    def _jobs(self, blank: Encoded) -> Iterator[tuple[Shape, Arrays]]:
        """Yield the programs of all sizes, with the shapes of their inputs."""
        prefix: Arrays = {}
        if self.has_prefix:
            (one,) = self.prefill([blank])
            prefix = {name: array[0] for name, array in one.arrays.items()}
        query = {} if self.has_prefix else _without_query(blank.prefix)
        for size in self.batch_buckets:
            if not self.has_prefix:
                targets = _targets([blank] * size, self._fixed)
                yield ("score", size), batch_shapes(query, size) | targets
                continue
            yield ("prefill", size), batch_shapes(blank.prefix, size)
            for count in self.candidate_buckets:
                targets = _targets([blank] * size, count)
                yield ("extend", size, count), batch_shapes(prefix, size) | targets

    def _concatenate(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Join the scores of the slices of a request, which may have no candidate."""
        empty = np.empty((0, len(self.outputs)), np.float32)
        # A copy too: a view would keep the scores of other requests in memory.
        return np.concatenate([empty, *parts])

    def _check_prefix(self) -> None:
        if not self.has_prefix:
            raise InputError(
                f"artifact '{self.artifact.path}': the model has no prefix cache; call "
                "`score`"
            )


def _without_query(prefix: Arrays) -> Arrays:
    """What a program without a prefix reads: it has the query with the candidates."""
    return {
        name: array for name, array in prefix.items() if not name.startswith("query_")
    }


def _targets(requests: Sequence[Encoded], count: int) -> Arrays:
    """Candidates of requests, `[B, count, ...]`; what fills up repeats the first."""
    ids, dense = [], []
    for encoded in requests:
        rows = np.arange(count)
        rows[encoded.candidates :] = 0
        ids.append(encoded.target_ids[rows])
        dense.append(encoded.target_dense[rows])
    return {"target_ids": np.stack(ids), "target_dense": np.stack(dense)}
