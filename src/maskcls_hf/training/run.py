"""A recipe on a data set: everything that a training loop needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data import (
    AugmentedDataset,
    CenterCrop,
    EpochSampler,
    MaskClsCollator,
    Sample,
    SegmentationDataset,
    TrainTransform,
    open_dataset,
    repeats_by_area,
)
from ..data.errors import naming_image
from ..data.held_out import Part, divided, draw, has_split, other_validation, training_split
from ..data.sample import without_absent
from ..data.validation.occurrence import refuse_binary_masks, told_of_classes
from ..metrics import Evaluator
from ..models.image_processing_maskcls import MaskClsImageProcessor
from ..models.modeling_maskcls import (
    MaskClsForUniversalSegmentationOutput,
    PerPixelForSemanticSegmentationOutput,
    image_sizes,
)
from ..models.options import require_range
from .build import build_image_processor, build_model, enable_gradient_checkpointing, load_model, upsets_onednn
from .callbacks import ExponentialMovingAverage, TimeBudget
from .lora import add_lora
from .optim import build_optimizer, build_scheduler
from .processes import is_fsdp_wanted, is_main_process
from .recipe import Recipe
from .stopping import shield_workers

logger = logging.get_logger(__name__)


@dataclass
class Run:
    """What [`prepare`] makes of a recipe and a data set.

    Args:
        recipe: that was prepared.
        model: the network, without wrappers.
        image_processor: of the model.
        train_data: augmented samples, whose keys the sampler gives.
        eval_data: samples as they are, or their middles.
        sampler: order of the training.
        train_collator: batches of the training.
        eval_collator: batches of the evaluation, with `ground_truth`.
        optimizer: of the model's parameters.
        scheduler: of the optimizer.
        evaluator: of the recipe's tasks and metrics.
        ema: averaged weights; None: there are none.
        budget: of time, which the scheduler follows.
        batch_size: images of one process and forward pass, in training.
        eval_batch_size: the same in evaluation.
        accumulate: batches that make a step.
        max_steps: of the training.
        held_out: names of the images for evaluation where the data has no split for it; None: it has one.
    """

    recipe: Recipe
    model: Any
    image_processor: MaskClsImageProcessor
    train_data: AugmentedDataset
    eval_data: Dataset[Sample]
    sampler: WholeSteps
    train_collator: MaskClsCollator
    eval_collator: MaskClsCollator
    optimizer: AdamW
    scheduler: LambdaLR
    evaluator: Evaluator
    ema: ExponentialMovingAverage | None
    budget: TimeBudget
    batch_size: int
    eval_batch_size: int
    accumulate: int
    max_steps: int
    held_out: list[str] | None = None

    def loaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """For training and evaluation, for a loop of one's own."""
        workers = self.recipe.training.workers
        options: dict[str, Any] = dict(
            num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available()
        )
        train, evaluation = self.train_collator, self.eval_collator
        return (
            shield_workers(
                DataLoader(self.train_data, self.batch_size, sampler=self.sampler, collate_fn=train, **options)
            ),
            shield_workers(DataLoader(self.eval_data, self.eval_batch_size, collate_fn=evaluation, **options)),
        )

    def averaged(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, the model (without wrappers) has its averaged weights, if the recipe wants an average."""
        return nullcontext() if self.ema is None else self.ema.swapped(model)

    def describe(self) -> str:
        """One line about data, model and steps."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        learning = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        some = "" if learning > parameters / 2 else f", of which {learning / 1e6:.2f} learn"
        images = len(self.train_data), len(self.eval_data)  # type: ignore[arg-type]
        return (
            f"{self.recipe.name}: {images[0]} images for training, {images[1]} for evaluation, "
            f"{len(self.model.config.id2label)} classes; {parameters / 1e6:.2f} million parameters{some}; "
            f"{self.max_steps} steps of {self.recipe.training.batch_size} images"
        )


def prepare(
    recipe: Recipe,
    data: str | Path,
    *,
    model: str | Path | PreTrainedModel | None = None,
    processes: int = 1,
    accumulate: int = 1,
    held_out: Sequence[str] | None = None,
) -> Run:
    """Open the data and build all that the recipe says. The weights of a new model follow `training.seed`.

    Args:
        recipe: what is trained, and how.
        data: folder of the data set.
        model: fine-tune the saved model in this folder, its classes replaced by those of the data; or train this
            network, whatever its class, instead of the recipe's.
        processes: that share the images of a step.
        accumulate: batches of a process that make a step.
        held_out: names of the images for evaluation where the data has no split for it, as a training before has chosen
            them; None: they are chosen now.

    Raises:
        OSError: no such data, split or checkpoint.
        ValueError: what data or recipe have wrong, or where they do not go together.
    """
    _check_settings(recipe, processes, accumulate)
    if model is None and recipe.model.backbone_checkpoint is None and not recipe.model.from_scratch:
        raise ValueError(
            f"Recipe {recipe.name} starts from trained weights: give a saved model (--model FOLDER) or those of a "
            "backbone (--set model.backbone_checkpoint=NAME), or --set model.from_scratch=true."
        )
    train_set, eval_set = open_splits(recipe, data, held_out)
    saved = None if isinstance(model, PreTrainedModel) else model
    image_processor = build_image_processor(
        recipe, saved, train_set.kind, pretrained=model is None, **train_set.processor_fields()
    )
    network = _prepare_model(recipe, train_set.id2label, model)
    settings, crop = recipe.training, recipe.evaluation.crop
    sampler = _build_sampler(recipe, train_set)
    max_steps = recipe.schedule.steps(len(sampler) // settings.batch_size)
    if recipe.schedule.all_warmup_steps >= max_steps:
        logger.warning(
            f"schedule.warmup_steps={recipe.schedule.all_warmup_steps}: of {max_steps} steps none has the full "
            "learning rate."
        )
    batch_size = settings.batch_size // (processes * accumulate)
    train_collator, eval_collator = build_collators(recipe, image_processor)
    fields = dataclasses.asdict(recipe.optimizer)
    del fields["clip_norm"]
    optimizer = build_optimizer(network, **fields)
    budget = TimeBudget(settings.max_minutes)
    run = Run(
        recipe=recipe,
        model=network,
        image_processor=image_processor,
        train_data=AugmentedDataset(train_set, _build_transform(recipe, train_set, image_processor), settings.seed),
        eval_data=eval_set if crop is None else Cropped(eval_set, crop),
        sampler=sampler,
        train_collator=train_collator,
        eval_collator=eval_collator,
        optimizer=optimizer,
        scheduler=build_scheduler(
            optimizer, **recipe.schedule.curve(max_steps), progress=lambda step: budget.progress(step, max_steps)
        ),
        evaluator=build_evaluator(recipe, image_processor, train_set),
        ema=None if settings.ema_decay is None else ExponentialMovingAverage(network, settings.ema_decay),
        budget=budget,
        batch_size=batch_size,
        eval_batch_size=recipe.evaluation.batch_size or batch_size,
        accumulate=accumulate,
        max_steps=max_steps,
        held_out=eval_set.names if isinstance(eval_set, Part) else None,
    )
    _try_evaluation(run)
    return run


def _check_settings(recipe: Recipe, processes: int, accumulate: int) -> None:
    """What can be said without data and model."""
    settings = recipe.training
    if recipe.doubled:
        raise ValueError(f"Recipe {recipe.name}: {'; '.join(recipe.doubled)}. Write each section once.")
    for name, number in (("processes", processes), ("accumulate", accumulate)):
        require_range(name, number, "[1, inf)", integer=True)
    if settings.batch_size % (processes * accumulate):
        raise ValueError(
            f"training.batch_size={settings.batch_size} must be divisible by {processes} processes x {accumulate} "
            "accumulated batches."
        )
    if settings.ema_decay is not None and is_fsdp_wanted():
        raise ValueError("FSDP shares out the weights, but their average needs them whole: training.ema_decay=null.")


def _try_evaluation(run: Run) -> None:
    """Evaluate one image with logits of 0: what fails in the evaluation fails before the first step.

    Raises:
        OSError: the image cannot be read.
        ValueError: what is wrong with the image, the image processor or the options.
    """
    batch = run.eval_collator([run.eval_data[0]])
    cells = [max(1, length // 4) for length in batch["pixel_values"].shape[-2:]]
    classes, number = len(run.model.config.id2label), len(batch["pixel_values"])
    sizes = image_sizes(batch["pixel_values"], batch.get("pixel_mask"))
    sizes["original_sizes"] = batch.get("original_sizes")
    if run.recipe.model.kind == "per_pixel":
        outputs: Any = PerPixelForSemanticSegmentationOutput(logits=torch.zeros(1, classes, *cells), **sizes)
    else:
        outputs = MaskClsForUniversalSegmentationOutput(
            class_queries_logits=torch.zeros(number, 1, classes + 1),
            masks_queries_logits=torch.zeros(number, 1, *cells),
            patch_offsets=batch.get("patch_offsets"),
            **sizes,
        )
    run.evaluator.measure(outputs, batch["ground_truth"])


def _prepare_model(recipe: Recipe, id2label: dict[int, str], given: str | Path | PreTrainedModel | None) -> Any:
    model: Any = given
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.training.seed)
        if not isinstance(given, PreTrainedModel):
            model = build_model(recipe, id2label) if given is None else load_model(recipe, given, id2label)
        if recipe.lora.rank is not None:
            model = add_lora(model, **dataclasses.asdict(recipe.lora), base=_base_of(recipe, given))
    takes_channels_last = not is_fsdp_wanted()  # FSDP takes weights of torch's own layout only
    if recipe.training.channels_last and takes_channels_last and not upsets_onednn(model):
        model.to(memory_format=torch.channels_last)
    if recipe.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def _base_of(recipe: Recipe, given: str | Path | PreTrainedModel | None) -> dict[str, Any]:
    """Where the weights come from that LoRA leaves as they are.

    Raises:
        ValueError: nowhere.
    """
    section = recipe.model
    if isinstance(given, PreTrainedModel):
        return {"model": given.name_or_path}
    if given is None and section.backbone_checkpoint is None:
        raise ValueError(
            f"Recipe {recipe.name}: lora.rank={recipe.lora.rank} keeps the weights of the backbone, which are random: "
            "give a saved model (--model FOLDER) or a backbone's (--set model.backbone_checkpoint=NAME)."
        )
    if given is not None:
        return {"model": str(given)}
    if recipe.lora.modules_to_save is not None:
        raise ValueError(
            f"Recipe {recipe.name}: lora.modules_to_save leaves the rest of a new model random: leave it out, or give "
            "a saved model (--model FOLDER)."
        )
    return {"backbone": section.backbone_checkpoint, "backbone_weights": section.backbone_weights}


def build_collators(recipe: Recipe, image_processor: MaskClsImageProcessor) -> tuple[MaskClsCollator, MaskClsCollator]:
    """For training, and for evaluation."""
    compact: dict[str, Any] = {} if recipe.model.kind == "per_pixel" else {"label_format": "segment_map"}
    resize = recipe.evaluation.crop is None and bool(image_processor.do_resize)
    # Crops are of their own size: neither in windows nor, unless the recipe says so, padded as whole images are.
    cropped: dict[str, Any] = {"do_resize": False, "do_split_image": False}
    if "pad_size" not in recipe.image_processor:
        cropped["pad_size"] = None
    if image_processor.compatibility == "paper" and image_processor.pad_value is None:
        cropped["pad_value"] = 128  # gray, of training alone
    return (
        MaskClsCollator(image_processor, **cropped, **compact),
        MaskClsCollator(image_processor, keep_ground_truth=True, do_resize=resize, **compact),
    )


def _build_transform(
    recipe: Recipe, data: SegmentationDataset, image_processor: MaskClsImageProcessor
) -> TrainTransform:
    """The augmentation of the recipe.

    With `resize: as_evaluated`, `scale` is relative to the size at which the image processor gives images to the
    evaluation, whatever model it came with; else see `TrainTransform`.
    """
    options = dict(recipe.augmentation)
    try:
        if options.get("resize") == "as_evaluated":
            options |= as_evaluated(image_processor, options.pop("scale", (1, 1)), recipe.evaluation.crop is None)
        return TrainTransform(**options, id2label=data.id2label)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Recipe {recipe.name}, section augmentation: {error}") from error


def as_evaluated(image_processor: MaskClsImageProcessor, scale: Sequence[float], whole: bool) -> dict[str, Any]:
    """Options of `TrainTransform` for the size at which the image processor gives images to the evaluation.

    Args:
        image_processor: of the model.
        scale: bounds of the factor on that size.
        whole: False: the evaluation sees a part of each image, and nothing is resized for it.
    """
    if not (image_processor.do_resize and whole):
        return {"resize": "crop_first", "scale": scale}
    size = dict(image_processor.size)
    edges = [edge for name in ("shortest_edge", "height", "width") if (edge := size.get(name))]
    longest = size.get("longest_edge")
    low, high = scale
    factors = np.geomspace(low, high, 11).tolist()
    return {
        "resize": "shortest_edge",
        "short_edges": [round(min(edges) * factor) for factor in factors],
        "longest_edge": longest and round(longest * factors[-1]),
    }


def _build_sampler(recipe: Recipe, data: SegmentationDataset) -> WholeSteps:
    side = recipe.sampling.by_area
    repeats = None if side is None else repeats_by_area(data.sizes(), side)
    return WholeSteps(len(data), recipe.training.seed, repeats=repeats, images_a_step=recipe.training.batch_size)


def build_evaluator(recipe: Recipe, image_processor: MaskClsImageProcessor, data: SegmentationDataset) -> Evaluator:
    """The evaluator of the recipe's section `evaluation`.

    Args:
        recipe: its section `evaluation` counts.
        image_processor: of the model.
        data: has the classes.
    """
    section = recipe.evaluation
    return Evaluator(
        image_processor,
        data.id2label,
        data.stuff_ids,
        tasks=tuple(section.tasks),
        metrics=section.metrics,
        boundary=section.boundary,
        bootstrap=section.bootstrap,
        threshold=section.threshold,
        overlap_threshold=section.overlap_threshold,
    )


# -- the data ------------------------------------------------------------------------------------------------------


def open_splits(
    recipe: Recipe, root: str | Path, held_out: Sequence[str] | None = None
) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and evaluation split; of data without the latter, two parts of the former ([`_hold_out`]).

    Args:
        recipe: its section `data` counts, and `training.seed`.
        root: folder of the data.
        held_out: names of the images for evaluation, as a training before has chosen them; None: they are chosen now.

    Raises:
        FileNotFoundError: no such data or split.
        ValueError: the splits differ in their classes, the recipe's options do not fit the layout, what the recipe
            evaluates is not in the data, masks have 255 for a class, or the images are too few to hold some out.
    """
    section = recipe.data

    def open_split(split: str | None) -> SegmentationDataset:
        return open_dataset(root, split, layout=section.layout, cache=section.cache, **section.options)

    of_data = Path(root), section.layout, section.options
    try:
        if section.val_share is None or not Path(root).is_dir() or has_split(section.eval_split, *of_data):
            train, evaluation = open_split(section.train_split), open_split(section.eval_split)
        else:
            data = open_split(training_split(section.train_split, *of_data))
            train, evaluation = _hold_out(recipe, Path(root), data, held_out)
    except TypeError as error:
        raise ValueError(f"Recipe {recipe.name}, data.options: {error}") from error
    refuse_binary_masks(train, section.train_split)
    if train.id2label != evaluation.id2label:
        names = [set(data.id2label.values()) for data in (train, evaluation)]
        differing = ", ".join(sorted(names[0] ^ names[1])[:5]) or "in another order"
        raise ValueError(
            f"{root}: the splits {section.train_split} and {section.eval_split} have different classes: "
            f"{len(names[0])} and {len(names[1])}, {differing}."
        )
    if train.stuff_ids != evaluation.stuff_ids:
        differing = ", ".join(train.id2label[i] for i in sorted({*train.stuff_ids} ^ {*evaluation.stuff_ids})[:5])
        raise ValueError(
            f"{root}: stuff (isthing 0) in one of the splits {section.train_split} and {section.eval_split}, things in "
            f"the other: {differing}."
        )
    _check_tasks(recipe, train)
    if is_main_process():
        for split, data in {section.train_split: train, section.eval_split: evaluation}.items():
            if told := told_of_classes(data, split):
                logger.warning(told)
    return train, evaluation


def _hold_out(
    recipe: Recipe, root: Path, data: SegmentationDataset, held_out: Sequence[str] | None
) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Two parts of the data, whose second one stands for the split that it lacks."""
    section, seed = recipe.data, recipe.training.seed
    lacks = f"{root} has no split {section.eval_split}"
    if other := other_validation(section.train_split, root, section.layout, section.options):
        raise ValueError(f"{lacks}, but {other}: --set data.eval_split={other}")
    how = "as before"
    if held_out is None:
        how = f"data.val_share={section.val_share}, chosen by training.seed={seed}"
        try:
            held_out = draw(data.names, section.val_share or 0.0, seed)
        except ValueError as error:
            raise ValueError(f"{lacks}, and {error}: label more images, or name a split (data.eval_split).") from error
    train, evaluation = divided(data, held_out)
    if is_main_process():
        logger.warning(
            f"{lacks}: {len(evaluation)} of its {len(data)} images are held out for evaluation ({how}), {len(train)} "
            "are trained on."
        )
    return train, evaluation


def _check_tasks(recipe: Recipe, data: SegmentationDataset) -> None:
    tasks = set(recipe.evaluation.tasks)
    if recipe.model.kind == "per_pixel" and tasks != {"semantic"}:
        raise ValueError(f"A per_pixel model gives semantic maps only: --set evaluation.tasks=[semantic], not {tasks}.")
    if "instance" in tasks and len(data.stuff_ids) == len(data.id2label):
        raise ValueError(
            f"evaluation.tasks has 'instance', but no class of {recipe.data.eval_split} has instances: take it out."
        )


class WholeSteps(EpochSampler):
    """An `EpochSampler` whose epochs end with a whole optimizer step, so that all steps have as many images.

    The images that are left over are others in each epoch.

    Args:
        args: of `EpochSampler`.
        images_a_step: over all processes and accumulated batches.
        kwargs: of `EpochSampler`.

    Raises:
        ValueError: the images do not make one step.

    Examples:
        >>> len(WholeSteps(10, seed=0, images_a_step=4))
        8
    """

    def __init__(self, *args: Any, images_a_step: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.images_a_step = images_a_step
        if not len(self):
            number = super().__len__()
            raise ValueError(
                f"{number} images for training are less than one step of training.batch_size={images_a_step}: "
                f"--set training.batch_size={number} or less."
            )

    def __len__(self) -> int:
        return super().__len__() // self.images_a_step * self.images_a_step

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return islice(super().__iter__(), len(self))


class Cropped(Dataset[Sample]):
    """The middle of the images of a data set.

    Args:
        dataset: any.
        side: in pixels, see [`CenterCrop`].
    """

    def __init__(self, dataset: SegmentationDataset, side: int):
        self.dataset, self.crop = dataset, CenterCrop(side)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        with naming_image(sample["segments"].name, often_named=False):
            return without_absent(self.crop(sample))
