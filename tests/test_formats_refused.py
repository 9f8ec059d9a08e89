"""What is wrong in files of annotation tools is refused with file and record; `maskcls validate` lists it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from maskcls_hf.data import open_dataset
from maskcls_hf.data.layouts import find_splits
from maskcls_hf.data.validation import validate_dataset
from test_formats import OURS


def in_json(change):
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def in_text(old: str, new: str):
    def edit(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return edit


def smaller(path: Path) -> None:
    with Image.open(path) as image:
        small = image.resize((5, 5))
    small.save(path)


TRAIN, TASK = "labels/train/a.txt", "project.json"
BROKEN = [
    ("yolo_rows", TRAIN, lambda p: p.write_text("7 0 0 1 0 1 1\n"), "a.txt, row 1: class 7, which the names lack"),
    ("yolo_rows", TRAIN, lambda p: p.write_text("0 0.1 0.1 0.2\n"), "row 1: 4 fields, neither a box nor a polygon"),
    ("yolo_rows", TRAIN, lambda p: p.write_text("0 10 10 20 10 20 20\n"), "row 1: points are parts of the image's"),
    ("yolo_rows", TRAIN, lambda p: p.write_text("0 a b c d e f\n"), "row 1: could not convert"),
    ("yolo_rows", "data.yaml", lambda p: p.write_text("names: [\n"), "No known layout"),
    ("yolo_cvat", "train.txt", lambda p: p.write_text("images/train/gone.png\n"), "no image images/train/gone.png"),
    ("labelme_groups", "a.json", in_json(lambda c: c["shapes"][0].update(points=[[1, 2]])), r"shapes\[0\]: needs 3"),
    ("labelme_groups", "a.json", in_json(lambda c: c["shapes"][0].update(label=None)), r"shapes\[0\]: null is no text"),
    ("labelme_groups", "a.json", in_json(lambda c: c["shapes"][0].update(shape_type="star")), "'star' is not known"),
    ("labelme_groups", "a.png", Path.unlink, r"a\.json: no image 'a\.png'"),
    ("labelme_exif_and_old", "turned.jpg", smaller, "40 x 30 pixels .* 5 x 5"),
    ("labelme_shapes", "labels/a.json", in_json(lambda c: c["shapes"][2].update(mask="A")), r"shapes\[2\]: no base64"),
    ("cvat_masks", "annotations.xml", in_text('height="12"', 'height="11"'), "image lot 1/a.png, mask 0: run lengths"),
    ("cvat_masks", "annotations.xml", in_text("</meta>", ""), "annotations.xml is not valid XML"),
    ("cvat_shapes", "annotations.xml", in_text('xtl="30"', ""), "box 2: no 'xtl'"),
    ("cvat_video", "images/frame_000001.png", Path.unlink, "no image 'frame_000001.png'"),
    (
        "label_studio_brush",
        TASK,
        in_json(lambda c: c[0]["annotations"][0]["result"][0]["value"].update(rle=[1, 2])),
        "region r0.*it ends early",
    ),
    (
        "label_studio_polygons",
        TASK,
        in_json(lambda c: c[0]["annotations"][0]["result"][0]["value"].update(points=[])),
        "region r0: needs 3 points",
    ),
    ("label_studio_polygons", TASK, in_json(lambda c: [t["annotations"].clear() for t in c]), "no task is annotated"),
    (
        "supervisely",
        "ds0/ann/a.png.json",
        in_json(lambda c: c["objects"][0]["bitmap"].update(data="xx")),
        r"objects\[0\]: no base64",
    ),
    ("supervisely", "ds0/ann/a.png.json", in_text('"pad"', '"pod"'), r"objects\[1\]: no 'pod'"),
    ("voc_palette", "SegmentationObject/a.png", smaller, "differ in size"),
    ("class_masks", "masks/s_1_class_cell.png", smaller, "5 x 5 pixels"),
    ("class_masks", "masks/s_1_class_cell.png", lambda p: p.rename(p.with_name("s_2_class_cell.png")), "of no image"),
    ("object_masks", "stage1_train/0f/masks/a.png", lambda p: p.write_bytes(b"no"), "cannot be read as an image"),
    ("color_table", "class_dict.csv", in_text("0,0,255", "0,0,256"), r"'lymph' has the color"),
    ("coco_cvat", "annotations/instances_default.json", in_text("[3, 4,", "[4,"), "annotation 3"),
]


@pytest.mark.parametrize(("name", "file", "break_it", "message"), BROKEN)
def test_the_record_is_named(tmp_path, name, file, break_it, message):
    data = tmp_path / "data"
    shutil.copytree(OURS / name / "data", data)
    layout, splits = find_splits(data, None, (), {})
    break_it(data / file)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}") as error:
        for index in range(len(found := open_dataset(data, splits[0]))):
            found[index]
    if "No known layout" not in message:
        assert str(tmp_path) in str(error.value) or str(error.value).startswith(("image ", "names"))
    report = validate_dataset(data, layout=layout, workers=1)
    assert any(finding.severity == "error" for finding in report.findings)


def test_label_studios_masks_need_its_json(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(OURS / "class_masks/data", data)
    (data / "masks/s_1_class_cell.png").rename(data / "masks/task-8-annotation-3-by-1-tag-cell-0.png")
    with pytest.raises(ValueError, match="export the JSON"):
        open_dataset(data)
