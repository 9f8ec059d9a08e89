"""Recipes: reading, checking, building what they say, and training by them with both scripts and the command."""

from __future__ import annotations

import gc
import json
import logging
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, SwinForImageClassification
from typer.testing import CliRunner

from maskcls_hf import MaskClsForUniversalSegmentation, PerPixelForSemanticSegmentation
from maskcls_hf.cli.main import app
from maskcls_hf.training import Recipe, list_recipes, load_recipe, prepare, run_data
from maskcls_hf.training.build import build_config, build_image_processor, build_model, load_backbone
from maskcls_hf.training.checkpoints import list_checkpoints
from maskcls_hf.training.processes import warn_if_not_sharded
from maskcls_hf.training.run_data import WholeSteps
from per_pixel_models import segformer
from recipes import BACKBONE, write_recipe, write_squares
from test_data import write_semantic
from tiny import maskcls_config, swin

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import train_accelerate
import train_trainer

CLASSES = {0: "background", 1: "square"}


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"))


class TestReading:
    def test_defaults_and_values(self, tmp_path):
        recipe = load_recipe(write_recipe(tmp_path))
        assert recipe.name == "tiny"
        assert recipe.training.batch_size == 2 and recipe.training.seed == 0
        assert recipe.model.config["num_queries"] == 8 and recipe.model.backbone_checkpoint is None

    def test_a_base_gives_what_the_file_does_not_say(self, tmp_path):
        write_recipe(tmp_path, paper={"mean_iou": 44.5})
        child = tmp_path / "child.yaml"
        child.write_text(
            "base: tiny\nmodel: {backbone_config: {depths: [2, 2], layer_type: null}, num_queries: 9}\n"
            "evaluation: {every_steps: null}\n"
        )
        recipe, base = load_recipe(child), load_recipe(tmp_path / "tiny.yaml")
        expected = {**BACKBONE, "depths": [2, 2]}
        del expected["layer_type"]
        assert recipe.model.config["backbone_config"] == expected
        assert recipe.model.config["num_queries"] == 9
        assert recipe.evaluation.every_steps is None and recipe.evaluation.tasks == base.evaluation.tasks
        assert base.paper == {"mean_iou": 44.5} and recipe.paper == {}
        assert recipe.optimizer == base.optimizer

    def test_another_type_of_backbone_replaces_it(self, tmp_path):
        write_recipe(tmp_path)
        (tmp_path / "child.yaml").write_text("base: tiny.yaml\nmodel: {backbone_config: {model_type: swin}}\n")
        assert load_recipe(tmp_path / "child.yaml").model.config["backbone_config"] == {"model_type": "swin"}

    def test_a_base_of_the_package(self, tmp_path):
        (tmp_path / "mine.yaml").write_text("base: ade20k_r50\nschedule: {max_steps: 10}\n")
        recipe = load_recipe(tmp_path / "mine.yaml")
        assert recipe.schedule.max_steps == 10
        assert recipe.augmentation == load_recipe("ade20k_r50").augmentation

    def test_overrides(self, tmp_path):
        recipe = load_recipe(
            write_recipe(tmp_path),
            [
                "optimizer.learning_rate=1e-5",
                "optimizer.clip_norm=null",
                "model.backbone_config.depths=[1, 2]",
                "evaluation.tasks=[semantic]",
                "evaluation.multi_scale.short_edges=[32, 64]",
            ],
        )
        assert recipe.optimizer.learning_rate == 1e-5 and recipe.optimizer.clip_norm is None
        assert recipe.model.config["backbone_config"] == {**BACKBONE, "depths": [1, 2]}
        assert recipe.evaluation.tasks == ["semantic"]
        assert recipe.evaluation.multi_scale.short_edges == [32, 64]

    @pytest.mark.parametrize("name", ["ade20k_r50", "coco_panoptic_swin_tiny"])
    def test_a_saved_recipe_is_the_same(self, tmp_path, name):
        recipe = load_recipe(name)
        recipe.save(tmp_path / f"{name}.yaml")
        assert load_recipe(tmp_path / f"{name}.yaml") == recipe

    def test_differences(self, tmp_path):
        path = write_recipe(tmp_path)
        other = load_recipe(path, ["training.seed=3", "model.dropout=0"])
        assert load_recipe(path).differences(other) == ["model.dropout", "training.seed"]

    def test_those_of_the_package_are_listed_with_their_first_line(self):
        recipes = list_recipes()
        assert "44.5" in recipes["ade20k_r50"] and "#" not in recipes["ade20k_r50"]

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("optimizer.lr=1", r"--set optimizer.lr=1: unknown key optimizer.lr; optimizer has backbone_multiplier,"),
            ("training.bach_size=1", r"did you mean batch_size\?"),
            ("optimiser.clip_norm=1", "unknown section 'optimiser'; there are base, paper, data"),
            ("model.num_querys=3", r"did you mean num_queries\?"),
            ("model.transformer_module=true", "unknown key model.transformer_module"),
            ("augmentation.crop=3", r"did you mean crop_size\?"),
            ("image_processor.sice=3", r"did you mean size\?"),
            ("optimizer.learning_rate=fast", "optimizer.learning_rate is 'fast', must be a number"),
            ("optimizer.betas=[1]", "must be a list of 2, each a number"),
            ("training.batch_size=2.5", "must be an integer"),
            ("training.batch_size=true", "is True, must be an integer"),
            ("training.gradient_checkpointing=1", "must be true or false"),
            ("training.precision=half", "must be 'float32' or 'bf16' or 'fp16'"),
            ("evaluation.tasks=[boxes]", r"evaluation.tasks\[0\] is 'boxes', must be 'semantic' or"),
            ("evaluation.multi_scale.flop=3", r"did you mean flip\?"),
            ("training.batch_size=0", "tiny.yaml --set training.batch_size=0: training.batch_size=0 must be above 0"),
            ("training.ema_decay=1", "between 0 and 1"),
            ("schedule.kind=multistep", "milestones"),
            ("model.num_queries.x=3", "model.num_queries is 8, which has no keys"),
            ("model.dropout=[", "not a value in YAML"),
            ("dropout", "must be section.key=value"),
        ],
    )
    def test_a_wrong_override_is_named(self, tmp_path, override, message):
        with pytest.raises(ValueError, match=message):
            load_recipe(write_recipe(tmp_path), [override])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("optimizer: {lr: 1}", "wrong.yaml: unknown key optimizer.lr"),
            ("optimizer: 3", "wrong.yaml: optimizer must hold keys and values, got 3"),
            ("optimizer: {", "wrong.yaml is not valid YAML"),
            ("- optimizer", "must hold sections"),
            ("base: [x]", "base must be the name of a recipe"),
            ("base: wrong", r"its own base \(wrong -> wrong\)"),
        ],
    )
    def test_a_wrong_file_is_named(self, tmp_path, text, message):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / "wrong.yaml")

    def test_unknown_recipes(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"No recipe 'ade20k_r5'. Did you mean ade20k_r50\?"):
            load_recipe("ade20k_r5")
        with pytest.raises(FileNotFoundError, match="No recipe file absent.yaml"):
            load_recipe("absent.yaml")
        (tmp_path / "mine.yaml").write_text("base: absent\n")
        with pytest.raises(FileNotFoundError, match=r"mine.yaml: base: No recipe 'absent'"):
            load_recipe(tmp_path / "mine.yaml")


class TestBackbone:
    def recipe(self, tmp_path: Path, **fields) -> Recipe:
        return load_recipe(write_recipe(tmp_path, model={"backbone_checkpoint": str(tmp_path / "resnet"), **fields}))

    def classifier(self, folder: Path, **fields) -> ResNetForImageClassification:
        fields = {
            name: value for name, value in BACKBONE.items() if name not in ("model_type", "out_features")
        } | fields
        model = ResNetForImageClassification(ResNetConfig(**fields))
        model.save_pretrained(folder)
        return model

    def test_weights_of_a_classifier(self, tmp_path):
        classifier = self.classifier(tmp_path / "resnet")
        model = build_model(self.recipe(tmp_path), CLASSES)
        loaded = dict(model.model.backbone.named_parameters())
        assert len(loaded) > 10
        for name, parameter in loaded.items():
            assert torch.equal(parameter, classifier.resnet.get_parameter(name)), name

    def test_weights_of_a_swin(self, tmp_path):
        config = swin()
        classifier = SwinForImageClassification(config)
        classifier.save_pretrained(tmp_path)
        model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=swin()))
        load_backbone(model, str(tmp_path))
        name = "encoder.layers.2.blocks.1.attention.q_proj.weight"
        assert torch.equal(model.model.backbone.swin.get_parameter(name), classifier.swin.get_parameter(name))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"depths": [1, 2]}, "another architecture than model.backbone_config says"),
            ({"depths": [2, 1]}, "such as resnet.encoder.stages.0.layers.1"),
            ({"hidden_sizes": [8, 24]}, "do not have the sizes"),
        ],
    )
    def test_another_architecture_is_refused(self, tmp_path, fields, message):
        self.classifier(tmp_path / "resnet", **fields)
        with pytest.raises(ValueError, match=message + r"(.|\n)*--set model.backbone_checkpoint=null"):
            build_model(self.recipe(tmp_path), CLASSES)

    def test_another_type_is_refused(self, tmp_path):
        self.classifier(tmp_path / "resnet")
        model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=swin()))
        with pytest.raises(ValueError, match="holds a resnet, model.backbone_config a swin"):
            load_backbone(model, str(tmp_path / "resnet"))

    def test_an_absent_one_says_how_to_do_without(self, tmp_path):
        with pytest.raises(OSError, match="--set model.backbone_checkpoint=null"):
            build_model(self.recipe(tmp_path), CLASSES)


class TestPrepare:
    def test_fixed_matching_has_a_query_for_each_class(self, tmp_path, squares):
        overrides = ["model.matching=fixed", "model.num_queries=num_labels"]
        run = prepare(load_recipe(write_recipe(tmp_path), overrides), squares)
        assert run.model.config.num_queries == 2

    def test_a_recipe_becomes_per_pixel(self, tmp_path):
        overrides = ["model.kind=per_pixel", "model.transformer_module=true", "evaluation.tasks=[semantic]"]
        data = write_semantic(write_semantic(tmp_path / "halves", ((32, 40), (40, 32))), split="val")
        path = write_recipe(tmp_path, model={"no_object_weight": 0.2})
        run = prepare(load_recipe(path, overrides), data)
        assert isinstance(run.model, PerPixelForSemanticSegmentation) and run.model.config.num_queries == 2
        assert run.image_processor.label_format == "semantic"
        assert next(iter(run.loaders()[0]))["labels"].shape == (2, 32, 32)

    @pytest.mark.parametrize(("classes", "ignored"), [(255, 255), (256, 65535)])
    def test_a_per_pixel_model_ignores_the_void_value_of_the_data(self, tmp_path, classes, ignored):
        recipe = load_recipe(write_recipe(tmp_path), ["model.kind=per_pixel"])
        assert build_config(recipe, {i: str(i) for i in range(classes)}).semantic_loss_ignore_index == ignored

    def test_fine_tuning_keeps_classes_of_the_same_name(self, tmp_path, squares):
        saved = MaskClsForUniversalSegmentation(maskcls_config(id2label={0: "square", 1: "circle"}, dropout=0.1))
        saved.save_pretrained(tmp_path / "saved")
        overrides = ["model.dropout=0", "model.freeze_batch_norm=true"]
        run = prepare(load_recipe(write_recipe(tmp_path), overrides), squares, model=tmp_path / "saved")
        predictor = run.model.segmentation_module.class_predictor
        assert torch.equal(predictor.weight[1], saved.segmentation_module.class_predictor.weight[0])
        assert run.model.config.id2label == CLASSES
        assert run.model.config.dropout == 0 and run.model.config.freeze_batch_norm
        assert run.model.config.num_queries == 7, "the saved model's, not the recipe's"
        norm = next(m for m in run.model.model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
        assert not norm.weight.requires_grad

    def test_a_network_is_trained_as_it_is(self, tmp_path, squares):
        network = MaskClsForUniversalSegmentation(maskcls_config(num_labels=2))
        before = network.segmentation_module.class_predictor.weight.clone()
        run = prepare(load_recipe(write_recipe(tmp_path)), squares, model=network)
        assert run.model is network and torch.equal(network.segmentation_module.class_predictor.weight, before)
        trained = {id(weights) for group in run.optimizer.param_groups for weights in group["params"]}
        assert trained == {id(weights) for weights in network.parameters()}

    def test_fine_tuning_with_losses_that_the_saved_model_had_not(self, tmp_path, squares):
        saved = MaskClsForUniversalSegmentation(maskcls_config(id2label=CLASSES))
        saved.save_pretrained(tmp_path / "saved")
        overrides = ["model.semantic_weight=0.5", "model.mask_id_weight=0.3"]
        run = prepare(load_recipe(write_recipe(tmp_path), overrides), squares, model=tmp_path / "saved")
        terms = run.model(**next(iter(run.loaders()[0]))).loss_dict
        assert {"loss_semantic", "loss_mask_id"} <= terms.keys() and "loss_pq" not in terms
        assert all(term.isfinite() for term in terms.values())

    def test_a_saved_image_processor_holds_where_the_recipe_says_nothing(self, tmp_path):
        recipe = load_recipe(write_recipe(tmp_path))
        build_image_processor(recipe, num_labels=3, do_autocontrast=True).save_pretrained(tmp_path)
        processor = build_image_processor(recipe, tmp_path, num_labels=2)
        assert processor.do_autocontrast and not processor.do_resize and processor.num_labels == 2

    def test_evaluation_of_the_middle(self, tmp_path, squares):
        run = prepare(load_recipe(write_recipe(tmp_path), ["evaluation.crop=20"]), squares)
        batch = next(iter(run.loaders()[1]))
        assert batch["ground_truth"][0].size == (20, 20)

    def test_settings_reach_their_places(self, tmp_path, squares):
        overrides = ["training.gradient_checkpointing=true", "sampling.by_area=24", "optimizer.backbone_multiplier=0.1"]
        run = prepare(load_recipe(write_recipe(tmp_path), overrides), squares, processes=1, accumulate=2)
        assert run.batch_size == 1 and run.accumulate == 2
        assert len(run.sampler) == 5 * 4  # 48 x 48 pixels hold 4 squares of 24 x 24
        assert run.model.model.transformer_decoder.layers[0].gradient_checkpointing
        assert {group["initial_lr"] for group in run.optimizer.param_groups} == {1e-3, 1e-4}
        assert run.model.model.pixel_decoder.mask_projection.weight.is_contiguous(memory_format=torch.channels_last)

    def test_layout_that_upsets_onednn_is_not_used(self, tmp_path, squares):
        sizes = ["model.backbone_config.embedding_size=8", "model.backbone_config.hidden_sizes=[8,16]"]
        run = prepare(load_recipe(write_recipe(tmp_path), sizes), squares, processes=1)
        assert run.model.model.pixel_decoder.mask_projection.weight.is_contiguous()

    @pytest.mark.parametrize(
        ("overrides", "options", "message"),
        [
            ((), {"accumulate": 3}, "must be divisible by 1 processes x 3"),
            (("training.batch_size=6",), {}, "5 images for training are less than one step"),
            (("data.train_split=absent",), {}, "absent"),
            (("data.options={depth: 3}",), {}, "data.options: .*depth"),
            (("data.layout=box",), {}, "layout='box'"),
            (("model.kind=per_pixel",), {}, r"evaluation.tasks=\[semantic\]"),
            (("model.hidden_size=33",), {}, "Recipe tiny, section model: .*hidden_size=33"),
            (("image_processor.size_divisor=-1",), {}, "size_divisor"),
            (("augmentation.scale=[0, 0]",), {}, "section augmentation: "),
            ((), {"model": "absent"}, "No saved model in absent"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, squares, overrides, options, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run = prepare(load_recipe(write_recipe(tmp_path), overrides), squares, **options)
            next(iter(run.loaders()[0]))

    def test_fsdp_that_became_ddp_is_said(self, monkeypatch, caplog):
        accelerator = Accelerator(cpu=True)
        warn_if_not_sharded(accelerator)
        assert not caplog.text
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        warn_if_not_sharded(accelerator)
        assert "FSDP was asked for, but Accelerate has none here (cpu" in caplog.text

    def test_averages_and_fsdp(self, tmp_path, squares, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match="training.ema_decay=null"):
            prepare(load_recipe(write_recipe(tmp_path)), squares)


def test_epochs_end_with_a_whole_step():
    sampler = WholeSteps(11, seed=0, images_a_step=4)
    first = list(sampler)
    assert len(first) == len(sampler) == 8 and len(set(first)) == 8
    sampler.set_epoch(1)
    second = list(sampler)
    assert {epoch for epoch, _ in second} == {1}
    assert {index for _, index in first} != {index for _, index in second}


def arguments(recipe: Path, data: Path, out: Path, *options: str) -> list[str]:
    return [f"--recipe={recipe}", f"--data={data}", f"--out={out}", *options]


def logged(folder: Path) -> list[dict[str, float]]:
    """Entries of losses and scores in the log, without speed."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    speed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return [{k: v for k, v in entry.items() if k not in speed} for entry in entries if "train_loss" not in entry]


def same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == pytest.approx(other[name], rel=1e-12, nan_ok=True), (name, one["step"])


class TestScripts:
    @pytest.mark.parametrize(
        "options", [(), ("--accumulate=2", "--set=training.workers=1")], ids=["plain", "accumulate"]
    )
    def test_both_give_the_same_losses_scores_and_weights(self, tmp_path, squares, options):
        recipe = write_recipe(tmp_path)
        for script, out in ((train_trainer, "trainer"), (train_accelerate, "loop")):
            script.main(arguments(recipe, squares, tmp_path / out, *options))
        first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("trainer", "loop"))
        assert first.keys() == second.keys()
        for name, weight in first.items():
            assert torch.equal(weight, second[name]), name
        same(logged(tmp_path / "trainer"), logged(tmp_path / "loop"))
        results = [json.loads((tmp_path / out / "eval_results.json").read_text()) for out in ("trainer", "loop")]
        same(results[:1], results[1:])
        assert {"eval_loss", "eval_mean_iou", "eval_pq", "eval_ap"} <= results[0].keys()

    @pytest.mark.parametrize("script", [train_trainer, train_accelerate])
    def test_files_and_resume(self, tmp_path, squares, script, capfd):
        recipe, out = write_recipe(tmp_path), tmp_path / "out"
        scores = script.main(arguments(recipe, squares, out, "--tensorboard"))
        assert [path.name for path in list_checkpoints(out)] == ["checkpoint-4", "checkpoint-6"]
        assert list((out / "runs").rglob("events.out.tfevents.*"))
        assert load_recipe(out / "recipe.yaml").differences(load_recipe(recipe)) == []
        assert AutoImageProcessor.from_pretrained(out).num_labels == 2
        weights = load_file(out / "model.safetensors")
        assert (out / "modeling_maskcls.py").is_file()

        shutil.rmtree(out / "checkpoint-6")
        log = logged(out)
        assert script.main(arguments(recipe, squares, out, "--resume")).keys() == scores.keys()
        for name, weight in load_file(out / "model.safetensors").items():
            assert torch.equal(weight, weights[name]), name
        same(logged(out), log)

        with pytest.raises(SystemExit, match="holds checkpoints of a training: resume it"):
            script.main(arguments(recipe, squares, out))

    @pytest.mark.parametrize("script", [train_trainer, train_accelerate])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--recipe=absent"], "No recipe 'absent'"),
            (["--data=absent"], "absent"),
            (["--resume"], "There is no checkpoint in"),
            (["--model=absent"], "No saved model in absent"),
            (["--set", "model.foo=1"], "unknown key model.foo"),
        ],
    )
    def test_bad_arguments_end_with_a_sentence(self, tmp_path, squares, script, options, message):
        with pytest.raises(SystemExit, match=message):
            script.main(arguments(write_recipe(tmp_path), squares, tmp_path / "out", *options))

    @pytest.mark.parametrize(
        ("script", "split", "workers"),
        [
            (train_trainer, "train", 1),
            (train_trainer, "val", 0),
            (train_accelerate, "train", 0),
            (train_accelerate, "val", 1),
        ],
    )
    def test_bad_data_end_with_a_sentence(self, tmp_path, script, split, workers):
        """The one line names the file, also from a loader worker, and never a step for what is in the evaluation."""
        data = write_squares(tmp_path / "data")
        pixels = np.zeros((48, 48), dtype=np.float32)
        pixels[3, 3] = np.nan
        for path in (data / split / "images").glob("*.png"):
            path.unlink()
            tifffile.imwrite(path.with_suffix(".tif"), pixels)
        recipe = write_recipe(tmp_path, schedule={"max_steps": 1}, training={"workers": workers})
        with pytest.raises(SystemExit) as stop:
            script.main(arguments(recipe, data, tmp_path / "out"))
        for batches in gc.get_objects():  # else Python's cleaning up waits seconds for the workers
            if type(batches).__name__ == "_MultiProcessingDataLoaderIter":
                batches._shutdown_workers()
        message = str(stop.value)
        assert re.fullmatch(r"Error: \S+image\d\.tif: the image holds NaN or infinity .*", message), message
        assert f"/{split}/images/" in message

    def test_data_without_anything_to_learn_are_said(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(run_data.logger, "propagate", True)
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        data = write_squares(tmp_path / "data")
        for path in (data / "val/instances").glob("*.png"):
            Image.fromarray(np.zeros((48, 48), dtype=np.uint16)).save(path)
        prepare(load_recipe(write_recipe(tmp_path)), data)
        told = [record.message for record in caplog.records if "nothing to learn" in record.message]
        assert len(told) == 1 and "the 3 images of val: no instance of square" in told[0]

    def test_help_and_list(self, capsys):
        for option, text in (("--help", "--recipe ade20k_r50"), ("--list", "44.5 mIoU")):
            with pytest.raises(SystemExit) as stop:
                train_trainer.main([option])
            assert stop.value.code == 0 and text in capsys.readouterr().out

    def test_it_learns(self, tmp_path, squares):
        recipe = write_recipe(
            tmp_path, schedule={"max_steps": 60}, training={"batch_size": 4, "save_steps": 1000, "ema_decay": None},
            optimizer={"learning_rate": 3e-3}, model={"dropout": 0.0}, augmentation={"scale": [1.0, 1.0]},
            evaluation={"tasks": ["semantic"], "every_steps": None},
        )  # fmt: skip
        scores = train_trainer.main(arguments(recipe, squares, tmp_path / "out", "--set=training.log_steps=20"))
        assert scores["eval_mean_iou"] > 0.8


class TestCommand:
    def test_train(self, tmp_path, squares):
        recipe = write_recipe(tmp_path, schedule={"max_steps": 1})
        result = CliRunner().invoke(app, ["train", *arguments(recipe, squares, tmp_path / "out")])
        assert result.exit_code == 0, result.output
        assert "mean_iou" in result.output
        assert (tmp_path / "out" / "model.safetensors").is_file()

    def test_train_a_converted_per_pixel_model(self, tmp_path, squares):
        segformer().save_pretrained(tmp_path / "per_pixel")
        for command in (
            ["convert", str(tmp_path / "per_pixel"), str(tmp_path / "masks"), "--num-queries", "8"],
            [
                "train",
                *arguments(write_recipe(tmp_path, schedule={"max_steps": 1}), squares, tmp_path / "out"),
                *("--model", str(tmp_path / "masks")),
            ],
        ):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
        trained = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "out")
        assert trained.config.id2label == CLASSES and trained.config.pixel_decoder == "per_pixel"

    def test_a_change_of_recipe_is_said_on_resume(self, tmp_path, squares, caplog):
        recipe = write_recipe(tmp_path, schedule={"max_steps": 1})
        command = ["train", *arguments(recipe, squares, tmp_path / "out")]
        CliRunner().invoke(app, command)
        result = CliRunner().invoke(app, [*command, "--resume", "--set", "schedule.max_steps=2"])
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--recipe=absent"], "No recipe 'absent'"),
            (["--data=absent"], "absent"),
            (["--accumulate=0"], "accumulate"),
        ],
    )
    def test_errors(self, tmp_path, squares, options, message):
        command = ["train", *arguments(write_recipe(tmp_path), squares, tmp_path / "out"), *options]
        result = CliRunner().invoke(app, command)
        assert result.exit_code != 0 and message in result.output

    def test_list_and_help(self):
        assert "camvid" in CliRunner().invoke(app, ["train", "--list"]).output
        assert "SECTION.KEY=VALUE" in CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
