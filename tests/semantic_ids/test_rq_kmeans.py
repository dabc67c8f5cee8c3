"""RQ-KMeans: it finds clusters, leaves no code unused, and reports errors."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tokenrec.semantic_ids import rq_kmeans
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
    centroids, assigned, *_ = fit_kmeans(values, 48, jax.random.key(0))
    pairs = set(zip(label.tolist(), assigned.tolist(), strict=True))
    assert len(pairs) == len({code for _, code in pairs}) == 48
    means = np.stack([values[assigned == code].mean(axis=0) for code in range(48)])
    # Two ways to average float32 coordinates between 32 and 64, whose last place is
    # 3.8e-6. Measured one such unit with AVX2, AVX-512 and SSE4.2; two are allowed.
    np.testing.assert_allclose(centroids, means, atol=1e-5)


@pytest.mark.parametrize("rows", [3, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_every_point_takes_its_nearest_centroid(rows: int) -> None:
    values = np.random.default_rng(1).normal(size=(rows, 4)).astype(np.float32)
    centroids, assigned, *_ = fit_kmeans(values, 7, jax.random.key(1))
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
    assigned = fit_kmeans(values, 16, jax.random.key(0)).assigned
    assert len(np.unique(assigned)) == 16


@pytest.mark.parametrize("clusters", [1, 10])
def test_equal_points_share_one_code(clusters: int) -> None:
    centroids, assigned, *_ = fit_kmeans(
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
        # Measured 0: the algorithm ended where no centroid moves. It may end where ten
        # iterations change the error by less than 1e-4.
        assert error == pytest.approx(quantized.errors[level], rel=2e-4)


def overlapping_blobs(seed: int) -> np.ndarray:
    """Draw 3,000 points of 16 blobs in 8 dimensions, which overlap."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(16, 8))
    points = centres[random.integers(0, 16, 3000)] + random.normal(size=(3000, 8)) * 0.6
    return points.astype(np.float32)


def go_on(values: np.ndarray, centroids: np.ndarray, iterations: int) -> float:
    """Lloyd's algorithm from these centroids; the summed squared distance at its end."""
    x, book = values.astype(np.float64), centroids.astype(np.float64)
    for iteration in range(iterations + 1):
        distances = np.square(x[:, None] - book).sum(axis=2)
        code = distances.argmin(axis=1)
        if iteration < iterations:
            book = np.stack([x[code == c].mean(axis=0) for c in range(len(book))])
    return float(distances.min(axis=1).sum())


# Of both the error hardly changed in one iteration, and then fell by 4.3 and 4.9 %.
@pytest.mark.parametrize(("seed", "key"), [(4, 0), (11, 2)])
def test_more_iterations_would_not_help(seed: int, key: int) -> None:
    values = overlapping_blobs(seed)
    clusters = fit_kmeans(values, 16, jax.random.key(key), starts=1)
    assert clusters.converged
    further = go_on(values, clusters.centroids, 100)
    assert clusters.error == pytest.approx(further, rel=1e-4)  # measured 2e-8
    assert clusters.error == pytest.approx(go_on(values, clusters.centroids, 0), 1e-5)


def test_the_best_of_several_starts_is_kept() -> None:
    values, _ = blobs(12, 20)
    errors = [
        fit_kmeans(values, 12, jax.random.key(3), starts=starts).error
        for starts in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    # Random first centroids share some of the twelve blobs and miss others.
    assert errors[3] < 0.9 * errors[0]


def test_a_cap_on_iterations_that_is_hit_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = overlapping_blobs(0)
    fit_kmeans(values, 16, jax.random.key(0))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(rq_kmeans, "ITERATIONS", 3)
    quantized = fit_rq_kmeans(values, (16,), 0)
    assert quantized.converged == (False,)
    assert (
        "16 clusters of 3,000 vectors have not converged after 3 iterations"
        in capsys.readouterr().err
    )


def test_one_seed_gives_one_result() -> None:
    values = np.random.default_rng(4).normal(size=(300, 4)).astype(np.float32)
    one, same, other = (fit_rq_kmeans(values, (8, 8), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.codes, same.codes)
    np.testing.assert_array_equal(one.errors, same.errors)
    assert (one.codes != other.codes).any()
