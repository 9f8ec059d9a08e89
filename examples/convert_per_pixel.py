"""From per-pixel to mask classification: what does it gain to convert a per-pixel model, and to train on?

Trains per-pixel models of transformers from scratch on your data, converts each, checks that the converted model makes
the same maps, and fine-tunes both for as many steps: the per-pixel model with its own loss, the converted one with the
mask-classification loss, all else equal. All are scored on the test split, with 95 % intervals; a table, a plot and all
numbers come out. Stopped at any point it goes on where it was.

    python examples/convert_per_pixel.py --recipe camvid --data camvid --test-split test --out runs/convert-camvid

Data, augmentation, optimiser and schedule are the recipe's; its network is not used.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.utils import logging

from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.configuration_maskcls import as_backbone_config
from maskcls_hf.data import SegmentationDataset
from maskcls_hf.data.sample import void_id_of
from maskcls_hf.inference import Predictor
from maskcls_hf.post_processing import per_pixel_map
from maskcls_hf.training import Recipe, load_recipe, prepare
from maskcls_hf.training.checkpoints import list_checkpoints
from maskcls_hf.training.recipe_trainer import RecipeTrainer, training_arguments
from studies import (
    Method,
    Scores,
    best_guesses,
    difference_table,
    facts_of_run,
    measure,
    open_test_split,
    parse,
    plot_scores,
    score_table,
    scores_of,
    study_parser,
    write_record,
)

PER_PIXEL, MASKS = "model.kind=per_pixel", "model.kind=mask_classification"
METHODS = (
    Method("per-pixel", "per_pixel", (PER_PIXEL,)),
    Method("per-pixel, trained on", "per_pixel_on", (PER_PIXEL,)),
    Method("converted", "converted", (MASKS,)),
    Method("converted, fixed matching, trained on", "fixed_on", (MASKS,)),
    Method("converted, bipartite matching, trained on", "bipartite_on", (MASKS,)),
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = study_parser(__doc__, METHODS)
    parser.add_argument(
        "--architecture", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES), help="all, by default"
    )
    parser.add_argument("--fine-tune-steps", type=int, help="of the second training (half as many as of the first)")
    parser.add_argument("--fine-tune-rate", type=float, help="its learning rate (0.3 times that of the first)")
    return parse(parser, argv, METHODS)


# -- per-pixel models of transformers ----------------------------------------------------------------------------


def segformer(recipe: Recipe, id2label: dict[int, str]) -> PreTrainedModel:
    """SegFormer-B0, whose sizes are the defaults of its configuration."""
    void_id = void_id_of(len(id2label))
    return SegformerForSemanticSegmentation(SegformerConfig(**classes(id2label), semantic_loss_ignore_index=void_id))


def upernet(recipe: Recipe, id2label: dict[int, str]) -> PreTrainedModel:
    """UperNet over the recipe's backbone."""
    config = UperNetConfig(
        backbone_config=as_backbone_config(recipe.model.config.get("backbone_config")),
        hidden_size=96,
        use_auxiliary_head=False,
        loss_ignore_index=void_id_of(len(id2label)),
        **classes(id2label),
    )
    return UperNetForSemanticSegmentation(config)


def classes(id2label: dict[int, str]) -> dict[str, Any]:
    return {"id2label": id2label, "label2id": {name: label for label, name in id2label.items()}}


ARCHITECTURES = {"segformer": ("SegFormer-B0", segformer), "upernet": ("UperNet", upernet)}


class PixelLabels:
    """Collator for models of transformers, whose `forward` takes nothing else."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, samples: Any) -> dict[str, Tensor]:
        batch = self.collator(samples)
        return {name: batch[name] for name in ("pixel_values", "labels")}


# -- training ----------------------------------------------------------------------------------------------------


def train(recipe: Recipe, data: Path, folder: Path, network: Callable[[], PreTrainedModel]) -> Path:
    """Train the network by the recipe, or go on with it; the folder of the model."""
    if (folder / "model.safetensors").is_file():
        return folder
    run = prepare(recipe, data, model=network())
    if recipe.model.kind == "per_pixel":
        run.train_collator = PixelLabels(run.train_collator)
    print(f"{folder}: training. {run.describe()}", flush=True)
    trainer = RecipeTrainer(run, training_arguments(run, folder))
    trainer.train(resume_from_checkpoint=bool(list_checkpoints(folder)))
    trainer.save_model()
    trainer.save_state()
    return folder


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    for architecture in arguments.architecture:
        study(architecture, arguments)


def study(architecture: str, arguments: argparse.Namespace):
    changes = [*arguments.set, "evaluation.every_steps=null"]
    first = load_recipe(arguments.recipe, [*changes, PER_PIXEL])
    steps = arguments.fine_tune_steps or first.schedule.max_steps // 2
    rate = arguments.fine_tune_rate or 0.3 * first.optimizer.learning_rate
    second = [*changes, f"schedule.max_steps={steps}", f"optimizer.learning_rate={rate}"]
    data = open_test_split(first, arguments)
    folder = arguments.out / architecture
    _, build = ARCHITECTURES[architecture]

    def fresh():
        torch.manual_seed(first.training.seed)
        return build(first, data.id2label)

    per_pixel = train(first, arguments.data, folder / "per_pixel", fresh)
    if not arguments.only or "per_pixel_on" in arguments.only:
        recipe = load_recipe(arguments.recipe, [*second, PER_PIXEL])
        train(recipe, arguments.data, folder / "per_pixel_on", lambda: AutoModelForSemanticSegmentation.from_pretrained(per_pixel))


if __name__ == "__main__":
    main()
