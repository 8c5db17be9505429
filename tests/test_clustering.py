"""Clusters are k-means clusters, the same for the same seed; the nearest are what a naive loop finds."""

import importlib.util

import numpy as np
import pytest
import torch

from mnemos.engine.clustering import choose_backend, kmeans, nearest_of_each, num_clusters
from mnemos.sharding.errors import UserError


def islands(num: int, clusters: int, width: int, seed: int = 0, noise: float = 0.1) -> np.ndarray:
    """Return fp32 [num, width]: points around far centres, with a large common mean as features have."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, width)) * 3
    points = centres[rng.integers(clusters, size=num)] + rng.normal(size=(num, width)) * noise + 5
    return points.astype(np.float32)


def naive_lloyd(x: np.ndarray, centres: np.ndarray, steps: int = 200) -> float:
    """Return the inertia of plain Lloyd steps in float64."""
    x, centres = x.astype(np.float64), centres.astype(np.float64)
    for _ in range(steps):
        labels = ((x[:, None] - centres[None]) ** 2).sum(-1).argmin(1)
        centres = np.stack(
            [x[labels == c].mean(0) if (labels == c).any() else centres[c] for c in range(len(centres))]
        )
    return float(((x[:, None] - centres[None]) ** 2).sum(-1).min(1).sum())


def naive_nearest(labels: np.ndarray, distances: np.ndarray, keys: np.ndarray, per_cluster: int) -> list[int]:
    chosen = []
    for label in sorted(set(labels.tolist())):
        members = [index for index in range(len(labels)) if labels[index] == label]
        members.sort(key=lambda index: (distances[index], keys[index]))
        chosen += members[:per_cluster]
    return chosen


def some_keys(num: int) -> np.ndarray:
    return np.array([f"{(index * 7919) % 10_007:016x}" for index in range(num)], dtype="S16")


@pytest.mark.parametrize(("num", "clusters", "width"), [(400, 4, 8), (63, 5, 3), (1_000, 20, 192)])
def test_labels_distances_and_inertia_belong_together(num: int, clusters: int, width: int) -> None:
    x = islands(num, clusters, width)
    found = kmeans(x, clusters, seed=3, backend="sklearn")
    assert found.centres.shape == (clusters, width)
    squared = ((x[:, None].astype(np.float64) - found.centres[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(found.labels, squared.argmin(1))
    np.testing.assert_allclose(found.distances, np.sqrt(squared.min(1)), rtol=1e-4, atol=1e-4)
    assert found.inertia == pytest.approx(squared.min(1).sum(), rel=1e-5)
    # already at rest: plain Lloyd steps from these centres gain next to nothing
    assert naive_lloyd(x, found.centres, steps=20) >= found.inertia * 0.999


def test_separated_islands_are_found() -> None:
    x = islands(300, 3, 6, noise=0.01)
    found = kmeans(x, 3, seed=0)
    assert found.inertia == pytest.approx(naive_lloyd(x, found.centres), rel=1e-4)
    assert found.inertia / 300 == pytest.approx(6 * 0.01**2, rel=0.15)


def test_the_same_seed_gives_the_same_bits() -> None:
    x = islands(500, 12, 16, noise=1.0)
    first, again = kmeans(x, 12, seed=5), kmeans(torch.from_numpy(x.copy()), 12, seed=5)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert first.centres.tobytes() == again.centres.tobytes()
    assert first.distances.tobytes() == again.distances.tobytes()
    assert first.centres.tobytes() != kmeans(x, 12, seed=6).centres.tobytes()


def test_max_iter_is_kept_and_x_is_left_alone() -> None:
    x = islands(500, 12, 16, noise=3.0)
    before = x.copy()
    assert kmeans(x, 12, seed=0, max_iter=2).iterations == 2
    np.testing.assert_array_equal(x, before)


def test_one_sample_and_all_alike() -> None:
    one = kmeans(np.ones((1, 4), np.float32), 1, seed=0)
    assert (one.labels.tolist(), one.inertia) == ([0], 0.0)
    alike = kmeans(np.ones((9, 4), np.float32), 3, seed=0)
    assert alike.inertia == pytest.approx(0, abs=1e-9)
    assert len(nearest_of_each(alike.labels, alike.distances, some_keys(9), 5)) >= 5


def test_every_sample_its_own_cluster() -> None:
    x = islands(6, 6, 4)
    found = kmeans(x, 6, seed=0)
    assert sorted(found.labels.tolist()) == list(range(6))
    assert found.inertia == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("x", "clusters", "message"),
    [
        (np.ones((3, 2), np.float32), 4, "4 clusters of 3 samples"),
        (np.ones((3, 2), np.float32), 0, "0 clusters"),
        (np.ones((3, 2), np.float64), 1, "fp32"),
        (np.ones(3, np.float32), 1, "fp32"),
        (np.array([[0.0], [np.nan]], np.float32), 1, "row 1 is not finite"),
    ],
)
def test_what_cannot_be_clustered_is_refused(x: np.ndarray, clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans(x, clusters, seed=0, backend="sklearn")


def test_a_missing_cuml_names_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=r"pip install -e '\.\[gpu\]'"):
        kmeans(np.ones((3, 2), np.float32), 1, seed=0, backend="cuml")
    assert choose_backend("auto") == "sklearn"


def test_auto_takes_cuml_only_with_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_backend("auto") == "sklearn"
    with pytest.raises(UserError, match="no CUDA device"):
        choose_backend("cuml")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_backend("auto") == "cuml"
    with pytest.raises(UserError, match="auto, sklearn and cuml"):
        choose_backend("faiss")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_cuml_finds_what_scikit_learn_finds() -> None:
    if importlib.util.find_spec("cuml") is None:
        pytest.skip("needs cuml: pip install -e '.[gpu]'")
    x = islands(2_000, 10, 32)
    ours, theirs = kmeans(x, 10, seed=0, backend="cuml"), kmeans(x, 10, seed=0, backend="sklearn")
    assert ours.inertia == pytest.approx(theirs.inertia, rel=0.05)
    np.testing.assert_allclose(ours.distances.astype(np.float64) @ ours.distances, ours.inertia, rtol=1e-4)


@pytest.mark.parametrize(("num", "clusters"), [(200, 7), (11, 4), (1, 1), (500, 100)])
def test_nearest_agrees_with_a_loop(num: int, clusters: int) -> None:
    rng = np.random.default_rng(num)
    labels = rng.integers(clusters, size=num)
    distances = rng.integers(4, size=num).astype(np.float32)  # ties everywhere
    keys = rng.permutation(some_keys(num))
    chosen = nearest_of_each(labels, distances, keys, 5)
    assert chosen.tolist() == naive_nearest(labels, distances, keys, 5)
    assert len(set(chosen.tolist())) == len(chosen)


def test_the_choice_does_not_depend_on_the_order_of_samples() -> None:
    rng = np.random.default_rng(0)
    labels, distances, keys = rng.integers(3, size=40), np.zeros(40, np.float32), some_keys(40)
    order = rng.permutation(40)
    chosen = keys[nearest_of_each(labels, distances, keys, 4)]
    np.testing.assert_array_equal(
        keys[order][nearest_of_each(labels[order], distances[order], keys[order], 4)], chosen
    )


def test_a_key_that_comes_twice_counts_once() -> None:
    keys = np.array([b"a", b"b", b"a", b"c"])
    chosen = nearest_of_each(np.zeros(4, np.int64), np.array([1, 2, 1, 3], np.float32), keys, 3)
    assert keys[chosen].tolist() == [b"a", b"b", b"c"]


def test_nothing_chosen_of_nothing() -> None:
    empty = np.zeros(0, np.int64)
    assert nearest_of_each(empty, empty.astype(np.float32), empty.astype("S16"), 5).shape == (0,)


@pytest.mark.parametrize(
    ("num", "fraction", "expected"), [(1_000, 0.02, 20), (30, 0.01, 1), (1, 0.01, 1), (160, 0.01, 2)]
)
def test_small_sets_have_a_cluster_too(num: int, fraction: float, expected: int) -> None:
    assert num_clusters(num, fraction) == expected
