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

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from tokenrec.errors import InputError
from tokenrec.serving.artifact import Artifact, read_artifact
from tokenrec.serving.compiled_programs import (
    Arrays,
    CompiledPrograms,
    Shape,
    shapes_of,
)
from tokenrec.serving.encoded import Encoded
from tokenrec.serving.encoder import Encoder
from tokenrec.serving.program_files import BACKENDS, load_program, program_platform
from tokenrec.serving.request import Request

BATCH_BUCKETS = (1, 2, 4, 8, 16)
# Close together, because what fills a program up is computed too: 20 candidates in a
# program of 32 waste 37 %.
CANDIDATE_BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What a request keeps between `prefill` and `extend`.

    Attributes:
      arrays: `[1, ...]` each, of the scorer that made them.
      nbytes: bytes of all of them.
    """

    arrays: Arrays
    nbytes: int


def open_artifact(
    path: Path,
    *,
    check: bool = True,
    platform: str | None = None,
    allow_missing: Sequence[str] = (),
) -> Scorer:
    """Open an artifact, and put its weights on the device.

    Args:
      path: folder of the artifact.
      check: check the digests of all files.
      platform: "cpu", "cuda", "rocm" or "tpu"; None for that of JAX's first device.
      allow_missing: features whose columns a request may leave out.

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
    return Scorer(artifact, device, allow_missing)


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
        self._device = device
        # On a CPU arrays of the device are memory of the host: NumPy is faster.
        self._on_host = device.platform == "cpu"
        weights = jax.device_put(
            {
                part: {
                    name: artifact.read_array(file)
                    for name, file in manifest[part].items()
                }
                for part in ("params", "tables")
            },
            device,
        )
        programs = {
            name: load_program(artifact, file)
            for name, file in manifest["programs"].items()
        }
        self._programs = CompiledPrograms(programs, weights, device)
        self._split = jax.jit(_split)
        self._join = jax.jit(_join)

    @property
    def compiles(self) -> int:
        """Programs compiled so far, one for each pair of sizes."""
        return self._programs.compiles

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
        prefixes: list[Prefix] = []
        for part in _slices(requests, self.batch_buckets[-1]):
            size = _bucket(len(part), self.batch_buckets)
            filled = [*part, *[part[0]] * (size - len(part))]
            inputs = {
                name: np.stack([encoded.prefix[name] for encoded in filled])
                for name in part[0].prefix
            }
            kept = self._programs.run("prefill", inputs, size)
            prefixes += self._split_prefixes(kept, len(part), size)
        return prefixes

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
        for part in _slices(jobs, self.batch_buckets[-1]):
            size = _bucket(len(part), self.batch_buckets)
            filled = [*part, *[part[0]] * (size - len(part))]
            count = max(encoded.candidates for _, _, encoded in part)
            count = _bucket(count, self.candidate_buckets)
            inputs = self._join_prefixes([prefix for _, prefix, _ in filled], size)
            inputs |= _targets([encoded for _, _, encoded in filled], count)
            found = self._programs.run("extend", inputs, size, count)
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
        for part in _slices(jobs, self.batch_buckets[-1]):
            size = _bucket(len(part), self.batch_buckets)
            filled = [*part, *[part[0]] * (size - len(part))]
            inputs = {
                name: np.stack([encoded.prefix[name] for _, encoded in filled])
                for name in _without_query(part[0][1].prefix)
            }
            inputs |= _targets([encoded for _, encoded in filled], self._fixed)
            found = self._programs.run("score", inputs, size)
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
        self._programs.compile(self._jobs(blank))
        if self.has_prefix and not self._on_host:
            # Prefixes are taken apart and joined on the device, too.
            for size in self.batch_buckets:
                self._join_prefixes(self.prefill([blank] * size), size)
        return self.compiles - before

    def _jobs(self, blank: Encoded) -> Iterator[tuple[Shape, Arrays]]:
        """Yield the programs of all sizes, with the shapes of their inputs."""
        if not self.has_prefix:
            own = _without_query(blank.prefix)
            for size in self.batch_buckets:
                targets = _targets([blank] * size, self._fixed)
                yield ("score", size), shapes_of(own, size) | targets
            return
        # What a prefix is, only the program knows.
        (prefix,) = self.prefill([blank])
        kept = {name: array[0] for name, array in prefix.arrays.items()}
        for size in self.batch_buckets:
            yield ("prefill", size), shapes_of(blank.prefix, size)
            for count in self.candidate_buckets:
                targets = _targets([blank] * size, count)
                yield ("extend", size, count), shapes_of(kept, size) | targets

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

    def _split_prefixes(self, kept: Arrays, count: int, size: int) -> list[Prefix]:
        """Take the results of `prefill` apart."""
        if self._on_host:
            host = {name: np.asarray(array) for name, array in kept.items()}
            # Copies: a view would keep the requests beside it in memory.
            parts = [
                {name: array[i : i + 1].copy() for name, array in host.items()}
                for i in range(count)
            ]
        else:
            self._programs.note(("split", size))
            parts = self._split(kept)[:count]
        return [
            Prefix(part, sum(array.nbytes for array in part.values())) for part in parts
        ]

    def _join_prefixes(self, prefixes: Sequence[Prefix], size: int) -> Arrays:
        parts = [prefix.arrays for prefix in prefixes]
        if self._on_host:
            return {
                name: np.concatenate([part[name] for part in parts])
                for name in parts[0]
            }
        self._programs.note(("join", size))
        joined: Arrays = self._join(parts)
        return joined


def _without_query(prefix: Arrays) -> Arrays:
    """What a program without a prefix reads: it has the query with the candidates."""
    return {n: array for n, array in prefix.items() if not n.startswith("query_")}


def _split(kept: Arrays) -> list[Arrays]:
    size = len(next(iter(kept.values())))
    return [
        {name: array[i : i + 1] for name, array in kept.items()} for i in range(size)
    ]


def _join(parts: list[Arrays]) -> Arrays:
    return {
        name: jax.numpy.concatenate([part[name] for part in parts]) for name in parts[0]
    }


def _slices[T](items: Sequence[T], most: int) -> list[Sequence[T]]:
    return [items[start : start + most] for start in range(0, len(items), most)]


def _bucket(count: int, buckets: Sequence[int]) -> int:
    """The least bucket that holds so many."""
    return buckets[bisect.bisect_left(buckets, count)]


def _targets(requests: Sequence[Encoded], count: int) -> Arrays:
    """Candidates of requests, `[B, count, ...]`; what fills up repeats the first."""
    ids, dense = [], []
    for encoded in requests:
        rows = np.arange(count)
        rows[encoded.candidates :] = 0
        ids.append(encoded.target_ids[rows])
        dense.append(encoded.target_dense[rows])
    return {"target_ids": np.stack(ids), "target_dense": np.stack(dense)}
