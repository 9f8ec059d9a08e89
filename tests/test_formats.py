"""Sets as annotation tools write them: ours of tests/data/formats, and those of ../shared/formats where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pycocotools import mask as coco_mask

from conftest import SHARED
from maskcls_hf.data import VOID, SegmentationDataset, open_dataset
from maskcls_hf.data.layouts import find_splits
from maskcls_hf.data.validation import validate_dataset

OURS = Path(__file__).parent / "data" / "formats"
THEIRS = SHARED / "formats"
CASES = sorted(path.parent for path in OURS.glob("*/expected.json"))
MORE_CASES = sorted(path.parent for path in THEIRS.glob("*/*/expected.json"))
needs_more = pytest.mark.skipif(not MORE_CASES, reason="the shared sets are not here")


def case_id(folder: Path) -> str:
    return folder.name if folder.parent == OURS else f"{folder.parent.name}/{folder.name}"


def images_of(data: Path, **options: Any) -> dict[str, tuple[SegmentationDataset, int]]:
    """Every image that is read from a folder, over all splits."""
    layout, splits = find_splits(data, None, (), {})
    assert layout is not None
    if layout == "geo":
        pytest.importorskip("rasterio")
        pytest.importorskip("pyogrio")
    found = {}
    for split in splits:
        dataset = open_dataset(data, split, **options)
        found |= {f"{split}/{name}": (dataset, index) for index, name in enumerate(dataset.names)}
    return found


def compare(folder: Path, boxes: bool) -> None:
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["images"]
    takes_boxes = any(thing.get("box_only") for image in expected.values() for thing in image["objects"])
    found = images_of(folder / "data", **({"boxes": True} if boxes and takes_boxes else {}))
    labelled = {name: image for name, image in expected.items() if image.get("labelled", True)}
    assert len(found) == len(labelled)
    for name, image in labelled.items():
        stem = os.path.splitext(name)[0]
        ends = [key for key in found if f"/{key}".endswith(f"/{stem}")]
        ends = ends or [key for key in found if key.rpartition("/")[2] == stem.rpartition("/")[2]]
        assert len(ends) == 1, (name, list(found))
        dataset, index = found[ends[0]]
        segments = dataset[index]["segments"]
        wanted = [thing for thing in image["objects"] if boxes or not thing.get("box_only")]
        compare_things(wanted, segments, dataset, name, len(image.get("crowd", [])))
        pixels = image.get("class_pixels") or image.get("class_pixels_listed_exactly")
        if pixels and not dataset.has_instances:
            areas = {dataset.id2label[record["label_id"]]: record["area"] for record in segments.records}
            assert areas == pixels
        void = image.get("ignore_area", image.get("unlisted_pixels"))
        if void is not None:
            unlabeled = segments.index_map == VOID if segments.is_map else segments.void
            assert int(unlabeled.sum()) == void
        else:
            assert segments.void is None or not segments.void.any()


def compare_things(wanted: list[dict], segments: Any, dataset: Any, name: str, crowds: int) -> None:
    masks, labels = segments.run_lengths, [dataset.id2label[i] for i in segments.class_labels.tolist()]
    free = [place for place, is_crowd in enumerate(segments.is_crowd.tolist()) if not is_crowd]
    assert len(masks) - len(free) == crowds
    if dataset.has_instances or wanted:
        assert len(free) == len(wanted), (name, labels)
    for thing in wanted:
        overlap = {
            place: float(coco_mask.iou([masks[place]], [thing["rle"]], [0])[0, 0])
            for place in free
            if labels[place] == thing["class"]
        }
        best = max(overlap, key=overlap.__getitem__, default=None)
        assert best is not None, (name, thing["class"])
        assert overlap[best] >= (1 if thing.get("exact") else 0.9), (name, thing["class"], overlap)
        free.remove(best)


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("folder", CASES, ids=case_id)
def test_our_sets_are_read_right(folder, boxes):
    compare(folder, boxes)


def test_there_are_as_many_sets_as_forms():
    assert len(CASES) >= 22


@needs_more
@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize("folder", [path for path in MORE_CASES if path.name != "predictions_import"], ids=case_id)
def test_shared_sets_are_read_right(folder, boxes):
    compare(folder, boxes)


@needs_more
def test_predictions_are_no_labels_but_can_be_asked_for():
    data = THEIRS / "label_studio/predictions_import/data"
    with pytest.raises(ValueError, match="no task is annotated"):
        open_dataset(data)
    expected = json.loads((data.parent / "expected.json").read_text(encoding="utf-8"))["images"]
    predicted = open_dataset(data, predictions=True)
    assert predicted.names == ["a", "b"]
    for index, image in enumerate(expected.values()):
        compare_things(image["predicted"], predicted[index]["segments"], predicted, predicted.names[index], 0)


@pytest.mark.parametrize("folder", CASES, ids=case_id)
def test_validate_finds_no_errors_and_says_what_is_skipped(folder):
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["images"]
    if folder.name in ("geojson", "shapefile"):
        pytest.importorskip("rasterio")
        pytest.importorskip("pyogrio")
    report = validate_dataset(folder / "data", workers=1)
    kinds = [finding.kind for finding in report.findings]
    errors = {finding.kind for finding in report.findings if finding.severity == "error"}
    assert errors <= {"nothing_to_learn"}  # a split without objects
    boxes = [thing for image in expected.values() for thing in image["objects"] if thing.get("box_only")]
    assert kinds.count("box_only") == len(boxes)
    if folder.name.startswith(("labelme_shapes", "cvat_shapes")):
        assert "skipped_shape" in kinds
    if folder.name in ("label_studio_polygons",):
        assert "not_labeled" in kinds
    if folder.name == "color_table":
        assert "unknown_color" in kinds
