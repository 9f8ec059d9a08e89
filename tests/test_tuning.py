"""Thresholds found on annotated images: `maskcls_hf.inference.tune` and `maskcls tune`."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from checkpoints import CLASSES, image_processor, maskcls_model, picture, save_maskcls, save_perpixel
from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.cli.main import app
from maskcls_hf.cli.tune import check_target
from maskcls_hf.data import SegmentationFolder
from maskcls_hf.inference import Predictor, evaluate, tune
from maskcls_hf.inference.tuning import GRIDS
from maskcls_hf.metrics import Evaluator, InstanceF1, PanopticQuality, Segments
from maskcls_hf.metrics.calibration import Calibration

SIZES = [(48, 80), (64, 64)]
CARS = {0: "background", 1: "car"}
SMALL = {"threshold": [0.3, 0.9], "mask_threshold": [0.5, 0.6], "overlap_mask_area_threshold": [0.2, 0.8]}


def write_data(root: Path, kind: str) -> Path:
    """What the random model finds, moved by a few pixels, of a high threshold: as labels of classes or instances."""
    model, processor = maskcls_model(), image_processor()
    names = list(CLASSES.values()) if kind == "labels" else ["car"]
    for split in ("val", "test"):
        for folder in ("images", kind):
            (root / split / folder).mkdir(parents=True)
        for number, size in enumerate(SIZES):
            picture(*size).save(root / split / "images" / f"{number}.png")
            with torch.no_grad():
                outputs = model(**processor(picture(*size), return_tensors="pt"))
            if kind == "labels":
                found = processor.post_process_semantic_segmentation(outputs)[0]
            else:
                found = processor.post_process_panoptic_segmentation(outputs, threshold=0.9)[0]["segmentation"]
            Image.fromarray(found.roll(2, 1).numpy().astype(np.uint8)).save(root / split / kind / f"{number}.png")
    (root / "labels.json").write_text(json.dumps(dict(enumerate(names))))
    return root


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("tune")
    cars = maskcls_model()
    cars.config.id2label, cars.config.label2id = CARS, {name: label for label, name in CARS.items()}
    with torch.no_grad():  # of five classes two, and no object
        head = cars.segmentation_module.class_predictor
        head.weight, head.bias = (torch.nn.Parameter(values[[2, 0, 5]]) for values in (head.weight, head.bias))
    cars.save_pretrained(root / "cars")
    MaskClsImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(root / "cars")
    return SimpleNamespace(
        root=root, labels=write_data(root / "labels", "labels"), instances=write_data(root / "instances", "instances"),
        model=save_maskcls(root / "model"), cars=root / "cars", perpixel=save_perpixel(root / "perpixel"),
    )  # fmt: skip


def opened(places, model: str = "model", data: str = "labels", **options):
    predictor = Predictor.from_pretrained(getattr(places, model), batch_size=1, **options)
    return predictor, SegmentationFolder(getattr(places, data), "val")


class TestTune:
    @pytest.mark.parametrize("ways", [{}, {"tile": 48, "overlap": 0.25}])
    def test_scores_are_those_of_evaluate(self, places, ways):
        """Of every setting, in tiles too; and the best one is the best of those tried."""
        predictor, data = opened(places, **ways)
        found = tune(predictor, data, grid=SMALL)
        assert len(found.tried) > 5
        for entry in found.tried:
            named = {name.replace("overlap_mask_area", "overlap"): value for name, value in entry["options"].items()}
            evaluator = Evaluator(predictor.image_processor, CLASSES, data.stuff_ids, ["panoptic"], **named)
            assert entry["scores"] == pytest.approx(evaluate(predictor, data, evaluator), nan_ok=True)
        scores = [entry["scores"]["pq"] for entry in found.tried]
        assert found.scores_of(found.options)["pq"] == max(scores) > min(scores)
        assert found.before == dict(threshold=0.5, mask_threshold=0.5, overlap_mask_area_threshold=0.8)
        assert found.tried[0]["options"] == found.before and found.images == 2

    def test_every_neighbor_of_the_best_was_tried(self, places):
        found = tune(*opened(places), grid=SMALL)
        tried = [entry["options"] for entry in found.tried]
        assert all(found.options | {name: value} in tried for name, values in SMALL.items() for value in values)
        assert all(tried.count(options) == 1 for options in tried)

    def test_the_model_sees_each_image_once(self, places):
        predictor, data = opened(places)
        calls = []
        predictor.model.register_forward_hook(lambda *_: calls.append(1))
        before = predictor.image_processor.to_dict()
        tune(predictor, data, grid=SMALL)
        assert len(calls) == len(data) and predictor.image_processor.to_dict() == before
        calls.clear()
        passes = []
        tune(predictor, data, grid=SMALL, limit=1, on_pass=lambda *what: passes.append(what) or (lambda: None))
        assert len(calls) == 1 and {images for _, images in passes} == {1} and passes[0][0] == "Predicting"

    @pytest.mark.parametrize("task", ["panoptic", "instance"])
    def test_instances_by_f1(self, places, task):
        """In overlapping masks as in the panoptic map."""
        predictor, data = opened(places, "cars", "instances")
        found = tune(predictor, data, task, "f1")
        assert found.metric == "f1" and set(found.options) == set(GRIDS[task])
        for entry in (found.tried[0], found.tried[-1]):
            metric = InstanceF1(CARS, data.stuff_ids)
            for sample in data:
                clean = dict(max_hole_share=0.0, min_fragment_share=0.0)
                clean |= {"max_mask_iou": 1.0} if task == "instance" else {}
                image = Image.fromarray(sample["image"].permute(1, 2, 0).numpy())
                options = entry["options"] | clean | {"label_ids_to_fuse": data.stuff_ids}
                result = Segments.from_output(predictor(image, task, **options))
                metric.add(metric.measure(result, sample["segments"])[None])
            assert entry["scores"] == pytest.approx(metric.compute(), nan_ok=True)
        assert found.calibration.error is not None and sum(found.calibration.counts) > 0

    def test_what_it_begins_with_is_saved_with_the_model(self, places):
        predictor, data = opened(places)
        predictor.image_processor.inference_defaults = {"panoptic": {"threshold": 0.35}}
        assert tune(predictor, data, grid={"threshold": [0.5]}).before == {"threshold": 0.35}

    @pytest.mark.parametrize(
        ("model", "data", "options", "message"),
        [
            ("perpixel", "labels", {}, "per-pixel"),
            ("model", "labels", {"task": "semantic"}, "task must be one of"),
            ("model", "labels", {"metric": "f1"}, "tell instances apart"),
            ("model", "labels", {"task": "instance"}, "tell instances apart"),
            ("cars", "instances", {"task": "instance", "metric": "pq"}, "must be f1 for instance"),
            ("cars", "labels", {}, "classes of the model and of the data differ"),
            ("model", "labels", {"grid": {"threshold": [1.5]}}, "grid.*threshold.*1.5"),
            ("model", "labels", {"grid": {"top": [0.5]}}, "no thresholds of panoptic"),
            ("model", "labels", {"grid": {"mask_threshold": [0.5]}}, "must have values of threshold"),
            ("model", "labels", {"limit": 0}, "limit"),
        ],
    )
    def test_refuses(self, places, model, data, options, message):
        with pytest.raises(ValueError, match=message):
            tune(*opened(places, model, data), **options)


class TestOutcomes:
    """Of single segments, as the metrics count them."""

    TRUE = Segments([0, 1, 1], np.array([[0, 0, 1, 1, 2, 2, -1, -1]]))
    FOUND = Segments([0, 1, 0, 1], np.array([[0, 0, 1, 2, 2, 2, 3, 3]]), scores=[0.9, 0.8, 0.7, 0.6])

    def test_are_those_of_the_counts(self):
        """One matches, one has an IoU of just a half, one is of another class, one lies in void."""
        assert PanopticQuality({0: "a", 1: "b"}).outcomes(self.FOUND, self.TRUE).tolist() == [1, 0, 0, -1]
        counts = PanopticQuality({0: "a", 1: "b"}).measure(self.FOUND, self.TRUE)
        assert counts[1:].tolist() == [[1, 0], [1, 1], [0, 2]]

    def test_of_instances(self):
        f1 = InstanceF1({0: "a", 1: "b"}, stuff_ids=[0])
        assert f1.outcomes(self.FOUND, self.TRUE).tolist() == [-1, 0, -1, 0]
        assert f1.measure(self.FOUND, self.TRUE).tolist() == [[0], [2], [2]]


class TestCalibration:
    def test_by_hand(self):
        """Guo et al., Eq. 3: two bins with three and one segments; the fifth does not count."""
        scores, outcomes = np.array([0.1, 0.2, 0.3, 0.9, 0.95]), np.array([0, 1, 0, 1, -1], dtype=np.int8)
        found = Calibration.of((scores, outcomes), bins=2)
        assert found.edges == [0, 0.5, 1] and found.counts == [3, 1]
        assert found.scores == pytest.approx([0.2, 0.9]) and found.matched == pytest.approx([1 / 3, 1])
        assert found.error == pytest.approx(3 / 4 * (1 / 3 - 0.2) + 1 / 4 * 0.1)

    def test_edges_and_nothing(self, tmp_path):
        found = Calibration.of((np.array([0.0, 0.5, 0.6, 1.0]), np.array([0, 0, 1, 1])), bins=2)
        assert found.counts == [2, 2] and found.matched == [0, 1]
        nothing = Calibration.of((np.zeros(0), np.zeros(0, dtype=np.int8)))
        assert nothing.error is None and nothing.counts == [0] * 10 and nothing.scores == [None] * 10
        assert nothing.draw(tmp_path / "nothing.png") and found.draw(tmp_path / "found.png", "two")
        assert Image.open(tmp_path / "found.png").size == Image.open(tmp_path / "nothing.png").size


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["tune", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == code, result.output
    return result


class TestCommand:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setitem(GRIDS, "panoptic", SMALL)

    def test_saves_what_it_finds(self, places, tmp_path):
        """In place: the weights stay, what was saved before too; the table shows every setting."""
        model = save_maskcls(tmp_path / "model")
        processor = MaskClsImageProcessor.from_pretrained(model)
        processor.inference_defaults = {"task": "panoptic", "panoptic": {"threshold": 0.4, "min_fragment_share": 0.01}}
        processor.save_pretrained(model)
        weights = (model / "model.safetensors").read_bytes()
        result = run("-m", model, "-d", places.labels)
        content = json.loads((model / "tuning_panoptic.json").read_text())
        saved = MaskClsImageProcessor.from_pretrained(model).inference_defaults
        assert saved == {"task": "panoptic", "panoptic": content["options"] | {"min_fragment_share": 0.01}}
        assert content["before"]["threshold"] == 0.4 and content["settings"]["split"] == "val"
        assert content["scores"]["pq"] >= content["scores_before"]["pq"]
        assert len(content["tried"]) > 5 and sum(content["calibration"]["counts"]) > 0
        assert Image.open(model / "reliability_panoptic.png").width == 500
        assert (model / "model.safetensors").read_bytes() == weights and not (model / ".writing").exists()
        lines = result.stdout.splitlines()[2:]
        assert len(lines) == len(content["tried"]) and "before" in lines[0]
        assert sum("best" in line for line in lines) == 1
        assert "Warning" not in result.stderr and "calibration error" in " ".join(result.stderr.split())

    def test_to_another_folder(self, places, tmp_path):
        before = {path.name: path.read_bytes() for path in places.model.iterdir()}
        run("-m", places.model, "-d", places.labels, "-o", tmp_path / "new", "--limit", "1")
        assert {path.name: path.read_bytes() for path in places.model.iterdir()} == before
        MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "new")
        assert MaskClsImageProcessor.from_pretrained(tmp_path / "new").inference_defaults["panoptic"]
        result = run("-m", places.model, "-d", places.labels, "-o", tmp_path / "new", code=1)
        assert "is not an empty folder" in " ".join(result.stderr.split())

    def test_the_test_split_is_warned_about(self, places, tmp_path):
        result = run("-m", places.model, "-d", places.labels, "-o", tmp_path / "new", "--split", "test")
        assert "seems to be the test set" in " ".join(result.stderr.split())

    def test_what_cannot_be_saved_is_refused_first(self, places, tmp_path, monkeypatch):
        monkeypatch.setattr("maskcls_hf.inference.predictor.load_model", lambda *_, **__: pytest.fail("loads"))
        checkpoint = save_maskcls(tmp_path / "checkpoint")
        (checkpoint / "manifest.json").write_text("{}")
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        (theirs / "config.json").write_text('{"model_type": "maskformer"}')
        for model, message in ((checkpoint, "damaged"), (theirs, "maskcls convert it first")):
            result = run("-m", model, "-d", places.labels, code=1)
            assert message in " ".join(result.stderr.split())
        assert not (checkpoint / "tuning_panoptic.json").exists()

    def test_nothing_is_saved_where_it_is_stopped(self, places, tmp_path, monkeypatch):
        def stopped(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("maskcls_hf.inference.tuning.Search.along", stopped)
        result = run("-m", places.model, "-d", places.labels, "-o", tmp_path / "new", code=130)
        assert "nothing is saved" in result.stderr and not (tmp_path / "new").exists()


def test_scores_without_segments_are_no_best():
    """NaN, where nothing is there and nothing found, is not preferred."""
    from maskcls_hf.inference.tuning import _rank

    assert max([math.nan, 0.0, 0.2, math.nan], key=_rank) == 0.2


@pytest.mark.parametrize("model_type", ["maskformer", "mask2former", "eomt", "eomt_dinov3"])
def test_models_of_transformers_keep_no_thresholds(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match="is a model of transformers, which keeps no thresholds"):
        check_target(str(tmp_path), None)
