"""The command for a GPU, rehearsed on the CPU: sizes so small that figures mean nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_specs import stream_specs
from benchmarks.gpu import attention, page
from benchmarks.gpu.attention_values import PRECISIONS, Job, compile_job
from benchmarks.gpu.clock import Looped, changed
from benchmarks.gpu.record import ERROR, LEFT_OUT, PASS, Recorder, read_rows
from benchmarks.gpu.reference import Result, Sample, draw_inputs, errors, reference

CLONE = Path(__file__).parents[2]
GPU = CLONE / "benchmarks" / "gpu"
REHEARSED = ("limits", "correctness", "attention")


def environment() -> dict[str, str]:
    """That of the tests, with this interpreter; the device is one CPU, as in a run."""
    flags = os.environ["XLA_FLAGS"].replace(
        "--xla_force_host_platform_device_count=8", ""
    )
    return os.environ | {"PYTHON": sys.executable, "XLA_FLAGS": flags}


def start(out: Path, stages: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [GPU / "run.sh", out, "--rehearse", "--stages", stages],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, text: str) -> None:
    while not (path.is_file() and text in path.read_text()):
        time.sleep(0.1)


@pytest.mark.slow
def test_the_rehearsal_passes_and_leaves_a_page_with_every_stage(
    tmp_path: Path,
) -> None:
    process = start(tmp_path, ",".join(REHEARSED))
    said, _ = process.communicate()
    assert process.returncode == 0, said
    result = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert [stage["stage"] for stage in result["stages"]] == list(REHEARSED)
    by_stage = {stage["stage"]: stage["tables"] for stage in result["stages"]}
    results = {
        (row.get("result"), row.get("reason"))
        for tables in by_stage.values()
        for rows in tables.values()
        for row in rows
    }
    # PyTorch is an extra.
    assert results <= {
        (None, None),
        (PASS, None),
        (LEFT_OUT, "PyTorch is not installed"),
        (LEFT_OUT, "it needs a GPU"),
    } | {pair for pair in results if "FlexAttention does not" in str(pair[1])}
    assert set(by_stage["correctness"]) == {
        "attention values",
        "attention values, worst",
        "exchange on one device",
        "train steps",
        "resume",
    }
    assert {row["implementation"] for row in by_stage["attention"]["attention"]} >= {
        "dense",
        "blocked",
        "jax.nn xla",
    }
    text = (tmp_path / "gpu_cpu.md").read_text()
    for name in REHEARSED:
        assert f"## {page.STAGES[name]}" in text
    assert "A rehearsal" in text
    assert str(CLONE) not in text
    # The machine returns eight files.
    assert len(list(tmp_path.iterdir())) == len(REHEARSED) + 2


@pytest.mark.slow
def test_a_signal_in_a_stage_leaves_a_page_of_what_was_measured(tmp_path: Path) -> None:
    # `limits`, which names the card, is in the rehearsal above.
    process = start(tmp_path, "correctness,attention")
    wait_for(tmp_path / "correctness.jsonl", PASS)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert process.returncode == 143, said
    states = {
        stage["stage"]: stage["state"]
        for stage in json.loads((tmp_path / "gpu_unknown.json").read_text())["stages"]
    }
    assert states == {
        "correctness": "CUT OFF",
        "attention": "NO RECORD",
    }
    text = (tmp_path / "gpu_unknown.md").read_text()
    assert "NOT ALL PASSED: correctness (CUT OFF), attention (NO RECORD)" in text
    assert "### attention values" in text


STUCK = """
import sys, time
from benchmarks.gpu.record import run_stage
def measure(recorder):
    recorder.add(table="copies", size=7)
    recorder.note("stuck")
    time.sleep(1000)
run_stage("limits", "", measure, ["--out", sys.argv[1]])
"""


def test_rows_outlive_a_stage_that_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, tmp_path],
        env=os.environ | {"PYTHONPATH": str(CLONE)},
    )
    wait_for(tmp_path / "limits.jsonl", "stuck")
    process.kill()
    process.wait()
    with (tmp_path / "limits.jsonl").open("a") as file:
        file.write('{"table": "cop')  # a write that the end of the machine cut
    assert page.main(["--out", str(tmp_path), "--stages", "limits"]) == 1
    text = (tmp_path / "gpu_unknown.md").read_text()
    assert "NOT ALL PASSED: limits (CUT OFF)" in text
    assert "### copies\n\n| size |\n|---:|\n| 7 |" in text
    assert "- stuck" in text


def test_a_failure_a_nan_and_an_error_fail_a_stage_and_stop_nothing(
    tmp_path: Path,
) -> None:
    for error in (2.0, float("nan")):
        recorder = Recorder(tmp_path, "limits")
        recorder.check(1.0, 1.0)
        assert not recorder.failed
        recorder.check(error, 1.0)
        assert recorder.failed
    recorder = Recorder(tmp_path, "limits", seconds=30)
    with recorder.case(case="first"):
        raise ValueError("no such thing")
    with recorder.case(case="second"):
        raise TimeoutError
    assert recorder.out_of_time(60, case="third")
    assert not recorder.out_of_time(1, case="fourth")
    recorder.close()
    rows = read_rows(tmp_path / "limits.jsonl")[1:-1]
    assert [row["result"] for row in rows] == [ERROR, LEFT_OUT, LEFT_OUT]
    assert rows[0]["reason"] == "ValueError: no such thing"
    assert recorder.failed


def test_shares_of_the_peak_are_of_the_measured_one(tmp_path: Path) -> None:
    (tmp_path / "limits.jsonl").write_text('{"limit": "bfloat16", "peak": 5.0}\n')
    recorder = Recorder(tmp_path, "attention")
    assert recorder.peaks() == {"bfloat16": 5.0}
    (tmp_path / "limits.jsonl").unlink()
    assert recorder.peaks() == {}
    assert "No peak is known" in (tmp_path / "attention.jsonl").read_text()


def result_of(spec, implementation: str = "dense") -> Result:
    job = Job("", spec, implementation, "float32, highest")
    return Result(*map(np.asarray, compile_job(job)(*draw_inputs(spec))))


def test_the_reference_tells_a_right_result_from_a_wrong_one() -> None:
    spec = stream_specs("nio")[2]
    inputs = draw_inputs(spec)
    expected = reference(spec, *inputs)
    tolerance = PRECISIONS["bfloat16"][2]
    assert max(errors(spec, result_of(spec), expected).values()) < 1e-5
    assert spec.window is not None
    assert spec.valid is not None
    everything = np.ones_like(spec.valid)
    for wrong in (spec.replace(window=spec.window + 1), spec.replace(valid=everything)):
        found = errors(spec, result_of(wrong), expected)
        assert min(found["out"], found["dq"], found["dk"], found["dv"]) > tolerance
    sample = Sample(spec, inputs, queries=5)
    right = result_of(spec)
    assert sample.error(right.out, right.dq) < 1e-5
    assert sample.error(right.out + np.nan) == np.inf
    wrong = result_of(spec.replace(window=spec.window + 1))
    assert sample.error(wrong.out, wrong.dq) > tolerance


def test_a_loop_makes_every_call_with_changed_inputs() -> None:
    def function(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x @ y, x + y

    inputs = tuple(jax.random.normal(jax.random.key(i), (4, 4)) for i in (0, 1))
    outputs = Looped(function, inputs, calls=3).loop(*inputs)
    expected, given = function(*inputs), inputs
    for _ in range(2):
        given = changed(given, expected)
        expected = function(*given)
    for output, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(output, wanted, rtol=1e-6)
    # Every output decides the next input.
    for number in (0, 1):
        moved = list(function(*inputs))
        moved[number] = moved[number].at[0, 0].add(0.1)
        first, second = (changed(inputs, x) for x in (function(*inputs), tuple(moved)))
        assert all(jnp.any(a != b) for a, b in zip(first, second, strict=True))


def timed(implementation: str, window: object, milliseconds: float, **more: object):
    return {
        "seq_len": 8192,
        "window": window,
        "pass": "forward_backward",
        "implementation": implementation,
        "milliseconds": milliseconds,
    } | more


def test_the_winner_and_the_goals_follow_from_the_rows(tmp_path: Path) -> None:
    rows = [
        timed("blocked", 256, 2.0, auto=False),
        timed("cudnn", 256, 4.0, auto=True),
        timed(attention.FLEX, 256, 3.0),
        timed("cudnn", "full", 20.0, auto=True),
        timed(attention.FLASH, "full", 20.0),
    ]
    sliding, full = attention.winners(rows)
    assert sliding["fastest of ours"] == "blocked"
    assert (sliding["auto"], sliding["auto / fastest"]) == ("cudnn", 2.0)
    assert (sliding["x of full flash"], sliding["x of flex"]) == (5.0, 0.75)
    assert (full["x of full flash"], full["x of flex"]) == (1.0, None)
    recorder = Recorder(tmp_path, "attention")
    attention.add_goals(recorder, [sliding, full])
    goals = read_rows(tmp_path / "attention.jsonl")[1:]
    assert [(goal["ratio"], goal["reached"]) for goal in goals] == [
        (5.0, "yes"),
        (0.75, "NO"),
    ]


def test_flash_attention_is_compared_over_the_same_pass() -> None:
    forward = timed(attention.FLASH, "full", 1.0) | {"pass": "forward"}
    (row,) = attention.winners([timed("cudnn", 256, 1.0, auto=True), forward])
    assert row["x of full flash"] is None


def test_streams_have_the_keys_that_cudnn_refuses() -> None:
    named = attention.streams(attention.STREAMS, attention.SIZES)
    specs = [each.spec for each in named if each.columns["tokens"] == "all"]
    assert {spec.keys for spec in specs} == {2048}
    assert all(spec.pattern.static.any() for spec in specs)
    assert any((spec.pattern.candidate > 0).any() for spec in specs)
    assert {spec.window for spec in specs} == {None, 256, 64}


@pytest.mark.parametrize("name", ["run.sh", "wheels.sh"])
def test_the_scripts_are_sound_shell(name: str) -> None:
    checker = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert checker, "the extra dev brings it"
    done = subprocess.run(
        [checker, GPU / name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_stages_fit_the_nine_minutes_and_are_those_of_the_page() -> None:
    text = (GPU / "run.sh").read_text()
    budgets = dict(re.findall(r"\[(\w+)\]=(\d+)", text))
    assert list(budgets) == list(page.STAGES)
    ((total, last),) = re.findall(r"^TOTAL=(\d+) LAST_PAGE=(\d+)$", text, re.MULTILINE)
    assert sum(map(int, budgets.values())) + int(last) == int(total) <= 540


def test_every_wheel_has_a_tested_version() -> None:
    text = (GPU / "wheels.sh").read_text()
    listed = " ".join(re.findall(r"(?:packages|sources)=\((.*?)\)", text, re.DOTALL))
    pinned = {
        line.partition("==")[0]
        for line in (CLONE / "constraints.txt").read_text().splitlines()
    }
    assert {"grain", "promise"} <= set(listed.split())
    assert set(listed.split()) <= pinned


def test_the_windows_of_a_length_leave_out_those_that_hold_all_of_it() -> None:
    named = attention.causal(128, (32, 128, None), attention.REHEARSED_SIZES)
    assert [each.spec.window for each in named] == [32, None]
