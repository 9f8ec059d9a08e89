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
from maskcls_hf.training import MaskAnnealing, annealing_intervals
from maskcls_hf.training.build import build_image_processor, build_model
from maskcls_hf.training.recipe import RECIPES, Recipe, list_recipes, load_recipe
from maskcls_hf.training.run import build_collators
from original_checkpoints import KEYS, keys
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
# Of Mask2Former's model zoo; and millions of parameters, of its paper (Tables 1, 2 and 4).
MASK2FORMER = {
    "ade20k": ("mean_iou", {"r50": 47.2, "swin_tiny": 47.7, "swin_small": 51.3, "swin_base": 53.9, "swin_large": 56.1}),
    "ade20k_panoptic": ("pq", {"r50": 39.7, "swin_large": 48.1}),
    "cityscapes": ("mean_iou", {"r50": 79.4, "swin_large": 83.3}),
    "cityscapes_panoptic": ("pq", {"r50": 62.1, "swin_large": 66.6}),
    "coco_panoptic": (
        "pq",
        {"r50": 51.9, "r101": 52.6, "swin_tiny": 53.2, "swin_small": 54.6, "swin_base": 56.4, "swin_large": 57.8},
    ),
    "coco_instance": (
        "ap", {"r50": 43.7, "swin_tiny": 45.0, "swin_small": 46.3, "swin_base": 48.1, "swin_large": 50.1},
    ),
}  # fmt: skip
MILLIONS = {"r50": 44, "r101": 63, "swin_tiny": 47, "swin_small": 69, "swin_base": 107, "swin_large": 216}
OF_MASK2FORMER = {
    f"mask2former_{data}_{model}": (data, metric, score, model)
    for data, (metric, scores) in MASK2FORMER.items()
    for model, score in scores.items()
}
# Of EoMT's configurations and model zoo: metric, score, classes, epochs, blocks with queries, side of images; millions
# of parameters, 316 in its paper (Table 1).
EOMT = {
    "coco_panoptic_small": ("pq", 46.7, 133, 24, 3, 640, 24),
    "coco_panoptic_base": ("pq", 51.6, 133, 24, 3, 640, 93),
    "coco_panoptic_large": ("pq", 56.0, 133, 12, 4, 640, 316),
    "coco_panoptic_small_dinov3": ("pq", 47.2, 133, 24, 3, 640, 23),
    "coco_panoptic_base_dinov3": ("pq", 53.1, 133, 24, 3, 640, 92),
    "coco_panoptic_large_dinov3": ("pq", 56.8, 133, 12, 4, 640, 315),
    "coco_instance_large": ("ap", 45.2, 80, 12, 4, 640, 316),
    "coco_instance_large_dinov3": ("ap", 45.9, 80, 12, 4, 640, 315),
    "ade20k_large": ("mean_iou", 58.4, 150, 31, 4, 512, 316),
    "ade20k_large_dinov3": ("mean_iou", 59.5, 150, 16, 4, 512, 315),
    "ade20k_panoptic_large": ("pq", 50.6, 150, 31, 4, 640, 316),
    "cityscapes_large": ("mean_iou", 84.2, 19, 107, 4, 1024, 316),
}
# First steps of the annealing of each block with queries, where it is not one after the other; steps in all.
ANNEALING = {
    "coco_panoptic_small_dinov3": ([0, 73910, 118256], [3000, 103474, 147820], 177384),
    "coco_panoptic_base_dinov3": ([0, 73910, 118256], [3000, 103474, 147820], 177384),
    "coco_panoptic_large_dinov3": ([0, 29564, 44346, 59128], [3000, 44346, 59128, 73910], 88692),
    "ade20k_large_dinov3": ([0, 6520, 9780, 13040], [3000, 9780, 13040, 16300], 19560),
}
LARGER_IMAGES = {"ade20k_swin_base", "ade20k_swin_large"}  # 640 instead of 512
OF_EOMT = [f"eomt_{name}" for name in EOMT]
OWN = [
    "building_facades", "building_facades_maskformer", "camvid", "camvid_lite0", "car_parts", "clothing_parsing_ccp",
    "coco_panoptic_sample", "coco_stuff_panoptic", "dsb2018_nuclei",
]  # fmt: skip


def classes(number: int) -> dict[int, str]:
    return {label: f"class {label}" for label in range(number)}


def meta_model(recipe: Recipe, num_labels: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(recipe, classes(num_labels), pretrained=False).train()


def oracle_keys(name: str) -> dict[str, Any]:
    """The list of parameters of an official configuration, and its number of classes."""
    return keys(name) | {"num_labels": SETTINGS[DATA_SET_OF[name]][0]}


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
    assert sorted(list_recipes()) == sorted([*OFFICIAL, *OWN, *OF_MASK2FORMER, *OF_EOMT, "finetune"])


class TestFinetune:
    def test_its_comment_has_a_command_that_can_be_run(self):
        words = shlex.split(header("finetune")[1])
        options = dict(zip(words[2::2], words[3::2], strict=True))
        assert words[:2] == ["maskcls", "train"] and options["--recipe"] == "finetune"
        assert (Path(__file__).resolve().parents[1] / options["--model"] / "config.json").is_file()

    def test_few_steps_a_short_warmup_and_a_low_rate(self):
        recipe = load_recipe("finetune")
        assert recipe.schedule.steps(100) <= 1000 and recipe.schedule.warmup_steps <= 0.1 * recipe.schedule.steps(100)
        assert (
            3 * recipe.optimizer.learning_rate <= min(load_recipe(name).optimizer.learning_rate for name in OWN) + 1e-9
        )
        assert recipe.optimizer.backbone_multiplier < 1 and recipe.training.ema_decay

    def test_it_reads_the_same_after_saving(self, tmp_path):
        load_recipe("finetune").save(tmp_path / "finetune.yaml")
        assert load_recipe(tmp_path / "finetune.yaml") == load_recipe("finetune")


@pytest.mark.parametrize("name", OFFICIAL + OWN)
class TestEveryRecipe:
    def test_it_builds_model_image_processor_and_augmentation(self, name):
        recipe = load_recipe(name)
        number = SETTINGS[DATA_SET_OF[name]][0] if name in OFFICIAL else 7
        model = meta_model(recipe, number)
        assert model.config.num_labels == number
        processor = build_image_processor(recipe, pretrained=False, num_labels=number)
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


@pytest.mark.parametrize("name", OF_MASK2FORMER)
def test_recipes_of_mask2former(name):
    data, metric, score, model = OF_MASK2FORMER[name]
    recipe = load_recipe(name)
    assert recipe.paper[metric] == score and recipe.paper["source"] in header(name)[0]
    unit = {"mean_iou": "mIoU", "pq": "PQ", "ap": "mask AP"}[metric]
    assert f" {score} {unit}" in header(name)[0]
    assert (recipe.training.batch_size, recipe.training.precision) == (16, "fp16")
    assert (recipe.optimizer.weight_decay, recipe.optimizer.backbone_multiplier) == (0.05, 0.1)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.clip_norm) == (1e-4, 0.01)
    steps = {"ade20k": 160000, "cityscapes": 90000, "coco": 737500 if model == "swin_large" else 368750}
    assert recipe.schedule.max_steps == steps[data.split("_")[0]]
    if data.startswith("coco"):
        assert recipe.augmentation["resize"] == "large_scale_jitter" and recipe.augmentation["crop_size"] == 1024
        assert recipe.schedule.milestones == ([655556, 710184] if model == "swin_large" else [327778, 355092])
    network = meta_model(recipe, {"ade20k": 150, "cityscapes": 19, "coco": 133}[data.split("_")[0]])
    config = network.config
    assert (config.pixel_decoder, config.transformer_decoder) == ("deformable", "masked_attention")
    assert (config.decoder_layers, config.encoder_layers, config.dropout, config.loss_points) == (9, 6, 0.0, 12544)
    weights = (config.cross_entropy_weight, config.mask_weight, config.dice_weight, config.no_object_weight)
    assert weights == (2.0, 5.0, 5.0, 0.1) and config.mask_loss == "cross_entropy"
    of_segments = model == "swin_large" and metric != "mean_iou"
    assert config.num_queries == (200 if of_segments else 100)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(MILLIONS[model], abs=0.6)


@pytest.mark.parametrize("name", EOMT)
def test_recipes_of_eomt(name, tmp_path):
    metric, score, classes_, epochs, query_blocks, side, millions = EOMT[name]
    is_dinov3, is_semantic = name.endswith("dinov3"), metric == "mean_iou"
    recipe, lines = load_recipe(f"eomt_{name}"), header(f"eomt_{name}")
    recipe.save(tmp_path / f"eomt_{name}.yaml")
    assert load_recipe(tmp_path / f"eomt_{name}.yaml") == recipe
    unit = {"mean_iou": "mIoU", "pq": "PQ", "ap": "mask AP"}[metric]
    assert recipe.paper == {metric: score, "source": "model zoo of EoMT's code"}
    assert f": {score} {unit} (model zoo of EoMT's code)." in lines[0]
    words = shlex.split(lines[1])
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert words[:2] == ["maskcls", "train"] and options["--recipe"] == f"eomt_{name}"
    assert ("--model" in options) == (not recipe.model.from_scratch)
    assert (recipe.training.batch_size, recipe.training.precision, recipe.schedule.epochs) == (16, "fp16", epochs)
    # Rates by layer and warm-up.
    optimizer, schedule = recipe.optimizer, recipe.schedule
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.decay_norms) == (0.05, 0.01, True)
    assert optimizer.learning_rate == (2e-4 if is_dinov3 else 1e-4)
    assert optimizer.layer_decay == (1.0 if name == "ade20k_large_dinov3" else 0.8)
    assert optimizer.layer_decay == 1 or optimizer.decay_query_blocks == (not is_dinov3)
    assert (schedule.kind, schedule.power, schedule.warmup_factor) == ("poly", 0.9, 0.0)
    warmup = (2000, 3000) if is_dinov3 else (500, 1000)
    assert (schedule.warmup_steps, schedule.backbone_warmup_steps) == warmup
    # The images.
    augmentation = recipe.augmentation
    assert (augmentation["resize"], augmentation["crop_size"]) == ("large_scale_jitter", side)
    assert augmentation["scale"] == ([0.5, 2.0] if is_semantic else [0.1, 2.0])
    assert augmentation["color"] == (None if name.startswith("coco") else "ssd")
    assert recipe.image_processor["size"]["shortest_edge"] == side
    assert recipe.evaluation.tasks == [{"mean_iou": "semantic", "pq": "panoptic", "ap": "instance"}[metric]]
    assert (recipe.evaluation.threshold, recipe.evaluation.overlap_threshold) == (0.8, 0.8)
    processor = build_image_processor(recipe, pretrained=False, num_labels=classes_)
    train, evaluation = build_collators(recipe, processor)
    one = sample(90, 120)
    assert train([one])["pixel_values"].shape == (1, 3, side, side)
    windows = evaluation([one])["pixel_values"]
    assert windows.shape == (2 if is_semantic else 1, 3, side, side)
    black = (-torch.tensor(processor.image_mean) / torch.tensor(processor.image_std))[:, None]
    if not is_semantic:  # as the code pads
        torch.testing.assert_close(windows[0, :, -1], black.expand(-1, side))
    assert transform_of(recipe).options
    # The network.
    network = meta_model(recipe, classes_)
    config = network.config
    assert config.architecture == "encoder_only" and config.attend_to_padding
    assert (config.num_queries, config.query_blocks) == (100 if is_semantic else 200, query_blocks)
    assert config.backbone_config.patch_size == 16
    weights = (config.cross_entropy_weight, config.mask_weight, config.dice_weight, config.no_object_weight)
    assert weights == (2.0, 5.0, 5.0, 0.1) and (config.mask_loss, config.loss_points) == ("cross_entropy", 12544)
    positions = 0 if is_dinov3 else network.model.encoder.vit.embeddings.position_embeddings.numel()
    counted = sum(p.numel() for p in network.parameters()) - positions
    of_grid = 0 if is_dinov3 else 40**2 * config.hidden_size  # of 640 pixels
    assert (counted + of_grid) / 1e6 == pytest.approx(millions, abs=0.75)
    # Annealing of the masks.
    annealing = MaskAnnealing(
        network, None if recipe.training.mask_annealing is True else recipe.training.mask_annealing
    )
    if name in ANNEALING:
        starts, ends, max_steps = ANNEALING[name]
        found = [[share * max_steps for share in pair] for pair in annealing.intervals]
        assert found == [pytest.approx(pair, abs=8) for pair in zip(starts, ends, strict=True)]
    else:
        assert annealing.intervals == annealing_intervals(query_blocks)


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
