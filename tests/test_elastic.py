"""Runs that come back with other devices: the mesh, the parts of a step, the record of it.

`tests/runtime/test_elastic_processes.py` does the same with real processes.
"""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from tests.counted import count_rows
from tests.runtime.test_distributed import EXCLUDED
from tests.worlds import FEW_FEATURES, TASKS, one_device, place, random_batch, tiny
from tokenrec import active_run, run_setup
from tokenrec.checkpoint.device_history import DeviceUse, read_history, record_use
from tokenrec.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.debug import replay
from tokenrec.elastic import fit_axes, split_step
from tokenrec.errors import InputError
from tokenrec.optim import dense_rate, schedule, table_rate
from tokenrec.sharding import make_mesh
from tokenrec.state import build_model, init_state
from tokenrec.step import train_step
from tokenrec.train_loop import train


def elastic(kind: str, *, batch: int = 64, accumulate: int = 1, **mesh: int) -> Config:
    return Config(
        data=DataConfig(batch_size=batch),
        optim=OptimConfig(accumulate=accumulate),
        mesh=MeshConfig(**mesh),
        train=TrainConfig(elastic=kind),
    )


@pytest.mark.parametrize(
    ("mesh", "devices", "fitted"),
    [
        ({"fsdp": 8}, 8, (1, 8, 1)),
        ({"fsdp": 8}, 4, (1, 4, 1)),
        ({"fsdp": 8}, 12, (3, 4, 1)),
        ({"fsdp": 4, "tensor": 2}, 4, (2 // 2, 2, 2)),
        ({"data": 8}, 4, (4, 1, 1)),
        ({"data": 2, "fsdp": 2}, 16, (8, 2, 1)),
    ],
)
def test_fsdp_falls_to_a_divisor_that_fits_and_data_takes_the_rest(
    mesh: dict[str, int], devices: int, fitted: tuple[int, ...]
) -> None:
    axes = fit_axes(elastic("accumulate", **mesh), devices)
    assert (axes.data, axes.fsdp, axes.tensor) == fitted
    off = elastic("off", **mesh)
    assert fit_axes(off, devices) is off.mesh


def test_a_tensor_axis_that_does_not_fit_is_an_error_with_its_remedy() -> None:
    with pytest.raises(
        InputError, match=r"mesh\.tensor=4 does not divide the 6 devices.*multiple of 4"
    ):
        fit_axes(elastic("scale", tensor=4), 6)


@pytest.mark.parametrize(
    ("kind", "batch", "accumulate", "full", "devices", "split"),
    [
        ("off", 64, 2, 16, 4, (2, 1)),
        ("accumulate", 64, 1, 16, 16, (1, 1)),
        ("accumulate", 64, 1, 16, 4, (4, 1)),
        ("accumulate", 64, 2, 16, 8, (4, 1)),
        # More devices than at the beginning need fewer micro-batches.
        ("accumulate", 64, 4, 4, 8, (2, 1)),
        ("accumulate", 64, 2, 4, 16, (1, 1)),
        # No 3/4 of a share: the next one that divides the samples of a device.
        ("accumulate", 96, 1, 16, 12, (2, 1)),
        ("scale", 64, 1, 16, 8, (1, 2)),
        ("scale", 64, 2, 16, 4, (2, 4)),
        ("scale", 96, 2, 16, 12, (2, 2)),
        ("scale", 64, 2, 4, 16, (1, 1)),
    ],
)
def test_a_device_computes_no_more_samples_at_a_time_than_on_the_full_devices(
    kind: str,
    batch: int,
    accumulate: int,
    full: int,
    devices: int,
    split: tuple[int, int],
) -> None:
    config = elastic(kind, batch=batch, accumulate=accumulate)
    found = split_step(config, devices=devices, shards=devices, full=full)
    assert found == split
    at_a_time = batch / (devices * found.accumulate * found.updates)
    assert at_a_time == int(at_a_time)
    assert kind == "off" or at_a_time <= batch / (full * accumulate)


def test_devices_that_cannot_share_the_batch_are_an_error_that_names_those_that_can() -> (
    None
):
    with pytest.raises(
        InputError,
        match=r"data\.batch_size=64 is not a multiple of the 6 .*1, 2, 4, 8\]",
    ):
        split_step(elastic("scale"), devices=6, shards=6, full=8)
    # A step of two updates is repeated on devices that hold one sample each.
    with pytest.raises(InputError, match="not a multiple of the 128 devices"):
        split_step(elastic("off"), devices=64, shards=64, full=64, updates=2)


def test_the_schedules_of_smaller_updates_end_after_the_same_samples() -> None:
    config = OptimConfig(steps=40, warmup_steps=8, table_rates=(1.0, 0.5))
    plain = schedule(config, 1.0)
    for step in (0, 3, 8, 20, 39):
        for part in (0, 3):
            number, clock = step * 4 + part, step + part / 4
            assert float(dense_rate(config, 4)(number)) == pytest.approx(
                config.learning_rate / 2 * float(plain(clock)), rel=1e-6
            )
            factor = 1.0 if step < 10 else 0.5
            assert float(table_rate(config, 10, number, 4)) == pytest.approx(
                config.table_learning_rate * factor * float(plain(clock)), rel=1e-6
            )
    assert float(dense_rate(config, 4)(40 * 4)) == 0


def test_updates_on_shares_are_steps_on_smaller_batches_with_the_rates_of_the_paper() -> (
    None
):
    """The plain reference is the square-root rule as Malladi et al. write it."""
    k, constant = 4, {"warmup_steps": 0, "final_fraction": 1.0, "clip_norm": 0.0}
    one_layer, linear = {"layers": 1, "windows": ()}, {"maker": "linear"}
    config = tiny(
        batch_size=16,
        tokens=linear,
        model=one_layer,
        optim=constant | {"weight_decay": 0.1, "epsilon": 1e-3},
    )
    small = tiny(
        batch_size=4,
        tokens=linear,
        model=one_layer,
        optim=constant
        | {
            "learning_rate": config.optim.learning_rate / 2,
            "weight_decay": 0.05,
            "beta1": config.optim.beta1 ** (1 / k),
            "beta2": config.optim.beta2 ** (1 / k),
            "epsilon": 2e-3,
        },
    )
    mesh, batch = one_device(), random_batch(config, batch=16, schema=FEW_FEATURES)
    batch = batch._replace(labels=np.abs(batch.labels))  # every share knows as many
    step = jax.jit(train_step, static_argnums=0)
    with jax.set_mesh(mesh):
        model = build_model(config, FEW_FEATURES, TASKS, updates=k)
        start = init_state(model, 0)
        # A run that has trained before: counts of Adam are above 0.
        state, metrics = step(model, start, place(batch, mesh))
        plain, losses = start, []
        reference = build_model(small, FEW_FEATURES, TASKS)
        for index in range(k):
            part = jax.tree.map(lambda leaf, i=index: leaf[i::k], batch)
            plain, part_metrics = step(reference, plain, place(part, mesh))
            losses.append(float(part_metrics.loss))
    assert int(state.step) == 1
    assert float(metrics.loss) == pytest.approx(np.mean(losses), rel=1e-5)
    # The sums of AdaGrad are in units of the whole batch.
    for name, rows in state.opt_state["rows"].items():
        np.testing.assert_allclose(
            rows.sum, plain.opt_state["rows"][name].sum / k**2, rtol=2e-4, atol=1e-12
        )
    for moved, expected, before in zip(
        jax.tree.leaves((state.params, state.tables)),
        jax.tree.leaves((plain.params, plain.tables)),
        jax.tree.leaves((start.params, start.tables)),
        strict=True,
    ):
        assert np.any(np.asarray(moved) != np.asarray(before)) or not np.any(
            np.asarray(expected) != np.asarray(before)
        )
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=2e-5)
    # One step, whatever it was made of: what a later change of devices continues from.
    adam = state.opt_state["dense"][0]
    assert int(adam.count) == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "synthetic"
    prepare(SyntheticSource(1_500, users=40, items=30), out)
    return out


def small_run(data: Path, kind: str, stop_at: int) -> Config:
    return Config(
        data=DataConfig(
            path=str(data),
            exclude=tuple(EXCLUDED.split(",")),
            paradigm="nio",
            events=4,
            batch_size=16,
            eval_batch_size=16,
        ),
        tokens=TokensConfig(embedding_dim=4, maker="linear"),
        model=ModelConfig(width=4, heads=1, layers=1, windows=(), dropout=0.2),
        optim=OptimConfig(steps=6, warmup_steps=2, table_learning_rate=1e-3),
        mesh=MeshConfig(fsdp=4),
        train=TrainConfig(
            elastic=kind,
            stop_at=stop_at,
            eval_split="",
            log_every=1,
            save_every=2,
            keep=9,
        ),
    )


def logged(workdir: Path, name: str) -> dict[int, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return {record["step"]: record[name] for record in records if name in record}


def test_a_run_makes_smaller_updates_on_half_of_the_devices_and_goes_back(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows: list[list[int]] = []
    monkeypatch.setattr(active_run, "train_batches", count_rows(rows.append))

    def use_devices(count: int) -> None:
        def mesh_of_some(config: Config) -> jax.sharding.Mesh:
            return make_mesh(fit_axes(config, count), jax.devices()[:count])

        for module in (run_setup, replay):
            monkeypatch.setattr(module, "make_run_mesh", mesh_of_some)

    def go_on(kind: str, devices: int, stop_at: int) -> None:
        use_devices(devices)
        train(small_run(data, kind, stop_at), tmp_path / kind, progress=False)

    go_on("off", 4, 6)
    whole, rows[:] = rows[:], []
    for devices, stop_at in ((4, 2), (2, 4), (4, 6)):
        go_on("scale", devices, stop_at)
    # 1. Every step reads the rows that it reads in the undisturbed run.
    assert rows == whole

    # 2. The record: the log of metrics, a line for the user, the checkpoints.
    workdir = tmp_path / "scale"
    for name, values in (
        ("devices", {2: 2, 4: 4}),
        ("fsdp", {2: 2, 4: 4}),
        ("updates", {2: 2, 4: 1}),
    ):
        assert logged(workdir, f"mesh/{name}") == values
    said = capsys.readouterr().err
    assert "step 2: 2 devices in 1 process (fsdp 2), and before 4 devices" in said
    noted = {
        step: ocp.checkpointables_metadata(
            workdir / "checkpoints" / str(step)
        ).custom_metadata["devices"]
        for step in (4, 6)
    }
    assert [noted[4][name] for name in ("devices", "updates")] == [2, 2]
    assert [noted[6][name] for name in ("devices", "updates")] == [4, 1]
    history = read_history(workdir)
    assert history is not None
    uses = [history.at(step) for step in range(6)]
    assert [use.devices for use in uses if use] == [4, 4, 2, 2, 4, 4]

    # 3. Losses before the change are those of the undisturbed run. Two updates with
    # rates for half of the batch stay near, and are not the same.
    undisturbed = logged(tmp_path / "off", "train/loss")
    scaled = logged(workdir, "train/loss")
    assert [scaled[step] for step in (1, 2)] == [undisturbed[step] for step in (1, 2)]
    assert scaled[3] != undisturbed[3]
    assert scaled == pytest.approx(undisturbed, rel=0.02)
    rates = logged(workdir, "train/learning_rate")
    plain = logged(tmp_path / "off", "train/learning_rate")
    assert (rates[2], rates[5]) == (plain[2], plain[5])
    half_later = float(schedule(OptimConfig(steps=6, warmup_steps=2), 1e-3)(3.5))
    assert rates[4] == pytest.approx(half_later / math.sqrt(2), rel=1e-6)

    # 4. A step is repeated with the updates that it had.
    use_devices(2)
    report = replay.replay_run(workdir, 3, log=print)
    assert report["loss"] == scaled[4]
    assert report["steps_before"] == 1


def use(devices: int, step: int) -> DeviceUse:
    return DeviceUse(devices, 1, {"data": devices}, "accumulate", 1, 1, step)


def test_the_history_forgets_the_steps_that_are_made_again(tmp_path: Path) -> None:
    assert record_use(tmp_path, use(8, 0)) is None
    assert record_use(tmp_path, use(8, 4)) is None
    assert record_use(tmp_path, use(4, 4)) == use(8, 0)
    # No checkpoint was made with 4 devices: the 8 continue from step 4.
    assert record_use(tmp_path, use(8, 4)) == use(4, 4)
    history = read_history(tmp_path)
    assert history is not None
    assert history.uses == (use(8, 0),)
    # The first start counts even if none of its steps is left.
    assert record_use(tmp_path, use(2, 0)) == use(8, 0)
    history = read_history(tmp_path)
    assert history is not None
    assert (history.first_devices, history.uses) == (8, (use(2, 0),))
    assert history.at(3) == use(2, 0)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"first_devices": 0, "uses": []}'])
def test_a_damaged_history_is_named_with_its_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / "devices.json").write_text(text)
    with pytest.raises(
        InputError, match=r"devices\.json' is damaged; delete it, and set"
    ):
        read_history(tmp_path)
