"""Folders of images with label maps; the layouts of ADE20K and Cityscapes; what is found in a folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch.utils.data import DataLoader

from conftest import SHARED, needs_shared
from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.data import (
    Ade20k,
    AugmentedDataset,
    Cityscapes,
    MaskClsCollator,
    SegmentationFolder,
    open_dataset,
)
from maskcls_hf.data.errors import DataError, told_of_workers
from maskcls_hf.data.files import read_class_names
from maskcls_hf.data.sample import VOID
from maskcls_hf.data.validation import validate_dataset
from samples import class_of_id, crowd_ids, id_map, others
from tiny import maskcls_config


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
        assert id_map(sample).unique().tolist() == [0, 1, 255]
        assert class_of_id(sample) == {0: 0, 1: 1}
        assert sample["segments"].name == "0"

    def test_instances(self, tmp_path):
        data = SegmentationFolder(write_instances(tmp_path), "train")
        assert data.id2label == {0: "background", 1: "square"}
        assert data.stuff_ids == [0]
        sample = data[0]
        assert id_map(sample).unique().tolist() == [0, 1, 2, 300] and others(sample) == set()
        assert class_of_id(sample) == {0: 0, 1: 1, 2: 1, 300: 1}

    @pytest.mark.parametrize(
        ("void_values", "classes"),
        [
            ((), {0: 0, 1: 1, 255: 1}),  # 255 is an instance like others
            ([255], {0: 0, 1: 1, 255: VOID}),  # the border in Pascal VOC's SegmentationObject
            (255, {0: 0, 1: 1, 255: VOID}),
            ([0, 255], {0: VOID, 1: 1, 255: VOID}),
        ],
    )
    def test_void_in_instance_maps(self, tmp_path, void_values, classes):
        """Reader, truth, targets of the training and validate agree."""
        ids = np.zeros((20, 30), dtype=np.uint8)
        ids[4:12, 4:12], ids[5:11, 5:11] = 255, 1
        root = write_instances(tmp_path, count=1)
        Image.fromarray(ids).save(root / "train/instances/image0.png")
        Image.new("RGB", (30, 20)).save(root / "train/images/image0.png")
        data = open_dataset(root, "train", void_values=void_values)
        assert class_of_id(data[0]) == {i: label for i, label in classes.items() if label != VOID}
        truth = data[0]["segments"]
        things = sum(label == 1 for label in classes.values())
        assert truth.class_labels.tolist().count(1) == things
        void = sum((ids == i).sum() for i, label in classes.items() if label == VOID)
        assert (truth.index_map == VOID).sum() == void
        batch = MaskClsCollator(MaskClsImageProcessor(**data.processor_fields()), do_resize=False)([data[0]])
        assert batch["class_labels"][0].tolist().count(1) == things
        assert (void and batch["void_mask"].sum()) == void
        report = validate_dataset(root, ["train"], options={"void_values": void_values}, workers=1)
        assert report.splits[0].void_pixels == void and report.splits[0].classes[1].segments == things
        assert report.ok and ("mask_255" in report.grouped()) == (classes[255] != VOID)

    @pytest.mark.parametrize("largest", [2**16, 2**24 - 1, 2**31 - 1])
    def test_memory_goes_with_the_ids_that_occur(self, tmp_path, largest):
        root = write_instances(tmp_path, count=1)
        ids = np.zeros((48, 48), dtype=np.int32)
        ids[5:9, 5:9] = largest
        (root / "train/instances/image0.png").unlink()
        Image.fromarray(ids).save(root / "train/instances/image0.tif")
        data = SegmentationFolder(root, "train")
        assert class_of_id(data[0]) == {0: 0, largest: 1}
        batch = MaskClsCollator(MaskClsImageProcessor(**data.processor_fields()), keep_ground_truth=True)([data[0]])
        assert batch["class_labels"][0].tolist() == [0, 1] == batch["ground_truth"][0].class_labels.tolist()

    @pytest.mark.parametrize(("dtype", "wrong"), [(np.int32, -2), (np.uint32, 2**32 - 1)])
    def test_ids_that_are_none(self, tmp_path, dtype, wrong):
        root = write_instances(tmp_path, count=1)
        (root / "train/instances/image0.png").unlink()
        tifffile.imwrite(root / "train/instances/image0.tif", np.full((48, 48), wrong, dtype=dtype))
        with pytest.raises(ValueError, match=rf"image0\.tif holds ids .*{wrong}"):
            SegmentationFolder(root, "train")[0]
        assert {f.kind for f in validate_dataset(root, ["train"], workers=1).findings} >= {"ids_outside"}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"void_values": "255"}, "void_values='255': needs label values"),
            ({"void_values": ["255"]}, "void_values: '255' is no label value"),
            ({"void_values": [1.5]}, "void_values: 1.5 is no label value"),
            ({"void_values": True}, "void_values: True is no label value"),
            ({"void_values": [70000]}, "Label values lie in 0..65535, got 70000"),
            ({"void_values": [1]}, r"Label values 1 are classes and void at once"),
            ({"instances": "no"}, "instances='no': needs true or false"),
            ({"background": "sky"}, "background='sky' names class 0 of instance maps"),
            ({"image_folder": "{nothing}/images"}, "nothing"),
        ],
    )
    def test_wrong_options_are_named(self, tmp_path, options, message):
        root = write_semantic(tmp_path)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_dataset(root, "train", "folder", **options)
        report = validate_dataset(root, ["train"], "folder", options=options, workers=1)
        assert not report.ok and any(re.search(message, f"{f.message} {f.file}") for f in report.findings)

    def test_a_config_json_of_something_else(self, tmp_path):
        root = write_semantic(tmp_path)
        (root / "labels.json").unlink()
        (root / "config.json").write_text('{"labels": [{"name": "a"}]}')
        with pytest.raises(ValueError, match=r"config\.json is not Mapillary's"):
            open_dataset(root, "train")

    def test_cache_gives_the_same(self, tmp_path):
        root = write_instances(tmp_path)
        cached, read = SegmentationFolder(root, "train", cache=True), SegmentationFolder(root, "train")
        for _ in range(2):
            assert torch.equal(cached[1]["image"], read[1]["image"])
        (root / "train" / "images" / "image1.png").unlink()
        assert torch.equal(id_map(cached[1]), id_map(cached[1]))

    def test_errors_name_what_is_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="No data set folder"):
            SegmentationFolder(tmp_path / "absent", "train")
        root = write_semantic(tmp_path / "data")
        with pytest.raises(FileNotFoundError, match=r"No split folder .*val.*train"):
            SegmentationFolder(root, "val")
        (root / "train" / "labels" / "1.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"1 images have no label map .*: 1\."):
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
        with pytest.raises(FileNotFoundError, match="labels, semantic, instances"):
            SegmentationFolder(root, "train")

    def test_unfit_files_are_named_on_access(self, tmp_path):
        root = write_semantic(tmp_path)
        Image.new("L", (5, 6)).save(root / "train" / "labels" / "0.png")
        Image.new("RGB", (16, 24)).save(root / "train" / "labels" / "1.png")
        data = SegmentationFolder(root, "train")
        with pytest.raises(ValueError, match=r"0\.png is 5 x 6 pixels.* 30 x 20"):
            data[0]
        with pytest.raises(ValueError, match=r"1\.png: the segmentation map is an image of mode 'RGB'"):
            data[1]
        (root / "train" / "images" / "0.png").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"0\.png cannot be read"):
            data[0]

    def test_two_classes_of_instances_are_refused(self, tmp_path):
        root = write_instances(tmp_path)
        (root / "labels.json").write_text(json.dumps({"1": "square", "2": "circle"}))
        with pytest.raises(ValueError, match="names 2 classes"):
            SegmentationFolder(root, "train")

    def test_gaps_in_the_label_values_are_closed(self, tmp_path):
        root = write_semantic(tmp_path)
        (root / "labels.json").write_text(json.dumps({"7": "left", "300": "right"}))
        for path in (root / "train" / "labels").iterdir():
            old = np.array(Image.open(path))
            new = np.select([old == 0, old == 1], [7, 300], 65535)
            Image.fromarray(new.astype(np.uint16)).save(path)
        data = SegmentationFolder(root, "train")
        assert data.id2label == {0: "left", 1: "right"} and data.label_ids == [7, 300] and data.void_id == 255
        ids = id_map(data[0])[0]
        assert data[0]["segments"].index_map.dtype == torch.int8
        assert ids[0, [0, 5, 20]].tolist() == [255, 0, 1]
        assert data.raw_map(0)[0, [0, 5, 20]].tolist() == [65535, 7, 300]

    def test_more_than_255_classes(self, tmp_path):
        root = write_semantic(tmp_path)
        (root / "labels.json").write_text(json.dumps({str(i): f"class {i}" for i in range(300)}))
        labels = np.full((20, 30), 255, dtype=np.uint16)  # a class here
        labels[0], labels[1] = 65535, 299
        Image.fromarray(labels).save(root / "train" / "labels" / "0.png")
        data = SegmentationFolder(root, "train")
        ids = id_map(data[0], void=data.void_id)[0]
        assert data.void_id == 65535 and data.processor_fields()["void_id"] == 65535
        assert ids[:3, 0].tolist() == [65535, 299, 255]
        assert data[0]["segments"].index_map[:3, 0].tolist() == [VOID, 1, 0]

    def test_a_value_that_is_no_class_names_file_and_value(self, tmp_path):
        root = write_semantic(tmp_path)
        labels = np.full((20, 30), 9, dtype=np.uint8)
        Image.fromarray(labels).save(root / "train" / "labels" / "0.png")
        with pytest.raises(ValueError, match=r"0\.png holds label values 9 \(100.0% .*values 0\.\.1; void is 255"):
            SegmentationFolder(root, "train")[0]
        assert id_map(SegmentationFolder(root, "train", void_values=[9])[0]).unique().tolist() == [255]

    def test_fields_of_model_and_image_processor(self, tmp_path):
        data = SegmentationFolder(write_instances(tmp_path), "train")
        config = maskcls_config(**data.model_fields())
        assert config.num_labels == 2 and config.label2id == {"background": 0, "square": 1}
        processor = MaskClsImageProcessor(**data.processor_fields())
        assert (processor.num_labels, processor.label_ids_to_fuse, processor.void_id) == (2, [0], 255)

    def test_two_classes_of_one_name_are_told_apart(self, tmp_path):
        root = write_semantic(tmp_path)
        (root / "labels.json").write_text(json.dumps({"0": "wall", "1": "wall"}))
        fields = SegmentationFolder(root, "train").model_fields()
        assert fields["label2id"] == {"wall (0)": 0, "wall (1)": 1}

    def test_sizes_are_those_of_the_samples_also_turned_by_exif(self, tmp_path):
        root = write_semantic(tmp_path)
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn
        Image.new("RGB", (20, 30)).save(root / "train" / "images" / "0.png", exif=exif)
        data = SegmentationFolder(root, "train")
        assert data.sizes() == [tuple(sample["image"].shape[-2:]) for sample in data] == [(20, 30), (24, 16)]

    @pytest.mark.parametrize("kind", ["gray", "palette", "rgba", "16 bit", "one bit"])
    def test_images_are_read_as_the_image_processor_reads_them(self, tmp_path, kind):
        root = write_semantic(tmp_path, sizes=((20, 30),))
        path = root / "train" / "images" / "0.png"
        original = Image.open(path)
        modes = {"gray": "L", "palette": "P", "rgba": "RGBA", "one bit": "1"}
        if kind == "16 bit":
            values = np.random.default_rng(0).integers(0, 4096, (20, 30), dtype=np.uint16)
            Image.fromarray(values).save(path)
        else:
            original.convert(modes[kind]).save(path)
        processor = MaskClsImageProcessor(do_resize=False, do_pad=False)
        expected = processor(Image.open(path), return_tensors="pt")["pixel_values"]
        image = SegmentationFolder(root, "train")[0]["image"]
        assert torch.equal(processor(image.as_subclass(torch.Tensor), return_tensors="pt")["pixel_values"], expected)

    def test_a_palette_label_map_gives_its_indices(self, tmp_path):
        root = write_semantic(tmp_path)
        path = root / "train" / "labels" / "0.png"
        labels = Image.open(path)
        labels.putpalette([7 * i % 256 for i in range(768)])
        labels.save(path)
        assert Image.open(path).mode == "P"
        assert id_map(SegmentationFolder(root, "train")[0]).unique().tolist() == [0, 1, 255]

    @pytest.mark.parametrize("folder", ["images", "labels"])
    def test_a_truncated_file_is_named(self, tmp_path, folder):
        root = write_semantic(tmp_path, sizes=((64, 64),))
        path = root / "train" / folder / "0.png"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ValueError, match=rf"{folder}/0\.png cannot be read as an image"):
            SegmentationFolder(root, "train")[0]

    def test_an_index_out_of_range_ends_iteration(self, tmp_path):
        data = SegmentationFolder(write_semantic(tmp_path), "train")
        assert [sample["segments"].name for sample in data] == ["0", "1"]
        assert data[-1]["segments"].name == "1"
        with pytest.raises(IndexError):
            data[2]

    def test_folders_elsewhere(self, tmp_path):
        root = write_semantic(tmp_path)
        (root / "photos").mkdir()
        (root / "train" / "images").rename(root / "photos" / "train")
        (root / "masks_train").mkdir()
        for path in (root / "train" / "labels").iterdir():
            Image.open(path).save(root / "masks_train" / f"{path.stem}.tif")
        data = SegmentationFolder(root, "train", image_folder="photos/{split}", label_folder="masks_{split}")
        assert len(data) == 2 and id_map(data[0]).unique().tolist() == [0, 1, 255]

    def test_class_names_of_mapillary(self, tmp_path):
        root = write_semantic(tmp_path)
        (root / "labels.json").unlink()
        labels = [{"readable": "Left", "evaluate": True}, {"readable": "Unlabeled", "evaluate": False}]
        (root / "config.json").write_text(json.dumps({"labels": labels}))
        data = SegmentationFolder(root, "train")
        assert data.id2label == {0: "Left"}
        assert id_map(data[0]).unique().tolist() == [0, 255]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"model_type": "maskcls"}, "is not Mapillary's, with a list of labels, and there is no"),
            ({"labels": [{"readable": "a", "evaluate": False}]}, "names no classes"),
            ({"labels": [5]}, r"is not Mapillary's, with readable and evaluate .*: labels\[0\] is 5"),
            ({"labels": [{"readable": "Left"}]}, r"is not Mapillary's, .*: labels\[0\] is \{'readable'"),
            ({"labels": [{"readable": None, "evaluate": True}]}, "the name of class 0: null is no text"),
        ],
    )
    def test_a_config_that_is_not_mapillarys(self, tmp_path, content, message):
        root = write_semantic(tmp_path)
        (root / "labels.json").unlink()
        (root / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as error:
            SegmentationFolder(root, "train")
        assert "config.json" in str(error.value)
        assert [f.kind for f in validate_dataset(root, workers=1).findings if f.severity == "error"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"0": {"name": "sky"}}', r"the name of class 0: \{'name': 'sky'\} is no text"),
            ('{"0": null}', "the name of class 0: null is no text"),
            ('{"0": 5}', "the name of class 0: 5 is no text"),
            ('{"0": " "}', "the name of class 0: ' ' is no text, or a blank one"),
            ('{"0": "\\ud800"}', "half characters"),
            ('{"sky": 0}', "the key 'sky' is no label id"),
            ('{"0.5": "sky"}', "the key '0.5' is no label id"),
            ('{"1_0": "sky"}', "the key '1_0' is no label id"),
            ('{"1": "sky", "01": "road"}', "names class 1 twice: 'sky' and 'road'"),
            ('{"0": "sky", "0": "road"}', "the key '0' stands twice"),
            ('["sky"]', r"is \['sky'\], not a JSON object like"),
            ("null", "is null, not a JSON object"),
            ("{}", "names no classes"),
            ("[" * 100000 + "]" * 100000, "is nested too deeply"),
        ],
    )
    def test_names_of_classes_are_checked(self, tmp_path, content, message):
        root = write_semantic(tmp_path)
        (root / "labels.json").write_text(content)
        with pytest.raises(ValueError, match=message) as error:
            SegmentationFolder(root, "train")
        assert "labels.json" in str(error.value)
        found = [finding for finding in validate_dataset(root, workers=1).findings if finding.severity == "error"]
        assert [(finding.kind, finding.message) for finding in found] == [("bad_class_names", str(error.value))]

    def test_classes_of_one_name_stay_apart(self, tmp_path):
        root = write_semantic(tmp_path)
        names = {0: "cat", 1: "cat", 2: "cat (0)", 3: "dog"}
        data = SegmentationFolder(root, "train", id2label=names)
        assert data.id2label == {0: "cat (0) (0)", 1: "cat (1)", 2: "cat (0) (2)", 3: "dog"}
        assert data.model_fields()["label2id"] == {name: label for label, name in data.id2label.items()}

    @pytest.mark.parametrize("names", [{0: "a\nb"}, {0: "\x1b[31mred"}, {"0": "car [moving]"}, {np.int64(0): "sky"}])
    def test_names_may_hold_any_characters(self, names):
        assert read_class_names(names) == {0: next(iter(names.values()))}

    @needs_shared
    @pytest.mark.parametrize(
        ("name", "images", "classes"),
        [
            ("dsb2018_nuclei", {"train": 532, "val": 132}, 2),
            ("camvid", {"train": 367, "val": 101, "test": 233}, 11),
            ("clothing_parsing_ccp", {"train": 536, "val": 134}, 59),
            ("coco_stuff_panoptic", {"train": 13, "val": 8}, 171),
        ],
    )
    def test_real_folders(self, name, images, classes):
        for split, count in images.items():
            data = SegmentationFolder(SHARED / "data" / name, split)
            sample = data[len(data) - 1]
            assert len(data) == count and len(data.id2label) == classes
            assert tuple(sample["image"].shape[-2:]) == data.sizes()[-1] == sample["segments"].size
            assert data.has_instances == (name == "dsb2018_nuclei")

    @needs_shared
    def test_shares_of_camvid_classes_are_those_of_its_readme(self):
        data = SegmentationFolder(SHARED / "data" / "camvid", "val")
        counts = sum(torch.bincount(id_map(data[i]).flatten(), minlength=256) for i in range(len(data)))
        shares = (100 * counts / counts.sum()).tolist()
        written = [9.18, 25.96, 0.56, 28.95, 8.72, 16.34, 0.89, 3.08, 1.75, 0.65, 2.22]
        assert shares[:11] == pytest.approx(written, abs=0.0051) and shares[255] == pytest.approx(1.70, abs=0.0051)


def write_ade20k(root: Path, names: bool = True) -> Path:
    """One image with value 0 (other), 1 and 3 in thirds."""
    for folder in ("images", "annotations"):
        (root / folder / "training").mkdir(parents=True)
    labels = np.repeat(np.array([[0, 1, 3]], dtype=np.uint8), 8, axis=0).repeat(4, axis=1)
    Image.fromarray(labels).save(root / "annotations" / "training" / "ADE_train_00000001.png")
    Image.new("RGB", (12, 8)).save(root / "images" / "training" / "ADE_train_00000001.jpg")
    if names:
        rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.15\t11664\t1172\twall", "2\t0.1\t6046\t612\tbuilding, edifice"]
        rows += ["3 \t0.08\t8265\t796\tscreen, crt screen ", "4\t0.01\t1\t1\tscreen, silver screen"]
        (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return root


class TestAde20k:
    def test_zero_is_void_and_classes_start_at_one(self, tmp_path):
        data = open_dataset(write_ade20k(tmp_path), "training")
        assert isinstance(data, Ade20k)
        assert data.id2label == {0: "wall", 1: "building", 2: "screen, crt screen", 3: "screen, silver screen"}
        assert id_map(data[0])[0, 0, ::4].tolist() == [255, 0, 2]
        assert data.stuff_ids == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            (b"Idx\tName\n1\twall\n1\tsky\n", "names class 1 twice: 'wall' and 'sky'"),
            (b"Idx\tName\n1\t \n", "the name of class 1: '' is no text, or a blank one"),
            (b"Idx\tName\n\xc2\xb2\twall\n", "is not a table with the columns"),
            (b"Idx\tName\n1\tw\xe9\n", "cannot be read as text"),
        ],
    )
    def test_a_table_that_is_none(self, tmp_path, table, message):
        root = write_ade20k(tmp_path)
        (root / "objectInfo150.txt").write_bytes(table)
        with pytest.raises(ValueError, match=message) as error:
            open_dataset(root, "training")
        assert "objectInfo150.txt" in str(error.value)

    def test_names_must_come_from_somewhere(self, tmp_path):
        root = write_ade20k(tmp_path, names=False)
        with pytest.raises(FileNotFoundError, match="names the classes"):
            Ade20k(root)
        data = open_dataset(root, "training", id2label={i: f"class {i}" for i in range(1, 151)})
        assert len(data.id2label) == 150 and id_map(data[0]).unique().tolist() == [0, 2, 255]

    def test_other_data_in_folders_of_these_names(self, tmp_path):
        root = write_ade20k(tmp_path, names=False)
        (root / "labels.json").write_text('{"0": "background", "1": "object", "2": "other", "3": "more"}')
        messages = [f.message for f in validate_dataset(root, workers=1).findings if f.kind == "bad_class_names"]
        for layout in (None, "ade20k"):
            with pytest.raises(
                ValueError, match="layout ade20k label value 0 is void.*named as class 'background'"
            ) as e:
                open_dataset(root, "training", layout)
            assert 'image_folder="images/{split}"' in str(e.value)
            assert ("found by looking" in str(e.value)) == (layout is None)
            messages.append(str(e.value))
        assert len(messages) == 3 and all("ade20k" in message for message in messages)
        options = {"image_folder": "images/{split}", "label_folder": "annotations/{split}"}
        assert open_dataset(root, "training", "folder", **options).id2label[0] == "background"

    def test_a_value_that_is_named_twice(self, tmp_path):
        root = write_ade20k(tmp_path)
        path = root / "objectInfo150.txt"
        path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
        with pytest.raises(ValueError, match=r"objectInfo150\.txt names class 1 twice"):
            open_dataset(root, "training")


def write_cityscapes(root: Path) -> Path:
    """Road with two cars, a group of persons without instances, ego vehicle and license plate."""
    label_ids = np.full((16, 32), 7, dtype=np.uint8)
    label_ids[:4, :8], label_ids[:4, 8:16], label_ids[8:12, :8], label_ids[14:], label_ids[0, 31] = 26, 26, 24, 1, 255
    instance_ids = label_ids.astype(np.uint16)
    instance_ids[:4, :8], instance_ids[:4, 8:16], instance_ids[0, 31] = 26000, 26001, 65535
    folders = [root / part / "val" / "ulm" for part in ("leftImg8bit", "gtFine")]
    for folder in folders:
        folder.mkdir(parents=True)
    Image.new("RGB", (32, 16)).save(folders[0] / "ulm_000000_000019_leftImg8bit.png")
    Image.fromarray(label_ids).save(folders[1] / "ulm_000000_000019_gtFine_labelIds.png")
    Image.fromarray(instance_ids).save(folders[1] / "ulm_000000_000019_gtFine_instanceIds.png")
    return root


class TestCityscapes:
    def test_label_ids_become_train_ids(self, tmp_path):
        data = open_dataset(write_cityscapes(tmp_path), "val")
        assert isinstance(data, Cityscapes) and len(data.id2label) == 19
        assert data.names == ["ulm_000000_000019"]
        assert id_map(data[0]).unique().tolist() == [0, 11, 13, 255]  # road, person, car
        assert [data.id2label[i] for i in (0, 11, 13, 18)] == ["road", "person", "car", "bicycle"]

    def test_train_id_files_give_the_same(self, tmp_path):
        root = write_cityscapes(tmp_path)
        expected = id_map(open_dataset(root, "val")[0])
        path = root / "gtFine" / "val" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png"
        Image.fromarray(expected[0].numpy().astype(np.uint8)).save(str(path).replace("labelIds", "labelTrainIds"))
        path.unlink()
        assert torch.equal(id_map(open_dataset(root, "val")[0]), expected)

    def test_instances_with_a_group_as_crowd(self, tmp_path):
        data = Cityscapes(write_cityscapes(tmp_path), "val", instances=True)
        sample = data[0]
        assert class_of_id(sample) == {7: 0, 24: 11, 26000: 13, 26001: 13}
        assert (id_map(sample) == 255)[0].sum() == 64 + 1 and others(sample) == {VOID}  # ids 1 and 65535
        assert crowd_ids(sample) == [24]
        assert data.kind == "panoptic" and data.stuff_ids == list(range(11))

    def test_missing_files_are_named(self, tmp_path):
        root = write_cityscapes(tmp_path)
        (root / "gtFine" / "val" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png").unlink()
        with pytest.raises(FileNotFoundError, match="ulm_000000_000019_gtFine_labelIds.png"):
            Cityscapes(root, "val")
        with pytest.raises(FileNotFoundError, match=r"No Cityscapes folder .*train.*There are: val"):
            Cityscapes(root, "train")


class TestOpenDataset:
    def test_an_unknown_folder_is_told_what_was_looked_for(self, tmp_path):
        (tmp_path / "pictures").mkdir()
        with pytest.raises(FileNotFoundError, match=r"(?s)coco_panoptic: train/panoptic\.json.*It holds: pictures"):
            open_dataset(tmp_path, "train")

    def test_unknown_layout_and_option(self, tmp_path):
        root = write_semantic(tmp_path)
        with pytest.raises(
            ValueError, match="layouts are yolo, cvat, .*, cityscapes, ade20k, coco_panoptic, labelme, folder"
        ):
            open_dataset(root, "train", layout="nowhere")
        with pytest.raises(TypeError, match=r"Layout folder .*color"):
            open_dataset(root, "train", color="red")

    def test_a_folder_without_splits(self, tmp_path):
        root = write_semantic(tmp_path)
        for name in ("images", "labels"):
            (root / "train" / name).rename(root / name)
        assert len(open_dataset(root)) == len(open_dataset(root, split="")) == 2

    @needs_shared
    @pytest.mark.parametrize(
        ("name", "split", "options", "reader", "images", "classes"),
        [
            ("camvid", "test", {}, "SegmentationFolder", 233, 11),
            ("clothing_parsing_ccp", "val", {}, "SegmentationFolder", 134, 59),
            ("dsb2018_nuclei", "val", {}, "SegmentationFolder", 132, 2),
            ("dsb2018_nuclei", "val", {"layout": "coco_instances"}, "CocoInstances", 132, 1),
            ("car_parts", "test", {}, "CocoPanoptic", 100, 19),
            ("car_parts", "train", {"layout": "coco_instances"}, "CocoInstances", 400, 18),
            ("coco_stuff_panoptic", "train", {}, "CocoPanoptic", 13, 171),
            ("coco_stuff_panoptic", "val", {"layout": "folder"}, "SegmentationFolder", 8, 171),
            ("coco_panoptic_sample", None, {}, "CocoPanoptic", 2, 133),
            ("coco_panoptic_sample", "examples", {}, "CocoPanoptic", 2, 133),
        ],
    )
    def test_real_data(self, name, split, options, reader, images, classes):
        data = open_dataset(SHARED / "data" / name, split, **options)
        assert (type(data).__name__, len(data), len(data.id2label)) == (reader, images, classes)
        assert sorted(data.id2label) == list(range(classes))
        sample = data[0]
        assert tuple(sample["image"].shape[-2:]) == data.sizes()[0]


class Failing:
    """A transform or collator that fails."""

    def __init__(self, error: type[Exception]):
        self.error = error

    def __call__(self, *arguments, **options):
        raise self.error("no luck: 0 left")


class TestErrorsOfLoaderWorkers:
    """One line that names the image, of whatever type the error was."""

    @pytest.mark.parametrize("place", ["label", "missing", "transform", "collator"])
    @pytest.mark.parametrize("workers", [0, 1])
    def test_are_one_line(self, tmp_path, place, workers):
        root = write_semantic(tmp_path)
        data, collate = SegmentationFolder(root, "train"), first_sample
        if place == "label":
            Image.fromarray(np.full((20, 30), 9, dtype=np.uint8)).save(root / "train/labels/0.png")
        elif place == "missing":
            (root / "train/images/0.png").unlink()
        elif place == "transform":
            data = AugmentedDataset(data, Failing(KeyError), seed=0)
        else:
            collate = MaskClsCollator(Failing(ZeroDivisionError))
            collate.image_processor.void_id = 255
        batches = iter(DataLoader(data, 2, num_workers=workers, collate_fn=collate))
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            list(batches)
        if workers:  # else Python's cleaning up waits seconds for them
            batches._shutdown_workers()
        message = str(error.value)
        assert "\n" not in message and "Traceback" not in message
        expected = {
            "label": "train/labels/0.png holds label values 9",
            "missing": "train/images/0.png",
            "transform": "image 0: KeyError: 'no luck: 0 left'",
            "collator": "image 0, 1: ZeroDivisionError: no luck: 0 left",
        }
        assert expected[place] in message

    def test_a_worker_that_the_system_ends(self, tmp_path):
        data = AugmentedDataset(SegmentationFolder(write_semantic(tmp_path), "train"), end_process, seed=0)
        message = r"ended by the system: DataLoader worker .* training.workers=1"
        with pytest.raises(DataError, match=message), told_of_workers():
            list(DataLoader(data, num_workers=1, collate_fn=first_sample))
        with pytest.raises(RuntimeError, match="another"), told_of_workers():
            raise RuntimeError("another")


def first_sample(samples: list) -> object:
    return samples[0]


def end_process(sample, seed):
    os._exit(1)
