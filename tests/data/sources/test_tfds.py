"""A data set that TFDS wrote is read without TensorFlow, and by its feature specs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import tensorflow_datasets as tfds

from tests.data.schema_inference.logs import START
from tokenrec.cli.main import main
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.tfds import TfdsSource
from tokenrec.errors import InputError

ROWS, USERS, MOVIES = 400, 25, 30
GENRES = ["Action", "Comedy", "Drama"]
JOBS = ["artist", "doctor"]


def examples() -> list[dict[str, Any]]:
    """Ratings with the feature names of the builder `movielens`."""
    random = np.random.default_rng(0)
    users, movies = random.integers(0, USERS, ROWS), random.integers(0, MOVIES, ROWS)
    seconds = START + random.permutation(ROWS) * 5000
    return [
        {
            "user_id": str(u),
            "movie_id": str(m),
            "user_rating": float(1 + (m + u) % 5),
            "timestamp": int(t),
            "movie_title": f"Film number {m} of {chr(97 + m)}",
            "movie_genres": [GENRES[m % 3], GENRES[(m + 1) % 3]][: 1 + m % 2],
            "user_gender": bool(u % 2),
            "user_occupation_label": JOBS[u % 2] if u % 5 else -1,
            "raw_user_age": float(20 + u),
            "device": {"model": f"d{(u * m) % 3}"},
            "movie_vector": [0.5 * m, 1.0],
            "picture": np.zeros((2, 2), np.float32),
        }
        for u, m, t in zip(users.tolist(), movies.tolist(), seconds, strict=True)
    ]


SPEC = {
    "user_id": tfds.features.Text(),
    "movie_id": tfds.features.Text(),
    "user_rating": np.float32,
    "timestamp": np.int64,
    "movie_title": tfds.features.Text(),
    "movie_genres": tfds.features.Sequence(tfds.features.ClassLabel(names=GENRES)),
    "user_gender": np.bool_,
    "user_occupation_label": tfds.features.ClassLabel(names=JOBS),
    "raw_user_age": np.float32,
    "device": {"model": tfds.features.Text()},
    "movie_vector": tfds.features.Tensor(shape=(2,), dtype=np.float32),
    "picture": tfds.features.Tensor(shape=(2, 2), dtype=np.float32),
}


class Toy(tfds.core.GeneratorBasedBuilder):
    """Ratings, a builder of TFDS."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="ratings")]

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(SPEC)
        return tfds.core.DatasetInfo(builder=self, features=features, citation="Doe")

    def _split_generators(self, manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Any:
        yield from enumerate(examples())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    Toy(
        data_dir=folder, config="ratings", file_format="array_record"
    ).download_and_prepare()
    return folder


def test_specs_become_features(folder: Path) -> None:
    source = TfdsSource("toy/ratings", folder)
    kinds = {f.name: (f.entity, f.kind) for f in source.schema.features}
    assert kinds == {
        "item_id": ("item", "categorical"),
        "movie_title": ("item", "text"),
        "movie_genres": ("item", "multi_valued"),
        "movie_vector": ("item", "embedding"),
        "user_gender": ("user", "categorical"),
        "user_occupation_label": ("user", "categorical"),
        "raw_user_age": ("user", "dense"),
        "device/model": ("context", "categorical"),
        "user_rating": ("action", "categorical"),
    }
    assert [task.name for task in source.schema.tasks] == ["liked"]
    assert source.provenance.citation == "Doe"
    assert any("picture" in line for line in source.summary)
    assert "tensorflow" not in sys.modules


def test_rows_are_the_examples(folder: Path, tmp_path: Path) -> None:
    source = TfdsSource("toy/ratings", folder, labels=["liked: user_rating >= 3"])
    prepare(source, tmp_path / "set")
    given = {(e["user_id"], e["movie_id"], e["timestamp"]): e for e in examples()}
    dataset = open_dataset(tmp_path / "set")
    tables = [dataset.to_arrow(s).read_all().to_pylist() for s in dataset.splits]
    assert sum(map(len, tables)) == ROWS
    last = [max(row["time_ms"] for row in table) for table in tables]
    assert last == sorted(last)
    for row in tables[0]:
        user, item = str(row["user_id"]), str(row["item_id"])
        example = given[user, item, row["time_ms"] // 1000]
        job = example["user_occupation_label"]
        assert row["label_liked"] == int(example["user_rating"] >= 3)
        assert row["user_rating"] == int(example["user_rating"])
        assert row["movie_genres"] == example["movie_genres"]
        assert row["movie_vector"] == example["movie_vector"]
        assert row["movie_title"] == example["movie_title"].lower()
        assert row["user_gender"] == int(example["user_gender"])
        assert row["user_occupation_label"] == (None if job == -1 else job)
        assert row["raw_user_age"] == example["raw_user_age"]
        assert row["device/model"] == example["device"]["model"]


def test_a_rating_is_a_number_or_a_class_if_labels_say_so(folder: Path) -> None:
    labels = ["user_rating: real", "user_occupation_label: classes"]
    source = TfdsSource("toy/ratings", folder, labels=labels)
    assert [task.kind for task in source.schema.tasks] == ["real", "classes"]
    assert source.schema.tasks[1].classes == tuple(JOBS)
    rows = pa.Table.from_batches(source.rows())
    found = list(
        zip(
            rows["label_user_rating"].to_pylist(),
            rows["label_user_occupation_label"].to_pylist(),
            strict=True,
        )
    )
    users = [int(row["user_id"]) for row in examples()]
    jobs = [user % 2 if user % 5 else -1 for user in users]
    ratings = [row["user_rating"] for row in examples()]
    assert sorted(found) == sorted(zip(ratings, jobs, strict=True))


def test_columns_may_be_named_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", "tfds", "--name", "toy/ratings", "--data-dir", str(folder)]
    command += ["--user", "user_id", "--item", "movie_id", "--time", "timestamp"]
    command += ["--label", "high: user_rating > 4", "--valid-from", "2022-01-20"]
    assert main([*command, "--out", str(tmp_path / "set")]) == 0
    assert "seconds since 1970" in capsys.readouterr().err
    dataset = open_dataset(tmp_path / "set")
    assert dataset.splits == ("train", "valid")
    assert [task.name for task in dataset.schema.tasks] == ["high"]
    start = np.datetime64("2022-01-20", "ms").astype(int)
    assert min(dataset.to_arrow("valid").read_all()["time_ms"].to_pylist()) >= start


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "toy/ratngs"}, "holds no such data set.*--file_format=array_record"),
        ({"split": "trian"}, "did you mean 'train'"),
        ({"user": "usr_id"}, "--user=usr_id.*did you mean 'user_id'"),
        ({"valid_from": "2022-01-20", "test_from": "2022-01-20"}, "must be later"),
    ],
)
def test_wrong_input_is_named(
    folder: Path, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TfdsSource(**({"name": "toy/ratings", "data_dir": folder} | arguments))


def test_a_data_set_in_another_format_needs_a_build(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "toy" / "ratings" / "1.0.0"
    copy.mkdir(parents=True)
    for file in (folder / "toy" / "ratings" / "1.0.0").iterdir():
        text = file.read_bytes()
        copy.joinpath(file.name.replace("array_record", "tfrecord")).write_bytes(
            text.replace(b"array_record", b"tfrecord")
        )
    with pytest.raises(InputError, match="is stored as tfrecord"):
        TfdsSource("toy/ratings", tmp_path)


def test_users_and_items_have_one_row_each(folder: Path) -> None:
    source = TfdsSource("toy/ratings", folder)
    log = pa.Table.from_batches(list(source.rows()))
    for table, key in ((source.users(), "user_id"), (source.items(), "item_id")):
        ids = table[key].to_pylist()
        assert len(ids) == len(set(ids))
        assert set(ids) == set(log[key].to_pylist())
