"""The data of a recipe: its splits, the order of the images, the part of them that is evaluated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers.utils import logging

from ..data import CenterCrop, EpochSampler, Sample, SegmentationDataset, open_dataset
from ..data.errors import naming_image
from ..data.sample import without_absent
from ..data.validation.occurrence import told_of_classes
from .recipe import Recipe

logger = logging.get_logger(__name__)


def open_splits(recipe: Recipe, root: str | Path) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and evaluation split.

    Raises:
        FileNotFoundError: no such data or split.
        ValueError: the splits differ in their classes, the recipe's options do not fit the layout, or what the
            recipe evaluates is not in the data.
    """
    section = recipe.data
    try:
        train, evaluation = (
            open_dataset(root, split, layout=section.layout, cache=section.cache, **section.options)
            for split in (section.train_split, section.eval_split)
        )
    except TypeError as error:
        raise ValueError(f"Recipe {recipe.name}, data.options: {error}") from error
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
    if int(os.environ.get("RANK", 0)) == 0:
        for split, data in {section.train_split: train, section.eval_split: evaluation}.items():
            if told := told_of_classes(data, split):
                logger.warning(told)
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
    """An `EpochSampler` whose epochs end with a whole optimiser step, so that all steps have as many images.

    The images that are left over are others in each epoch.
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
    """The middle of the images of a data set."""

    def __init__(self, dataset: SegmentationDataset, side: int):
        self.dataset, self.crop = dataset, CenterCrop(side)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        with naming_image(sample["name"], often_named=False):
            sample = without_absent(self.crop(sample))
        sample.pop("areas", None)  # of the whole image
        return sample
