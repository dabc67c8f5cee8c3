"""Replaying a step gives the logged loss, and traces a bad number to its origin."""

import dataclasses
import json

import numpy as np
import pytest

from tests.checkpoint.test_warm_start import EXCLUDED, STEP, plain, saved
from tests.worlds import mesh_of
from tokenrec.cli.main import main
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import FIRST_KNOWN
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.debug.replay import replay_run
from tokenrec.errors import NonFiniteError
from tokenrec.train_loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "set"
    prepare(SyntheticSource(2_000, users=40, items=30), out)
    return out


def files(folder):
    """Every file with the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_healthy_step_has_the_logged_loss_bit_for_bit(data, tmp_path):
    config = plain(
        data,
        optim__steps=5,
        train__save_every=2,
        train__log_every=1,
        train__eval_split="",
    )
    # Fewer features compile in less time.
    config.data.exclude = (*EXCLUDED, "interests", "place", "reaction", "hour")
    config.tokens.replicate_rows = 20
    config.optim.accumulate = 2
    config.data.batch_size = 16
    config.mesh.fsdp = 2
    config.model.dropout = 0.1
    train(config, tmp_path, progress=False)
    logged = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    before, lines = files(tmp_path), []
    report = replay_run(tmp_path, 3, log=lines.append)
    assert files(tmp_path) == before
    # The checkpoints 4 and 5 are left, so the replay starts from step 0.
    assert "3 steps to make" in lines[0]
    # Step 3 makes the fourth update, and the log counts updates.
    record = next(line for line in logged if line["step"] == 4 and "train/loss" in line)
    assert (report["loss"], report["gradient_norm"]) == (
        record["train/loss"],
        record["train/grad_norm"],
    )
    assert report["finite"]
    assert report["first_not_finite"] is None
    assert report["skipped_before"] == []

    # The gradient of the step has that of the tables as a part.
    parts = [entry["gradient_norm"] for entry in report["tables"]]
    tables = {entry["table"] for entry in report["tables"]}
    assert tables >= {"item", "genre", "segment", "code"}
    assert report["gradient_norm"] > np.linalg.norm(parts) > 0
    dataset = open_dataset(data, config.data.exclude)
    ends = np.cumsum(dataset.chunk_lengths("train"))
    for sample in report["samples"]:
        chunk = int(np.searchsorted(ends, sample["rows"][0], side="right"))
        assert sample["user_id"] == dataset.load("train", chunk, chunk + 1).user_id[0]
    losses = [sample["loss"] for sample in report["samples"]]
    assert losses == sorted(losses, reverse=True)
    # These are the largest ten of sixteen losses.
    assert report["loss"] * 10 / 16 < sum(losses) < report["loss"]


def test_an_infinite_row_is_traced_to_its_step_samples_and_feature(
    data, tmp_path, capsys
):
    item = "i000003"
    row = FIRST_KNOWN + load_vocabulary(data, "item").tolist().index(item)

    def spoil(model, state):
        stack = model.embedder.stacks["width_4"]
        table = state.tables[stack.name].at[stack.offsets["item"] + row, 1].set(np.inf)
        return dataclasses.replace(state, tables=state.tables | {stack.name: table})

    run, written = tmp_path / "run", tmp_path / "replay.json"
    config = plain(
        data,
        data__events=4,
        data__overlap=1,
        train__eval_split="",
        data__exclude=("age", "vector"),
    )
    saved(run, config, mesh_of(1, 1, 1), spoil)
    with pytest.raises(NonFiniteError) as error:
        train(config, run, progress=False)
    step = int(str(error.value).split()[1].rstrip(":"))

    before = files(run)
    assert (
        main(["replay", f"--workdir={run}", f"--step={step}", f"--json={written}"]) == 0
    )
    assert files(run) == before
    report = json.loads(written.read_text())
    assert (report["step"], report["finite"], report["applied"], report["loss"]) == (
        step,
        False,
        False,
        "nan",
    )
    first = report["first_not_finite"]
    assert first["where"] == ["feature 'item' of state"]
    worst = report["samples"][: len(first["samples"])]
    assert sorted(sample["sample"] for sample in worst) == first["samples"]
    dataset = open_dataset(data)
    log = dataset.load("train")
    spoilt = dataset.catalogue.item_id.tolist().index(item)
    for sample in report["samples"]:
        rows = np.array(sample["rows"])
        # Items of the stream's events, with those before its first scored row.
        seen = log.item[max(rows[0] - 4, 0) : rows[-1] + 1]
        if sample in worst:
            assert sample["loss"] == "nan"
            assert spoilt in seen
        else:
            assert np.isfinite(sample["loss"])
            assert spoilt not in log.item[rows]
        far = [value["deviations"] for value in sample["extremes"]]
        assert {value["feature"] for value in sample["extremes"]} <= {
            "load",
            "price",
            "seconds",
        }
        assert far == sorted(far, reverse=True)
        assert far[0] > 0
    printed = capsys.readouterr()
    assert f"step {step}: loss nan" in printed.out
    assert "first number that is not finite: feature 'item' of state" in printed.out
    assert f"step {step} from the checkpoint of step {STEP}" in printed.err


def test_a_step_or_checkpoint_that_does_not_exist_is_refused(data, tmp_path, capsys):
    saved(tmp_path, plain(data), mesh_of(1, 1, 1))
    run = ["replay", f"--workdir={tmp_path}"]
    for line, message in (
        ([*run, "--step=8"], "the steps of this run are 0 to 7"),
        ([*run, "--step=4", "--checkpoint=5"], "the run has none before step 4 but []"),
        (
            [*run, "--step=1", "--checkpoint=newest"],
            "'newest' is neither latest-before, start nor a step",
        ),
        (["replay", f"--workdir={tmp_path / 'none'}", "--step=1"], "holds no run"),
    ):
        assert main(line) == 2
        assert message in capsys.readouterr().err
