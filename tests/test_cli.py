"""`maskcls`: the files that it writes, what it says, its exit codes."""

import csv
import errno
import io
import json
import logging
import os
import shutil
import signal
import warnings
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
from maskcls_hf.cli.console import Terminated, TextFormatter, terminable
from maskcls_hf.cli.counts import csv_text, segments_of
from maskcls_hf.cli.main import app
from maskcls_hf.cli.results import Results, only_run, output_names
from maskcls_hf.cli.segment import find_images
from maskcls_hf.cli.segmenter import Outcome, segmented
from maskcls_hf.data import open_dataset
from maskcls_hf.metrics import Segments
from maskcls_hf.visual.drawing import distinct_colors, draw_overlay, outlines, segment_colors

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


def fingerprints(content: dict) -> set[str]:
    return {image["fingerprint"] for image in content["images"]}


def without_fingerprints(content: dict) -> dict:
    """What an image is left alone by with --skip-existing: settings and file."""
    images = [{key: value for key, value in image.items() if key != "fingerprint"} for image in content["images"]]
    return content | {"images": images}


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
    plain_content = without_fingerprints(plain)
    large, _ = segment(folders, tmp_path / "large", task, "--tile", "80")
    assert fingerprints(large).isdisjoint(fingerprints(plain)) and without_fingerprints(large) == plain_content
    content, _ = segment(folders, tmp_path / "tiled", task, "--tile", "48", "--overlap", "0.4", "--batch-size", "2")
    content = without_fingerprints(content)
    assert content["images"] == plain_content["images"] and content["annotations"] != plain["annotations"]
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
        return [Segments([], np.zeros((1, 1), dtype=int) - 1) for _ in images]

    sizes = {"a": (2, 2), "b": (1, 1), "c": (2, 2)}
    images = [Outcome(n, Path(name), torch.ones(3, *size)) for n, (name, size) in enumerate(sizes.items())]
    outcomes = {outcome.path.name: outcome for outcome in segmented(images, segmenter, batch_size=3)}
    assert all(outcomes[name].error is None and outcomes[name].result is not None for name in "ac")
    assert "too small" in str(outcomes["b"].error) and outcomes["b"].result is None


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
    result = Segments.from_class_map(np.array([[0, 299]]))
    written = map_image(result, "semantic", [], 300)
    assert written.mode == "I;16" and np.asarray(written).tolist() == [[0, 299]]


def test_names_of_results_differ():
    paths = [Path("a/x.png"), Path("b/x.png"), Path("x.jpg"), Path("x_2.png"), Path("y.png")]
    assert output_names(paths) == ["x", "x_2", "x_3", "x_2_2", "y"]


def test_colors():
    colors = [color for color, _ in zip(distinct_colors(), range(3000), strict=False)]
    assert len(set(colors)) == 3000 and (0, 0, 0) not in colors
    segments = [dict(id=index, label_id=label, area=1) for index, label in enumerate([2, 0, 2, 1])]
    stuff, other = segment_colors(segments, 3, [0, 1]), segment_colors(segments[1:], 3, [0, 1])
    assert len(set(stuff)) == 4
    assert stuff[1] == other[0] == colors[0] and stuff[3] == other[2] == colors[1]


def test_overlay():
    """Segments are tinted and outlined, the rest stays; small images are enlarged; classes are named at the side."""
    ids = np.zeros((64, 64), dtype=int)
    ids[16:48, 16:48] = 7
    assert outlines(ids, 1).sum() == 4 * 32 - 4 + 4 * 32
    image = np.full((64, 64, 3), 100, dtype=np.uint8)
    segments, colors = [dict(id=7, label_id=0, area=32 * 32)], [(255, 0, 0)]
    plain = np.asarray(draw_overlay(image, ids, segments, colors, CLASSES, legend=False))
    assert plain.shape == (640, 640, 3)
    assert plain[0, 0].tolist() == [100, 100, 100]
    assert plain[160, 160].tolist() == [255, 0, 0]
    assert plain[320, 320].tolist() == [170, 55, 55]
    with_legend = draw_overlay(image, ids, segments, colors, CLASSES)
    assert with_legend.width > 640 and with_legend.height == 640
    np.testing.assert_array_equal(np.asarray(with_legend)[:, :640], plain)
    assert draw_overlay(image, ids, [], [], CLASSES).size == (640, 640)


def test_overlay_shows_what_the_model_sees(folders, tmp_path):
    """A dark image of 16 bits is stretched where the model stretches it, else not."""
    dark = np.asarray(picture().convert("L")).astype(np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")  # of 65535: black
    shutil.copytree(folders.maskcls, tmp_path / "stretching")
    processor = image_processor()
    processor.do_autocontrast = True
    processor.save_pretrained(tmp_path / "stretching")
    brightest = []
    for model in (folders.maskcls, tmp_path / "stretching"):
        options = ("--threshold", "1")  # finds nothing: the overlay is the image
        segment(folders, tmp_path / model.name, "panoptic", *options, sources=[tmp_path / "dark.png"], model=model)
        brightest.append(np.asarray(Image.open(tmp_path / model.name / "overlay" / "dark.png")).max())
    assert brightest[0] < 5 and brightest[1] > 250


# -- counts ----------------------------------------------------------------------------------------------------------


class TestCounts:
    @pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
    def test_csv_has_a_row_a_segment(self, folders, tmp_path, task):
        """In the order of the results, with the numbers of maps and masks."""
        content, _ = segment(folders, tmp_path / "out", task, "--csv")
        rows = read_csv(tmp_path / "out" / f"{task}.csv")
        found = list(segments_of(content))
        assert len(rows) == len(found) > 3
        for row, (image, segment_) in zip(rows, found, strict=True):
            assert row["image"] == image["source"] and row["class"] == CLASSES[segment_["category_id"]]
            assert row["id"] == str(segment_.get("id", segment_["category_id"]))
            y, x = np.nonzero(mask_of(tmp_path / "out", task, image, segment_))
            assert int(row["area"]) == len(x)
            box = [int(row[f"box_{name}"]) for name in ("left", "top", "width", "height")]
            assert box == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            centroid = [float(row[f"centroid_{name}"]) for name in "xy"]
            assert centroid == pytest.approx([x.mean() + 0.5, y.mean() + 0.5], abs=0.006)
            assert row["score"] == ("" if task == "semantic" else f"{segment_['score']:.4f}")

    def test_csv_goes_on_as_the_json_does(self, folders, tmp_path):
        out, images = tmp_path / "out", folders.images
        segment(folders, out, "instance", "--csv", sources=[images / "wide.png"])
        first = read_csv(out / "instance.csv")
        content, _ = segment(folders, out, "instance", sources=[images / "tall.png"])  # kept up to date
        rows = read_csv(out / "instance.csv")
        assert rows[: len(first)] == first and len(rows) == len(content["annotations"]) > len(first)
        again, _ = segment(folders, out, "instance", "--csv", sources=[images])
        assert len(read_csv(out / "instance.csv")) == len(again["annotations"])
        segment(folders, tmp_path / "none", "instance")
        assert not (tmp_path / "none" / "instance.csv").exists()

    def test_csv_is_quoted(self, tmp_path):
        """RFC 4180: fields with commas, quotes or line breaks in quotes, which are doubled; lines end in CR LF."""
        name = 'a "red", big\nbus'
        content = dict(
            images=[dict(id=1, file_name="x,y.png"), dict(id=2, file_name="\udcff.png")],
            annotations=[dict(id=n, image_id=n, category_id=0, area=1, score=0.5) for n in (1, 2)],
            categories=[dict(id=0, name=name)],
        )
        lines = csv_text(content).split("\r\n")
        assert lines[1] == '"x,y.png",1,"a ""red"", big\nbus",1,,,,,,,0.5000' and lines[-1] == "" and len(lines) == 4
        assert lines[2].startswith("\\udcff.png,2,")
        assert [row["class"] for row in csv.DictReader(io.StringIO(csv_text(content)))] == [name, name]

    @pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
    def test_table_has_a_line_a_class(self, folders, tmp_path, task):
        content, result = segment(folders, tmp_path, task)
        lines = [line.split() for line in result.stdout.splitlines()]
        found = [(image["id"], segment_) for image, segment_ in segments_of(content)]
        names = {CLASSES[segment_["category_id"]] for _, segment_ in found}
        assert {line[0] for line in lines[1:]} == names and len(lines) == 1 + len(names) and len(names) > 1
        pixels = sum(height * width for height, width in SIZES.values())
        for name, images, *number, mean, share in lines[1:]:
            areas = [segment_["area"] for _, segment_ in found if CLASSES[segment_["category_id"]] == name]
            assert number == ([] if task == "semantic" else [str(len(areas))])
            assert int(images) == len({image for image, segment_ in found if CLASSES[segment_["category_id"]] == name})
            assert float(mean) == pytest.approx(np.mean(areas), abs=0.51)
            assert float(share) == pytest.approx(100 * sum(areas) / pixels, abs=0.006)

    def test_table_counts_the_images_of_the_run(self, folders, tmp_path):
        _, first = segment(folders, tmp_path, "panoptic", sources=[folders.images / "wide.png"])
        segment(folders, tmp_path, "panoptic", sources=[folders.images / "tall.png"])
        _, again = segment(folders, tmp_path, "panoptic", "--skip-existing", sources=[folders.images / "wide.png"])
        assert again.stdout == first.stdout != ""


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mask_of(out: Path, task: str, image: dict, record: dict) -> np.ndarray:
    if task == "instance":
        return coco_mask.decode(record["segmentation"])
    pixels = np.asarray(Image.open(out / "map" / image["map"])).astype(int)
    if task == "semantic":
        return pixels == record["category_id"]
    return pixels @ [1, 256, 65536] == record["id"]


# -- results that stay -----------------------------------------------------------------------------------------------


class TestResults:
    def images(self, folder: Path, *names: str) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            picture(32, 32 + number).save(folder / name)
        return [folder / name for name in names]

    def content(self, out: Path, task: str = "panoptic") -> dict:
        return json.loads((out / f"{task}.json").read_text())

    def test_later_runs_add_to_earlier_ones(self, folders, tmp_path):
        out = tmp_path / "out"
        first, second = self.images(tmp_path / "a", "x.png"), self.images(tmp_path / "b", "x.png", "y.png")
        segment(folders, out, "instance", sources=first)
        _, result = segment(folders, out, "instance", sources=second)
        assert "Earlier results of 1 other images are kept" in " ".join(result.stderr.split())
        before = self.content(out, "instance")
        after, result = segment(folders, out, "instance", sources=[*second, *first])
        assert after == before and "Earlier" not in result.stderr
        assert [image["source"] for image in after["images"]] == [str(path.resolve()) for path in (*first, *second)]
        assert [image["map"] for image in after["images"]] == ["x.png", "x_2.png", "y.png"]
        assert {path.name for path in (out / "map").iterdir()} == {"x.png", "x_2.png", "y.png"}
        assert [record["id"] for record in after["annotations"]] == list(range(1, len(after["annotations"]) + 1))
        assert {record["image_id"] for record in after["annotations"]} <= {1, 2, 3}
        assert not list(out.glob(".*"))

    def test_results_of_an_older_version_are_kept(self, folders, tmp_path):
        paths = self.images(tmp_path / "a", "x.png", "y.png")
        content, _ = segment(folders, tmp_path / "out", "panoptic", sources=paths)
        for image in content["images"]:
            del image["source"], image["map"]
        (tmp_path / "out" / "panoptic.json").write_text(json.dumps(content))
        after, _ = segment(folders, tmp_path / "out", "panoptic", sources=paths[1:])
        assert [image["file_name"] for image in after["images"]] == ["x.png", "y.png"]
        assert [record["file_name"] for record in after["annotations"]] == ["x.png", "y.png"]

    def test_what_was_done_outlives_a_kill(self, folders, tmp_path, monkeypatch):
        """After every image all earlier ones can be found, by the JSON or the next run."""
        paths, out = self.images(tmp_path / "a", "1.png", "2.png", "3.png"), tmp_path / "out"
        monkeypatch.setattr("maskcls_hf.cli.results.SHARE_OF_WRITING", -1.0)  # the JSON waits for the end
        seen, killed = [], Results.add

        def add(self, *arguments):
            killed(self, *arguments)
            seen.append((len(Results(self.out, self.task).records), len(list((self.out / "map").glob("[!.]*")))))

        monkeypatch.setattr(Results, "add", add)
        segment(folders, out, "panoptic", sources=paths)
        assert seen == [(1, 1), (2, 2), (3, 3)] and len(self.content(out)["images"]) == 3

    def test_half_a_line_of_the_journal_is_no_result(self, folders, tmp_path):
        out = tmp_path / "out"
        segment(folders, out, "panoptic", sources=self.images(tmp_path / "a", "1.png", "2.png"))
        records, categories = list(Results(out, "panoptic").records.values()), self.content(out)["categories"]
        (out / "panoptic.json").unlink()
        lines = [json.dumps({"categories": categories}), json.dumps(records[0]), json.dumps(records[1])[:50]]
        (out / ".panoptic.jsonl").write_text("\n".join(lines))
        after, _ = segment(folders, out, "panoptic", sources=self.images(tmp_path / "a", "3.png"))
        assert [image["file_name"] for image in after["images"]] == ["1.png", "3.png"]
        (out / ".panoptic.jsonl").write_text("\n".join(lines))
        (out / "map" / ".writing-1-2.png").write_text("")
        with Results(out, "panoptic").open(categories):  # what comes after half a line could not be read
            assert not list(out.rglob(".*"))

    def test_a_second_run_is_refused(self, folders, tmp_path):
        (tmp_path / "out").mkdir()
        with only_run(tmp_path / "out"):
            result = run("segment", folders.images, "-m", folders.maskcls, "-o", tmp_path / "out", code=1)
        assert "Another run is writing to" in result.stderr
        segment(folders, tmp_path / "out", "panoptic")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("semantic.json", "{}", "results of --task semantic"),
            ("panoptic.json", "{", "holds no results of this command"),
            ("panoptic.json", '{"images": [], "annotations": [{"image_id": 3}], "categories": []}', "holds no results"),
            (
                "panoptic.json",
                '{"images": [{"id": 1, "file_name": "a"}], "annotations": [], "categories": []}',
                "other",
            ),
        ],
    )
    def test_results_that_do_not_go_together_stay(self, name, content, message, folders, tmp_path):
        (tmp_path / name).write_text(content)
        result = run("segment", folders.images, "-m", folders.maskcls, "-o", tmp_path, code=1)
        assert message in result.stderr and (tmp_path / name).read_text() == content

    @pytest.mark.parametrize(
        ("error", "code", "word"), [(KeyboardInterrupt, 130, "Ctrl-C"), (Terminated, 143, "SIGTERM")]
    )
    def test_an_interruption_keeps_what_is_done(self, error, code, word, folders, tmp_path, monkeypatch):
        paths, add = self.images(tmp_path / "a", "1.png", "2.png"), Results.add

        def interrupted(self, *arguments):
            if self.records:
                raise error
            add(self, *arguments)

        monkeypatch.setattr(Results, "add", interrupted)
        content, result = segment(folders, tmp_path / "out", "panoptic", sources=paths, code=code)
        assert len(content["images"]) == 1 and f"Stopped by {word}: 1 of 2 images" in " ".join(result.stderr.split())
        assert "Traceback" not in result.output

    def test_existing_results_are_left_alone(self, folders, tmp_path):
        """Only where record, pictures, image, model and options are the same."""
        paths, out = self.images(tmp_path / "a", "1.png", "2.png", "3.png"), tmp_path / "out"

        def again(*options, sources=paths, **others) -> int:
            """How many were left alone."""
            before = self.content(out)["annotations"]
            content, result = segment(folders, out, "panoptic", "--skip-existing", *options, sources=sources, **others)
            said = " ".join(result.stderr.split())
            left = int(said.split("segmented into")[1].split(".", 1)[1].split()[0]) if "left alone" in said else 0
            assert f"{len(sources) - left} of {len(sources)} images" in said
            assert len(content["images"]) == 3 and (options or others or content["annotations"] == before)
            return left

        segment(folders, out, "panoptic", sources=paths)
        times = {path: path.stat().st_mtime_ns for path in out.glob("*/*.png")}
        assert again() == 3 and all(path.stat().st_mtime_ns == time for path, time in times.items())
        (out / "map" / "1.png").unlink()
        assert again() == 2 and again() == 3
        os.utime(paths[1], (1, 1))
        assert again() == 2 and again("--batch-size", "2") == 3
        assert again("--threshold", "0.6") == 0 and again() == 0
        (out / "overlay" / "3.png").unlink()
        assert again("--no-overlay") == 3 and again() == 2
        shutil.copytree(folders.maskcls, tmp_path / "model")
        assert again(model=tmp_path / "model") == 3
        model = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "model")
        with torch.no_grad():
            model.segmentation_module.class_predictor.bias[0] += 1e-3
        model.save_pretrained(tmp_path / "model")
        assert again(model=tmp_path / "model") == 0

    def test_a_stopped_run_leaves_no_image_to_be_taken_for_whole(self, folders, tmp_path, monkeypatch):
        """Its pictures may be those of other settings than its record."""
        paths, out, text = self.images(tmp_path / "a", "1.png"), tmp_path / "out", Path.write_bytes
        segment(folders, out, "panoptic", sources=paths)

        def stopped(path, content):
            text(path, content)
            if path.parent.name == "map":
                os.replace(path, out / "map" / "1.png")  # and then
                raise KeyboardInterrupt

        monkeypatch.setattr(Path, "write_bytes", stopped)
        segment(folders, out, "panoptic", "--threshold", "0.9", sources=paths, code=130)
        monkeypatch.undo()
        _, result = segment(folders, out, "panoptic", "--skip-existing", sources=paths)
        assert "1 of 1 images" in result.stderr and "left alone" not in result.stderr

    def test_without_overlays(self, folders, tmp_path, monkeypatch):
        paths, out = self.images(tmp_path / "a", "1.png", "2.png"), tmp_path / "out"
        segment(folders, out, "panoptic", sources=paths[:1])
        monkeypatch.setattr("maskcls_hf.cli.segmenter.draw_overlay", lambda *_: pytest.fail("draws"))
        segment(folders, out, "panoptic", "--no-overlay", "--threshold", "0.6", sources=paths)
        assert {path.name for path in (out / "map").iterdir()} == {"1.png", "2.png"}
        assert not list((out / "overlay").iterdir())  # the one that was there showed other segments
        segment(folders, tmp_path / "none", "panoptic", "--no-overlay", sources=paths)
        assert not (tmp_path / "none" / "overlay").exists()

    def test_a_signal_is_an_interruption(self):
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Terminated), terminable():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is before

    def test_a_full_disk_is_said_in_one_line(self, folders, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("pathlib.Path.write_bytes", full)
        content, result = segment(folders, tmp_path / "out", "panoptic", code=1)
        assert "could not be written" in result.stderr and os.strerror(errno.ENOSPC) in result.stderr
        assert content["images"] == [] and not [path for path in (tmp_path / "out").rglob("*.png")]

    def test_names_of_files_are_names_on_every_system(self):
        paths = ["../x.png", "/x/X.png", "a\\b.png", "CON.png", "con.x.png", "a" * 300 + ".png", "a\x1b.png", "..png"]
        names = output_names([Path(path) for path in paths])
        assert names == ["x", "X_2", "a_b", "CON_", "con.x_", "a" * 200, "a_", "_"]
        assert output_names([Path("\u00e9.png"), Path("e\u0301.png")]) == ["\u00e9", "e\u0301_2"]

    def test_an_image_is_taken_once(self, tmp_path):
        paths = self.images(tmp_path / "a", "x.png", "y.png")
        (tmp_path / "link").symlink_to(tmp_path / "a")
        (tmp_path / "a" / "folder.png").mkdir()
        (tmp_path / "a" / "loop.png").symlink_to(tmp_path / "a" / "loop.png")
        sources = [paths[1], tmp_path / "a", tmp_path / "link", tmp_path / "a" / ".." / "a" / "x.png"]
        assert [path.name for path in find_images(sources)] == ["y.png", "loop.png", "x.png"]


class TestInputsFirst:
    """What is wrong is said before a model is loaded."""

    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        for place in ("inference.loading.load_model", "inference.predictor.load_model", "hub.push.load_model"):
            monkeypatch.setattr(f"maskcls_hf.{place}", lambda *_, **__: pytest.fail("loads the model"))

    @pytest.mark.parametrize(
        ("command", "message", "code"),
        [
            (["segment", "{none}/a.png", "-m", "{maskcls}", "-o", "{out}"], "a.png: no such file", 1),
            (["segment", "{images}", "-m", "{none}", "-o", "{out}"], "there is no such folder", 1),
            (["segment", "{images}", "-m", "{images}/tall.png", "-o", "{out}"], "is a file", 1),
            (["segment", "{images}", "-m", "{maskcls}", "-o", "{images}/tall.png/x"], "tall.png is a file", 1),
            (["segment", "{images}", "-m", "{maskcls}", "-o", "{out}", "--threshold", "1.5"], "--threshold", 2),
            (["segment", "{images}", "-m", "{maskcls}", "-o", "{out}", "--threshold", "nan"], "--threshold", 2),
            (["segment", "{images}", "-m", "{maskcls}", "-o", "{out}", "--mask-threshold", "nan"], "--mask-thresho", 2),
            (["segment", "{images}", "-m", "{maskcls}", "-o", "{out}", "--tile", "8"], "--tile", 2),
            (["segment", "{images}", "-m", "{maskcls}", "-o", "{out}", "--batch-size", "0"], "--batch-size", 2),
            (["segment", "{images}", "-m", "{maskcls}", "-o", "{out}", "--task", "depth"], "--task", 2),
            (["segment", "{images}", "-m", "{maskcls}", "-o", "{out}", "--device", "nonsense"], "nonsense", 1),
            (["evaluate", "-d", "{none}", "-m", "{maskcls}"], "none", 1),
            (["evaluate", "-d", "{images}", "-m", "{maskcls}", "--scale", "0"], "must be positive", 1),
            (["evaluate", "-d", "{images}", "-m", "{maskcls}", "--enlarge", "inf"], "--enlarge", 2),
            (["evaluate", "-d", "{images}", "-m", "{maskcls}", "--task", "depth"], "depth", 1),
            (["evaluate", "-d", "{images}", "-m", "{maskcls}", "--json", "{none}/x.json"], "--json", 1),
            (["evaluate", "-d", "{images}", "-m", "{maskcls}", "--json", "{images}"], "--json", 1),
            (["push", "{maskcls}", "me/x", "--dry-run", "{out}", "--results", "{none}"], "There is no file", 1),
            (["push", "{maskcls}", "me/x", "--dry-run", "{out}", "--recipe", "{none}"], "There is no recipe", 1),
            (["push", "{maskcls}", "me/x", "--dry-run", "{out}", "--pictures", "{none}"], "There is no folder", 1),
            (["push", "{maskcls}", "me/x", "--dry-run", "{out}", "--failures", "{none}"], "There is no folder", 1),
            (["push", "{maskcls}", "me/x", "--dry-run", "{images}", "--speed"], "not an empty folder", 1),
            (["convert", "{none}/x.pkl", "{out}"], "There is no file", 1),
            (["convert", "{none}", "{out}"], "there is no such folder", 1),
            (["convert", "{maskcls}", "{images}/tall.png"], "is a file", 1),
        ],
    )
    def test_is_said(self, command, message, code, folders, tmp_path):
        places = vars(folders) | {"none": tmp_path / "none", "out": tmp_path / "out"}
        result = run(*(word.format(**places) for word in command), code=code)
        assert message in " ".join(result.stderr.split()), result.stderr
        assert "Traceback" not in result.output and not (tmp_path / "out").exists()

    def test_names_of_files_are_text(self, folders, tmp_path):
        name = "no\x1b]52;c;eA==\x07[bold]:smile:\r.png"
        result = run("segment", tmp_path / name, "-m", folders.maskcls, "-o", tmp_path / "out", code=1)
        assert "no\\x1b]52;c;eA==\\x07[bold]:smile:\\r.png" in result.stderr


class TestProcess:
    """The entry point of a process: streams, logs, wrong calls."""

    def call(self, monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)  # put back afterwards
        with pytest.raises(SystemExit) as end:
            app(list(arguments), prog_name="maskcls")
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out + captured.err

    def test_wrong_calls(self, monkeypatch, capsys):
        code, text = self.call(monkeypatch, capsys, "segment", "x.png", "-m", "m", "-o", "o", "--task", "\x1b[31mred")
        assert code == 2 and "\\x1b[31mred" in text and "\x1b[31mred" not in text

    def test_faults_of_ours_keep_their_traceback(self, monkeypatch, capsys):
        def broken(*_, **__):
            raise KeyError("\x1b[31m")

        monkeypatch.setattr("maskcls_hf.cli.segment.find_images", broken)
        code, text = self.call(monkeypatch, capsys, "segment", "x.png", "-m", "m", "-o", "o")
        assert code == 1 and "Traceback" in text and "\x1b" not in text

    def test_version_and_help(self, monkeypatch, capsys):
        assert self.call(monkeypatch, capsys, "--version")[0] == 0
        monkeypatch.setenv("COLUMNS", "1")
        assert self.call(monkeypatch, capsys, "segment", "--help")[0] == 0

    def test_log_lines_and_warnings_are_text(self, monkeypatch, capsys):
        self.call(monkeypatch, capsys, "--version")
        assert TextFormatter().format(logging.makeLogRecord({"msg": "a\x1b[31m"})) == "a\\x1b[31m"
        assert "a\\x1b[31m" in warnings.formatwarning("a\x1b[31m", UserWarning, "file", 1)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_to_a_full_disk_is_one_line(option, monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(SystemExit) as ended:
        app([option], prog_name="maskcls")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "Error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_results_for_annotation_tools_are_those_of_the_maps(folders, tmp_path, task):
    formats = [part for name in ("coco", "yolo", "labelme") for part in ("--format", name)]
    content, _ = segment(folders, tmp_path, task, *formats)
    names = {category["id"]: category["name"] for category in content["categories"]}
    wanted = {Path(image["map"]).stem: [] for image in content["images"]}
    stem_of = {image["id"]: Path(image["map"]).stem for image in content["images"]}
    for annotation in content["annotations"]:
        found = annotation.get("segments_info", [annotation])
        wanted[stem_of[annotation["image_id"]]] += [(names[f["category_id"]], f["area"]) for f in found]
    assert any(wanted.values())
    shutil.copytree(folders.images, tmp_path / "coco_instances/images")
    image_folders = {"labelme": {}, "coco_instances": {"image_folder": "images"}}
    for name, options in image_folders.items():
        data = open_dataset(tmp_path / name, "train" if name != "labelme" else None, name, **options)
        for index, stem in enumerate(data.names):
            segments = data[index]["segments"]
            found = [(data.id2label[record["label_id"]], record["area"]) for record in segments.records]
            assert sorted(found) == sorted(pair for pair in wanted[Path(stem).stem] if pair[1])
    for stem, found in wanted.items():
        rows = (tmp_path / f"yolo/labels/train/{stem}.txt").read_text().splitlines()
        assert len(rows) == len([pair for pair in found if pair[1]])


def test_an_unknown_format_is_refused_before_anything_is_read(folders, tmp_path):
    result = run("segment", folders.images, "-m", folders.maskcls, "-o", tmp_path / "new", "--format", "x", code=1)
    assert "coco, yolo and labelme" in result.output and not (tmp_path / "new").exists()
