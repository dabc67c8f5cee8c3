"""`tokenrec compile`: its text, its JSON and its exit codes, on two small programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.planner.test_compile import tpu_compiler
from tests.worlds import mesh_of
from tokenrec.cli.main import main
from tokenrec.config import MeshConfig
from tokenrec.config.load import load_config
from tokenrec.errors import InputError
from tokenrec.planner.collectives import Collective
from tokenrec.planner.compile import compile_config
from tokenrec.planner.compiled_program import mesh_axes
from tokenrec.planner.report import sweep_text, to_text

CONTRACT = {
    *(
        "fits",
        "devices",
        "bytes_per_device",
        "memory_per_device",
        "flops_per_device",
        "collective_bytes",
    ),
    *(
        "roofline_seconds",
        "bound",
        "mfu_bound",
        "schedule_seconds",
        "mfu_by_schedule",
        "schedule",
        "examples_per_second",
        "compile_seconds",
    ),
}
PARTS = {"weights", "tables", "optimizer", "activations", "total"}
FEATURES = [
    {"name": "city", "kind": "categorical", "entity": "user"},
    {"name": "video", "kind": "categorical", "entity": "item"},
    {"name": "watched", "kind": "dense", "entity": "action"},
]


def plan_file(folder: Path, videos: int) -> Path:
    tables = {"city": 50, "video": videos}
    schema = {"features": FEATURES, "tasks": [{"name": "click"}], "tables": tables}
    path = folder / "plan.json"
    path.write_text(json.dumps({"schema": schema, "counts": {"items": videos - 2}}))
    return path


def line(plan: Path, *more: str) -> list[str]:
    small = [
        "--config.model.layers=1",
        "--config.model.windows=()",
        "--config.data.paradigm=nio",
        "--config.data.overlap=0",
        "--config.data.events=4",
        "--config.data.batch_size=64",
        "--config.tokens.embedding_dim=8",
    ]
    return [
        *(
            "compile",
            "--config=synthetic",
            "--config.data.name=none",
            f"--config.data.schema={plan}",
        ),
        *(*small, "--config.tokens.maker=linear", "--topology=v5e:2x2", *more),
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict]:
    folder = tmp_path_factory.mktemp("compiled")
    file = folder / "out.json"
    code = main(line(plan_file(folder, 5000), "--mesh=fsdp=2", f"--json={file}"))
    return code, json.loads(file.read_text())


@tpu_compiler
def test_a_step_that_fits_is_reported_whole(compiled: tuple[int, dict]) -> None:
    code, result = compiled
    assert code == 0
    assert set(result) >= CONTRACT
    assert (result["fits"], result["devices"], result["mesh"]) == (
        True,
        4,
        {"data": 2, "fsdp": 2, "context": 1, "tensor": 1},
    )
    held = result["bytes_per_device"]
    assert set(held) >= PARTS
    assert sum(size for part, size in held.items() if part != "total") == held["total"]
    assert all(size >= 0 for size in held.values())
    # 5,050 table rows of 8 float32 numbers on every device.
    assert held["tables"] - result["padding_per_device"]["tables"] == 5050 * 8 * 4
    # Tiles of 128 round 5,050 table rows up to 5,120, 1.4 %. A layout with the 8
    # columns as the minor dimension would take 16 times the bytes.
    assert 0 <= result["padding_per_device"]["tables"] < 0.1 * held["tables"]
    # Here and below, the same float64 quotient: a relative 1e-6 is allowed.
    assert result["headroom"] == pytest.approx(
        1 - held["total"] / result["memory_per_device"]
    )
    slowest = max(
        "compute", "memory", "network", key=lambda name: result[f"{name}_seconds"]
    )
    assert (result["bound"], result["roofline_seconds"]) == (
        slowest,
        result[f"{slowest}_seconds"],
    )
    assert 0 < result["mfu_by_schedule"] < result["mfu_bound"] < 1
    schedule = result["schedule"]
    assert result["schedule_seconds"] == pytest.approx(
        sum(schedule["work"].values()) + sum(schedule["exposed"].values())
    )
    assert schedule["work"]["matrix"] >= 0.9 * result["compute_seconds"]
    assert len(schedule["costliest"]) == 10
    assert any(cost["source"].startswith("tokenrec/") for cost in schedule["costliest"])
    assert result["examples_per_step"] == 64
    assert result["examples_per_second"] == pytest.approx(
        64 / result["roofline_seconds"]
    )
    by_axis = result["collective_bytes_by_axis"]
    assert set(by_axis) <= {"data", "fsdp", "data+fsdp"}
    assert sum(size for kinds in by_axis.values() for size in kinds.values()) == sum(
        result["collective_bytes"].values()
    )


@tpu_compiler
def test_the_report_names_every_part(compiled: tuple[int, dict]) -> None:
    text = to_text(compiled[1])
    parts = (
        *PARTS,
        "padding",
        "compute",
        "network",
        "MFU",
        "examples/s",
        "planned schema plan.json",
        "data=2,fsdp=2",
    )
    assert all(part in text for part in parts)
    row = sweep_text(
        [compiled[1] | {"predicted_seconds": 0.5, "remat": "none"}]
    ).splitlines()[-1]
    assert "data=2,fsdp=2,tensor=1" in row
    assert "500.00" in row


@tpu_compiler
def test_a_step_that_does_not_fit_ends_with_code_3_and_the_largest_arrays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    whole = "--config.tokens.replicate_rows=2000000000"
    assert main(line(plan_file(tmp_path, 1_000_000_000), whole, f"--json={file}")) == 3
    result = json.loads(file.read_text())
    assert set(result) >= CONTRACT
    assert not result["fits"]
    assert result["bytes_per_device"]["tables"] == (10**9 + 50) * 8 * 4
    total = result["bytes_per_device"]["total"]
    assert total is None or total > result["memory_per_device"]
    largest = result["largest"][0]
    assert largest["bytes"] >= result["bytes_per_device"]["tables"]
    assert "1000000050,8" in largest["shape"]
    captured = capsys.readouterr()
    assert "DOES NOT FIT" in captured.out
    assert largest["shape"] in captured.out
    assert "does not fit" in captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh=fsdp:2"], "'fsdp:2' is not AXIS=SIZE; write data=4,fsdp=8,tensor=1"),
        (["--mesh=fsdp=2,fsdp=4"], "'fsdp=4' is not AXIS=SIZE"),
        (["--mesh=fsdp=2", "--sweep"], "not allowed with argument"),
        (["--slices=two"], "'two' is not a whole number"),
        (["--sweeps"], "did you mean '--sweep'"),
        (
            ["--config.data.schema=no.json"],
            "data.schema='no.json' is neither a file nor a shipped schema",
        ),
    ],
)
def test_a_wrong_line_is_one_message_and_exit_code_2(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(plan_file(tmp_path, 50), *flags)) == 2
    assert message in capsys.readouterr().err


@tpu_compiler
@pytest.mark.parametrize(
    ("topology", "mesh", "batch", "message"),
    [
        ("v5e:2x3", MeshConfig(), 64, "topology='v5e:2x3'"),
        ("v5e:2x2", MeshConfig(fsdp=3), 64, "do not multiply to 4 devices"),
        (
            "v5e:2x2",
            MeshConfig(),
            6,
            r"data\.batch_size / optim\.accumulate = 6 is not a multiple of the 4 devices",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_compiling(
    topology: str, mesh: MeshConfig, batch: int, message: str, tmp_path: Path
) -> None:
    plan = plan_file(tmp_path, 50)
    config = load_config(
        "synthetic",
        ["data.name=none", f"data.schema={plan}", f"data.batch_size={batch}"],
    )
    with pytest.raises(InputError, match=message):
        compile_config(config, topology, 1, mesh)


def test_axes_of_a_collective_are_those_that_vary_in_a_group() -> None:
    mesh = mesh_of(2, 2, 2)
    places = np.arange(8).reshape(2, 2, 2)
    expected = {
        "data": places.transpose(1, 2, 0).reshape(4, 2),
        "fsdp": places.transpose(0, 2, 1).reshape(4, 2),
        "tensor": places.reshape(4, 2),
        "data+fsdp": places.transpose(2, 0, 1).reshape(2, 4),
        "data+fsdp+tensor": places.reshape(1, 8),
        "none": places.reshape(8, 1),
    }
    for name, groups in expected.items():
        one = Collective(
            "all-reduce", 8.0, tuple(tuple(group) for group in groups.tolist())
        )
        assert mesh_axes(one, mesh) == name
    assert (
        mesh_axes(Collective("all-reduce", 8.0, ((0,),), slices=2), mesh)
        == "data across slices"
    )
    assert (
        mesh_axes(Collective("collective-permute", 8.0, ((0, 1), (1, 0))), mesh)
        == "tensor"
    )
