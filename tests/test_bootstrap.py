"""Intervals against an ordinary bootstrap, a known distribution, and pycocotools on repeated images."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from maskcls_hf.metrics import Bootstrap, MaskAP, MeanIoU, PanopticQuality, pad_rows
from test_average_precision import NAMES, images, measured


def measurements(number: int, seed: int = 0) -> torch.Tensor:
    """Counts of a metric with three classes (number, 3, 3); accuracy differs much between images."""
    rng = np.random.default_rng(seed)
    true = rng.integers(1, 100, (number, 3)) * rng.integers(0, 2, (number, 3))
    right = np.floor(true * rng.random((number, 1)))
    return torch.from_numpy(np.stack([right, true, right + rng.integers(0, 40, (number, 3))], axis=1)).double()


def mean_iou() -> MeanIoU:
    return MeanIoU({0: "a", 1: "b", 2: "c"})


def test_agrees_with_an_ordinary_bootstrap():
    counts = measurements(300)
    bootstrap = Bootstrap(mean_iou(), replicates=4000)
    bootstrap.add(counts)
    rng = np.random.default_rng(1)
    drawn = torch.from_numpy(np.stack([np.bincount(rng.integers(0, 300, 300), minlength=300) for _ in range(4000)]))
    sums = torch.einsum("ri,ijk->rjk", drawn.double(), counts)
    for name, values in mean_iou().scores(sums).items():
        low, high = np.quantile(values.numpy(), [0.025, 0.975])
        found = bootstrap.intervals()[name]
        assert found == pytest.approx((low, high), abs=0.06 * (high - low))
        assert bootstrap.scores()[name].std() == pytest.approx(values.std().item(), rel=0.05)


def test_intervals_hold_the_true_value_as_often_as_they_say():
    rng = np.random.default_rng(0)
    accuracy, number, trials, hits = 0.7, 120, 250, 0
    weights = Bootstrap(MeanIoU({0: "a", 1: "b"}), replicates=400)
    table = [weights.weights(image) for image in range(number)]  # once for all trials
    for _ in range(trials):
        right = rng.random(number) < accuracy  # an image is one pixel
        counts = torch.zeros(number, 3, 2).double()
        counts[:, 0, 0] = torch.from_numpy(right)
        counts[:, 1, 0] = 1
        counts[:, 2, 0] = counts[:, 0, 0]
        bootstrap = Bootstrap(MeanIoU({0: "a", 1: "b"}), replicates=400)
        bootstrap.weights = table.__getitem__
        bootstrap.add(counts)
        low, high = bootstrap.intervals()["pixel_accuracy"]
        hits += low <= accuracy <= high
    assert 0.90 <= hits / trials <= 0.985


def test_weights_are_poisson_numbers():
    bootstrap = Bootstrap(mean_iou(), replicates=2000)
    weights = np.stack([bootstrap.weights(image) for image in range(200)])
    frequencies = np.bincount(weights.ravel(), minlength=6)[:6] / weights.size
    assert frequencies == pytest.approx([math.exp(-1) / math.factorial(k) for k in range(6)], abs=0.003)
    covariance = np.cov(weights)
    assert covariance.diagonal() == pytest.approx(np.ones(200), abs=0.2)
    assert np.abs(covariance - np.diag(covariance.diagonal())).max() < 0.15
    other = Bootstrap(mean_iou(), replicates=2000, seed=1).weights(0)
    assert abs(np.corrcoef(other, weights[0])[0, 1]) < 0.1


def test_how_images_are_batched_and_who_measures_them_makes_no_difference():
    counts = measurements(20)
    whole, parts, shuffled = (Bootstrap(mean_iou(), replicates=50) for _ in range(3))
    whole.add(counts)
    for start, end in ((0, 7), (7, 8), (8, 20)):
        parts.add(counts[start:end])
    order = torch.randperm(20)
    shuffled.add(counts[order], numbers=order.tolist())
    assert whole.intervals() == parts.intervals() == shuffled.intervals()  # of integers, so exact
    parts.reset()
    assert all(math.isnan(low) for low, _ in parts.intervals().values())


def test_the_metric_stays_as_it_is_and_memory_constant():
    metric = mean_iou()
    bootstrap = Bootstrap(metric, replicates=10)
    before = copy.deepcopy(metric.sums)
    for seed in range(3):
        bootstrap.add(measurements(5, seed))
    assert torch.equal(metric.sums, before)
    assert bootstrap.images == 15 and tuple(bootstrap._sums.shape) == (10, 3, 3)


def test_wrong_input():
    bootstrap = Bootstrap(PanopticQuality({0: "a"}), replicates=10)
    with pytest.raises(ValueError, match="Expected measurements"):
        bootstrap.add(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="2 measurements but 1 numbers"):
        bootstrap.add(torch.zeros(2, 4, 1), numbers=[3])
    with pytest.raises(ValueError, match="level"):
        Bootstrap(mean_iou(), level=95)


class TestMaskAP:
    def test_a_replicate_equals_the_score_of_repeated_images(self):
        pictures = images(21, number=8)
        rng = np.random.RandomState(0)
        for picture in pictures:  # without ties the order of the copies makes no difference
            picture.scores = rng.rand(len(picture.scores))
        metric = MaskAP(NAMES)
        rows = measured(metric, pictures)
        bootstrap = Bootstrap(metric, replicates=6)
        bootstrap.add(pad_rows(rows[:5]))
        bootstrap.add(pad_rows(rows[5:]))
        scores = bootstrap.scores()
        for replicate in range(6):
            repeated = MaskAP(NAMES)
            for number, image_rows in enumerate(rows):
                for _ in range(bootstrap.weights(number)[replicate]):
                    repeated.add(image_rows)
            for name, value in repeated.compute().items():
                assert scores[name][replicate] == pytest.approx(value, abs=1e-12, nan_ok=True)
        assert len(set(scores["ap"])) > 3

    def test_nothing_added(self):
        assert all(math.isnan(low) for low, _ in Bootstrap(MaskAP(NAMES), replicates=5).intervals().values())
