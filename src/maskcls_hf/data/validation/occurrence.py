"""Which classes occur in the annotations of a data set: without them there is nothing to learn and nothing to score."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from ..dataset import Kind, SegmentationDataset
from ..files import some

LOOKED_AT = 400  # images of a data set, of which a class that is no rarity is in one


def nothing_to_learn(
    found: Collection[int], classes: Mapping[int, str], stuff: Collection[int], kind: Kind, crowds: bool = False
) -> str:
    """Why one cannot learn from annotations in which these classes were found, and `crowds`; "": one can."""
    things = set(classes) - set(stuff)
    if not found and crowds:
        return (
            "all segments are crowd regions, which are not learned: set iscrowd to 0 where each is one object (CVAT "
            "exports brush masks as crowds)"
        )
    if not found:
        return "no pixel is labeled as any class"
    if kind != "semantic" and things and not things & set(found):
        return f"no instance of {'any class' if len(things) > 1 else classes[min(things)]}, but for crowds"
    return ""


def told_of_classes(data: SegmentationDataset, split: str | None) -> str:
    """What a user should know before a training or an evaluation: as [`nothing_to_learn`], or classes that never occur.

    At most `LOOKED_AT` images are looked at, evenly chosen, and only until all classes have been seen.
    """
    found: set[int] = set()
    chosen = np.unique(np.linspace(0, len(data) - 1, LOOKED_AT).round().astype(int)).tolist()
    for index in chosen:
        found |= classes_in(data, index)
        if len(found) == len(data.id2label):
            return ""
    images = f"{'all' if len(chosen) == len(data) else len(chosen)} of the {len(data)} images of {split or 'the data'}"
    crowds = not found and any(bool(data.segments(index).is_crowd.any()) for index in chosen)
    if problem := nothing_to_learn(found, data.id2label, data.stuff_ids, data.kind, crowds):
        return f"There is nothing to learn or to score in {images}: {problem}. `maskcls validate` tells more."
    absent = [name for label, name in data.id2label.items() if label not in found]
    if len(found) == 1:
        return f"Every labeled pixel in {images} is {data.id2label[min(found)]}; never: {some(absent, 10)}."
    if len(chosen) == len(data):
        return f"{len(absent)} of {len(data.id2label)} classes never occur in {images}: {some(absent, 10)}."
    return ""


def classes_in(data: SegmentationDataset, index: int) -> set[int]:
    """Classes of an image that are not void, without crowds."""
    segments = data.segments(index)
    return set(segments.class_labels[[i for i in segments.visible if not segments.is_crowd[i]]].tolist())
