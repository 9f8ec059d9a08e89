"""Scores of semantic maps and instances against brute force, other libraries and cases worked by hand."""

from __future__ import annotations

import io
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from rich.console import Console

from maskcls_hf.data.sample import VOID
from maskcls_hf.metrics import (
    NO_SEGMENT,
    BoundaryIoU,
    InstanceF1,
    MeanIoU,
    PanopticQuality,
    Segments,
    per_class_markdown,
    per_class_table,
)


class TestSegments:
    def test_map_of_classes(self):
        truth = Segments.from_class_map(torch.tensor([[3, 255, 1, 1]], dtype=torch.uint8), 255)
        assert truth.class_labels.tolist() == [1, 3] and truth.index_map.tolist() == [[1, VOID, 0, 0]]
        assert truth.semantic_map().tolist() == [[3, 255, 1, 1]]
        many = torch.tensor([[300, 65535, 255]], dtype=torch.int32)
        assert Segments.from_class_map(many, 65535).index_map.tolist() == [[1, VOID, 0]]

    def test_map_of_segments(self):
        pixels = torch.tensor([[900, 0, 7, 5, 70000]], dtype=torch.int32)
        classes = {70000: 1, 0: None, 7: 0, 5: VOID, 900: 1, 8: 4}
        truth = Segments.from_ids(pixels, classes, crowd_ids=[7])
        assert truth.class_labels.tolist() == [1, 0, 1, 4] and truth.is_crowd.tolist() == [False, True, False, False]
        assert truth.visible == [0, 1, 2]  # the segment without a pixel is one that predictions miss
        assert truth.index_map.tolist() == [[2, NO_SEGMENT, 1, VOID, 0]]
        assert truth.semantic_map(254).tolist() == [[1, 254, 254, 254, 1]]
        assert truth.stack[truth.visible].long().argmax(-1)[:, 0].tolist() == [4, 2, 0]
        assert truth.stack.flatten(1).sum(1).tolist() == [1, 1, 1, 0]

    def test_stack(self):
        stack = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[0, 0, 0, 1]]]).bool()
        truth = Segments.from_ids(stack, {0: 2, 1: 2, 2: VOID}, name="street")
        assert truth.class_labels.tolist() == [2, 2] and truth.size == (1, 4)
        assert truth.void.tolist() == [[False, False, False, True]]
        assert truth.semantic_map().tolist() == [[2, 2, 2, 255]]
        with pytest.raises(ValueError, match="street: segments overlap"):
            _ = truth.index_map
        with pytest.raises(ValueError, match="street: segments of different classes overlap"):
            Segments.from_ids(stack, {0: 2, 1: 3, 2: VOID}, name="street").semantic_map()

    def test_ids_without_class(self):
        with pytest.raises(ValueError, match=r"street: the map holds ids \[9\]"):
            Segments.from_ids(torch.tensor([[1, 9]]), {1: 0}, name="street")


def random_maps(seed: int, num_labels: int, void_id: int = 255) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randint(0, num_labels, (3, 9, 7), generator=generator)
    targets = torch.where(torch.rand(3, 9, 7, generator=generator) < 0.5, predictions, predictions.flip(-1))
    targets[torch.rand(3, 9, 7, generator=generator) < 0.2] = void_id
    return predictions, targets


class TestMeanIoU:
    @pytest.mark.parametrize(("value", "message"), [(math.nan, "is a map of float32"), (7, r"holds class ids \[7\]")])
    def test_ids_that_are_none_are_said(self, value, message):
        good, bad = torch.zeros((2, 2), dtype=torch.int64), torch.full((2, 2), value)
        for metric in (MeanIoU({0: "a", 1: "b"}), BoundaryIoU({0: "a", 1: "b"})):
            for prediction, target, name in ((bad, good, "Prediction"), (good, bad, "Target")):
                with pytest.raises(ValueError, match=f"{name} {message}"):
                    metric.measure(prediction, target)

    def test_equals_brute_force(self):
        metric = MeanIoU({i: f"class{i}" for i in range(4)})
        predictions, targets = random_maps(0, 4)
        for prediction, target in zip(predictions, targets, strict=True):
            metric.update(prediction, target)
        counted = targets != 255
        ious, accuracies, parts = [], [], []
        for label in range(4):
            found, true = (predictions == label) & counted, targets == label
            ious.append(((found & true).sum() / (found | true).sum()).item())
            accuracies.append(((found & true).sum() / true.sum()).item())
            parts.append((true.sum() / counted.sum()).item())
        scores = metric.compute()
        assert scores["mean_iou"] == pytest.approx(np.mean(ious), abs=1e-6)
        assert scores["mean_accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-6)
        assert scores["frequency_weighted_iou"] == pytest.approx(np.dot(parts, ious), abs=1e-6)
        assert [scores[f"iou_class{i}"] for i in range(4)] == pytest.approx(ious, abs=1e-6)
        accuracy = (predictions == targets)[counted].float().mean().item()
        assert scores["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-6)

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_scikit_learn_and_torchmetrics(self, seed: int):
        sklearn = pytest.importorskip("sklearn.metrics")
        torchmetrics = pytest.importorskip("torchmetrics")
        predictions, targets = random_maps(seed, 6)
        metric = MeanIoU({i: str(i) for i in range(6)})
        theirs = torchmetrics.JaccardIndex("multiclass", num_classes=6, ignore_index=255)
        for prediction, target in zip(predictions, targets, strict=True):
            metric.update(prediction, target)
            theirs.update(prediction, target)
        scores, counted = metric.compute(), targets != 255
        true, found = targets[counted], predictions[counted]
        assert scores["mean_iou"] == pytest.approx(sklearn.jaccard_score(true, found, average="macro"), abs=1e-12)
        assert scores["frequency_weighted_iou"] == pytest.approx(
            sklearn.jaccard_score(true, found, average="weighted"), abs=1e-12
        )
        assert scores["mean_accuracy"] == pytest.approx(sklearn.balanced_accuracy_score(true, found), abs=1e-12)
        assert scores["mean_iou"] == pytest.approx(theirs.compute().item(), abs=1e-6)

    def test_absent_class_is_nan_and_does_not_count(self):
        metric = MeanIoU({0: "a", 1: "b", 2: "c"})
        metric.update(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]))
        scores = metric.compute()
        assert math.isnan(scores["iou_c"]) and math.isnan(metric.per_class()["b"]["accuracy"])
        assert scores["mean_iou"] == pytest.approx((0.5 + 0.0) / 2)
        assert scores["mean_accuracy"] == 0.5

    def test_all_void(self):
        metric = MeanIoU({0: "a"})
        metric.update(torch.tensor([[0]]), torch.tensor([[255]]))
        assert all(math.isnan(value) for value in metric.compute().values())

    def test_a_pixel_predicted_as_no_class_is_a_miss(self):
        metric = MeanIoU({0: "a", 1: "b"})
        assert metric.measure(torch.tensor([[0, 255, 255]]), torch.tensor([[0, 0, 255]])).tolist() == [
            [1, 0],
            [2, 0],
            [1, 0],
        ]

    def test_void_and_crowd_of_annotations_do_not_count(self):
        metric = MeanIoU({0: "a", 1: "b"})
        index_map = torch.tensor([[0, 1, VOID, NO_SEGMENT]])
        truth = Segments(torch.tensor([1, 0]), index_map, is_crowd=torch.tensor([False, True]))
        assert metric.measure(torch.tensor([[1, 1, 1, 0]]), truth).tolist() == [[0, 1]] * 3

    def test_batches_of_measurements_add_up(self):
        predictions, targets = random_maps(1, 3)
        one, gathered = (MeanIoU({i: str(i) for i in range(3)}) for _ in range(2))
        for prediction, target in zip(predictions, targets, strict=True):
            one.update(prediction, target)
        gathered.add(torch.stack([one.measure(p, t) for p, t in zip(predictions, targets, strict=True)]))
        assert one.compute() == gathered.compute()
        one.reset()
        assert math.isnan(one.compute()["mean_iou"])

    def test_wrong_input(self):
        metric = MeanIoU({0: "a", 1: "b"})
        with pytest.raises(ValueError, match="one size"):
            metric.measure(torch.zeros(2, 3), torch.zeros(3, 2))
        with pytest.raises(ValueError, match=r"Target holds class ids \[7\]"):
            metric.measure(torch.zeros(1, 2, dtype=int), torch.tensor([[7, 0]]))
        with pytest.raises(ValueError, match=r"Prediction holds class ids \[-1\]"):
            metric.measure(torch.tensor([[-1, 0]]), torch.tensor([[1, 0]]))
        with pytest.raises(ValueError, match="is one of the 2 classes"):
            MeanIoU({0: "a", 1: "b"}, void_id=1)

    def test_many_classes_have_a_void_id_beyond_them(self):
        assert MeanIoU({i: str(i) for i in range(847)}).void_id == 65535

    def test_classes_of_one_name_stay_apart(self):
        assert list(MeanIoU({0: "plant", 1: "sky", 2: "plant"}).per_class()) == ["plant (0)", "sky", "plant (2)"]


def eroded(mask: np.ndarray, distance: int) -> np.ndarray:
    """Pixels of a mask all of whose neighbors in a square of 2 * distance + 1 are in it and in the image."""
    padded = np.pad(mask, distance)
    height, width = mask.shape
    result = np.ones_like(mask)
    for row in range(2 * distance + 1):
        for column in range(2 * distance + 1):
            result &= padded[row : row + height, column : column + width]
    return result


class TestBoundaryIoU:
    @pytest.mark.parametrize("seed", range(4))
    def test_equals_masks_and_erosions(self, seed: int):
        rng = np.random.default_rng(seed)
        metric = BoundaryIoU({k: str(k) for k in range(4)}, width=0.05)
        common, either = np.zeros(4), np.zeros(4)
        for height, width in ((31, 44), (50, 37)):
            true = np.kron(rng.integers(0, 4, (6, 6)), np.ones((12, 12), dtype=int))[:height, :width]
            found = np.roll(true, rng.integers(-2, 3, 2), axis=(0, 1))
            metric.update(found, true)
            distance = round(0.05 * math.hypot(height, width))
            for k in range(4):
                boundaries = [mask & ~eroded(mask, distance) for mask in (found == k, true == k)]
                common[k] += (boundaries[0] & boundaries[1]).sum()
                either[k] += (boundaries[0] | boundaries[1]).sum()
        assert 0.1 < (common / either).mean() < 0.9
        assert [scores["boundary_iou"] for scores in metric.per_class().values()] == pytest.approx(
            (common / either).tolist()
        )
        assert metric.compute() == pytest.approx({"boundary_iou": (common / either).mean()})

    def test_the_border_of_the_image_is_a_boundary(self):
        ones = np.ones((20, 20), dtype=int)
        assert BoundaryIoU({0: "a", 1: "b"}).measure(ones, ones).tolist() == [[0, 20**2 - 18**2]] * 3

    def test_void_makes_no_boundary_and_does_not_count(self):
        true, found = np.zeros((9, 9), dtype=int), np.zeros((9, 9), dtype=int)
        true[4, 4], found[4, 4] = 255, 1
        whole = BoundaryIoU({0: "a", 1: "b"}).measure(np.zeros((9, 9), dtype=int), np.zeros((9, 9), dtype=int))
        assert BoundaryIoU({0: "a", 1: "b"}).measure(found, true).tolist() == whole.tolist() == [[32, 0]] * 3

    def test_pixels_of_no_class_end_a_predicted_mask(self):
        true, found = np.zeros((9, 9), dtype=int), np.zeros((9, 9), dtype=int)
        found[4, 4] = 255
        right, of_true, of_found = BoundaryIoU({0: "a"}).measure(found, true)[:, 0].tolist()
        assert (right, of_true, of_found) == (32, 32, 40)

    def test_a_score_of_one_needs_all_boundaries(self):
        rng = np.random.default_rng(0)
        true = np.kron(rng.integers(0, 3, (4, 4)), np.ones((8, 8), dtype=int))
        metric = BoundaryIoU({k: str(k) for k in range(3)})
        metric.update(true, true)
        assert metric.compute()["boundary_iou"] == 1.0


def random_masks(rng: np.random.Generator, count: int, size: int = 24) -> np.ndarray:
    masks = np.zeros((count, size, size), dtype=bool)
    for mask in masks:
        top, left = rng.integers(0, size - 6, 2)
        mask[top : top + rng.integers(3, 12), left : left + rng.integers(3, 12)] = True
    return masks


def shifted(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.stack([np.roll(mask, rng.integers(-2, 3, 2), axis=(0, 1)) for mask in masks])


def truth_of(masks: np.ndarray, labels: list[int], crowd: list[int] = ()) -> Segments:
    are_crowd = torch.tensor([place in crowd for place in range(len(masks))], dtype=torch.bool)
    return Segments(torch.tensor(labels, dtype=torch.int64), torch.from_numpy(masks), is_crowd=are_crowd)


def found_of(masks: np.ndarray, labels: list[int]) -> Segments:
    return Segments(torch.as_tensor(labels, dtype=torch.int64), torch.from_numpy(masks))


class TestInstanceF1:
    def test_equals_the_best_of_all_pairings(self):
        rng = np.random.default_rng(0)
        for _ in range(20):
            true = random_masks(rng, 4)
            predicted = np.concatenate([shifted(true[:3], rng), random_masks(rng, 1)])
            metric = InstanceF1({1: "thing"})
            metric.update(found_of(predicted, [1] * 4), truth_of(true, [1] * 4))
            hits = [[(p & t).sum() / (p | t).sum() > 0.5 for t in true] for p in predicted]
            best = max(sum(hits[i][j] for i, j in enumerate(order)) for order in permutations(range(4)))
            assert metric.compute()["f1"] == pytest.approx(best / 4)

    def test_nothing_predicted_or_nothing_there(self):
        masks, nothing = np.ones((2, 4, 4), dtype=bool), np.zeros((0, 4, 4), dtype=bool)
        metric = InstanceF1({1: "thing"})
        metric.update(found_of(nothing, []), truth_of(nothing, []))
        assert math.isnan(metric.compute()["f1"])
        metric.update(found_of(nothing, []), truth_of(masks, [1, 1]))
        metric.update(found_of(masks[:1], [1]), truth_of(nothing, []))
        assert metric.compute() == {"f1": 0.0, "precision": 0.0, "recall": 0.0}

    def test_one_true_instance_is_found_once(self):
        masks = np.ones((2, 4, 4), dtype=bool)
        measured = InstanceF1({1: "thing"}).measure(found_of(masks, [1, 1]), truth_of(masks[:1], [1]))
        assert measured.tolist() == [[1], [1], [0]]

    def test_classes_pair_off_apart_and_others_are_skipped(self):
        masks = np.ones((1, 4, 4), dtype=bool)
        metric = InstanceF1({3: "a", 5: "b"})
        metric.update(found_of(masks, torch.tensor([3])), truth_of(masks, [5]))
        metric.update(found_of(masks, [3]), truth_of(masks, [3]))
        metric.update(found_of(masks, [4]), truth_of(masks, [2]))
        assert metric.sums.tolist() == [[1, 0], [1, 0], [0, 1]]
        assert metric.per_class()["a"]["f1"] == pytest.approx(2 / 3)
        assert metric.compute()["f1"] == pytest.approx(1 / 2)

    def test_instances_in_crowds_are_no_false_positives(self):
        masks = np.zeros((2, 4, 4), dtype=bool)
        masks[0, :2], masks[1, 1:] = True, True
        crowd = truth_of(masks[:1], [1], crowd=[0])
        assert InstanceF1({1: "thing"}).measure(found_of(masks[:1], [1]), crowd).tolist() == [[0], [0], [0]]
        assert InstanceF1({1: "thing"}).measure(found_of(masks[1:], [1]), crowd).tolist() == [[0], [1], [0]]

    def test_sizes_must_agree(self):
        with pytest.raises(ValueError, match="differ in size"):
            InstanceF1({1: "thing"}).update(
                found_of(np.ones((1, 2, 2), dtype=bool), [1]), truth_of(np.ones((1, 2, 3), dtype=bool), [1])
            )


class TestTable:
    def test_markdown_joins_scores_of_several_metrics(self):
        quality = PanopticQuality({0: "a|b", 1: "c"})
        quality.add(torch.tensor([[0.8, 0.0], [1, 0], [0, 0], [1, 0]]))
        lines = per_class_markdown({"a|b": {"iou": 0.5}, "c": {"iou": math.nan}}, quality.per_class()).split("\n")
        assert lines[0] == "| class | iou | pq | sq | rq |"
        assert lines[2:] == ["| a\\|b | 50.0 | 53.3 | 80.0 | 66.7 |", "| c | - | - | - | - |"]

    def test_table_for_a_terminal(self):
        console = Console(width=60, record=True, file=io.StringIO())
        console.print(per_class_table({"sky": {"iou": 0.123}}, title="Classes"))
        assert "sky" in (text := console.export_text()) and "12.3" in text and "Classes" in text
