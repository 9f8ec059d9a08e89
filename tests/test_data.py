"""Folders of images, augmentation, collation."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from conftest import SHARED, needs_shared
from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.data import CentreCrop, MaskClsCollator, ScaleJitterCrop, SegmentationFolder, train_transform
from maskcls_hf.data.transforms import RandomRotate90


def write_semantic(root: Path, sizes=((20, 30), (24, 16)), split: str = "train") -> Path:
    """Images (height, width) with class 0 on the left, 1 on the right, and a void corner."""
    (root / split / "images").mkdir(parents=True)
    (root / split / "labels").mkdir()
    (root / "labels.json").write_text(json.dumps({"0": "left", "1": "right"}))
    for index, (height, width) in enumerate(sizes):
        labels = np.zeros((height, width), dtype=np.uint8)
        labels[:, width // 2 :] = 1
        labels[:4, :4] = 255
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / split / "images" / f"{index}.png")
        Image.fromarray(labels).save(root / split / "labels" / f"{index}.png")
    return root


def write_instances(root: Path, split: str = "train", count: int = 4, size: int = 48) -> Path:
    """Bright squares, three in each image, on black; the third has id 300."""
    (root / split / "images").mkdir(parents=True)
    (root / split / "instances").mkdir()
    (root / "labels.json").write_text(json.dumps({"1": "square"}))
    for index in range(count):
        ids = np.zeros((size, size), dtype=np.uint16)
        for instance, top in ((1, 2), (2, size // 2), (300, size - 10)):
            left = 3 + 5 * index
            ids[top : top + 8, left : left + 8] = instance
        pixels = np.repeat((ids > 0)[..., None] * np.uint8(200), 3, axis=2)
        Image.fromarray(pixels).save(root / split / "images" / f"image{index}.png")
        Image.fromarray(ids).save(root / split / "instances" / f"image{index}.png")
    return root


class TestSegmentationFolder:
    def test_semantic(self, tmp_path):
        data = SegmentationFolder(write_semantic(tmp_path), "train")
        assert len(data) == 2
        assert data.id2label == {0: "left", 1: "right"}
        assert data.stuff_ids == [0, 1]
        sample = data[0]
        assert sample["image"].shape == (3, 20, 30) and sample["image"].dtype == torch.uint8
        assert sample["segmentation_map"].unique().tolist() == [0, 1, 255]
        assert sample["instance_id_to_semantic_id"] is None
        assert sample["name"] == "0"

    def test_instances(self, tmp_path):
        data = SegmentationFolder(write_instances(tmp_path), "train")
        assert data.id2label == {0: "background", 1: "square"}
        assert data.stuff_ids == [0]
        sample = data[0]
        assert sample["segmentation_map"].unique().tolist() == [0, 1, 2, 300]
        assert [sample["instance_id_to_semantic_id"][i] for i in (0, 1, 2, 300)] == [0, 1, 1, 1]

    def test_cache_gives_the_same(self, tmp_path):
        root = write_instances(tmp_path)
        cached, read = SegmentationFolder(root, "train", cache=True), SegmentationFolder(root, "train")
        for _ in range(2):
            assert torch.equal(cached[1]["image"], read[1]["image"])
        (root / "train" / "images" / "image1.png").unlink()
        assert torch.equal(cached[1]["segmentation_map"], cached[1]["segmentation_map"])

    def test_errors_name_what_is_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="No data set folder"):
            SegmentationFolder(tmp_path / "absent", "train")
        root = write_semantic(tmp_path / "data")
        with pytest.raises(FileNotFoundError, match=r"No split folder .*val.*train"):
            SegmentationFolder(root, "val")
        (root / "train" / "labels" / "1.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"1 images have no PNG .*: 1\."):
            SegmentationFolder(root, "train")
        (root / "train" / "images" / "1.png").unlink()
        (root / "train" / "images" / "0.png").rename(root / "train" / "images" / "other.png")
        (root / "train" / "labels" / "0.png").rename(root / "train" / "labels" / "other.png")
        Image.new("L", (4, 4)).save(root / "train" / "labels" / "extra.png")
        with pytest.raises(FileNotFoundError, match=r"1 label maps have no image .*: extra\."):
            SegmentationFolder(root, "train")
        (root / "labels.json").write_text("[]")
        (root / "train" / "labels" / "extra.png").unlink()
        with pytest.raises(ValueError, match="not a JSON object"):
            SegmentationFolder(root, "train")
        (root / "labels.json").unlink()
        with pytest.raises(FileNotFoundError, match="labels.json"):
            SegmentationFolder(root, "train")

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match="No images"):
            SegmentationFolder(write_semantic(tmp_path, sizes=()), "train")

    def test_no_labels_folder(self, tmp_path):
        root = write_semantic(tmp_path)
        (root / "train" / "labels").rename(root / "train" / "masks")
        with pytest.raises(FileNotFoundError, match="labels and instances"):
            SegmentationFolder(root, "train")

    def test_unfit_files_are_named_on_access(self, tmp_path):
        root = write_semantic(tmp_path)
        Image.new("L", (5, 6)).save(root / "train" / "labels" / "0.png")
        Image.new("RGB", (16, 24)).save(root / "train" / "labels" / "1.png")
        data = SegmentationFolder(root, "train")
        with pytest.raises(ValueError, match=r"0\.png is 5 x 6 pixels.* 30 x 20"):
            data[0]
        with pytest.raises(ValueError, match=r"1\.png has 3 channels"):
            data[1]
        (root / "train" / "images" / "0.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"0\.png cannot be read"):
            data[0]

    def test_two_classes_of_instances_are_refused(self, tmp_path):
        root = write_instances(tmp_path)
        (root / "labels.json").write_text(json.dumps({"1": "square", "2": "circle"}))
        with pytest.raises(ValueError, match="names 2 classes"):
            SegmentationFolder(root, "train")

    @needs_shared
    @pytest.mark.parametrize(("name", "classes"), [("dsb2018_nuclei", 2), ("camvid", 11), ("clothing_parsing_ccp", 59)])
    def test_real_folders(self, name, classes):
        data = SegmentationFolder(SHARED / "data" / name, "val")
        sample = data[len(data) - 1]
        assert len(data.id2label) == classes
        assert sample["image"].shape[-2:] == sample["segmentation_map"].shape[-2:]
        assert data.has_instances == (name == "dsb2018_nuclei")


def coordinates(size: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image whose red channel is the row, with the same rows as its map."""
    rows = torch.arange(size, dtype=torch.uint8)[:, None].expand(size, size)
    return tv_tensors.Image(rows.expand(3, size, size)), tv_tensors.Mask(rows[None].int())


class TestTransforms:
    @pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 2.0), (0.5, 0.5), (0.5, 2.0)])
    def test_image_and_map_stay_aligned(self, scale):
        image, ids = ScaleJitterCrop(32, scale)(*coordinates(80))
        assert image.shape == (3, 32, 32) and ids.shape == (1, 32, 32) and ids.dtype == torch.int32
        assert (image[:1].int() - ids).abs().max() <= 2

    def test_scale_two_shows_half_as_much(self):
        _, ids = ScaleJitterCrop(32, (2.0, 2.0))(*coordinates(80))
        assert ids.max() - ids.min() == 15

    def test_image_smaller_than_the_crop(self):
        image, ids = ScaleJitterCrop(32)(*coordinates(10))
        assert image.shape[-2:] == ids.shape[-2:] == (32, 32)
        assert ids.unique().tolist() == list(range(10))

    def test_scale_must_be_a_range(self):
        with pytest.raises(ValueError, match="scale"):
            ScaleJitterCrop(32, (2.0, 1.0))

    def test_quarter_turns_change_no_value(self):
        image, ids = coordinates(6)
        turned = {tuple(RandomRotate90()(image, ids)[1].flatten().tolist()) for _ in range(50)}
        assert turned == {tuple(torch.rot90(ids[0], k).flatten().tolist()) for k in range(4)}

    def test_train_transform_keeps_types_and_ids(self):
        image, ids = coordinates(80)
        transform = train_transform(32, any_orientation=True, any_contrast=True)
        for _ in range(10):
            new_image, new_ids = transform(image, ids)
            assert isinstance(new_image, tv_tensors.Image) and new_image.dtype == torch.uint8
            assert new_image.shape == (3, 32, 32)
            assert set(new_ids.unique().tolist()) <= set(range(80))

    def test_centre_crop(self):
        image, ids = CentreCrop(16)(*coordinates(20))
        assert ids[0, :, 0].tolist() == list(range(2, 18))
        assert CentreCrop(32)(image, ids)[1].shape == (1, 16, 16)


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
        collator = MaskClsCollator(MaskClsImageProcessor(num_labels=2), CentreCrop(32), do_resize=False)
        batch = collator([data[0]])
        assert batch["class_labels"][0].tolist() == [0, 1, 1, 1]  # rows 8..39 cut into all three squares
        assert batch["mask_labels"][0].flatten(1).sum(1).tolist()[1:] == [2 * 3, 8 * 3, 2 * 3]
        batch = MaskClsCollator(MaskClsImageProcessor(num_labels=2), CentreCrop(16), do_resize=False)([data[0]])
        assert batch["class_labels"][0].tolist() == [0]

    def test_nothing_padded_nothing_void(self, tmp_path):
        data = SegmentationFolder(write_instances(tmp_path), "train")
        batch = MaskClsCollator(MaskClsImageProcessor(), CentreCrop(32), do_resize=False)([data[0]])
        assert "pixel_mask" not in batch and "void_mask" not in batch

    def test_semantic_with_void(self, tmp_path):
        data = SegmentationFolder(write_semantic(tmp_path), "train")
        batch = MaskClsCollator(MaskClsImageProcessor(num_labels=2), do_resize=False)([data[0], data[1]])
        assert batch["void_mask"].sum((1, 2)).tolist() == [16, 16]
        assert [labels.tolist() for labels in batch["class_labels"]] == [[0, 1], [0, 1]]
        per_pixel = MaskClsImageProcessor(num_labels=2, label_format="semantic")
        labels = MaskClsCollator(per_pixel, do_resize=False)([data[0]])["labels"]
        assert torch.equal(labels[0, :20, :30], data[0]["segmentation_map"][0].long())

    def test_kinds_do_not_mix(self, tmp_path):
        semantic = SegmentationFolder(write_semantic(tmp_path / "a"), "train")
        instances = SegmentationFolder(write_instances(tmp_path / "b"), "train")
        with pytest.raises(ValueError, match="not both"):
            MaskClsCollator(MaskClsImageProcessor())([semantic[0], instances[0]])
