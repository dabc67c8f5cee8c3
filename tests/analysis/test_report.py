"""`tokenrec report`: its numbers, checked by hand, its claims, and its refusals."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.analysis.study_folder import (
    CLICK_AUC,
    CURVE,
    DIFFERENCE,
    NAME,
    RESULT,
    difference_rows,
    result_rows,
    write_about,
    write_rows,
    write_study,
)
from tokenrec.analysis.model_styles import COLOURS, assign_styles, legend_key
from tokenrec.analysis.rate_search import chosen_rates, search_of
from tokenrec.analysis.result_tables import differences_table
from tokenrec.analysis.study_files import read_study
from tokenrec.analysis.study_metrics import MetricKey
from tokenrec.analysis.study_rows import Difference
from tokenrec.analysis.summary import (
    StudySummary,
    best_model,
    summarize_study,
    verdict,
)
from tokenrec.analysis.wording import DASH
from tokenrec.cli.main import main
from tokenrec.errors import InputError

pytest.importorskip("matplotlib")

from tokenrec.analysis.report import write_report

CLICK, LOSS = MetricKey("test", "click", "auc"), MetricKey("test", "click", "log_loss")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("studies") / "one")


@pytest.fixture(scope="module")
def page(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert main(["report", "--study", str(study), "--out", str(out)]) == 0
    return out / "report.html"


def words(markup: str) -> str:
    """Text of a piece of the page; minus signs and dashes as they are typed."""
    inline = re.sub(r"</?i\b[^>]*>|<wbr>", "", markup)
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", inline)).split())
    return text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")


def tables(page: Path) -> dict[str, dict[str, list[str]]]:
    """Rows of each table by its title, then by the first cell."""
    found = {}
    for figure in re.findall(
        r'<figure class="tabled">(.*?)</figure>', page.read_text(), re.DOTALL
    ):
        title = words(re.findall(r"<b>(.*?)</b>", figure)[0]).rstrip(".")
        rows = [
            re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)
            for row in re.findall(r"<tr.*?>(.*?)</tr>", figure, re.DOTALL)
        ]
        found[title] = {
            words(row[0]): [words(cell) for cell in row[1:]] for row in rows
        }
    return found


def summary_of(folder: Path) -> StudySummary:
    return summarize_study(read_study(folder))


def with_gaps(
    folder: Path, gaps: dict[str, tuple[float, float, float]]
) -> StudySummary:
    write_study(folder, optional=False)
    write_rows(folder / "differences.parquet", DIFFERENCE, difference_rows(gaps=gaps))
    return summary_of(folder)


def test_means_deviations_and_differences_are_those_of_the_results(page: Path) -> None:
    click = tables(page)["click, test"]
    assert click["ours"] == ["0.7200 ± 0.0200", "0.2800 ± 0.0200"]
    assert click["rival"] == [
        "0.7400 ± 0.0173 +0.0200 [+0.0050, +0.0350]",
        "0.2600 ± 0.0173 -0.0200 [-0.0350, -0.0050]",
    ]
    assert click["plain"][0] == "0.7200 ± 0.0100 ≈ 0.0000 [-0.0100, +0.0100]"
    assert click["item_rate"] == ["0.6500", "0.6600"]


def test_models_are_listed_with_what_they_set_their_rate_size_speed_and_flops(
    page: Path,
) -> None:
    models = tables(page)["Models"]
    assert models["ours"] == [
        "those of the base",
        "0.001",
        "3",
        "4,321",
        "1,001",
        "2.00 M",
    ]
    assert models["rival"] == [
        "model.gate = False",
        "0.01",
        "3",
        "4,321",
        "1,001",
        "8.00 M",
    ]
    assert models["plain"][-1] == "-"
    assert "item_rate" not in models


def test_differences_are_put_in_words(page: Path) -> None:
    rows = tables(page)["AUC against ours, test"]
    assert rows["rival"] == [
        "+0.0200",
        "[+0.0050, +0.0350]",
        "0.010",
        "800",
        "2,000",
        "3",
        "better",
    ]
    assert rows["plain"][-1] == "≈ not distinguishable from 0"
    assert "better: rival; not distinguishable from it: plain." in words(
        page.read_text()
    )


def test_differences_of_older_studies_lack_the_undefined_draws(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", optional=False)
    older = [row[:-1] for row in difference_rows()]
    write_rows(folder / "differences.parquet", DIFFERENCE[:-1], older)
    found = read_study(folder).differences
    assert found is not None
    assert {row.undefined_draws for row in found} == {None}
    table = differences_table(summary_of(folder))
    assert table is not None
    assert f'<td class="number">{DASH}</td><td>better</td>' in table.markup


def test_the_search_is_shown_on_the_seed_that_all_rates_share(page: Path) -> None:
    rows = tables(page)["Learning rates tried"]
    assert rows["ours"] == ["0.7000", "0.6900", "at the edge"]
    assert rows["rival"] == ["0.6800", "0.7300", "at the edge"]


def test_a_rate_between_others_is_not_at_the_edge(tmp_path: Path) -> None:
    write_study(tmp_path / "s", optional=False)
    more = [(NAME, "ours", 0, 0.0001, "valid", "macro", "auc", 0.5, None, None)]
    write_rows(tmp_path / "s" / "results.parquet", RESULT, result_rows() + more)
    search = search_of(read_study(tmp_path / "s").results)
    assert not search.at_edge("ours", 0.001)
    assert search.at_edge("plain", 0.001)


def test_the_chosen_rate_has_most_seeds_and_among_equals_the_best_value_on_valid(
    study: Path,
) -> None:
    results = read_study(study).results
    assert chosen_rates(results) == {"ours": 0.001, "rival": 0.01, "plain": 0.001}
    ours = ("ours", 0.01)
    better = [
        dataclasses.replace(r, value=0.9) if (r.model, r.learning_rate) == ours else r
        for r in results
    ]
    assert chosen_rates(better)["ours"] == 0.001
    one_seed = [row for row in better if row.seed == 0]
    assert chosen_rates(one_seed) == {"ours": 0.01, "rival": 0.01, "plain": 0.001}


def test_a_task_with_few_positives_is_grey_with_the_reason_and_without_differences(
    page: Path,
) -> None:
    text = page.read_text()
    assert text.count("No claim: 57 positives in test, fewer than 500.") == 1
    assert (
        text.count("No claim: the mean contains rare, about which nothing is claimed.")
        == 2
    )
    assert tables(page)["rare, test"]["rival"] == ["0.7400 ± 0.0173"]
    grey = re.findall(
        r'<figure class="tabled">(?:(?!</figure>).)*<table class="unclaimed">.*?</figure>',
        text,
        re.DOTALL,
    )
    assert len(grey) == 4
    assert not any("best" in table or "gap" in table for table in grey)


def test_tasks_of_unknown_positives_are_not_claimed(tmp_path: Path) -> None:
    write_study(tmp_path / "s", optional=False)
    write_about(tmp_path / "s", data={})
    assert set(summary_of(tmp_path / "s").no_claim) == {
        (s, t) for s in ("valid", "test") for t in ("rare", "macro")
    }
    (tmp_path / "s" / "differences.parquet").unlink()
    assert "not recorded" in summary_of(tmp_path / "s").no_claim["test", "click"]


def test_the_best_is_bold_only_where_its_lead_is_distinguishable(
    page: Path, tmp_path: Path
) -> None:
    assert (
        page.read_text().count("number best") == 4
    )  # AUC and log loss of click, on valid and test
    assert (
        best_model(with_gaps(tmp_path / "a", {"rival": (0.02, 0.005, 0.035)}), CLICK)
        == "rival"
    )
    assert (
        best_model(with_gaps(tmp_path / "b", {"rival": (0.02, -0.001, 0.041)}), CLICK)
        is None
    )
    assert best_model(with_gaps(tmp_path / "c", {}), CLICK) is None


def test_a_reference_is_best_only_where_the_next_model_is_worse(tmp_path: Path) -> None:
    def with_reference_ahead(name: str, low: float, high: float) -> StudySummary:
        folder = write_study(tmp_path / name, optional=False)
        write_about(folder, reference="rival")
        rows = [
            (NAME, model, "rival", *CLICK, -0.02, low, high, 0.5, 800, 2000, 0)
            for model in ("ours", "plain")
        ]
        write_rows(folder / "differences.parquet", DIFFERENCE, rows)
        return summary_of(folder)

    assert best_model(with_reference_ahead("worse", -0.03, -0.01), CLICK) == "rival"
    assert best_model(with_reference_ahead("equal", -0.05, 0.01), CLICK) is None


def test_less_is_better_for_losses(study: Path) -> None:
    summary = summary_of(study)
    assert verdict(summary.differences[LOSS]["rival"]) == "better"
    assert best_model(summary, LOSS) == "rival"


def test_an_interval_that_touches_zero_is_not_a_difference() -> None:
    def gap(low: float | None, high: float | None) -> Difference:
        return Difference(
            NAME, "rival", "ours", "test", "click", "auc", 0.01, low, high, 0.05, 9, 900
        )

    assert [
        verdict(gap(0.0, 0.02)),
        verdict(gap(0.001, 0.02)),
        verdict(gap(None, None)),
    ] == [
        "equal",
        "better",
        "unknown",
    ]


def test_figures_are_in_the_page_and_in_files(page: Path) -> None:
    text = page.read_text()
    drawn = re.findall(r'<figure class="drawn">(.*?)</figure>', text, re.DOTALL)
    names = [
        "attention",
        "curves",
        "differences",
        "information",
        "maps",
        "quality-flops",
        "ranks",
        "reliability",
        "spectra",
    ]
    files = sorted((page.parent / "figures").iterdir())
    assert [file.name for file in files] == [f"{NAME}-{name}.png" for name in names]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert len(drawn) == len(names)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_a_section_has_its_commands_once_and_no_figure_repeats_them(page: Path) -> None:
    text = page.read_text()
    sections = re.findall(r"<section>(.*?)</section>", text, re.DOTALL)
    assert len(sections) == 1
    for section in sections:
        (commands,) = re.findall(r'<dl class="commands">(.*?)</dl>', section)
        assert [words(line) for line in re.findall(r"<dd>(.*?)</dd>", commands)] == [
            "tokenrec study --config=made_up --out=studies/made-up",
            "python -m benchmarks.study_states --study=made-up",
        ]
        for figure in re.findall(r"<figure.*?</figure>", section, re.DOTALL):
            assert "tokenrec study" not in words(figure)
            assert "benchmarks.study_states" not in words(figure)
    (footer,) = re.findall(r"<footer>(.*?)</footer>", text, re.DOTALL)
    assert words(footer).startswith("Drawn by tokenrec report --study=")
    assert words(text).count("tokenrec report") == 1


def test_without_measured_states_only_the_study_is_a_command(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", optional=False)
    text = write_report([folder], tmp_path / "out").read_text()
    assert text.count('<dl class="commands">') == 1
    assert "benchmarks.study_states" not in text


def test_figures_follow_the_theme_of_the_page(page: Path) -> None:
    text = page.read_text()
    css = text[text.index("<style>") : text.index("</style>")]
    light, dark = (
        {
            name
            for block in re.findall(pattern, css, re.DOTALL)
            for name in re.findall(r"(--[\w-]+):", block)
        }
        for pattern in (
            r"(?m)^:root \{(.*?)\}",
            r"prefers-color-scheme: dark\)\s*\{\s*:root \{(.*?)\}",
        )
    )
    assert light == dark
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= light
    assert {"--figure-ink", "--page", "--series-1"} <= used
    # No figure has a colour that belongs to one theme; heat maps have their own.
    for svg in re.findall(r'<svg role="img".*?</svg>', text, re.DOTALL):
        fixed = set(re.findall(r": (#\w{6})", svg))
        assert fixed.isdisjoint({"#333333", "#ffffff", "#e6e6e6", "#9a9a9a"})
        assert fixed.isdisjoint(light.lower() for light, _ in COLOURS)


def test_long_names_can_break_on_a_narrow_screen(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", "a_long_name", optional=False)
    text = write_report([folder], tmp_path / "out").read_text()
    assert "<h1>Study a_<wbr>long_<wbr>name</h1>" in text
    assert re.search(r"<h2[^>]*>a_<wbr>long_<wbr>name</h2>", text)


def test_the_page_needs_no_network_no_script_and_no_other_file(page: Path) -> None:
    text = page.read_text()
    for word in ("http", "src=", "<script", "<link", "@import", "<iframe", "<metadata"):
        assert word not in text
    assert set(re.findall(r'href="(#|data:image/png;base64,|.)', text)) == {
        "#",
        "data:image/png;base64,",
    }
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_ranks_are_those_of_the_last_step(page: Path) -> None:
    # Step 2: 20 and 21, plus the seed.
    assert tables(page)["Effective rank of the event states"]["ours"] == [
        "21.0 ± 1.0",
        "22.0 ± 1.0",
    ]


def test_runs_that_diverged_are_named(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", optional=False)
    assert (
        "<dt>diverged</dt>" not in write_report([folder], tmp_path / "out").read_text()
    )
    write_about(folder, diverged=["rival/lr-1/seed-0", "plain/lr-1/seed-0"])
    text = write_report([folder], tmp_path / "out").read_text()
    assert "<dt>diverged</dt><dd>rival/lr-1/seed-0, plain/lr-1/seed-0</dd>" in text


def test_sections_of_missing_files_are_absent_and_named(tmp_path: Path) -> None:
    write_study(tmp_path / "s", optional=False)
    (tmp_path / "s" / "differences.parquet").unlink()
    text = write_report([tmp_path / "s"], tmp_path / "out").read_text()
    assert '<figure class="drawn">' not in text
    assert "Inside the models" not in text
    assert "number best" not in text
    for file in (
        "differences.parquet",
        "reliability.parquet",
        "curves.parquet",
        "flops.json",
        "ranks.parquet",
        "spectra.parquet",
        "information.parquet",
        "attention.parquet",
        "maps.parquet",
    ):
        assert f"<code>{file}</code> is not in the study" in text
    assert not (tmp_path / "out" / "figures").exists()


def test_studies_share_a_page_and_the_styles_of_their_models(tmp_path: Path) -> None:
    first = write_study(tmp_path / "a", optional=False)
    second = write_study(tmp_path / "b", "other", optional=False)
    text = write_report([first, second], tmp_path / "out").read_text()
    assert [words(h) for h in re.findall(r"<h2.*?>(.*?)</h2>", text)] == [NAME, "other"]
    keys = re.findall(r'<th scope="row">(<svg class="key".*?</svg>)rival', text)
    assert len(keys) > 4
    assert set(keys) == {legend_key(assign_styles(["ours", "rival"])["rival"])}


def test_equal_results_make_an_equal_page(
    study: Path, page: Path, tmp_path: Path
) -> None:
    again = write_report([study], tmp_path).read_text()
    assert again.replace(str(tmp_path), str(page.parent)) == page.read_text()


def test_an_unfinished_study_says_so(tmp_path: Path) -> None:
    write_study(tmp_path / "s", optional=False)
    rows = [
        row
        for row in result_rows()
        if row[1] != "plain" and not (row[1] == "rival" and row[2] == 2)
    ]
    write_rows(tmp_path / "s" / "results.parquet", RESULT, rows)
    write_rows(tmp_path / "s" / "differences.parquet", DIFFERENCE, [])
    text = words(write_report([tmp_path / "s"], tmp_path / "out").read_text())
    assert "Not finished: rival has 2 of 3 seeds; plain has no finished run." in text


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    write_study(tmp_path / "s", "<b>&", optional=False)
    text = write_report([tmp_path / "s"], tmp_path / "out").read_text()
    assert "<h1>Study &lt;b&gt;&amp;</h1>" in text


def test_a_value_that_is_not_a_number_is_undefined_and_so_is_its_mean(
    tmp_path: Path,
) -> None:
    write_study(tmp_path / "s", optional=False)
    rows = [
        (*row[:7], float("nan"), *row[8:]) if row[:3] == (NAME, "ours", 1) else row
        for row in result_rows()
    ]
    write_rows(tmp_path / "s" / "results.parquet", RESULT, rows)
    summary = summary_of(tmp_path / "s")
    assert summary.spreads[CLICK]["ours"].mean is None
    assert summary.spreads[CLICK]["rival"].mean == pytest.approx(
        sum(CLICK_AUC["rival"]) / 3
    )


def no_reference(folder: Path) -> None:
    write_about(folder, reference="nobody")


def drop_column(folder: Path) -> None:
    write_rows(
        folder / "results.parquet", RESULT[:-1], [row[:-1] for row in result_rows()]
    )


def repeat_row(folder: Path) -> None:
    write_rows(folder / "results.parquet", RESULT, [*result_rows(), result_rows()[0]])


def text_as_value(folder: Path) -> None:
    write_rows(
        folder / "results.parquet",
        RESULT,
        [(*row[:7], "high", *row[8:]) for row in result_rows()],
    )


def stranger(folder: Path) -> None:
    write_rows(
        folder / "curves.parquet",
        CURVE,
        [(NAME, "rivel", 0, 0.01, 1, "train/loss", 0.5)],
    )


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no study": (
        lambda f: (f / "study.json").unlink(),
        r"holds no study\.json; name the --out folder",
    ),
    "no JSON": (lambda f: (f / "study.json").write_text("{"), "is not JSON"),
    "no object": (lambda f: (f / "study.json").write_text("[]"), "not a JSON object"),
    "no field": (
        lambda f: (f / "study.json").write_text(json.dumps({"study": "a"})),
        "no field 'command'",
    ),
    "wrong field": (lambda f: write_about(f, seeds="three"), "seeds='three' is not"),
    "wrong positives": (
        lambda f: write_about(f, data={"positives": {"test": 3}}),
        "data.positives",
    ),
    "no results": (
        lambda f: (f / "results.parquet").unlink(),
        r"results.parquet' cannot be read",
    ),
    "broken results": (
        lambda f: (f / "results.parquet").write_bytes(b"PAR1"),
        r"results.parquet' cannot be read",
    ),
    "empty results": (
        lambda f: write_rows(f / "results.parquet", RESULT, []),
        "has no rows; let the study end",
    ),
    "no column": (drop_column, "has no column 'parameters'"),
    "text as value": (text_as_value, "column 'value': 'high' is not"),
    "a row twice": (repeat_row, "occurs 2 times"),
    "no reference": (no_reference, "no run of the reference 'nobody'"),
    "other study": (
        lambda f: write_about(f, "other"),
        "has rows of study 'made-up', study.json is of 'other'",
    ),
    "unknown model": (
        stranger,
        "curves.parquet: has rows of model 'rivel', and results.parquet has none; did you mean 'rival'",
    ),
    "no command": (
        lambda f: (f / "states.json").write_text("[]"),
        r"states\.json: is not \{command: words\}",
    ),
    "no FLOPs": (
        lambda f: (f / "flops.json").write_text('{"ours": 0}'),
        "flops.json: is not",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_refused_by_name_and_leaves_the_page_before(
    case: str, tmp_path: Path
) -> None:
    spoil, message = REFUSED[case]
    spoil(write_study(tmp_path / "s", optional=False))
    (tmp_path / "report.html").write_text("before")
    with pytest.raises(InputError, match=message):
        write_report([tmp_path / "s"], tmp_path)
    assert (tmp_path / "report.html").read_text() == "before"


def test_a_study_given_twice_is_refused(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", optional=False)
    with pytest.raises(InputError, match="name each study once"):
        write_report([folder, folder], tmp_path / "out")


def test_a_file_in_the_place_of_the_folder_is_refused(
    study: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file; name a folder"):
        write_report([study], tmp_path / "out")


def test_without_matplotlib_the_verb_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = write_study(tmp_path / "s", optional=False)
    assert main(["report", "--study", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert 'pip install ".[report]"' in capsys.readouterr().err
