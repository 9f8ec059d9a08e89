"""Mask AP against one COCOeval run over all images."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from conftest import SHARED, needs_shared
from maskcls_hf.metrics import MaskAP, Segments, pad_rows

NAMES = {3: "cat", 5: "dog", 9: "horse"}


class Image:
    """One image with true and predicted instances; scores are coarse, so that there are ties."""

    def __init__(self, rng: np.random.RandomState, truths: int, predictions: int):
        self.size = (int(rng.randint(100, 200)), int(rng.randint(100, 200)))
        self.masks = self._masks(rng, truths)
        self.labels = rng.choice([3, 5, 9, 7], truths)  # 7 is no class that counts
        self.crowd = rng.rand(truths) < 0.2
        self.areas = self.masks.sum((1, 2)) * rng.choice([0.8, 1.0, 1.2], truths)
        copies = [np.roll(m, rng.randint(-2, 3, 2), axis=(0, 1)) for m in self.masks if rng.rand() < 0.8]
        others = self._masks(rng, predictions)
        self.found = np.concatenate([np.array(copies, dtype=bool).reshape(-1, *self.size), others])
        self.found_labels = rng.choice([3, 5, 9, 7], len(self.found))
        self.found_labels[: len(copies)] = [label if rng.rand() < 0.8 else 3 for label in self.labels[: len(copies)]]
        self.scores = np.round(rng.rand(len(self.found)), 1)

    def _masks(self, rng: np.random.RandomState, number: int) -> np.ndarray:
        masks = np.zeros((number, *self.size), dtype=bool)
        for mask in masks:
            side = rng.choice([12, 60, 180])
            top, left = rng.randint(0, 60, 2)
            mask[top : top + rng.randint(side // 2, side), left : left + rng.randint(side // 2, side)] = True
        return masks

    def truth(self) -> Segments:
        return Segments(self.labels, self.masks, torch.from_numpy(self.crowd), torch.from_numpy(self.areas))

    def prediction(self) -> Segments:
        return Segments(self.found_labels, self.found, scores=torch.from_numpy(self.scores))


def images(seed: int, number: int = 6) -> list[Image]:
    rng = np.random.RandomState(seed)
    return [Image(rng, rng.randint(0, 7), rng.randint(0, 5)) for _ in range(number)]


def whole_run(pictures: list[Image], max_detections: int = 100) -> COCOeval:
    """pycocotools' evaluation of all images at once."""
    truth, results = COCO(), []
    annotations: list[dict] = []
    for image_id, picture in enumerate(pictures, start=1):
        for mask, label, crowd, area in zip(picture.masks, picture.labels, picture.crowd, picture.areas, strict=True):
            code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(label),
                    "segmentation": code,
                    "area": float(area),
                    "iscrowd": int(crowd),
                    "bbox": coco_mask.toBbox(code).tolist(),
                }
            )
        for mask, label, score in zip(picture.found, picture.found_labels, picture.scores, strict=True):
            code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            results.append(
                {"image_id": image_id, "category_id": int(label), "segmentation": code, "score": float(score)}
            )
    truth.dataset = {
        "info": {},
        "images": [
            {"id": i, "height": picture.size[0], "width": picture.size[1]} for i, picture in enumerate(pictures, 1)
        ],
        "categories": [{"id": i, "name": name} for i, name in {**NAMES, 7: "tree"}.items()],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.params.catIds = list(NAMES)
        evaluation.params.maxDets = [1, 10, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        if max_detections == 100:
            evaluation.summarize()
    return evaluation


def measured(metric: MaskAP, pictures: list[Image]) -> list[torch.Tensor]:
    return [metric.measure(picture.prediction(), picture.truth()) for picture in pictures]


SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


class TestEqualsCocoeval:
    @pytest.mark.parametrize("seed", range(8))
    def test_all_scores_bit_for_bit(self, seed: int):
        pictures = images(seed)
        metric = MaskAP(NAMES)
        for picture in pictures:
            metric.update(picture.prediction(), picture.truth())
        expected = whole_run(pictures)
        scores = metric.compute()
        wanted = [value if value > -1 else math.nan for value in expected.stats.tolist()]
        np.testing.assert_array_equal([scores[name] for name in SUMMARY], wanted[:6])
        np.testing.assert_array_equal(scores["ar"], wanted[8])
        for k, name in enumerate(NAMES.values()):
            precision = expected.eval["precision"][:, :, k, 0, -1]
            np.testing.assert_array_equal(
                metric.per_class()[name]["ap"], precision.mean() if precision.max() > -1 else math.nan
            )

    def test_precision_at_every_threshold_recall_class_and_area(self):
        pictures = images(11, number=30)
        metric = MaskAP(NAMES)
        metric.add(pad_rows(measured(metric, pictures)))
        precision, recall = metric.accumulated()
        expected = whole_run(pictures).eval
        np.testing.assert_array_equal(precision, expected["precision"][..., -1])
        np.testing.assert_array_equal(recall, expected["recall"][..., -1])
        assert (precision > 0).any((0, 1)).all(), "each class and area range must be tested"

    def test_fewer_detections_an_image(self):
        pictures = images(2, number=8)
        metric = MaskAP(NAMES, max_detections=2)
        for rows in measured(metric, pictures):
            metric.add(rows)
        expected = whole_run(pictures, max_detections=2).eval
        precision, recall = metric.accumulated()
        at = expected["params"].maxDets.index(2)
        np.testing.assert_array_equal(recall, expected["recall"][..., at])
        assert (recall != expected["recall"][..., -1]).any()

    def test_the_cases_hold_crowds_ties_and_areas(self):
        pictures = [picture for seed in range(8) for picture in images(seed)]
        assert sum(picture.crowd.sum() for picture in pictures) > 20
        areas = np.concatenate([picture.areas for picture in pictures])
        assert all(np.histogram(areas, [0, 32**2, 96**2, 1e10])[0] > 10)


@needs_shared
def test_real_annotations_with_crowds_equal_cocoeval():
    rng = np.random.RandomState(0)
    results = []
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(SHARED / "data" / "coco_panoptic_sample" / "panoptic_coco_detection_format.json"))
        for annotation in coco.dataset["annotations"]:
            annotation["id"] += 1  # from 0 in the file, and a match with annotation 0 is no match to pycocotools
        coco.createIndex()
    metric = MaskAP({category["id"]: category["name"] for category in coco.dataset["categories"]})
    for image in coco.dataset["images"]:
        true = coco.imgToAnns[image["id"]]
        masks = np.stack([coco.annToMask(annotation) for annotation in true]).astype(bool)
        labels = [annotation["category_id"] for annotation in true]
        crowd = [bool(annotation["iscrowd"]) for annotation in true]
        areas = [annotation["area"] for annotation in true]
        truth = Segments(labels, masks, torch.tensor(crowd), torch.tensor(areas))
        moved = np.stack([np.roll(mask, rng.randint(-3, 4, 2), axis=(0, 1)) for mask in masks])
        moved[crowd] &= rng.rand(*moved.shape[1:]) < 0.5  # within crowds, of low IoU with them
        scores = rng.rand(len(moved)).tolist()
        metric.update(Segments(labels, moved, scores=torch.tensor(scores, dtype=torch.float64)), truth)
        codes = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in moved]
        for code, label, score in zip(codes, labels, scores, strict=True):
            results.append({"image_id": image["id"], "category_id": label, "segmentation": code, "score": score})
    assert sum(annotation["iscrowd"] for annotation in coco.dataset["annotations"]) == 3
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = metric.compute()
    assert 0.2 < found["ap"] < 0.95
    assert [found[name] for name in SUMMARY] == evaluation.stats[:6].tolist() and found["ar"] == evaluation.stats[8]


def test_run_length_encodings_are_as_good_as_masks():
    for picture in images(4):
        found = picture.prediction()
        codes = [coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in found.masks]
        metric = MaskAP(NAMES)
        of_masks = metric.measure(found, picture.truth())
        assert torch.equal(metric.measure(dataclasses.replace(found, masks=codes), picture.truth()), of_masks)


def test_padded_batches_are_as_good_as_single_images():
    pictures = images(5)
    one, batches = MaskAP(NAMES), MaskAP(NAMES)
    rows = measured(one, pictures)
    for part in rows:
        one.add(part)
    batches.add(pad_rows(rows[:4]))
    batches.add(torch.nn.functional.pad(pad_rows(rows[4:]), (0, 0, 0, 3), value=-100))  # another process had more rows
    np.testing.assert_equal(one.compute(), batches.compute())


def test_perfect_empty_and_nothing():
    mask = torch.zeros(1, 40, 40).bool()
    mask[0, :10, :10] = True
    truth = Segments([3], mask)
    metric = MaskAP({3: "cat"})
    assert math.isnan(metric.compute()["ap"])
    metric.update(Segments([3], mask, scores=torch.tensor([0.9])), truth)
    scores = metric.compute()
    assert [scores["ap"], scores["ar"], scores["ap_small"]] == pytest.approx([1.0] * 3) and math.isnan(
        scores["ap_large"]
    )
    metric.reset()
    metric.update(Segments([], mask[:0], scores=torch.zeros(0)), truth)
    assert metric.compute()["ap"] == metric.compute()["ar"] == 0.0
    metric.reset()
    metric.update(Segments([3], mask, scores=torch.tensor([0.9])), Segments([], mask[:0]))
    assert math.isnan(metric.compute()["ap"])


def test_wrong_input():
    mask = torch.ones(1, 4, 4).bool()
    truth = Segments([3], mask)
    metric = MaskAP({3: "cat"})
    with pytest.raises(ValueError, match="size"):
        metric.measure(Segments([3], mask[:, :3], scores=torch.tensor([0.5])), truth)
    with pytest.raises(ValueError, match="NaN"):
        metric.measure(Segments([3], mask, scores=torch.tensor([math.nan])), truth)
    with pytest.raises(ValueError, match="by their scores, and there are none"):
        metric.measure(Segments([3], mask), truth)
    with pytest.raises(ValueError, match="1 masks, 2 class labels, 1 scores"):
        Segments([3, 3], mask, scores=torch.tensor([0.5]))
    with pytest.raises(ValueError, match="(..., D, 5)"):
        metric.add(torch.zeros(3, 4))
