"""`maskcls`: the files that it writes, what it says, its exit codes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from typer.testing import CliRunner

from checkpoints import CLASSES, STUFF, image_processor, maskcls_model, picture, save_maskcls, save_perpixel
from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.cli.coco import map_image
from maskcls_hf.cli.main import app
from maskcls_hf.cli.results import output_names
from maskcls_hf.cli.segment import segmented
from maskcls_hf.cli.segmenter import SegmentedImage
from maskcls_hf.visual.drawing import distinct_colours, draw_overlay, outlines, segment_colours

SIZES = {"wide": (48, 80), "tall": (80, 48), "square": (64, 64)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("cli")
    images = root / "images"
    images.mkdir()
    for name, size in SIZES.items():
        picture(*size).save(images / f"{name}.png")
    (images / "notes.txt").write_text("not an image")
    return SimpleNamespace(images=images, maskcls=save_maskcls(root / "maskcls"), perpixel=save_perpixel(root / "p"))


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def segment(folders, out: Path, task: str, *options, sources=None, model=None, code: int = 0):
    """The JSON that was written, and the result of the command."""
    options = ("--model", model or folders.maskcls, "--task", task, "--out", out, "--device", "cpu", *options)
    result = run("segment", *(sources or [folders.images]), *options, code=code)
    return json.loads((out / f"{task}.json").read_text()), result


def outputs_for(name: str):
    with torch.no_grad():
        return maskcls_model()(**image_processor()(picture(*SIZES[name]), return_tensors="pt"))


def test_semantic(folders, tmp_path):
    content, result = segment(folders, tmp_path, "semantic")
    assert "3 of 3 images" in result.stderr
    assert [image["file_name"] for image in content["images"]] == ["square.png", "tall.png", "wide.png"]
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        name = Path(image["file_name"]).stem
        assert (image["height"], image["width"]) == SIZES[name]
        written = Image.open(tmp_path / "map" / f"{name}.png")
        assert written.mode == "L"
        expected = image_processor().post_process_semantic_segmentation(outputs_for(name))[0].numpy()
        np.testing.assert_array_equal(np.asarray(written), expected)
        areas = {record["category_id"]: record["area"] for record in annotation["segments_info"]}
        assert areas == dict(zip(*(values.tolist() for values in np.unique(expected, return_counts=True)), strict=True))
        assert sum(record["fraction"] for record in annotation["segments_info"]) == pytest.approx(1)
    assert {category["id"]: category["name"] for category in content["categories"]} == CLASSES


def test_panoptic_is_coco_format(folders, tmp_path):
    options = ("--threshold", "0.5", "--overlap-threshold", "0")
    content, _ = segment(folders, tmp_path, "panoptic", *options)
    assert {c["id"] for c in content["categories"] if not c["isthing"]} == set(STUFF)
    by_id = {annotation["image_id"]: annotation for annotation in content["annotations"]}
    for image in content["images"]:
        annotation = by_id[image["id"]]
        red, green, blue = np.asarray(Image.open(tmp_path / "map" / annotation["file_name"])).astype(int).T
        ids = (red + 256 * green + 65536 * blue).T
        assert set(np.unique(ids)) - {0} == {record["id"] for record in annotation["segments_info"]}
        for record in annotation["segments_info"]:
            rows, columns = np.nonzero(ids == record["id"])
            left, top, width, height = record["bbox"]
            assert record["area"] == len(rows)
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
    expected = image_processor().post_process_panoptic_segmentation(
        outputs_for("wide"), threshold=0.5, overlap_mask_area_threshold=0.0
    )[0]["segments_info"]
    found = by_id[3]["segments_info"]
    assert len(found) > 2
    for name, coco_name in (("label_id", "category_id"), ("area", "area"), ("score", "score")):
        assert [record[coco_name] for record in found] == pytest.approx([info[name] for info in expected], rel=1e-4)


def test_instances_are_coco_results(folders, tmp_path, capsys):
    content, _ = segment(folders, tmp_path, "instance", "--threshold", "0.8")
    result = image_processor().post_process_instance_segmentation(
        outputs_for("wide"), threshold=0.8, return_binary_maps=True
    )[0]
    records = [record for record in content["annotations"] if record["image_id"] == 3]
    assert len(records) == len(result["segments_info"]) > 1
    for record, mask in zip(records, result["segmentation"].numpy(), strict=True):
        np.testing.assert_array_equal(coco_mask.decode(record["segmentation"]).astype(bool), mask)
        assert coco_mask.toBbox(record["segmentation"]).tolist() == record["bbox"]
    coco = COCO(tmp_path / "instance.json")
    assert len(coco.loadRes(content["annotations"]).getAnnIds()) == len(content["annotations"])


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_tiles(folders, tmp_path, task):
    """A tile as large as the images changes nothing; smaller ones do, and the files fit together."""
    plain, _ = segment(folders, tmp_path / "plain", task)
    large, _ = segment(folders, tmp_path / "large", task, "--tile", "80")
    assert large == plain
    content, _ = segment(folders, tmp_path / "tiled", task, "--tile", "48", "--overlap", "0.4", "--batch-size", "2")
    assert content["images"] == plain["images"] and content["annotations"] != plain["annotations"]
    if task == "instance":
        assert len(content["annotations"]) > 3
        for record in content["annotations"]:
            assert coco_mask.area(record["segmentation"]) == record["area"]
            assert coco_mask.toBbox(record["segmentation"]).tolist() == record["bbox"]


def test_batch_of_mixed_sizes_gives_the_same(folders, tmp_path):
    one, _ = segment(folders, tmp_path / "1", "semantic")
    three, _ = segment(folders, tmp_path / "3", "semantic", "--batch-size", "3")
    for name in SIZES:
        maps = [np.asarray(Image.open(tmp_path / batch / "map" / f"{name}.png")) for batch in "13"]
        assert (maps[0] == maps[1]).mean() > 0.999
    assert one["images"] == three["images"]


def test_bad_files_do_not_stop_the_others(folders, tmp_path):
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.jpg"
    broken.write_bytes((folders.images / "wide.png").read_bytes()[:200])
    sources = [broken, folders.images, missing]
    content, result = segment(folders, tmp_path, "panoptic", "--batch-size", "2", sources=sources, code=1)
    assert len(content["images"]) == 3
    assert "broken.png" in result.stderr and "missing.jpg" in result.stderr and "3 of 5" in result.stderr


def test_failing_batch_goes_image_by_image():
    """One image that the model cannot take costs no other."""

    def segmenter(images):
        if any(image.shape[1] == 1 for image in images):
            raise ValueError("too small")
        return [SegmentedImage(np.zeros((1, 1)), []) for _ in images]

    images = {Path("a"): torch.ones(3, 2, 2), Path("b"): torch.ones(3, 1, 1), Path("c"): torch.ones(3, 2, 2)}
    outcomes = {outcome.path.name: outcome.error for outcome in segmented(images, segmenter)}
    assert outcomes["a"] is None and outcomes["c"] is None and "too small" in str(outcomes["b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{images}", "-m", "{perpixel}", "-t", "instance"], "--task semantic"),
        (["{images}", "-m", "{images}"], "neither the folder of a saved model"),
        (["{maskcls}", "-m", "{maskcls}"], "holds no images"),
        (["{images}", "-m", "{maskcls}", "--device", "nonsense"], "nonsense"),
    ],
)
def test_errors(folders, tmp_path, options, message):
    arguments = [option.format(**vars(folders)) for option in options]
    result = run("segment", *arguments, "-o", tmp_path / "out", code=1)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_per_pixel_baseline(folders, tmp_path):
    content, _ = segment(folders, tmp_path, "semantic", model=folders.perpixel)
    assert len(content["annotations"]) == 3


def test_convert_there_and_back(folders, tmp_path):
    run("convert", folders.maskcls, tmp_path / "theirs", "--to-transformers")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "maskformer"
    run("convert", tmp_path / "theirs", tmp_path / "ours")
    model = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "ours")
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = maskcls_model()(pixel_values).masks_queries_logits
        torch.testing.assert_close(model(pixel_values).masks_queries_logits, expected)


def test_convert_a_per_pixel_model(folders, tmp_path):
    run("convert", folders.perpixel, tmp_path / "out", "--num-queries", 9)
    model = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "out")
    assert (model.config.num_queries, model.config.matching) == (9, "bipartite")
    assert MaskClsImageProcessor.from_pretrained(tmp_path / "out").label_format == "segments"
    result = run("convert", folders.maskcls, tmp_path / "out", "--num-queries", 9, code=1)
    assert "--num-queries and --matching are for per-pixel models" in result.stderr


def test_convert_refuses(folders, tmp_path):
    result = run("convert", folders.perpixel, tmp_path / "out", "--to-transformers", code=1)
    assert "maskcls_perpixel" in result.stderr
    result = run("convert", folders.maskcls, tmp_path / "out", "--labels", tmp_path / "labels.json", code=1)
    assert "--labels" in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["segment", "--help"], ["convert", "--help"]])
def test_help(arguments):
    assert "Usage" in run(*arguments).stdout


def test_version():
    assert run("--version").stdout.startswith("maskcls-hf ")


def test_map_with_many_classes_has_16_bits():
    result = SegmentedImage(np.array([[0, 299]]), [])
    written = map_image(result, "semantic", [], 300)
    assert written.mode == "I;16" and np.asarray(written).tolist() == [[0, 299]]


def test_names_of_results_differ():
    paths = [Path("a/x.png"), Path("b/x.png"), Path("x.jpg"), Path("x_2.png"), Path("y.png")]
    assert output_names(paths) == ["x", "x_2", "x_3", "x_2_2", "y"]


def test_colours():
    colours = [colour for colour, _ in zip(distinct_colours(), range(3000), strict=False)]
    assert len(set(colours)) == 3000 and (0, 0, 0) not in colours
    segments = [dict(id=index, label_id=label, area=1) for index, label in enumerate([2, 0, 2, 1])]
    stuff, other = segment_colours(segments, 3, [0, 1]), segment_colours(segments[1:], 3, [0, 1])
    assert len(set(stuff)) == 4
    assert stuff[1] == other[0] == colours[0] and stuff[3] == other[2] == colours[1]


def test_overlay():
    """Segments are tinted and outlined, the rest stays; small images are enlarged; classes are named at the side."""
    ids = np.zeros((64, 64), dtype=int)
    ids[16:48, 16:48] = 7
    assert outlines(ids, 1).sum() == 4 * 32 - 4 + 4 * 32
    image = np.full((64, 64, 3), 100, dtype=np.uint8)
    segments, colours = [dict(id=7, label_id=0, area=32 * 32)], [(255, 0, 0)]
    plain = np.asarray(draw_overlay(image, ids, segments, colours, CLASSES, legend=False))
    assert plain.shape == (640, 640, 3)
    assert plain[0, 0].tolist() == [100, 100, 100]
    assert plain[160, 160].tolist() == [255, 0, 0]
    assert plain[320, 320].tolist() == [170, 55, 55]
    with_legend = draw_overlay(image, ids, segments, colours, CLASSES)
    assert with_legend.width > 640 and with_legend.height == 640
    np.testing.assert_array_equal(np.asarray(with_legend)[:, :640], plain)
    assert draw_overlay(image, ids, [], [], CLASSES).size == (640, 640)
