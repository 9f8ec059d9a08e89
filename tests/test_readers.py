"""COCO instances and panoptic, tables of the datasets library, streams."""

from __future__ import annotations

import copy
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from conftest import SHARED, needs_shared
from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.data import (
    VOID,
    CocoInstances,
    CocoPanoptic,
    MaskClsCollator,
    Sample,
    SegmentationFolder,
    SegmentationStream,
    SegmentationTable,
    TrainTransform,
    open_dataset,
)
from maskcls_hf.data.files import read_colored_ids
from maskcls_hf.data.layouts.coco import Packed
from maskcls_hf.models import image_reading
from maskcls_hf.models.segments import NO_SEGMENT
from maskcls_hf.training.run import Cropped
from maskcls_hf.training.trainer import MaskClsTrainer
from samples import class_of_id, crowd_ids, id_map, others
from test_data import write_semantic
from tiny import maskcls_config

HEIGHT, WIDTH = 20, 30


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def as_polygon(top: int, left: int, bottom: int, right: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def as_counts(mask: np.ndarray, compressed: bool) -> dict:
    """Run lengths in columns, the first of zeros."""
    if compressed:
        runs = coco_mask.encode(np.asfortranarray(mask))
        return {"size": [HEIGHT, WIDTH], "counts": runs["counts"].decode()}
    flat = mask.flatten(order="F")
    starts = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(np.concatenate([[0], starts, [flat.size]])).tolist()}


BOXES = [(2, 3, 8, 9), (10, 3, 18, 12), (4, 15, 16, 28)]
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}]


def instances_json() -> dict:
    """Image 7 with a polygon, uncompressed run lengths and a compressed crowd; image 9 with nothing."""
    segmentations = [
        as_polygon(*BOXES[0]),
        as_counts(rectangle(*BOXES[1]), compressed=False),
        as_counts(rectangle(*BOXES[2]), compressed=True),
    ]
    annotations = [
        {"id": 100 + i, "image_id": 7, "category_id": [90, 3, 90][i], "iscrowd": int(i == 2), "segmentation": s}
        for i, s in enumerate(segmentations)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (7, 9)]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_images(folder: Path, names=("7", "9")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (WIDTH, HEIGHT), (int(name), 0, 0)).save(folder / f"{name}.png")


def write_coco(root: Path, content: dict | None = None) -> Path:
    write_images(root / "train" / "images")
    (root / "train" / "instances.json").write_text(json.dumps(content or instances_json()))
    return root


class TestCocoInstances:
    def test_polygons_and_both_kinds_of_run_lengths(self, tmp_path):
        data = open_dataset(write_coco(tmp_path), "train")
        assert isinstance(data, CocoInstances) and data.kind == "instance"
        assert data.id2label == {0: "cat", 1: "dog"} and data.label_ids == [3, 90] and data.stuff_ids == []
        sample = data[0]
        ids = id_map(sample)[0].numpy()
        for place, box in enumerate(BOXES, start=1):
            assert np.array_equal(ids == place, rectangle(*box).astype(bool))
        assert sample["segments"].index_map.dtype == torch.int8 and others(sample) == {NO_SEGMENT}
        assert class_of_id(sample) == {1: 1, 2: 0, 3: 1}
        assert crowd_ids(sample) == [3]
        assert sample["segments"].name == "7" and data.sizes() == [(HEIGHT, WIDTH)] * 2

    @pytest.mark.parametrize("overlap", [False, True])
    def test_scores_take_areas_from_the_file(self, tmp_path, overlap):
        content = instances_json()
        if overlap:
            content["annotations"][1]["segmentation"] = as_polygon(2, 3, 18, 12)
        content["annotations"][0]["area"] = 1234.5
        content["annotations"][1].pop("area", None)
        data = open_dataset(write_coco(tmp_path, content), "train", background="class")
        assert data[0]["segments"].overlap == overlap
        areas = data[0]["segments"].areas
        assert areas[1] == 1234.5 and areas[2].isnan()
        assert TrainTransform(crop_size=8)(data[0], 0)["segments"].areas is None
        assert Cropped(data, 8)[0]["segments"].areas is None

    def test_an_image_without_instances(self, tmp_path):
        sample = open_dataset(write_coco(tmp_path), "train")[1]
        assert id_map(sample).unique().tolist() == [0]
        assert class_of_id(sample) == {} and crowd_ids(sample) == [] and others(sample) == {NO_SEGMENT}

    @pytest.mark.parametrize(("background", "label"), [("negatives", None), ("void", VOID), ("class", 0)])
    @pytest.mark.parametrize("overlap", [False, True])
    def test_background(self, tmp_path, background, label, overlap):
        content = instances_json()
        if overlap:
            content["annotations"][1]["segmentation"] = as_polygon(2, 3, 18, 12)
        data = open_dataset(write_coco(tmp_path, content), "train", background=background)
        shift = int(background == "class")
        assert len(data.id2label) == 2 + shift
        assert (data.kind, data.stuff_ids) == (("panoptic", [0]) if shift else ("instance", []))
        sample = data[0]
        segments = sample["segments"]
        classes = {1: 1 + shift, 2: shift, 3: 1 + shift} | ({0: label} if background == "class" else {})
        assert class_of_id(sample) == classes and crowd_ids(sample) == [3] and segments.overlap == overlap
        if not overlap:
            assert others(sample) == {"negatives": {NO_SEGMENT}, "void": {VOID}, "class": set()}[background]
            return
        stack = segments.stack
        assert stack.shape == (3 + shift, HEIGHT, WIDTH)
        assert bool((stack[shift] & stack[1 + shift]).any())
        free = ~stack[shift:].any(0)
        if background == "class":
            assert torch.equal(stack[0], free)
        assert torch.equal(segments.void, free) if background == "void" else segments.void is None

    def test_unknown_background(self, tmp_path):
        with pytest.raises(ValueError, match="negatives"):
            CocoInstances(write_coco(tmp_path), "train", background="sky")

    @pytest.mark.parametrize(
        ("segmentation", "message"),
        [
            ([[1, 2, 3]], "three points"),
            ([[1, 2, 3, 4, 5, 6, 7]], "three points"),
            ([1, 2, 3, 4, 5, 6, 7], "three points"),
            ([[1, 2, 3, float("nan"), 5, 6]], "no numbers or far outside"),
            ([[1, 2, 3, 1e9, 5, 6]], "no numbers or far outside"),
            ({"size": [30, 20], "counts": [600]}, r"size \[30, 20\], the image is \[20, 30\]"),
            ({"size": [20, 30], "counts": [10, 20]}, "cover 30 pixels, the image has 600"),
            ({"size": [20, 30], "counts": [700, -100]}, "cover 600 pixels"),
            ({"size": [20, 30], "counts": "abc"}, "not COCO's compressed run lengths: 'abc'"),
            ({"size": [20, 30], "counts": "\u00ff0"}, "not COCO's compressed run lengths"),
            ({"size": [20, 30]}, "without counts"),
        ],
    )
    def test_broken_masks_name_file_image_and_annotation(self, tmp_path, segmentation, message):
        content = instances_json()
        content["annotations"][1]["segmentation"] = segmentation
        data = open_dataset(write_coco(tmp_path, content), "train")
        with pytest.raises(ValueError, match=rf"train/instances\.json, image 7 \(7\.png\), annotation 101.*{message}"):
            data[0]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c.pop("categories"), "lacks categories"),
            (lambda c: c["images"][0].update(height=0), r"images\[0\] \(id 7\) has height 0, not a number of pixels"),
            (lambda c: c["images"][1].update(id=7), "several images have one id"),
            (lambda c: c["annotations"][0].update(image_id=8), "annotation 100 is of image 8"),
            (lambda c: c["annotations"][0].update(category_id=1), "annotation 100 is of category 1, which"),
            (lambda c: (c["images"].clear(), c["annotations"].clear()), "No folder with|lists no images"),
        ],
    )
    def test_broken_files_are_named(self, tmp_path, change, message):
        content = copy.deepcopy(instances_json())
        change(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            open_dataset(write_coco(tmp_path, content), "train")
        assert "instances.json" in str(error.value)

    def test_the_size_of_the_file_counts_where_the_json_has_none(self, tmp_path):
        content = instances_json()
        content["images"][0].pop("height")
        data = open_dataset(write_coco(tmp_path, content), "train")
        assert data.sizes()[data.image_ids.index(7)] == (HEIGHT, WIDTH)
        assert data[data.image_ids.index(7)]["segments"].size == (HEIGHT, WIDTH)

    @pytest.mark.parametrize("segmentation", [[], [[]], None, [[1, 2, 3, 4]]])
    def test_a_box_alone_is_skipped_or_taken_as_mask(self, tmp_path, segmentation, caplog):
        content = instances_json()
        content["annotations"][1].update(segmentation=segmentation, bbox=[2, 3, 5, 4])
        root = write_coco(tmp_path, content)
        assert 101 not in [i.id for i in open_dataset(root, "train").instances(0)]
        with_boxes = open_dataset(root, "train", boxes=True)
        place = [i.id for i in with_boxes.instances(0)].index(101)
        assert with_boxes[0]["segments"].mask_runs[place].box == [2, 3, 5, 4]

    def test_a_polygon_without_an_outer_list(self, tmp_path):
        content = instances_json()
        content["annotations"][1]["segmentation"] = [2, 3, 7, 3, 7, 7, 2, 7]
        data = open_dataset(write_coco(tmp_path, content), "train")
        assert 20 in [mask.area for mask in data[0]["segments"].mask_runs]

    @pytest.mark.parametrize(("attributes", "crowd"), [({"occluded": False}, False), (None, True)])
    def test_masks_of_cvats_brush_are_objects(self, tmp_path, attributes, crowd):
        content = instances_json()
        rle = {"size": [HEIGHT, WIDTH], "counts": [5, 10, HEIGHT * WIDTH - 15]}
        content["annotations"][1].update(segmentation=rle, iscrowd=1, attributes=attributes)
        data = open_dataset(write_coco(tmp_path, content), "train")
        place = [i.id for i in data.instances(0)].index(101)
        assert data[0]["segments"].is_crowd[place].item() is crowd

    def test_json_that_is_none_and_missing_images(self, tmp_path):
        root = write_coco(tmp_path)
        (root / "train" / "images" / "9.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"1 images of .*instances\.json are missing from .*: 9\.png"):
            open_dataset(root, "train")
        (root / "train" / "instances.json").write_text('{"images": [')
        with pytest.raises(ValueError, match=r"instances\.json is not valid JSON"):
            open_dataset(root, "train")

    def test_an_image_of_another_size_than_the_json_says(self, tmp_path):
        root = write_coco(tmp_path)
        Image.new("RGB", (HEIGHT, WIDTH)).save(root / "train" / "images" / "7.png")
        with pytest.raises(ValueError, match=r"image 7 \(7\.png\) is 30 x 20 pixels.*20 x 30.*EXIF"):
            open_dataset(root, "train")[0]

    def test_the_layout_of_coco_itself(self, tmp_path):
        write_images(tmp_path / "val2017")
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(instances_json()))
        data = open_dataset(tmp_path, "val2017")
        assert isinstance(data, CocoInstances) and len(data) == 2 and data.image_folder == tmp_path / "val2017"

    def test_loader_workers_get_a_pickled_copy(self, tmp_path):
        data = open_dataset(write_coco(tmp_path), "train")
        again = pickle.loads(pickle.dumps(data))
        assert torch.equal(id_map(again[0]), id_map(data[0]))

    @needs_shared
    @pytest.mark.parametrize(("name", "split"), [("car_parts", "test"), ("dsb2018_nuclei", "val")])
    def test_masks_equal_pycocotools(self, name, split, capsys):
        data = CocoInstances(SHARED / "data" / name, split)
        coco = COCO(data.json_path)
        assert sum(len(data.instances(i)) for i in range(len(data))) == {"car_parts": 855, "dsb2018_nuclei": 5545}[name]
        for index in range(0, len(data), 6):
            annotations = coco.loadAnns(coco.getAnnIds(data.image_ids[index]))
            sample = data[index]
            stack = sample["segments"].stack
            for place, annotation in enumerate(annotations):
                mask = stack[place]
                assert np.array_equal(mask.numpy(), coco.annToMask(annotation).astype(bool))
                assert int(mask.sum()) == annotation["area"]
                label = class_of_id(sample)[place + 1]
                assert data.label_ids[label] == annotation["category_id"]
                if place > 5:
                    break

    @needs_shared
    def test_places_in_the_json_are_the_numbers_of_the_instance_pngs(self):
        """As the README of the nuclei says."""
        folder = SegmentationFolder(SHARED / "data" / "dsb2018_nuclei", "val")
        coco = CocoInstances(SHARED / "data" / "dsb2018_nuclei", "val")
        places = {name: place for place, name in enumerate(coco.names)}
        assert sorted(places) == folder.names
        for index in range(0, len(folder), 5):
            pixels = id_map(coco[places[folder.names[index]]])
            assert torch.equal(pixels, id_map(folder[index]))


def colored(ids: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8))


def panoptic_json() -> tuple[dict, np.ndarray]:
    """Void, a cat, a crowd of cats, sky; category ids 3, 90 and 200."""
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    ids[2:8, 3:9], ids[10:18, 3:12], ids[:, 15:] = 70000, 300, 5
    segments = [
        {"id": 70000, "category_id": 90, "iscrowd": 0, "area": 36},
        {"id": 300, "category_id": 90, "iscrowd": 1, "area": 72},
        {"id": 5, "category_id": 200, "iscrowd": 0, "area": 300},
    ]
    categories = [
        {"id": 200, "name": "sky", "isthing": 0},
        {"id": 90, "name": "cat", "isthing": 1},
        {"id": 3, "name": "dog", "isthing": 1},
    ]
    images = [{"id": 7, "file_name": "7.png", "height": HEIGHT, "width": WIDTH}]
    annotations = [{"image_id": 7, "file_name": "7.png", "segments_info": segments}]
    return {"images": images, "annotations": annotations, "categories": categories}, ids


def write_panoptic(root: Path, content: dict | None = None, ids: np.ndarray | None = None) -> Path:
    own, own_ids = panoptic_json()
    write_images(root / "train" / "images", ["7"])
    (root / "train" / "panoptic").mkdir(parents=True)
    colored(own_ids if ids is None else ids).save(root / "train" / "panoptic" / "7.png")
    (root / "train" / "panoptic.json").write_text(json.dumps(content or own))
    return root


class TestReadColoredIds:
    @pytest.mark.parametrize("in_place", [True, False])
    def test_every_source(self, in_place, tmp_path, monkeypatch):
        if not in_place:
            monkeypatch.setattr(image_reading, "_memory_of", lambda image: None)
        ids = np.random.default_rng(0).integers(0, 2**24, (HEIGHT, WIDTH), dtype=np.int32)
        colors = ids.view(np.uint8).reshape(HEIGHT, WIDTH, 4)
        colored(ids).save(tmp_path / "ids.png")
        # Pillow keeps four bytes a pixel; here the fourth has all values
        four_bytes = colors + np.arange(WIDTH, dtype=np.uint8)[:, None] * np.uint8([0, 0, 0, 1])
        in_memory = Image.frombytes("RGB", (WIDTH, HEIGHT), four_bytes.tobytes(), "raw", "RGBX")
        for source in (tmp_path / "ids.png", in_memory, colors[..., :3]):
            found = read_colored_ids(source, "ids")
            assert found.dtype == torch.int32 and np.array_equal(found.numpy(), ids)

    def test_other_modes(self):
        with pytest.raises(ValueError, match=r"ids has shape \(2, 2, 4\) \(RGBA\)"):
            read_colored_ids(Image.new("RGBA", (2, 2)), "ids")


class TestCocoPanoptic:
    def test_ids_crowd_void_and_gaps(self, tmp_path):
        data = open_dataset(write_panoptic(tmp_path), "train")
        assert isinstance(data, CocoPanoptic) and data.kind == "panoptic" and data.has_instances
        assert data.id2label == {0: "dog", 1: "cat", 2: "sky"} and data.label_ids == [3, 90, 200]
        assert data.stuff_ids == [2]
        sample = data[0]
        assert np.array_equal(id_map(sample, void=0)[0].numpy(), panoptic_json()[1])
        assert class_of_id(sample) == {70000: 1, 300: 1, 5: 2} and others(sample) == {VOID}
        assert crowd_ids(sample) == [300]

    def test_with_instances_beside_it_panoptic_is_preferred(self, tmp_path):
        root = write_coco(write_panoptic(tmp_path))
        assert isinstance(open_dataset(root, "train"), CocoPanoptic)
        assert isinstance(open_dataset(root, "train", layout="coco_instances"), CocoInstances)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c: c["annotations"][0]["segments_info"].pop(), r"7\.png has 1 segment ids that .* not list: 5"),
            (
                lambda c: c["annotations"][0]["segments_info"][0].update(id=0),
                r"7\.png: segments_info\[0\] has id 0, which is void",
            ),
            (
                lambda c: c["annotations"][0]["segments_info"][0].update(category_id=4),
                r"7\.png: segments_info\[0\] is of category 4, which",
            ),
            (lambda c: c["annotations"][0].pop("segments_info"), "no segments_info, so this is no panoptic file"),
            (
                lambda c: c["annotations"].append(c["annotations"][0]),
                r"image 7 has several panoptic annotations, also 7\.png",
            ),
            (lambda c: c["categories"][0].pop("isthing"), "categories without isthing: 'sky'"),
            (lambda c: c["annotations"][0].update(file_name="8.png"), "No folder with 8.png"),
        ],
    )
    def test_broken_files_are_named(self, tmp_path, change, message):
        content = panoptic_json()[0]
        change(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            open_dataset(write_panoptic(tmp_path, content), "train")[0]
        assert "panoptic.json" in str(error.value)

    def test_a_png_with_one_channel(self, tmp_path):
        root = write_panoptic(tmp_path)
        Image.new("L", (WIDTH, HEIGHT)).save(root / "train" / "panoptic" / "7.png")
        with pytest.raises(ValueError, match=r"panoptic/7\.png has shape \(20, 30\) \(L\).*three channels"):
            open_dataset(root, "train")[0]

    def test_the_layout_of_coco_itself(self, tmp_path):
        write_images(tmp_path / "train2017", ["7"])
        content, ids = panoptic_json()
        (tmp_path / "annotations" / "panoptic_train2017").mkdir(parents=True)
        colored(ids).save(tmp_path / "annotations" / "panoptic_train2017" / "7.png")
        (tmp_path / "annotations" / "panoptic_train2017.json").write_text(json.dumps(content))
        assert crowd_ids(open_dataset(tmp_path, "train2017")[0]) == [300]
        (tmp_path / "annotations" / "panoptic_train2017").rename(tmp_path / "panoptic_train2017")
        assert crowd_ids(open_dataset(tmp_path, "train2017")[0]) == [300]

    @needs_shared
    @pytest.mark.parametrize(
        ("name", "split", "segments", "crowds", "stuff_classes"),
        [
            ("coco_panoptic_sample", None, 50, 3, 53),
            ("coco_stuff_panoptic", "train", 135, 0, 91),
            ("coco_stuff_panoptic", "val", 112, 0, 91),
            ("car_parts", "test", 955, 0, 1),
        ],
    )
    def test_areas_of_the_pngs_are_those_of_the_json(self, name, split, segments, crowds, stuff_classes):
        data = open_dataset(SHARED / "data" / name, split)
        assert len(data.stuff_ids) == stuff_classes
        assert sum(len(data.segments_info(i)) for i in range(len(data))) == segments
        assert sum(segment.crowd for i in range(len(data)) for segment in data.segments_info(i)) == crowds
        for index in range(0, len(data), 1 + len(data) // 12):
            ids, counts = id_map(data[index], void=0).unique(return_counts=True)
            areas = dict(zip(ids.tolist(), counts.tolist(), strict=True))
            areas.pop(0, None)
            assert areas == {segment.id: segment.area for segment in data.segments_info(index)}

    @needs_shared
    def test_classes_of_coco_stuff_are_those_of_its_semantic_maps(self):
        """Category id = semantic value + 1, says its README; the pixels come from two files."""
        panoptic = open_dataset(SHARED / "data" / "coco_stuff_panoptic", "val")
        semantic = open_dataset(SHARED / "data" / "coco_stuff_panoptic", "val", layout="folder")
        assert panoptic.names == semantic.names and panoptic.id2label == semantic.id2label
        for segments, classes in zip(panoptic, semantic, strict=True):
            assert torch.equal(segments["segments"].semantic_map(255)[None], id_map(classes))


def test_packed_objects_come_back():
    items = [[(1, 2.5, "a")], [], {"counts": "x" * 1000}]
    packed = Packed(items)
    assert [packed[i] for i in range(len(packed))] == items
    assert len(Packed([])) == 0


def encoded(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def semantic_rows(count: int = 8) -> list[dict]:
    """Image n has red n; labels 0 (other), 1, 2."""
    labels = Image.fromarray(np.repeat(np.array([[0, 1, 2]], dtype=np.uint8), 6, axis=0).repeat(5, axis=1))
    return [{"image": encoded(Image.new("RGB", (15, 6), (n, 0, 0))), "label": encoded(labels)} for n in range(count)]


def semantic_table(count: int = 8) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    return datasets.Dataset.from_list(semantic_rows(count), features=features)


NAMES = {1: "wall", 2: "floor"}


class TestSegmentationTable:
    def test_semantic(self):
        data = SegmentationTable(semantic_table(), id2label=NAMES, void_values=[0])
        assert len(data) == 8 and data.id2label == {0: "wall", 1: "floor"} and data.stuff_ids == [0, 1]
        sample = data[3]
        assert id_map(sample)[0, 0, ::5].tolist() == [255, 0, 1]
        assert sample["image"][:, 0, 0].tolist() == [3, 0, 0] and sample["segments"].name == "3"
        assert data.sizes() == [(6, 15)] * 8

    def test_gives_what_the_folder_reader_gives(self, tmp_path):
        folder = SegmentationFolder(write_semantic(tmp_path), "train")
        rows = [{"photo": str(i), "mask": str(m), "name": i.stem} for i, m in folder.files]
        features = datasets.Features(
            {"photo": datasets.Image(), "mask": datasets.Image(), "name": datasets.Value("string")}
        )
        table = datasets.Dataset.from_list(rows, features=features)
        names = tmp_path / "labels.json"
        data = SegmentationTable(table, "photo", "mask", id2label=str(names), name_column="name")
        assert data.sizes() == folder.sizes()
        for ours, theirs in zip(data, folder, strict=True):
            assert torch.equal(ours["image"], theirs["image"])
            assert torch.equal(id_map(ours), id_map(theirs))
            assert ours["segments"].name == theirs["segments"].name

    def test_arrays_instead_of_images(self):
        rows = [{"image": np.zeros((6, 15, 3), np.uint8), "label": np.ones((6, 15), np.uint8)}]
        features = datasets.Features(
            {"image": datasets.Array3D((6, 15, 3), "uint8"), "label": datasets.Array2D((6, 15), "uint8")}
        )
        data = SegmentationTable(datasets.Dataset.from_list(rows, features=features), id2label=NAMES)
        assert id_map(data[0]).unique().tolist() == [0] and data.sizes() == [(6, 15)]

    @pytest.mark.parametrize("form", ["records", "columns", "dict"])
    @pytest.mark.parametrize("color", [False, True])
    def test_instances(self, form, color):
        ids = panoptic_json()[1] % 65536  # 4464, 300, 5
        records = [{"id": 4464, "label_id": 90}, {"id": 300, "label_id": 90}, {"id": 5, "label_id": 200}]
        segments = {
            "records": [{**record, "iscrowd": int(record["id"] == 300)} for record in records],
            "columns": {"id": [4464, 300, 5], "label_id": [90, 90, 200], "iscrowd": [0, 1, 0]},
            "dict": {str(record["id"]): record["label_id"] for record in records},
        }[form]
        label = encoded(colored(ids) if color else Image.fromarray(ids.astype(np.uint16)))
        other = {"1": 90} if form == "dict" else segments  # the dicts of all rows have the same keys in a table
        blank = encoded(Image.fromarray(np.full((HEIGHT, WIDTH), 1 if form == "dict" else 5, dtype=np.uint16)))
        image = encoded(Image.new("RGB", (WIDTH, HEIGHT)))
        table = datasets.Dataset.from_list(
            [{"image": image, "label": label, "s": segments}, {"image": image, "label": blank, "s": other}]
        )
        table = table.cast_column("image", datasets.Image()).cast_column("label", datasets.Image())
        data = SegmentationTable(table, id2label={90: "cat", 200: "sky"}, segments_column="s", stuff=[200])
        assert data.kind == "panoptic" and data.stuff_ids == [1]
        sample = data[0]
        assert np.array_equal(id_map(sample, void=0)[0].numpy(), ids)
        assert class_of_id(sample) == {4464: 0, 300: 0, 5: 1} and others(sample) == {VOID}
        assert crowd_ids(sample) == ([] if form == "dict" else [300])
        assert id_map(data[1]).unique().tolist() == [1 if form == "dict" else 5]

    def test_background_as_negatives(self):
        row = {"image": np.zeros((2, 4, 3), np.uint8), "label": [[0, 0, 1, 1]] * 2, "s": [{"id": 1, "label": 5}]}
        table = datasets.Dataset.from_list([row])
        data = SegmentationTable(table, id2label={5: "cat"}, segments_column="s", background="negatives")
        assert class_of_id(data[0]) == {1: 0} and others(data[0]) == {NO_SEGMENT} and data.kind == "instance"

    def test_errors_name_row_and_column(self):
        with pytest.raises(ValueError, match=r"no column 'mask'; it has image, label"):
            SegmentationTable(semantic_table(), label_column="mask", id2label=NAMES)
        with pytest.raises(ValueError, match=r"column 'label' of row 2 holds label values 0 "):
            SegmentationTable(semantic_table(), id2label=NAMES)[2]
        rows = semantic_rows(2)
        rows[1]["label"]["bytes"] = rows[1]["label"]["bytes"][:50]
        broken = datasets.Dataset.from_list(rows, features=semantic_table().features)
        with pytest.raises(ValueError, match=r"column 'label' of row 1 cannot be read as an image"):
            SegmentationTable(broken, id2label=NAMES, void_values=[0])[1]
        row = {"image": np.zeros((2, 4, 3), np.uint8), "label": [[0, 0, 1, 2]] * 2, "s": [{"id": 1, "label": 5}]}
        table = datasets.Dataset.from_list([row])
        with pytest.raises(ValueError, match=r"column 's' of row 0 does not list 1 segments of the map: 2"):
            SegmentationTable(table, id2label={5: "cat"}, segments_column="s")[0]
        with pytest.raises(ValueError, match=r"segment 1 has class 5, which id2label does not name"):
            SegmentationTable(table, id2label={6: "cat"}, segments_column="s")[0]
        with pytest.raises(ValueError, match=r"column 'label' of row 0 is no list of segments"):
            SegmentationTable(table, id2label={5: "cat"}, segments_column="label")[0]

    @pytest.mark.parametrize("column", ["segments_column", "name_column", "image_column", "label_column"])
    def test_every_column_is_looked_for_at_once(self, column):
        table = semantic_table()
        for kind, rows in ((SegmentationTable, table), (SegmentationStream, table.to_iterable_dataset())):
            with pytest.raises(ValueError, match=r"no column 'absent'; it has image, label"):
                kind(rows, id2label=NAMES, void_values=[0], **{column: "absent"})
        unknown = datasets.IterableDataset.from_generator(lambda: iter([{"image": np.zeros((2, 2, 3), np.uint8)}]))
        with pytest.raises(ValueError, match="row 0 of the stream has no column"):
            list(SegmentationStream(unknown, id2label=NAMES, **{column: "absent"}))

    def test_the_other_kind_of_table_and_all_splits(self):
        table = semantic_table()
        with pytest.raises(TypeError, match="SegmentationStream"):
            SegmentationTable(table.to_iterable_dataset(), id2label=NAMES)
        with pytest.raises(TypeError, match="SegmentationTable"):
            SegmentationStream(table, id2label=NAMES)
        for kind in (SegmentationTable, SegmentationStream):
            with pytest.raises(TypeError, match="choose from train, val"):
                kind(datasets.DatasetDict(train=table, val=table), id2label=NAMES)

    def test_bytes_and_paths_of_files(self, tmp_path):
        expected = SegmentationTable(semantic_table(1), id2label=NAMES, void_values=[0])
        contents = {name: value["bytes"] for name, value in semantic_rows(1)[0].items()}
        paths = {name: str(tmp_path / f"{name}.png") for name in contents}
        for name, path in paths.items():
            Path(path).write_bytes(contents[name])
        for row, kind in ((contents, "binary"), (paths, "string")):
            features = datasets.Features({name: datasets.Value(kind) for name in row})
            table = datasets.Dataset.from_list([row], features=features)
            data = SegmentationTable(table, id2label=NAMES, void_values=[0])
            assert torch.equal(data[0]["image"], expected[0]["image"]) and data.sizes() == [(6, 15)]
            assert torch.equal(id_map(data[0]), id_map(expected[0]))
        Path(paths["label"]).unlink()
        with pytest.raises(FileNotFoundError, match=r"column 'label' of row 0: no file .*label\.png"):
            data[0]

    @pytest.mark.parametrize("value", [b"no image", None, [["a", "b"]], b"", [[1, 2], [3]], "x" * 5000])
    def test_values_that_are_no_image_name_row_and_column(self, value):
        table = datasets.Dataset.from_list([{"image": value, "label": [[0, 1]]}])
        for kind in (table, table.to_iterable_dataset()):
            data = (SegmentationTable if kind is table else SegmentationStream)(kind, id2label=NAMES, void_values=[0])
            with pytest.raises(ValueError, match="column 'image' of row 0"):
                next(iter(data))

    def test_an_option_of_instances_alone(self):
        with pytest.raises(ValueError, match="background='negatives' is of instance maps: segments_column"):
            SegmentationTable(semantic_table(), id2label=NAMES, background="negatives")

    def test_the_mode_of_a_column_is_kept(self):
        """As `datasets` itself gives the images."""
        ids, picture = Image.fromarray(np.eye(6, 15, dtype=np.uint8)), Image.new("RGBA", (15, 6), (200, 0, 0, 10))
        features = datasets.Features({"image": datasets.Image(mode="RGB"), "label": datasets.Image(mode="L")})
        table = datasets.Dataset.from_dict({"image": [picture], "label": [ids.convert("RGB")]}, features=features)
        assert table[0]["label"].mode == "L"
        for data in (
            SegmentationTable(table, id2label={0: "a", 1: "b"}),
            SegmentationStream(table.to_iterable_dataset(), id2label={0: "a", 1: "b"}),
        ):
            sample = next(iter(data))
            assert np.array_equal(id_map(sample)[0].numpy(), np.asarray(table[0]["label"]))
            assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), np.asarray(table[0]["image"]))

    def test_void_and_wrong_records_of_instances(self):
        row = {"image": np.zeros((2, 4, 3), np.uint8), "label": [[0, 255, 1, 1]] * 2}

        def table(*records: dict) -> datasets.Dataset:
            return datasets.Dataset.from_list([{**row, "s": list(records)}])

        options = dict(id2label={5: "cat"}, segments_column="s", void_values=[255])
        good = {"id": 1, "label": 5}
        data = SegmentationTable(table(good), **options)
        assert class_of_id(data[0]) == {1: 0} and others(data[0]) == {VOID}
        assert (data[0]["segments"].index_map == VOID).sum() == 4
        for records, message in (
            ([good, good], "column 's' of row 0 lists segments twice: 1"),
            ([good, {"id": 255, "label": 5}], "segments 255, which void_values calls void"),
            ([{"id": 1.5, "label": 5.0}], "column 's' of row 0 is no list of segments"),
            ([{"id": "1", "label": "5", "iscrowd": "maybe"}], "column 's' of row 0 is no list of segments"),
            ([{"id": 1, "label": 5, "iscrowd": 7}], "column 's' of row 0 is no list of segments"),
        ):
            with pytest.raises(ValueError, match=message):
                SegmentationTable(table(*records), **options)[0]
        texts = table({"id": "1", "label": "5", "iscrowd": "0"})
        assert crowd_ids(SegmentationTable(texts, **options)[0]) == []


def numbers(batches) -> list[int]:
    """The red of the images: the number of the row."""
    return [int(sample["image"][0, 0, 0]) for sample in batches]


def first(samples: list) -> object:
    return samples[0]


def renamed(sample: Sample, seed: tuple[int, ...]) -> Sample:
    return {**sample, "segments": replace(sample["segments"], name=str(seed))}


class TestSegmentationStream:
    def stream(self, shards: int = 4, shuffle: bool = False, **options) -> SegmentationStream:
        rows = semantic_table().to_iterable_dataset(num_shards=shards)
        if shuffle:
            rows = rows.shuffle(seed=1, buffer_size=4)
        return SegmentationStream(rows, id2label=NAMES, void_values=[0], **options)

    def test_gives_what_the_table_gives(self):
        table = SegmentationTable(semantic_table(), id2label=NAMES, void_values=[0])
        stream = self.stream()
        assert stream.model_fields() == table.model_fields()
        assert stream.processor_fields() == table.processor_fields()
        with pytest.raises(TypeError):
            len(stream)
        for ours, theirs in zip(stream, table, strict=True):
            assert torch.equal(ours["image"], theirs["image"]) and ours["segments"].name == theirs["segments"].name
            assert torch.equal(id_map(ours), id_map(theirs))

    def test_workers_share_the_shards(self):
        loader = DataLoader(self.stream(), batch_size=1, num_workers=2, collate_fn=first)
        seen = numbers(loader)
        assert sorted(seen) == list(range(8))

    def test_the_order_changes_with_the_epoch_also_in_persistent_workers(self):
        stream = self.stream(shuffle=True)
        loader = DataLoader(stream, batch_size=1, num_workers=2, collate_fn=first, persistent_workers=True)
        orders = []
        for epoch in (0, 1, 0):
            stream.set_epoch(epoch)
            orders.append(numbers(loader))
        assert orders[0] == orders[2] != orders[1]
        assert sorted(orders[1]) == list(range(8))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_the_transform_is_seeded_by_seed_epoch_and_number(self, workers):
        stream = self.stream(transform=renamed, seed=5)
        stream.set_epoch(3)
        loader = DataLoader(stream, batch_size=1, num_workers=workers, collate_fn=first)
        assert sorted(sample["segments"].name for sample in loader) == [f"(5, 3, {number})" for number in range(8)]

    def test_with_train_transform_and_collator(self):
        stream = self.stream(transform=TrainTransform(crop_size=32), seed=1)
        collator = MaskClsCollator(MaskClsImageProcessor(**stream.processor_fields()), do_resize=False)
        batches = [list(DataLoader(stream, batch_size=4, collate_fn=collator)) for _ in range(2)]
        assert [batch["pixel_values"].shape for batch in batches[0]] == [(4, 3, 32, 32)] * 2
        for one, other in zip(*batches, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])

    def test_a_broken_row_is_named(self):
        rows = semantic_rows(3)
        rows[1]["image"]["bytes"] = b"no image"
        table = datasets.Dataset.from_list(rows, features=semantic_table().features)
        stream = SegmentationStream(table.to_iterable_dataset(), id2label=NAMES, void_values=[0])
        with pytest.raises(ValueError, match="column 'image' of row 1 of the stream cannot be read"):
            list(stream)

    def test_accelerate(self):
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
        stream = self.stream(shuffle=True)
        collator = MaskClsCollator(MaskClsImageProcessor(**stream.processor_fields()), do_resize=False)
        loader = accelerator.prepare(DataLoader(stream, batch_size=4, collate_fn=collator, num_workers=2))
        orders = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            batches = list(loader)
            assert all(labels.tolist() == [0, 1] for batch in batches for labels in batch["class_labels"])
            orders.append(torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in batches]).tolist())
        assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1] and len(orders[0]) == 8

    def test_trainer(self, tmp_path):
        stream = self.stream(shuffle=True, transform=TrainTransform(crop_size=64, scale=(1, 1)))
        model = MaskClsForUniversalSegmentation(maskcls_config(**stream.model_fields()))
        seen = []
        model.register_forward_pre_hook(lambda _, args, batch: seen.extend(batch["class_labels"]), with_kwargs=True)
        trainer = MaskClsTrainer(
            model,
            TrainingArguments(
                tmp_path,
                max_steps=9,
                per_device_train_batch_size=1,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=stream,
            data_collator=MaskClsCollator(MaskClsImageProcessor(**stream.processor_fields()), do_resize=False),
        )
        trainer.train()
        assert len(seen) == 9 and trainer.state.epoch > 1  # the stream has 8 images
        assert max(len(labels) for labels in seen) == 2  # more segments than images of a batch: nothing was cut off

    def test_processes_of_accelerate_see_different_samples(self):
        """What accelerate makes of the stream on each of two processes."""
        from accelerate.data_loader import prepare_data_loader

        seen = []
        for process in range(2):
            loader = DataLoader(self.stream(), batch_size=2, collate_fn=numbers)
            prepared = prepare_data_loader(loader, num_processes=2, process_index=process, dispatch_batches=False)
            seen.append([number for batch in prepared for number in batch])
        assert len(seen[0]) == len(seen[1]) == 4
        assert sorted(seen[0] + seen[1]) == list(range(8))
