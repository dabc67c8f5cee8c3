"""Starting a job: compile, write the file, and call the cloud's own command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch.conftest import SERVING, SLURM, TPU_VM, Launch

# What `compile_config` found for the config `synthetic` on v5e:4x4, shortened.
FOUND: dict[str, Any] = json.loads(
    """
{"topology": "v5e:4x4", "slices": 1, "devices": 16, "device_kind": "TPU v5 lite", "mesh": {"data": 16, "fsdp": 1,
"tensor": 1}, "batch": 64, "stream_tokens": 20, "examples_per_step": 64, "schema": "prepared data set synthetic",
"parameters": {"dense": 43986, "tables": 1232}, "attention": [{"window": null, "queries": 8, "keys": 20,
"implementation": "dense"}, {"window": 8, "queries": 1, "keys": 8, "implementation": "dense"}],
"memory_per_device": 16911433728, "model_flops_per_device": 7015680.0, "fits": true,
"headroom": 0.9988624633304657, "compile_seconds": 23.3, "bytes_per_device": {"weights": 403456, "tables": 8192,
"optimizer": 807944, "inputs": 40440, "activations": 14031360, "program": 3945984, "total": 19237376},
"padding_per_device": {"weights": 227512, "tables": 3264, "optimizer": 455432}, "flops_per_device": 7058688.0,
"bytes_moved_per_device": 1072222.0, "collective_bytes": {"all-gather": 15360, "all-reduce": 338692},
"collective_bytes_by_axis": {"data": {"all-gather": 15360, "all-reduce": 338692}},
"compute_seconds": 3.5830903553299494e-08, "memory_seconds": 1.3091843711843712e-06,
"network_seconds": 3.540525e-06, "roofline_seconds": 3.540525e-06, "bound": "network",
"mfu_bound": 0.010058561606679041, "examples_per_second": 18076415.220906503,
"tokens_per_second": 361528304.4181301, "schedule_seconds": 1e-4, "mfu_by_schedule": 0.0004,
"examples_per_second_by_schedule": 640000.0, "sparse_core_calls": {}, "schedule": {"work": {"vector": 9e-5},
"exposed": {"all-reduce": 1e-5}, "network_hidden": 0.0, "unpriced": [], "costliest": []}}
"""
)
# Stands in for a command of the cloud.
TOOL = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> notes
[[ $* == *describe* ]] && echo ACTIVE
exit "${FAIL:-0}"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cloud(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put stand-ins for the cloud's commands first in PATH.

    They write down their arguments, and fail with the exit code `FAIL`.
    """
    tools = folder / "tools"
    tools.mkdir()
    for name in ("kubectl", "gcloud", "sbatch"):
        (tools / name).write_text(TOOL)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    return folder / "notes"


def answer(
    monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]
) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def compile_config(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments[1:])
        return report

    monkeypatch.setattr("tokenrec.planner.compile.compile_config", compile_config)
    return asked


def test_a_job_that_fits_is_rendered_after_its_compilation(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rendered, _ = launch("--dry-run", "--skip-compile")
    asked = answer(monkeypatch, FOUND)
    code, out, err = launch("--dry-run")
    assert (code, out) == (0, rendered)
    assert asked == [("v5e:4x4", 1)]
    assert "16 x TPU v5 lite" in err
    assert "examples/s" in err


def test_a_job_that_does_not_fit_ends_with_its_largest_arrays(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, cloud: Path
) -> None:
    largest = [
        {
            "bytes": 2**34,
            "shape": "f32[4096,1048576]",
            "operation": "dot",
            "source": "step.py:90",
        }
    ]
    answer(
        monkeypatch,
        FOUND | {"fits": False, "largest": largest, "largest_by": "by XLA's account"},
    )
    for more in (["--dry-run"], []):
        code, out, err = launch(*more)
        assert (code, out) == (3, "")
        assert "DOES NOT FIT" in err
        assert "16,384.0  f32[4096,1048576]  dot  step.py:90" in err
    assert not cloud.exists()
    assert not Path("synthetic.yaml").exists()


def test_what_is_refused_is_refused_before_anything_is_compiled(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch, FOUND)
    assert launch("--dry-run", bucket=None)[0] == 2
    assert launch("--dry-run", "--config.mesh.fsdp=3")[0] == 2
    assert asked == []


@pytest.mark.parametrize(
    ("flags", "tool", "remedy"),
    [
        ({}, "kubectl", "install it (https://"),
        (TPU_VM, "gcloud", "install it (https://"),
        (SLURM, "sbatch", "run this on a login node"),
    ],
)
def test_a_missing_command_is_named_and_nothing_is_written(
    launch: Launch,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, str],
    tool: str,
    remedy: str,
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    code, out, err = launch("--skip-compile", **flags)
    assert (code, out) == (2, "")
    assert f"needs '{tool}', which is not installed here; {remedy}" in err
    assert list(folder.iterdir()) == []


def test_gke_gets_the_manifest_that_is_kept(launch: Launch, cloud: Path) -> None:
    _, rendered, _ = launch("--dry-run", "--skip-compile")
    assert launch("--skip-compile")[0] == 0
    assert cloud.read_text() == "kubectl apply --filename synthetic.yaml\n"
    assert Path("synthetic.yaml").read_text() == rendered


def test_tpu_vms_get_the_script_that_is_kept(launch: Launch, cloud: Path) -> None:
    _, rendered, _ = launch("--dry-run", "--skip-compile", **TPU_VM)
    assert launch("--skip-compile", **TPU_VM)[0] == 0
    assert Path("synthetic.sh").read_text() == rendered
    assert "queued-resources create synthetic" in cloud.read_text().splitlines()[0]
    assert "host-train" in cloud.read_text().splitlines()[-1]


def test_slurm_gets_the_script_that_is_kept_if_the_nodes_will_find_their_files(
    launch: Launch, cloud: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No GPU is here to compile for.
    asked = answer(monkeypatch, FOUND)
    here = SLURM | {"data": "set", "venv": "env"}
    code, _, err = launch(**here)
    assert code == 2
    assert f"data='{Path.cwd()}/set' is not a prepared data set on this machine" in err
    Path("set").mkdir()
    Path("set/tokenrec.json").touch()
    code, _, err = launch(**here)
    assert code == 2
    assert "venv='env' has no bin/tokenrec" in err
    assert not cloud.exists()
    Path("env/bin").mkdir(parents=True)
    Path("env/bin/tokenrec").touch()
    _, rendered, _ = launch("--dry-run", **here)
    assert launch(**here)[0] == 0
    assert cloud.read_text() == "sbatch synthetic.sbatch\n"
    assert Path("synthetic.sbatch").read_text() == rendered
    assert f"--data={Path.cwd()}/set" in rendered
    assert f"VENV={Path.cwd()}/env\n" in rendered
    assert asked == []


def test_the_cloud_s_refusal_is_the_verb_s(
    launch: Launch, cloud: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "7")
    code, _, err = launch("--skip-compile")
    assert code == 2
    assert "kubectl apply --filename synthetic.yaml` failed with exit code 7" in err


def test_another_job_of_this_name_is_not_overwritten(
    launch: Launch, cloud: Path
) -> None:
    assert launch("--skip-compile")[0] == 0
    before = Path("synthetic.yaml").read_text()
    code, _, err = launch("--skip-compile", bucket="another")
    assert code == 2
    assert "'synthetic.yaml' holds another job" in err
    assert Path("synthetic.yaml").read_text() == before
    assert len(cloud.read_text().splitlines()) == 1
    assert launch("--skip-compile")[0] == 0  # the same job again is no loss


def test_servers_are_updated_under_their_name(launch: Launch, cloud: Path) -> None:
    assert launch(**SERVING)[0] == 0
    _, rendered, _ = launch("--dry-run", **SERVING, replicas="5")
    assert launch(**SERVING, replicas="5")[0] == 0
    assert Path("ranker.yaml").read_text() == rendered
    applied = "kubectl apply --filename ranker.yaml"
    assert cloud.read_text().splitlines() == [applied, applied]


def test_servers_do_not_overwrite_a_training_job(launch: Launch, cloud: Path) -> None:
    assert launch("--skip-compile", name="ranker")[0] == 0
    code, _, err = launch(**SERVING)
    assert code == 2
    assert "'ranker.yaml' holds another job" in err
