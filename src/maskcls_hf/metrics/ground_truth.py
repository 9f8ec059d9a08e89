"""Annotations of one image at its original size, as the scores read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.sample import VOID, Sample, void_value
from ..models.run_lengths import MaskRuns, Runs, places_in

NO_SEGMENT = -2  # place of pixels that are annotated as part of no segment, such as the background of COCO instances


@dataclass
class GroundTruth:
    """
    Args:
        labels: class of each segment (M,) int64.
        crowd: (M,) bool, True for crowd regions.
        runs: of a map (H, W) of any signed integers: the place of each pixel's segment in `labels`, `VOID` where it is
            unlabelled, `NO_SEGMENT` where it is in none. None where segments overlap.
        stack: (M, H, W) bool, where segments overlap.
        void: (H, W) bool, unlabelled pixels of a stack. None: there are none.
        name: of the image.
        areas: pixels of each segment (M,) by which small, medium and large are told apart: COCO's files have the areas
            of the polygons. None, or NaN for a segment: those of its mask.
    """

    labels: Tensor
    crowd: Tensor
    runs: Runs | None = None
    stack: Tensor | None = None
    void: Tensor | None = None
    name: str = ""
    areas: Tensor | None = None

    @classmethod
    def from_sample(cls, sample: Sample, void_id: int | None = None) -> GroundTruth:
        """Of a sample of any reader; `void_id` marks unlabelled pixels in a map of classes (None: as in the readers).

        Segments come in the order of `instance_id_to_semantic_id`, or of rising class ids. One without a pixel is a
        segment that no prediction can find, as for panopticapi and pycocotools.

        Raises:
            ValueError: the map holds ids that `instance_id_to_semantic_id` lacks.
        """
        pixels = sample["segmentation_map"].as_subclass(Tensor)
        classes, crowd_ids, name = sample["instance_id_to_semantic_id"], sample["crowd_ids"], sample["name"]
        if pixels.dtype == torch.bool:
            if classes is None:
                raise ValueError(f"{name}: a stack of masks needs instance_id_to_semantic_id, its classes by place.")
            return cls._of_stack(pixels, classes, sample)
        runs = Runs.of(pixels[0].numpy())
        if classes is None:
            void_id = void_value(pixels) if void_id is None else void_id
            classes = {i: VOID if i == void_id else i for i in np.unique(runs.values).tolist()}
        known = list(classes)
        if far := [i for i in known if not -(2**63) <= i < 2**63]:
            raise ValueError(f"{name}: segment ids {far[:5]} have more than 64 bits.")
        place_of_run = places_in(runs.values, known)
        is_there = np.zeros(len(known) + 1, dtype=np.bool_)
        is_there[place_of_run] = True
        if is_there[-1] and (missing := set(runs.values[place_of_run == len(known)].tolist()) - {void_id}):
            raise ValueError(f"{name}: the map holds ids {sorted(missing)[:5]} that instance_id_to_semantic_id lacks.")
        places = np.full(len(known) + 1, VOID, dtype=np.min_scalar_type(-len(known) - 2))
        kept: list[int] = []
        for place, (i, label) in enumerate(classes.items()):
            if label is None:
                places[place] = NO_SEGMENT
            elif label != VOID:
                places[place] = len(kept)
                kept.append(i)
        labels = torch.tensor([classes[i] for i in kept], dtype=torch.int64, device="cpu")
        runs = runs._replace(values=places[place_of_run])
        return cls(labels, _are_crowd(kept, crowd_ids), runs, name=name, areas=_areas(kept, sample))

    @classmethod
    def _of_stack(cls, masks: Tensor, classes: Mapping[int, int | None], sample: Sample) -> GroundTruth:
        kept = [place for place in range(len(masks)) if classes[place] not in (None, VOID)]
        labels = torch.tensor([classes[place] for place in kept], dtype=torch.int64, device="cpu")
        void = masks[[place for place in range(len(masks)) if classes[place] == VOID]].any(0)
        crowd = _are_crowd(kept, sample["crowd_ids"])
        stack = masks if len(kept) == len(masks) else masks[kept]  # without a copy, which would need all its memory
        return cls(labels, crowd, stack=stack, void=void, name=sample["name"], areas=_areas(kept, sample))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        if self.runs is not None:
            return self.runs.shape
        assert self.stack is not None
        return self.stack.shape[-2], self.stack.shape[-1]

    @cached_property
    def masks(self) -> Tensor:
        """(M, H, W) bool."""
        return self.masks_of(range(len(self.labels))) if self.stack is None else self.stack

    @cached_property
    def mask_runs(self) -> list[MaskRuns]:
        """The masks (M,) as runs, whose memory does not grow with the pixels of the image for each."""
        if self.stack is not None:
            return [MaskRuns.of_masks(mask[None])[0] for mask in self.stack]
        return MaskRuns.of_places(self.places.numpy(), len(self.labels))

    def masks_of(self, segments: Sequence[int]) -> Tensor:
        """The masks of some segments, by their places in `labels`: (number, H, W) bool."""
        if self.stack is not None:
            return self.stack[list(segments)]
        return self.places == torch.tensor(segments, dtype=torch.int64, device=self.places.device).view(-1, 1, 1)

    @property
    def visible(self) -> list[int]:
        """Places in `labels` of the segments that have a pixel."""
        return [place for place, mask in enumerate(self.mask_runs) if mask.area]

    @cached_property
    def run_lengths(self) -> list[dict[str, Any]]:
        """The masks (M,) as COCO's encodings; a file can list many more than its map has pixels."""
        empty = MaskRuns(self.size, *np.zeros((2, 0), dtype=np.int64)).rle()
        return [mask.rle() if mask.area else dict(empty) for mask in self.mask_runs]

    @cached_property
    def places(self) -> Tensor:
        """(H, W), the place of each pixel's segment, `VOID` or `NO_SEGMENT`.

        Raises:
            ValueError: segments overlap.
        """
        if self.runs is not None:
            return torch.from_numpy(self.runs.map())
        places = np.full(self.size, NO_SEGMENT, dtype=np.int32)
        if self.void is not None:
            places[self.void.numpy()] = VOID
        for place, mask in enumerate(self.mask_runs):
            box, inside = mask.window()
            part = places[box]
            if (part[inside] >= 0).any():
                raise ValueError(f"{self.name}: segments overlap, so panoptic quality is not defined.")
            part[inside] = place
        return torch.from_numpy(places)

    def semantic_runs(self, void_id: int = 255) -> Runs:
        """`semantic` as runs; where the segments are runs themselves, a class may go on in the next one."""
        if self.runs is None:
            return Runs.of(self.semantic(void_id).numpy())
        labels = torch.where(self.crowd, void_id, self.labels)
        of_places = torch.cat([labels, labels.new_full((2,), void_id)])  # the last two: NO_SEGMENT and VOID
        return self.runs.look_up(of_places.numpy())

    def semantic(self, void_id: int = 255) -> Tensor:
        """Class of each pixel (H, W) int64; `void_id` in no segment and in crowds.

        Raises:
            ValueError: segments of different classes overlap.
        """
        if self.runs is not None:
            return torch.from_numpy(self.semantic_runs(void_id).map())
        labels = torch.where(self.crowd, void_id, self.labels)
        target = np.full(self.size, void_id, dtype=np.int64)
        for mask, label in zip(self.mask_runs, labels.tolist(), strict=True):
            box, inside = mask.window()
            part = target[box]
            if ((part[inside] != void_id) & (part[inside] != label)).any():
                raise ValueError(f"{self.name}: segments of different classes overlap, so no map of classes exists.")
            part[inside] = label
        return torch.from_numpy(target)


def _are_crowd(kept: list[int], crowd_ids: list[int]) -> Tensor:
    known = set(crowd_ids)
    return torch.tensor([i in known for i in kept], dtype=torch.bool, device="cpu")


def _areas(kept: list[int], sample: Sample) -> Tensor | None:
    stated = sample.get("areas")
    return torch.tensor([stated.get(i, math.nan) for i in kept], dtype=torch.float64, device="cpu") if stated else None
