"""Panoptic quality against panopticapi, torchmetrics and small cases worked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcls_hf.data.sample import VOID
from maskcls_hf.metrics import NO_SEGMENT, PanopticQuality, Segments
from maskcls_hf.models.run_lengths import Runs
from panoptic_cases import DATA, FIGURES, REAL, Case, Segmentation, figures, panopticapi, random_case, real_case

EXPECTED = json.loads(FIGURES.read_text())


def truth_of(segmentation: Segmentation, place: dict[int, int]) -> Segments:
    """As readers give it."""
    classes = {s["id"]: place[s["category_id"]] for s in segmentation.segments} | {0: VOID}
    crowds = [s["id"] for s in segmentation.segments if s["iscrowd"]]
    return Segments.from_ids(segmentation.ids.astype(np.int32), classes, crowds, name="image")


def metric_of(case: Case) -> tuple[PanopticQuality, dict[int, int]]:
    place = {category["id"]: k for k, category in enumerate(case.categories)}
    names = {k: category["name"] for k, category in enumerate(case.categories)}
    return PanopticQuality(names, [k for k, c in enumerate(case.categories) if not c["isthing"]]), place


def scores_of(case: Case) -> dict:
    metric, place = metric_of(case)
    for truth, prediction in case.pairs:
        infos = [{"id": s["id"], "label_id": place[s["category_id"]]} for s in prediction.segments]
        found = Segments.from_output({"segmentation": torch.from_numpy(prediction.ids), "segments_info": infos})
        metric.update(found, truth_of(truth, place))
    per_class = {name: scores for name, scores in metric.per_class().items() if not math.isnan(scores["pq"])}
    return {k: v for k, v in metric.compute().items() if not math.isnan(v)} | {"per_class": per_class}


def assert_equal(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    assert set(found["per_class"]) == set(expected["per_class"])
    for name, scores in expected["per_class"].items():
        assert found["per_class"][name] == pytest.approx(scores, abs=1e-9)
    for score in expected.keys() - {"per_class"}:
        assert found[score] == pytest.approx(expected[score], abs=1e-9)


class TestEqualsPanopticapi:
    @pytest.mark.parametrize("seed", range(20))
    def test_figures_of_random_cases(self, seed: int):
        assert_equal(scores_of(random_case(seed)), EXPECTED[f"random {seed}"])

    @pytest.mark.parametrize("name", REAL)
    def test_figures_of_real_data(self, name: str):
        if not (DATA / name).exists():
            pytest.skip(f"needs {DATA / name}")
        assert_equal(scores_of(real_case(name)), EXPECTED[name])

    def test_the_figures_are_of_cases_that_tell_rules_apart(self):
        assert sum(0.05 < scores["pq"] < 0.95 for scores in EXPECTED.values()) > 15
        truths = [truth for seed in range(20) for truth, _ in random_case(seed).pairs]
        assert sum(s["iscrowd"] for truth in truths for s in truth.segments) > 20
        assert sum((truth.ids == 0).any() for truth in truths) > 20

    @settings(max_examples=60, deadline=None, database=None)
    @given(seed=st.integers(1000, 2**32 - 1))
    def test_any_random_case(self, seed: int):
        evaluation = panopticapi()
        if evaluation is None:
            pytest.skip("needs panopticapi: importable, or its folder in the variable PANOPTICAPI")
        case = random_case(seed, images=2)
        assert_equal(scores_of(case), figures(evaluation, case))


def truth(rows: list[list[int]], labels: list[int], crowd: list[int] = ()) -> Segments:
    are_crowd = torch.zeros(len(labels), dtype=torch.bool)
    are_crowd[list(crowd)] = True
    return Segments(torch.tensor(labels, dtype=torch.int64), Runs.of(np.array(rows)), is_crowd=are_crowd)


def predicted(rows: list[list[int]], labels: dict[int, int]) -> dict:
    infos = [{"id": i, "label_id": label} for i, label in labels.items()]
    return {"segmentation": torch.tensor(rows), "segments_info": infos}


def counts(found: dict, true: Segments, num_labels: int = 2) -> dict[int, list[float]]:
    """IoU sum, true positives, false positives, false negatives of each class that has any."""
    measured = PanopticQuality({k: str(k) for k in range(num_labels)}).measure(Segments.from_output(found), true)
    return {k: row.tolist() for k, row in enumerate(measured.T) if row.any()}


class TestRules:
    def test_void_pixels_leave_the_union(self):
        result = counts(predicted([[1, 1, 1, 1]], {1: 0}), truth([[0, 0, VOID, VOID]], [0]))
        assert result == {0: [1.0, 1, 0, 0]}

    def test_iou_of_one_half_is_no_match(self):
        result = counts(predicted([[1, 1, 0, 0]], {1: 0}), truth([[0, 0, 0, 0]], [0]))
        assert result == {0: [0.0, 0, 1, 1]}

    def test_pixels_of_no_segment_are_not_void(self):
        result = counts(predicted([[1, 1, 1, 1]], {1: 0}), truth([[0, 0, NO_SEGMENT, NO_SEGMENT]], [0]))
        assert result == {0: [0.0, 0, 1, 1]}

    @pytest.mark.parametrize(("row", "false_positives"), [([VOID, VOID, 0, 0], 1), ([VOID, VOID, VOID, 0], 0)])
    def test_a_segment_mostly_in_void_is_no_false_positive(self, row: list[int], false_positives: int):
        result = counts(predicted([[1, 1, 1, 1]], {1: 1}), truth([row], [0]))
        assert result.get(1, [0, 0, 0, 0])[2] == false_positives

    @pytest.mark.parametrize(("label", "false_positives"), [(0, 0), (1, 1)])
    def test_a_segment_mostly_in_a_crowd_of_its_class_is_no_false_positive(self, label: int, false_positives: int):
        result = counts(predicted([[1, 1, 1, 0]], {1: label}), truth([[0, 0, 0, 0]], [0], crowd=[0]))
        assert result == ({label: [0.0, 0, 1, 0]} if false_positives else {})

    def test_void_and_crowd_add_up(self):
        result = counts(predicted([[1, 1, 1, 1, 1]], {1: 0}), truth([[0, 0, VOID, 1, 1]], [0, 1], crowd=[0]))
        assert result == {1: [0.0, 0, 0, 1]}

    def test_of_several_crowds_of_a_class_the_last_counts_as_in_panopticapi(self):
        result = counts(predicted([[1, 1, 1, 0]], {1: 0}), truth([[0, 0, 0, 1]], [0, 0], crowd=[0, 1]))
        assert result == {0: [0.0, 0, 1, 0]}
        result = counts(predicted([[1, 1, 1, 0]], {1: 0}), truth([[1, 1, 1, 0]], [0, 0], crowd=[0, 1]))
        assert result == {}

    def test_a_true_segment_without_pixels_is_missed(self):
        result = counts(predicted([[0, 0]], {}), truth([[NO_SEGMENT, VOID]], [1]))
        assert result == {1: [0.0, 0, 0, 1]}

    def test_nothing_there_and_nothing_predicted_is_nan(self):
        metric = PanopticQuality({0: "a", 1: "b"}, stuff_ids=[1])
        metric.update(Segments.from_output(predicted([[0, 0]], {})), truth([[VOID, VOID]], []))
        assert all(math.isnan(value) for value in metric.compute().values())
        metric.update(Segments.from_output(predicted([[1, 1]], {1: 0})), truth([[0, 0]], [0]))
        scores = metric.compute()
        assert scores["pq"] == scores["pq_things"] == 1.0
        assert math.isnan(scores["pq_stuff"]) and math.isnan(metric.per_class()["b"]["pq"])

    def test_segments_of_a_stack(self):
        stack = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 1, 0]]]).bool()
        void = torch.tensor([[False, False, False, True]])
        whole = Segments(torch.tensor([0, 1]), stack, void=void)
        assert counts(predicted([[4, 4, 7, 7]], {4: 0, 7: 1}), whole) == {0: [1.0, 1, 0, 0], 1: [1.0, 1, 0, 0]}
        stack[1, 0, 0] = True
        with pytest.raises(ValueError, match="overlap"):
            counts(predicted([[4, 4, 7, 7]], {4: 0, 7: 1}), Segments(whole.class_labels, stack))


class TestWrongInput:
    @pytest.mark.parametrize(
        ("segmentation", "message"),
        [
            (predicted([[1, 1, 1]], {1: 0}), "the annotation"),
            (predicted([[1, 2]], {1: 0}), r"ids \[2\] that segments_info lacks"),
            (predicted([[1, 1]], {1: 0, 5: 0}), r"ids \[5\] that the map lacks"),
            (predicted([[1, 1]], {1: 2}), r"predicted segments have classes \[2\] outside 0..1"),
            (predicted([[1, 1]], {1: 0}) | {"segments_info": [{"id": 1, "label_id": 0}] * 2}, "an id twice"),
            (predicted([[1, torch.nan]], {1: 0}), r"ids \[nan\] that segments_info lacks"),
        ],
    )
    def test_prediction(self, segmentation: dict, message: str):
        with pytest.raises(ValueError, match=message):
            counts(segmentation, truth([[0, 0]], [0]))

    def test_annotation(self):
        with pytest.raises(ValueError, match="places outside its 1 segments"):
            counts(predicted([[1, 1]], {1: 0}), truth([[0, 1]], [0]))

    def test_classes(self):
        with pytest.raises(ValueError, match="lacks \\[1\\]"):
            PanopticQuality({0: "a", 2: "b"})
        with pytest.raises(ValueError, match=r"stuff_ids \[7\]"):
            PanopticQuality({0: "a"}, stuff_ids=[7])

    def test_measurements_of_another_size(self):
        with pytest.raises(ValueError, match=r"\(..., 4, 2\)"):
            PanopticQuality({0: "a", 1: "b"}).add(torch.zeros(4, 3))


def test_processes_may_gather_measurements_in_batches():
    case = random_case(7)
    metric, place = metric_of(case)
    measured = []
    for annotation, prediction in case.pairs:
        infos = [{"id": s["id"], "label_id": place[s["category_id"]]} for s in prediction.segments]
        found = Segments.from_output({"segmentation": prediction.ids, "segments_info": infos})
        measured.append(metric.measure(found, truth_of(annotation, place)))
    metric.add(torch.stack(measured[:3]))
    metric.add(measured[3])
    assert {k: v for k, v in metric.compute().items() if not math.isnan(v)} == pytest.approx(
        {k: v for k, v in EXPECTED["random 7"].items() if k != "per_class"}, abs=1e-9
    )
    metric.reset()
    assert math.isnan(metric.compute()["pq"])


def test_equals_torchmetrics_where_nothing_is_void_or_crowd():
    torchmetrics = pytest.importorskip("torchmetrics")
    rng = np.random.default_rng(0)
    theirs = torchmetrics.detection.PanopticQuality({0, 1}, {2, 3}, return_sq_and_rq=True)
    ours = PanopticQuality({k: str(k) for k in range(4)}, [2, 3])
    for _ in range(10):
        maps = []
        ids = np.kron(rng.integers(1, 7, (4, 5)), np.ones((6, 6), dtype=np.int64))
        for moved in (ids, np.roll(ids, 1, axis=1)):
            labels = rng.permutation([0, 0, 1, 1, 2, 3]) if not maps or rng.random() < 0.5 else maps[0][1]
            maps.append((moved, labels))
        pairs = []
        for moved, labels in maps:
            classes = labels[moved - 1]
            pairs.append(torch.from_numpy(np.stack([classes, np.where(classes < 2, moved, 0)], axis=-1)))
        theirs.update(pairs[1][None], pairs[0][None])
        (true_ids, true_labels), (found_ids, found_labels) = maps
        present = np.unique(true_ids)
        annotation = truth(np.searchsorted(present, true_ids).tolist(), true_labels[present - 1].tolist())
        infos = [{"id": i, "label_id": int(found_labels[i - 1])} for i in np.unique(found_ids)]
        ours.update(Segments.from_output({"segmentation": found_ids, "segments_info": infos}), annotation)
    scores = ours.compute()
    assert 0.2 < scores["pq"] < 0.9
    assert [scores[name] for name in ("pq", "sq", "rq")] == pytest.approx(
        theirs.compute().tolist(),
        abs=1e-6,  # theirs are float32
    )
