"""The benchmarks of attention and of the step still run.

Shapes are so small that the figures mean nothing.
"""

import importlib.util
import json
import os
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention, plot, step, step_cases, timing
from benchmarks.attention_cases import (
    Case,
    Sizes,
    compile_attention,
    local_mesh,
    useful_flops,
)
from benchmarks.attention_specs import causal_spec
from benchmarks.peers import attention as peers
from benchmarks.plot import plot_throughput
from benchmarks.report import kept_rows
from tokenrec.config.validate import validate
from tokenrec.errors import InputError
from tokenrec.ops.attention.pattern import causal_pattern

TINY = (
    "--seq-lens",
    "64",
    "--batch",
    "2",
    "--heads",
    "2",
    "--head-dim",
    "8",
    "--matmul",
    "64",
    "--repeats",
    "1",
)
KEY = ["mesh", "seq_len", "window", "implementation", "dtype", "pass"]
TIMES = [
    "milliseconds",
    "least_milliseconds",
    "tokens_per_second",
    "tflops",
    "peak_fraction",
    "temporary_mib",
]


def run(tmp_path, *flags, name="new"):
    attention.main([*TINY, "--no-png", "--out", str(tmp_path / name), *flags])
    return json.loads((tmp_path / f"{name}.json").read_text()), (
        tmp_path / f"{name}.md"
    ).read_text()


def test_a_row_for_every_case_with_the_documented_columns(tmp_path):
    result, page = run(
        tmp_path, "--windows", "16", "full", "--implementations", "dense", "blocked"
    )
    assert [list(row) for row in result["rows"]] == [[*KEY, *TIMES]] * 8
    assert {
        (row["window"], row["implementation"], row["pass"]) for row in result["rows"]
    } == {
        (window, name, pass_)
        for window in (16, "full")
        for name in ("dense", "blocked")
        for pass_ in ("forward", "forward_backward")
    }
    for row in result["rows"]:
        assert row["tokens_per_second"] * row["milliseconds"] == pytest.approx(
            2 * 64 * 1e3
        )
        assert 0 < row["least_milliseconds"] <= row["milliseconds"]
        assert row["peak_fraction"] > 0
        assert row["temporary_mib"] >= 0
    assert "Times faster than dense" in page
    assert "--seq-lens 64 --windows 16 full" in result["command"]


def test_useful_work_is_the_visible_pairs_and_three_and_a_half_times_that_with_gradients():
    for window in (None, 1, 5, 9):
        spec = causal_spec(9, 9, window, batch=2, heads=3, head_dim=4)
        pairs = causal_pattern(9, 9).visible(window).sum()
        assert useful_flops(spec, "forward") == 4 * 4 * 3 * 2 * pairs
        assert useful_flops(spec, "forward_backward") == 14 * 4 * 3 * 2 * pairs


def test_the_program_timed_computes_attention_and_its_gradients_on_a_mesh():
    sizes = Sizes(2, 2, 4)
    case = Case("2x1x2", 8, 3, "dense", "float32", "forward_backward")
    mesh = local_mesh(case.mesh, sizes)
    spec = case.spec(sizes)
    inputs = spec.random_inputs(mesh)
    got = compile_attention(spec, case.implementation, case.pass_, mesh)(*inputs)
    q, k, v, gradient = (jnp.asarray(np.asarray(x)) for x in inputs)
    out, pull_back = jax.vjp(windowed_attention, q, k, v)
    for mine, expected in zip(got, (out, *pull_back(gradient)), strict=True):
        # Float32 rounding of sums of 8 terms up to 4: 2.4e-7 each. Measured: 5e-7 on an
        # Intel Xeon, 0 on an AMD EPYC.
        np.testing.assert_allclose(mine, expected, atol=2e-6)


def windowed_attention(q, k, v, window=3):
    """The definition, as a masked product: no library function of attention."""
    tokens, width = q.shape[1], q.shape[-1]
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None]
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / width**0.5
    weights = jax.nn.softmax(logits, where=(distance >= 0) & (distance < window))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def test_what_is_not_timed_is_said_with_its_reason(tmp_path):
    flags = ("--windows", "16", "64", "full", "--passes", "forward", "--full-to", "32")
    result, page = run(tmp_path, *flags, "--implementations", "dense", "splash")
    assert {row["implementation"] for row in result["rows"]} == {"dense"}
    begin = "dense, float32, mesh 1x1x1: "
    assert (
        "splash, float32, mesh 1x1x1: it is not for a cpu, which has blocked, dense (seq_len, window: 64, 16)"
        in page
    )
    assert (
        f"{begin}the window holds the whole stream, which is full attention (seq_len, window: 64, 64)"
        in page
    )
    assert (
        f"{begin}full attention is timed up to --full-to 32 (seq_len, window: 64, full)"
        in page
    )
    with pytest.raises(InputError, match="--logits-gib is 1e-06"):
        run(
            tmp_path,
            "--windows",
            "16",
            "--implementations",
            "dense",
            "--logits-gib",
            "1e-6",
        )


def test_against_pairs_rows_by_key_and_names_those_without_a_partner(tmp_path):
    flags = ("--implementations", "dense", "--passes", "forward")
    old, _ = run(tmp_path, *flags, "--windows", "8", "16", name="old")
    old["rows"][1]["milliseconds"] = 1e6
    old["params"]["head_dim"] = 7
    (tmp_path / "old.json").write_text(json.dumps(old))
    new, page = run(
        tmp_path,
        *flags,
        "--windows",
        "16",
        "32",
        "--against",
        str(tmp_path / "old.json"),
    )
    table, notes = attention.compare(old, new["params"], new["rows"])
    assert [row["window"] for row in table] == [16]
    assert table[0]["old / new"] == 1e6 / new["rows"][0]["milliseconds"]
    assert notes == [
        "head_dim was 7, now 8",
        "only in the earlier run: 1x1x1, 64, 8, dense, float32, forward",
        "only in this run: 1x1x1, 64, 32, dense, float32, forward",
    ]
    assert "Against the earlier run" in page
    assert "head_dim was 7, now 8" in page


def test_ratios_are_medians_of_the_ratios_inside_a_turn():
    dense = Case("1x1x1", 64, 16, "dense", "float32", "forward")
    mine, longer = dense._replace(implementation="blocked"), dense._replace(seq_len=256)
    seconds = {
        dense: [2.0, 20.0, 3.0],
        mine: [1.0, 10.0, 1.0],
        longer: [8.0, 100.0, 12.0],
    }
    assert [row["dense / this"] for row in attention.speedups(seconds)] == [2.0]
    assert [row["4 x seq_len / seq_len"] for row in attention.growth(seconds)] == [4.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--meshes", "2x2"), "write 1x1x1"),
        (("--meshes", "16x1x1"), "needs 16 devices and there are 8"),
        (("--meshes", "1x1x4"), "--heads 2 into 4"),
        (("--implementations", "densse"), "did you mean 'dense'"),
        (("--seq-lens", "0"), "at least 1"),
    ],
)
def test_wrong_input_is_named_with_its_remedy(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, *flags)


def test_a_topology_is_handed_over_row_by_row(tmp_path, monkeypatch):
    def topology_rows(
        topology, mesh_shapes, seq_lens, windows, implementations, dtype, passes, slices
    ):
        yield {
            "topology": topology,
            "meshes": mesh_shapes,
            "windows": windows,
            "dtype": dtype,
            "slices": slices,
        }

    stand_in = ModuleType("benchmarks.attention_topology")
    stand_in.topology_rows = topology_rows
    monkeypatch.setitem(sys.modules, "benchmarks.attention_topology", stand_in)
    flags = (
        "--meshes",
        "64x1x1",
        "--windows",
        "16",
        "full",
        "--dtypes",
        "bfloat16",
        "--slices",
        "2",
    )
    result, _ = run(tmp_path, "--topology", "v5p:4x4x4", *flags)
    row = {
        "topology": "v5p:4x4x4",
        "meshes": [[64, 1, 1]],
        "windows": [16, None],
        "dtype": "bfloat16",
        "slices": 2,
    }
    assert result["rows"] == [row]


def test_the_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    result, _ = run(tmp_path, "--windows", "16", "full", "--implementations", "dense")
    plot_throughput(result["rows"], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    # A result is drawn again from its JSON, to the same picture.
    plot.main([str(tmp_path / "new.json")])
    picture = (tmp_path / "picture.png").read_bytes()
    assert (tmp_path / "new.png").read_bytes() == picture


def test_without_matplotlib_the_run_stops_before_it_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"figures need matplotlib.*\[report\]"):
        attention.main([*TINY, "--out", str(tmp_path / "new")])
    assert not list(tmp_path.iterdir())


def test_peers_name_the_extra_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install '\.\[peers\]'"):
        peers.main(["--out", str(tmp_path / "peers")])


@pytest.mark.parametrize("batch", [1, 2])
def test_the_peer_of_jax_runs_under_an_explicit_mesh(batch):
    """Its reshapes forget how a batch of one is split (ShardingTypeError)."""
    spec = causal_spec(8, 8, 3, batch=batch, head_dim=4)
    mesh = local_mesh("1x1x1", Sizes(batch, spec.heads, spec.head_dim))
    q, k, v, gradient = spec.random_inputs(mesh)
    program = peers.compile_jax_nn(spec, "forward_backward", mesh)
    got = program(q, k, v, gradient)
    plain = [jnp.asarray(np.asarray(x)) for x in (q, k, v, gradient)]
    out, pull_back = jax.vjp(windowed_attention, *plain[:3])
    for theirs, expected in zip(got, (out, *pull_back(plain[3])), strict=True):
        # Float32 rounding, as above.
        np.testing.assert_allclose(theirs, expected, atol=2e-6)


# PyTorch's own compiler imports a module of its own that uses what PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_peers_compute_what_we_compute(tmp_path):
    pytest.importorskip("torch")
    sizes = (
        "--seq-lens",
        "64",
        "--windows",
        "16",
        "full",
        "--batch",
        "1",
        "--heads",
        "2",
        "--head-dim",
        "16",
    )
    threads = str(len(os.sched_getaffinity(0)))
    peers.main(
        [
            *sizes,
            "--repeats",
            "1",
            "--threads",
            threads,
            "--out",
            str(tmp_path / "peers"),
        ]
    )
    result = json.loads((tmp_path / "peers.json").read_text())
    assert result["versions"]["torch"]
    for row in result["rows"]:
        assert row["note"] or row["milliseconds"] > 0
    names = {row["implementation"] for row in result["rows"] if row["milliseconds"]}
    assert {
        "tokenrec blocked",
        "jax.nn",
        "torch SDPA causal",
        "torch SDPA, band mask",
        "torch SDPA, hand-chunked",
    } <= names


def test_turns_warm_up_and_run_every_variant_as_often():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    seconds = timing.take_turns(
        {name: lambda name=name: count(name) for name in calls}, 4
    )
    assert calls == {"a": 4 + timing.WARM, "b": 4 + timing.WARM}
    assert {name: len(took) for name, took in seconds.items()} == {"a": 4, "b": 4}


def test_the_step_benchmark_still_makes_its_cases_and_table_runs():
    for config in (step_cases.table_case(50)[0], *step_cases.stream_cases().values()):
        validate(config)
    with jax.set_mesh(local_mesh("1x1x1", Sizes(1, 1, 1))):
        runs = {
            f"dense={dense}": step.lookup_runs(100, 8, dense=dense)
            for dense in (False, True)
        }
        assert {len(took) for took in timing.take_turns(runs, 1).values()} == {1}


def test_a_damaged_result_is_named_and_not_measured_over(tmp_path):
    file = tmp_path / "result.json"
    assert kept_rows(file) == []
    file.write_text('{"rows": [{"mesh": ')
    with pytest.raises(InputError, match=r"result\.json' is damaged .*delete it"):
        kept_rows(file)
