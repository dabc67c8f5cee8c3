"""Jobs that `tokenrec launch` refuses, and the command that every host runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.launch.conftest import SLURM, TPU_VM, Launch
from tokenrec.cli.main import build_parsers
from tokenrec.config.overrides import split_overrides
from tokenrec.runtime import paths

DRY = ("--dry-run", "--skip-compile")


@pytest.mark.parametrize(
    ("more", "flags", "said"),
    [
        (
            ["--config.mesh.fsdp=6"],
            {},
            "mesh.data=-1 mesh.fsdp=6 mesh.tensor=1 do not multiply to the 16 devices",
        ),
        (["--config.mesh.data=8"], {}, "do not multiply to the 16 devices of 1 slices"),
        (
            ["--config.mesh.fsdp=32"],
            {"slices": "2"},
            "data=1 is not a multiple of slices=2",
        ),
        (
            ["--config.data.batch_size=40"],
            {},
            "data.batch_size / optim.accumulate = 40 is not a multiple of the 16",
        ),
        (
            ["--config.optim.accumulate=4"],
            {},
            "data.batch_size / optim.accumulate = 8 is not a multiple of the 16",
        ),
        (
            ["--config.data.eval_batch_size=250"],
            {},
            "data.eval_batch_size = 250 is not a multiple of the 16",
        ),
        (
            ["--config.data.semantic_ids=/home/me/ids"],
            {},
            "'/home/me/ids' is a path of this machine",
        ),
        (
            [],
            {"topology": "v5e:4x5"},
            "topology='v5e:4x5' is not a slice that Google Cloud offers; did you mean",
        ),
        (
            [],
            {"topology": "v5e:2x4", "slices": "2"},
            "slices=2 of v5e:2x4, which is one host",
        ),
        ([], {"slices": "0"}, "slices=0 must be at least 1"),
        ([], {"target": "flux"}, "'flux' is not a choice"),
        ([], {"topology": "h10:2x8"}, "h100:2x8; did you mean 'h100'?"),
        ([], {"topology": "h100:16"}, "topology='h100:16' is not h100:NODESxGPUS"),
        ([], {"topology": "h100:2x3"}, "a node has 1, 2, 4 or 8 GPUs"),
        ([], {"topology": "h200:2x4"}, "no machine of Google Cloud has 4 h200"),
        (
            [],
            {"topology": "h100:1x8", "slices": "2"},
            "slices=2 belongs to TPUs; name more nodes, such as --topology=h100:2x8",
        ),
        ([], TPU_VM | {"topology": "h100:2x8"}, "these are GPUs; use --target gke or"),
        ([], {"kueue_queue": "Team"}, "kueue_queue='Team' is refused by Kubernetes"),
        ([], {"ttl_seconds": "-1"}, "'-1' is not a whole number of 0 or more"),
        ([], {"venv": "/x"}, "venv='/x' does not apply to target='gke'"),
        (["--host-network"], TPU_VM, "host_network='True' does not apply to"),
        ([], SLURM | {"topology": "v5e:4x4"}, "target='slurm': these are TPUs; use"),
        (
            ["--config.mesh.fsdp=6"],
            SLURM,
            "do not multiply to the 16 devices of h100:2x8; use mesh.data=-1",
        ),
        ([], SLURM | {"runs": None}, "runs is not given; target='slurm' needs --runs"),
        ([], SLURM | {"runs": "az://a/b"}, "'az://a/b' is a URL of 'az'"),
        ([], SLURM | {"venv": None}, "image and venv: neither is given"),
        ([], SLURM | {"image": "h.dev/p/t:1"}, "image and venv: both are given"),
        (
            [],
            SLURM | {"venv": None, "image": "train.sqsh"},
            "image='train.sqsh' must begin with '/'",
        ),
        (
            [],
            SLURM | {"venv": None, "image": "h.dev/p/t:latest"},
            "with a tag other than latest",
        ),
        ([], SLURM | {"time_limit": "2d"}, "time_limit='2d' is not a time of Slurm"),
        ([], SLURM | {"partition": "a;b"}, "partition='a;b' is not a word of letters"),
        ([], SLURM | {"grace_seconds": "70000"}, "is more than Slurm's 65535"),
        ([], SLURM | {"cpus_per_gpu": "0"}, "cpus_per_gpu=0 must be at least 1"),
        ([], SLURM | {"min_nodes": "3"}, "min_nodes=3 is not between 1 and the 2"),
        (
            ["--config.train.elastic=scale"],
            SLURM | {"min_nodes": "1"},
            "elastic_devices=0: the batch is meant for all nodes; add --config",
        ),
        (
            [
                "--config.train.elastic=scale",
                "--config.train.elastic_devices=32",
                "--config.data.batch_size=256",
                "--config.data.eval_batch_size=256",
            ],
            SLURM | {"topology": "h100:4x8", "min_nodes": "2"},
            "min_nodes=2: Slurm may start the run on 3 nodes, and data.batch_size=256",
        ),
        ([], SLURM | {"name": "a b"}, "name='a b' is not a word of letters"),
        ([], SLURM | {"bucket": "b"}, "bucket='b' does not apply to target='slurm'"),
        ([], {"image": None}, "image is not given; build launch/Dockerfile"),
        (
            [],
            {"image": "host.dev/p/train:latest"},
            "image='host.dev/p/train:latest' is not",
        ),
        ([], {"image": "host.dev/p/train"}, "image='host.dev/p/train' is not"),
        ([], {"bucket": None}, "bucket is not given; make one"),
        (
            [],
            {"bucket": "gs://my-bucket"},
            "bucket='gs://my-bucket' is not the name of a bucket",
        ),
        ([], {"name": "My_Job"}, "name='My_Job' is refused by Kubernetes (RFC 1123)"),
        ([], {"name": "j" * 48}, "use 47 characters at most"),
        ([], {"namespace": "a.b"}, "namespace='a.b' is refused by Kubernetes"),
        (
            [],
            {"service_account": "me@project"},
            "service_account='me@project' is refused by Kubernetes",
        ),
        (
            [],
            {"project": "my-project"},
            "project='my-project' does not apply to target='gke'",
        ),
        (
            [],
            TPU_VM | {"namespace": "team"},
            "namespace='team' does not apply to target='tpu-vm'",
        ),
        (
            [],
            TPU_VM | {"zone": None},
            "zone is not given; target='tpu-vm' needs --zone; `gcloud",
        ),
        ([], TPU_VM | {"zone": "west"}, "zone='west' is not one of Google Cloud's"),
        ([], TPU_VM | {"project": None}, "project is not given"),
        (
            [],
            TPU_VM | {"service_account": "tokenrec"},
            "service_account='tokenrec' is not one of",
        ),
        (
            [],
            TPU_VM | {"topology": "tpu7x:2x2x2"},
            "the TPU VM service does not serve tpu7x; use --target gke",
        ),
    ],
)
def test_what_cannot_run_is_refused(
    launch: Launch, more: list[str], flags: dict[str, str | None], said: str
) -> None:
    code, out, err = launch(*more, *DRY, **flags)
    assert code == 2
    assert out == ""
    assert said in err


def test_the_longest_name_gives_the_longest_pod_name_that_kubernetes_takes(
    launch: Launch,
) -> None:
    code, _, _ = launch(*DRY, name="j" * 47)
    assert code == 0
    assert len("j" * 47 + "-slice-0-3-xxxxx") == 63


def test_mesh_and_batch_are_over_all_slices(launch: Launch) -> None:
    big = (
        "--config.data.batch_size=128",
        "--config.data.eval_batch_size=128",
        "--config.mesh.fsdp=16",
        *DRY,
    )
    code, out, _ = launch(*big, topology="tpu7x:2x2x4", slices="4")
    assert code == 0  # 16 chips, 32 devices a slice
    assert command(out)[4:-3] == [f"--config.{name}" for name in overrides(big)]


def overrides(arguments: tuple[str, ...]) -> list[str]:
    return [
        argument.removeprefix("--config.")
        for argument in arguments
        if argument.startswith("--config.")
    ]


def command(out: str) -> list[str]:
    (container,) = list(yaml.safe_load_all(out))[-1]["spec"]["replicatedJobs"][0][
        "template"
    ]["spec"]["template"]["spec"]["containers"]
    assert "command" not in container  # it would replace the entry point of the image
    return container["args"]


def test_hosts_train_an_installed_config_by_name_on_data_of_the_bucket(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The image has gcsfs; this environment need not.
    monkeypatch.setattr(paths, "_prepare_store", lambda scheme: None)
    _, out, _ = launch(*DRY, data="somewhere/else/set_7/", name="trial")
    assert command(out) == [
        *("tokenrec", "train", "--distributed", "--config=synthetic"),
        *("--data=/gcs/data/set_7", "--workdir=gs://my-bucket/runs/trial", "--quiet"),
    ]
    arguments, _ = split_overrides(command(out)[1:])
    assert build_parsers()[0].parse_args(arguments).distributed
    _, again, _ = launch(*DRY, config="configs/synthetic.py", name="trial")
    assert command(again)[3:5] == ["--config=synthetic", "--data=/gcs/data/synthetic"]


def test_another_config_travels_with_the_job(launch: Launch, tmp_path: Path) -> None:
    file = tmp_path / "wide_model.py"
    file.write_text(
        (Path(__file__).parents[2] / "configs" / "synthetic.py").read_text()
        + "\n# it's mine: $HOME\n"
    )
    _, out, _ = launch(*DRY, config=str(file))
    config_map, job_set = yaml.safe_load_all(out)
    assert config_map["data"] == {"config.py": file.read_text()}
    assert job_set["metadata"]["name"] == "wide-model"
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "--config=/config/config.py" in pod["containers"][0]["args"]
    mounted = {
        mount["name"]: mount["mountPath"]
        for mount in pod["containers"][0]["volumeMounts"]
    }
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounted["config"] == "/config"
    assert volumes["config"]["configMap"] == {"name": config_map["metadata"]["name"]}
