"""`maskcls validate`: a tiny folder made to have exactly one fault, for every fault; and good data without any."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import TrainingArguments
from typer.testing import CliRunner

from conftest import SHARED, needs_shared
from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.cli.main import app
from maskcls_hf.data import AugmentedDataset, MaskClsCollator, TrainTransform, open_dataset
from maskcls_hf.data.checks import regions
from maskcls_hf.data.layouts.cityscapes import CLASSES
from maskcls_hf.data.layouts.label_maps import voc_colors
from maskcls_hf.data.validation import RULES, occurrence, validate_dataset
from maskcls_hf.data.validation.occurrence import refuse_binary_masks, told_of_classes
from maskcls_hf.data.validation.vanishing import vanished, vanished_masks
from maskcls_hf.inference.evaluation import model_classes
from maskcls_hf.metrics import Evaluator
from maskcls_hf.models.run_lengths import MaskRuns
from maskcls_hf.training import MaskClsTrainer
from recipes import write_recipe
from tiny import maskcls_config

HEIGHT, WIDTH = 32, 48
NAMES = {0: "sky", 1: "road", 2: "car"}
ORIENTATION = 0x0112


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def label_map() -> np.ndarray:
    """Three classes in stripes, a column of void."""
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    ids[10:], ids[20:], ids[:, -1] = 1, 2, 255
    return ids


def save(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        content = Image.fromarray(content)
    content.save(path)


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path) -> Path:
    """train with two images, val with one."""
    write_json(tmp_path / "labels.json", NAMES)
    for seed, name in enumerate(("train/{}/a", "train/{}/b", "val/{}/c")):
        save(tmp_path / f"{name.format('images')}.png", picture(seed))
        save(tmp_path / f"{name.format('labels')}.png", label_map())
    return tmp_path


@pytest.fixture
def instances(tmp_path) -> Path:
    """A folder of instance maps: two nuclei."""
    write_json(tmp_path / "labels.json", {1: "nucleus"})
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint16)
    ids[2:10, 2:10], ids[20:30, 20:30] = 1, 2
    save(tmp_path / "train/images/a.png", picture(0))
    save(tmp_path / "train/instances/a.png", ids)
    return tmp_path


POLYGON = [4, 4, 20, 4, 20, 12, 4, 12]  # 16 x 8 pixels


def coco_records() -> dict:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[16:30, 6:40] = 1
    run_lengths = coco_mask.encode(mask)
    run_lengths["counts"] = run_lengths["counts"].decode()
    first = dict(id=1, image_id=7, category_id=3, segmentation=[POLYGON], area=128, bbox=[4, 4, 16, 8], iscrowd=0)
    second = dict(first, id=2, category_id=5, segmentation=run_lengths, area=14 * 34, bbox=[6, 16, 34, 14])
    return {
        "images": [
            dict(id=7, file_name="a.png", height=HEIGHT, width=WIDTH),
            dict(id=8, file_name="b.png", height=HEIGHT, width=WIDTH),
        ],
        "annotations": [first, second, dict(first, id=3, image_id=8), dict(second, id=4, image_id=8)],
        "categories": [dict(id=3, name="cat"), dict(id=5, name="dog")],
    }


@pytest.fixture
def coco(tmp_path) -> Path:
    write_json(tmp_path / "train/instances.json", coco_records())
    for seed, name in enumerate("ab"):
        save(tmp_path / f"train/images/{name}.png", picture(seed))
    return tmp_path


def panoptic_ids() -> np.ndarray:
    """Segments 1 (stuff), 300 and 70000, and void."""
    ids = np.ones((HEIGHT, WIDTH), dtype=np.int32)
    ids[4:12, 4:20], ids[16:30, 6:40], ids[0] = 300, 70000, 0
    return ids


def colored(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


@pytest.fixture
def panoptic(tmp_path) -> Path:
    areas = {segment: int((panoptic_ids() == segment).sum()) for segment in (1, 300, 70000)}
    boxes = {1: [0, 1, WIDTH, HEIGHT - 1], 300: [4, 4, 16, 8], 70000: [6, 16, 34, 14]}
    segments = [
        dict(id=segment, category_id=category, area=areas[segment], bbox=boxes[segment], iscrowd=0)
        for segment, category in ((1, 9), (300, 3), (70000, 5))
    ]
    images, annotations = [], []
    for seed, name in enumerate("ab"):
        save(tmp_path / f"train/images/{name}.png", picture(seed))
        save(tmp_path / f"train/panoptic/{name}.png", colored(panoptic_ids()))
        images.append(dict(id=seed, file_name=f"{name}.png", height=HEIGHT, width=WIDTH))
        annotations.append(dict(image_id=seed, file_name=f"{name}.png", segments_info=segments))
    kinds = ((3, "cat", 1), (5, "dog", 1), (9, "grass", 0))
    categories = [dict(id=i, name=name, isthing=thing) for i, name, thing in kinds]
    write_json(
        tmp_path / "train/panoptic.json", {"images": images, "annotations": annotations, "categories": categories}
    )
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    ids = np.full((HEIGHT, WIDTH), 7, dtype=np.uint8)
    ids[10:], ids[20:] = 26, 1
    instance_ids = ids.astype(np.uint16)
    instance_ids[10:15] = 26000
    stem = "train/x/x_000000_000019"
    save(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png", picture(0))
    save(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png", ids)
    save(tmp_path / f"gtFine/{stem}_gtFine_instanceIds.png", instance_ids)
    return tmp_path


@pytest.fixture
def ade20k(tmp_path) -> Path:
    write_json(tmp_path / "labels.json", {1: "wall", 2: "sky"})
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    ids[10:], ids[20:] = 1, 2
    save(tmp_path / "images/training/a.jpg", picture(0))
    save(tmp_path / "annotations/training/a.png", ids)
    return tmp_path


def kinds(root: Path, **options) -> set[str]:
    """Kinds of the findings. Where none is an error, the reader must read everything."""
    report = validate_dataset(root, workers=1, **options)
    assert len(json.dumps(report.to_dict())) > 0
    if report.ok:
        for split in report.splits:
            dataset = open_dataset(root, split.name, report.layout, **options.get("options", {}))
            assert len(dataset) == split.images
            for index in range(len(dataset)):
                dataset[index]
    return {finding.kind for finding in report.findings}


def the_finding(root: Path, kind: str, **options):
    """The only finding; its message and file are checked by the caller."""
    report = validate_dataset(root, workers=1, **options)
    assert {finding.kind for finding in report.findings} == {kind}, report.findings
    return report.findings[0]


class TestGoodDataHasNoFindings:
    def test_folder_of_class_maps(self, folder):
        report = validate_dataset(folder, size={"height": HEIGHT, "width": WIDTH}, num_queries=3)
        assert report.findings == [] and report.ok and report.layout == "folder"
        train, val = report.splits
        assert (train.name, train.images, train.labels, train.checked) == ("train", 2, 2, 2)
        assert (val.name, val.images) == ("val", 1)
        assert train.sizes == {(HEIGHT, WIDTH): 2}
        assert train.segments == [3, 3] and train.median_segments == 3
        assert (train.pixels, train.void_pixels) == (2 * HEIGHT * WIDTH, 2 * HEIGHT)
        assert vars(train.classes[0]) == {"images": 2, "segments": 2, "pixels": 2 * 10 * (WIDTH - 1)}
        assert report.class_names == NAMES

    def test_folder_of_instance_maps(self, instances):
        assert kinds(instances) == set()
        split = validate_dataset(instances).splits[0]
        assert (split.classes[1].images, split.classes[1].segments, split.classes[1].pixels) == (1, 2, 164)

    def test_coco_instances(self, coco):
        assert kinds(coco, num_queries=2) == set()
        report = validate_dataset(coco)
        assert report.layout == "coco_instances"
        assert report.splits[0].classes[3].pixels == 2 * 128

    def test_coco_panoptic(self, panoptic):
        assert kinds(panoptic, num_queries=3) == set()
        report = validate_dataset(panoptic)
        assert report.layout == "coco_panoptic"
        assert report.splits[0].segments == [3, 3] and report.splits[0].void_pixels == 2 * WIDTH

    def test_cityscapes(self, cityscapes):
        assert kinds(cityscapes) == {"never_seen"}
        report = validate_dataset(cityscapes)
        assert report.layout == "cityscapes" and report.class_names == CLASSES
        assert report.splits[0].classes[26].pixels == 10 * WIDTH
        assert report.splits[0].void_pixels == 12 * WIDTH

    def test_cityscapes_instances(self, cityscapes):
        assert kinds(cityscapes, options={"instances": True}) == {"never_seen", "crowd"}
        split = validate_dataset(cityscapes, options={"instances": True}).splits[0]
        assert (split.classes[26].segments, split.crowds) == (2, 1)

    def test_ade20k(self, ade20k):
        assert kinds(ade20k) == set()
        report = validate_dataset(ade20k)
        assert report.layout == "ade20k" and report.splits[0].void_pixels == 10 * WIDTH

    def test_a_palette_file_is_read_by_its_indices(self, folder):
        image = Image.fromarray(label_map())
        image.putpalette(voc_colors().tobytes())
        save(folder / "train/labels/a.png", image)
        assert kinds(folder) == set()


class TestFolders:
    def test_unknown_layout(self, tmp_path):
        finding = the_finding(tmp_path, "unknown_layout")
        assert "coco_panoptic" in finding.message

    def test_split_that_is_not_there(self, folder):
        assert kinds(folder, splits=["test"]) == {"unknown_layout"}
        assert "missing_folder" in kinds(folder, splits=["test"], layout="folder")

    def test_labels_folder_is_missing_but_images_are_still_read(self, folder):
        shutil.rmtree(folder / "val/labels")
        (folder / "val/images/c.png").write_bytes(b"")
        report = validate_dataset(folder)
        found = {(finding.kind, finding.file) for finding in report.findings}
        assert found == {("missing_folder", "val/labels"), ("unreadable_image", "val/images/c.png")}
        assert report.splits[0].segments == [3, 3]

    @pytest.mark.parametrize("content", [None, "[1", '["sky"]', "{}"])
    def test_class_names(self, folder, content):
        (folder / "labels.json").unlink()
        if content is not None:
            (folder / "labels.json").write_text(content)
        report = validate_dataset(folder)
        assert {finding.kind for finding in report.findings} == {"bad_class_names"}
        assert sorted(report.splits[0].classes) == [0, 1, 2]  # counted all the same

    def test_two_names_for_instances(self, instances):
        write_json(instances / "labels.json", {1: "nucleus", 2: "cell"})
        the_finding(instances, "bad_class_names")

    def test_no_images(self, folder):
        for path in (*folder.glob("val/*/*.png"),):
            path.unlink()
        assert the_finding(folder, "no_images").split == "val"

    def test_image_without_label(self, folder):
        (folder / "train/labels/a.png").rename(folder / "train/labels/a_mask.png")
        report = validate_dataset(folder)
        found = {finding.kind: finding for finding in report.findings}
        assert set(found) == {"image_without_label", "label_without_image"}
        assert found["image_without_label"].file == "train/images/a.png"
        assert "a_mask.png" in found["image_without_label"].message
        assert (report.splits[0].images, report.splits[0].labels, report.splits[0].checked) == (2, 2, 2)

    def test_label_without_image(self, folder):
        (folder / "train/images/a.png").unlink()
        assert the_finding(folder, "label_without_image").file == "train/labels/a.png"

    def test_label_as_jpeg(self, folder):
        Image.open(folder / "train/labels/a.png").save(folder / "train/labels/a.jpg")
        (folder / "train/labels/a.png").unlink()
        assert the_finding(folder, "lossy_label").file == "train/labels/a.jpg"

    def test_two_images_of_one_name(self, folder):
        save(folder / "train/images/a.jpg", picture(8))
        assert the_finding(folder, "same_name").file == "train/images/a.png"

    def test_other_files(self, folder):
        (folder / "train/images/notes.txt").write_text("hello")
        (folder / "train/images/.DS_Store").write_text("hidden")
        assert the_finding(folder, "file_not_listed").file == "train/images/notes.txt"

    def test_what_only_the_reader_refuses(self, folder):
        finding = the_finding(folder, "reader_refuses", options={"no_such_option": 1}, splits=["train"])
        assert "no_such_option" in finding.message

    def test_folder_patterns_of_a_recipe(self, folder):
        for split in ("train", "val"):
            (folder / "pictures").mkdir(exist_ok=True)
            (folder / "maps").mkdir(exist_ok=True)
            (folder / split / "images").rename(folder / "pictures" / split)
            (folder / split / "labels").rename(folder / "maps" / split)
            (folder / split).rmdir()
        options = {"image_folder": "pictures/{split}", "label_folder": "maps/{split}"}
        report = validate_dataset(folder, layout="folder", options=options)
        assert report.findings == [] and [split.images for split in report.splits] == [2, 1]

    def test_no_folder_and_no_layout(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            validate_dataset(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="nowhere"):
            validate_dataset(tmp_path, layout="nowhere")


class TestFiles:
    @pytest.mark.parametrize(
        ("kind", "file"), [("unreadable_image", "train/images/a.png"), ("unreadable_label", "train/labels/a.png")]
    )
    @pytest.mark.parametrize(
        "content", ["truncated", b"", b"not an image", b"version https://git-lfs.github.com/spec/v1"]
    )
    def test_unreadable(self, folder, kind, file, content):
        path = folder / file
        path.write_bytes(path.read_bytes()[:-40] if content == "truncated" else content)
        report = validate_dataset(folder)
        assert [(finding.kind, finding.file) for finding in report.findings] == [(kind, file)]
        assert "0x" not in report.findings[0].message
        assert ("git lfs pull" in report.findings[0].message) == (content[:7] == b"version")
        assert report.splits[0].checked == 2

    def test_truncated_jpeg(self, folder):
        (folder / "train/images/a.png").unlink()
        save(folder / "train/images/a.jpg", picture(0))
        path = folder / "train/images/a.jpg"
        path.write_bytes(path.read_bytes()[:600])
        assert "truncated" in the_finding(folder, "unreadable_image").message.lower()

    def test_size_mismatch(self, folder):
        save(folder / "train/labels/a.png", label_map()[:16])
        finding = the_finding(folder, "size_mismatch")
        assert finding.file == "train/labels/a.png" and "48 x 16" in finding.message

    def test_turned_label(self, folder):
        save(folder / "train/labels/a.png", label_map().T)
        assert "turned" in the_finding(folder, "size_mismatch").message

    @pytest.mark.parametrize(
        ("orientation", "turn_label", "kind"), [(6, False, "exif_mismatch"), (6, True, None), (3, False, "exif_turned")]
    )
    def test_exif(self, folder, orientation, turn_label, kind):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        picture(0).save(folder / "train/images/a.png", exif=exif)
        if turn_label:
            save(folder / "train/labels/a.png", np.rot90(label_map(), -1).copy())
        assert kinds(folder) == ({kind} if kind else set())

    def test_palette_converted_to_rgb(self, folder):
        save(folder / "train/labels/a.png", voc_colors()[label_map()])
        finding = the_finding(folder, "color_label")
        assert finding.file == "train/labels/a.png" and "Pascal VOC" in finding.message

    def test_gray_in_three_channels(self, folder):
        save(folder / "train/labels/a.png", np.repeat(label_map()[..., None], 3, axis=2))
        assert "getchannel" in the_finding(folder, "color_label").message

    def test_legend_of_colors(self, folder):
        save(folder / "train/labels/a.png", np.stack([label_map() * 3, label_map() * 5, label_map()], axis=-1))
        assert "4 colors, so it is a palette" in the_finding(folder, "color_label").message

    def test_palette_sorted_anew_for_each_file(self, folder):
        for name, colors in (("a", voc_colors()), ("b", voc_colors()[::-1])):
            image = Image.fromarray(label_map())
            image.putpalette(colors.tobytes())
            save(folder / f"train/labels/{name}.png", image)
        finding = the_finding(folder, "palette_conflict")
        assert finding.file == "train/images/b.png"

    def test_same_image_in_two_splits(self, folder):
        shutil.copy(folder / "train/images/a.png", folder / "val/images/c.png")
        finding = the_finding(folder, "leak")
        assert finding.split == "val" and "train/images/a.png" in finding.message

    def test_same_image_twice(self, folder):
        shutil.copy(folder / "train/images/a.png", folder / "train/images/b.png")
        the_finding(folder, "duplicate_image")


class TestClasses:
    def test_ids_outside(self, folder):
        ids = label_map()
        ids[0, :10] = 77
        save(folder / "train/labels/a.png", ids)
        finding = the_finding(folder, "ids_outside")
        assert "77" in finding.message and finding.file == "train/labels/a.png"
        assert kinds(folder, options={"void_values": [77]}) == set()

    def test_values_that_no_label_can_have(self, instances):
        ids = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
        ids[2:10, 2:10], ids[20:25] = 1, -5
        Image.fromarray(ids).save(instances / "train/instances/a.tif")
        (instances / "train/instances/a.png").unlink()
        assert "-5" in the_finding(instances, "ids_outside").message

    @pytest.mark.parametrize(
        ("values", "names", "message"),
        [
            ((1, 2, 3), (0, 1, 2), "count from 1"),
            ((1, 2, 3, 0), (0, 1, 2), "0 may be unlabeled"),
            ((0, 1, 2), (1, 2, 3), "count from 0"),
            ((0, 1, 2, 3), (1, 2, 3), "unlabeled pixels"),
        ],
    )
    def test_off_by_one(self, folder, values, names, message):
        write_json(folder / "labels.json", {i: f"class {i}" for i in names})
        ids = np.repeat(np.array(values, dtype=np.uint8), HEIGHT // 4 * WIDTH)
        ids = np.resize(ids, (HEIGHT, WIDTH))
        for path in folder.glob("*/labels/*.png"):
            save(path, ids)
        report = validate_dataset(folder)
        found = {finding.kind: finding.message for finding in report.findings}
        assert set(found) - {"never_seen"} == {"ids_outside", "off_by_one"}
        assert message in found["off_by_one"]

    def test_off_by_one_with_a_name_too_many(self, folder):
        ids = np.where(label_map() == 0, 1, label_map()).astype(np.uint8)
        for path in folder.glob("*/labels/*.png"):
            save(path, ids)
        assert kinds(folder) == {"off_by_one", "never_seen"}

    def test_binary_masks(self, folder):
        for path in folder.glob("*/labels/*.png"):
            save(path, np.where(label_map() == 1, 255, 0).astype(np.uint8))
        assert kinds(folder) == {"mask_255", "never_seen"}

    @pytest.mark.parametrize("others", [[], [25], [25, 45]])
    def test_training_refuses_binary_masks_of_a_data_set_not_of_an_image(self, tmp_path, others):
        """45 images; in most the first class alone, with unlabeled pixels. One that shows the second class will do."""
        write_json(tmp_path / "labels.json", {3: "none", 0: "background", 1: "cell"})
        for number in range(46):
            ids = np.where(label_map() == 1, 255, 0).astype(np.uint8)
            ids[-1, -1] = number in others
            save(tmp_path / f"train/images/{number:02}.png", picture(0))
            save(tmp_path / f"train/labels/{number:02}.png", ids)
        data = open_dataset(tmp_path, "train")
        samples = AugmentedDataset(data, TrainTransform(crop_size=8), 0)
        if others:
            refuse_binary_masks(data)
            return
        message = (
            "The 46 label maps of train hold no other values than 0 and 255, and 255 is read as unlabeled: nothing but "
            "'background' would be learned. If 255 is 'cell', give that class the id 255 in labels.json (or id2label), "
            "or save the maps with 1 in place of 255."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            refuse_binary_masks(data, "train")
        model = MaskClsForUniversalSegmentation(maskcls_config(id2label=data.id2label))
        arguments = TrainingArguments(str(tmp_path), use_cpu=True)
        with pytest.raises(ValueError, match="The 46 label maps hold no other values than 0 and 255"):
            MaskClsTrainer(model, arguments, MaskClsCollator(MaskClsImageProcessor()), train_dataset=samples)
        for names in ({0: "background", 255: "cell"}, {0: "background"}):  # a class; there is nothing else to learn
            write_json(tmp_path / "labels.json", names)
            refuse_binary_masks(open_dataset(tmp_path, "train"))
        for path in (tmp_path / "train/labels").glob("*.png"):
            save(path, np.zeros((HEIGHT, WIDTH), dtype=np.uint8))  # or is not there
        write_json(tmp_path / "labels.json", {0: "background", 1: "cell"})
        refuse_binary_masks(open_dataset(tmp_path, "train"))

    def test_binary_masks_in_place_of_instances(self, instances):
        path = instances / "train/instances/a.png"
        save(path, np.where(np.array(Image.open(path)) > 0, 255, 0).astype(np.uint8))
        the_finding(instances, "mask_255")

    def test_class_named_void(self, folder):
        write_json(folder / "labels.json", {**NAMES, 2: "Unlabeled"})
        assert "2: Unlabeled" in the_finding(folder, "void_class").message

    def test_class_that_never_occurs(self, folder):
        write_json(folder / "labels.json", {**NAMES, 3: "bus"})
        assert "1 of 4: bus" in the_finding(folder, "never_seen").message
        assert kinds(folder, limit=1) == set()  # with a part of the files nobody knows

    def test_class_that_training_lacks(self, folder):
        write_json(folder / "labels.json", {**NAMES, 3: "bus"})
        save(folder / "val/labels/c.png", np.where(label_map() == 2, 3, label_map()).astype(np.uint8))
        finding = the_finding(folder, "not_in_train")
        assert finding.split == "val" and "bus" in finding.message

    def test_splits_with_different_classes(self, coco):
        shutil.copytree(coco / "train", coco / "val")
        for seed, name in enumerate("ab"):
            save(coco / f"val/images/{name}.png", picture(10 + seed))
        edit_json(coco / "val/instances.json", lambda content: content["categories"][0].update(name="lion"))
        finding = the_finding(coco, "classes_differ")
        assert finding.split == "val" and "lion" in finding.message

    def test_class_that_training_alone_has(self, folder):
        save(folder / "val/labels/c.png", np.where(label_map() == 2, 0, label_map()).astype(np.uint8))
        finding = the_finding(folder, "only_in_train")
        assert finding.severity == "warning" and finding.split == "val" and "1 of 3: car" in finding.message

    @pytest.mark.parametrize(
        ("values", "kind", "expected"),
        [
            ({0: "background", 255: "object"}, "labels", set()),  # a class
            ({0: "background", 1: "object"}, "labels", {"mask_255", "never_seen"}),
            ({0: "cell"}, "instances", {"mask_255"}),
        ],
    )
    def test_what_255_means(self, tmp_path, values, kind, expected):
        write_json(tmp_path / "labels.json", values)
        save(tmp_path / "train/images/a.png", picture(0))
        save(tmp_path / f"train/{kind}/a.png", np.where(label_map() == 1, 255, 0).astype(np.uint8))
        assert kinds(tmp_path) == expected
        text = " ".join(f"{f.message} {RULES[f.kind].advice}" for f in validate_dataset(tmp_path, workers=1).findings)
        assert ("255 is read as unlabeled" in text) == (expected == {"mask_255", "never_seen"})
        assert ("255 is read as an instance" in text) == (kind == "instances")

    def test_255_among_many_instances_is_one_of_them(self, tmp_path):
        write_json(tmp_path / "labels.json", {0: "cell"})
        save(tmp_path / "train/images/a.png", np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
        save(tmp_path / "train/instances/a.png", np.arange(600, dtype=np.uint16).reshape(20, 30))
        assert "mask_255" not in {finding.kind for finding in validate_dataset(tmp_path, workers=1).findings}


@pytest.mark.parametrize("option", ["image_folder", "label_folder"])
def test_options_of_another_type_are_a_sentence(folder, tmp_path_factory, option):
    recipe = write_recipe(tmp_path_factory.mktemp("recipe"), data={"options": {option: 5}})
    for command in (["validate", str(folder), "-r", str(recipe)], ["train", "-r", str(recipe), "-d", str(folder)]):
        out = ["-o", str(folder / "out")] if command[0] == "train" else []
        result = CliRunner().invoke(app, [*command, *out])
        assert result.exit_code == 1 and "A folder is a text such as 'images/{split}', got 5" in result.output
        assert not result.exception or isinstance(result.exception, SystemExit)


class TestNothingToLearn:
    """validate says it as an error; training and evaluation as a line."""

    def told(self, root: Path, **options) -> str:
        return told_of_classes(open_dataset(root, "train", **options), "train")

    @pytest.mark.parametrize("names", [NAMES, {0: "a"}])
    def test_every_pixel_void(self, folder, names):
        write_json(folder / "labels.json", names)
        for name in "ab":
            save(folder / f"train/labels/{name}.png", np.full((HEIGHT, WIDTH), 255, dtype=np.uint8))
        if len(names) == 1:
            save(folder / "val/labels/c.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
        finding = next(f for f in validate_dataset(folder, workers=1).findings if f.kind == "nothing_to_learn")
        assert finding.severity == "error" and finding.split == "train" and "no pixel is labeled" in finding.message
        assert "all of the 2 images of train: no pixel is labeled as any class" in self.told(folder)

    def test_only_background(self, folder):
        for name in "ab":
            save(folder / f"train/labels/{name}.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
        found = {f.kind: f.severity for f in validate_dataset(folder, ["train"], workers=1).findings}
        assert found == {"never_seen": "warning"}
        assert "Every labeled pixel in all of the 2 images of train is sky; never: road, car" in self.told(folder)

    def test_a_class_that_never_occurs(self, folder):
        write_json(folder / "labels.json", {**NAMES, 3: "bus"})
        assert "1 of 4 classes never occur in all of the 2 images of train: bus" in self.told(folder)
        write_json(folder / "labels.json", NAMES)
        assert self.told(folder) == ""

    def test_instance_maps_without_an_instance(self, instances):
        save(instances / "train/instances/a.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint16))
        assert "nothing_to_learn" in {f.kind for f in validate_dataset(instances, workers=1).findings}
        assert "no instance of nucleus" in self.told(instances)

    def test_crowds_alone(self, coco):
        edit_json(coco / "train/instances.json", lambda c: [a.update(iscrowd=1) for a in c["annotations"]])
        assert "nothing_to_learn" in {f.kind for f in validate_dataset(coco, workers=1).findings}
        assert "all segments are crowd regions" in self.told(coco)

    def test_of_a_large_set_a_part_is_looked_at(self, folder, monkeypatch):
        monkeypatch.setattr(occurrence, "LOOKED_AT", 1)
        write_json(folder / "labels.json", {**NAMES, 3: "bus"})
        assert self.told(folder) == ""  # bus may be in the others
        save(folder / "train/labels/a.png", np.full((HEIGHT, WIDTH), 255, dtype=np.uint8))
        assert "in 1 of the 2 images of train: no pixel is labeled" in self.told(folder)


def test_many_classes_take_time_in_proportion(tmp_path):
    """Reader, image processor, configuration, scores and validate: no step compares all classes with all."""
    number = 60_000
    write_json(tmp_path / "labels.json", {i: f"class {i}" for i in range(number)})
    save(tmp_path / "train/images/a.png", picture(0))
    save(tmp_path / "train/labels/a.png", np.where(label_map() == 2, 59_999, label_map()).astype(np.uint16))
    start = time.process_time()
    data = open_dataset(tmp_path, "train")
    sample = data[0]
    processor = MaskClsImageProcessor(**data.processor_fields())
    MaskClsConfig(**data.model_fields())
    names = {i: data.id2label[number - 1 - i] for i in range(number)}
    assert model_classes(names, data.id2label)[:2].tolist() == [number - 1, number - 2]
    evaluator = Evaluator(processor, data.id2label, [0], ["semantic", "panoptic", "instance"])
    truth = sample["segments"]
    found = {"segmentation": torch.zeros(truth.size, dtype=torch.int64), "segments_info": []}
    maps = {"semantic": truth.semantic_map(65535), "panoptic": found, "instance": found | {"masks": []}}
    evaluator.add(evaluator.measure_maps([maps], [truth]))
    scores = evaluator.compute()
    assert scores["mean_iou"] == 1 and scores["pq"] == 0 == scores["ap"]
    assert "never_seen" in {finding.kind for finding in validate_dataset(tmp_path, workers=1).findings}
    assert time.process_time() - start < 8


class TestSegments:
    def test_all_void(self, folder):
        save(folder / "train/labels/a.png", np.full((HEIGHT, WIDTH), 255, dtype=np.uint8))
        assert the_finding(folder, "all_void").file == "train/labels/a.png"

    def test_no_instance(self, instances):
        save(instances / "train/images/b.png", picture(1))
        save(instances / "train/instances/b.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint16))
        assert the_finding(instances, "no_segments").file == "train/instances/b.png"

    def test_tiny(self, folder):
        ids = label_map()
        ids[0, 0] = 2
        ids[ids == 2] = np.where(np.arange((ids == 2).sum()) < 9, 2, 1)
        save(folder / "train/labels/a.png", ids)
        assert "1 of 3: car (9 px)" in the_finding(folder, "tiny_segment").message

    def test_vanishing(self, folder):
        ids = label_map()
        ids[ids == 2] = 1
        ids[4] = 2  # a row of 48 pixels that no center of a 4 times smaller grid falls on
        save(folder / "train/labels/a.png", ids)
        size = {"height": HEIGHT // 4, "width": WIDTH // 4}
        finding = the_finding(folder, "vanishing", size=size)
        assert "1 of 3: car (48 px)" in finding.message
        batch = MaskClsImageProcessor(size=size, size_divisor=None)(
            images=picture(0), segmentation_maps=ids, return_tensors="pt"
        )
        assert batch["class_labels"][0].tolist() == [0, 1]
        assert kinds(folder, size={"shortest_edge": HEIGHT, "longest_edge": 4 * HEIGHT}) == set()

    def test_vanishing_polygon(self, coco):
        row = dict(segmentation=[[4, 4, 20, 4, 20, 5, 4, 5]], area=16, bbox=[4, 4, 16, 1])
        edit_json(coco / "train/instances.json", lambda content: content["annotations"][0].update(row))
        finding = the_finding(coco, "vanishing", size={"height": HEIGHT // 4, "width": WIDTH // 4})
        assert "cat (16 px)" in finding.message

    def test_more_than_queries(self, folder):
        assert "3 segments, 2 queries" in the_finding(folder, "too_many_segments", num_queries=2).message

    def test_areas_and_boxes_are_those_of_pycocotools(self):
        ids = np.random.default_rng(0).integers(0, 5, (17, 23)).repeat(2, 0).repeat(3, 1) * 40000
        found = regions(ids)
        assert sorted(found) == np.unique(ids).tolist()
        for value, region in found.items():
            mask = coco_mask.encode(np.asfortranarray(ids == value).astype(np.uint8))
            assert region.area == coco_mask.area(mask) and list(region.box) == coco_mask.toBbox(mask).tolist()

    def test_maps_and_masks_lose_the_same_segments_as_the_image_processor(self):
        random = np.random.default_rng(0)
        size = {"height": 20, "width": 24}
        processor = MaskClsImageProcessor(size=size, size_divisor=None)
        lost_of_all = 0
        for _ in range(20):
            ids = np.zeros((61, 64), dtype=np.int32)
            for segment in range(1, 12):
                top, left, height, width = random.integers((0, 0, 1, 1), (50, 50, 10, 10))
                ids[top : top + height, left : left + width] = segment
            found = regions(ids)
            classes = dict.fromkeys(found, 0)
            batch = processor(
                images=np.zeros((61, 64, 3), dtype=np.uint8), segmentation_maps=ids, instance_id_to_semantic_id=classes
            )
            masks = MaskRuns.of_masks(np.stack([ids == i for i in found]))
            lost = vanished(ids, size)
            assert len(batch["class_labels"][0]) == len(found) - len(lost)
            assert vanished_masks(masks, (61, 64), size) == {place for place, i in enumerate(found) if i in lost}
            lost_of_all += len(lost)
        assert lost_of_all > 5


class TestCocoInstances:
    def change(self, root, **fields) -> None:
        edit_json(root / "train/instances.json", lambda content: content["annotations"][0].update(fields))

    @pytest.mark.parametrize("content", ["{", "[]", '{"images": [], "annotations": []}'])
    def test_broken_json(self, coco, content):
        (coco / "train/instances.json").write_text(content)
        assert kinds(coco) - {"no_images"} == {"bad_json"}

    @pytest.mark.parametrize(
        ("key", "field"), [("images", "file_name"), ("annotations", "image_id"), ("categories", "id")]
    )
    def test_incomplete_record(self, coco, key, field):
        edit_json(coco / "train/instances.json", lambda content: content[key][1].pop(field))
        assert "bad_record" in kinds(coco)

    def test_image_that_is_not_there(self, coco):
        (coco / "train/images/a.png").unlink()
        assert the_finding(coco, "label_without_image").file == "train/images/a.png"

    def test_all_images_are_elsewhere(self, coco):
        (coco / "train/images").rename(coco / "train/pictures")
        assert the_finding(coco, "missing_folder").file == "train/instances.json"

    def test_image_that_the_json_lacks(self, coco):
        save(coco / "train/images/z.png", picture(9))
        assert the_finding(coco, "file_not_listed").file == "train/images/z.png"

    def test_double_ids(self, coco):
        edit_json(coco / "train/instances.json", lambda content: content["images"].append(content["images"][0]))
        the_finding(coco, "double_id")

    def test_double_category(self, coco):
        edit_json(coco / "train/instances.json", lambda content: content["categories"].append(content["categories"][0]))
        the_finding(coco, "double_id")

    def test_double_annotation_id(self, coco):
        self.change(coco, id=2)
        the_finding(coco, "double_annotation_id")

    def test_two_records_of_one_file(self, coco):
        edit_json(coco / "train/instances.json", lambda content: content["images"][1].update(file_name="a.png"))
        assert kinds(coco) == {"same_name", "duplicate_image", "file_not_listed"}

    def test_annotation_of_a_missing_image(self, coco):
        self.change(coco, image_id=99)
        assert "99" in the_finding(coco, "orphan_annotation").message

    def test_annotation_of_a_missing_category(self, coco):
        self.change(coco, category_id=99)
        finding = the_finding(coco, "unknown_category")
        assert finding.file == "a.png" and "99" in finding.message

    def test_other_size_in_the_json(self, coco):
        def shrink(content):
            content["images"][0]["height"] = 30
            content["annotations"][:] = [content["annotations"][i] for i in (0, 2, 3)]

        edit_json(coco / "train/instances.json", shrink)
        finding = the_finding(coco, "json_size_mismatch")
        assert finding.file == "train/images/a.png" and "48 x 30" in finding.message

    @pytest.mark.parametrize("segmentation", [[[1, 2, 3, 4, 5]], {"size": [3, 3], "counts": [9]}, [["a"] * 6]])
    def test_mask_that_cannot_be_drawn(self, coco, segmentation):
        self.change(coco, segmentation=segmentation)
        assert "annotation 1" in the_finding(coco, "bad_segmentation").message

    @pytest.mark.parametrize("segmentation", [[], None, [[]], [[1, 2, 3, 4]]])
    def test_a_box_alone(self, coco, segmentation):
        self.change(coco, segmentation=segmentation)
        assert "annotation 1" in the_finding(coco, "box_only").message

    def test_mask_without_a_pixel(self, coco):
        self.change(coco, segmentation=[[4, 4, 4, 4, 4, 4]], area=0, bbox=[4, 4, 0, 0])
        assert "cat" in the_finding(coco, "empty_segment").message

    @pytest.mark.parametrize("area", [0, 500, float("nan")])
    def test_area(self, coco, area):
        self.change(coco, area=area)
        assert "mask 128" in the_finding(coco, "area_mismatch").message

    def test_area_of_the_polygon_itself_is_right(self, coco):
        polygon = [4.5, 4.5, 20.4, 5.2, 11.0, 12.3]
        area = 0.5 * abs((20.4 - 4.5) * (12.3 - 4.5) - (11.0 - 4.5) * (5.2 - 4.5))
        self.change(coco, segmentation=[polygon], area=area, bbox=[4.5, 4.5, 15.9, 7.8])
        assert kinds(coco) == set()

    def test_box(self, coco):
        self.change(coco, bbox=[14, 4, 16, 8])
        the_finding(coco, "box_mismatch")

    def test_box_with_two_corners(self, coco):
        self.change(coco, bbox=[4, 4, 20, 12])
        assert "[left, top, right, bottom]" in the_finding(coco, "box_mismatch").message

    def test_area_that_is_no_number(self, coco):
        self.change(coco, area="large")
        the_finding(coco, "bad_record")

    def test_crowd(self, coco):
        self.change(coco, iscrowd=1)
        assert "1 of 4 segments" in the_finding(coco, "crowd").message

    def test_image_without_annotations(self, coco):
        edit_json(coco / "train/instances.json", lambda content: content["annotations"].__delitem__(slice(2, None)))
        assert the_finding(coco, "no_segments").file == "train/images/b.png"


class TestCocoPanoptic:
    def change(self, root, **fields) -> None:
        """Of the segment 300 of the first image."""

        def update(content):
            content["annotations"][0]["segments_info"][1].update(fields)

        edit_json(root / "train/panoptic.json", update)

    def test_png_without_three_channels(self, panoptic):
        save(panoptic / "train/panoptic/a.png", panoptic_ids().astype(np.uint8))
        assert the_finding(panoptic, "gray_panoptic").file == "train/panoptic/a.png"

    def test_broken_png(self, panoptic):
        path = panoptic / "train/panoptic/a.png"
        path.write_bytes(path.read_bytes()[:-30])
        the_finding(panoptic, "unreadable_label")

    def test_size(self, panoptic):
        ids = panoptic_ids()
        save(panoptic / "train/images/a.png", np.zeros((HEIGHT, WIDTH + 2, 3), dtype=np.uint8))
        edit_json(panoptic / "train/panoptic.json", lambda content: content["images"][0].update(width=WIDTH + 2))
        assert the_finding(panoptic, "size_mismatch").file == "train/panoptic/a.png"
        assert ids.shape == (HEIGHT, WIDTH)

    def test_ids_that_the_json_lacks(self, panoptic):
        ids = panoptic_ids()
        ids[1, :5] = 4321
        save(panoptic / "train/panoptic/a.png", colored(ids))
        assert "4321" in {f.kind: f for f in validate_dataset(panoptic).findings}["ids_not_in_json"].message

    def test_id_without_a_pixel(self, panoptic):
        def add(content):
            content["annotations"][0]["segments_info"].append(dict(id=5, category_id=3))

        edit_json(panoptic / "train/panoptic.json", add)
        assert kinds(panoptic) == {"empty_segment"}

    def test_category(self, panoptic):
        self.change(panoptic, category_id=99)
        the_finding(panoptic, "unknown_category")

    def test_area_and_box_are_exact(self, panoptic):
        self.change(panoptic, area=127)
        the_finding(panoptic, "area_mismatch")
        self.change(panoptic, area=128, bbox=[4, 4, 16, 9])
        the_finding(panoptic, "box_mismatch")

    def test_double_id(self, panoptic):
        self.change(panoptic, id=1)
        assert kinds(panoptic) == {"double_id", "ids_not_in_json"}

    def test_stuff_twice(self, panoptic):
        self.change(panoptic, category_id=9)
        assert "grass (2)" in the_finding(panoptic, "stuff_twice").message

    def test_isthing(self, panoptic):
        edit_json(panoptic / "train/panoptic.json", lambda content: content["categories"][0].pop("isthing"))
        the_finding(panoptic, "missing_isthing")

    def test_image_without_annotation_or_png(self, panoptic):
        (panoptic / "train/panoptic/a.png").unlink()
        the_finding(panoptic, "image_without_label")
        edit_json(panoptic / "train/panoptic.json", lambda content: content["annotations"].pop(0))
        the_finding(panoptic, "image_without_label")

    def test_all_void(self, panoptic):
        save(panoptic / "train/panoptic/a.png", np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
        assert kinds(panoptic) == {"all_void", "empty_segment"}

    def test_annotations_of_two_images(self, panoptic):
        edit_json(panoptic / "train/panoptic.json", lambda content: content["annotations"][0].update(image_id=77))
        assert kinds(panoptic) == {"orphan_annotation", "image_without_label", "file_not_listed"}


JUNK = [None, "x", -1, 1.5, [], {}, [[1]], float("nan"), True, 10**30]


@pytest.mark.parametrize("layout", ["coco", "panoptic"])
def test_no_json_stops_the_run(request, layout):
    """Whatever stands in a field: no exception, and the other image is still read."""
    root = request.getfixturevalue(layout)
    path = root / "train" / ("instances.json" if layout == "coco" else "panoptic.json")
    original = json.loads(path.read_text())
    places = [(key, 0, field) for key in original for field in original[key][0]]
    if layout == "panoptic":
        places += [("annotations", 0, "segments_info", 1, f) for f in original["annotations"][0]["segments_info"][1]]
    for *way, field in places:
        for junk in JUNK:
            content = json.loads(json.dumps(original))
            record = content
            for step in way:
                record = record[step]
            record[field] = junk
            write_json(path, content)
            report = validate_dataset(root, workers=1)
            assert report.splits[0].checked >= 1 and json.dumps(report.to_dict())


class TestCityscapes:
    def test_label_is_missing(self, cityscapes):
        next(cityscapes.glob("gtFine/*/*/*labelIds.png")).unlink()
        assert kinds(cityscapes) == {"image_without_label"}

    def test_image_is_missing(self, cityscapes):
        path = next(cityscapes.glob("leftImg8bit/*/*/*.png"))
        path.rename(path.with_name("other_leftImg8bit.png"))
        assert {"label_without_image", "image_without_label"} <= kinds(cityscapes)

    def test_train_ids(self, cityscapes):
        path = next(cityscapes.glob("gtFine/*/*/*labelIds.png"))
        path.unlink()
        ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        ids[10:] = 255
        save(path.with_name(path.name.replace("labelIds", "labelTrainIds")), ids)
        assert kinds(cityscapes) == {"never_seen"}
        assert validate_dataset(cityscapes).splits[0].classes[0].pixels == 10 * WIDTH

    def test_unknown_label(self, cityscapes):
        path = next(cityscapes.glob("gtFine/*/*/*instanceIds.png"))
        save(path, np.full((HEIGHT, WIDTH), 40000, dtype=np.uint16))
        assert "ids_outside" in kinds(cityscapes, options={"instances": True})


@pytest.mark.parametrize("name", ["car [moving]", "[/]", "[bold]x[/]", ":smile:", "\x1b[31mred", "a\nERROR b"])
def test_names_of_classes_files_and_folders_are_text(name, folder):
    """In tables, headings and findings."""
    write_json(folder / "labels.json", {**NAMES, 1: name})
    file = name.replace("/", "|")
    root = folder.rename(folder.parent / f"folder {file}")
    save(root / "val" / "images" / f"file {file}.png", picture(7))
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["validate", str(root)])
    text, file = repr(name)[1:-1], repr(file)[1:-1]
    assert result.exit_code == 1 and f"folder {file}: layout folder" in result.stdout
    assert f" {text} " in result.stdout.split("Classes: images")[1] and f"file {file}" in result.stdout
    assert all(line.isprintable() for line in result.stdout.split("\n"))


def test_every_rule_has_an_advice():
    for kind, rule in RULES.items():
        assert rule.severity in ("error", "warning", "note") and rule.title and rule.advice.endswith((".", ")")), kind


def test_a_limit_reads_evenly_chosen_images(folder):
    report = validate_dataset(folder, limit=1)
    assert [(split.images, split.checked) for split in report.splits] == [(2, 1), (1, 1)]


def test_progress_reaches_the_end(folder):
    calls = []
    validate_dataset(folder, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


class TestCommand:
    def run(self, *arguments, code: int):
        result = CliRunner().invoke(app, ["validate", *(str(argument) for argument in arguments)])
        assert result.exit_code == code, result.output
        return result

    def test_good_data(self, folder, tmp_path):
        out = tmp_path / "report.json"
        result = self.run(folder, "--json", out, code=0)
        assert "0 errors, 0 warnings, 0 notes in 3 images" in result.stdout and "road" in result.stdout
        content = json.loads(out.read_text())
        assert content["ok"] and content["layout"] == "folder" and content["findings"] == []
        assert content["size"] == {"shortest_edge": 512, "longest_edge": 2048} and content["num_queries"] == 100
        train = content["splits"][0]
        assert (train["name"], train["images"], train["segments"]) == ("train", 2, 6)
        assert train["sizes"] == [{"height": HEIGHT, "width": WIDTH, "images": 2}]
        road = next(entry for entry in content["classes"] if entry["label_id"] == 1)
        assert road["name"] == "road" and road["splits"]["train"]["images"] == 2

    def test_errors(self, folder, tmp_path):
        save(folder / "train/labels/a.png", label_map()[:16])
        (folder / "val/images/c.png").write_bytes(b"")
        result = self.run(folder, "--json", tmp_path / "report.json", code=1)
        assert "train/labels/a.png: the label is 48 x 16" in result.stdout and "What to do" in result.stdout
        assert "2 errors" in result.stdout
        content = json.loads((tmp_path / "report.json").read_text())
        assert [finding["kind"] for finding in content["findings"]] == ["unreadable_image", "size_mismatch"]
        assert content["findings"][0]["file"] == "val/images/c.png" and not content["ok"]

    def test_only_one_split(self, folder):
        (folder / "val/images/c.png").write_bytes(b"")
        self.run(folder, "--split", "train", code=0)
        self.run(folder, "--split", "train", "--split", "val", code=1)

    def test_warnings_fail_only_where_strict(self, folder):
        self.run(folder, "--num-queries", "2", code=0)
        self.run(folder, "--num-queries", "2", "--strict", code=1)

    def test_size(self, folder):
        ids = label_map()
        ids[ids == 2] = 1
        ids[4, :12] = 2
        save(folder / "train/labels/a.png", ids)
        assert "vanish" not in self.run(folder, code=0).stdout
        assert "vanish" in self.run(folder, "--size", 8, code=0).stdout

    def test_void(self, folder):
        ids = label_map()
        ids[0] = 77
        save(folder / "train/labels/a.png", ids)
        self.run(folder, code=1)
        self.run(folder, "--void", "77", code=0)

    def test_a_split_that_training_makes_by_itself_is_not_missed(self, folder, tmp_path):
        for names, code in ((["train", "val"], 0), (["train", "valid"], 1), (["train"], 0), ([], 0)):
            data = tmp_path / "-".join([*names, "data"])
            shutil.copytree(folder / "train", data / (names[0] if names else ""))
            shutil.copy(folder / "labels.json", data)
            if len(names) > 1:
                shutil.copytree(folder / "val", data / names[1])
            report = tmp_path / f"{data.name}.json"
            self.run(data, "--recipe", "finetune", "--json", report, code=code)
            splits = [split["name"] for split in json.loads(report.read_text())["splits"]]
            assert splits == {0: [None], 1: ["train"]}.get(len(names), ["train", "val"])

    def test_recipe(self, folder, tmp_path):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(
            "data: {layout: folder, train_split: train, eval_split: val, options: {void_values: [77]}}\n"
            "model: {num_queries: 2}\nimage_processor: {size: {shortest_edge: 8, longest_edge: 32}}\n"
        )
        self.run(folder, "--recipe", recipe, "--json", tmp_path / "report.json", code=0)
        content = json.loads((tmp_path / "report.json").read_text())
        assert content["size"] == {"shortest_edge": 8, "longest_edge": 32} and content["num_queries"] == 2
        assert content["warnings"] == 3

    def test_wrong_calls(self, folder, tmp_path):
        self.run(tmp_path / "nowhere", code=2)
        self.run(folder, "--layout", "nowhere", code=2)
        self.run(folder, "--recipe", "no_such_recipe", code=2)
        self.run(folder, "--json", tmp_path / "nowhere" / "report.json", code=2)
        self.run(folder, "--size", "0", code=2)

    def test_help(self):
        assert "--strict" in self.run("--help", code=0).stdout


# (split -> images), segments of the whole set without background, layout; from the READMEs of the data
REAL = {
    "camvid": ({"train": 367, "val": 101, "test": 233}, "folder", 11),
    "clothing_parsing_ccp": ({"train": 536, "val": 134}, "folder", 59),
    "dsb2018_nuclei": ({"train": 532, "val": 132}, "folder", 2),
    "car_parts": ({"train": 400, "test": 100}, "coco_panoptic", 19),
    "coco_stuff_panoptic": ({"train": 13, "val": 8}, "coco_panoptic", 171),
    "coco_panoptic_sample": ({"examples": 2}, "coco_panoptic", 133),
}


@needs_shared
class TestRealData:
    @pytest.mark.parametrize("name", REAL)
    def test_has_no_errors_and_the_counts_of_its_readme(self, name):
        images, layout, classes = REAL[name]
        report = validate_dataset(SHARED / "data" / name, limit=10, size={"shortest_edge": 512, "longest_edge": 2048})
        assert report.ok and report.layout == layout, report.grouped()
        assert {split.name: split.images for split in report.splits} == images
        assert len(report.class_names) == classes

    def test_segments_of_the_small_sets(self):
        sample = validate_dataset(SHARED / "data/coco_panoptic_sample").splits[0]
        assert (sum(sample.segments), sample.crowds, len(sample.classes)) == (50, 3, 8)
        train, val = validate_dataset(SHARED / "data/coco_stuff_panoptic").splits
        assert (sum(train.segments), len(train.classes)) == (73 + 62, 57)
        assert (sum(val.segments), len(val.classes)) == (60 + 52, 62)
        assert (val.classes[62].segments, train.classes[84].segments) == (7, 12)

    def test_annotations_of_the_coco_files(self):
        for name in ("car_parts", "dsb2018_nuclei"):
            report = validate_dataset(SHARED / "data" / name, layout="coco_instances", limit=10)
            assert report.ok and report.kind == "instance", report.grouped()
            assert not {"area_mismatch", "box_mismatch", "empty_segment"} & set(report.grouped())
