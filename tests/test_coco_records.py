"""COCO files of any content: readers and `validate` say the same, with file, record and field; names lead nowhere."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskcls_hf.data import open_dataset
from maskcls_hf.data.files import read_json
from maskcls_hf.data.layouts.coco_records import MOST_PIXELS
from maskcls_hf.data.layouts.drawing import run_lengths
from maskcls_hf.data.validation import Finding, validate_dataset
from maskcls_hf.data.validation.occurrence import told_of_classes
from samples import crowd_ids

HEIGHT, WIDTH = 48, 64
SQUARE = [5, 5, 25, 5, 25, 25, 5, 25]
WHOLE_IMAGE = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
KINDS = ("instances", "panoptic")
DELETED = object()


def content_of(kind: str) -> dict[str, Any]:
    images = [{"id": i, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for i, n in ((1, "a"), (2, "b"))]
    if kind == "instances":
        square = {"id": 7, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400, "segmentation": [SQUARE]}
        whole = {"id": 8, "image_id": 2, "category_id": 2, "segmentation": copy.deepcopy(WHOLE_IMAGE)}
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        return {"images": images, "categories": categories, "annotations": [square, whole]}
    categories = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    annotations = [
        {"image_id": i, "file_name": f"{n}.png", "segments_info": [{"id": 1, "category_id": i, "iscrowd": 0}]}
        for i, n in ((1, "a"), (2, "b"))
    ]
    return {"images": images, "categories": categories, "annotations": annotations}


def write(
    root: Path,
    kind: str = "instances",
    content: Any = None,
    *,
    json_path: str | None = None,
    names: tuple[str, ...] = ("a.png", "b.png"),
    images: str = "train/images",
    maps: str = "train/panoptic",
) -> Path:
    for place, name in enumerate(names):
        (root / images).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(place).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / images / name)
        if kind == "panoptic":
            (root / maps).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (WIDTH, HEIGHT), (1, 0, 0)).save(root / maps / name)
    path = root / (json_path or f"train/{kind}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content_of(kind) if content is None else content))
    return root


def refusal(root: Path, split: str | None = "train", **options: Any) -> str | None:
    """What the reader says; None: it reads everything. Other errors than those of bad data fail the test."""
    try:
        dataset = open_dataset(root, split, **options)
        for index in range(len(dataset)):
            dataset[index]
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


def errors(root: Path, layout: str | None = None, **options: Any) -> list[Finding]:
    findings = validate_dataset(root, layout=layout, workers=1, options=options).findings
    return [finding for finding in findings if finding.severity == "error" and finding.kind != "nothing_to_learn"]


def agreed(root: Path, kind: str = "instances") -> str | None:
    """What the reader says, if validate finds an error of the same words, too; None: both find nothing."""
    said, found = refusal(root, layout=f"coco_{kind}"), errors(root, f"coco_{kind}")
    assert bool(said) == bool(found), (said, found)
    if said is None:
        return None
    assert f"{kind}.json" in said or ".png" in said
    assert said.isprintable() and len(said) < 700
    assert "reader_refuses" not in {finding.kind for finding in found}
    words = [
        word for f in found for word in (f.message.rstrip(".").removeprefix("no map "), Path(f.file or "none").name)
    ]
    assert any(word in said for word in words), (said, found)
    return said


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Ways to every value of a content."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(content[key], (*path, key))


def put(content: Any, place: tuple, value: Any) -> Any:
    changed = copy.deepcopy(content)
    record = changed
    for step in place[:-1]:
        record = record[step]
    if value is DELETED:
        del record[place[-1]]
    else:
        record[place[-1]] = value
    return changed


VALUES = [None, "x", "1", -1, 0.5, True, [], {"a": 1}, math.nan, 10**400, "\x1b[31m", "\ud800", DELETED]
SOME_VALUES = [None, "1", -1, 0.5, [[[]]], DELETED]


@pytest.mark.parametrize("kind", KINDS)
def test_reader_and_validate_agree_whatever_stands_in_a_field(tmp_path, kind):
    good = content_of(kind)
    write(tmp_path, kind)
    assert agreed(tmp_path, kind) is None
    refused = 0
    for place in places(good):
        in_second = len(place) > 1 and place[1] == 1  # of two records, which are of one form but for masks
        if in_second and place[-1] not in ("size", "counts"):
            continue
        for value in VALUES if len(place) in (3, 5) else SOME_VALUES:
            (tmp_path / f"train/{kind}.json").write_text(json.dumps(put(good, place, value)))
            refused += agreed(tmp_path, kind) is not None
    assert refused > 150


FIELDS: list[tuple[str, tuple, Any, str]] = [
    ("instances", ("annotations", 0, "category_id"), DELETED, "annotations[0] (id 7) has no category_id"),
    ("instances", ("annotations", 0, "image_id"), DELETED, "annotations[0] (id 7) has no image_id"),
    ("instances", ("annotations", 0), None, "annotations[0] is null, not a record"),
    ("instances", ("annotations", 0, "area"), "n/a", "annotations[0] (id 7) has area 'n/a', not a number"),
    ("instances", ("annotations", 0, "area"), [1], "annotations[0] (id 7) has area [1], not a number"),
    ("instances", ("annotations", 0, "iscrowd"), "false", "annotations[0] (id 7) has iscrowd 'false', not 0 or 1"),
    ("instances", ("annotations", 0, "iscrowd"), 2, "annotations[0] (id 7) has iscrowd 2, not 0 or 1"),
    ("instances", ("annotations", 0, "image_id"), "1", "is of image '1', which the file does not list: there 1 is a"),
    ("instances", ("annotations", 0, "category_id"), "1", "has category_id '1', not a whole number"),
    ("instances", ("annotations", 0, "category_id"), 9, "annotation 7 is of category 9, which the file does not list"),
    ("instances", ("annotations",), {"7": {}}, "lacks annotations (lists)"),
    ("instances", ("images", 0, "height"), 0, "images[0] (id 1) has height 0, not a number of pixels from 1"),
    ("instances", ("images", 0, "width"), -1, "images[0] (id 1) has width -1, not a number of pixels from 1"),
    ("instances", ("images", 0, "width"), "64", "images[0] (id 1) has width '64', not a number of pixels from 1"),
    ("instances", ("images", 0, "width"), MOST_PIXELS, "2^31 pixels or more"),
    ("instances", ("images", 0, "file_name"), 1, "images[0] (id 1) has file_name 1, not the name of a file"),
    ("instances", ("images", 0, "file_name"), " ", "images[0] (id 1) has file_name ' ', not the name of a file"),
    ("instances", ("images", 1, "file_name"), "a.png", "images 1 and 2 are of one file, a.png"),
    ("instances", ("images", 1, "id"), 1, "several images have one id, 1: b.png and a.png"),
    ("instances", ("categories", 1, "id"), 1, "categories[1], 'dog', has id 1, as 'cat' has"),
    ("instances", ("categories", 0, "id"), "1", "categories[0] (id '1') has id '1', not a whole number"),
    ("instances", ("categories", 0, "name"), None, "categories[0] (id 1) has name null, not a name"),
    ("instances", ("categories", 0, "name"), {"name": "cat"}, "has name {'name': 'cat'}, not a name"),
    ("instances", ("categories",), [], "lists no categories"),
    ("panoptic", ("categories", 0, "isthing"), "true", "categories[0] (id 1) has isthing 'true', not 0 or 1"),
    ("panoptic", ("categories", 0, "isthing"), None, "categories without isthing: 'cat' (id 1)"),
    ("panoptic", ("annotations", 0, "segments_info"), None, "annotations[0] has segments_info null, not a list"),
    ("panoptic", ("annotations", 0, "segments_info", 0, "id"), DELETED, "a.png: segments_info[0] has no id"),
    ("panoptic", ("annotations", 0, "segments_info", 0, "id"), "1", "a.png: segments_info[0] has id '1', not a whole"),
    ("panoptic", ("annotations", 0, "segments_info", 0, "id"), 2**24, "has id 16777216, not a whole number below 2^24"),
    ("panoptic", ("annotations", 0, "segments_info", 0, "category_id"), DELETED, "segments_info[0] has no category_id"),
    ("panoptic", ("annotations", 0, "segments_info", 0, "category_id"), 9, "a.png: segments_info[0] is of category 9"),
    ("panoptic", ("annotations", 0, "image_id"), 9, "annotations[0], a.png, is of image 9, which the file does not"),
]


@pytest.mark.parametrize(("kind", "place", "value", "message"), FIELDS, ids=[f"{f[1][-1]}-{f[3][:24]}" for f in FIELDS])
def test_file_record_and_field_are_named(tmp_path, kind, place, value, message):
    said = agreed(write(tmp_path, kind, put(content_of(kind), place, value)), kind)
    assert said is not None and message in said and f"{kind}.json" in said
    found = [finding.message for finding in errors(tmp_path, f"coco_{kind}")]
    assert message in found[0]
    if place[-1] not in ("id", "image_id"):  # which orphan what refers to them
        assert len(found) == 1


def test_other_records_are_still_looked_at(tmp_path):
    content = content_of("instances")
    content["annotations"] += [None, {"image_id": 1}, {**content["annotations"][0], "id": 9, "category_id": 5}]
    kinds = [finding.kind for finding in errors(write(tmp_path, content=content))]
    assert kinds == ["bad_record", "bad_record", "unknown_category"]
    assert "annotations[2] is null" in str(refusal(tmp_path)), "the first"


def test_the_other_kind_of_file_is_told(tmp_path):
    write(tmp_path, "panoptic")
    shutil.copy(tmp_path / "train/panoptic.json", tmp_path / "train/instances.json")
    assert "so this is a panoptic file (layout coco_panoptic)" in str(refusal(tmp_path, layout="coco_instances"))


@pytest.mark.parametrize(
    ("value", "crowd"), [(0, False), ("0", False), (False, False), (None, False), (1, True), ("1", True), (1.0, True)]
)
def test_flags(tmp_path, value, crowd):
    root = write(tmp_path, content=put(content_of("instances"), ("annotations", 0, "iscrowd"), value))
    assert bool(crowd_ids(open_dataset(root, "train")[0])) == crowd and agreed(root) is None
    if value is not None:
        write(tmp_path, "panoptic", put(content_of("panoptic"), ("categories", 0, "isthing"), value))
        assert open_dataset(root, "train", "coco_panoptic").stuff_ids == ([1] if crowd else [0, 1])


GOOD = json.dumps(content_of("instances")).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (GOOD[:-40], "is not valid JSON"),
        (b'{"images": []}\n{"images": []}\n', "is not valid JSON: Extra data: line 2"),
        (GOOD.replace(b"cat", b"k\xe9"), "is not valid JSON: 'utf-8' codec"),
        (b"[]", "is [], no object with images"),
        (b"5", "is 5, no object"),
        (b"null", "is null, no object"),
        (b"{}", "lacks images, annotations, categories"),
        (b"[" * 100000 + b"]" * 100000, "is nested too deeply"),
        (GOOD.replace(b"400", b"[" * 5000 + b"]" * 5000), "is nested too deeply"),
        (GOOD.replace(b"400", b"[" * 500 + b"]" * 500), "has area [[[[[[[...]]]]]]], not a number"),
        (GOOD[:-1] + b', "images": []}', "the key 'images' stands twice"),
        (GOOD.replace(b'"area": 400', b'"area": 400, "area": 3'), "the key 'area' stands twice"),
        (GOOD.replace(b"400", b"9" * 5000), "is not valid JSON"),
        (b"\xef\xbb\xbf" + GOOD, None),
        (GOOD.decode().encode("utf-16"), None),
    ],
)
def test_files_that_are_no_coco_json(tmp_path, content, message):
    said = agreed(write(tmp_path, content=content))
    assert said is None if message is None else message in said


def test_a_mask_that_is_nested_too_deeply(tmp_path):
    nested = GOOD.replace(json.dumps(SQUARE).encode(), b"[" * 900 + b"]" * 900)
    said = str(refusal(write(tmp_path, content=nested)))
    assert "instances.json: a segmentation is nested too deeply" in said
    assert ["annotation 7" in finding.message for finding in errors(tmp_path)] == [True]


def test_a_key_that_stands_twice_in_many(tmp_path):
    (tmp_path / "a.json").write_text("{" + ",".join(f'"{i}": 1' for i in range(50000)) + ', "7": 1}')
    start = time.process_time()
    with pytest.raises(ValueError, match="'7' stands twice"):
        read_json(tmp_path / "a.json")
    assert time.process_time() - start < 2


def zigzag(points: int, low: float, high: float) -> list[float]:
    return np.random.default_rng(0).choice([low, high], 2 * points).astype(float).tolist()


class TestMasks:
    @pytest.mark.parametrize(
        "polygons",
        [[zigzag(800, -99999, 99999)], [zigzag(200, -99999, 99999)], [zigzag(30, -9999, 9999)] * 40, [SQUARE] * 30000],
    )
    def test_absurd_polygons_are_refused_before_they_take_memory(self, tmp_path, polygons):
        start = time.process_time()
        with pytest.raises(ValueError, match=r"where: \d+ polygons with \d+ points have outlines of \d+ pixels"):
            run_lengths(polygons, (HEIGHT, WIDTH), "where")
        assert time.process_time() - start < 2
        if len(polygons) == 1:
            content = put(content_of("instances"), ("annotations", 0, "segmentation"), polygons)
            assert "annotation 7" in str(agreed(write(tmp_path, content=content)))

    @pytest.mark.parametrize("parts", [1, 2, 64, 65, 300])
    def test_others_are_those_of_pycocotools(self, parts):
        """Also those that leave the image, and of many parts, which are merged in groups."""
        random = np.random.default_rng(parts)
        for _ in range(10):
            height, width = random.integers(1, 200, 2).tolist()
            polygons = [random.uniform(-40, 240, 2 * random.integers(3, 9)).tolist() for _ in range(parts)]
            expected = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
            assert run_lengths(polygons, (height, width), "") == expected

    @pytest.mark.parametrize(
        ("segmentation", "message"),
        [
            ({"size": [48, 64], "counts": ["3072"]}, "have counts that are no whole numbers: ['3072']"),
            ({"size": [48, 64], "counts": [3071.5, 0.5]}, "no whole numbers"),
            ({"size": [48, 64], "counts": [True] * 3072}, "no whole numbers"),
            ({"size": [48, 64], "counts": [math.inf]}, "no whole numbers"),
            ({"size": [48, 64], "counts": [-1, 3073]}, "cover 3072 pixels, some negative, the image has 3072"),
            ({"size": [48, 64], "counts": [2**32 + 3072]}, "cover 4294970368 pixels"),
            ({"size": [48, 64], "counts": "246 20 294 20"}, "not COCO's compressed run lengths: '246 20 294 20'"),
            ({"size": [48, 64], "counts": "b'e7d0l00000'"}, "not COCO's compressed run lengths"),
            ({"size": [48, 64], "counts": "oooooooooooo"}, "not COCO's compressed run lengths"),
            ({"size": [48, 64], "counts": ""}, "not COCO's compressed run lengths"),
            ({"size": [48, 64], "counts": "\ud800"}, "not COCO's compressed run lengths"),
            ({"size": [48, 64], "counts": "0" * 10**5}, "cover 0 pixels"),
            ({"size": 48, "counts": [3072]}, "run lengths of size 48, the image is [48, 64]"),
            ({"size": "48,64", "counts": [3072]}, "run lengths of size '48,64'"),
            ({"size": ["48", "64"], "counts": [3072]}, "run lengths of size ['48', '64']"),
            ({"size": [64, 48], "counts": [3072]}, "(height, width), so it is [width, height]"),
            ([[True] * 6], "no numbers or far outside"),
            ([[10**400] * 6], "no numbers or far outside"),
            ([[[1, 2], [3, 4], [5, 6]]], "three points"),
            ([[]], "three points"),
        ],
    )
    def test_masks_that_cannot_be_drawn(self, segmentation, message):
        with pytest.raises(ValueError) as error:
            run_lengths(segmentation, (HEIGHT, WIDTH), "file, annotation 1")
        assert message in str(error.value) and str(error.value).startswith("file, annotation 1")

    @pytest.mark.parametrize("side", [30000, 100])
    def test_a_size_that_lies_takes_no_memory(self, tmp_path, side):
        content = put(content_of("instances"), ("images", 0, "height"), side)
        content["images"][0]["width"] = side
        root = write(tmp_path, content=content)
        said = agreed(root)
        assert f"image 1 (a.png) is {side} x {side} pixels (width x height), its image" in str(said)
        assert [finding.kind for finding in errors(root)] == ["json_size_mismatch"]
        (root / "train/images/a.png").unlink()  # no image to compare with
        assert {finding.kind for finding in errors(root)} == {"label_without_image"}

    def test_a_size_that_lies_beside_a_panoptic_map(self, tmp_path):
        root = write(tmp_path, "panoptic", put(content_of("panoptic"), ("images", 0, "height"), 30))
        assert "64 x 30" in str(agreed(root, "panoptic"))


class TestFiles:
    @pytest.mark.parametrize(
        ("json_path", "images"),
        [
            ("annotations/train.json", "train"),
            ("annotations/train.json", "images/train"),
            ("annotations/train.json", "images"),
            ("train.json", "train"),
            ("annotations/instances_train.json", "train"),
            ("annotations/instances_train2017.json", "train2017"),
            ("annotations/instances_train2017.json", "train"),
            ("instances_train2017.json", "images/train2017"),
            ("train/_annotations.coco.json", "train"),
        ],
    )
    def test_the_json_of_a_split_is_found(self, tmp_path, json_path, images):
        root = write(tmp_path, json_path=json_path, images=images)
        (root / "labels.json").write_text("{}")  # no split
        assert open_dataset(root, "train").names == ["a", "b"]
        report = validate_dataset(root, workers=1)
        assert report.findings == [] and len(report.splits) == 1, report.findings

    def test_a_panoptic_json_with_a_year(self, tmp_path):
        maps = "annotations/panoptic_train2017"
        root = write(tmp_path, "panoptic", json_path=f"{maps}.json", images="train2017", maps=maps)
        assert open_dataset(root, "train").names == ["a", "b"]
        assert [split.name for split in validate_dataset(root, workers=1).splits] == ["train2017"]

    def test_several_are_listed(self, tmp_path):
        root = write(tmp_path, json_path="annotations/train.json", images="train")
        shutil.copy(root / "annotations/train.json", root / "train.json")
        said = str(refusal(root))
        assert "several files of COCO instances: annotations/train.json, train.json. Choose by the option annot" in said
        assert [finding.message + "." for finding in errors(root)] == [said + "."]
        assert refusal(root, layout="coco_instances", annotations="annotations/{split}.json") is None

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("split", ["train", None])
    def test_options_with_the_split(self, tmp_path, kind, split):
        root = write(tmp_path, kind, json_path="json/of_train.json", images="pictures/train", maps="maps/train")
        options = {"annotations": "json/of_{split}.json", "image_folder": "pictures/{split}"}
        if kind == "panoptic":
            options["map_folder"] = "maps/{split}"
        if split is None:
            options = {name: pattern.format(split="train") for name, pattern in options.items()}
        assert refusal(root, split, layout=f"coco_{kind}", **options) is None
        report = validate_dataset(root, layout=f"coco_{kind}", options=options, workers=1)
        assert [found.name for found in report.splits] == [split] and report.ok, report.findings
        for option in list(options):  # as a recipe's options can be
            wrong = {**options, option: 5}
            assert "got 5" in str(refusal(root, split, layout=f"coco_{kind}", **wrong))
            assert errors(root, f"coco_{kind}", **wrong)
        options["image_folder"] = "nowhere"
        assert "No image folder" in str(refusal(root, split, layout=f"coco_{kind}", **options))
        assert [finding.kind for finding in errors(root, f"coco_{kind}", **options)] == ["missing_folder"]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("on_disk", "in_json"), [("NFD", "NFC"), ("NFC", "NFD")])
    def test_names_in_another_unicode_form(self, tmp_path, kind, on_disk, in_json):
        content = content_of(kind)
        content["images"][0]["file_name"] = unicodedata.normalize(in_json, "caf\u00e9.png")
        if kind == "panoptic":
            content["annotations"][0]["file_name"] = content["images"][0]["file_name"]
        root = write(tmp_path, kind, content, names=(unicodedata.normalize(on_disk, "caf\u00e9.png"), "b.png"))
        assert refusal(root) is None
        assert validate_dataset(root, workers=1).findings == []

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("A.PNG", "A.PNG (there is a.png: small and capital letters differ)"),
            ("images\\a.png", "(written with backslashes: write / between folders)"),
            ("..\\images\\a.png", None),
            ("sub", "sub (a folder)"),
            ("sub/a.png", "missing"),
            ("/etc/hostname", "file_name /etc/hostname leads out of the data folder"),
            ("../../../a.png", "file_name ../../../a.png leads out of the data folder"),
            ("../images/a.png", None),
            ("./a.png", None),
        ],
    )
    def test_names(self, tmp_path, name, message):
        root = write(tmp_path, content=put(content_of("instances"), ("images", 0, "file_name"), name))
        (root / "train/images/sub").mkdir()
        said = agreed(root)
        assert said is None if message is None else message in str(said)

    @pytest.mark.parametrize("kind", KINDS)
    def test_names_that_no_file_can_have(self, tmp_path, kind):
        content = content_of(kind)
        content["images"][1]["file_name"] = f"{'x' * 5000}.png"
        root = write(tmp_path, kind, content)
        with pytest.raises(FileNotFoundError, match="1 images of .* are missing"):
            open_dataset(root, "train")
        assert "label_without_image" in {finding.kind for finding in validate_dataset(root).findings}

    def test_many_missing_files_take_little_time(self, tmp_path):
        """Each name was compared with each file: 13 s."""
        content = content_of("instances")
        content["images"] += [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(9, 4009)
        ]
        root = write(tmp_path, "instances", content)
        for number in range(4000):
            (root / f"train/images/other{number}.png").touch()
        start = time.process_time()
        with pytest.raises(FileNotFoundError, match="4000 images"):
            open_dataset(root, "train")
        assert time.process_time() - start < 3

    def test_the_folder_is_found_though_the_first_image_is_missing(self, tmp_path):
        root = write(tmp_path, names=("b.png",))
        assert "1 images of" in str(agreed(root))


class TestNothingToLearn:
    def annotations(self, polygon: list[float], crowd: int = 0) -> list[dict]:
        return [{"id": i, "image_id": i, "category_id": i, "iscrowd": crowd, "segmentation": [polygon]} for i in (1, 2)]

    @pytest.mark.parametrize(
        ("polygon", "crowd", "kinds", "told"),
        [
            (
                SQUARE,
                1,
                {"crowd", "nothing_to_learn"},
                "all segments are crowd regions, which are not learned: set iscrowd",
            ),
            ([5] * 6, 0, {"empty_segment", "nothing_to_learn"}, "no pixel is labeled"),
            ([0.1, 0.1, 0.4, 0.1, 0.4, 0.5], 0, {"relative_polygon", "nothing_to_learn"}, "no pixel is labeled"),
            (None, 0, {"nothing_to_learn"}, "no pixel is labeled"),
        ],
    )
    def test_it_is_told(self, tmp_path, polygon, crowd, kinds, told):
        content = {**content_of("instances"), "annotations": self.annotations(polygon, crowd) if polygon else []}
        root = write(tmp_path, content=content)
        said = told_of_classes(open_dataset(root, "train"), "train")
        found = {finding.kind: finding for finding in validate_dataset(root, workers=1).findings}
        assert kinds <= set(found)
        assert told in said and found["nothing_to_learn"].message in said

    def test_parts_of_the_image_that_cover_a_pixel(self, tmp_path, monkeypatch):
        """pycocotools draws one: the classes occur, so that nothing else would tell."""
        root = write(tmp_path, content={**content_of("instances"), "annotations": self.annotations([0, 0, 1, 0, 1, 1])})
        warnings: list[str] = []
        monkeypatch.setattr("maskcls_hf.data.layouts.coco_instances.logger.warning", warnings.append)
        open_dataset(root, "train")
        assert len(warnings) == 1 and "all polygons lie in 0..1" in warnings[0]
        assert "relative_polygon" in {finding.kind for finding in validate_dataset(root, workers=1).findings}


@pytest.mark.parametrize(
    ("name", "kind"), [("cat", "same_class_name"), ("a\nb", "control_characters"), ("\x1b[31m", "control_characters")]
)
def test_odd_names_of_classes_are_notes(tmp_path, name, kind):
    root = write(tmp_path, content=put(content_of("instances"), ("categories", 1, "name"), name))
    assert refusal(root) is None
    (found,) = validate_dataset(root, workers=1).findings
    assert (found.kind, found.severity) == (kind, "note") and found.message.isprintable()
