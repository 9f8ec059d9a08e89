"""Which segments of an image have no pixel left at training resolution."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from transformers.image_utils import SizeDict

from ...models.resampling import resize_nearest, resized_size
from ...models.run_lengths import MaskRuns
from ..files import unique_ids


def _smaller_size(size: tuple[int, int], training_size: Mapping[str, int] | None) -> tuple[int, int] | None:
    """Size (height, width) after the image processor's resize; None where no pixel can get lost in it."""
    if training_size is None:
        return None
    new = resized_size(size, SizeDict(**training_size))
    return new if new[0] < size[0] or new[1] < size[1] else None


def vanished(ids: np.ndarray, training_size: Mapping[str, int] | None) -> set[int]:
    """Ids of a map (H, W) that have no pixel after the resize, by the nearest pixel as in the image processor."""
    height, width = ids.shape
    new = _smaller_size((height, width), training_size)
    if new is None:
        return set()
    values = torch.from_numpy(np.ascontiguousarray(ids))
    return set(unique_ids(values)) - set(unique_ids(resize_nearest(values, new)))


def vanished_masks(masks: list[MaskRuns], size: tuple[int, int], training_size: Mapping[str, int] | None) -> set[int]:
    """Places of the masks that have no pixel after the resize.

    Args:
        masks: segments of an image.
        size: (height, width) of the image.
        training_size: of the image processor; None: nothing is resized.
    """
    new = _smaller_size(size, training_size)
    if new is None:
        return set()
    rows, columns = (resize_nearest(torch.arange(size[i]).view(-1, 1), (new[i], 1))[:, 0].numpy() for i in (0, 1))
    lost = set()
    for place, mask in enumerate(masks):
        left, top, width, height = mask.box
        inside = np.ix_(
            rows[(rows >= top) & (rows < top + height)] - top,
            columns[(columns >= left) & (columns < left + width)] - left,
        )
        samples = inside[0].size * inside[1].size
        # a mask that fills more of its box than the samples leave free has one of them: no need to draw it
        surely_kept = samples > width * height - mask.area
        if not surely_kept and not (samples and mask.window()[1][inside].any()):
            lost.add(place)
    return lost
