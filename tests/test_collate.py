"""Samples become batches."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.data import VOID, CenterCrop, CocoInstances, MaskClsCollator, SegmentationFolder, open_dataset
from maskcls_hf.metrics import Segments
from samples import id_map, sample_of
from test_data import write_ade20k, write_instances, write_semantic
from test_readers import HEIGHT, WIDTH, as_polygon, instances_json, write_coco, write_panoptic


class TestCollator:
    def test_instances(self, tmp_path):
        data = SegmentationFolder(write_instances(tmp_path), "train")
        collator = MaskClsCollator(MaskClsImageProcessor(num_labels=2), do_resize=False)
        batch = pickle.loads(pickle.dumps(collator))([data[0], data[1]])
        assert batch["pixel_values"].shape == (2, 3, 64, 64)
        assert batch["pixel_mask"].sum((1, 2)).tolist() == [48 * 48] * 2
        assert [labels.tolist() for labels in batch["class_labels"]] == [[0, 1, 1, 1]] * 2
        areas = batch["mask_labels"][0].flatten(1).sum(1).tolist()
        assert areas == [48 * 48 - 3 * 64, 64, 64, 64]

    def test_instances_that_leave_the_crop_drop_out(self, tmp_path):
        data = SegmentationFolder(write_instances(tmp_path), "train")
        collator = MaskClsCollator(MaskClsImageProcessor(num_labels=2), do_resize=False)
        batch = collator([CenterCrop(32)(data[0])])
        assert batch["class_labels"][0].tolist() == [0, 1, 1, 1]  # rows 8..39 cut into all three squares
        assert batch["mask_labels"][0].flatten(1).sum(1).tolist()[1:] == [2 * 3, 8 * 3, 2 * 3]
        batch = collator([CenterCrop(16)(data[0])])
        assert batch["class_labels"][0].tolist() == [0]

    def test_nothing_padded_nothing_void(self, tmp_path):
        data = SegmentationFolder(write_instances(tmp_path), "train")
        batch = MaskClsCollator(MaskClsImageProcessor(), do_resize=False)([CenterCrop(32)(data[0])])
        assert "pixel_mask" not in batch and "void_mask" not in batch

    def test_semantic_with_void(self, tmp_path):
        data = SegmentationFolder(write_semantic(tmp_path), "train")
        batch = MaskClsCollator(MaskClsImageProcessor(num_labels=2), do_resize=False)([data[0], data[1]])
        assert batch["void_mask"].sum((1, 2)).tolist() == [16, 16]
        assert [labels.tolist() for labels in batch["class_labels"]] == [[0, 1], [0, 1]]
        per_pixel = MaskClsImageProcessor(num_labels=2, label_format="semantic")
        labels = MaskClsCollator(per_pixel, do_resize=False)([data[0]])["labels"]
        assert torch.equal(labels[0, :20, :30], id_map(data[0])[0])

    def test_maps_of_classes_and_of_instances_in_one_batch(self, tmp_path):
        samples = [
            SegmentationFolder(write_semantic(tmp_path / "a"), "train")[0],
            SegmentationFolder(write_instances(tmp_path / "b"), "train")[0],
        ]
        collator = MaskClsCollator(MaskClsImageProcessor(num_labels=2), do_resize=False)
        batch, alone = collator(samples), [collator([sample]) for sample in samples]
        for place, one in enumerate(alone):
            height, width = one["pixel_values"].shape[-2:]
            assert torch.equal(batch["class_labels"][place], one["class_labels"][0])
            assert torch.equal(batch["mask_labels"][place][:, :height, :width], one["mask_labels"][0])
            void = one.get("void_mask", torch.zeros(1, height, width, dtype=torch.bool))
            assert torch.equal(batch["void_mask"][place, :height, :width], void[0])

    def test_crowds_and_unlabeled_pixels_are_void(self, tmp_path):
        data = open_dataset(write_panoptic(tmp_path), "train")
        collator = MaskClsCollator(MaskClsImageProcessor(**data.processor_fields()), do_resize=False)
        batch = collator([data[0]])
        assert sorted(batch["class_labels"][0].tolist()) == [1, 2]
        covered = batch["mask_labels"][0].any(0)
        assert int(batch["void_mask"].sum()) == HEIGHT * WIDTH - 36 - 300
        assert not (batch["void_mask"][0] & covered).any()

    @pytest.mark.parametrize("label_format", ["segments", "segment_map"])
    def test_background_of_instances_is_in_no_segment_and_counts(self, tmp_path, label_format):
        data = open_dataset(write_coco(tmp_path), "train")
        processor = MaskClsImageProcessor(**data.processor_fields(), label_format=label_format)
        batch = MaskClsCollator(processor, do_resize=False)([data[0], data[1]])
        assert [labels.tolist() for labels in batch["class_labels"]] == [[1, 0], []]
        assert batch["void_mask"].sum((1, 2)).tolist() == [12 * 13, 0]  # the crowd

    def test_overlapping_segments_beside_an_image_without_overlap(self, tmp_path):
        content = instances_json()
        content["annotations"][0]["segmentation"] = as_polygon(2, 3, 12, 9)  # on the second
        content["annotations"].append({**content["annotations"][1], "id": 5, "image_id": 9})
        data = open_dataset(write_coco(tmp_path, content), "train")
        stacked, mapped = data[0], data[1]
        assert stacked["segments"].overlap and not mapped["segments"].overlap
        collator = MaskClsCollator(MaskClsImageProcessor(**data.processor_fields()), do_resize=False)
        batch = collator([stacked, mapped])
        alone = [collator([sample]) for sample in (stacked, mapped)]
        for index in range(2):
            assert batch["class_labels"][index].tolist() == alone[index]["class_labels"][0].tolist()
            assert torch.equal(batch["mask_labels"][index], alone[index]["mask_labels"][0])
        assert batch["mask_labels"][0].flatten(1).sum(1).tolist() == [60, 72]
        assert int(batch["void_mask"].sum()) == 12 * 13

    def test_void_of_background_in_a_stack(self, tmp_path):
        content = instances_json()
        content["annotations"][0]["segmentation"] = as_polygon(2, 3, 12, 9)
        data = CocoInstances(write_coco(tmp_path, content), "train", background="void")
        batch = MaskClsCollator(MaskClsImageProcessor(num_labels=2), do_resize=False)([data[0], data[1]])
        image = torch.zeros(batch["void_mask"].shape[1:], dtype=torch.bool)
        image[:HEIGHT, :WIDTH] = True
        assert torch.equal(batch["void_mask"][0], image & ~batch["mask_labels"][0].any(0))
        assert torch.equal(batch["void_mask"][1], image)

    def test_classes_start_at_zero_whatever_the_files_of_the_image_processor(self, tmp_path):
        data = open_dataset(write_ade20k(tmp_path), "training")
        processor = MaskClsImageProcessor(num_labels=4, do_reduce_labels=True)
        batch = MaskClsCollator(processor, do_resize=False)([data[0]])
        assert batch["class_labels"][0].tolist() == [0, 2]
        assert int(batch["void_mask"].sum()) == 8 * 4

    def test_more_than_255_classes(self):
        pixels = torch.tensor([[[0, 255, 299, 65535]]], dtype=torch.int32).expand(1, 4, 4)
        sample = sample_of(pixels, name="wide", void_id=65535)
        processor = MaskClsImageProcessor(num_labels=300, void_id=65535)
        batch = MaskClsCollator(processor, do_resize=False)([sample])
        assert batch["class_labels"][0].tolist() == [0, 255, 299] and int(batch["void_mask"].sum()) == 4
        with pytest.raises(ValueError, match="void_id=255 of the image processor is a class"):
            MaskClsCollator(MaskClsImageProcessor(num_labels=300))([sample])
        sample = sample_of(pixels, {0: None, 255: 255, 299: 1, 65535: VOID})
        with pytest.raises(ValueError, match="void_id=255 of the image processor is a class"):
            MaskClsCollator(MaskClsImageProcessor(num_labels=300))([sample])

    def test_void_id_of_the_image_processor_marks_void_in_semantic_labels(self, tmp_path):
        data = SegmentationFolder(write_semantic(tmp_path), "train")
        processor = MaskClsImageProcessor(num_labels=2, void_id=100, label_format="semantic")
        labels = MaskClsCollator(processor, do_resize=False)([data[0]])["labels"]
        assert labels.unique().tolist() == [0, 1, 100]
        assert labels[0, 0, 0] == 100

    def test_ground_truth_has_the_original_size(self, tmp_path):
        data = open_dataset(write_panoptic(tmp_path), "train")
        processor = MaskClsImageProcessor(**data.processor_fields(), size={"height": 64, "width": 64})
        assert "ground_truth" not in MaskClsCollator(processor)([data[0]])
        batch = MaskClsCollator(processor, keep_ground_truth=True)([data[0]])
        (truth,) = batch["ground_truth"]
        assert isinstance(truth, Segments) and truth.size == (HEIGHT, WIDTH)
        assert batch["pixel_values"].shape[-2:] == (64, 64)
        found = zip(truth.class_labels.tolist(), truth.is_crowd.tolist(), strict=True)
        assert sorted(found) == [(1, False), (1, True), (2, False)]
        assert truth.is_crowd.sum() == 1 and truth.name == "7"

    def test_ground_truth_of_class_maps_knows_void(self, tmp_path):
        data = SegmentationFolder(write_semantic(tmp_path), "train")
        collator = MaskClsCollator(MaskClsImageProcessor(num_labels=2), keep_ground_truth=True)
        (truth,) = collator([data[0]])["ground_truth"]
        assert torch.equal(truth.semantic_map(255), id_map(data[0])[0])

    @pytest.mark.parametrize(
        ("row", "got"),
        [
            ({"image": np.zeros((4, 4, 3)), "label": np.zeros((4, 4))}, "a dict with image, label"),
            ({"pixel_values": 1, "labels": 2}, "a dict with pixel_values, labels"),
            ((np.zeros((4, 4, 3)), np.zeros((4, 4))), "tuple"),
        ],
    )
    def test_rows_of_a_table_are_no_samples(self, row, got):
        message = f"A sample is a dict with image and segments, .* got {got}. Rows of a table .* by .*SegmentationTable"
        with pytest.raises(ValueError, match=message):
            MaskClsCollator(MaskClsImageProcessor())([row])

    @pytest.mark.parametrize("form", ["channels_last", "channels_first"])
    def test_input_data_format_is_that_of_the_users_images(self, tmp_path, form):
        data = SegmentationFolder(write_instances(tmp_path), "train")
        expected = MaskClsCollator(MaskClsImageProcessor())([data[0], data[1]])
        found = MaskClsCollator(MaskClsImageProcessor(input_data_format=form))([data[0], data[1]])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])

    def test_errors_name_the_images(self, tmp_path):
        data = SegmentationFolder(write_semantic(tmp_path), "train")
        with pytest.raises(ValueError, match=r"outside the 1 classes.*this batch: 0, 1"):
            MaskClsCollator(MaskClsImageProcessor(num_labels=1))([data[0], data[1]])
