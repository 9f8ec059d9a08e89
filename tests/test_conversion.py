"""`convert_data`: every set of tests/data/formats to every layout that is written, and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from typer.testing import CliRunner

from maskcls_hf.cli.main import app
from maskcls_hf.data import VOID, open_dataset
from maskcls_hf.data.conversion import WRITERS, convert_data
from maskcls_hf.data.layouts import find_splits
from maskcls_hf.data.layouts.drawing import draw_polygon
from maskcls_hf.data.outlines import joined, outlines
from maskcls_hf.models.run_lengths import MaskRuns
from test_formats import CASES, OURS, case_id


def things(root: Path) -> dict[str, list]:
    """Class and run lengths of every object, by image."""
    layout, splits = find_splits(root, None, (), {})
    found = {}
    for split in splits:
        data = open_dataset(root, split, layout)
        for index, name in enumerate(data.names):
            segments = data[index]["segments"]
            pairs = zip(segments.class_labels.tolist(), segments.run_lengths, strict=True)
            found[name.rpartition("/")[2]] = sorted((data.id2label[i], str(rle["counts"])) for i, rle in pairs)
    return found


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("folder", CASES, ids=case_id)
def test_there_and_read_again(folder, to, tmp_path):
    if folder.name in ("geojson", "shapefile"):
        pytest.importorskip("rasterio")
        pytest.importorskip("pyogrio")
    convert_data(folder / "data", tmp_path / "out", to)
    assert find_splits(tmp_path / "out", None, (), {})[0] == to
    assert things(tmp_path / "out") == things(folder / "data")


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 8))))
def test_outlines_filled_are_the_mask(mask):
    rings = outlines(MaskRuns.of_masks(mask[None])[0])
    assert bool(rings) == mask.any()
    if rings:
        points = np.ravel(joined(rings)).astype(float).tolist()
        assert np.array_equal(draw_polygon(points, mask.shape).dense(), mask)


def test_what_is_lost_is_said_and_kept_where_it_can_be(tmp_path):
    data = OURS / "labelme_groups/data"
    result = CliRunner().invoke(app, ["convert-data", str(data), str(tmp_path / "coco"), "--to", "coco"])
    assert result.exit_code == 0 and "40 unlabeled pixels" in result.output.replace("\n", " ")
    json.loads((tmp_path / "coco/annotations/instances_train.json").read_text())
    assert convert_data(data, tmp_path / "labelme", "labelme") == {}
    segments = open_dataset(tmp_path / "labelme", "train")[0]["segments"]
    assert int((segments.index_map == VOID).sum()) == 40


def test_wrong_calls_end_in_a_line(tmp_path):
    data = OURS / "class_masks/data"
    with pytest.raises(ValueError, match="can be written are coco_instances, yolo, labelme"):
        convert_data(data, tmp_path, "voc")
    Image.new("L", (3, 3)).save(tmp_path / "a.png")
    for folder, out in ((data, tmp_path), (tmp_path, tmp_path / "new")):
        result = CliRunner().invoke(app, ["convert-data", str(folder), str(out), "--to", "yolo"])
        assert result.exit_code != 0 and "Traceback" not in result.output
