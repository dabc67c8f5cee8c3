"""The example for Ray Serve: the scores of the scorer, however requests are batched."""

from __future__ import annotations

import functools
import json
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("ray", reason="needs ray[serve], which no extra installs")

from tests.serving.arithmetic_scorer import POISON, ArithmeticScorer
from tests.serving.request_bodies import body_of, request_of

pytestmark = pytest.mark.filterwarnings("default")

FOLDER = Path(__file__).parents[2] / "launch" / "serving"
WEIGHT = 1.5


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Address of a replica in a process of its own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    sys.path.insert(0, str(FOLDER))
    try:
        import ray_serve
    finally:
        sys.path.remove(str(FOLDER))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(FOLDER), *filter(None, sys.path)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}},
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = ray_serve.Ranker.bind(functools.partial(ArithmeticScorer, WEIGHT))
        serve.run(app, name="ranker", route_prefix="/v1/score")
        yield f"http://127.0.0.1:{port}/v1/score"
    finally:
        serve.shutdown()
        ray.shutdown()


def post(url: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, headers), timeout=60
        ) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_scores_are_those_of_the_scorer_for_many_clients_at_once(url: str) -> None:
    scorer = ArithmeticScorer(WEIGHT)
    seeds = range(60)
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda seed: post(url, body_of(seed)), seeds))
    for seed, (status, answer) in zip(seeds, answers, strict=True):
        assert status == 200
        assert answer["model"] == scorer.digest
        scores = np.stack([answer["scores"][name] for name in ("click", "buy")], 1)
        np.testing.assert_array_equal(
            scores.astype(np.float32), scorer.expected(request_of(seed))
        )


def test_a_wrong_request_is_refused_and_touches_no_other(url: str) -> None:
    wrong = body_of(1) | {"user": {"age": "old"}}
    bodies = [body_of(seed) for seed in range(10)] + [wrong, b"{"]
    with ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(functools.partial(post, url), bodies))
    assert [status for status, _ in answers] == [200] * 10 + [400, 400]
    assert "user.age" in answers[10][1]
    assert "not JSON" in answers[11][1]


def test_a_fault_of_the_device_is_an_error_and_the_replica_lives(url: str) -> None:
    poisoned = body_of(2)
    poisoned["candidates"]["item_id"][0] = POISON
    assert post(url, poisoned)[0] == 500
    assert post(url, body_of(3))[0] == 200


def test_the_configuration_is_one_by_ray_s_schema() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((FOLDER / "ray_serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "ray_serve:build_app"
    assert [one.name for one in application.deployments] == ["Ranker"]
