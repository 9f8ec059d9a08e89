"""`maskcls evaluate`: its scores, its tables and JSON, its messages."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

from checkpoints import CLASSES, image_processor, maskcls_model, picture, save_maskcls, save_perpixel
from conftest import SHARED, needs_shared
from maskcls_hf import MaskClsForUniversalSegmentation
from maskcls_hf.cli.console import Terminated
from maskcls_hf.cli.main import app
from maskcls_hf.data import SegmentationFolder
from maskcls_hf.inference import Predictor, evaluate
from maskcls_hf.inference.evaluation import crops
from maskcls_hf.metrics import Evaluator
from maskcls_hf.utils.plain_text import printable
from samples import class_of_id, crowd_ids, id_map, sample_of
from tiny import maskcls_config

SIZES = [(48, 80), (80, 48), (64, 64)]


def write_data(root: Path, names: list[str], split: str = "val", kind: str = "labels") -> Path:
    """What the random model finds, moved by a few pixels; void at a corner. Ids as `names` counts them."""
    model = maskcls_model()
    for folder in ("images", kind):
        (root / split / folder).mkdir(parents=True)
    (root / "labels.json").write_text(json.dumps(dict(enumerate(names))))
    for number, size in enumerate(SIZES):
        picture(*size).save(root / split / "images" / f"{number}.png")
        with torch.no_grad():
            outputs = model(**image_processor()(picture(*size), return_tensors="pt"))
        found = image_processor().post_process_semantic_segmentation(outputs)[0].roll(4, 1).numpy()
        if kind == "labels":
            found = np.array([names.index(CLASSES[label]) for label in CLASSES])[found]
            found[:5, :7] = 255
        Image.fromarray(found.astype(np.uint8)).save(root / split / kind / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("evaluate")
    names = list(CLASSES.values())
    return SimpleNamespace(
        root=root,
        maskcls=save_maskcls(root / "maskcls"),
        perpixel=save_perpixel(root / "perpixel"),
        data=write_data(root / "data", names),
        reordered=write_data(root / "reordered", names[::-1]),
        other=write_data(root / "other", [*names[1:], "sky", "cat"]),
        instances=write_data(root / "instances", ["cell"], kind="instances"),
    )


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, ["evaluate", *(str(argument) for argument in arguments), "--device", "cpu"])
    assert result.exit_code == code, result.output
    return result


def scores_of(folders, tmp_path, *options, data: str = "data", model: str = "maskcls") -> dict:
    """The JSON that was written."""
    path = tmp_path / "scores.json"
    run("-m", getattr(folders, model), "-d", getattr(folders, data), "--json", path, *options)
    return json.loads(path.read_text())


def test_scores_are_those_of_the_library(folders, tmp_path):
    written = scores_of(folders, tmp_path, "--boundary")
    data = SegmentationFolder(folders.data, "val")
    score = Evaluator(image_processor(), CLASSES, data.stuff_ids, boundary=True)
    expected = evaluate(Predictor(maskcls_model(), image_processor()), data, score)
    assert written["scores"] == pytest.approx(expected, abs=1e-9)
    assert 0.1 < written["scores"]["mean_iou"] < 1 and "boundary_iou" in written["scores"]
    assert written["settings"]["images"] == 3 and written["settings"]["tasks"] == ["semantic"]
    assert set(written["per_class"]) == set(CLASSES.values())


def test_table_has_scores_intervals_and_classes(folders, tmp_path):
    found = scores_of(folders, tmp_path, "--bootstrap", "20")["scores"]
    result = run("-m", folders.maskcls, "-d", folders.data, "--bootstrap", "20", "--per-class")
    assert f"{100 * found['mean_iou']:.2f}" in result.stdout
    assert f"{100 * found['mean_iou_low']:.2f} to {100 * found['mean_iou_high']:.2f}" in result.stdout
    assert all(name in result.stdout for name in CLASSES.values())
    assert "3 images of data, val" in result.stdout and "iou_sky" not in result.stdout
    assert "3/3" in result.stderr


def test_classes_are_matched_by_name(folders, tmp_path):
    found = scores_of(folders, tmp_path, "-t", "semantic", "-t", "panoptic", data="reordered")
    expected = scores_of(folders, tmp_path, "-t", "semantic", "-t", "panoptic")
    assert found["scores"] == pytest.approx(expected["scores"], nan_ok=True)
    assert found["per_class"] == expected["per_class"]


def test_limit_and_crops(folders, tmp_path):
    """The middle crops of the first two images are scored as images of their own."""
    options = ("--limit", "2", "--crop", "32", "--middle")
    found = scores_of(folders, tmp_path, *options)
    data = SegmentationFolder(folders.data, "val")
    score = Evaluator(image_processor(), CLASSES)
    predict = Predictor(maskcls_model(), image_processor())
    for index in range(2):
        height, width = SIZES[index]
        top, left = (height - 32) // 2, (width - 32) // 2
        window = (slice(top, top + 32), slice(left, left + 32))
        predicted = predict(np.asarray(picture(height, width))[window].copy(), "semantic")["segmentation"]
        score.metrics["mean_iou"].update(predicted, id_map(data[index])[0][window])
    known = {name: value for name, value in score.compute().items() if not math.isnan(value)}
    assert {name: value for name, value in found["scores"].items() if value is not None} == pytest.approx(known)
    assert found["settings"]["images"] == 2


def test_ways_to_predict(folders, tmp_path):
    """Tiles, scales and mirror images change the scores, a tile as large as the image does not."""
    plain = scores_of(folders, tmp_path)["scores"]
    assert scores_of(folders, tmp_path, "--tile", "80")["scores"] == plain
    for options in (["--tile", "48"], ["--scale", "1", "--scale", "1.5"], ["--flip"], ["--enlarge", "2"]):
        assert scores_of(folders, tmp_path, *options)["scores"] != plain, options
    settings = scores_of(folders, tmp_path, "--multi-scale", "--enlarge", "2")["settings"]
    assert settings["scales"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75] and settings["flip"]


def test_per_pixel_model_scores_classes_only(folders, tmp_path):
    assert "mean_iou" in scores_of(folders, tmp_path, model="perpixel")["scores"]
    result = run("-m", folders.perpixel, "-d", folders.data, "-t", "panoptic", code=1)
    assert "its only task is semantic" in result.stderr


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["-m", "{root}/nothing", "-d", "{data}"], ["nothing is neither the folder of a saved model"]),
        (["-m", "{maskcls}", "-d", "{root}/nowhere"], ["nowhere"]),
        (["-m", "{maskcls}", "-d", "{data}", "--split", "test"], ["test", "val"]),
        (["-m", "{maskcls}", "-d", "{data}", "--layout", "kitti"], ["kitti", "cityscapes"]),
        (["-m", "{maskcls}", "-d", "{data}", "--middle"], ["--crop"]),
        (["-m", "{maskcls}", "-d", "{data}", "--multi-scale", "--flip"], ["--multi-scale"]),
        (["-m", "{maskcls}", "-d", "{data}", "--json", "{root}/no/folder.json"], ["folder.json"]),
        (["-m", "{maskcls}", "-d", "{data}", "--task", "instance"], ["do not tell instances apart"]),
        (["-m", "{maskcls}", "-d", "{data}", "--task", "depth"], ["semantic, panoptic, instance", "depth"]),
        (["-m", "{maskcls}", "-d", "{data}", "--flip", "--task", "panoptic"], ["scales and flip"]),
        (["-m", "{maskcls}", "-d", "{data}", "--data-option", "cache"], ["KEY=VALUE"]),
        (["-m", "{maskcls}", "-d", "{data}", *["--data-option", "void=1"] * 2], ["--data-option void is given twice"]),
        (["-m", "{maskcls}", "-d", "{data}", "--data-option", "void=" + "[" * 100000], ["void"]),
        (["-m", "{maskcls}", "-d", "{data}", "--task", "panoptic", "--boundary"], ["semantic maps"]),
        (["-m", "{maskcls}", "-d", "{data}", "--data-option", "color=1"], ["color"]),
        (["-m", "{maskcls}", "-d", "{other}"], ["model (5): sky, road", "data (6)", "only the data has: cat"]),
        (["-m", "{maskcls}", "-d", "{instances}"], ["only the model has: car, dog", "cell"]),
    ],
)
def test_messages(folders, options, messages):
    result = run(*(option.format(**vars(folders)) for option in options), code=1)
    for message in messages:
        assert message in " ".join(result.stderr.split()), result.stderr


def test_broken_image_is_named(folders, tmp_path):
    root = write_data(tmp_path / "data", list(CLASSES.values()))
    path = root / "val" / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    assert str(path) in run("-m", folders.maskcls, "-d", root, code=1).stderr.replace("\n", "")


def test_masks_of_0_and_255_are_said(folders, tmp_path):
    """Of two classes only the first is labeled: a score of 100 % says nothing."""
    root = write_data(tmp_path / "data", list(CLASSES.values()))
    for path in (root / "val" / "labels").glob("*.png"):
        mask = np.zeros(np.asarray(Image.open(path)).shape, dtype=np.uint8)
        mask[10:20, 10:20] = 255
        Image.fromarray(mask).save(path)
    first, second, *_ = CLASSES.values()
    said = " ".join(run("-m", folders.maskcls, "-d", root).stderr.split())
    assert f"Every labeled pixel in all of the 3 images of val is {first}; never: {second}" in said
    assert "labeled pixel" not in run("-m", folders.maskcls, "-d", folders.data).stderr


def test_bad_files_are_named_before_or_after_the_first_image(folders, tmp_path):
    root = write_data(tmp_path / "data", list(CLASSES.values()))
    with Image.open(root / "val/images/1.png") as image:
        pixels = np.asarray(image.convert("L")).astype(np.float32)
    pixels[3, 3] = np.inf
    (root / "val/images/1.png").unlink()
    tifffile.imwrite(root / "val/images/1.tif", pixels)
    assert "1.tif: the image holds NaN or infinity" in run("-m", folders.maskcls, "-d", root, code=1).stderr
    (root / "val/labels/2.png").write_bytes(b"")
    assert "2.png cannot be read as an image: it is empty" in run("-m", folders.maskcls, "-d", root, code=1).stderr


@pytest.mark.parametrize("names", [["car [moving]", "car [parked]"], ["[/]", ":smile:\x1b[31m"]])
def test_names_of_classes_are_text(names, folders, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / "[red]" / "val" / folder).mkdir(parents=True)
        Image.fromarray(np.eye(32, dtype=np.uint8)).save(tmp_path / "[red]" / "val" / folder / "a.png")
    (tmp_path / "[red]" / "labels.json").write_text(json.dumps(dict(enumerate(names))))
    model = shutil.copytree(folders.maskcls, tmp_path / "model")
    config = maskcls_config(num_queries=12, id2label=dict(enumerate(names)))
    MaskClsForUniversalSegmentation(config).save_pretrained(model)
    result = run("-m", model, "-d", tmp_path / "[red]", "--per-class")
    assert all(printable(name) in result.stdout for name in names) and "1 images of [red]" in result.stdout
    result = run("-m", folders.maskcls, "-d", tmp_path / "[red]", code=1)
    assert ", ".join(map(printable, names)) in result.stderr and "\x1b" not in result.stderr


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interruption_is_one_line(error, code, folders, tmp_path, monkeypatch):
    (tmp_path / "scores.json").write_text("earlier")
    monkeypatch.setattr("maskcls_hf.inference.evaluate", lambda *_, **__: exec("raise error", {"error": error}))
    result = run("-m", folders.maskcls, "-d", folders.data, "--json", tmp_path / "scores.json", code=code)
    assert "Stopped by" in result.stderr and "Traceback" not in result.output
    assert (tmp_path / "scores.json").read_text() == "earlier"


def test_scores_are_written_before_they_are_shown(folders, tmp_path, monkeypatch):
    """A reader that has seen enough costs no file."""

    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr("maskcls_hf.cli.evaluate.show", broken)
    result = run("-m", folders.maskcls, "-d", folders.data, "--json", tmp_path / "scores.json", code=1)
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] and "Error" not in result.stderr


def test_help_names_every_score():
    text = run("--help").stdout
    assert "mask AP" in text and "mean IoU" in text and "PQ" in text


class TestCrops:
    def sample(self, pixels: torch.Tensor, *classes) -> dict:
        return sample_of(pixels, *classes, image=torch.arange(3 * 11 * 7, dtype=torch.uint8).view(3, 11, 7))

    def test_side_by_side_in_the_middle(self):
        pixels = torch.arange(77).view(1, 11, 7)
        parts = list(crops(self.sample(pixels), 4))
        assert [part["segments"].name for part in parts] == ["x[1:5, 1:5]", "x[5:9, 1:5]"]
        assert torch.equal(id_map(parts[1]), pixels[:, 5:9, 1:5])
        assert torch.equal(parts[1]["image"], self.sample(pixels)["image"][:, 5:9, 1:5])
        (middle,) = crops(self.sample(pixels), 4, middle=True)
        assert torch.equal(id_map(middle), pixels[:, 3:7, 1:5])

    def test_whole_where_the_image_is_smaller(self):
        (part,) = crops(self.sample(torch.zeros(1, 11, 7, dtype=torch.uint8)), 20)
        assert part["segments"].size == part["image"].shape[1:] == (11, 7)

    def test_masks_that_a_crop_does_not_show_drop_out(self):
        masks = torch.zeros(3, 11, 7, dtype=torch.bool)
        masks[0, 0, 0] = masks[1, 5, 3] = masks[2, 6, 3] = True
        sample = self.sample(masks, {0: 4, 1: 5, 2: 6}, [0, 2])
        (part,) = crops(sample, 4, middle=True)
        assert part["segments"].stack.shape == (2, 4, 4)
        assert class_of_id(part) == {1: 5, 2: 6} and crowd_ids(part) == [2]


@needs_shared
@pytest.mark.slow
def test_scores_of_the_published_nuclei_model(tmp_path):
    """The row `the middle crop of each image` of its card."""
    options = ("--crop", "128", "--middle", "--threshold", "0.5", "--overlap-threshold", "0.5", "--batch-size", "4")
    tasks = ("-t", "semantic", "-t", "instance")
    path = tmp_path / "scores.json"
    data = SHARED / "data" / "dsb2018_nuclei"
    run("-m", "model_cards/maskcls-nuclei-tiny", "-d", data, "--json", path, *options, *tasks)
    found = json.loads(path.read_text())["scores"]
    expected = dict(mean_iou=0.884, iou_nucleus=0.806, f1=0.621, precision=0.723, recall=0.544, ap=0.289, ap50=0.584)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=6e-4)
