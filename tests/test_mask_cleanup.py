"""Instances without stuff and duplicates, segments without small holes and fragments; all of it can be switched off."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from scipy import ndimage

from checkpoints import STUFF, image_processor, maskcls_model, picture
from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.inference import MaskRuns
from maskcls_hf.metrics import Evaluator
from maskcls_hf.models.mask_cleanup import clean_map, clean_masks, clean_windows, mask_boxes
from maskcls_hf.models.post_processing import ResizeGeometry, instance_segments, maps_of

OFF = {"max_mask_iou": 1.0, "max_hole_share": 0.0, "min_fragment_share": 0.0}
SHARES = [(0.0, 0.0), (0.05, 0.0), (0.0, 0.05), (0.3, 0.3), (1.0, 1.0)]


def cleaned(mask: np.ndarray, max_hole_share: float, min_fragment_share: float) -> np.ndarray:
    """Pixel by pixel, with scipy: fragments touch at no corner, holes at no side."""
    mask, area = mask.copy(), mask.sum()
    parts, number = ndimage.label(mask, np.ones((3, 3)))
    areas = np.bincount(parts.ravel(), minlength=number + 1)
    for part in range(1, number + 1):
        if areas[part] < min_fragment_share * area and areas[part] < areas[1:].max():
            mask[parts == part] = False
    area = mask.sum()
    parts, number = ndimage.label(~mask)
    outside = {*parts[0], *parts[-1], *parts[:, 0], *parts[:, -1]}
    for part in range(1, number + 1):
        if max_hole_share and part not in outside and (parts == part).sum() <= max_hole_share * area:
            mask[parts == part] = True
    return mask


def blob(rng: np.random.Generator, size: tuple[int, int], blur: float) -> np.ndarray:
    values = ndimage.gaussian_filter(rng.random(size), blur)
    return values > np.median(values)


def outputs_of(masks: np.ndarray, probabilities: list[list[float]]) -> SimpleNamespace:
    """Of masks (N, h, w) at the size of the image, and class probabilities (N, K + 1)."""
    return SimpleNamespace(
        class_queries_logits=torch.tensor(probabilities).clamp(min=1e-9).log()[None],
        masks_queries_logits=torch.where(torch.from_numpy(masks), 9.0, -9.0)[None],
    )


def squares(*places: tuple[int, int, int]) -> np.ndarray:
    """Masks (N, 40, 60) of squares: top, left, side."""
    masks = np.zeros((len(places), 40, 60), dtype=bool)
    for mask, (top, left, side) in zip(masks, places, strict=True):
        mask[top : top + side, left : left + side] = True
    return masks


class TestHolesAndFragments:
    @pytest.mark.parametrize("blur", [0.0, 0.7, 1.5])
    def test_masks_are_those_of_scipy(self, blur):
        rng = np.random.default_rng(0)
        for _ in range(20):
            masks = [blob(rng, tuple(rng.integers(1, 40, 2)), blur) for _ in range(5)]
            for shares in SHARES:
                expected = [cleaned(mask, *shares) for mask in masks]
                found = [mask.copy() for mask in masks]
                areas = clean_windows(found, *shares)
                for place, (one, other, before) in enumerate(zip(found, expected, masks, strict=True)):
                    np.testing.assert_array_equal(one, other)
                    assert (place in areas) == (one != before).any()
                    assert areas.get(place, before.sum()) == one.sum()

    @pytest.mark.parametrize("shares", SHARES)
    def test_maps_are_those_of_masks_that_do_not_touch(self, shares):
        rng = np.random.default_rng(1)
        ids = np.zeros((100, 130), dtype=np.int32)
        for number in range(12):
            top, left = 32 * (number // 4), 32 * (number % 4)
            ids[top + 1 : top + 31, left + 1 : left + 31] = (number + 1) * blob(rng, (30, 30), 1.0)
        infos = [dict(id=n, was_fused=n < 3, area=int((ids == n).sum())) for n in range(1, 13)]
        found, found_infos = clean_map(torch.from_numpy(ids), infos, *shares)
        expected = np.zeros_like(ids)
        for info in infos:
            mask = cleaned(ids == info["id"], shares[0], 0 if info["was_fused"] else shares[1])
            expected[mask] = info["id"]
        np.testing.assert_array_equal(found.numpy(), expected)
        assert found.dtype == torch.int32
        assert [info["area"] for info in found_infos] == [int((expected == n).sum()) for n in range(1, 13)]

    def test_what_another_segment_fills_is_no_hole(self):
        """A window in a wall stays a window; a gap between two segments stays a gap; a dropped speck becomes wall."""
        ids = np.zeros((20, 30), dtype=np.int32)
        ids[2:18, 2:28] = 1
        ids[5:9, 5:9] = 2  # a window
        ids[10, 20] = 2  # its fragment
        ids[12:14, 5:9], ids[12:14, 9:12] = 0, 2  # a gap beside both
        infos = [dict(id=n, was_fused=n == 1, area=int((ids == n).sum())) for n in (1, 2)]
        found, (wall, window) = clean_map(torch.from_numpy(ids), infos, 0.05, 0.1)
        assert found[10, 20] == 1 and (found[5:9, 5:9] == 2).all() and (found[12:14, 5:9] == 0).all()
        assert wall["area"] == infos[0]["area"] + 1 and window["area"] == infos[1]["area"] - 1

    def test_runs_of_masks(self):
        rng = np.random.default_rng(2)
        masks = np.zeros((4, 40, 60), dtype=bool)
        for mask in masks[:3]:
            mask[5:35, 7:47] = blob(rng, (30, 40), 1.0)
        infos = [dict(id=place, area=int(mask.sum())) for place, mask in enumerate(masks)]
        found, found_infos = clean_masks(MaskRuns.of_masks(masks), infos, 0.1, 0.2)
        for runs, mask, info in zip(found, masks, found_infos, strict=True):
            np.testing.assert_array_equal(runs.dense(), cleaned(mask, 0.1, 0.2))
            assert info["area"] == runs.dense().sum()
        assert infos[0]["area"] == masks[0].sum()  # what was given is left as it is

    def test_a_segment_never_vanishes(self):
        mask = np.zeros((9, 9), dtype=bool)
        mask[::2, ::2] = True
        assert clean_windows([mask], 0.0, 1.0) == {} and mask.sum() == 25  # all parts are as large as the largest


class TestInstances:
    def find(self, outputs, stuff=(), **options):
        processor = MaskClsImageProcessor(label_ids_to_fuse=stuff)
        return processor.post_process_instance_segmentation(outputs, return_binary_maps=True, **options)[0]

    def test_stuff_is_no_instance_and_takes_no_place(self):
        outputs = outputs_of(squares((0, 0, 30), (2, 40, 8)), [[0.9, 0.05, 0.05], [0.1, 0.8, 0.1]])
        assert [info["label_id"] for info in self.find(outputs, [0])["segments_info"]] == [1]
        assert [info["label_id"] for info in self.find(outputs)["segments_info"]] == [0, 1]
        assert len(self.find(outputs, [0], label_ids_to_fuse=[])["segments_info"]) == 2  # the paper's code
        assert self.find(outputs, [0, 1])["segments_info"] == []
        with pytest.raises(ValueError, match=r"the model has classes 0 to 1, not \[2\]"):
            self.find(outputs, [2])

    def test_one_class(self):
        outputs = outputs_of(squares((0, 0, 30), (2, 40, 8)), [[0.9, 0.1], [0.2, 0.8]])
        assert [info["area"] for info in self.find(outputs)["segments_info"]] == [900]

    def test_of_two_masks_of_one_object_the_better_stays(self):
        masks = squares((5, 5, 20), (5, 6, 20), (5, 6, 20), (5, 9, 20))  # IoU with the first: 0.9, 0.9, 0.67
        outputs = outputs_of(masks, [[0.7, 0, 0.3], [0.9, 0, 0.1], [0, 0.8, 0.2], [0.6, 0, 0.4]])
        found = self.find(outputs)
        assert [info["score"] for info in found["segments_info"]] == pytest.approx([0.9, 0.8, 0.6], abs=1e-3)
        assert [info["label_id"] for info in found["segments_info"]] == [0, 1, 0]
        np.testing.assert_array_equal(found["segmentation"].numpy(), masks[[1, 2, 3]])
        assert len(self.find(outputs, max_mask_iou=1.0)["segments_info"]) == 4
        assert len(self.find(outputs, max_mask_iou=0.5)["segments_info"]) == 2

    @pytest.mark.parametrize("max_mask_iou", [0.0, 0.3, 0.8])
    def test_duplicates_are_those_of_pycocotools(self, max_mask_iou):
        rng = np.random.default_rng(0)
        places = [(*rng.integers(0, 25, 2), rng.integers(8, 16)) for _ in range(40)]
        scores = rng.permutation(np.linspace(0.55, 0.95, 40))
        labels = rng.integers(0, 2, 40)
        probabilities = np.full((40, 3), 0.0)
        probabilities[np.arange(40), labels], probabilities[:, 2] = scores, 1 - scores
        masks = squares(*places)
        encoded = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
        ious = coco_mask.iou(encoded, encoded, [0] * 40)
        kept: list[int] = []
        for place in np.argsort(-scores):
            if all(labels[place] != labels[other] or ious[place, other] <= max_mask_iou for other in kept):
                kept.append(place)
        found = self.find(outputs_of(masks, probabilities.tolist()), max_mask_iou=max_mask_iou)
        np.testing.assert_array_equal(found["segmentation"].numpy(), masks[kept])
        assert 2 <= len(kept) < 40

    @pytest.mark.parametrize("options", [{}, OFF, {"max_mask_iou": 0.2, "min_fragment_share": 0.3}])
    def test_map_masks_and_encodings_agree(self, options):
        with torch.no_grad():
            outputs = maskcls_model()(**image_processor()(picture(90, 120), return_tensors="pt"))
        find = image_processor().post_process_instance_segmentation
        masks = find(outputs, 0.1, return_binary_maps=True, **options)[0]
        as_map, encoded = (
            find(outputs, 0.1, **options)[0],
            find(outputs, 0.1, return_coco_annotation=True, **options)[0],
        )
        assert masks["segments_info"] == as_map["segments_info"] == encoded["segments_info"]
        assert [info["area"] for info in masks["segments_info"]] == masks["segmentation"].sum((1, 2)).tolist()
        expected = torch.full((90, 120), -1, dtype=torch.int32)
        for place in reversed(range(len(masks["segmentation"]))):
            expected[masks["segmentation"][place]] = place
        torch.testing.assert_close(as_map["segmentation"], expected)
        for rle, mask in zip(encoded["segmentation"], masks["segmentation"], strict=True):
            np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), mask.numpy())
        assert all(info["label_id"] not in STUFF for info in masks["segments_info"])

    def test_boxes_hold_their_masks_whatever_the_sizes(self):
        rng = np.random.default_rng(3)
        logits = torch.from_numpy(rng.normal(size=(8, 12, 15))).float() - 2
        for padded, valid, target in (
            ((48, 60), (48, 60), (48, 60)),
            ((48, 60), (41, 37), (200, 90)),
            ((24, 90), (20, 90), (7, 9)),
        ):
            maps = maps_of(logits, padded, valid, target)
            masks = maps.masks(logits, 0.0)
            sizes = ResizeGeometry.checked(logits, padded, valid, target)
            for mask, (top, left, bottom, right) in zip(masks, mask_boxes(logits, 0.0, sizes), strict=True):
                assert mask[top:bottom, left:right].sum() == mask.sum()

    def test_switched_off_it_is_what_it_was(self):
        with torch.no_grad():
            outputs = maskcls_model()(**image_processor()(picture(90, 120), return_tensors="pt"))
        logits = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
        sizes = dict(padded_size=outputs.padded_sizes[0], valid_size=outputs.valid_sizes[0], target_size=(90, 120))
        masks, infos = instance_segments(*logits, **sizes, threshold=0.1)
        find = image_processor().post_process_instance_segmentation
        off = find(outputs, 0.1, return_binary_maps=True, label_ids_to_fuse=[], **OFF)[0]
        torch.testing.assert_close(off["segmentation"], masks)
        assert [info["score"] for info in off["segments_info"]] == [info["score"] for info in infos]
        assert len(find(outputs, 0.1, return_binary_maps=True)[0]["segments_info"]) < len(infos)


def test_scores_are_made_without_unless_the_model_or_the_caller_says_so():
    """As with the paper's code."""
    evaluator = Evaluator(MaskClsImageProcessor(label_ids_to_fuse=[0]), {0: "a", 1: "b"}, [0], ("panoptic", "instance"))
    assert evaluator.options["instance"] == OFF | {"threshold": 0.0, "mask_threshold": 0.5, "label_ids_to_fuse": []}
    shares = {"max_hole_share": 0.0, "min_fragment_share": 0.0}
    assert shares.items() <= evaluator.options["panoptic"].items()
    saved = MaskClsImageProcessor(
        inference_defaults={"panoptic": {"max_hole_share": 0.2}, "instance": {"max_mask_iou": 0.4}}
    )
    options = Evaluator(saved, {0: "a"}, (), ("panoptic", "instance")).options
    assert options["panoptic"]["max_hole_share"] == 0.2 and options["instance"]["max_mask_iou"] == 0.4
    given = Evaluator(
        saved, {0: "a"}, (), ("panoptic", "instance"), post_processing={"instance": {"max_mask_iou": 0.9}}
    )
    assert given.options["instance"]["max_mask_iou"] == 0.9
    with pytest.raises(ValueError, match=r"post_processing\['panoptic'\] has no key 'max_mask_iou'"):
        Evaluator(saved, {0: "a"}, (), ("panoptic",), post_processing={"panoptic": {"max_mask_iou": 0.9}})
