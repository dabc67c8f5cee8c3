"""The example for Ray Serve, in Ray itself; skipped where Ray is not installed."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("ray", reason="needs ray[serve], which no extra installs")

from tests.serving.server.arithmetic_scorer import POISON, ArithmeticScorer
from tests.serving.server.request_bodies import body_of, request_of
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.scorer import open_artifact
from tokenrec.serving.server.batch_plan import BatchLimits
from tokenrec.serving.server.load_model import ModelLoader

pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "launch" / "serving" / "ray_serve.py"
WEIGHT = 1.5
# The largest difference from `tokenrec predict`.
TOLERANCE = 1e-6


def load_arithmetic(folder: Path) -> SimpleNamespace:
    """Stand in for an artifact, with a scorer that knows what it should answer."""
    return SimpleNamespace(scorer=ArithmeticScorer(WEIGHT))


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """The module of the example, which the processes of Ray import too."""
    sys.path.insert(0, str(EXAMPLE.parent))
    yield __import__("ray_serve")
    sys.path.remove(str(EXAMPLE.parent))


@pytest.fixture(scope="module")
def url(example: Any, artifact: Path) -> Iterator[str]:
    """Address of two applications, "/arithmetic" and "/real", in processes of Ray."""
    # Ray lowers the priority of its workers, which then starve on a busy machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(EXAMPLE.parent), str(ROOT), *filter(None, sys.path)])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}},
    )
    # Few shapes, which compile in seconds; longer lists are cut.
    small = ModelLoader(BatchLimits(batch=4, candidates=8), Limits())
    bind = example.Ranker.bind
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(bind(load_arithmetic, "none"), name="a", route_prefix="/arithmetic")
        serve.run(bind(small, str(artifact)), name="b", route_prefix="/real")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def post(url: str, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scores_of(answer: dict[str, Any], outputs: tuple[str, ...]) -> np.ndarray:
    """Scores `[C, O]` of an answer."""
    names = [name.removeprefix("score_") for name in outputs]
    assert list(answer["scores"]) == names
    return np.stack([answer["scores"][name] for name in names], 1).astype(np.float32)


def test_an_artifact_scores_as_predict_and_the_scorer_do(
    url: str, artifact: Path
) -> None:
    scorer = open_artifact(artifact)
    golden = list(scorer.artifact.golden())
    with ThreadPoolExecutor(8) as clients:
        bodies = [body for body, _ in golden]
        answers = list(clients.map(functools.partial(post, f"{url}/real"), bodies))
    for (body, predicted), (status, answer) in zip(golden, answers, strict=True):
        assert status == 200
        assert answer["model"] == scorer.digest
        found = scores_of(answer, scorer.outputs)
        np.testing.assert_allclose(found, predicted, rtol=0, atol=TOLERANCE)
        encoded = scorer.encode(parse_request(body, Limits()))
        (prefix,) = scorer.prefill([encoded])
        (alone,) = scorer.extend([(prefix, encoded)])
        np.testing.assert_allclose(found, alone, rtol=0, atol=TOLERANCE)


def test_many_clients_get_each_their_own_scores(url: str) -> None:
    scorer = ArithmeticScorer(WEIGHT)
    seeds = range(60)
    bodies = [body_of(seed) for seed in seeds]
    with ThreadPoolExecutor(16) as clients:
        answers = list(
            clients.map(functools.partial(post, f"{url}/arithmetic"), bodies)
        )
    for seed, (status, answer) in zip(seeds, answers, strict=True):
        assert status == 200
        found = scores_of(answer, scorer.outputs)
        np.testing.assert_array_equal(found, scorer.expected(request_of(seed)))


def test_a_wrong_request_is_refused_and_touches_no_other(url: str) -> None:
    wrong = body_of(1) | {"user": {"age": "old"}}
    bodies = [*(body_of(seed) for seed in range(10)), wrong, b"{"]
    with ThreadPoolExecutor(12) as clients:
        answers = list(
            clients.map(functools.partial(post, f"{url}/arithmetic"), bodies)
        )
    assert [status for status, _ in answers] == [200] * 10 + [400, 400]
    assert "user.age" in answers[10][1]
    assert "not JSON" in answers[11][1]


def test_a_fault_of_the_device_is_an_error_and_the_replica_lives(url: str) -> None:
    poisoned = body_of(2)
    poisoned["candidates"]["item_id"][0] = POISON
    assert post(f"{url}/arithmetic", poisoned)[0] == 500
    assert post(f"{url}/arithmetic", body_of(3))[0] == 200


def test_the_configuration_is_one_by_ray_s_schema(example: Any) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(EXAMPLE.with_suffix(".yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, _, function = application.import_path.partition(":")
    assert importlib.util.find_spec(module).origin == str(EXAMPLE)
    made = getattr(example, function)(application.args)
    (deployment,) = application.deployments
    assert deployment.name == made._bound_deployment.name
