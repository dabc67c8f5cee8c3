"""The command line: its verbs, its exit codes, and its messages to a user who errs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from tokenrec.cli.main import main
from tokenrec.config import Config
from tokenrec.errors import InputError, NonFiniteError

TASK = {
    "auc": 0.75,
    "gauc": None,
    "log_loss": 0.5,
    "normalized_entropy": 0.9,
    "positives": 3,
    "examples": 9,
}
RESULT = {
    "split": "valid",
    "step": 20,
    "checkpoint": "best",
    "macro_auc": 0.75,
    "tasks": {"click": TASK},
}
RUN = ["--workdir", "run", "--split", "valid"]
TRAIN = ["train", "--config=synthetic", "--workdir=run"]

Replace = Callable[..., None]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Replace a module that a verb imports by one with the given functions."""

    def put(name: str, **functions: Any) -> None:
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
        package, _, leaf = name.rpartition(".")
        parent = importlib.import_module(package)
        monkeypatch.setattr(parent, leaf, module, raising=False)

    return put


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


def test_train_gets_the_config_with_overrides_and_data(
    replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[Config, Path, bool]] = []

    def train(
        config: Config, workdir: Path, *, progress: bool, make_state_logger: object
    ) -> dict[str, Any]:
        assert make_state_logger is not None
        seen.append((config, workdir, progress))
        return {"step": 20, "best_step": 10, "evaluation": {"tasks": {"click": TASK}}}

    replace("tokenrec.train_loop", train=train)
    assert (
        main(
            [
                *TRAIN,
                "--data=set",
                "--config.model.width",
                "128",
                "--config.seed=5",
                "--quiet",
            ]
        )
        == 0
    )
    assert (
        main(["train", "--config.seed=6", "--config", "synthetic", "--workdir", "run"])
        == 0
    )
    (config, workdir, progress), (other, _, default_progress) = seen
    assert (config.model.width, config.seed, config.data.path) == (128, 5, "set")
    assert (workdir, progress, default_progress) == (Path("run"), False, True)
    assert (other.seed, other.data.name) == (6, "synthetic")
    printed = capsys.readouterr().out
    assert "run: trained to step 20\nbest checkpoint: step 10\n" in printed
    assert all(part in printed for part in ("last evaluation: step 20", "0.7500"))


def test_train_prints_the_metrics_of_the_best_step(
    replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = {
        "step": 1_000,
        "best_step": 750,
        "evaluation": {"tasks": {"click": TASK | {"auc": 0.6125}}},
        "best_evaluation": {"tasks": {"click": TASK}},
    }
    replace("tokenrec.train_loop", train=lambda *_, **__: summary)
    assert main(TRAIN) == 0
    printed = capsys.readouterr().out
    assert "best checkpoint: step 750; its metrics on valid:" in printed
    assert "0.7500" in printed
    assert "0.6125" not in printed


def test_train_prints_no_table_if_nothing_was_evaluated(
    replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = {"step": 20, "best_step": -1, "evaluation": None}
    replace("tokenrec.train_loop", train=lambda *_, **__: summary)
    assert main(TRAIN) == 0
    assert capsys.readouterr().out == "run: trained to step 20\n"


def test_evaluate_passes_its_flags_and_writes_whole_json(
    replace: Replace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def evaluate_run(
        workdir: Path,
        split: str,
        checkpoint: str,
        data: Path | None,
        *,
        baselines: bool = False,
        limit: int = 0,
        freeze_at: str | None = None,
        request_ndcg: int | None = None,
    ) -> dict[str, Any]:
        options = (baselines, limit, freeze_at, request_ndcg)
        seen.append((workdir, split, checkpoint, data, *options))
        return RESULT | (
            {"baselines": {"popularity": {"tasks": {"click": TASK | {"auc": 0.5125}}}}}
            if baselines
            else {}
        )

    replace("tokenrec.evaluation.evaluate", evaluate_run=evaluate_run)
    file = tmp_path / "deep" / "eval.json"
    assert main(["evaluate", *RUN]) == 0
    flags = [
        "--checkpoint",
        "20",
        "--data",
        "set",
        "--json",
        str(file),
        "--baselines",
        "--samples=3000",
        "--freeze-at=2022-05-03",
        "--request-ndcg=5",
    ]
    assert main(["evaluate", *RUN, *flags]) == 0
    run = (Path("run"), "valid")
    assert seen == [
        (*run, "best", None, False, 0, None, None),
        (*run, "20", Path("set"), True, 3000, "2022-05-03", 5),
    ]
    written = json.loads(file.read_text())
    assert written["tasks"]["click"] == TASK
    assert set(written) == {
        "split",
        "step",
        "checkpoint",
        "macro_auc",
        "tasks",
        "baselines",
    }
    assert list(file.parent.iterdir()) == [file]
    table = capsys.readouterr().out
    assert all(part in table for part in ("click", "popularity", "0.7500", "0.5125"))


def test_failed_json_leaves_the_old_file_and_no_other(
    replace: Replace, tmp_path: Path
) -> None:
    replace(
        "tokenrec.evaluation.evaluate",
        evaluate_run=lambda *_, **__: RESULT | {"macro_auc": float("nan")},
    )
    file = tmp_path / "eval.json"
    file.write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        main(["evaluate", *RUN, "--json", str(file)])
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_predict_passes_its_flags(
    replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    replace(
        "tokenrec.evaluation.predict",
        predict_run=lambda *arguments, freeze_at: (
            seen.append((*arguments, freeze_at)) or 1234
        ),
    )
    line = ["predict", *RUN, "--checkpoint=latest", "--out", "scores.parquet"]
    assert main(line) == 0
    assert main([*line, "--freeze-at", "split"]) == 0
    arguments = (Path("run"), "valid", "latest", None, Path("scores.parquet"))
    assert seen == [(*arguments, None), (*arguments, "split")]
    assert "1,234 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            InputError("data.path='x' is wrong; use y"),
            2,
            "data.path='x' is wrong; use y",
        ),
        (
            PermissionError(13, "Permission denied", "run"),
            2,
            "Permission denied: 'run'",
        ),
        (
            OSError(28, "No space left on device"),
            2,
            "No space left on device; free disk",
        ),
        (MemoryError("table of 10 TiB"), 3, "table of 10 TiB"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"),
            3,
            "RESOURCE_EXHAUSTED",
        ),
        (OSError(27, "File too large", "run/x"), 2, "File too large: 'run/x'"),
        (OSError(36, "File name too long", "run/x"), 2, "long: 'run/x'; use a shorter"),
        (OSError(40, "Too many levels of symbolic links", "r"), 2, "links: 'r'"),
        (OSError(24, "Too many open files", "run/x"), 2, "`ulimit -n 65536`"),
        (
            InputError("the shard 'a' is damaged: open() failed: Too many open files"),
            2,
            "open files is reached: the shard 'a' is damaged",
        ),
        (
            ValueError(
                "RESOURCE_EXHAUSTED: Error writing 'x': No space left on device"
            ),
            2,
            "writing 'x': No space left",
        ),
        (OSError(12, "Cannot allocate memory"), 3, "out of memory"),
        (RuntimeError("can't start new thread"), 2, "`ulimit -u`"),
        (OSError(5, "Input/output error", "run/x"), 74, "rerun the same command"),
        (NonFiniteError("step 7: loss is nan"), 4, "step 7: loss is nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_failure_has_its_exit_code_and_one_message(
    replace: Replace,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    replace("tokenrec.train_loop", train=raising(error))
    assert main(TRAIN) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tokenrec: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), KeyError("bug"), FileNotFoundError(2, "No such file", "x")],
)
def test_an_unexpected_failure_keeps_its_traceback(
    replace: Replace, error: Exception
) -> None:
    replace("tokenrec.train_loop", train=raising(error))
    with pytest.raises(type(error)):
        main(TRAIN)


WRONG_LINES = {
    "trian": "did you mean 'train'",
    "": "verb",
    "train --config=synthetic --wrkdir=x": "unknown flag --wrkdir; did you mean '--workdir'",
    "train --confg=synthetic --workdir=x": "did you mean '--config'",
    "train --confg.seed=1 --config=synthetic --workdir=x": "did you mean '--config'",
    "train --conf=synthetic --workdir=x": "unknown flag --conf;",
    "train --config=synthetic": "--workdir",
    "train --config=synthetik --workdir=x": "did you mean 'synthetic'",
    "train --config=synthetic --workdir=x --config.model.widht=8": "did you mean 'model.width'",
    "train --config=synthetic --workdir=x --config.model.dropout=2": "model.dropout=2.0",
    "evaluate --workdir=x --split=vaild": "did you mean 'valid'",
    "evaluate --workdir=x --split=valid --checkpoint=bets": "'bets' is neither best, latest nor a step",
    "evaluate --workdir=x --split=valid --samples=-3": "'-3' is not a whole number",
    "evaluate --workdir=x --split=valid --config.seed=1": "takes no --config.seed=1",
    "predict --workdir=x --split=valid": "--out",
    "predict --workdir=x --split=valid --out=f surplus": "surplus",
    "prepare kuairnd --out=x": "did you mean 'kuairand'",
    "prepare synthetic --out=x --row=5": "did you mean '--rows'",
    "prepare synthetic --out=x --rows=5.5": "'5.5' is not a whole number",
    "prepare synthetic --out=x --rows=5 --static-weight=2": "set their number with --static-rank",
    "config synthetik": "did you mean 'synthetic'",
    "config --config.optim.lr=1": "did you mean 'optim.learning_rate'",
    "config --dif": "did you mean '--diff'",
    "prepare kuairand --root=r --out=x --valid-from=2022-05-33 --test-from=2022-05-05": "'2022-05-33' is not a day",
    "prepare kuairand --root=r --out=x --download=pur": "did you mean 'pure'",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_wrong_command_line_is_one_message_and_exit_code_2(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenrec: ")
    assert WRONG_LINES[line] in error
    assert "Traceback" not in error


def test_a_missing_data_set_names_the_folder_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["describe", "--config=synthetic", "--data", str(tmp_path / "none")]) == 2
    )
    error = capsys.readouterr().err
    assert str(tmp_path / "none") in error
    assert "tokenrec prepare" in error


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "prepare",
        "prepare kuairand",
        "train",
        "evaluate",
        "predict",
        "describe",
        "compile",
        "report",
        "config",
        "replay",
        "semantic-ids",
        "study",
        "launch",
    ],
)
def test_every_verb_explains_itself(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: tokenrec {verb}".strip() in capsys.readouterr().out


def test_kuairand_prepares_the_folder_that_download_returns(
    replace: Replace, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def prepare(*arguments: Any, **options: Any) -> str:
        seen.append((arguments, options))
        return "prepared"

    replace(
        "tokenrec.data.sources.kuairand",
        fetch=lambda variant, root: root / variant,
        KuaiRandSource=lambda *arguments, clock, play_share: (*arguments, clock),
    )
    replace("tokenrec.data.preparation.prepare", prepare=prepare)
    replace("tokenrec.data.preparation.summary", summarise=str)
    days = ["--valid-from", "2022-05-03", "--test-from", "2022-05-05"]
    line = ["prepare", "kuairand", "--root", str(tmp_path), "--out", "set", *days]
    line += ["--statistics", "none"]
    assert main(line) == 0
    assert main([*line, "--download", "pure", "--overlap", "64", "--overwrite"]) == 0
    source = ("2022-05-03", "2022-05-05", "time_ms")
    assert seen == [
        (((tmp_path, *source), Path("set")), {"overwrite": False, "like": None}),
        (
            ((tmp_path / "pure", *source), Path("set")),
            {"overwrite": True, "overlap": 64, "like": None},
        ),
    ]


def test_beam_is_asked_for_by_flag_and_needs_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    command = ["prepare", "synthetic", "--rows", "9", "--out", str(tmp_path / "set")]
    assert main([*command, "--beam"]) == 2
    assert "--beam needs Apache Beam, which is not installed" in capsys.readouterr().err
    assert main([*command, "--beam-work", "shared"]) == 2
    assert (
        "--beam-work=shared is for Apache Beam; add --beam" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def study(replace: Replace) -> list[Path]:
    """A study whose runs are done at once, and a page writer; folders of the pages."""
    pages: list[Path] = []
    replace("tokenrec.study.plan", load_study=lambda path: path)
    replace("tokenrec.study.runner", run_study=lambda *_, **__: None)
    replace("tokenrec.study.jobs", BudgetSpent=BudgetSpent)
    replace(
        "tokenrec.analysis.report",
        write_report=lambda folders, out: pages.append(out) or out / "report.html",
    )
    return pages


class BudgetSpent(InputError):
    """The error of a study without CPU-hours left."""


STUDY = ["study", "--config=synthetic", "--out=out"]


def test_study_writes_its_page(
    study: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(STUDY) == 0
    assert capsys.readouterr().out == "out/report.html\n"
    assert study == [Path("out")]


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)


PAGE_LATER = (
    "out: tables written; the page needs matplotlib: run "
    '`pip install ".[report]"` and `tokenrec report --study out --out out`\n'
)


@pytest.mark.usefixtures("no_matplotlib")
def test_study_without_matplotlib_runs_and_says_how_to_get_the_page(
    study: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(STUDY) == 0
    assert capsys.readouterr().out == PAGE_LATER
    assert study == []


@pytest.mark.usefixtures("no_matplotlib", "study")
def test_spent_budget_without_matplotlib_keeps_its_message_and_exit_code(
    replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    replace("tokenrec.study.runner", run_study=raising(BudgetSpent("no hours left")))
    assert main(STUDY) == 2
    assert capsys.readouterr() == ("", "tokenrec: no hours left\n")


def test_config_lists_the_fields_of_a_config_with_overrides(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config"]) == 0
    defaults = capsys.readouterr().out
    assert "model.width = 64\n    int, at least 1\n    d, width of a token" in defaults
    assert main(["config", "synthetic", "--config.model.layers=3"]) == 0
    printed = capsys.readouterr().out
    for name, value, default in (("width", 32, 64), ("layers", 3, 4)):
        (line,) = [x for x in printed.splitlines() if x.startswith(f"model.{name} =")]
        assert line.split() == f"model.{name} = {value} (default {default})".split()


def test_config_diff_and_json_can_be_combined(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["config", "--diff", "--json", "--config.optim.steps=700"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["name"], record["value"]) == ("optim.steps", 700)
    assert (record["type"], record["default"]) == ("int", 1000)
    assert main(["config", "--json"]) == 0
    assert "value" not in json.loads(capsys.readouterr().out)[0]
    assert main(["config", "--diff"]) == 0
    assert capsys.readouterr().out == "every field has its default\n"


def test_config_of_a_run_is_read_from_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"seed": 9}')
    assert main(["config", str(tmp_path / "config.json"), "--diff"]) == 0
    assert capsys.readouterr().out.split() == ["seed", "=", "9", "(default", "0)"]


def test_all_problems_of_a_command_line_are_reported_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = ["--config.model.widht=8", "--config.seed=x", "--config.model.dropout=2"]
    assert main([*TRAIN, *wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenrec: the config has 3 problems:\n")
    assert all(name in error for name in ("model.width", "seed='x'", "model.dropout"))


@pytest.mark.usefixtures("lone_device")
def test_verbs_work_together_from_log_to_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, workdir, metrics, scores = (
        str(tmp_path / name) for name in ("set", "run", "eval.json", "scores.parquet")
    )
    small = [
        "--config.model.width=4",
        "--config.model.layers=1",
        "--config.model.windows=()",
        "--config.data.events=4",
        "--config.data.overlap=0",
    ]
    small += [
        "--config.tokens.maker=linear",
        "--config.data.batch_size=8",
        "--config.data.eval_batch_size=8",
    ]
    small += [
        "--config.data.exclude=interests,age,load,genre,price,vector,code,place,seconds"
    ]  # compiles in less time
    short = [
        "--config.optim.steps=2",
        "--config.optim.warmup_steps=1",
        "--config.train.eval_every=0",
    ]
    run = ["--workdir", workdir, "--split", "valid"]
    assert main(["prepare", "synthetic", "--rows", "600", "--out", data]) == 0
    assert (
        main(
            [
                "train",
                "--config=synthetic",
                "--data",
                data,
                "--workdir",
                workdir,
                "--quiet",
                *small,
                *short,
            ]
        )
        == 0
    )
    assert main(["evaluate", *run, "--json", metrics]) == 0
    assert main(["predict", *run, "--checkpoint=2", "--out", scores]) == 0
    report = json.loads(Path(metrics).read_text())
    table = pq.read_table(scores).to_pydict()
    assert f"{scores}: {len(table['user_id'])} rows" in capsys.readouterr().out
    for task, result in report["tasks"].items():
        labels, values = table[f"label_{task}"], table[f"score_{task}"]
        known = [
            (label, value)
            for label, value in zip(labels, values, strict=True)
            if label is not None
        ]
        assert result["auc"] == pytest.approx(
            roc_auc_score(*zip(*known, strict=True)), abs=1e-6
        )
        assert (result["positives"], result["examples"]) == (
            sum(label for label, _ in known),
            len(known),
        )
        assert set(TASK) <= set(result)
    assert set(RESULT) <= set(report)
    assert (report["split"], report["step"], report["checkpoint"]) == (
        "valid",
        2,
        "best",
    )
    description = str(tmp_path / "description.json")
    assert (
        main(["describe", "--config=synthetic", "--data", data, "--json", description])
        == 0
    )
    assert json.loads(Path(description).read_text())


def test_module_runs_as_a_program_and_returns_the_exit_code(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tokenrec",
        "train",
        "--config=synthetic",
        "--workdir=w",
        "--config.seed=x",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2
    assert done.stderr == "tokenrec: seed='x' is not a whole number\n"
