"""The recipe files: every one loads and builds; the paper's have the numbers of the paper's code."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import SHARED, needs_shared
from maskcls_hf.data import open_dataset
from maskcls_hf.data.sample import Sample
from maskcls_hf.data.transforms import TrainTransform
from maskcls_hf.training.build import build_image_processor, build_model
from maskcls_hf.training.recipe import RECIPES, Recipe, list_recipes, load_recipe
from original_checkpoints import KEYS
from samples import sample_of

# Of the paper's configurations: classes, images a step, steps, crop (height and width), edges of the test images.
SETTINGS = {
    "ade20k": (150, 16, 160000, 512, (512, 2048)),
    "ade20k_panoptic": (150, 16, 720000, 640, (640, 2560)),
    "ade20k_full": (847, 16, 200000, 512, (512, 2048)),
    "coco_stuff": (171, 32, 60000, 640, (640, 2560)),
    "cityscapes": (19, 16, 90000, [512, 1024], (1024, 2048)),
    "mapillary": (65, 16, 300000, 1280, (2048, 2048)),
    "coco_panoptic": (133, 64, 554400, None, (800, 1333)),
}
# Of its model zoo: mIoU; of the panoptic ones PQ.
SCORES = {
    "ade20k": {
        "r50": 44.5, "r101": 45.5, "r101c": 46.0, "perpixel_r50": 39.2, "perpixelplus_r50": 41.9,
        "swin_tiny": 46.7, "swin_small": 49.8, "swin_base": 52.7, "swin_large": 54.1,
    },
    "ade20k_panoptic": {"r50": 34.7, "r101": 35.7},
    "ade20k_full": {"r50": 16.0, "r101": 16.8, "r101c": 17.4, "perpixel_r50": 12.4, "perpixelplus_r50": 13.9},
    "coco_stuff": {"r50": 37.1, "r101": 38.1, "r101c": 38.0, "perpixel_r50": 32.4, "perpixelplus_r50": 34.2},
    "cityscapes": {"r101": 78.5, "r101c": 79.7},
    "mapillary": {"r50": 53.1},
    "coco_panoptic": {
        "r50": 46.5, "r101": 47.6, "swin_tiny": 47.7, "swin_small": 49.7, "swin_base": 51.8, "swin_large": 52.7,
    },
}  # fmt: skip
DATA_SET_OF = {f"{data}_{model}": data for data, scores in SCORES.items() for model in scores}
OFFICIAL = list(DATA_SET_OF)
LARGER_IMAGES = {"ade20k_swin_base", "ade20k_swin_large"}  # 640 instead of 512
OWN = ["camvid", "car_parts", "clothing_parsing_ccp", "coco_panoptic_sample", "coco_stuff_panoptic", "dsb2018_nuclei"]


def classes(number: int) -> dict[int, str]:
    return {label: f"class {label}" for label in range(number)}


def meta_model(recipe: Recipe, num_labels: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(recipe, classes(num_labels), pretrained=False).train()


def oracle_keys(name: str) -> dict[str, Any]:
    """The list of parameters of an official configuration, and its number of classes."""
    keys = json.loads((SHARED / "oracle" / "keys" / f"{name}.json").read_text())
    return keys | {"num_labels": SETTINGS[DATA_SET_OF[name]][0]}


def transform_of(recipe: Recipe) -> TrainTransform:
    """With the classes that the recipe names."""
    swaps = recipe.augmentation.get("swap_on_flip") or {}
    return TrainTransform(**recipe.augmentation, id2label=dict(enumerate(["background", *swaps, *swaps.values()])))


def sample(height: int = 90, width: int = 120) -> Sample:
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return sample_of(torch.randint(2, (height, width), dtype=torch.uint8), image=image)


def header(name: str) -> list[str]:
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return [line[1:].strip() for line in lines[: next(i for i, line in enumerate(lines) if line[0] != "#")]]


def test_these_are_all_recipes():
    assert sorted(list_recipes()) == sorted(OFFICIAL + OWN)


@pytest.mark.parametrize("name", OFFICIAL + OWN)
class TestEveryRecipe:
    def test_it_builds_model_image_processor_and_augmentation(self, name):
        recipe = load_recipe(name)
        number = SETTINGS[DATA_SET_OF[name]][0] if name in OFFICIAL else 7
        model = meta_model(recipe, number)
        assert model.config.num_labels == number
        processor = build_image_processor(recipe, num_labels=number)
        assert processor.label_format == ("semantic" if recipe.model.kind == "per_pixel" else "segments")
        assert transform_of(recipe).options

    def test_its_comment_has_the_command_that_runs_it(self, name):
        first, command = header(name)[:2]
        assert len(first) > 20 and first.endswith((".", ")"))
        words = shlex.split(command)
        assert words[:2] == ["maskcls", "train"]
        options = dict(zip(words[2::2], words[3::2], strict=True))
        assert options.keys() == {"--recipe", "--data", "--out"}
        assert options["--recipe"] == name and options["--out"] == f"runs/{name}"

    def test_it_reads_the_same_after_saving(self, name, tmp_path):
        recipe = load_recipe(name)
        recipe.save(tmp_path / f"{name}.yaml")
        assert load_recipe(tmp_path / f"{name}.yaml") == recipe


@pytest.mark.parametrize("name", OFFICIAL)
class TestOfficialRecipes:
    def test_the_papers_score_is_beside_it(self, name):
        recipe, data = load_recipe(name), DATA_SET_OF[name]
        score = SCORES[data][name.removeprefix(f"{data}_")]
        metric, unit = ("pq", "PQ") if "panoptic" in data else ("mean_iou", "mIoU")
        assert recipe.paper[metric] == score and recipe.paper["source"]
        assert f" {score} {unit}" in header(name)[0] and recipe.paper["source"] in header(name)[0]
        assert set(recipe.paper) <= {metric, f"{metric}_multi_scale", "source"}
        assert re.search(r"(8|64) V100, \d+ MB", " ".join(header(name)))

    def test_batch_steps_and_sizes(self, name):
        recipe = load_recipe(name)
        _, batch_size, max_steps, crop_size, edges = SETTINGS[DATA_SET_OF[name]]
        if name in LARGER_IMAGES:
            crop_size, edges = 640, (640, 2560)
        assert (recipe.training.batch_size, recipe.schedule.max_steps) == (batch_size, max_steps)
        assert recipe.augmentation["crop_size"] == crop_size
        assert tuple(recipe.image_processor["size"].values()) == edges

    def test_the_training_images(self, name):
        augmentation = load_recipe(name).augmentation
        edges = augmentation["short_edges"]
        if DATA_SET_OF[name] == "coco_panoptic":  # as DETR
            assert edges == list(range(480, 801, 32)) and augmentation["crop_range"] == [384, 600]
            assert augmentation["longest_edge"] == (1000 if name == "coco_panoptic_swin_large" else 1333)
            return
        shortest = 2 * edges[0]
        last = 1.5 if DATA_SET_OF[name] == "coco_stuff" else 2
        assert edges == [int(shortest * tenth / 10) for tenth in range(5, int(last * 10) + 1)]
        assert augmentation["longest_edge"] == 4 * shortest
        assert augmentation["color"] == "ssd" and augmentation["single_category_limit"] == 1.0

    def test_what_is_scored(self, name):
        evaluation, data = load_recipe(name).evaluation, DATA_SET_OF[name]
        assert evaluation.tasks[0] == ("panoptic" if "panoptic" in data else "semantic")
        if "panoptic" in data:
            assert evaluation.threshold == (0.7 if data == "ade20k_panoptic" else 0.8)
            assert evaluation.overlap_threshold == 0.8
        multi_scale = evaluation.multi_scale is not None
        assert multi_scale == (data in ("ade20k", "coco_stuff", "cityscapes"))

    def test_the_loss_weights_and_sizes_are_the_papers(self, name):
        number = SETTINGS[DATA_SET_OF[name]][0]
        config = meta_model(load_recipe(name), number).config
        assert (config.decoder_layers, config.hidden_size, config.dropout) == (6, 256, 0.1)
        assert config.num_queries == (number if "perpixelplus" in name else 100)
        assert config.deep_supervision and config.attend_to_padding
        if config.model_type == "maskcls":
            weights = (config.cross_entropy_weight, config.mask_weight, config.dice_weight, config.no_object_weight)
            assert weights == (1.0, 20.0, 1.0, 0.1)
        backbone = config.backbone_config
        assert config.freeze_batch_norm == (backbone.model_type == "resnet")
        assert getattr(backbone, "drop_path_rate", 0.3) == 0.3
        assert getattr(backbone, "last_stage_dilations", None) == ([1, 2, 4] if name.endswith("r101c") else None)


@needs_shared
@pytest.mark.parametrize("name", KEYS)
def test_the_models_have_as_many_parameters_as_the_papers(name):
    expected = oracle_keys(name)
    model = meta_model(load_recipe(name), expected["num_labels"])
    learn = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
    parts = {
        "backbone": sum(count for key, count in learn.items() if ".backbone." in key),
        "sem_seg_head.pixel_decoder": sum(count for key, count in learn.items() if ".pixel_decoder." in key),
    }
    parts["sem_seg_head.predictor"] = sum(learn.values()) - sum(parts.values())
    assert parts == expected["parameters_by_part"]
    assert sum(learn.values()) == expected["trainable_parameters"]


class TestAugmentations:
    @pytest.mark.parametrize("name", [*OWN, "ade20k_r50", "coco_panoptic_r50"])
    def test_they_run_and_keep_image_and_map_together(self, name):
        recipe = load_recipe(name)
        result = transform_of(recipe)(sample(), (0, 1, 2))
        size = result["image"].shape[-2:]
        assert result["segments"].size == size
        crop = recipe.augmentation.get("crop_size")
        limits = (crop, crop) if isinstance(crop, int) else crop
        assert crop is None or all(length <= limit for length, limit in zip(size, limits, strict=True))

    @needs_shared
    def test_every_sided_class_of_car_parts_is_swapped(self):
        names = set(json.loads((SHARED / "data" / "car_parts" / "labels.json").read_text()).values())
        swaps = load_recipe("car_parts").augmentation["swap_on_flip"]
        assert {*swaps, *swaps.values()} == {name for name in names if "left" in name or "right" in name}
        assert all(name.replace("left", "right") == other for name, other in swaps.items())


@needs_shared
@pytest.mark.parametrize("name", OWN)
def test_the_data_of_our_own_recipes_opens(name):
    recipe = load_recipe(name)
    path = shlex.split(header(name)[1])[5]
    splits = [recipe.data.train_split, recipe.data.eval_split]
    train, evaluation = (
        open_dataset(SHARED / "data" / path, split, recipe.data.layout, **recipe.data.options) for split in splits
    )
    assert train.id2label == evaluation.id2label
    assert ("panoptic" in recipe.evaluation.tasks or "instance" in recipe.evaluation.tasks) == train.has_instances
    TrainTransform(**recipe.augmentation, id2label=train.id2label)
    meta_model(recipe, len(train.id2label))


def test_the_nuclei_recipe_has_the_model_of_the_published_checkpoint():
    card = Path(__file__).resolve().parents[1] / "model_cards" / "maskcls-nuclei-tiny"
    published = json.loads((card / "config.json").read_text())
    config = meta_model(load_recipe("dsb2018_nuclei"), 2).config.to_dict()
    for field in (
        "pixel_decoder",
        "encoder_layers",
        "fpn_feature_size",
        "hidden_size",
        "decoder_layers",
        "num_queries",
    ):
        assert config[field] == published[field], field
    for field in ("hidden_sizes", "depths", "layer_type", "out_features"):
        assert config["backbone_config"][field] == published["backbone_config"][field], field
