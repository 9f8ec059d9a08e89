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


class TestPanopticQuality:
    def test_equals_the_class_and_panopticapi(self, load):
        case = random_case(11)
        label_of = {category["id"]: k for k, category in enumerate(case.categories)}

        def image(segmentation, colours: bool) -> dict:
            infos = [
                {"id": s["id"], "label_id": label_of[s["category_id"]], "iscrowd": s.get("iscrowd", 0), "score": 0.5}
                for s in segmentation.segments
            ]
            rgb = np.stack([segmentation.ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
            return {"segmentation": Image.fromarray(rgb) if colours else segmentation.ids, "segments_info": infos}

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
