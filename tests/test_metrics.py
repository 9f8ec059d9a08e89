"""Scores against brute force and pycocotools."""

from __future__ import annotations

import math
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maskcls_hf.metrics import (
    InstanceF1,
    MaskAP,
    MeanIoU,
    SemanticEvaluator,
    confusion_matrix,
    semantic_target,
)


class TestMeanIoU:
    def test_equals_brute_force(self):
        metric = MeanIoU({i: f"class{i}" for i in range(4)})
        predictions, targets = torch.randint(0, 4, (3, 9, 7)), torch.randint(0, 4, (3, 9, 7))
        targets[torch.rand(targets.shape) < 0.2] = 255
        for prediction, target in zip(predictions, targets, strict=True):
            metric.update(prediction, target)
        counted = targets != 255
        expected = []
        for label in range(4):
            found, true = (predictions == label) & counted, targets == label
            expected.append(((found & true).sum() / (found | true).sum()).item())
        scores = metric.compute()
        assert scores["mean_iou"] == pytest.approx(np.mean(expected), abs=1e-6)
        assert [scores[f"iou_class{i}"] for i in range(4)] == pytest.approx(expected, abs=1e-6)
        accuracy = (predictions == targets)[counted].float().mean().item()
        assert scores["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-6)

    def test_absent_class_does_not_count(self):
        metric = MeanIoU({0: "a", 1: "b", 2: "c"})
        metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
        scores = metric.compute()
        assert math.isnan(scores["iou_c"])
        assert scores["mean_iou"] == pytest.approx((0.5 + 0.0) / 2)

    def test_all_void(self):
        metric = MeanIoU({0: "a"})
        metric.update(torch.tensor([[0]]), torch.tensor([[255]]))
        assert math.isnan(metric.compute()["mean_iou"])

    def test_wrong_input(self):
        with pytest.raises(ValueError, match="differ in size"):
            confusion_matrix(torch.zeros(2, 3), torch.zeros(3, 2), 2)
        with pytest.raises(ValueError, match=r"Target holds class ids \[7\]"):
            confusion_matrix(torch.zeros(1, 2, dtype=int), torch.tensor([[7, 0]]), 2)

    def test_semantic_target(self):
        masks = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 1, 0]]], dtype=torch.bool)
        void = torch.tensor([[True, False, False, False]])
        target = semantic_target(masks, torch.tensor([3, 5]), void)
        assert target.tolist() == [[255, 3, 5, 255]]
        assert semantic_target(masks[:0], torch.tensor([], dtype=int)).tolist() == [[255] * 4]


def random_masks(rng: np.random.Generator, count: int, size: int = 24) -> np.ndarray:
    masks = np.zeros((count, size, size), dtype=bool)
    for mask in masks:
        top, left = rng.integers(0, size - 6, 2)
        mask[top : top + rng.integers(3, 12), left : left + rng.integers(3, 12)] = True
    return masks


def shifted(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.stack([np.roll(mask, rng.integers(-2, 3, 2), axis=(0, 1)) for mask in masks])


class TestInstanceF1:
    def test_equals_the_best_of_all_pairings(self):
        rng = np.random.default_rng(0)
        for _ in range(20):
            true = random_masks(rng, 4)
            predicted = np.concatenate([shifted(true[:3], rng), random_masks(rng, 1)])
            metric = InstanceF1()
            metric.update(predicted, true)
            hits = [[(p & t).sum() / (p | t).sum() > 0.5 for t in true] for p in predicted]
            best = max(sum(hits[i][j] for i, j in enumerate(order)) for order in permutations(range(4)))
            assert metric.true_positives == best
            assert metric.compute()["f1"] == pytest.approx(best / 4)

    def test_nothing_predicted_or_nothing_there(self):
        masks, nothing = np.ones((2, 4, 4), dtype=bool), np.zeros((0, 4, 4), dtype=bool)
        metric = InstanceF1()
        metric.update(nothing, nothing)
        assert math.isnan(metric.compute()["f1"])
        metric.update(nothing, masks)
        metric.update(masks[:1], nothing)
        assert metric.compute() == {"f1": 0.0, "precision": 0.0, "recall": 0.0}

    def test_one_true_instance_is_found_once(self):
        masks = np.ones((2, 4, 4), dtype=bool)
        metric = InstanceF1()
        metric.update(masks, masks[:1])
        assert (metric.true_positives, metric.false_positives, metric.false_negatives) == (1, 1, 0)

    def test_sizes_must_agree(self):
        with pytest.raises(ValueError, match="differ in size"):
            InstanceF1().update(np.ones((1, 2, 2), dtype=bool), np.ones((1, 2, 3), dtype=bool))


class TestMaskAP:
    def test_perfect_and_empty(self):
        true = random_masks(np.random.default_rng(1), 3)
        metric = MaskAP({1: "thing"})
        metric.update(true, [1] * 3, [0.9, 0.8, 0.7], true, [1] * 3)
        assert metric.compute() == pytest.approx({"ap": 1.0, "ap50": 1.0, "ap75": 1.0})
        metric = MaskAP({1: "thing"})
        metric.update(true[:0], [], [], true, [1] * 3)
        assert metric.compute()["ap"] == 0.0
        assert math.isnan(MaskAP({1: "thing"}).compute()["ap"])

    def test_equals_a_plain_average_precision(self):
        rng = np.random.default_rng(2)
        metric, records, total = MaskAP({1: "thing"}), [], 0
        for _ in range(5):
            true = random_masks(rng, 3)
            predicted = np.concatenate([shifted(true, rng), random_masks(rng, 2)])
            scores = rng.random(5)
            metric.update(predicted, [1] * 5, scores.tolist(), true, [1] * 3)
            total += 3
            free = set(range(3))
            for index in np.argsort(-scores):
                ious = {t: (predicted[index] & true[t]).sum() / (predicted[index] | true[t]).sum() for t in free}
                best = max(ious, key=ious.get, default=None)
                hit = best is not None and ious[best] >= 0.5
                if hit:
                    free.remove(best)
                records.append((scores[index], hit))
        hits = np.cumsum([hit for _, hit in sorted(records, reverse=True)])
        precision, recall = hits / np.arange(1, len(hits) + 1), hits / total
        expected = np.mean(
            [precision[recall >= level].max(initial=0.0) for level in np.linspace(0, 1, 101)]
        )  # 101 recall levels, as COCO
        assert metric.compute()["ap50"] == pytest.approx(expected, abs=1e-6)


class FakeProcessor:
    """Stands in for the image processor: the outputs hold the maps already."""

    def post_process_semantic_segmentation(self, outputs, target_sizes):
        return [m[:height, :width] for m, (height, width) in zip(outputs.maps, target_sizes, strict=True)]


def test_evaluator_adds_up_batches_and_starts_afresh():
    evaluator = SemanticEvaluator(FakeProcessor(), {0: "a", 1: "b"})
    maps = torch.tensor([[[0, 1], [1, 1]], [[1, 0], [0, 0]]])
    batch = {
        "mask_labels": [torch.tensor([[[1, 0], [0, 0]], [[0, 1], [1, 1]]]).bool(), torch.ones(1, 2, 2).bool()],
        "class_labels": [torch.tensor([0, 1]), torch.tensor([1])],
    }
    outputs = SimpleNamespace(maps=maps, valid_sizes=torch.tensor([[2, 2], [1, 2]]))  # the second is padded
    counts = evaluator.batch_counts(outputs, batch)
    assert counts.tolist() == [[[1, 0], [0, 3]], [[0, 0], [1, 1]]]
    for _ in range(2):  # the second round must not remember the first
        half = SimpleNamespace(predictions=counts[:1])
        assert evaluator(half, compute_result=False) == {}
        scores = evaluator(SimpleNamespace(predictions=counts[1:]), compute_result=True)
        assert scores["iou_a"] == pytest.approx(1 / 2) and scores["iou_b"] == pytest.approx(4 / 5)


def test_evaluator_reads_semantic_labels():
    evaluator = SemanticEvaluator(FakeProcessor(), {0: "a", 1: "b"})
    outputs = SimpleNamespace(maps=torch.tensor([[[0, 1]]]), valid_sizes=torch.tensor([[1, 2]]))
    counts = evaluator.batch_counts(outputs, {"labels": torch.tensor([[[0, 255]]])})
    assert counts.tolist() == [[[1, 0], [0, 0]]]
