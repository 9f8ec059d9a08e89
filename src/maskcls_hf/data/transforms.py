"""Training augmentation of samples, a function of a seed alone. Images are resampled by torchvision.

Images are (3, H, W) `tv_tensors.Image`, masks `tv_tensors.Mask` of `Segments.pixels`; sizes are (height, width).
Within a transform randomness is torch's global generator, which [`seeded`] sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from transformers.utils import logging

from ..models.options import require_range
from ..models.resampling import resize_nearest
from ..models.segments import NO_SEGMENT
from .sample import Sample

logger = logging.get_logger(__name__)

_Pair = tuple[tv_tensors.Image, tv_tensors.Mask]
_TRIES = 10  # crops looked at for one that is acceptable, as in the paper's code
NEEDED = object()  # an option without default
_CROP = {"crop_size": None, "single_category_limit": 1.0}
_JITTERED_CROP = {"crop_size": NEEDED, "single_category_limit": 1.0, "scale": (0.5, 2.0)}
_SHORTEST_EDGE = {"short_edges": NEEDED, "longest_edge": None}
# Way of resizing -> the options that it reads, with their defaults.
_RESIZE_OPTIONS: dict[str | None, dict[str, Any]] = {
    "crop_first": _JITTERED_CROP,
    "large_scale_jitter": _JITTERED_CROP,
    "shortest_edge": {**_SHORTEST_EDGE, **_CROP},
    "detr": {**_SHORTEST_EDGE, "first_short_edges": (400, 500, 600), "crop_range": (384, 600)},
    None: _CROP,
}
_MEANINGS = {
    "crop_size": "needs pixels, one number or [height, width]",
    "scale": "needs [low, high] with 0 < low <= high",
    "short_edges": "needs a list of lengths in pixels",
    "longest_edge": "needs a length in pixels",
    "first_short_edges": "needs a list of lengths in pixels",
    "crop_range": "needs [low, high] in pixels with 1 <= low <= high",
    "single_category_limit": "needs a share above 0, at most 1",
}


class TrainTransform:
    """Augmentation of one recipe: `transform(sample, seed)` -> another sample.

    Everything random is a function of `seed`, one or several non-negative integers; no global generator moves. Every
    argument but the last is a plain value of a recipe's `augmentation` section. An image may come out smaller
    than the crop, never padded, except with `crop_first`: the image processor pads and marks the padding, where the
    paper's code pads with gray and void.

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
        short_edges: lengths in pixels, of which one is drawn; see `resize`.
        longest_edge: in pixels; see `resize`.
        first_short_edges: lengths in pixels, see `resize`. Default [400, 500, 600].
        crop_range: [low, high] in pixels, see `resize`. Default [384, 600].
        single_category_limit: largest share of a crop's labeled pixels that one class may have; of ten crops the
            first to keep it is taken, or the last. None or 1: off.
        flip: mirror half of the images.
        swap_on_flip: classes that a mirror exchanges, ids or names of `id2label`: `{left_door: right_door}`. Each pair
            once is enough.
        any_orientation: also quarter turns, for images that have no up.
        color: "ssd" (the paper's, see `SSDColor`), or the largest change of brightness, contrast and saturation of
            torchvision's `ColorJitter`, an eighth of it for hue; None: no change.
        any_contrast: also inverted, gray, blurred and stretched contrast, for models that shall work with other
            cameras, stains and microscopes.
        id2label: names of the data set's classes.

    Raises:
        ValueError: an option has no sensible value, is missing, or is one that `resize` does not read; names it.

    Examples:
        >>> from maskcls_hf.data.sample import Segments, as_sample
        >>> segments = Segments.from_class_map(torch.zeros(60, 80, dtype=torch.int64))
        >>> sample = as_sample(torch.zeros(3, 60, 80, dtype=torch.uint8), segments, "gray")
        >>> transform = TrainTransform(32, flip=True, color=None)
        >>> augmented = transform(sample, seed=(0, 1))
        >>> augmented["image"].shape, augmented["segments"].size
        (torch.Size([3, 32, 32]), (32, 32))
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
        color: str | float | None = 0.4,
        any_contrast: bool = False,
        id2label: Mapping[int, str] | None = None,
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
        self.options = _checked_options(resize, {name: value for name, value in given.items() if value is not None})
        self.flip = flip
        self.swapped = class_swaps(swap_on_flip or {}, id2label)
        if flip and swap_on_flip is None:
            _warn_of_sides(id2label or {})
        self.any_orientation = any_orientation
        self.recolor = _recoloring(color, any_contrast)

    def __call__(self, sample: Sample, seed: int | Sequence[int]) -> Sample:
        """Another sample, as `seed` decides.

        Args:
            sample: an image with its segments.
            seed: one or several integers of at least 0.
        """
        segments = sample["segments"]
        with seeded(seed):
            image, mask = sample["image"], tv_tensors.Mask(segments.pixels)
            image, mask = self._resize_and_crop(image, mask, segments.class_labels)
            if self.flip and torch.rand(()) < 0.5:
                image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
                swapped = [self.swapped.get(label, label) for label in segments.class_labels.tolist()]
                segments = replace(segments, class_labels=torch.tensor(swapped, dtype=torch.int64))
            if self.any_orientation:
                image, mask = RandomRotate90()(image, mask)
            image = self._recolored(image)
        return Sample(image=image, segments=segments.with_pixels(mask))

    def _recolored(self, image: tv_tensors.Image) -> tv_tensors.Image:
        if self.recolor is None or not image.is_floating_point():
            return image if self.recolor is None else self.recolor(image)
        # torchvision takes floating point to lie in 0..1, samples of 16-bit files lie in 0..255.
        return tv_tensors.wrap(self.recolor(tv_tensors.wrap(image / 255, like=image)) * 255, like=image)

    def _resize_and_crop(self, image: tv_tensors.Image, ids: tv_tensors.Mask, labels: Tensor) -> _Pair:
        options = self.options
        acceptable = None
        if (limit := options.get("single_category_limit", 1.0)) < 1:
            acceptable = partial(no_class_dominates, class_labels=labels, limit=limit)
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

    def _first_crop_of_detr(self, image: tv_tensors.Image, ids: tv_tensors.Mask) -> _Pair:
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


def stable_seed(*numbers: int) -> int:
    """One 64-bit seed of non-negative integers, the same on every machine.

    Examples:
        >>> stable_seed(0, 1) == stable_seed(0, 1), stable_seed(0, 1) == stable_seed(1, 0)
        (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int | Sequence[int]) -> Iterator[None]:
    """Within, torch's CPU generator starts from `seed`; after it is as before.

    Generators of accelerators are left alone.

    Args:
        seed: one or several integers of at least 0.

    Examples:
        >>> with seeded((0, 7)):
        ...     first = torch.rand(2)
        >>> with seeded((0, 7)):
        ...     print(torch.equal(torch.rand(2), first))
        True
    """
    numbers = (seed,) if isinstance(seed, int) else seed
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the accelerators too, whose dropout would then repeat itself.
        torch.default_generator.manual_seed(stable_seed(*numbers))
        yield


class RandomRotate90(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Turn by 0, 90, 180 or 270 degrees, without resampling, for images that have no up."""

    _transformed_types = (tv_tensors.Image, tv_tensors.Mask)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draws the number of quarter turns, 0 to 3."""
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        """Turns an image or a mask (..., H, W) counterclockwise by `turns` quarters."""
        return tv_tensors.wrap(torch.rot90(inpt, params["turns"], dims=(-2, -1)), like=inpt)


class CenterCrop(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """The middle of a sample or an image, at most `size` x `size` pixels and never padded.

    Args:
        size: in pixels.

    Raises:
        ValueError: `size` is no whole number of at least 1.

    Examples:
        >>> CenterCrop(4)(tv_tensors.Image(torch.zeros(3, 3, 9))).shape
        torch.Size([3, 3, 4])
    """

    def __init__(self, size: int):
        super().__init__()
        require_range("size", size, "[1, inf)", integer=True)
        self.size = size

    def forward(self, *inputs: Any) -> Any:
        """Crops a [`Sample`], or whatever torchvision's transforms take."""
        if not isinstance(inputs[0], dict):
            return super().forward(*inputs)
        image, segments = inputs[0]["image"], inputs[0]["segments"]
        image, mask = super().forward(image, tv_tensors.Mask(segments.pixels))
        return Sample(image=image, segments=segments.with_pixels(mask))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size of the crop: `size`, on a side that is shorter all of it."""
        return {"output_size": [min(self.size, length) for length in v2.query_size(flat_inputs)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crops one image or mask."""
        return self._call_kernel(F.center_crop, inpt, **params)


# Resizing and crops


def resize(image: tv_tensors.Image, mask: tv_tensors.Mask, size: tuple[int, int]) -> _Pair:
    """The image bilinear with antialias, each id as under the pixel's center.

    Args:
        image: (3, H, W).
        mask: (H, W) or (M, H, W), as `Segments.pixels`.
        size: new (height, width).

    Returns:
        Image and mask of the new size.
    """
    resized = resize_nearest(mask.as_subclass(Tensor), (size[0], size[1]))
    return F.resize(image, list(size), antialias=True), tv_tensors.wrap(resized, like=mask)


def random_crop(
    image: tv_tensors.Image,
    ids: tv_tensors.Mask,
    size: Sequence[int],
    acceptable: Callable[[tv_tensors.Mask], bool] | None = None,
) -> _Pair:
    """A window of `size`, on a side that is shorter all of it; the last of `_TRIES` if none is acceptable.

    Args:
        image: (3, H, W).
        ids: mask of the same size.
        size: (height, width) of the window.
        acceptable: looks at the mask of the window; None: any is taken.

    Returns:
        Image and mask of the window.
    """
    full_height, full_width = image.shape[-2:]
    height, width = min(size[0], full_height), min(size[1], full_width)
    for _ in range(_TRIES):
        top = int(torch.randint(full_height - height + 1, ()))
        left = int(torch.randint(full_width - width + 1, ()))
        window = F.crop(ids, top, left, height, width)
        if acceptable is None or acceptable(window):
            break
    return F.crop(image, top, left, height, width), window


def no_class_dominates(mask: tv_tensors.Mask, class_labels: Tensor, limit: float) -> bool:
    """Whether there are two classes at least and none has `limit` or more of the labeled pixels.

    The rule of the paper's code (detectron2's random crop with a constraint on the area of categories).

    Args:
        mask: `Segments.pixels`, of segments of these classes.
        class_labels: (M,).
        limit: share, above 0.
    """
    if mask.dtype == torch.bool:
        counts = mask[:-1].flatten(1).sum(1)
    else:
        counts = torch.bincount(mask.flatten().int() - NO_SEGMENT, minlength=len(class_labels) - NO_SEGMENT)
        counts = counts[-NO_SEGMENT:]
    areas = torch.bincount(class_labels, counts.double())
    return int((areas > 0).sum()) > 1 and float(areas.max()) < limit * float(areas.sum())


def shortest_edge_size(size: Sequence[int], short_edge: int, longest_edge: int | None) -> tuple[int, int]:
    """The size with the given short edge, or a smaller one where the long edge would be too long.

    Args:
        size: (height, width) of the image.
        short_edge: in pixels.
        longest_edge: in pixels; None: any.

    Returns:
        (height, width).

    Examples:
        >>> shortest_edge_size((480, 640), short_edge=240, longest_edge=None)
        (240, 320)
        >>> shortest_edge_size((480, 640), short_edge=480, longest_edge=320)
        (240, 320)
    """
    scale = short_edge / min(size)
    if longest_edge is not None:
        scale = min(scale, longest_edge / max(size))
    return _scaled(size, scale)


def fitted_size(size: Sequence[int], box: Sequence[int], factor: float) -> tuple[int, int]:
    """The largest size of the same shape within `factor` times the box.

    Args:
        size: (height, width) of the image.
        box: (height, width).
        factor: above 0.

    Returns:
        (height, width).

    Examples:
        >>> fitted_size((480, 640), box=(512, 512), factor=0.5)
        (192, 256)
    """
    return _scaled(size, factor * min(box[0] / size[0], box[1] / size[1]))


def window_size(size: Sequence[int], target: Sequence[int], factor: float) -> tuple[int, int]:
    """The window of an image that becomes `target` when enlarged by `factor`, by more where it would not fit.

    Args:
        size: (height, width) of the image.
        target: (height, width) of the training crop.
        factor: above 0.

    Returns:
        (height, width), within the image.

    Examples:
        >>> window_size((1000, 1000), target=(512, 512), factor=2)
        (256, 256)
        >>> window_size((128, 256), target=(512, 512), factor=2)
        (128, 128)
    """
    factor = max(factor, target[0] / size[0], target[1] / size[1])
    height, width = _scaled(target, 1 / factor)
    return min(height, size[0]), min(width, size[1])


def _scaled(size: Sequence[int], scale: float) -> tuple[int, int]:
    return max(1, math.floor(size[0] * scale + 0.5)), max(1, math.floor(size[1] * scale + 0.5))


def uniform(low: float, high: float) -> float:
    """A number of [low, high), drawn by torch's global generator."""
    return low + (high - low) * float(torch.rand(()))


def one_of(values: Sequence[int]) -> int:
    """One of the values, drawn by torch's global generator."""
    return values[int(torch.randint(len(values), ()))]


# Colors


def _recoloring(color: str | float | None, with_any_contrast: bool) -> v2.Transform | None:
    """The changes of color that [`TrainTransform`] is asked for; None: none."""
    steps: list[v2.Transform] = []
    if color == "ssd":
        steps.append(SSDColor())
    elif isinstance(color, int | float) and not isinstance(color, bool) and 0 <= color < math.inf:
        if color > 0:
            steps.append(v2.ColorJitter(color, color, color, min(color / 8, 0.5)))
    elif color is not None:
        raise ValueError(f"color={color!r}: needs 'ssd', a strength of 0 or more, or None.")
    if with_any_contrast:
        steps.append(any_contrast())
    return v2.Compose(steps) if steps else None


class SSDColor(v2.Transform):  # type: ignore[misc]  # torchvision has no types
    """Brightness, contrast, saturation and hue as in the paper's training (detectron2's `ColorAugSSDTransform`).

    Each is changed with probability 1/2: brightness by adding up to +-32 of 255; contrast by a factor of 0.5 to 1.5
    on all channels, before or after the other two; saturation of HSV by a factor of 0.5 to 1.5; hue by up to a tenth
    of the circle (+-18 steps of OpenCV's 180).
    """

    _transformed_types = (tv_tensors.Image,)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the changes; None: the property stays."""
        return {
            "brightness": uniform(-32, 32) if _coin() else None,
            "contrast": uniform(0.5, 1.5) if _coin() else None,
            "saturation": uniform(0.5, 1.5) if _coin() else None,
            "hue": uniform(-0.1, 0.1) if _coin() else None,
            "contrast_first": _coin(),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Changes the colors of one image, see [`ssd_color`]."""
        return tv_tensors.wrap(ssd_color(inpt.as_subclass(Tensor), **params), like=inpt)


def ssd_color(
    image: Tensor,
    brightness: float | None,
    contrast: float | None,
    saturation: float | None,
    hue: float | None,
    contrast_first: bool,
) -> Tensor:
    """Changes brightness, contrast, saturation and hue of an image; None leaves a property as it is.

    Args:
        image: (3, H, W), uint8, or floating point in 0..1.
        brightness: is added, in steps of 1/255 of full scale.
        contrast: factor on all channels.
        saturation: factor on that of HSV, see [`scale_saturation`].
        hue: is added, in parts of the circle.
        contrast_first: whether contrast is changed before saturation and hue, or after them.

    Returns:
        The same shape and type.
    """
    if brightness is not None:
        bound = 1 if image.is_floating_point() else 255
        image = (image + brightness * bound / 255).clamp(0, bound).to(image.dtype)
    if contrast is not None and contrast_first:
        image = F.adjust_brightness(image, contrast)
    if saturation is not None:
        image = scale_saturation(image, saturation)
    if hue is not None:
        image = F.adjust_hue(image, hue)
    if contrast is not None and not contrast_first:
        image = F.adjust_brightness(image, contrast)
    return image


def scale_saturation(image: Tensor, factor: float) -> Tensor:
    """Saturation of HSV times `factor`, at most 1; hue and value stay. torchvision's blends with luma instead.

    Args:
        image: (3, H, W), uint8 or floating point.
        factor: 0 makes it gray, 1 leaves it.

    Examples:
        >>> scale_saturation(torch.tensor([200, 100, 100]).view(3, 1, 1), 0.5).flatten().tolist()
        [200, 150, 150]
    """
    value = image.amax(-3, keepdim=True).float()
    chroma = value - image.amin(-3, keepdim=True)
    factors = (value / chroma).nan_to_num(1).clamp(max=factor)  # value / chroma = 1 / saturation; 0 / 0 is black
    changed = value - factors * (value - image)
    return changed if image.is_floating_point() else changed.round().to(image.dtype)


def any_contrast() -> v2.Transform:
    """Inverted, gray, blurred and stretched contrast: other cameras, stains and microscopes."""
    return v2.Compose(
        [
            v2.RandomAutocontrast(p=0.2),
            v2.RandomInvert(p=0.15),
            v2.RandomGrayscale(p=0.1),
            v2.RandomApply([v2.GaussianBlur(kernel_size=5, sigma=(0.1, 1.5))], p=0.15),
        ]
    )


def _coin() -> bool:
    return bool(torch.rand(()) < 0.5)


# Options


def class_swaps(table: Mapping[int | str, int | str], id2label: Mapping[int, str] | None = None) -> dict[int, int]:
    """Class -> the class that takes its place in a mirrored image, in both directions.

    Args:
        table: pairs of classes, by their ids or by their names.
        id2label: names of the classes; None: ids alone are known.

    Raises:
        ValueError: a class that is not there, whose name several have, that is swapped with itself or with two.

    Examples:
        >>> class_swaps({"left door": "right door"}, {0: "wall", 1: "left door", 2: "right door"})
        {1: 2, 2: 1}
    """
    swaps: dict[int, int] = {}
    for pair in table.items():
        first, second = (_class_id(label, id2label) for label in pair)
        if first == second:
            raise ValueError(f"swap_on_flip swaps class {pair[0]!r} with itself.")
        for label, other in ((first, second), (second, first)):
            if swaps.setdefault(label, other) != other:
                raise ValueError(f"swap_on_flip swaps class {label} with two others, {swaps[label]} and {other}.")
    return swaps


def _class_id(label: int | str, id2label: Mapping[int, str] | None) -> int:
    if isinstance(label, int) and (id2label is None or label in id2label):
        return label
    if id2label is None:
        raise ValueError(f"swap_on_flip names class {label!r}: names need id2label, the names of all classes.")
    ids = [place for place, name in id2label.items() if name == label]
    if len(ids) != 1:
        raise ValueError(
            f"swap_on_flip: {len(ids) or 'no'} classes are called {label!r}. There are: "
            f"{', '.join(f'{place} {name}' for place, name in id2label.items())}."
        )
    return ids[0]


def _warn_of_sides(id2label: Mapping[int, str]) -> None:
    names = {name.lower() for name in id2label.values()}
    sided = sorted(name for name in names if "left" in name and name.replace("left", "right") in names)
    if sided:
        logger.warning(
            f"Images are mirrored, but classes have sides: {', '.join(sided)}. Say what a mirror exchanges, as in "
            f"swap_on_flip={{'{sided[0]}': '{sided[0].replace('left', 'right')}'}} ({{}} for nothing), or flip=False."
        )


def _checked_options(resize: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The options that a way of resizing reads, with defaults filled in."""
    if resize not in _RESIZE_OPTIONS:
        ways = ", ".join(str(way) for way in _RESIZE_OPTIONS)
        raise ValueError(f"resize={resize!r} is not a way of resizing; there are {ways}.")
    defaults = _RESIZE_OPTIONS[resize]
    for name in given:
        if name not in defaults:
            raise ValueError(f"resize={resize!r} reads {', '.join(defaults)}, not {name}: leave it out.")
    options = {**defaults, **given}
    for name, value in options.items():
        if value is NEEDED:
            raise ValueError(f"resize={resize!r} needs {name}.")
        if value is not None and not _sensible(name, value):
            raise ValueError(f"{name}={value!r}: {_MEANINGS[name]}.")
    return options


def _sensible(name: str, value: Any) -> bool:
    if name == "single_category_limit":
        return _is_positive(value, int | float) and value <= 1
    numbers = [value] if name == "longest_edge" else value
    kind = int | float if name == "scale" else int
    if isinstance(numbers, str) or not isinstance(numbers, Sequence) or not numbers:
        return False
    if not all(_is_positive(number, kind) for number in numbers):
        return False
    if name in ("scale", "crop_range"):
        return len(numbers) == 2 and numbers[0] <= numbers[1]
    return name != "crop_size" or len(numbers) == 2


def _is_positive(number: Any, kind: Any) -> bool:
    return isinstance(number, kind) and not isinstance(number, bool) and 0 < number < math.inf
