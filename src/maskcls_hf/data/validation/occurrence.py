"""Which classes occur in the annotations of a data set: without them there is nothing to learn and nothing to score."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from ..checks import is_binary
from ..dataset import Kind, SegmentationDataset
from ..errors import naming_image
from ..files import shown, some, unique_ids

STRIDE = 20
LOOKED_AT = 400  # images of a data set, of which a class that is no rarity is in one


def nothing_to_learn(
    found: Collection[int], classes: Mapping[int, str], stuff: Collection[int], kind: Kind, crowds: bool = False
) -> str:
    """Why one cannot learn from annotations in which these classes were found; "": one can.

    Args:
        found: classes of segments that are no crowds.
        classes: names of all classes.
        stuff: those without instances.
        kind: of the data.
        crowds: whether there are crowd regions.

    Examples:
        >>> nothing_to_learn([], {0: "cell"}, stuff=[], kind="instance")
        'no pixel is labeled as any class'
    """
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


def refuse_binary_masks(data: SegmentationDataset, split: str | None = None) -> None:
    """Refuses data in which every map of classes holds 0 and 255 alone, see [`is_binary`].

    Training on them learns nothing. As a rule the first map has another value; only where none has, all are read.

    Args:
        data: any; of instances it passes.
        split: its name, for the message.

    Raises:
        ValueError: says which values to change.
    """
    if data.kind != "semantic" or not is_binary({0, 255}, data.class_names):
        return
    values: set[int] = set()
    for index in sorted(range(len(data)), key=lambda index: index % STRIDE):  # a film may begin with empty images
        with naming_image(data.names[index]):
            ids = data.raw_map(index)
        values.update(() if ids is None else unique_ids(ids))
        if ids is None or not values <= {0, 255}:
            return
    if is_binary(values, data.class_names):
        first, second = sorted(data.class_names)[:2]
        names, of_split = [shown(data.class_names[label]) for label in (first, second)], f" of {split}" if split else ""
        raise ValueError(
            f"The {len(data)} label maps{of_split} hold no other values than 0 and 255, and 255 is read as unlabeled: "
            f"nothing but {names[0]} would be learned. If 255 is {names[1]}, give that class the id "
            f"255 in labels.json (or id2label), or save the maps with {second} in place of 255."
        )


def classes_in(data: SegmentationDataset, index: int) -> set[int]:
    """Classes of an image that are not void, without crowds."""
    segments = data.segments(index)
    return set(segments.class_labels[[i for i in segments.visible if not segments.is_crowd[i]]].tolist())
