"""RQ-KMeans: it finds clusters, leaves no code unused, and reports errors."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tokenrec.semantic_ids.rq_kmeans import CHUNK_ROWS, fit_kmeans, fit_rq_kmeans


def blobs(clusters: int, each: int, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Draw points around centres that are far apart, and the centre of each."""
    random = np.random.default_rng(0)
    label = np.repeat(np.arange(clusters), each)
    centre = random.normal(size=(clusters, width)) * 20
    return (centre[label] + random.normal(size=(len(label), width)) * 0.1).astype(
        np.float32
    ), label


def test_separate_clusters_share_no_code() -> None:
    values, label = blobs(12, 20)
    centroids, assigned = fit_kmeans(values, 48, jax.random.key(0))
    pairs = set(zip(label.tolist(), assigned.tolist(), strict=True))
    assert len(pairs) == len({code for _, code in pairs}) == 48
    means = np.stack([values[assigned == code].mean(axis=0) for code in range(48)])
    # Two ways to average float32 coordinates between 32 and 64, whose last place is
    # 3.8e-6. Measured one such unit with AVX2, AVX-512 and SSE4.2; two are allowed.
    np.testing.assert_allclose(centroids, means, atol=1e-5)


@pytest.mark.parametrize("rows", [3, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_every_point_takes_its_nearest_centroid(rows: int) -> None:
    values = np.random.default_rng(1).normal(size=(rows, 4)).astype(np.float32)
    centroids, assigned = fit_kmeans(values, 7, jax.random.key(1))
    distances = np.square(values[:, None] - centroids).sum(axis=2)
    # Measured 0. Where two centroids are equally near but for rounding, another
    # processor may take the other one: the last place of a squared distance is 1e-6.
    np.testing.assert_allclose(
        distances[np.arange(rows), assigned], distances.min(axis=1), atol=1e-5
    )


def test_no_code_stays_empty_though_seeds_coincide() -> None:
    # Nearly all points are one point, and so are the seeds.
    values = np.zeros((3000, 3), np.float32)
    values[:15] = np.random.default_rng(2).normal(size=(15, 3))
    _, assigned = fit_kmeans(values, 16, jax.random.key(0))
    assert len(np.unique(assigned)) == 16


@pytest.mark.parametrize("clusters", [1, 10])
def test_equal_points_share_one_code(clusters: int) -> None:
    centroids, assigned = fit_kmeans(
        np.ones((6, 2), np.float32), clusters, jax.random.key(0)
    )
    assert len(set(assigned.tolist())) == 1
    assert np.isfinite(centroids).all()


def test_errors_are_those_of_the_codes_and_fall_with_each_level() -> None:
    values = np.random.default_rng(3).normal(size=(500, 6)).astype(np.float32)
    quantized = fit_rq_kmeans(values, (8, 16, 16), seed=0)
    assert quantized.codes.shape == (500, 3)
    assert (quantized.codes.min(axis=0) >= 0).all()
    assert (quantized.codes.max(axis=0) < (8, 16, 16)).all()
    assert (np.diff(quantized.errors) < 0).all()
    # The best code word of a level is the mean residual of its items: rebuild the code
    # books from the codes alone.
    residual = values.copy()
    for level, size in enumerate((8, 16, 16)):
        for code in range(size):
            chosen = quantized.codes[:, level] == code
            residual[chosen] -= residual[chosen].mean(axis=0) if chosen.any() else 0
        error = np.square(residual).sum(axis=1).mean()
        # Lloyd's algorithm ends before code words are exact means: measured 5e-4 on the
        # last level. Rounding does not matter here, but on another processor it may end
        # an iteration earlier; four times as much is allowed.
        assert error == pytest.approx(quantized.errors[level], rel=2e-3)


def test_one_seed_gives_one_result() -> None:
    values = np.random.default_rng(4).normal(size=(300, 4)).astype(np.float32)
    one, same, other = (fit_rq_kmeans(values, (8, 8), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.codes, same.codes)
    np.testing.assert_array_equal(one.errors, same.errors)
    assert (one.codes != other.codes).any()
