"""`Evaluator`: one set of scores from Trainer, from Accelerate, from ready maps; at the size of the annotations."""

import contextlib
import io
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from checkpoints import CLASSES, STUFF, image_processor, maskcls_model, picture
from maskcls_hf import PerPixelForSemanticSegmentation, register_metric
from maskcls_hf.data import MaskClsCollator
from maskcls_hf.data.sample import VOID
from maskcls_hf.inference import Predictor
from maskcls_hf.metrics import Evaluator, MeanIoU, Segments
from maskcls_hf.metrics.metric import METRICS
from maskcls_hf.models.inference_defaults import NO_CLEAN_UP
from maskcls_hf.training import MaskClsTrainer
from maskcls_hf.training.recipe import load_recipe
from maskcls_hf.training.run import build_evaluator
from samples import class_of_id, id_map, sample_of
from tiny import perpixel_config

TASKS = ("semantic", "panoptic", "instance")
SIZES = [(48, 80), (80, 48), (64, 64), (40, 72), (48, 48)]
CROWD, UNLABELED = 7, 8


class Samples(Dataset):
    """Panoptic annotations that resemble what the random model finds: its segments, moved by a few pixels."""

    def __init__(self, number: int = len(SIZES)):
        self.model, self.number = maskcls_model(), number

    def __len__(self):
        return self.number

    @torch.no_grad()
    def __getitem__(self, index: int) -> dict:
        height, width = SIZES[index]
        image = np.asarray(picture(height, width)).copy()
        outputs = self.model(**image_processor()(image, return_tensors="pt"))
        panoptic = image_processor().post_process_panoptic_segmentation(outputs, 0.5, 0.5, 0.0)[0]
        pixels = 100 + panoptic["segmentation"].roll((index % 3, 1), (0, 1))
        classes = {100 + info["id"]: info["label_id"] for info in panoptic["segments_info"]}
        found = image_processor().post_process_instance_segmentation(outputs, 0.9, return_binary_maps=True)[0]
        things = [place for place, info in enumerate(found["segments_info"]) if info["label_id"] not in STUFF]
        if index % 2 == 0:  # the best instance is there, whole
            pixels[found["segmentation"][things[0]].roll(1, 0)] = 99
            classes[99] = found["segments_info"][things[0]]["label_id"]
        pixels[:6, :10], pixels[-6:, :12] = CROWD, UNLABELED
        classes = {**classes, 100: VOID, CROWD: 3, UNLABELED: VOID}
        image = torch.from_numpy(image).permute(2, 0, 1)
        return sample_of(pixels.int(), classes, [CROWD], f"image {index}", image)


def evaluator(**options) -> Evaluator:
    options = {"tasks": TASKS, "threshold": 0.5, "overlap_threshold": 0.0, **options}
    return Evaluator(image_processor(), CLASSES, STUFF, **options)


def batches(size: int, samples: Samples) -> DataLoader:
    return DataLoader(samples, size, collate_fn=MaskClsCollator(image_processor(), keep_ground_truth=True))


@torch.no_grad()
def scores_of(batch_size: int, samples: Samples, evaluator: Evaluator) -> dict[str, float]:
    for batch in batches(batch_size, samples):
        ground_truth = batch.pop("ground_truth")
        evaluator.add(evaluator.measure(samples.model(**batch), ground_truth))
    return evaluator.compute()


@pytest.fixture(scope="module")
def samples() -> Samples:
    return Samples()


@pytest.fixture(scope="module")
def scores(samples) -> dict[str, float]:
    return scores_of(1, samples, evaluator(boundary=True))


def assert_close(found: dict[str, float], expected: dict[str, float], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=tolerance, nan_ok=True), name


def test_scores_of_every_task(scores):
    for name in ("mean_iou", "pixel_accuracy", "boundary_iou", "pq", "pq_things", "pq_stuff", "ap", "ap50", "f1"):
        assert 0.02 < scores[name] < 0.999, name
    assert scores["iou_sky"] > 0


class TestAgainstOtherCode:
    def test_mean_iou_by_counting_pixels(self, samples, scores):
        """At the size of the files; crowd and void pixels don't count."""
        common, either = np.zeros(5), np.zeros(5)
        for sample in samples:
            outputs = samples.model(**image_processor()(sample["image"], return_tensors="pt"))
            found = image_processor().post_process_semantic_segmentation(outputs)[0].numpy()
            ids, classes = id_map(sample, void=UNLABELED)[0].numpy(), class_of_id(sample) | {UNLABELED: VOID}
            counted = ~np.isin(ids, [100, CROWD, UNLABELED])
            true = np.vectorize(classes.get)(ids)
            for label in CLASSES:
                common[label] += ((found == label) & (true == label) & counted).sum()
                either[label] += (((found == label) | (true == label)) & counted).sum()
        assert scores["mean_iou"] == pytest.approx(np.nanmean(common[either > 0] / either[either > 0]), abs=1e-12)

    def test_ap_of_all_images_by_pycocotools(self, samples, scores):
        """Things only; the crowd region as COCO treats it."""
        images, annotations, results = [], [], []
        for number, sample in enumerate(samples, start=1):
            ids, classes = id_map(sample, void=UNLABELED)[0].numpy(), class_of_id(sample)
            images.append(dict(id=number, height=ids.shape[0], width=ids.shape[1]))
            for i in classes:  # also those without a pixel, which pycocotools counts as missed
                if classes[i] not in (None, VOID, *STUFF):
                    code = coco_mask.encode(np.asfortranarray((ids == i).astype(np.uint8)))
                    area, box = float(coco_mask.area(code)), coco_mask.toBbox(code).tolist()
                    record = dict(image_id=number, category_id=classes[i], segmentation=code, area=area, bbox=box)
                    annotations.append(record | dict(id=len(annotations) + 1, iscrowd=int(i == CROWD)))
            outputs = samples.model(**image_processor()(sample["image"], return_tensors="pt"))
            found = image_processor().post_process_instance_segmentation(
                outputs, threshold=0.0, return_coco_annotation=True, label_ids_to_fuse=(), **NO_CLEAN_UP["instance"]
            )[0]
            for code, info in zip(found["segmentation"], found["segments_info"], strict=True):
                record = dict(image_id=number, category_id=info["label_id"], segmentation=code, score=info["score"])
                results += [record] if info["label_id"] not in STUFF else []
        categories = [dict(id=i, name=name) for i, name in CLASSES.items() if i not in STUFF]
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = dict(info={}, images=images, annotations=annotations, categories=categories)
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(results), "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        names = ("ap", "ap50", "ap75", "ap_small")
        assert [scores[name] for name in names] == pytest.approx(evaluation.stats[:4].tolist(), abs=1e-12)

    def test_f1_is_the_recognition_quality_of_things_without_classes(self, samples):
        """With one class of things and nothing void both are TP / (TP + (FP + FN) / 2)."""
        classes = {0: "stuff", 1: "thing"}
        score = Evaluator(image_processor(), classes, [0], ("panoptic", "instance"))
        generator = np.random.default_rng(0)
        for _ in range(5):
            ids, found = (torch.from_numpy(generator.integers(0, 4, (4, 4)).repeat(4, 0).repeat(4, 1)) for _ in "ab")
            found = torch.where(torch.from_numpy(generator.random((16, 16)) < 0.8), ids, found).int()
            info = [dict(id=i, label_id=1, score=0.5) for i in found.unique().tolist() if i]
            maps = {"panoptic": {"segmentation": found, "segments_info": info}}
            maps["instance"] = {"segmentation": torch.zeros(0, 16, 16, dtype=torch.bool), "segments_info": []}
            present = [i for i in ids.unique().tolist() if i]
            places = torch.full((16, 16), -2, dtype=torch.int32)
            for place, i in enumerate(present):
                places[ids == i] = place
            truth = Segments(torch.ones(len(present), dtype=torch.int64), places)
            score.add(score.measure_maps([maps], [truth]))
        scores = score.compute()
        assert 0.1 < scores["f1"] < 1 and scores["f1"] == pytest.approx(scores["rq_things"])


class TestWaysToScore:
    def test_ready_maps_give_the_same(self, samples, scores):
        """Those of a `Predictor`, from the same forward pass."""
        score = evaluator(boundary=True)
        predict = Predictor(samples.model, image_processor())
        for sample in samples:
            truth = sample["segments"]
            score.add(
                score.measure_maps(predict.predict(sample["image"].as_subclass(torch.Tensor), score.options), [truth])
            )
        assert_close(score.compute(), scores)

    def test_padding_of_a_batch_does_not_matter(self, samples, scores):
        """Images of five sizes in one batch; a few pixels change by rounding."""
        found = scores_of(5, samples, evaluator(boundary=True))
        assert_close(
            {k: found[k] for k in ("mean_iou", "pq", "f1")}, {k: scores[k] for k in ("mean_iou", "pq", "f1")}, 0.02
        )

    def test_trainer(self, samples, scores, tmp_path):
        trainer = MaskClsTrainer(
            model=samples.model,
            args=TrainingArguments(
                output_dir=str(tmp_path), per_device_eval_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True
            ),
            evaluator=evaluator(boundary=True),
            eval_dataset=samples,
            data_collator=MaskClsCollator(image_processor(), keep_ground_truth=True),
        )
        for _ in range(2):  # the second time starts afresh
            found = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
            assert_close({name: found[name] for name in scores}, scores)

    def test_processes_that_share_the_images_with_accelerate(self, samples, tmp_path):
        """5 images, 2 processes: the last batch is filled up with images that must not count twice."""
        AcceleratorState._reset_state(reset_partial_state=True)  # of Trainer, in this process
        debug_launcher(score_with_accelerate, (samples, tmp_path), num_processes=2)
        expected = scores_of(1, samples, evaluator())
        for rank in range(2):
            assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, 1e-12)

    def test_per_pixel_models(self, samples):
        torch.manual_seed(0)
        model = PerPixelForSemanticSegmentation(perpixel_config(id2label=CLASSES)).eval()
        score = evaluator(tasks=["semantic"])
        with torch.no_grad():
            outputs = model(**image_processor()(samples[0]["image"], return_tensors="pt"))
        score.add(score.measure(outputs, [samples[0]["segments"]]))
        assert 0 <= score.compute()["mean_iou"] <= 1
        with pytest.raises(ValueError, match="per-pixel"):
            evaluator(tasks=["panoptic"]).measure(outputs, [samples[0]["segments"]])


class Found:
    """A metric from outside of the package, with nothing of it: found and true segments of an image."""

    reads = "panoptic"

    def __init__(self, id2label: dict[int, str], stuff_ids=(), at_least: int = 1):
        self.id2label, self.at_least, self.measurements = id2label, at_least, []

    def measure(self, found, true) -> torch.Tensor:
        kept = [mask for mask in found.mask_runs if mask.area >= self.at_least]
        return torch.tensor([len(kept), len(true)], dtype=torch.float64)

    def add(self, measurements: torch.Tensor) -> None:
        self.measurements += measurements.view(-1, 2).unbind()

    def compute(self) -> dict[str, float]:
        return {"found": float(sum(one[0] for one in self.measurements)), "images": len(self.measurements)}

    def per_class(self) -> dict[str, dict[str, float]]:
        return {name: {"id": label} for label, name in self.id2label.items()}

    def reset(self) -> None:
        self.measurements = []


class Rows(Found):
    """Of which images differ in size, so that it says how they are joined."""

    def measure(self, found, true) -> torch.Tensor:
        return torch.tensor([[mask.area, 0.0] for mask in found.mask_runs], dtype=torch.float64).view(-1, 2)

    def join(self, measurements) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(measurements, batch_first=True, padding_value=-100.0)

    def add(self, measurements: torch.Tensor) -> None:
        rows = measurements.view(-1, 2)
        super().add(rows[rows[:, 0] != -100.0])


@pytest.fixture
def registered() -> None:
    register_metric("found", Found)
    yield
    METRICS.pop("found")


class TestOwnMetrics:
    def maps(self) -> tuple[list[dict], list[Segments]]:
        ids = torch.tensor([[1, 1, 2], [1, 3, 3]])
        infos = [{"id": i, "label_id": 1} for i in (1, 2, 3)]
        few = {"segmentation": torch.ones(2, 3, dtype=torch.int64), "segments_info": infos[:1]}
        maps = [{"panoptic": {"segmentation": ids, "segments_info": infos}}, {"panoptic": few}]
        return maps, [Segments([1], torch.zeros(2, 3, dtype=torch.int8))] * 2

    @pytest.mark.parametrize("metric", ["found", Found, Found(CLASSES)])
    def test_beside_those_of_a_task(self, registered, metric):
        score = evaluator(tasks=["panoptic"], metrics=[metric])
        maps, true = self.maps()
        score.add(score.measure_maps(maps, true))
        scores = score.compute()
        assert scores["found"] == 4 and scores["images"] == 2 and scores["pq"] > 0
        assert score.per_class()["car"].keys() > {"pq", "id"}
        score.reset()
        assert score.compute()["images"] == 0

    def test_alone_with_an_option_of_its_own(self, registered):
        score = evaluator(tasks=[], metrics=["found"], at_least=2)
        assert list(score.metrics) == ["found"] and list(score.options) == ["panoptic"]
        maps, true = self.maps()
        score.add(score.measure_maps(maps, true))
        assert score.compute() == {"found": 3, "images": 2}

    def test_measurements_of_several_sizes(self):
        score = evaluator(tasks=[], metrics=[Rows])
        maps, true = self.maps()
        measured = score.measure_maps(maps, true)
        assert measured["Rows"].shape == (2, 3, 2)
        score.add(measured)
        assert score.compute()["found"] == 12 and score.compute()["images"] == 4  # areas, rows

    def test_of_a_recipe(self, registered, samples):
        recipe = load_recipe("coco_panoptic_sample", ["evaluation.metrics=[found]"])
        data = SimpleNamespace(id2label=CLASSES, stuff_ids=STUFF)
        assert "found" in build_evaluator(recipe, image_processor(), data).metrics

    def test_faults(self, registered):
        with pytest.raises(
            ValueError, match="metric 'mean_iou' is maskcls_hf.metrics.mean_iou.MeanIoU: take another name"
        ):
            register_metric("mean_iou", Found)
        assert METRICS["mean_iou"] is MeanIoU
        with pytest.raises(ValueError, match="metric nothing: .* has no reads, measure, add"):
            register_metric("nothing", dict[str, int])
        with pytest.raises(ValueError, match="reads must be one of semantic, panoptic, instance, got 'depth'"):
            register_metric("depth", type("Depth", (Found,), {"reads": "depth"}))
        with pytest.raises(ValueError, match="There is no metric 'dice'.*register_metric"):
            evaluator(metrics=["dice"])
        with pytest.raises(TypeError, match="No metric has an option at_most; there are at_least, boundary"):
            evaluator(at_most=3)
        with pytest.raises(ValueError, match="Found has neither scores.sums. nor weighted_scores"):
            evaluator(metrics=["found"], bootstrap=10)


def score_with_accelerate(samples: Samples, folder: Path) -> None:
    accelerator, score = Accelerator(cpu=True), evaluator()
    loader = accelerator.prepare_data_loader(batches(1, samples), device_placement=False)
    with torch.no_grad():
        for batch in loader:
            ground_truth = batch.pop("ground_truth")
            found = score.measure(samples.model(**batch), ground_truth)
            found = accelerator.pad_across_processes(found, dim=1, pad_index=-100)
            score.add(accelerator.gather_for_metrics(found))
    torch.save(score.compute(), folder / f"{accelerator.process_index}.pt")


class TestMeasurements:
    def test_one_row_an_image_whatever_the_size(self, samples):
        score = evaluator()
        (batch,) = batches(5, samples)
        ground_truth = batch.pop("ground_truth")
        with torch.no_grad():
            found = score.measure(samples.model(**batch), ground_truth)
        assert {name: values.shape[0] for name, values in found.items()} == dict.fromkeys(score.metrics, 5)
        one_by_one = evaluator()
        for i in range(5):
            one_by_one.add({name: values[i : i + 1] for name, values in found.items()})
        score.add(found)
        assert_close(score.compute(), one_by_one.compute())

    def test_intervals_hold_the_scores(self, samples):
        score = evaluator(bootstrap=50)
        found = scores_of(1, samples, score)
        for name in ("mean_iou", "pq", "ap", "f1"):
            assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
        score.reset()
        assert all(math.isnan(value) for value in score.compute().values())

    def test_scores_of_each_class(self, samples):
        score = evaluator(boundary=True)
        scores = scores_of(1, samples, score)
        table = score.per_class()
        assert list(table) == list(CLASSES.values())
        assert set(table["car"]) > {"iou", "accuracy", "boundary_iou", "pq", "sq", "rq", "ap", "f1"}
        assert "ap" not in table["sky"]
        assert np.nanmean([row["pq"] for row in table.values()]) == pytest.approx(scores["pq"])

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (partial(evaluator, tasks=["semantics"]), "tasks must be some of"),
            (partial(evaluator, tasks=[]), "tasks must be some of"),
            (partial(Evaluator, None, CLASSES, list(CLASSES), ["instance"]), "no instances"),
            (partial(evaluator, tasks=["panoptic"], boundary=True), "boundary=True is of semantic maps"),
            (partial(evaluator, threshold=1.5), "threshold=1.5 must be from 0 to 1"),
            (partial(evaluator, threshold=float("nan")), "threshold=nan must be"),
            (partial(evaluator, mask_threshold=-0.1), "mask_threshold=-0.1 must be"),
            (partial(evaluator, overlap_threshold=2), "overlap_threshold=2 must be"),
            (partial(evaluator, bootstrap=-1), "bootstrap=-1 must not be negative"),
            (partial(evaluator, max_detections=0), "max_detections=0 must be at least 1"),
        ],
    )
    def test_wrong_arguments(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_as_many_truths_as_images(self, samples):
        with pytest.raises(ValueError, match="zip"):
            evaluator().measure_maps([{}], [])


def test_metrics_come_in_the_order_of_the_tasks_and_average_precision_before_f1():
    evaluator = Evaluator(None, CLASSES, STUFF, TASKS, boundary=True)
    assert list(evaluator.metrics) == ["mean_iou", "boundary_iou", "panoptic_quality", "mask_ap", "instance_f1"]
