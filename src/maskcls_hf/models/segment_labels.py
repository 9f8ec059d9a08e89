"""Labels of an image: a map of ids, or a stack of masks, becomes segments or a semantic map.

H, W: size of the map. M: number of segments. Every error names the image it is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .image_reading import read_label_map, read_mask_stack
from .label_tensors import naming, read_label_values
from .options import plain
from .resampling import pad, padding, resize_nearest
from .runs import Runs

# What a pixel can be instead of a class. Neither value can come out of the arithmetic on labels.
_VOID = -1
_NO_SEGMENT = -2


@dataclass(frozen=True)
class LabelRules:
    """How label values are read: `class = value - label_offset`; `void_id` and values below the offset are void.

    `void_id=None`: no value is void. `num_labels=None`: the upper end is not checked.
    """

    void_id: int | None = 255
    label_offset: int = 0
    num_labels: int | None = None


class Segments(NamedTuple):
    mask_labels: Tensor  # (M, H, W) bool; or (H, W) int32, the place of each pixel's segment, -1 in none
    class_labels: Tensor  # (M,) int64
    void_mask: Tensor  # (H, W) bool: annotated as void, part of no segment


def read_annotations(
    segmentation_maps: Any, id_to_class: Any, class_labels: Any, image_sizes: Sequence[tuple[int, int]]
) -> list[Annotation]:
    """What a user gives as labels for a batch -> one checked Annotation for each image."""
    count = len(image_sizes)
    if segmentation_maps is None or (id_to_class is not None and class_labels is not None):
        raise ValueError(
            "instance_id_to_semantic_id belongs to maps of instance ids, class_labels to stacks of masks: give "
            "segmentation_maps and one of the two."
        )
    if class_labels is not None and not hasattr(class_labels, "__len__"):
        raise ValueError(f"class_labels must be a list of M label values an image, got {class_labels!r}.")
    if class_labels is not None and _is_flat(class_labels, count):
        class_labels, segmentation_maps = [class_labels], [segmentation_maps]
    maps = _as_list(segmentation_maps, count)
    id_to_class = list(id_to_class) if isinstance(id_to_class, (list, tuple)) else [id_to_class] * count
    values = [None] * count if class_labels is None else list(class_labels)
    named = (("segmentation maps", maps), ("instance_id_to_semantic_id dicts", id_to_class), ("class_labels", values))
    for name, items in named:
        if len(items) != count:
            raise ValueError(f"{count} images but {len(items)} {name}; each image needs its own.")
    annotations = []
    for i, (label_map, mapping, labels, size) in enumerate(zip(maps, id_to_class, values, image_sizes, strict=True)):
        where = f"image {i}"
        with naming(where):
            if label_map is None:
                raise ValueError("there is no segmentation map; an image without segments needs one too, of void_id.")
            classes = None if mapping is None else _class_values(mapping)
            if class_labels is None:
                pixels, values_of_masks = read_label_map(label_map, where), None
            else:
                pixels, values_of_masks = read_mask_stack(label_map, size, where), read_label_values(labels, where)
            if pixels.shape[-2:] != size:
                raise ValueError(_size_message(tuple(pixels.shape), size))
        annotations.append(Annotation(pixels, classes, values_of_masks, where))
    return annotations


def _class_values(id_to_class: Any) -> dict[int, int | None]:
    """Instance id -> label value, as Python's integers; ValueError for what is none."""
    if not isinstance(id_to_class, Mapping):
        raise ValueError(f"instance_id_to_semantic_id must be a dict, got a {type(id_to_class).__name__}.")
    named = plain(dict(id_to_class))
    for segment, value in named.items():
        if isinstance(value, float) and value.is_integer():
            named[segment] = int(value)
        elif value is not None and not isinstance(value, int):
            raise ValueError(f"instance_id_to_semantic_id[{segment!r}]={value!r} must be an integer or None.")
    return named


@dataclass(frozen=True)
class Annotation:
    """Labels of one image.

    pixels: ids (H, W), or a stack of masks (M, H, W) bool with `class_labels`, M label values.
    id_to_class: for a map of instance ids, instance id -> label value, None for no segment.
    """

    pixels: Tensor
    id_to_class: Mapping[int, int | None] | None
    class_labels: Tensor | None
    where: str

    def resized(self, size: tuple[int, int], device: torch.device) -> Annotation:
        return replace(self, pixels=resize_nearest(self.pixels, size).to(device))

    def segments(self, rules: LabelRules, padded_size: tuple[int, int]) -> Segments:
        """Segments in rising order of ids, or in the order of the stack; padding belongs to nothing."""
        if self.class_labels is not None:
            return self._segments_of_stack(rules, padded_size)
        id_map = IdMap.of(self.pixels)
        classes = _classes_of_ids(id_map.ids, rules, self.id_to_class, self.where)
        kept = classes >= 0
        return Segments(id_map.masks(kept, padded_size), classes[kept], _void_of(id_map, classes, padded_size))

    def segment_map(self, rules: LabelRules, padded_size: tuple[int, int]) -> Segments:
        """As `segments`, with a map of places (*padded_size) instead of masks; overlapping masks stay a stack."""
        if self.class_labels is not None:
            segments = self._segments_of_stack(rules, padded_size)
            masks = segments.mask_labels
            overlap = bool(masks.count_nonzero() > masks.any(0).count_nonzero())
            return segments if overlap else _as_map(segments)
        id_map = IdMap.of(self.pixels)
        classes = _classes_of_ids(id_map.ids, rules, self.id_to_class, self.where)
        kept = classes >= 0
        places = id_map.paint((kept.cumsum(0) - 1).masked_fill(~kept, -1).int())
        void = _void_of(id_map, classes, padded_size)
        return Segments(pad(places, padded_size, -1), classes[kept], void)

    def _segments_of_stack(self, rules: LabelRules, padded_size: tuple[int, int]) -> Segments:
        """Without the masks that have no pixel. A mask labelled void marks void where no segment covers it."""
        assert self.class_labels is not None
        stack, values = self.pixels, self.class_labels.to(self.pixels.device)
        if len(values) != len(stack):
            raise ValueError(f"{self.where}: {len(stack)} masks but {len(values)} class_labels.")
        classes = _classes_of_values(values, rules, self.where)
        kept = (classes >= 0) & stack.flatten(1).any(1)
        masks = pad(stack[kept], padded_size)
        void = pad(stack[classes == _VOID].any(0), padded_size) & ~masks.any(0)
        return Segments(masks, classes[kept], void)

    def semantic(self, rules: LabelRules, padded_size: tuple[int, int]) -> Tensor:
        """Class ids (*padded_size) int64; void, no segment and padding are `rules.void_id`."""
        if self.class_labels is not None:
            return self._semantic_of_stack(rules, padded_size)
        id_map = IdMap.of(self.pixels)
        classes = _classes_of_ids(id_map.ids, rules, self.id_to_class, self.where)
        void_id = _semantic_void_id(classes, rules, self.where)
        return pad(id_map.paint(classes.masked_fill(classes < 0, void_id)), padded_size, void_id)

    def _semantic_of_stack(self, rules: LabelRules, padded_size: tuple[int, int]) -> Tensor:
        segments = self._segments_of_stack(rules, padded_size)
        void_id = _semantic_void_id(segments.class_labels, rules, self.where)
        labels = torch.full_like(segments.void_mask, void_id, dtype=torch.int64)
        for mask, class_id in zip(segments.mask_labels, segments.class_labels, strict=True):
            covered = labels[mask]
            if bool(((covered != void_id) & (covered != class_id)).any()):
                raise ValueError(
                    f"{self.where}: masks of different classes overlap (one of class {int(class_id)}); a semantic "
                    "map holds one class a pixel. Remove the overlap or use label_format='segments'."
                )
            labels[mask] = class_id
        return labels


class IdMap(NamedTuple):
    """A map of ids (H, W), of which what is done for each id is not done for each pixel."""

    ids: Tensor  # (I,), rising
    runs: Runs  # places among the ids

    @classmethod
    def of(cls, pixels: Tensor) -> IdMap:
        ids, runs = Runs.of(pixels.cpu().numpy()).numbered()
        return cls(torch.from_numpy(ids).to(pixels.device), runs)

    def masks(self, kept: Tensor, padded_size: tuple[int, int]) -> Tensor:
        """The masks of the kept ids (I,): (number kept, *padded_size) bool."""
        number = int(kept.sum())
        dtype = torch.uint8 if number < 256 else torch.int32
        places = self.paint((kept.cumsum(0) - 1).masked_fill(~kept, number).to(dtype))
        masks, inside = padding((number, *self.runs.shape), padded_size, dtype=torch.bool, device=kept.device)
        if dtype == torch.uint8:
            inside = inside.view(dtype)  # torch compares several times as fast into the dtype that it compares
        torch.eq(places, torch.arange(number, dtype=dtype, device=kept.device).view(-1, 1, 1), out=inside)
        return masks

    def paint(self, values: Tensor) -> Tensor:
        """A value for each id (I,) -> that of each pixel (H, W)."""
        return torch.from_numpy(self.runs.look_up(values.cpu().numpy()).map()).to(values.device)


def _void_of(id_map: IdMap, classes: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """True where the ids, of the given classes (I,), are void: (*padded_size) bool."""
    void = classes == _VOID
    if not void.any():
        return torch.zeros(padded_size, dtype=torch.bool, device=void.device)
    return pad(id_map.paint(void), padded_size)


def _as_map(segments: Segments) -> Segments:
    masks = segments.mask_labels
    places = torch.arange(len(masks), dtype=torch.int32, device=masks.device).view(-1, 1, 1)
    return segments._replace(mask_labels=torch.where(masks, places + 1, 0).sum(0, dtype=torch.int32) - 1)


def _classes_of_ids(ids: Tensor, rules: LabelRules, id_to_class: Mapping[int, int | None] | None, where: str) -> Tensor:
    """Ids of a map (I,) -> classes (I,) int64, _VOID or _NO_SEGMENT.

    What `id_to_class` names is read from there (None: no segment), so that instance 255 can exist although 255
    is the void id of the classes. Of the rest, `void_id` and values below the offset are void.
    """
    ids = ids.long()
    if id_to_class is None:
        return _classes_of_values(ids, rules, where, of_pixels=True)
    values = ids.tolist()
    missing = [v for v in values if v not in id_to_class and v != rules.void_id and v >= rules.label_offset]
    if missing:
        hint = " Its keys are strings; they must be integers." if any(isinstance(k, str) for k in id_to_class) else ""
        raise ValueError(
            f"{where}: instance ids {_shown(missing)} of the map are missing from instance_id_to_semantic_id.{hint} "
            f"Map each to its class, background to None (no segment), unlabelled pixels to void_id={rules.void_id}."
        )
    # an unnamed id is void; its place is filled with a value that needs no check
    named = [id_to_class.get(v) for v in values]
    classes = torch.tensor([rules.label_offset if c is None else c for c in named], device=ids.device)
    classes = _classes_of_values(classes.long(), rules, where)
    for i, (value, class_value) in enumerate(zip(values, named, strict=True)):
        if class_value is None:
            classes[i] = _NO_SEGMENT if value in id_to_class else _VOID
    return classes


def _classes_of_values(values: Tensor, rules: LabelRules, where: str, of_pixels: bool = False) -> Tensor:
    """Label values (I,) -> classes (I,), _VOID for void. `of_pixels`: they are the values of a map themselves."""
    classes = values - rules.label_offset
    void = classes < 0
    if rules.void_id is not None:
        void |= values == rules.void_id
    if rules.num_labels is not None:
        outside = values[(classes >= rules.num_labels) & ~void].tolist()
        if outside:
            raise ValueError(_outside_message(outside, rules.num_labels, rules, where, of_pixels))
    return classes.masked_fill(void, _VOID)


def _outside_message(outside: list[int], num_labels: int, rules: LabelRules, where: str, of_pixels: bool) -> str:
    first, last = rules.label_offset, rules.label_offset + num_labels - 1
    causes = []
    if outside == [last + 1]:
        causes.append(f"the classes are counted from {first + 1}: set label_offset={first + 1}")
    causes += [f"{v} marks unlabelled pixels: set void_id={v}" for v in (255, 65535) if v in outside]
    if of_pixels:
        causes.append("the map holds instance ids: give instance_id_to_semantic_id")
        causes.append("the map was converted from a palette or colour image: open it without .convert()")
    causes.append("num_labels is too small")
    return (
        f"{where}: label ids {_shown(outside)} are outside the {num_labels} classes, whose ids go from "
        f"{first} to {last} (label_offset={rules.label_offset}, void_id={rules.void_id}). "
        f"Likely cause: {'; or '.join(causes)}."
    )


def _semantic_void_id(classes: Tensor, rules: LabelRules, where: str) -> int:
    void_id = rules.void_id
    if void_id is None or void_id < 0 or void_id < (rules.num_labels or 0) or bool((classes == void_id).any()):
        raise ValueError(
            f"{where}: label_format='semantic' writes void_id={void_id} at void and padded pixels, so it must be a "
            "number that is no class id after label_offset; 255 is usual."
        )
    return void_id


def _size_message(shape: tuple[int, ...], image_size: tuple[int, int]) -> str:
    map_size = shape[-2:]
    message = (
        f"the segmentation map is {map_size[0]} x {map_size[1]} but the image is {image_size[0]} x "
        f"{image_size[1]} (height x width); they must be equal."
    )
    if shape[:2] == image_size:
        message += f" The masks come first in a stack, (M, H, W); this one is {shape}."
    if map_size == image_size[::-1]:
        message += " Height and width are swapped: PIL images and files are turned upright by their EXIF orientation."
    return message


def _is_flat(class_labels: Any, num_images: int) -> bool:
    """Whether these are the labels of one image, not a list of them."""
    if isinstance(class_labels, (Tensor, np.ndarray)):
        return class_labels.ndim == 1
    if not len(class_labels):
        return num_images == 1
    return not any(isinstance(v, (list, tuple)) or getattr(v, "ndim", 0) for v in class_labels)


def _as_list(segmentation_maps: Any, num_images: int) -> list[Any]:
    if isinstance(segmentation_maps, (list, tuple)):
        return list(segmentation_maps)
    batch = isinstance(segmentation_maps, (np.ndarray, Tensor)) and segmentation_maps.ndim >= 3
    return list(segmentation_maps) if batch and len(segmentation_maps) == num_images else [segmentation_maps]


def _shown(ids: list[int], limit: int = 10) -> str:
    return str(ids) if len(ids) <= limit else f"{ids[:limit]} and {len(ids) - limit} more"
