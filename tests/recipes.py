"""A recipe and data for trainings that take a second."""

from __future__ import annotations

from pathlib import Path

import yaml

from test_data import write_instances
from tiny import SIZES

BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2"],
}
RECIPE = {
    "model": {"backbone_config": BACKBONE, "num_queries": 8, **SIZES, "decoder_layers": 2, "dropout": 0.1},
    "image_processor": {"do_resize": False},
    "augmentation": {"crop_size": 32},
    "optimizer": {"learning_rate": 1e-3, "clip_norm": 1.0},
    "schedule": {"max_steps": 6, "warmup_steps": 2},
    "training": {"batch_size": 2, "workers": 0, "log_steps": 1, "save_steps": 4, "ema_decay": 0.9},
    "evaluation": {"tasks": ["semantic", "panoptic", "instance"], "every_steps": 4},
}


def write_recipe(folder: Path, **sections: dict) -> Path:
    """A recipe file with these values over those of `RECIPE`."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = {name: {**RECIPE.get(name, {}), **sections.get(name, {})} for name in (*RECIPE, *sections)}
    (folder / "tiny.yaml").write_text("# A tiny recipe.\n" + yaml.safe_dump(merged))
    return folder / "tiny.yaml"


def write_squares(folder: Path) -> Path:
    """Five images with three squares each for training, three for evaluation."""
    write_instances(folder, count=5)
    return write_instances(folder, "val", count=3)
