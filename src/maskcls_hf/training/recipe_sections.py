"""The sections of a recipe and their values; what is not said here has these defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..writing import write_text
from .schedules import learning_rate_factor

Value = Any  # of a key that other code reads and checks


@dataclass
class DataSection:
    """
    Args:
        layout: of the data folder: "folder", "ade20k", "cityscapes", "coco_instances", "coco_panoptic"; None: found by
            looking.
        train_split, eval_split: names of the two parts.
        options: further arguments of `open_dataset`.
        cache: loader workers keep decoded images in memory.
    """

    layout: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    options: dict[str, Value] = field(default_factory=dict)
    cache: bool = False


@dataclass
class ModelSection:
    """
    Args:
        kind: mask classification, or the paper's per-pixel baselines.
        backbone_checkpoint: folder or Hub name of the backbone's weights; None: from scratch.
        config: every other key of the section: fields of `MaskClsConfig` or `PerPixelConfig`. `num_queries` may be
            "num_labels": one query a class.
    """

    kind: Literal["mask_classification", "per_pixel"] = "mask_classification"
    backbone_checkpoint: str | None = None
    config: dict[str, Value] = field(default_factory=dict)


@dataclass
class SamplingSection:
    """
    Args:
        by_area: side in pixels; an image occurs as often an epoch as it holds squares of this side, at least once.
    """

    by_area: int | None = None


@dataclass
class OptimizerSection:
    """AdamW, see `build_optimizer`; `clip_norm` is the largest norm of the gradient, None: no limit."""

    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    backbone_multiplier: float = 1.0
    clip_norm: float | None = 0.01
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass
class ScheduleSection:
    """
    Args:
        kind: shape of the learning rate over the steps.
        max_steps: optimiser steps of the training.
        warmup_steps: linear warm-up, from `warmup_factor` (None: 1 / (warmup_steps + 1)) to 1.
        power: of poly, (1 - step / max_steps) ** power.
        milestones, gamma: of multistep: the rate is multiplied by gamma at each of these steps.
    """

    kind: Literal["poly", "cosine", "multistep", "constant"] = "poly"
    max_steps: int = 160000
    warmup_steps: int = 0
    warmup_factor: float | None = None
    power: float = 0.9
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1


@dataclass
class TrainingSection:
    """
    Args:
        batch_size: images of an optimiser step, over all processes and accumulated batches.
        ema_decay: of the averaged weights that are evaluated and saved; None: no average.
        max_minutes: end on time; the schedule then follows the clock too.
        workers: loader processes for each training process.
        log_steps, save_steps: steps between lines of the log, and between checkpoints.
        save_total_limit: checkpoints that are kept.
        channels_last: memory layout of convolutions; faster, the numbers are the same up to rounding.
    """

    batch_size: int = 16
    ema_decay: float | None = None
    seed: int = 0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    gradient_checkpointing: bool = False
    max_minutes: float | None = None
    workers: int = 2
    log_steps: int = 50
    save_steps: int = 1000
    save_total_limit: int = 3
    channels_last: bool = True


@dataclass
class MultiScaleSection:
    """Test-time augmentation of `maskcls evaluate --multi-scale`: short edges in pixels, each also flipped."""

    short_edges: list[int] = field(default_factory=list)
    longest_edge: int | None = None
    flip: bool = True


@dataclass
class EvaluationSection:
    """
    Args:
        tasks: of "semantic", "panoptic", "instance".
        every_steps: steps between evaluations; None: only the one at the end.
        batch_size: images of a forward pass; None: as in training.
        threshold, overlap_threshold: of the panoptic map.
        crop: evaluate the middle of images, of this side in pixels; None: whole images.
        bootstrap: replicates for 95 % intervals; 0: none.
        boundary: boundary IoU too.
        multi_scale: for the score with test-time augmentation; not used in training.
    """

    tasks: list[Literal["semantic", "panoptic", "instance"]] = field(default_factory=lambda: ["semantic"])
    every_steps: int | None = 5000
    batch_size: int | None = None
    threshold: float = 0.8
    overlap_threshold: float = 0.8
    crop: int | None = None
    bootstrap: int = 0
    boundary: bool = False
    multi_scale: MultiScaleSection | None = None


@dataclass
class Recipe:
    """A training. `image_processor` and `augmentation` are options of `MaskClsImageProcessor` and `TrainTransform`;
    `paper` holds the scores to expect."""

    name: str = ""
    paper: dict[str, Value] = field(default_factory=dict)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    image_processor: dict[str, Value] = field(default_factory=dict)
    augmentation: dict[str, Value] = field(default_factory=dict)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    def __post_init__(self) -> None:
        """Raise ValueError for the first value that is out of range."""
        learning_rate_factor(0, **dataclasses.asdict(self.schedule))
        for name, value in (
            ("training.batch_size", self.training.batch_size),
            ("training.log_steps", self.training.log_steps),
            ("training.save_steps", self.training.save_steps),
            ("training.save_total_limit", self.training.save_total_limit),
            ("evaluation.every_steps", self.evaluation.every_steps),
            ("evaluation.batch_size", self.evaluation.batch_size),
            ("optimizer.learning_rate", self.optimizer.learning_rate),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0.")
        if self.training.ema_decay is not None and not 0 < self.training.ema_decay < 1:
            raise ValueError(f"training.ema_decay={self.training.ema_decay} must lie between 0 and 1.")
        if not self.evaluation.tasks:
            raise ValueError("evaluation.tasks is empty.")

    def as_dict(self) -> dict[str, Any]:
        """Sections as in the YAML file, without `name`."""
        sections = dataclasses.asdict(self)
        del sections["name"]
        sections["model"] |= sections["model"].pop("config")
        sections["optimizer"]["betas"] = list(self.optimizer.betas)
        return {key: value for key, value in sections.items() if value != {}}

    def differences(self, other: Recipe) -> list[str]:
        """`section.key` of all values that are not those of `other`."""
        sections, others = self.as_dict(), other.as_dict()
        return [
            f"{name}.{key}"
            for name in sorted({*sections, *others})
            for key in sorted({*sections.get(name, {}), *others.get(name, {})})
            if sections.get(name, {}).get(key) != others.get(name, {}).get(key)
        ]

    def save(self, path: str | Path) -> None:
        """Write all values, those of bases and defaults included; [`load_recipe`] reads the file."""
        header = f"# {self.name}: all values, defaults included.\n" if self.name else ""
        write_text(path, header + yaml.safe_dump(self.as_dict(), sort_keys=False))
