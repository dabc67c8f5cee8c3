"""The stages of the GPU command that train, rehearsed on the CPU, and their parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu import kernels, step_models, steps, tables, train
from benchmarks.gpu.record import ERROR, LEFT_OUT, PASS, Recorder, read_rows
from benchmarks.gpu.step_worker import TURNS, time_step
from tokenrec.config import MeshConfig
from tokenrec.sharding import make_mesh
from tokenrec.state import abstract_state

CLONE = Path(__file__).parents[2]
STAGES = ("steps", "tables", "train")


def rows_of(out: Path, stage: str) -> list[dict]:
    return [row for row in read_rows(out / f"{stage}.jsonl") if "event" not in row]


@pytest.mark.slow
def test_the_rehearsal_of_the_stages_that_train(tmp_path: Path) -> None:
    flags = os.environ["XLA_FLAGS"].replace(
        "--xla_force_host_platform_device_count=8", ""
    )
    done = subprocess.run(
        [
            CLONE / "benchmarks" / "gpu" / "run.sh",
            tmp_path,
            "--rehearse",
            "--stages",
            ",".join(STAGES),
        ],
        env=os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    found = rows_of(tmp_path, "steps")
    ours = [row for row in found if row.get("library") == "tokenrec"]
    assert [row["case"] for row in ours] == list(steps.REHEARSED)
    for row in ours:
        assert row["step_ms"] > 0
        assert row["model_tflops"] > 0
        assert row["planned_gib"] > 0
    profiled = [row for row in found if row["table"].endswith("kernels")]
    assert {row["case"] for row in profiled} == set(steps.PROFILED)
    for case in steps.PROFILED:
        shares = [row["share"] for row in profiled if row["case"] == case]
        assert len(shares) == 11
        assert shares[:-1] == sorted(shares[:-1], reverse=True)
        assert sum(shares[:-1]) <= shares[-1] == 1

    found = rows_of(tmp_path, "tables")
    measured = [row for row in found if "program" in row]
    assert [(row["program"], row["rows"]) for row in measured] == list(
        tables.cases(tables.REHEARSED_ROWS)
    )
    assert {row["result"] for row in measured} == {PASS}

    cost, *aucs = rows_of(tmp_path, "train")
    assert cost["steps"] == cost["of"] == 12
    assert not cost["stopped"]
    assert [row["task"] for row in aucs] == ["click", "buy"]
    assert all(0 < row["auc"] < 1 for row in aucs)


def test_the_models_have_the_sizes_that_the_page_gives() -> None:
    sizes = {}
    for name in step_models.CASES:
        case = step_models.step_case(name, rehearse=False)
        model, config = case.model, case.config
        with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
            dense = abstract_state(model).params
        tokens = model.layout(config.data.events).length
        sizes[name] = (sum(w.size for w in dense.values()), tokens)
        assert config.data.batch_size > step_models.TINY_BATCH
    assert sizes == {
        "lrm_1b": (1_269_672_965, 2048),
        "uc_2048": (32_787_970, 2048),
        "nio": (310_338, 79),
        "nio_4096": (310_338, 79),
    }


def event(name: str, start: float, end: float, operation: str = "op"):
    return kernels.Event(name, operation, start, end)


def test_an_operation_counts_without_those_inside_it() -> None:
    events = [
        event("fusion", 2, 5),
        event("while", 0, 10),
        event("fusion", 5, 6),
        event("inner", 3, 4),
        event("copy", 10, 12),
    ]
    own = sorted((e.name, time) for e, time in kernels.own_times(events))
    assert own == [
        ("copy", 2),
        ("fusion", 1),
        ("fusion", 2),
        ("inner", 1),
        ("while", 6),
    ]


def test_the_costliest_kernels_are_per_step_and_by_name() -> None:
    lines = [
        [event("a", 0, 4e6), event("b", 4e6, 5e6)],
        [event("a", 0, 2e6, "other"), event("c", 2e6, 3e6)],
    ]
    rows = kernels.costliest(lines, steps=2, count=2)
    assert [(row["kernel"], row["ms"], row["calls"]) for row in rows] == [
        ("a", 3.0, 1.0),
        ("b", 0.5, 0.5),
        ("all 3", 4.0, 2.0),
    ]
    assert rows[0]["share"] == 0.75
    assert rows[0]["operation"] == "op"
    assert kernels.costliest([], steps=1) == []


# A type of JAX's own extension module has no name of its module.
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_a_trace_of_jax_holds_the_operations_of_a_program() -> None:
    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        return jnp.sort(x @ x, axis=0)

    x = jnp.ones((256, 256))
    rows = kernels.profile(lambda: function(x), steps=3)
    assert any("sort" in row["kernel"] for row in rows)
    assert rows[-1]["ms"] > 0


class Scripted:
    """Answers of a worker."""

    def __init__(self, *answers: dict | None) -> None:
        self.answers = list(answers)
        self.stopped = False

    def answer(self, seconds: float) -> dict | None:
        return self.answers.pop(0)

    def start(self, request: dict) -> None:
        self.request = request

    def stop(self) -> None:
        self.stopped = True

    def end(self) -> int:
        return -9


def step_row(milliseconds: float, **more: float) -> dict:
    return {"row": {"step_ms": milliseconds} | more}


def test_shares_of_peak_ratios_and_the_goal_follow_from_the_rows(
    tmp_path: Path,
) -> None:
    recorder = Recorder(tmp_path, "steps")
    runs = steps.Steps(recorder, peak=100e12)
    ours = Scripted(
        step_row(10.0, model_flops=0.5e12, sheet_flops=200e12), {"done": True}
    )
    runs.run("lrm_1b", "tokenrec", ours, 0)
    runs.run("lrm_1b", "torch", Scripted(step_row(20.0), {"done": True}), 0)
    runs.compare()
    assert ours.stopped
    assert ours.request["profile"]
    row, peer, ratio, goal = rows_of(tmp_path, "steps")
    assert (row["model_tflops"], row["mfu"], row["mfu_sheet"]) == (50, 0.5, 0.25)
    assert (peer["model_tflops"], peer["mfu"]) == (25, 0.25)
    assert ratio["ours_over_torch"] == 2
    assert (goal["mfu"], goal["reached"]) == (0.5, "yes")


def test_a_worker_that_fails_or_vanishes_leaves_a_row(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "steps")
    runs = steps.Steps(recorder, peak=None)
    failing = Scripted({"error": "RESOURCE_EXHAUSTED: 90 GiB"})
    runs.run("lrm_1b", "tokenrec", failing, 0)
    runs.run("uc_2048", "tokenrec", Scripted(None), 0)
    runs.compare()
    first, second = rows_of(tmp_path, "steps")
    assert failing.stopped
    assert (first["result"], first["reason"]) == (ERROR, "RESOURCE_EXHAUSTED: 90 GiB")
    assert second["reason"] == "the process ended with -9"
    assert recorder.failed


def test_a_real_worker_reports_its_error_and_is_ended() -> None:
    with steps.Worker("no such case", "tokenrec", rehearse=True) as worker:
        assert worker.answer(600) is None
        assert worker.end() == 2


def test_a_turn_holds_many_short_steps() -> None:
    calls = []

    def step() -> int:
        calls.append(time.perf_counter())
        return len(calls)

    times, last = time_step(step, lambda result: None, seconds=0.05)
    assert len(times) == TURNS
    assert last == len(calls) > 10 * TURNS


def table_row(donated: bool, temporary: int, table: int) -> dict:
    return {"donated": donated, "temporary_bytes": temporary, "table_bytes": table}


def test_a_copy_of_the_table_is_noticed() -> None:
    shortest = table_row(True, 50, 1_000)
    assert tables.updates_in_place(shortest, shortest)
    assert tables.updates_in_place(table_row(True, 60, 10_000), shortest)
    assert not tables.updates_in_place(table_row(True, 9_050, 10_000), shortest)
    assert not tables.updates_in_place(table_row(False, 50, 10_000), shortest)


def trained(records: list[dict], *, stopped: bool, code: int = 0) -> train.Trained:
    return train.Trained(code, 50.0, stopped, records, 438, "")


def log_line(step: int, seconds: float) -> dict:
    return {
        "step": step,
        "train/step_seconds": seconds,
        "train/examples_per_second": 64 / seconds,
    }


def test_a_run_that_was_stopped_says_what_all_steps_would_take() -> None:
    records = [log_line(20, 1.0), log_line(40, 0.5), log_line(60, 0.1)]
    row = train.cost_row(trained(records, stopped=True))
    assert (row["steps"], row["of"], row["stopped"]) == (60, 438, True)
    assert row["whole_seconds"] == pytest.approx(50 + 378 * 0.3)
    early = train.cost_row(trained([], stopped=True))
    assert early["result"] == LEFT_OUT
    assert train.cost_row(trained([], stopped=False, code=1))["result"] == ERROR


def test_training_is_stopped_when_the_time_runs_out(tmp_path: Path) -> None:
    result = train.train(["--config=synthetic"], tmp_path / "run", seconds=0.0)
    assert result.stopped
    assert result.records == []


def test_the_auc_is_compared_with_the_seeds_of_the_cpu(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "train")
    records = [{"step": 878, "valid/is_click/auc": 0.7547, "valid/macro_auc": 0.7}]
    train.add_aucs(recorder, train.aucs(trained(records, stopped=False)))
    train.add_aucs(recorder, {"long_view": 0.74})
    click, view = rows_of(tmp_path, "train")
    assert click["result"] == PASS
    assert click["cpu_mean"] == pytest.approx(0.7547, abs=1e-4)
    assert view["result"] == "FAIL"


def test_without_the_data_a_row_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(train, "DATA", tmp_path / "none")
    assert train.main(["--out", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path, "train")
    assert row["result"] == LEFT_OUT
    assert json.dumps(row).count("benchmarks/gpu/data/kuairand_pure") == 1
