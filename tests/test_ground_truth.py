"""`Segments` of what the readers give: segments without a pixel are annotated, parts outside of a crop are not."""

from __future__ import annotations

import copy
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from maskcls_hf.data import CenterCrop, CocoInstances, CocoPanoptic, SegmentationTable
from maskcls_hf.data.sample import without_absent
from maskcls_hf.inference.evaluation import crops
from maskcls_hf.metrics import NO_SEGMENT, Evaluator, InstanceF1, MaskAP, PanopticQuality, Segments
from test_readers import HEIGHT, WIDTH, instances_json, panoptic_json, write_coco, write_panoptic


class TestSegmentsWithoutPixels:
    """They are annotated, so that a prediction misses them: as pycocotools and panopticapi count."""

    def samples(self, root: Path) -> dict[str, tuple]:
        content, ids = panoptic_json()
        content["annotations"][0]["segments_info"].append({"id": 9, "category_id": 3, "iscrowd": 0, "area": 0})
        flat = instances_json()
        empty = {"id": 999, "image_id": 7, "category_id": 3, "segmentation": {"size": [HEIGHT, WIDTH]}}
        empty["segmentation"]["counts"] = [HEIGHT * WIDTH]
        flat["annotations"].append(empty)
        overlapping = copy.deepcopy(flat)
        overlapping["annotations"].append({**flat["annotations"][1], "id": 1000})
        row = {"image": np.zeros((2, 4, 3), np.uint8), "label": [[0, 0, 1, 1]] * 2}
        row["s"] = [{"id": 1, "label": 3}, {"id": 2, "label": 90}]
        return {
            "panoptic": CocoPanoptic(write_panoptic(root / "p", content), "train"),
            "instances": CocoInstances(write_coco(root / "i", flat), "train"),
            "overlapping": CocoInstances(write_coco(root / "o", overlapping), "train"),
            "table": SegmentationTable(
                datasets.Dataset.from_list([row]), id2label={3: "a", 90: "b"}, segments_column="s"
            ),
        }

    @pytest.mark.parametrize("name", ["panoptic", "instances", "overlapping", "table"])
    def test_are_missed(self, tmp_path, name):
        data = self.samples(tmp_path)[name]
        truth = data[0]["segments"]
        empty = [place for place, mask in enumerate(truth.stack) if not mask.any()]
        assert len(empty) == 1 and not truth.is_crowd[empty[0]]
        label = int(truth.class_labels[empty[0]])
        found = [mask for place, mask in enumerate(truth.stack) if place not in empty and not truth.is_crowd[place]]
        labels = [
            int(truth.class_labels[p])
            for p in range(len(truth.class_labels))
            if p not in empty and not truth.is_crowd[p]
        ]
        masks = torch.stack(found)
        for metric, predicted in (
            (InstanceF1(data.id2label), Segments(labels, masks)),
            (MaskAP(data.id2label), Segments(labels, masks, scores=torch.full((len(labels),), 0.9))),
        ):
            metric.update(predicted, truth)
            scores = metric.per_class()[metric.names[label]]
            of_class = int(((truth.class_labels == label) & ~truth.is_crowd).sum())
            assert scores["recall" if "recall" in scores else "ar"] == pytest.approx((of_class - 1) / of_class)
        if name != "overlapping":
            metric = PanopticQuality(data.id2label, data.stuff_ids)
            metric.update(Segments([], torch.full(truth.size, NO_SEGMENT)), truth)
            assert metric.sums[3].sum() == (~truth.is_crowd).sum()  # all are missed

    @pytest.mark.parametrize("name", ["panoptic", "instances", "overlapping", "table"])
    def test_crops_have_none(self, tmp_path, name):
        """What lies outside of a crop is not annotated in it."""
        sample = self.samples(tmp_path)[name][0]
        for crop in [*crops(sample, 6), without_absent(CenterCrop(6)(sample))]:
            truth = crop["segments"]
            assert len(truth.visible) == len(truth.class_labels) == len(truth.is_crowd)

    def test_many_listed_segments_take_no_memory_for_pixels(self):
        """100,000 masks of 64 x 64 would be 400 MB."""
        number = 100_000
        pixels = torch.ones((64, 64), dtype=torch.int32)
        classes = dict.fromkeys(range(1, number + 1), 0)
        truth = Segments.from_ids(pixels, classes)
        assert len(truth.class_labels) == number and truth.visible == [0] and len(truth.mask_runs) == number
        tracemalloc.start()
        metric = InstanceF1({0: "a"})
        metric.update(Segments([0], np.ones((1, 64, 64), dtype=bool)), truth)
        assert metric.sums[:, 0].tolist() == [1, 0, number - 1]
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()

    @pytest.mark.parametrize("overlap", [False, True])
    def test_many_small_instances_take_no_memory_for_the_whole_image(self, overlap):
        """400 masks of 512 x 512 in 32 bits, of which pixels were counted, are 420 MB."""
        ids = torch.arange(400).view(20, 20).repeat_interleave(25, 0).repeat_interleave(25, 1)
        ids = torch.nn.functional.pad(ids, (0, 12, 0, 12), value=-1)
        pixels = torch.stack([ids == i for i in range(400)]) if overlap else ids.int()
        classes = dict.fromkeys(range(400), 0) | ({} if overlap else {-1: None})
        truth = Segments.from_ids(pixels, classes)
        infos = [{"id": i, "label_id": 0, "score": 0.5} for i in range(400)]
        maps = {"panoptic": {"segmentation": ids, "segments_info": infos}}
        maps["instance"] = {"segmentation": truth.run_lengths, "segments_info": infos}
        evaluator = Evaluator(None, {0: "a"}, tasks=("panoptic", "instance"), max_detections=1)
        tracemalloc.start()
        evaluator.add(evaluator.measure_maps([maps], [truth]))
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
        scores = evaluator.compute()
        assert scores["f1"] == scores["pq"] == 1

    def test_background_without_a_pixel_is_no_annotation(self, tmp_path):
        content = instances_json()
        whole = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
        content["annotations"] = [{"id": 1, "image_id": 7, "category_id": 3, "segmentation": whole}]
        for copies in (1, 2):
            content["annotations"] *= copies
            data = CocoInstances(write_coco(tmp_path / str(copies), content), "train", background="class")
            assert data[0]["segments"].class_labels.tolist() == [data.class_of_label[3]] * copies
