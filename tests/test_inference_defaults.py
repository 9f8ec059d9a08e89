"""`inference_defaults`: how a model is run well is saved with its image processor, and used wherever nobody says."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ImageSegmentationPipeline,
    MaskFormerImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    pipeline,
)
from typer.testing import CliRunner

from checkpoints import CLASSES, STUFF, image_processor, maskcls_model, picture, save_maskcls, save_perpixel
from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.cli.main import app
from maskcls_hf.convert.maskformer import processor_to_transformers
from maskcls_hf.inference import Predictor
from maskcls_hf.metrics import Evaluator, Segments
from maskcls_hf.models.inference_defaults import BUILT_IN, merged_defaults
from maskcls_hf.training.build import build_image_processor
from maskcls_hf.training.recipe import load_recipe

HEIGHT, WIDTH = 48, 80
DEFAULTS = {
    "task": "instance",
    "tile": 32,
    "overlap": 0.5,
    "enlarge": 2.0,
    "semantic": {"score_threshold": 0.25},
    "panoptic": {"threshold": 0.0, "overlap_mask_area_threshold": 0.0},
    "instance": {"threshold": 0.0},
}
# transformers' own, which no model of the package is run with where it has saved others
OF_PIPELINE = dict(threshold=0.9, mask_threshold=0.5, overlap_mask_area_threshold=0.5)


def processor_with(**defaults) -> MaskClsImageProcessor:
    processor = image_processor()
    processor.inference_defaults = defaults
    return processor


def read(folder: Path) -> dict:
    return json.loads((folder / "preprocessor_config.json").read_text())


@torch.no_grad()
def outputs():
    return maskcls_model()(**image_processor()(picture(HEIGHT, WIDTH), return_tensors="pt"))


def one_class_outputs(scores: list[float], mask_prob: float = 0.5) -> SimpleNamespace:
    """Of queries of these class probabilities; the first has the left half, the others have `mask_prob` everywhere."""
    logits = torch.tensor(scores).logit()
    masks = torch.full((1, len(scores), 4, 8), mask_prob).logit()
    masks[0, 0, :, :4], masks[0, 0, :, 4:] = 9.0, -9.0
    return SimpleNamespace(
        class_queries_logits=torch.stack([logits, torch.zeros_like(logits)], -1)[None], masks_queries_logits=masks
    )


class TestSaving:
    def test_they_are_saved_and_loaded(self, tmp_path):
        MaskClsImageProcessor(inference_defaults=DEFAULTS).save_pretrained(tmp_path)
        assert read(tmp_path)["inference_defaults"] == DEFAULTS
        assert MaskClsImageProcessor.from_pretrained(tmp_path).inference_defaults == DEFAULTS

    def test_what_says_nothing_is_left_out_and_numbers_are_pythons(self):
        given = {
            "task": None,
            "tile": np.int64(64),
            "panoptic": {"threshold": torch.tensor(0.5), "mask_threshold": None},
        }
        processor = MaskClsImageProcessor(inference_defaults=given)
        assert processor.inference_defaults == {"tile": 64, "panoptic": {"threshold": 0.5}}
        assert type(processor.inference_defaults["tile"]) is int

    def test_processors_share_nothing(self):
        first, second = MaskClsImageProcessor(), MaskClsImageProcessor()
        first.inference_defaults["tile"] = 64
        assert second.inference_defaults == MaskClsImageProcessor().inference_defaults == {}

    @pytest.mark.parametrize(
        ("defaults", "message"),
        [
            ([64], r"must be a dict, got \[64\]"),
            ({"tiles": 64}, "no key 'tiles'.*did you mean 'tile'"),
            ({"task": "panoptics"}, r"\['task'\]='panoptics' must be one of semantic, panoptic, instance"),
            ({"tile": 8}, r"\['tile'\]=8 must be at least 16"),
            ({"tile": 64.5}, r"\['tile'\]=64.5 must be an integer"),
            ({"tile": True}, r"\['tile'\]=True must be an integer"),
            ({"overlap": 0.6}, r"\['overlap'\]=0.6 must be from 0 to 0.5"),
            ({"enlarge": -1}, r"\['enlarge'\]=-1 must be above 0"),
            ({"enlarge": float("nan")}, r"\['enlarge'\]=nan"),
            ({"panoptic": 0.5}, "must be a dict of options of post_process_panoptic_segmentation, got 0.5"),
            ({"panoptic": {"treshold": 0.5}}, "'treshold'.*did you mean 'threshold'"),
            ({"panoptic": {"threshold": 1.5}}, r"\['panoptic'\]\['threshold'\]=1.5 must be from 0 to 1"),
            ({"instance": {"threshold": "0.5"}}, "must be a number"),
            ({"instance": {"overlap_mask_area_threshold": 0.5}}, "'overlap_mask_area_threshold'"),
            ({"semantic": {"target_sizes": [(1, 1)]}}, "no key 'target_sizes'"),
        ],
    )
    def test_what_cannot_be_meant_is_an_error(self, defaults, message, tmp_path):
        with pytest.raises(ValueError, match=f"inference_defaults.*{message}"):
            MaskClsImageProcessor(inference_defaults=defaults)
        MaskClsImageProcessor().save_pretrained(tmp_path)
        path = tmp_path / "preprocessor_config.json"
        path.write_text(json.dumps(read(tmp_path) | {"inference_defaults": defaults}))
        with pytest.raises(ValueError, match=f"inference_defaults.*{message}"):
            MaskClsImageProcessor.from_pretrained(tmp_path)

    def test_files_of_before_keep_the_threshold_of_then(self, tmp_path):
        MaskClsImageProcessor().save_pretrained(tmp_path)
        path = tmp_path / "preprocessor_config.json"
        before = {key: value for key, value in read(tmp_path).items() if key != "inference_defaults"}
        path.write_text(json.dumps(before))
        loaded = MaskClsImageProcessor.from_pretrained(tmp_path)
        assert loaded.inference_defaults == {"panoptic": {"threshold": 0.8}}
        assert loaded.task_options("panoptic")["threshold"] == 0.8
        loaded.save_pretrained(tmp_path)
        assert MaskClsImageProcessor.from_pretrained(tmp_path).inference_defaults == loaded.inference_defaults

    def test_so_do_those_of_transformers_and_new_ones_have_its_threshold(self, tmp_path):
        MaskFormerImageProcessor().save_pretrained(tmp_path)
        assert MaskClsImageProcessor.from_pretrained(tmp_path).task_options("panoptic")["threshold"] == 0.8
        assert MaskClsImageProcessor().task_options("panoptic")["threshold"] == 0.5

    def test_transformers_cannot_keep_them_and_that_is_said(self, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        with caplog.at_level(logging.WARNING):
            processor_to_transformers(processor_with(tile=64))
        assert "does not keep inference_defaults" in caplog.text and "{'tile': 64}" in caplog.text
        caplog.clear()
        processor_to_transformers(MaskClsImageProcessor())
        assert "inference_defaults" not in caplog.text


class TestPostProcessing:
    @pytest.mark.parametrize("task", ["panoptic", "instance"])
    def test_given_counts_more_than_saved_and_saved_more_than_built_in(self, task):
        def found(processor, **options):
            result = getattr(processor, f"post_process_{task}_segmentation")(outputs(), **options)[0]
            return [info["score"] for info in result["segments_info"]]

        saved = processor_with(**{task: {"threshold": 0.0, "mask_threshold": 0.3}})
        explicit = found(image_processor(), threshold=0.0, mask_threshold=0.3)
        built_in = found(image_processor(), **BUILT_IN[task] if task == "panoptic" else {"threshold": 0.5})
        assert found(saved) == explicit != built_in
        assert found(image_processor()) == built_in
        assert found(saved, **{"threshold": 0.5, "mask_threshold": 0.5}) == built_in

    def test_values_of_a_pipeline_that_knows_nothing_count_as_not_given(self):
        """As where the code comes with the model, and the package is not installed."""
        pipe = ImageSegmentationPipeline(maskcls_model(), image_processor=processor_with(**DEFAULTS), device="cpu")
        found = [segment["score"] for segment in pipe(picture(HEIGHT, WIDTH), subtask="panoptic")]
        expected = image_processor().post_process_panoptic_segmentation(outputs(), **DEFAULTS["panoptic"])[0]
        assert found == pytest.approx([info["score"] for info in expected["segments_info"]])
        taken = image_processor().post_process_panoptic_segmentation(outputs(), **OF_PIPELINE)[0]["segments_info"]
        assert len(found) > len(taken)
        given = pipe(picture(HEIGHT, WIDTH), subtask="panoptic", threshold=0.999)
        assert 0 < len(given) < len(found) and all(segment["score"] > 0.999 for segment in given)


class TestOneClass:
    """K = 1: the class with the highest score would fill every map."""

    def test_a_pixel_is_of_the_class_where_its_score_is_above_a_half(self):
        (class_map,) = MaskClsImageProcessor().post_process_semantic_segmentation(one_class_outputs([0.9]))
        assert class_map.dtype == torch.int64 and class_map.shape == (4, 8)
        assert (class_map[:, :3] == 0).all() and (class_map[:, 5:] == -1).all()

    def test_the_map_of_the_paper_by_option(self):
        options = {"score_threshold": 0.0, "return_segmentation_scores": True}
        post_process = MaskClsImageProcessor().post_process_semantic_segmentation
        (found,) = post_process(one_class_outputs([0.9]), **options)
        assert (found.segmentation == 0).all() and found.segmentation_scores.min() < 0.01
        assert (post_process(one_class_outputs([0.9]), score_threshold=1)[0] == -1).all()

    def test_with_several_classes_each_pixel_has_one_unless_a_threshold_says_so(self):
        scores = image_processor().post_process_semantic_segmentation(outputs(), return_segmentation_scores=True)[0]
        highest = scores.segmentation_scores.amax(0)
        (plain,) = image_processor().post_process_semantic_segmentation(outputs())
        torch.testing.assert_close(plain, scores.segmentation)
        least = float(highest.median())
        (found,) = processor_with(semantic={"score_threshold": least}).post_process_semantic_segmentation(outputs())
        torch.testing.assert_close(found, plain.where(highest > least, -1))
        assert 0 < (found == -1).float().mean() < 1

    @pytest.mark.parametrize("options", [{}, {"tile": 32}, {"flip": True}])
    def test_predictor(self, options):
        predictor = Predictor(maskcls_model(), processor_with(semantic={"score_threshold": 0.8}), **options)
        found = predictor(picture(HEIGHT, WIDTH), "semantic")
        without = predictor(picture(HEIGHT, WIDTH), "semantic", score_threshold=0.0)
        none = found["segmentation"] == -1
        assert 0 < none.float().mean() < 1 and (without["segmentation"] >= 0).all()
        torch.testing.assert_close(found["segmentation"], without["segmentation"].where(~none, -1))
        assert sum(info["area"] for info in found["segments_info"]) == int((~none).sum())
        assert all(info["area"] == int((found["segmentation"] == info["id"]).sum()) for info in found["segments_info"])

    def test_pixels_of_no_class_count_as_missed(self):
        evaluator = Evaluator(MaskClsImageProcessor(), {0: "cell"}, tasks=("semantic",))
        truth = torch.tensor([[0] * 4 + [255] * 4] * 4)
        found = MaskClsImageProcessor().post_process_semantic_segmentation(one_class_outputs([0.9]))[0]
        evaluator.add(evaluator.measure_maps([{"semantic": found}], [Segments.from_class_map(truth, 255)]))
        assert 0.7 < evaluator.compute()["mean_iou"] <= 1


class TestPredictor:
    def test_what_is_saved_is_used(self):
        predictor = Predictor(maskcls_model(), processor_with(**DEFAULTS))
        settings = (predictor.task, predictor.tile, predictor.overlap, predictor.enlarge)
        assert settings == ("instance", 32, 0.5, 2.0)
        image = picture(HEIGHT, WIDTH)
        found = predictor(image)
        expected = Predictor(maskcls_model(), image_processor(), tile=32, overlap=0.5, enlarge=2.0)(
            image, "instance", **DEFAULTS["instance"]
        )
        assert found["segments_info"] == expected["segments_info"] and len(found["masks"]) > 1
        torch.testing.assert_close(found["segmentation"], expected["segmentation"])

    def test_what_is_given_counts_more(self):
        predictor = Predictor(
            maskcls_model(), processor_with(**DEFAULTS), task="semantic", tile=0, overlap=0.1, enlarge=0
        )
        settings = (predictor.task, predictor.tile, predictor.overlap, predictor.enlarge)
        assert settings == ("semantic", None, 0.1, None)
        found = predictor(picture(HEIGHT, WIDTH), "panoptic", threshold=0.5, overlap_mask_area_threshold=0.8)
        expected = image_processor().post_process_panoptic_segmentation(outputs(), 0.5, 0.5, 0.8)[0]
        assert found["segments_info"] == expected["segments_info"]

    def test_tasks_where_nobody_says(self, tmp_path):
        assert Predictor(maskcls_model(), image_processor()).task == "panoptic"
        assert Predictor(maskcls_model(), processor_with(task="instance"), flip=True).task == "semantic"
        per_pixel = Predictor.from_pretrained(save_perpixel(tmp_path))
        assert per_pixel.task == "semantic" and (per_pixel(picture())["segmentation"] >= 0).all()
        stuff = processor_with(task="instance")
        stuff.num_labels, stuff.label_ids_to_fuse = 5, list(CLASSES)  # fine-tuned on maps of classes
        assert Predictor(maskcls_model(), stuff).task == "panoptic"
        with pytest.raises(ValueError, match="task must be one of"):
            Predictor(maskcls_model(), image_processor(), task="panoptics")


class TestPipeline:
    @pytest.fixture(scope="class")
    def pipe(self):
        def make(**defaults):
            return pipeline(
                "image-segmentation", model=maskcls_model(), image_processor=processor_with(**defaults), device="cpu"
            )

        return make

    def scores(self, pipe, **options):
        return [segment["score"] for segment in pipe(picture(HEIGHT, WIDTH), **options)]

    def test_saved_thresholds_and_task(self, pipe):
        found = self.scores(pipe(task="instance", instance={"threshold": 0.3}))
        expected = image_processor().post_process_instance_segmentation(outputs(), 0.3)[0]
        assert found == pytest.approx([info["score"] for info in expected["segments_info"]]) and len(found) > 1
        assert self.scores(pipe(task="semantic")) == [None] * len(self.scores(pipe(), subtask="semantic"))

    def test_given_values_count_more_those_of_transformers_too(self, pipe):
        saved = pipe(panoptic={"threshold": 0.0, "overlap_mask_area_threshold": 0.0})
        expected = image_processor().post_process_panoptic_segmentation(outputs(), **OF_PIPELINE)[0]
        found = self.scores(saved, subtask="panoptic", **OF_PIPELINE)
        assert found == pytest.approx([info["score"] for info in expected["segments_info"]])
        assert len(found) < len(self.scores(saved, subtask="panoptic"))

    @pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
    def test_tiles(self, pipe, task):
        defaults = DEFAULTS | {"task": task}
        found = pipe(**defaults)(picture(HEIGHT, WIDTH))
        expected = Predictor(maskcls_model(), processor_with(**defaults))(picture(HEIGHT, WIDTH))
        assert [segment["label"] for segment in found] == [CLASSES[i["label_id"]] for i in expected["segments_info"]]
        for segment, info in zip(found, expected["segments_info"], strict=True):
            np.testing.assert_array_equal(np.asarray(segment["mask"]) > 0, expected["segmentation"] == info["id"])

    def test_tiles_of_batches_and_given_options(self, pipe):
        images = [picture(HEIGHT, WIDTH), picture(64, 48), picture(40, 40)]
        tiled = pipe(**DEFAULTS)
        one_by_one = [tiled(image, subtask="panoptic", threshold=0.6) for image in images]
        batched = tiled(images, batch_size=2, subtask="panoptic", threshold=0.6)
        assert [[s["score"] for s in found] for found in batched] == [[s["score"] for s in f] for f in one_by_one]
        assert all(segment["score"] > 0.6 for found in batched for segment in found)
        assert [np.asarray(found[0]["mask"]).shape for found in batched] == [image.size[::-1] for image in images]

    def test_other_models_are_as_they_were(self):
        config = SegformerConfig(
            depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=3
        )
        parts = dict(
            model=SegformerForSemanticSegmentation(config).eval(),
            image_processor=SegformerImageProcessor(size={"height": 32, "width": 32}),
        )
        ours = pipeline("image-segmentation", **parts, device="cpu")(picture())
        theirs = ImageSegmentationPipeline(**parts, device="cpu")(picture())
        assert [s["label"] for s in ours] == [s["label"] for s in theirs]
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(one["mask"]), np.asarray(other["mask"]))


class TestCommands:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        folder = save_maskcls(tmp_path_factory.mktemp("model"))
        processor_with(**DEFAULTS).save_pretrained(folder)
        return folder

    def run(self, *arguments) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    def segment(self, folder, out, *options) -> dict:
        picture(HEIGHT, WIDTH).save(out / "a.png")
        self.run("segment", out / "a.png", "-m", folder, "-o", out / "found", "--device", "cpu", *options)
        (path,) = (out / "found").glob("*.json")
        return {"task": path.stem, **json.loads(path.read_text())}

    def test_segment(self, folder, tmp_path):
        found = self.segment(folder, tmp_path)
        expected = Predictor(maskcls_model(), processor_with(**DEFAULTS))(picture(HEIGHT, WIDTH))
        assert found["task"] == "instance"
        assert [a["score"] for a in found["annotations"]] == pytest.approx(
            [i["score"] for i in expected["segments_info"]]
        )

    def test_segment_with_options(self, folder, tmp_path):
        options = ("--task", "panoptic", "--threshold", 0.5, "--overlap-threshold", 0.8, "--tile", 0, "--enlarge", 0)
        found = self.segment(folder, tmp_path, *options)
        expected = image_processor().post_process_panoptic_segmentation(outputs(), 0.5, 0.5, 0.8)[0]["segments_info"]
        assert found["task"] == "panoptic"
        assert [s["area"] for s in found["annotations"][0]["segments_info"]] == [info["area"] for info in expected]

    def test_a_tile_that_is_none(self, folder, tmp_path):
        result = CliRunner().invoke(app, ["segment", "a.png", "-m", str(folder), "-o", str(tmp_path), "--tile", "8"])
        assert result.exit_code == 2 and "at least 16 pixels, or 0" in " ".join(result.output.split())

    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory) -> Path:
        root = tmp_path_factory.mktemp("data")
        (root / "labels.json").write_text(json.dumps(dict(enumerate(CLASSES.values()))))
        for name in ("images", "labels"):
            (root / "val" / name).mkdir(parents=True)
        picture(HEIGHT, WIDTH).save(root / "val" / "images" / "a.png")
        labels = image_processor().post_process_semantic_segmentation(outputs())[0].numpy().astype(np.uint8)
        Image.fromarray(labels).save(root / "val" / "labels" / "a.png")
        return root

    def evaluate(self, folder, data, path, *options) -> tuple[dict, str]:
        output = self.run("evaluate", "-m", folder, "-d", data, "--json", path, "--device", "cpu", *options)
        return json.loads(path.read_text()), " ".join(output.split())

    def test_evaluate_says_what_it_used(self, folder, data, tmp_path):
        tasks = ("-t", "semantic", "-t", "panoptic")
        written, output = self.evaluate(folder, data, tmp_path / "scores.json", *tasks)
        used = dict(tile=32, overlap=0.5, enlarge=2.0, threshold=0.0, mask_threshold=0.5, overlap_threshold=0.0)
        assert used.items() <= written["settings"].items()
        assert "tile 32, overlap 0.5, enlarge 2" in output and "threshold 0, " in output
        given = ("--tile", 0, "--enlarge", 0, "--threshold", 0.6, "--overlap-threshold", 0.7)
        written, output = self.evaluate(folder, data, tmp_path / "scores.json", *tasks, *given)
        used = dict(tile=None, enlarge=None, threshold=0.6, mask_threshold=0.5, overlap_threshold=0.7)
        assert used.items() <= written["settings"].items()
        assert "threshold 0.6" in output and "tile" not in output.split("Settings")[1]

    def test_scores_are_those_of_the_saved_settings(self, folder, data, tmp_path):
        written, _ = self.evaluate(folder, data, tmp_path / "a.json")
        given = ("--tile", 32, "--overlap", 0.5, "--enlarge", 2)
        save_maskcls(tmp_path / "plain")
        plain = processor_with(semantic=DEFAULTS["semantic"])
        plain.save_pretrained(tmp_path / "plain")
        expected, _ = self.evaluate(tmp_path / "plain", data, tmp_path / "b.json", *given)
        assert written["scores"] == expected["scores"]
        whole, _ = self.evaluate(tmp_path / "plain", data, tmp_path / "c.json")
        assert whole["scores"] != expected["scores"]


class TestTraining:
    def test_later_layers_count_more(self):
        first = {"task": "panoptic", "tile": 64, "panoptic": {"threshold": 0.8, "mask_threshold": 0.4}}
        second = {"task": None, "tile": 0, "panoptic": {"threshold": 0.5, "mask_threshold": None}}
        expected = {"task": "panoptic", "tile": 0, "panoptic": {"threshold": 0.5, "mask_threshold": 0.4}}
        assert merged_defaults(first, second, {"instance": {"threshold": None}}) == expected
        assert first["panoptic"]["threshold"] == 0.8

    def test_fine_tuning_keeps_them_and_recipe_and_data_say_more(self, tmp_path):
        processor_with(**DEFAULTS).save_pretrained(tmp_path)
        overrides = ["evaluation.threshold=0.4", "image_processor.inference_defaults={tile: 64}"]
        recipe = load_recipe("camvid", overrides)
        defaults = build_image_processor(recipe, tmp_path, "panoptic", label_ids_to_fuse=STUFF).inference_defaults
        panoptic = {"threshold": 0.4, "overlap_mask_area_threshold": 0.0}
        assert defaults == DEFAULTS | {"task": "panoptic", "tile": 64, "panoptic": panoptic}
        assert build_image_processor(load_recipe("camvid"), None, "semantic").inference_defaults == {"task": "semantic"}

    def test_a_recipe_says_the_task_too(self):
        recipe = load_recipe("camvid", ["image_processor.inference_defaults={task: panoptic}"])
        assert build_image_processor(recipe, None, "semantic").inference_defaults == {"task": "panoptic"}

    def test_what_a_recipe_cannot_mean(self):
        recipe = load_recipe("camvid", ["image_processor.inference_defaults={tile: 3}"])
        with pytest.raises(ValueError, match=r"image_processor: inference_defaults\['tile'\]=3"):
            build_image_processor(recipe)
