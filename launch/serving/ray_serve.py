"""Host an exported run in Ray Serve, for those whose services run there already.

    pip install "ray[serve]"
    serve run --app-dir launch/serving ray_serve:build_app model=/models/ranker/v1
    serve deploy launch/serving/ray_serve.yaml          # on a cluster

A request is the JSON of docs/guides/serving.md, as `tokenrec serve` takes it, and the
scores are the same: both encode, check and compute with `tokenrec.serving`. What Ray Serve
brings is replicas, scaling and routing. What `tokenrec serve` has and this file does not:
the cache of prefixes, live histories, swapping models in place, limits on clients, and
retrieval artifacts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from ray.serve import Application
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from tokenrec.errors import InputError
from tokenrec.serving.request import BadRequest, Limits, parse_request
from tokenrec.serving.server.batch_plan import BatchLimits
from tokenrec.serving.server.load_model import ModelLoader
from tokenrec.serving.server.model_slot import ServedModel

MAX_BATCH = 16


@serve.deployment(max_ongoing_requests=4 * MAX_BATCH)
class Ranker:
    """A replica: one model on one device.

    Args:
      load: opens, warms and checks an artifact. Ray sends no requests to a replica in
        which it raises.
      model: folder of the artifact, on every node.

    Raises:
      InputError: the artifact is of a retrieval run, or `load` refuses it.
    """

    def __init__(self, load: Callable[[Path], ServedModel], model: str) -> None:
        self._scorer = load(Path(model)).scorer
        if self._scorer.objective != "ranking":
            raise InputError(
                f"model='{model}' is of a {self._scorer.objective} run, which scores no "
                "candidates; serve it with `tokenrec serve`"
            )
        # A scorer takes calls from one thread. The event loop collects the next batch
        # meanwhile.
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    async def __call__(self, http: HttpRequest) -> JSONResponse:
        """Answer a request over HTTP."""
        try:
            value = await http.json()
        except ValueError:
            # The text of the body stays out of answers and logs.
            return JSONResponse({"error": "the body is not JSON"}, status_code=400)
        try:
            return JSONResponse(await self.score(value))
        except BadRequest as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    async def score(self, value: Any) -> dict[str, Any]:
        """Score one request, over HTTP or from another deployment.

        Args:
          value: the request (see `tokenrec.serving.request`).

        Raises:
          BadRequest: the request cannot be scored. Other requests are not touched: it is
            found before the request joins a batch.
        """
        encoded = self._scorer.encode(parse_request(value, Limits()))
        scores = await self._score_batch(encoded)
        names = [name.removeprefix("score_") for name in self._scorer.outputs]
        return {
            "model": self._scorer.digest,
            "scores": dict(zip(names, scores.T.tolist(), strict=True)),
            "unknown": {"items": list(encoded.unknown.rows)},
        }

    # Without a timer: while the device computes a batch, the next one comes together.
    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0)
    async def _score_batch(self, encoded: list[Any]) -> list[np.ndarray]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._device, self._compute, encoded)

    def _compute(self, encoded: list[Any]) -> list[np.ndarray]:
        if not self._scorer.has_prefix:
            return self._scorer.score(encoded)
        prefixes = self._scorer.prefill(encoded)
        return self._scorer.extend(list(zip(prefixes, encoded, strict=True)))


def build_app(args: dict[str, Any]) -> Application:
    """Build the application from the arguments of `serve run` or of the YAML file.

    Args:
      args: "model", folder of the artifact.
    """
    return Ranker.bind(ModelLoader(BatchLimits(MAX_BATCH), Limits()), args["model"])
