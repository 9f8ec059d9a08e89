"""Training augmentation of samples, a function of a seed alone. All resampling is torchvision's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..models.options import require_range
from .augmentation_options import checked_options, class_swaps, warn_of_sides
from .colour import SSDColour, any_contrast
from .resize_and_crop import (
    Pair,
    fitted_size,
    no_class_dominates,
    one_of,
    random_crop,
    resize,
    shortest_edge_size,
    uniform,
    window_size,
)
from .sample import Sample

Classes = dict[int, int | None] | None  # `instance_id_to_semantic_id` of a sample


class TrainTransform:
    """Augmentation of one recipe: `transform(sample, seed)` -> another sample.

    Everything random is a function of `seed`, one or several non-negative integers; no global generator moves. Every
    argument but the last two is a plain value of a recipe's `augmentation` section. An image may come out smaller
    than the crop, never padded, except with `crop_first`: the image processor pads and marks the padding, where the
    paper's code pads with grey and void.

    Args:
        crop_size: of the training crop in pixels, one number or [height, width]; None: no crop.
        resize:
            "crop_first": a random window that becomes `crop_size` when enlarged by a factor of `scale`. The cost does
            not depend on the size of the image. An image smaller than the window is enlarged more.
            "large_scale_jitter": resized to fit into a factor of `scale` times `crop_size`, then cropped (Ghiasi et
            al., Simple Copy-Paste, 2021).
            "shortest_edge": the short edge is one of `short_edges`, the long one `longest_edge` at most, then cropped
            (the paper's semantic recipes).
            "detr": as "shortest_edge" without that crop; half of the images before it get a short edge of
            `first_short_edges` and a crop with sides in `crop_range` (the paper's COCO panoptic recipe).
            None: only the crop.
        scale: bounds of the factor; of "crop_first" relative to the file's pixels and uniform in the logarithm, of
            "large_scale_jitter" uniform. Default [0.5, 2].
        short_edges, longest_edge, first_short_edges, crop_range: see `resize`, in pixels.
        single_category_limit: largest share of a crop's labelled pixels that one class may have; of ten crops the
            first to keep it is taken, or the last. None or 1: off.
        flip: mirror half of the images.
        swap_on_flip: classes that a mirror exchanges, ids or names of `id2label`: `{left_door: right_door}`. Each pair
            once is enough.
        any_orientation: also quarter turns, for images that have no up.
        colour: "ssd" (the paper's, see `SSDColour`), or the largest change of brightness, contrast and saturation of
            torchvision's `ColorJitter`, an eighth of it for hue; None: no change.
        any_contrast: also inverted, grey, blurred and stretched contrast, for models that shall work with other
            cameras, stains and microscopes.
        id2label: names of the data set's classes.
        void_id: of unlabelled pixels in class maps.

    Raises:
        ValueError: an option has no sensible value, is missing, or is one that `resize` does not read; names it.
    """

    def __init__(
        self,
        crop_size: int | Sequence[int] | None = None,
        *,
        resize: str | None = "crop_first",
        scale: Sequence[float] | None = None,
        short_edges: Sequence[int] | None = None,
        longest_edge: int | None = None,
        first_short_edges: Sequence[int] | None = None,
        crop_range: Sequence[int] | None = None,
        single_category_limit: float | None = None,
        flip: bool = True,
        swap_on_flip: Mapping[int | str, int | str] | None = None,
        any_orientation: bool = False,
        colour: str | float | None = 0.4,
        any_contrast: bool = False,
        id2label: Mapping[int, str] | None = None,
        void_id: int = 255,
    ):
        given = {
            "crop_size": [crop_size] * 2 if isinstance(crop_size, int) else crop_size,
            "scale": scale,
            "short_edges": short_edges,
            "longest_edge": longest_edge,
            "first_short_edges": first_short_edges,
            "crop_range": crop_range,
            "single_category_limit": single_category_limit,
        }
        self.resize = resize
        self.options = checked_options(resize, {name: value for name, value in given.items() if value is not None})
        self.flip = flip
        self.swapped = class_swaps(swap_on_flip or {}, id2label)
        if flip and swap_on_flip is None:
            warn_of_sides(id2label or {})
        self.any_orientation = any_orientation
        self.colours = _colour_steps(colour, any_contrast)
        self.void_id = void_id

    def __call__(self, sample: Sample, seed: int | Sequence[int]) -> Sample:
        classes = sample["instance_id_to_semantic_id"]
        with seeded(seed):
            image, ids = self._resize_and_crop(sample["image"], sample["segmentation_map"], classes)
            if self.flip and torch.rand(()) < 0.5:
                image, ids = F.horizontal_flip(image), F.horizontal_flip(ids)
                ids, classes = self._swap_classes(ids, classes)
            if self.any_orientation:
                image, ids = RandomRotate90()(image, ids)
            image = self._recolour(image)
        return Sample(
            image=image,
            segmentation_map=ids,
            instance_id_to_semantic_id=classes,
            crowd_ids=sample["crowd_ids"],
            name=sample["name"],
        )

    def _recolour(self, image: tv_tensors.Image) -> tv_tensors.Image:
        # torchvision takes floating point to lie in 0..1, samples of 16-bit files lie in 0..255.
        if not self.colours or not image.is_floating_point():
            return _applied(self.colours, image)
        return tv_tensors.wrap(_applied(self.colours, tv_tensors.wrap(image / 255, like=image)) * 255, like=image)

    def _resize_and_crop(self, image: tv_tensors.Image, ids: tv_tensors.Mask, classes: Classes) -> Pair:
        options = self.options
        acceptable = None
        if (limit := options.get("single_category_limit", 1.0)) < 1:
            acceptable = partial(no_class_dominates, classes=classes, void_id=self.void_id, limit=limit)
        if self.resize == "crop_first":
            low, high = options["scale"]
            factor = math.exp(uniform(math.log(low), math.log(high)))
            window = window_size(image.shape[-2:], options["crop_size"], factor)
            return resize(*random_crop(image, ids, window, acceptable), options["crop_size"])
        if self.resize == "detr" and torch.rand(()) < 0.5:
            image, ids = self._first_crop_of_detr(image, ids)
        image, ids = resize(image, ids, self._drawn_size(image.shape[-2:]))
        if options.get("crop_size") is not None:
            image, ids = random_crop(image, ids, options["crop_size"], acceptable)
        return image, ids

    def _first_crop_of_detr(self, image: tv_tensors.Image, ids: tv_tensors.Mask) -> Pair:
        short_edge = one_of(self.options["first_short_edges"])
        image, ids = resize(image, ids, shortest_edge_size(image.shape[-2:], short_edge, None))
        low, high = self.options["crop_range"]
        sides = [int(torch.randint(min(low, side), min(high, side) + 1, ())) for side in image.shape[-2:]]
        return random_crop(image, ids, sides)

    def _drawn_size(self, size: Sequence[int]) -> tuple[int, int]:
        """(height, width) to which an image of `size` is resized before the crop."""
        options = self.options
        if self.resize == "large_scale_jitter":
            return fitted_size(size, options["crop_size"], uniform(*options["scale"]))
        if self.resize is None:
            return size[0], size[1]
        return shortest_edge_size(size, one_of(options["short_edges"]), options["longest_edge"])

    def _swap_classes(self, ids: tv_tensors.Mask, classes: Classes) -> tuple[tv_tensors.Mask, Classes]:
        if classes is not None:
            return ids, {
                segment: label if label is None else self.swapped.get(label, label)
                for segment, label in classes.items()
            }
        swapped = ids.as_subclass(torch.Tensor).clone()
        for label, other in self.swapped.items():
            swapped[ids == label] = other
        return tv_tensors.wrap(swapped, like=ids), None


def _colour_steps(colour: str | float | None, with_any_contrast: bool) -> list[v2.Transform]:
    steps: list[v2.Transform] = []
    if colour == "ssd":
        steps.append(SSDColour())
    elif isinstance(colour, int | float) and not isinstance(colour, bool) and 0 <= colour < math.inf:
        if colour > 0:
            steps.append(v2.ColorJitter(colour, colour, colour, min(colour / 8, 0.5)))
    elif colour is not None:
        raise ValueError(f"colour={colour!r}: needs 'ssd', a strength of 0 or more, or None.")
    if with_any_contrast:
        steps.append(any_contrast())
    return steps


def _applied(steps: list[v2.Transform], image: tv_tensors.Image) -> tv_tensors.Image:
    for step in steps:
        image = step(image)
    return image


def stable_seed(*numbers: int) -> int:
    """One 64-bit seed of non-negative integers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int | Sequence[int]) -> Iterator[None]:
    """torch's CPU generator starts from `seed` within, and is as before after."""
    numbers = (seed,) if isinstance(seed, int) else seed
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the accelerators too, whose dropout would then repeat itself.
        torch.default_generator.manual_seed(stable_seed(*numbers))
        yield


class RandomRotate90(v2.Transform):
    """Turn by 0, 90, 180 or 270 degrees, without resampling, for images that have no up."""

    _transformed_types = (tv_tensors.Image, tv_tensors.Mask)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return tv_tensors.wrap(torch.rot90(inpt, params["turns"], dims=(-2, -1)), like=inpt)


class CentreCrop(v2.Transform):
    """The middle of a sample or an image, at most `size` x `size` pixels and never padded."""

    def __init__(self, size: int):
        super().__init__()
        require_range("size", size, "[1, inf)", integer=True)
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"output_size": [min(self.size, length) for length in v2.query_size(flat_inputs)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.center_crop, inpt, **params)
