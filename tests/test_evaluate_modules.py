"""The metrics as modules of the `evaluate` library, loaded from their folders without a network."""

from __future__ import annotations

import os
from pathlib import Path

import evaluate
import numpy as np
import pytest
from PIL import Image

from panoptic_cases import random_case
from test_panoptic_quality import EXPECTED

MODULES = Path(__file__).resolve().parents[1] / "src" / "maskcls_hf" / "metrics" / "modules"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    return lambda name: evaluate.load(str(MODULES / name), cache_dir=str(tmp_path))


class TestMeanIoU:
    def test_example_of_evaluates_own_module(self, load):
        """Input and output as in the documentation of evaluate's `mean_iou`."""
        predictions = [[[1, 2], [3, 4], [5, 255]], [[2, 7], [9, 2], [3, 6]], [[2, 2, 3], [8, 2, 4], [3, 255, 2]]]
        references = [[[0, 3], [5, 4], [6, 255]], [[1, 7], [9, 2], [3, 6]], [[1, 2, 2], [8, 2, 1], [3, 255, 1]]]
        results = load("mean_iou").compute(
            predictions=[np.array(p) for p in predictions],
            references=[np.array(r) for r in references],
            num_labels=10,
            ignore_index=255,
        )
        assert results["mean_iou"] == pytest.approx(0.4775, abs=1e-12)
        assert results["mean_accuracy"] == pytest.approx(0.5916666666666666, abs=1e-12)
        assert results["overall_accuracy"] == pytest.approx(0.5263157894736842, abs=1e-12)
        iou = [0.0, 0.0, 0.375, 0.4, 0.5, 0.0, 0.5, 1.0, 1.0, 1.0]
        assert results["per_category_iou"] == pytest.approx(iou)
        accuracy = [0.0, 0.0, 0.75, 0.66666667, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
        assert results["per_category_accuracy"] == pytest.approx(accuracy)

    def test_equals_evaluates_own_module(self, load):
        """Absent classes, void, and pixels predicted as void; with `metrics/mean_iou` of evaluate's repository."""
        if "EVALUATE_MEAN_IOU" not in os.environ:
            pytest.skip("needs the folder of evaluate's mean_iou.py in the variable EVALUATE_MEAN_IOU")
        theirs, ours = evaluate.load(os.environ["EVALUATE_MEAN_IOU"]), load("mean_iou")
        rng = np.random.default_rng(0)
        for _ in range(15):
            num_labels = int(rng.integers(2, 40))
            present = rng.choice(num_labels, int(rng.integers(1, num_labels + 1)), replace=False)
            references = [rng.choice(present, (11, 13)).astype(np.uint8) for _ in range(3)]
            guesses = [rng.choice(num_labels, (11, 13)).astype(np.uint8) for _ in range(3)]
            predictions = [
                np.where(rng.random((11, 13)) < 0.6, *pair) for pair in zip(references, guesses, strict=True)
            ]
            for reference, prediction in zip(references, predictions, strict=True):
                reference[rng.random((11, 13)) < 0.2] = 255
                prediction[rng.random((11, 13)) < 0.05] = 255
            images = {"predictions": predictions, "references": references}
            with np.errstate(invalid="ignore"):
                expected = theirs.compute(**images, num_labels=num_labels, ignore_index=255)
            results = ours.compute(**images, num_labels=num_labels, ignore_index=255)
            for name, value in expected.items():
                assert results[name] == pytest.approx(value, abs=1e-12, nan_ok=True)

    def test_streaming_absent_classes_and_labels_counted_from_one(self, load):
        metric = load("mean_iou")
        metric.add(prediction=[[0, 1]], reference=[[1, 1]])
        metric.add_batch(predictions=[np.array([[1]])], references=[Image.fromarray(np.array([[0]], dtype=np.uint8))])
        results = metric.compute(num_labels=3, ignore_index=65535, reduce_labels=True)
        assert results["mean_iou"] == 0.25 and np.isnan(results["per_category_iou"][2])
        metric.add(prediction=[[0]], reference=[[0]])
        results = metric.compute(num_labels=2, ignore_index=255, nan_to_num=-1)
        assert results["per_category_iou"].tolist() == [1, -1]

    def test_wrong_ids(self, load):
        with pytest.raises(ValueError, match="0..65535"):
            load("mean_iou").add(prediction=[[-1]], reference=[[0]])
        with pytest.raises(ValueError, match="Prediction holds class ids"):
            load("mean_iou").compute(predictions=[[[9]]], references=[[[0]]], num_labels=2, ignore_index=255)

    def test_errors_say_image_and_value(self, load):
        good = np.array([[0, 1], [1, 1]])
        for reference, message in (
            (np.array([[0, 1], [0, -100]]), r"reference 0: ids go from -100 to 1.*np.where\(ids == -100, 255, ids\)"),
            (np.array([[0, 1], [0, 70000]]), "reference 0: ids go from 0 to 70000"),
            (np.zeros((2, 2, 4), np.uint8), r"reference 0: .*got \(2, 2, 4\) of uint8"),
            (np.array([[0.5]]), "reference 0: .* of float64"),
            (np.zeros((3, 2), np.uint8), "image 0: Prediction .* and target .* one size"),
            (np.full((2, 2), 9), r"image 0: Target holds class ids \[9\] outside 0..1"),
        ):
            with pytest.raises(ValueError, match=message):
                load("mean_iou").compute(predictions=[good], references=[reference], num_labels=2, ignore_index=-100)

    def test_label_map(self, load):
        """As in evaluate's own, of references and before `reduce_labels`; here all ids change at once."""
        options = dict(predictions=[np.array([[0, 1], [1, 1]])], num_labels=2, ignore_index=255)
        results = load("mean_iou").compute(references=[np.array([[1, 0], [0, 0]])], label_map={0: 1, 1: 0}, **options)
        assert results["mean_iou"] == 1
        reference = np.array([[7, 2], [2, 2]])
        results = load("mean_iou").compute(references=[reference], label_map={7: 1}, reduce_labels=True, **options)
        assert results["mean_iou"] == 1


class TestPanopticQuality:
    IDS = np.array([[1, 1], [2, 2]])
    INFOS = [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}]

    def score(self, load, segmentation, segments_info, **options) -> float:
        prediction = {"segmentation": self.IDS, "segments_info": self.INFOS}
        reference = {"segmentation": segmentation, "segments_info": segments_info}
        results = load("panoptic_quality").compute(
            predictions=[prediction], references=[reference], num_labels=2, **options
        )
        return results["pq"]

    def test_other_forms_of_the_same(self, load):
        coco = [{"id": i["id"], "category_id": i["label_id"], "area": 2} for i in self.INFOS]
        far = [{**self.INFOS[0], "id": 2**40}, self.INFOS[1]]
        for segmentation, infos in (
            (self.IDS, coco),
            (np.stack([self.IDS, 0 * self.IDS, 0 * self.IDS], -1).astype(np.uint8), self.INFOS),
            (np.where(self.IDS == 1, 2**40, self.IDS), far),
            (self.IDS, [{key: np.int64(value) for key, value in info.items()} for info in self.INFOS]),
        ):
            assert self.score(load, segmentation, infos) == 1

    def test_a_listed_segment_without_a_pixel_is_missed(self, load):
        more = [*self.INFOS, {"id": 3, "label_id": 0}]
        assert self.score(load, self.IDS, more) == pytest.approx((1 / 1.5 + 1) / 2)
        assert self.score(load, self.IDS, [*more[:2], {**more[2], "iscrowd": 1}]) == 1

    def test_errors_say_image_and_field(self, load):
        with_alpha = np.zeros((2, 2, 4), np.uint8)
        for segmentation, infos, message in (
            (
                self.IDS,
                [{"id": 1}, self.INFOS[1]],
                r"reference 0, segments_info 0: label_id \(or category_id\) is None",
            ),
            (self.IDS, [{"label_id": 1}], "reference 0, segments_info 0: id is None"),
            (self.IDS, [{"id": "1", "label_id": 0}], "reference 0, segments_info 0: id is '1'"),
            (self.IDS, [{"id": 1, "label_id": 0.5}], "segments_info 0: label_id .* is 0.5"),
            (self.IDS, [{**self.INFOS[0], "iscrowd": "0"}], "segments_info 0: iscrowd is '0'"),
            (self.IDS, [5], "reference 0, segments_info 0: id is None"),
            (self.IDS, self.INFOS[:1] * 2, r"reference 0: segments_info names an id twice: \[1, 1\]"),
            (with_alpha, [], r"reference 0: segmentation has shape \(2, 2, 4\).*three channels"),
            (self.IDS / 2, self.INFOS, "reference 0: segmentation .* of float64"),
            (self.IDS, [{**self.INFOS[0], "label_id": 7}], r"image 0: true segments have classes \[7\]"),
        ):
            with pytest.raises(ValueError, match=message):
                self.score(load, segmentation, infos)
        with pytest.raises(ValueError, match="prediction is no dict with segmentation and segments_info"):
            load("panoptic_quality").add(prediction=self.IDS, reference={})

    def test_equals_the_class_and_panopticapi(self, load):
        case = random_case(11)
        label_of = {category["id"]: k for k, category in enumerate(case.categories)}

        def image(segmentation, colors: bool) -> dict:
            infos = [
                {"id": s["id"], "label_id": label_of[s["category_id"]], "iscrowd": s.get("iscrowd", 0), "score": 0.5}
                for s in segmentation.segments
            ]
            rgb = np.stack([segmentation.ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
            return {"segmentation": Image.fromarray(rgb) if colors else segmentation.ids, "segments_info": infos}

        metric = load("panoptic_quality")
        (truth, prediction), *others = case.pairs
        metric.add(prediction=image(prediction, False), reference=image(truth, True))
        metric.add_batch(
            predictions=[image(prediction, True) for _, prediction in others],
            references=[image(truth, False) for truth, _ in others],
        )
        results = metric.compute(num_labels=len(label_of), stuff_ids=[4, 5])
        for name, value in EXPECTED["random 11"].items():
            if name != "per_class":
                assert results[name] == pytest.approx(value, abs=1e-9)
        per_class = {category["name"]: results["per_category_pq"][k] for k, category in enumerate(case.categories)}
        assert per_class == pytest.approx(
            {name: scores["pq"] for name, scores in EXPECTED["random 11"]["per_class"].items()}, abs=1e-9
        )

    def test_unknown_ids_and_ids_below_one(self, load):
        reference = {"segmentation": [[7, 7, 3]], "segments_info": [{"id": 7, "label_id": 0}]}  # 3 is void
        found = {"segmentation": [[5, 5, -1]], "segments_info": [{"id": 5, "label_id": 0}]}
        assert load("panoptic_quality").compute(predictions=[found], references=[reference], num_labels=1)["pq"] == 1.0
        found["segmentation"] = [[5, 5, 9]]
        with pytest.raises(ValueError, match=r"ids \[9\]"):
            load("panoptic_quality").add(prediction=found, reference=reference)
