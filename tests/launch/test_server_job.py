"""Servers that `tokenrec launch --target serving` refuses, and their command."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.launch.conftest import SERVING, TPU_VM, Launch
from tokenrec.cli.main import build_parsers
from tokenrec.launch.server_job import DRAIN_SECONDS, PORT, SERVER_LIMITS

DRY = ("--dry-run",)
BUCKET = {"model": "gs://my-bucket/ranker/v1"}
TOOLS = "europe-docker.pkg.dev/my-project/tools/gcloud:1"


@pytest.mark.parametrize(
    ("more", "flags", "said"),
    [
        ([], {"model": None}, "model is not given; target='serving' needs --model"),
        ([], {"model": "runs/first"}, "model='runs/first' is not the folder of an"),
        ([], {"model": "pvc://models"}, "model='pvc://models' is not the folder"),
        ([], {"model": "pvc://models/../etc"}, "is not the folder of an artifact"),
        ([], {"model": "pvc://my_models/a"}, "model='my_models' is refused by Kube"),
        ([], BUCKET, "fetch_image is not given; model='gs://my-bucket/ranker/v1' is"),
        ([], BUCKET | {"fetch_image": "gcloud"}, "fetch_image='gcloud' is not HOST"),
        ([], {"fetch_image": TOOLS}, "does not apply to model='pvc://models/ranker'"),
        ([], {"image": None}, "image is not given; build launch/serving/Dockerfile"),
        ([], {"image": "host.dev/p/serve:latest"}, "image='host.dev/p/serve:latest'"),
        ([], {"replicas": "0"}, "replicas=0 must be at least 1"),
        ([], {"max_replicas": "2"}, "max_replicas=2 leaves the autoscaler no choice"),
        (["--gpu"], {"max_replicas": "8"}, "max_replicas=8 does not apply to servers"),
        ([], {"topology": "v5e:2x2"}, "topology='v5e:2x2' has 4 devices"),
        ([], {"topology": "tpu7x:1x1x1"}, "topology='tpu7x:1x1x1' has 2 devices"),
        (["--gpu"], {"topology": "v5e:1x1"}, "is a TPU and does not go with --gpu"),
        ([], {"cpus": "0"}, "cpus=0 must be at least 1"),
        ([], {"memory": "512MiB"}, "memory=536870912 bytes are too few"),
        ([], {"cache_mb": "3000"}, "cache_mb=3000 is more than half of memory"),
        ([], {"grace_seconds": "35"}, "grace_seconds=35 is too short"),
        ([], {"name": "My_Ranker"}, "name='My_Ranker' is refused by Kubernetes"),
        ([], {"name": "r" * 47}, "use 46 characters at most"),
        ([], {"namespace": "a.b"}, "namespace='a.b' is refused by Kubernetes"),
        ([], {"service_account": "me@x"}, "service_account='me@x' is refused"),
        ([], {"compile_cache_claim": "A"}, "compile_cache_claim='A' is refused by"),
        ([], {"config": "synthetic"}, "config='synthetic' does not apply to target="),
        ([], {"bucket": "my-bucket"}, "bucket='my-bucket' does not apply to target="),
        ([], {"slices": "2"}, "slices='2' does not apply to target='serving'"),
        (["--spot"], {}, "spot='True' does not apply to target='serving'"),
        (["--config.seed=1"], {}, "config.seed=1 does not apply to target='serving'"),
    ],
)
def test_servers_that_cannot_run_are_refused(
    launch: Launch, more: list[str], flags: dict[str, str | None], said: str
) -> None:
    code, out, err = launch(*more, *DRY, **SERVING | flags)
    assert code == 2
    assert out == ""
    assert said in err


@pytest.mark.parametrize(
    ("more", "flags", "said"),
    [
        (
            [],
            {"model": "pvc://a/b"},
            "model='pvc://a/b' does not apply to target='gke'",
        ),
        (["--gpu"], TPU_VM, "gpu='True' does not apply to target='tpu-vm'"),
        ([], {"replicas": "3"}, "replicas='3' does not apply to target='gke'; leave"),
        ([], {"config": None}, "config is not given; target='gke' needs --config"),
        ([], {"topology": None}, "topology is not given; target='gke' needs"),
    ],
)
def test_a_training_job_takes_no_flags_of_servers_and_needs_its_own(
    launch: Launch, more: list[str], flags: dict[str, str | None], said: str
) -> None:
    code, out, err = launch(*more, *DRY, "--skip-compile", **flags)
    assert code == 2
    assert out == ""
    assert said in err


def command(out: str) -> list[str]:
    deployment = next(yaml.safe_load_all(out))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert "command" not in container  # it would replace the entry point of the image
    return container["args"]


def test_pods_serve_the_artifact_to_the_cluster(launch: Launch) -> None:
    _, out, err = launch(*DRY, **SERVING)
    assert err == ""
    assert command(out) == [
        *("tokenrec", "serve", "--model=/models/ranker"),
        *("--host=0.0.0.0", "--port=8000", "--compile-cache=/cache"),
    ]


def test_the_parser_of_the_server_takes_the_command(launch: Launch) -> None:
    given = {name.replace("-", "_"): "500" for name in SERVER_LIMITS}
    given["allow_missing"] = "age,store_id"
    _, out, _ = launch(*DRY, **SERVING | given)
    args = build_parsers()[0].parse_args(command(out)[1:])
    assert (args.model, args.host, args.port) == (
        *(Path("/models/ranker"), "0.0.0.0"),
        PORT,
    )
    assert args.compile_cache == Path("/cache")
    assert {vars(args)[name.replace("-", "_")] for name in SERVER_LIMITS} == {500}
    assert args.allow_missing == ("age", "store_id")


def test_limits_that_are_not_given_are_those_of_the_server(launch: Launch) -> None:
    _, out, _ = launch(*DRY, **SERVING)
    parser = build_parsers()[0]
    args = vars(parser.parse_args(command(out)[1:]))
    bare = vars(parser.parse_args(["serve", "--model=/models/ranker"]))
    differing = {name for name in bare if args[name] != bare[name]}
    assert differing == {"host", "compile_cache"}


def test_the_grace_period_holds_the_drain_of_the_server() -> None:
    pytest.importorskip("uvicorn")
    from tokenrec.serving.server.run import ServerOptions

    assert ServerOptions(Path()).drain_seconds == DRAIN_SECONDS


def test_the_name_is_that_of_the_artifact_unless_one_is_given(launch: Launch) -> None:
    _, out, _ = launch(*DRY, **SERVING | {"model": "pvc://models/ads/wide_ranker/"})
    assert next(yaml.safe_load_all(out))["metadata"]["name"] == "wide-ranker"
    assert "--model=/models/ads/wide_ranker" in command(out)
    code, _, err = launch(*DRY, **SERVING | {"model": "pvc://models/2026-03-01"})
    assert code == 2
    assert "begin with a letter" in err
