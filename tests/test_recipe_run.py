"""Recipes: reading, checking, building what they say, and training by them with both scripts and the command."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tifffile
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from huggingface_hub.utils import are_progress_bars_disabled
from PIL import Image, ImageFile
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, SwinForImageClassification
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from maskcls_hf import MaskClsForUniversalSegmentation, PerPixelForSemanticSegmentation
from maskcls_hf.cli.main import app
from maskcls_hf.inference import Predictor
from maskcls_hf.training import Recipe, list_recipes, load_recipe, prepare, train
from maskcls_hf.training import run as run_module
from maskcls_hf.training.build import build_config, build_image_processor, build_model, load_backbone
from maskcls_hf.training.checkpoints import list_checkpoints
from maskcls_hf.training.processes import warn_if_not_sharded
from maskcls_hf.training.recipe import TrainingSection
from maskcls_hf.training.run import WholeSteps
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
            ("model.kind=[]", r"model.kind is \[\], must be 'mask_classification' or 'per_pixel'"),
            ("model.kind={a: 1}", "model.kind is {'a': 1}, must be"),
            ("model.decoder_layers=1e22", r"model.decoder_layers is 10{22}, must be below 2\^63"),
            ("schedule.max_steps=9223372036854775808", "schedule.max_steps is 9223372036854775808, must be below"),
            ("training.workers=100000", "training.workers=100000 must be from 0 to 1000"),
            ("training.precision=half", "must be 'float32' or 'bf16' or 'fp16'"),
            ("evaluation.tasks=[boxes]", r"evaluation.tasks\[0\] is 'boxes', must be 'semantic' or"),
            ("evaluation.multi_scale.flop=3", r"did you mean flip\?"),
            ("training.batch_size=0", "tiny.yaml --set training.batch_size=0: training.batch_size=0 must be above 0"),
            ("training.ema_decay=1", "between 0 and 1"),
            ("schedule.kind=multistep", "milestones"),
            ("model.num_queries.x=3", "model.num_queries is 8, which has no keys"),
            ("model.dropout=[", "not a value in YAML"),
            ("dropout", "must be section.key=value"),
            (f"model.backbone_config{'.a' * 2000}=1", "must be section.key=value"),
            ("schedule.max_steps=0", "schedule.max_steps=0 must be above 0"),
            ("schedule.max_steps=010", "schedule.max_steps is '010', must be an integer"),
            ("schedule.power=-1", "schedule.power=-1.0 must not be negative"),
            ("schedule.gamma=-1", "schedule.gamma=-1.0 must not be negative"),
            ("schedule.milestones=[0]", r"schedule.milestones\[0\]=0 must be above 0"),
            ("schedule.warmup_factor=2", "schedule.warmup_factor=2.0 must be from 0 to 1"),
            ("optimizer.learning_rate=0", "optimizer.learning_rate=0.0 must be above 0"),
            ('optimizer.learning_rate="1e-4"', "optimizer.learning_rate is '1e-4', must be a number"),
            ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0 must not be negative"),
            ("optimizer.backbone_multiplier=-1", "optimizer.backbone_multiplier=-1.0 must not be negative"),
            ("optimizer.clip_norm=-1", "optimizer.clip_norm=-1.0 must not be negative"),
            ("optimizer.betas=[0.9, 1]", r"optimizer.betas\[1\]=1.0 must be from 0 to 1, without 1"),
            ("training.seed=-1", "training.seed=-1 must be from 0 to 4294967295"),
            ("training.workers=-1", "training.workers=-1 must be from 0 to 1000"),
            ("training.max_minutes=0", "training.max_minutes=0.0 must be above 0"),
            ("sampling.by_area=0", "sampling.by_area=0 must be above 0"),
            ("evaluation.tasks=[]", "evaluation.tasks is empty"),
            ("evaluation.threshold=1.5", "evaluation.threshold=1.5 must be from 0 to 1"),
            ("evaluation.overlap_threshold=-0.1", "evaluation.overlap_threshold=-0.1 must be from 0 to 1"),
            ("evaluation.crop=-1", "evaluation.crop=-1 must be above 0"),
            ("evaluation.bootstrap=-1", "evaluation.bootstrap=-1 must not be negative"),
            (
                "evaluation.multi_scale={short_edges: [32, 0]}",
                r"evaluation.multi_scale.short_edges\[1\]=0 must be above",
            ),
            ("model.mask_weight=true", "model.mask_weight is True, must be a number"),
            ('model.num_queries="5"', "model.num_queries is '5', must be an integer or 'num_labels'"),
            ("image_processor.do_resize=on top", "is 'on top', must be true or false"),
            ("image_processor.size={shortest_edge: big}", "image_processor.size is .*, must be an integer or a list"),
            ("image_processor.return_tensors=np", "unknown key image_processor.return_tensors"),
            ("augmentation.crop_size=true", "is True, must be an integer or a list, each an integer"),
            ("augmentation.flip=3", "augmentation.flip is 3, must be true or false"),
            ("data.options={3: 4}", "a key of data.options is 3, must be a text"),
        ],
    )
    def test_a_wrong_override_is_named(self, tmp_path, override, message):
        with pytest.raises(ValueError, match=message):
            load_recipe(write_recipe(tmp_path), [override])

    @pytest.mark.parametrize(
        "key",
        [
            "model.mask_weight", "model.num_queries", "model.backbone_config.embedding_size",
            "image_processor.image_std", "image_processor.size.shortest_edge", "optimizer.learning_rate",
            "optimizer.clip_norm", "schedule.power",
            "schedule.max_steps", "augmentation.scale", "augmentation.color", "augmentation.crop_size",
            "training.max_minutes", "training.ema_decay", "training.batch_size", "evaluation.threshold",
            "evaluation.crop", "sampling.by_area", "data.options.number",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("value", [".nan", "[1, .nan]", ".inf", "1e400"])
    def test_no_number_is_nan_or_infinite(self, tmp_path, key, value):
        with pytest.raises(ValueError, match=rf"{key}(\[1\])? is .*, must be a"):
            load_recipe(write_recipe(tmp_path), [f"{key}={value}"])

    def test_numbers_are_read_alike_in_all_sections(self, tmp_path):
        path = tmp_path / "numbers.yaml"
        path.write_text(
            "model: {mask_weight: 2e1, dropout: 1e-1, num_queries: 1e1, backbone_config: {embedding_size: 8e0}}\n"
            "image_processor: {rescale_factor: 4e-3, image_std: [5e-1, 1, 1], size: {shortest_edge: 6.4e1}}\n"
            "augmentation: {crop_size: 3e1, scale: [5e-1, 2e0], color: 1e-1}\n"
            "optimizer: {learning_rate: 1e-3, clip_norm: 1e0}\nschedule: {max_steps: 1e3, milestones: [0x10, 1_00]}\n"
            "training: {batch_size: 2e0, max_minutes: 1e1}\nevaluation: {threshold: 5e-1, crop: 2e1}\n"
        )
        with pytest.raises(ValueError, match="image_processor.size is .*64.0"):
            load_recipe(path)
        path.write_text(path.read_text().replace("6.4e1", "64e0"))
        recipe = load_recipe(path)
        backbone = {"embedding_size": 8}
        assert recipe.model.config == {
            "mask_weight": 20,
            "dropout": 0.1,
            "num_queries": 10,
            "backbone_config": backbone,
        }
        assert recipe.image_processor == {
            "rescale_factor": 0.004,
            "image_std": [0.5, 1, 1],
            "size": {"shortest_edge": 64},
        }
        assert recipe.augmentation == {"crop_size": 30, "scale": [0.5, 2], "color": 0.1}
        assert (recipe.optimizer.learning_rate, recipe.optimizer.clip_norm) == (0.001, 1)
        assert (recipe.schedule.max_steps, recipe.schedule.milestones) == (1000, [16, 100])
        assert (recipe.training.batch_size, recipe.training.max_minutes) == (2, 10)
        assert (recipe.evaluation.threshold, recipe.evaluation.crop) == (0.5, 20)
        recipe.save(tmp_path / "again.yaml")
        assert load_recipe(tmp_path / "again.yaml").as_dict() == recipe.as_dict()

    def test_an_override_with_two_values(self, tmp_path):
        path = write_recipe(tmp_path)
        with pytest.raises(ValueError, match="--set training.seed is given twice: 1 and 2"):
            load_recipe(path, ["training.seed=1", "training.workers=0", "training.seed=2"])
        assert load_recipe(path, ["training.seed=1", "training.seed=1"]).training.seed == 1

    def test_a_section_that_stands_twice(self, tmp_path, squares):
        path = write_recipe(tmp_path)
        text = path.read_text()
        path.write_text(text + "training: {workers: 0}\n")
        assert load_recipe(path).training.batch_size == 2, "nothing is dropped"
        (tmp_path / "child.yaml").write_text("base: tiny\n")
        for name in ("tiny", "child"):
            with pytest.raises(
                ValueError, match=r"tiny.yaml, line \d+: the key 'training' stands twice, first in line"
            ):
                prepare(load_recipe(tmp_path / f"{name}.yaml"), squares)
        path.write_text(text + "training: {batch_size: 3}\n")
        with pytest.raises(ValueError, match="tiny.yaml is not valid YAML: line .* 'training' stands twice"):
            load_recipe(path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "training: {seed: 1, seed: 2}",
                "wrong.yaml is not valid YAML: line 1, column 21: the key 'seed' stands twice",
            ),
            ("model: {backbone_config: {depths: [1], depths: [2]}}", "'depths' stands twice"),
            ("paper: &p {a: *p}", "stands in what it stands for"),
            ("", "must hold sections"),
            ("Training: {seed: 1}", "unknown section 'Training'"),
            ("3: {seed: 1}", "unknown section 3"),
            ("training: {3: 1}", "unknown key training.3"),
            ("training: {Seed: 1}", r"did you mean seed\?"),
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
            (("model.matching=no_such",), {}, "Recipe tiny, section model: matching='no_such' must be one of"),
            (("model.hidden_size=33",), {}, "Recipe tiny, section model: .*hidden_size=33"),
            (("image_processor.size_divisor=-1",), {}, "size_divisor"),
            (("augmentation.scale=[0, 0]",), {}, "section augmentation: "),
            ((), {"model": "absent"}, "No saved model in absent"),
            ((), {"processes": 0}, "processes=0 must be at least 1"),
            ((), {"accumulate": -1}, "accumulate=-1 must be at least 1"),
            (("image_processor.image_std=[0, 1, 1]",), {}, "section image_processor: image_std=0.0 must be above 0"),
            (("image_processor.image_std=[1, 1]",), {}, "image_std has 2 values"),
            (("image_processor.rescale_factor=0",), {}, "section image_processor: rescale_factor=0.0 must be above 0"),
            (("image_processor.size={height: 0, width: 9}",), {}, "section image_processor: size.'height'.=0 must be"),
            (("image_processor.size=-4",), {}, "section image_processor: size.'shortest_edge'.=-4 must be at least 1"),
            (("image_processor.resample=99",), {}, "section image_processor: resample=99 must be one of"),
            (("image_processor.pad_size={height: 8, width: 8}",), {}, "larger than pad_size"),
            (("model.backbone_config={depths: few}",), {}, "section model: Validation error for field 'depths'"),
            (("model.backbone_config={hidden_sizes: [-8, 8]}",), {}, "section model: .*negative dimension"),
            (("model.mask_weight=-1",), {}, "section model: .*mask_weight=-1.0 must be"),
            (("evaluation.bootstrap=1",), {}, "replicates=1 must be at least 2"),
            (("evaluation.boundary=true", "evaluation.tasks=[panoptic]"), {}, "boundary=True is of semantic maps"),
            (("model.kind=per_pixel",), {}, "gives semantic maps only"),
            (("data.eval_split=absent",), {}, "split absent"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, squares, overrides, options, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run = prepare(load_recipe(write_recipe(tmp_path), overrides), squares, **options)
            next(iter(run.loaders()[0]))

    def test_an_evaluation_that_fails_does_so_before_the_first_step(self, tmp_path):
        data = write_squares(tmp_path / "data")
        (data / "val" / "images" / "image0.png").write_bytes(b"broken")
        with pytest.raises(ValueError, match="image0.png cannot be read"):
            prepare(load_recipe(write_recipe(tmp_path)), data)
        for path in (data / "val" / "images").iterdir():
            path.unlink()
        with pytest.raises(ValueError, match="No images in"):
            prepare(load_recipe(write_recipe(tmp_path)), data)

    def test_a_warmup_that_does_not_end_is_said(self, tmp_path, squares, caplog):
        prepare(load_recipe(write_recipe(tmp_path)), squares)
        assert not caplog.text
        prepare(load_recipe(write_recipe(tmp_path), ["schedule.max_steps=1"]), squares)
        assert "schedule.warmup_steps=2: of 1 steps none has the full learning rate" in caplog.text

    def test_the_seed_counts_and_the_generator_stays(self, tmp_path, squares):
        recipe = load_recipe(write_recipe(tmp_path))
        state = torch.get_rng_state()
        first, second = (prepare(recipe, squares).model.state_dict() for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(first[name], second[name]) for name in first)

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
            (["--set", "optimizer.clip_norm=-1"], "optimizer.clip_norm=-1.0 must not be negative"),
            (["--set", "evaluation.threshold=.nan"], "evaluation.threshold is nan"),
            (["--set", "training.precision=fp16"], "training.precision=fp16 needs a GPU"),
            (["--accumulate", "0"], "accumulate=0 must be at least 1"),
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
        monkeypatch.setattr(run_module.logger, "propagate", True)
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


def global_state() -> dict[str, Any]:
    """What a library must leave as it was; the generators of random numbers are seeded by a training."""
    umask = os.umask(0)
    os.umask(umask)
    return {
        "verbosity": transformers_logging.get_verbosity(),
        "bars": (
            transformers_logging.is_progress_bar_enabled(),
            are_progress_bars_disabled(),
            datasets.is_progress_bar_enabled(),
        ),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "torch": (
            torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
            torch.multiprocessing.get_sharing_strategy(),
        ),
        "accelerate": [dict(state._shared_state) for state in (PartialState, AcceleratorState)],
        "process": (dict(os.environ), os.getcwd(), umask, list(sys.path), sys.excepthook, sys.getrecursionlimit()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "logging": (list(logging.root.handlers), logging.root.level),
        "pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
    }  # fmt: skip


class TestGlobalState:
    @pytest.fixture(params=[True, False], ids=["bars", "no bars"], autouse=True)
    def bars(self, request):
        """With transformers' bars on and off."""
        (transformers_logging.enable_progress_bar if request.param else transformers_logging.disable_progress_bar)()
        yield
        transformers_logging.enable_progress_bar()

    def test_trainings_and_commands_leave_it(self, tmp_path, squares):
        recipe = load_recipe(write_recipe(tmp_path, schedule={"max_steps": 1, "warmup_steps": 0}))
        before, out = global_state(), tmp_path / "out"
        train(recipe, squares, out)
        assert global_state() == before
        train(
            dataclasses.replace(recipe, training=TrainingSection(batch_size=2, workers=0, precision="bf16")),
            squares,
            tmp_path / "half",
        )
        assert global_state() == before
        with pytest.raises(FileNotFoundError):
            train(recipe, tmp_path / "absent", tmp_path / "other")
        assert global_state() == before
        images = squares / "val" / "images"
        for command in (
            ["evaluate", "--model", out, "--data", squares],
            ["evaluate", "--model", tmp_path, "--data", squares],
            ["segment", images, "--model", out, "--out", tmp_path / "segments"],
            ["convert", out, tmp_path / "converted", "--to-transformers"],
            ["validate", squares],
        ):
            CliRunner().invoke(app, [str(word) for word in command])
            assert global_state() == before, command
        Predictor.from_pretrained(out)(images / "image0.png")
        assert global_state() == before


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
