"""Recipes: a training as a short YAML file, read into typed sections.

A recipe names data layout, model, augmentation, optimizer and schedule; what depends on the machine (paths, processes,
accumulated batches) is given where it is run. Those of the package are in `recipes/`, see [`list_recipes`].
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..data.transforms import TrainTransform
from ..models.image_processing_maskcls import MaskClsImageProcessorKwargs
from ..models.kinds import KINDS
from ..models.options import require_range
from ..utils.writing import write_text
from ..utils.yaml_values import DEEPEST, dump_yaml, parse_yaml, read_yaml
from .optim import learning_rate_factor

logger = logging.get_logger(__name__)

RECIPES = Path(__file__).parent / "recipes"

# -- sections: what a recipe does not say has these defaults ------------------------------------------------------

Value = Any  # of a key that other code reads and checks
# In these ranges; of an optional value where it is not None, of a list each item.
Positive = Annotated[float, "(0, inf)"]
NotNegative = Annotated[float, "[0, inf)"]
Share = Annotated[float, "[0, 1]"]
Count = Annotated[int, "(0, inf)"]


@dataclass
class DataSection:
    """Section `data`: which images, and how they are divided.

    Args:
        layout: of the data folder: "folder", "ade20k", "cityscapes", "coco_instances", "coco_panoptic", or one of
            `register_layout`; None: found by looking.
        train_split: name of the part that is trained on.
        eval_split: name of the part that is evaluated.
        val_share: where the data has no `eval_split`, the share of its images, at least one, that `training.seed`
            chooses to be held out from the training and evaluated; None: that is an error.
        options: further arguments of `open_dataset`.
        cache: loader workers keep decoded images in memory.
    """

    layout: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    val_share: Annotated[float, "(0, 1)"] | None = 0.1
    options: dict[str, Value] = field(default_factory=dict)
    cache: bool = False


@dataclass
class ModelSection:
    """Section `model`: kind of model, weights to start from, and fields of its configuration.

    Args:
        kind: mask classification, or the paper's per-pixel baselines.
        backbone_checkpoint: the backbone's weights, as `maskcls_hf.convert.open_backbone` takes them: a folder, a name
            on the Hub, `package:NAME`; None: from scratch. Without a `backbone_config` it is read from there, and where
            `image_processor` says nothing, mean, deviation and interpolation are.
        backbone_weights: file of weights, where `backbone_checkpoint` is a name of timm; None: the Hub's.
        from_scratch: False: a training needs a `backbone_checkpoint` or a saved model to start from.
        config: every other key of the section: fields of `MaskClsConfig` or `PerPixelConfig`. `num_queries` may be
            "num_labels": one query a class.
    """

    kind: Literal["mask_classification", "per_pixel"] = "mask_classification"
    backbone_checkpoint: str | None = None
    backbone_weights: str | None = None
    from_scratch: bool = True
    config: dict[str, Value] = field(default_factory=dict)


@dataclass
class SamplingSection:
    """Section `sampling`: how often images occur.

    Args:
        by_area: side in pixels; an image occurs as often an epoch as it holds squares of this side, at least once.
            None: every image once.
    """

    by_area: Count | None = None


@dataclass
class OptimizerSection:
    """Section `optimizer`: AdamW, see [`parameter_groups`].

    Args:
        learning_rate: of all but the backbone.
        weight_decay: of all but norms, embeddings, tokens and position tables.
        backbone_multiplier: of the backbone's learning rate.
        layer_decay: of the learning rate, from block to block of a plain ViT; 1: none.
        decay_query_blocks: False: an EoMT's blocks with queries are left out of `layer_decay`.
        decay_norms: norms, embeddings, tokens and position tables have weight decay, too.
        clip_norm: the largest norm of the gradient; None or 0: no limit.
        betas: of AdamW.
    """

    learning_rate: Positive = 1e-4
    weight_decay: NotNegative = 1e-4
    backbone_multiplier: NotNegative = 1.0
    layer_decay: Annotated[float, "(0, 1]"] = 1.0
    decay_query_blocks: bool = True
    decay_norms: bool = False
    clip_norm: NotNegative | None = 0.01
    betas: tuple[Annotated[float, "[0, 1)"], Annotated[float, "[0, 1)"]] = (0.9, 0.999)


@dataclass
class LoraSection:
    """Section `lora`: the backbone learns by small matrices beside its weights, which stay, see [`add_lora`].

    Args:
        rank: of the matrices; None: no LoRA, the weights themselves learn.
        targets: names of layers of the backbone, or their ends; None: all its linear layers.
        alpha: the update is multiplied by alpha / rank; None: by 1.
        dropout: of what goes into the matrices.
        modules_to_save: modules that learn in full; None: all outside of the backbone.
    """

    rank: Count | None = None
    targets: list[str] | None = None
    alpha: Positive | None = None
    dropout: Annotated[float, "[0, 1)"] = 0.0
    modules_to_save: list[str] | None = None


_DEFAULT_STEPS = 160000
_LENGTHS = ("max_steps", "epochs")  # of a training: one says it


@dataclass
class ScheduleSection:
    """Section `schedule`: length of the training, and its learning rate, see [`learning_rate_factor`].

    Args:
        kind: shape of the learning rate over the steps.
        max_steps: optimizer steps of the training; without `epochs` 160000 by default.
        epochs: passes over the training images, instead of `max_steps`. One has as many whole steps as the images make
            (as often as `sampling` repeats them); the images that are left over are others in each.
        warmup_steps: linear warm-up, from `warmup_factor` to 1.
        warmup_factor: part of the learning rate that the warm-up begins with; None: 1 / (warmup_steps + 1).
        backbone_warmup_steps: above 0 the backbone waits at 0 for the `warmup_steps` of the rest, then warms up for so
            many; poly and cosine begin after the warm-up.
        power: of poly, (1 - step / max_steps) ** power.
        milestones: of multistep: steps at which the rate falls, ascending.
        gamma: of multistep: the rate is multiplied by it at each of these steps.

    Raises:
        ValueError: `max_steps` and `epochs` are both given.
    """

    kind: Literal["poly", "cosine", "multistep", "constant"] = "poly"
    max_steps: Count | None = None
    epochs: Positive | None = None
    warmup_steps: Annotated[int, "[0, inf)"] = 0
    warmup_factor: Share | None = None
    backbone_warmup_steps: Annotated[int, "[0, inf)"] = 0
    power: NotNegative = 0.9
    milestones: list[Count] = field(default_factory=list)
    gamma: NotNegative = 0.1

    def __post_init__(self) -> None:
        if self.epochs is None:
            self.max_steps = _DEFAULT_STEPS if self.max_steps is None else self.max_steps
        elif self.max_steps is not None:
            raise ValueError(f"schedule.max_steps={self.max_steps} or schedule.epochs={self.epochs}: give one of them.")

    @property
    def all_warmup_steps(self) -> int:
        """Steps until the last learning rate has warmed up."""
        return self.warmup_steps + self.backbone_warmup_steps

    def steps(self, steps_an_epoch: int) -> int:
        """Steps of the whole training, where an epoch has so many; 1 at least.

        Examples:
            >>> ScheduleSection(epochs=2.5).steps(steps_an_epoch=10)
            25
        """
        if self.epochs is None:
            return cast(int, self.max_steps)
        return max(1, math.ceil(round(self.epochs * steps_an_epoch, 6)))

    def curve(self, max_steps: int) -> dict[str, Any]:
        """Arguments of `learning_rate_factor` for so many steps."""
        return {**{k: v for k, v in dataclasses.asdict(self).items() if k not in _LENGTHS}, "max_steps": max_steps}


@dataclass
class TrainingSection:
    """Section `training`: batches, precision, log and checkpoints.

    Args:
        batch_size: images of an optimizer step, over all processes and accumulated batches.
        mask_annealing: of an EoMT's masked attention, from 1 to 0; or start and end for each of its blocks with
            queries, in shares of the training. None: true for a new model; a saved one keeps its probabilities.
        ema_decay: of the averaged weights that are evaluated and saved; None: no average.
        seed: of new weights, order, augmentation and the images that are held out.
        precision: of the forward pass; "fp16" needs a GPU.
        gradient_checkpointing: compute activations again in the backward pass: less memory, same gradients.
        max_minutes: end on time; the schedule then follows the clock too. None: no limit.
        workers: loader processes for each training process.
        log_steps: steps between lines of the log.
        save_steps: steps between checkpoints.
        save_total_limit: checkpoints that are kept.
        channels_last: memory layout of convolutions; faster, the numbers are the same up to rounding.
    """

    batch_size: Count = 16
    mask_annealing: bool | list[list[float]] | None = None
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
    """Test-time augmentation of `maskcls evaluate --multi-scale`.

    Args:
        short_edges: in pixels, one pass each.
        longest_edge: in pixels, at most; None: any.
        flip: each pass also of the mirrored image.
    """

    short_edges: list[Count] = field(default_factory=list)
    longest_edge: Count | None = None
    flip: bool = True


@dataclass
class EvaluationSection:
    """Section `evaluation`: what is scored, and when.

    Args:
        tasks: of "semantic", "panoptic", "instance".
        metrics: names of further metrics, such as those of `register_metric`.
        every_steps: steps between evaluations; None: only the one at the end.
        batch_size: images of a forward pass; None: as in training.
        threshold: of the panoptic map: the least probability of a segment's class; saved with the model, which is then
            run with it. None: 0.5.
        overlap_threshold: of the panoptic map: the least share of a mask that no other takes; saved likewise. None:
            0.8.
        crop: evaluate the middle of images, of this side in pixels; None: whole images.
        bootstrap: replicates for 95 % intervals; 0: none.
        boundary: boundary IoU too.
        multi_scale: for the score with test-time augmentation; not used in training.
    """

    tasks: list[Literal["semantic", "panoptic", "instance"]] = field(default_factory=lambda: ["semantic"])
    metrics: list[str] = field(default_factory=list)
    every_steps: Count | None = 5000
    batch_size: Count | None = None
    threshold: Share | None = None
    overlap_threshold: Share | None = None
    crop: Count | None = None
    bootstrap: Annotated[int, "[0, inf)"] = 0
    boundary: bool = False
    multi_scale: MultiScaleSection | None = None


@dataclass
class Recipe:
    """A training, as [`load_recipe`] reads it.

    Args:
        name: of the file, without its ending.
        doubled: which sections stand twice in the file: no training starts with them.
        paper: the scores to expect.
        data: see [`DataSection`].
        model: see [`ModelSection`].
        image_processor: options of `MaskClsImageProcessor`.
        augmentation: options of `TrainTransform`.
        sampling: see [`SamplingSection`].
        lora: see [`LoraSection`].
        optimizer: see [`OptimizerSection`].
        schedule: see [`ScheduleSection`].
        training: see [`TrainingSection`].
        evaluation: see [`EvaluationSection`].

    Raises:
        ValueError: a value that is out of range; names it.
    """

    name: str = ""
    doubled: tuple[str, ...] = field(default=(), compare=False)
    paper: dict[str, Value] = field(default_factory=dict)
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    image_processor: dict[str, Value] = field(default_factory=dict)
    augmentation: dict[str, Value] = field(default_factory=dict)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    lora: LoraSection = field(default_factory=LoraSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)

    def __post_init__(self) -> None:
        """Raise ValueError for the first value that is out of range."""
        for section in dataclasses.fields(self):
            _require_ranges(section.name, getattr(self, section.name))
        try:
            learning_rate_factor(0, **self.schedule.curve(self.schedule.steps(steps_an_epoch=1)))
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
        """`section.key` of all values that are not those of `other`.

        Examples:
            >>> load_recipe("finetune").differences(load_recipe("finetune", ["training.seed=1"]))
            ['training.seed']
        """
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


def _require_ranges(owner: str, section: Any) -> None:
    """ValueError for the first value of a section that is out of the range that its annotation gives."""
    if not dataclasses.is_dataclass(section):
        return
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        _require_ranges(f"{owner}.{name}", value)
        _require_in_range(f"{owner}.{name}", value, hint)


def _require_in_range(name: str, value: Any, hint: Any) -> None:
    if hasattr(hint, "__metadata__"):
        require_range(name, value, hint.__metadata__[0], integer=hint.__origin__ is int)
    elif isinstance(value, (list, tuple)) and get_origin(hint) in (list, tuple):
        arguments = get_args(hint)
        for i, item in enumerate(value):
            _require_in_range(f"{name}[{i}]", item, arguments[min(i, len(arguments) - 1)])
    elif value is not None:
        for choice in get_args(hint):
            _require_in_range(name, value, choice)


_SECTIONS: dict[str, Any] = {
    name: hint for name, hint in get_type_hints(Recipe).items() if name not in ("name", "doubled")
}

# -- reading -------------------------------------------------------------------------------------------------------


def list_recipes() -> dict[str, str]:
    """Names of the package's recipes, each with the first line of its file."""
    return {path.stem: _headline(path) for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe of the package by its name, or a YAML file by its path.

    A file may name its `base`, another recipe of the package or a file beside it (`NAME.yaml`), and then says only
    what differs: its values replace those of the base key by key, also inside nested values, where null removes the
    base's; `schedule.epochs` also replaces `schedule.max_steps`, and the other way round. Lists replace lists, a
    backbone of another model type replaces the whole backbone, and the scores under `paper` are never inherited.

    Args:
        source: name or path.
        overrides: `"section.key=value"`, the value in YAML; dots lead into nested values
            (`model.backbone_config.depths=[1,1,1,1]`).

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: no valid YAML, an unknown section or key, one that stands twice (in a file, or in the overrides with
            two values), or a value of a wrong type or out of range; the message names file, key and what is known. A
            section that stands twice and does not contradict itself is read, but no training starts with it.

    Examples:
        >>> recipe = load_recipe("finetune", ["optimizer.learning_rate=1e-4", "schedule.max_steps=200"])
        >>> recipe.name, recipe.optimizer.learning_rate, recipe.schedule.max_steps
        ('finetune', 0.0001, 200)
    """
    path = _find(source)
    doubled: list[str] = []
    sections = _read(path, (), doubled)
    _require_distinct(overrides)
    for override in overrides:
        sections = _overridden(sections, override)
    try:
        values = {name: _section(hint, sections[name]) for name, hint in _SECTIONS.items() if name in sections}
        return Recipe(name=path.stem, doubled=tuple(doubled), **values)
    except ValueError as error:
        raise ValueError(f"{' '.join([str(path), *(f'--set {o}' for o in overrides)])}: {error}") from error


def _section(hint: Any, values: dict[str, Any]) -> Any:
    if hint is ModelSection:
        names = ("kind", "backbone_checkpoint", "backbone_weights", "from_scratch")
        own = {name: values[name] for name in names if name in values}
        return ModelSection(**own, config={name: value for name, value in values.items() if name not in own})
    if hint is EvaluationSection and values.get("multi_scale") is not None:
        return EvaluationSection(**values | {"multi_scale": MultiScaleSection(**values["multi_scale"])})
    return cast(Any, hint)(**values) if dataclasses.is_dataclass(hint) else values


def _find(source: str | Path, beside: Path | None = None) -> Path:
    """The file of a recipe: a path, relative to the file `beside`, or a name beside that file or in the package."""
    folder = Path() if beside is None else beside.parent
    if isinstance(source, Path) or Path(source).suffix in (".yaml", ".yml"):
        if (folder / source).is_file():
            return folder / source
        raise FileNotFoundError(f"No recipe file {folder / source}.")
    here = [] if beside is None else [folder / f"{source}.yaml"]
    for path in (*here, RECIPES / f"{source}.yaml"):
        if path.is_file():
            return path
    names = list(list_recipes())
    close = difflib.get_close_matches(source, names, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise FileNotFoundError(
        f"No recipe {source!r}.{hint} Give the path of a YAML file, or one of: {', '.join(names) or '(none)'}."
    )


def _read(path: Path, below: tuple[Path, ...], doubled: list[str]) -> dict[str, dict[str, Any]]:
    """Checked sections of a file, over those of its bases."""
    if path.resolve() in below:
        raise ValueError(f"{path}: the recipe is its own base ({' -> '.join(p.stem for p in (*below, path))}).")
    twice: list[str] = []
    content = read_yaml(path, twice)
    doubled += [f"{path}, {problem}" for problem in twice]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold sections ({', '.join(_SECTIONS)}).")
    given = dict(content)
    base = given.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: base must be the name of a recipe, got {base!r}.")
    try:
        inherited = {} if base is None else _read(_find(base, path), (*below, path.resolve()), doubled)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: base: {error}") from error
    inherited.pop("paper", None)
    return _merged(inherited, given, str(path))


def _require_distinct(overrides: Sequence[str]) -> None:
    """The last one would count, and the first be dropped without a word. So with the two lengths of a training."""
    given: dict[str, str] = {}
    for name, _, text in (override.partition("=") for override in overrides):
        if given.setdefault(name.strip(), text) != text:
            raise ValueError(f"--set {name.strip()} is given twice: {given[name.strip()]} and {text}.")
    lengths = [
        f"schedule.{name}={text}" for name in _LENGTHS if (text := given.get(f"schedule.{name}", "null")) != "null"
    ]
    if len(lengths) > 1:
        raise ValueError(f"--set {' --set '.join(lengths)}: give one of them.")


def _overridden(sections: dict[str, dict[str, Any]], override: str) -> dict[str, dict[str, Any]]:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not 2 <= len(keys) <= DEEPEST or not all(keys):
        raise ValueError(f"--set {override}: must be section.key=value, such as optimizer.learning_rate=1e-4.")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--set {override}: {text!r} is not a value in YAML: {error}") from error
    section, key, *deeper = keys
    whole = sections.get(section, {}).get(key)
    if deeper and whole is not None and not isinstance(whole, Mapping):
        raise ValueError(f"--set {override}: {section}.{key} is {whole!r}, which has no keys.")
    for name in reversed(deeper):
        value = {name: value}
    return _merged(sections, {section: {key: value}}, f"--set {override}")


def _merged(sections: dict[str, dict[str, Any]], given: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """`given` over `sections`, its keys and types checked; `where` it comes from, for messages."""
    merged = dict(sections)
    for name, values in given.items():
        if name not in _SECTIONS:
            raise ValueError(f"{where}: unknown section {name!r}; there are {', '.join(['base', *_SECTIONS])}.")
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: {name} must hold keys and values, got {values!r}.")
        checked = _checked(name, _with_new_names(name, values, where), merged, where)
        base = merged.get(name, {})
        if name == "schedule" and any(checked.get(length) is not None for length in _LENGTHS):
            base = {key: value for key, value in base.items() if key not in _LENGTHS}  # said in the other unit
        merged[name] = {**base, **{k: _over(base.get(k), v) for k, v in checked.items()}}
    return merged


def _over(base: Any, value: Any) -> Any:
    """`value` over `base` where both are mappings; a null inside removes the key."""
    if not isinstance(base, Mapping) or not isinstance(value, Mapping):
        return value
    if value.get("model_type", base.get("model_type")) != base.get("model_type"):
        return value
    merged = {key: _over(base.get(key), inner) for key, inner in value.items() if inner is not None}
    return {key: inner for key, inner in base.items() if key not in value} | merged


def _checked(
    section: str, values: Mapping[str, Any], sections: Mapping[str, dict[str, Any]], where: str
) -> dict[str, Any]:
    hint = _SECTIONS[section]
    hints = get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
    kind = str({**sections.get("model", {}), **values}.get("kind", "mask_classification"))
    hints = {name: hint for name, hint in hints.items() if name != "config"} | hints_of_section(section, kind)
    for key in values:
        if hints:
            _require_known(key, hints, where, section)
    if section == "paper":
        return dict(values)
    return {key: _as_type(value, hints.get(key, Any), where, f"{section}.{key}") for key, value in values.items()}


def _headline(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        return next(lines, "").lstrip("# ").strip()


# -- keys and values ---------------------------------------------------------------------------------------------

NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "keys and values"}
# What no recipe gives, as the data or the training loop does, or nothing uses it.
_OF_OTHERS = {
    "augmentation": ("id2label", "return"),
    "image_processor": (
        "crop_size", "data_format", "device", "disable_grouping", "do_center_crop", "do_reduce_labels", "ignore_index",
        "image_seq_length", "input_data_format", "label_format", "label_ids_to_fuse", "label_offset", "num_labels",
        "return_tensors", "void_id",
    ),
}  # fmt: skip

_RENAMED = {"augmentation": {"colour": "color"}}  # keys of recipes of before -> what they are called now


def _with_new_names(section: str, values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A section with its keys of before under their names of now, with a warning."""
    for old, new in _RENAMED.get(section, {}).items():
        if old in values and new in values:
            raise ValueError(f"{where}: {section}.{old} is the old name of {section}.{new}: give one of the two.")
        if old in values:
            logger.warning(f"{where}: {section}.{old} is called {section}.{new} now; the old name is still read.")
            values = {new if key == old else key: value for key, value in values.items()}
    return values


def hints_of_section(section: str, model_kind: str) -> dict[str, Any]:
    """Keys that a section takes from the code that reads them, and the types of their values.

    Args:
        section: "model", "image_processor" or "augmentation"; {} for others.
        model_kind: "mask_classification" or "per_pixel".
    """
    if section == "model":
        config = KINDS.get(model_kind, KINDS["mask_classification"]).config_class
        own = (f for f in dataclasses.fields(config) if f.name not in PreTrainedConfig.__dataclass_fields__)
        hints = {f.name: f.type for f in own}
        return hints | {"backbone_config": dict | None, "num_queries": int | Literal["num_labels"]}
    if section not in _OF_OTHERS:
        return {}
    hints = get_type_hints(MaskClsImageProcessorKwargs if section == "image_processor" else TrainTransform.__init__)
    return {name: hint for name, hint in sorted(hints.items()) if name not in _OF_OTHERS[section]}


def _require_known(key: Any, known: Collection[str], where: str, owner: str) -> None:
    """ValueError, with the nearest known key, for one that `owner` does not have."""
    if key not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{where}: unknown key {owner}.{key}{hint}; {owner} has {', '.join(sorted(known))}.")


def _as_type(value: Any, hint: Any, where: str, owner: str) -> Any:
    """`value` as `hint` wants it: integers are numbers, lists become tuples. All numbers are finite.

    Args:
        value: of a YAML file.
        hint: Any, a class, `Literal`, a dataclass (the value stays a dict), a list, tuple or mapping of these, or one
            of several.
        where: file, for messages.
        owner: section and key, for messages.

    Raises:
        ValueError: it is of another type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    _require_finite(value, where, owner)
    if hint is Any or (hint is dict and isinstance(value, Mapping)):
        return value
    if value is None and type(None) in arguments:
        return None
    if origin in (Union, UnionType):
        choices = [argument for argument in arguments if argument is not type(None)]
        if len(choices) == 1:
            return _as_type(value, choices[0], where, owner)
        for choice in choices:
            try:
                return _as_type(value, choice, where, owner)
            except ValueError:
                pass
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin in (list, tuple, Sequence) and isinstance(value, (list, tuple)):
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        hints = arguments if fixed else [arguments[0]] * len(value)
        if len(hints) == len(value):
            items = enumerate(zip(value, hints, strict=True))
            made = [_as_type(item, hint, where, f"{owner}[{i}]") for i, (item, hint) in items]
            return tuple(made) if origin is tuple else made
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {
            _as_type(key, arguments[0], where, f"a key of {owner}"): None
            if inner is None
            else _as_type(inner, arguments[1], where, f"{owner}.{key}")
            for key, inner in value.items()
        }
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _checked_fields(value, hint, where, owner)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and is_number and abs(value) <= sys.float_info.max:  # integers can be larger
        return float(value)
    if hint is int and is_number and isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{where}: {owner} is {_shown(value)}, must be below 2^63.")
    if hint in (int, bool, str) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: {owner} is {_shown(value)}, must be {_name(hint)}.")


def _require_finite(value: Any, where: str, owner: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _require_finite(inner, where, f"{owner}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            _require_finite(inner, where, f"{owner}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: {owner} is {value}, must be a finite number.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _checked_fields(value: Mapping[str, Any], hint: Any, where: str, owner: str) -> dict[str, Any]:
    hints = get_type_hints(hint)
    for key in value:
        _require_known(key, hints, where, owner)
    return {key: _as_type(inner, hints[key], where, f"{owner}.{key}") for key, inner in value.items()}


def _name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, UnionType):
        names = dict.fromkeys(_name(argument) for argument in arguments if argument is not type(None))
        return " or ".join(name for name in names if name != NAMES[int] or NAMES[float] not in names)
    if origin in (list, Sequence) or Ellipsis in arguments:
        return f"a list, each {_name(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_name(arguments[0])}"
    return NAMES.get(origin or hint, "keys and values")
