"""The sections of a recipe and their values; what is not said here has these defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from ..models.options import require_range
from ..utils.writing import write_text
from ..utils.yaml_values import dump_yaml
from .schedules import learning_rate_factor

Value = Any  # of a key that other code reads and checks
# In these ranges; of an optional value where it is not None, of a list each item.
Positive = Annotated[float, "(0, inf)"]
NotNegative = Annotated[float, "[0, inf)"]
Share = Annotated[float, "[0, 1]"]
Count = Annotated[int, "(0, inf)"]


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

    by_area: Count | None = None


@dataclass
class OptimizerSection:
    """AdamW, see `build_optimizer`; `clip_norm` is the largest norm of the gradient, None or 0: no limit."""

    learning_rate: Positive = 1e-4
    weight_decay: NotNegative = 1e-4
    backbone_multiplier: NotNegative = 1.0
    clip_norm: NotNegative | None = 0.01
    betas: tuple[Annotated[float, "[0, 1)"], Annotated[float, "[0, 1)"]] = (0.9, 0.999)


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
    max_steps: Count = 160000
    warmup_steps: Annotated[int, "[0, inf)"] = 0
    warmup_factor: Share | None = None
    power: NotNegative = 0.9
    milestones: list[Count] = field(default_factory=list)
    gamma: NotNegative = 0.1


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

    batch_size: Count = 16
    ema_decay: Annotated[float, "(0, 1)"] | None = None
    seed: Annotated[int, "[0, 4294967295]"] = 0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    gradient_checkpointing: bool = False
    max_minutes: Positive | None = None
    workers: Annotated[int, "[0, 1000]"] = 2
    log_steps: Count = 50
    save_steps: Count = 1000
    save_total_limit: Count = 3
    channels_last: bool = True


@dataclass
class MultiScaleSection:
    """Test-time augmentation of `maskcls evaluate --multi-scale`: short edges in pixels, each also flipped."""

    short_edges: list[Count] = field(default_factory=list)
    longest_edge: Count | None = None
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
    every_steps: Count | None = 5000
    batch_size: Count | None = None
    threshold: Share = 0.8
    overlap_threshold: Share = 0.8
    crop: Count | None = None
    bootstrap: Annotated[int, "[0, inf)"] = 0
    boundary: bool = False
    multi_scale: MultiScaleSection | None = None


@dataclass
class Recipe:
    """A training. `image_processor` and `augmentation` are options of `MaskClsImageProcessor` and `TrainTransform`;
    `paper` holds the scores to expect. `doubled` says which sections stand twice in the file: no training starts with
    them."""

    name: str = ""
    doubled: tuple[str, ...] = field(default=(), compare=False)
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
        for section in dataclasses.fields(self):
            require_ranges(section.name, getattr(self, section.name))
        try:
            learning_rate_factor(0, **dataclasses.asdict(self.schedule))
        except ValueError as error:
            raise ValueError(f"schedule: {error}") from error
        if not self.evaluation.tasks:
            raise ValueError("evaluation.tasks is empty.")

    def as_dict(self) -> dict[str, Any]:
        """Sections as in the YAML file, without `name` and `doubled`."""
        sections = dataclasses.asdict(self)
        del sections["name"], sections["doubled"]
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
        write_text(path, header + dump_yaml(self.as_dict()))


def require_ranges(owner: str, section: Any) -> None:
    """ValueError for the first value of a section that is out of the range that its annotation gives."""
    if not dataclasses.is_dataclass(section):
        return
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        require_ranges(f"{owner}.{name}", value)
        _require_in_range(f"{owner}.{name}", value, hint)


def _require_in_range(name: str, value: Any, hint: Any) -> None:
    if hasattr(hint, "__metadata__"):
        require_range(name, value, hint.__metadata__[0], integer=hint.__origin__ is int)
    elif isinstance(value, (list, tuple)):
        arguments = get_args(hint)
        for i, item in enumerate(value):
            _require_in_range(f"{name}[{i}]", item, arguments[min(i, len(arguments) - 1)])
    elif value is not None:
        for choice in get_args(hint):
            _require_in_range(name, value, choice)
