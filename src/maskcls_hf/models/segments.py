"""The segments of an image: one type for annotations, targets and predictions, and the ways into and out of it.

H, W: size of the image. M: number of segments. Every error names the image it is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .image_reading import read_label_map, read_mask_stack
from .options import naming, plain, read_label_values
from .resampling import pad, padding, resize_nearest
from .run_lengths import MaskRuns, Runs, as_array, places_in

# What a pixel of an index map can be instead of a segment, and a label value instead of a class.
VOID = -1  # unlabeled
NO_SEGMENT = -2  # annotated as part of no segment, such as the background of COCO instances


def void_id_of(num_labels: int) -> int:
    """Value of unlabeled pixels in maps of so many classes: 255, or 65535 where 255 is a class.

    Examples:
        >>> void_id_of(150), void_id_of(1000)
        (255, 65535)
    """
    return 255 if num_labels <= 255 else 65535


@dataclass(eq=False)
class Segments:
    """The segments of one image, annotated or predicted.

    A segment without a pixel is one that no prediction finds, and no target.

    Args:
        class_labels: class of each segment (M,) int64.
        masks: an index map (H, W), the place of each pixel's segment in `class_labels`, `VOID` or `NO_SEGMENT`, or its
            `Runs`; where segments overlap, a stack (M, H, W) bool, or M run lengths, `MaskRuns` or COCO's compressed
            ones. Other forms are made when they are asked for, and dropped when pickled.
        is_crowd: (M,) bool, regions of many instances: void in training, to scores what COCO's rules say. None: none.
        areas: pixels of each segment (M,) by which small, medium and large are told apart: COCO's files have the areas
            of the polygons. None, or NaN for a segment: those of its mask.
        scores: of predicted segments (M,), in the order of which instances are ranked.
        ids: of the file or of the model, one a segment.
        size: height and width; needed where there is no mask.
        name: of the image, for messages.
        void: (H, W) bool, unlabeled pixels where masks are no index map. None: there are none.

    Raises:
        ValueError: the numbers of masks, classes, scores, ... differ.

    Examples:
        >>> segments = Segments(class_labels=torch.tensor([1, 0]), masks=torch.tensor([[0, 0, 1], [0, VOID, 1]]))
        >>> segments.semantic_map(void_id=255).tolist()
        [[1, 1, 0], [1, 255, 0]]
        >>> [mask.area for mask in segments.mask_runs]
        [3, 2]
    """

    class_labels: Tensor
    masks: Runs | Tensor | NDArray[Any] | Sequence[MaskRuns | Mapping[str, Any]]
    is_crowd: Tensor = None  # type: ignore[assignment]  # always a tensor once made
    areas: Tensor | None = None
    scores: Tensor | None = None
    ids: Sequence[int] | None = None
    size: tuple[int, int] = None  # type: ignore[assignment]
    name: str = ""
    void: Tensor | None = None

    def __post_init__(self) -> None:
        self.class_labels = torch.from_numpy(as_array(self.class_labels).astype(np.int64))
        number = len(self.class_labels)
        if self.is_crowd is None:
            self.is_crowd = torch.zeros(number, dtype=torch.bool, device="cpu")
        if isinstance(self.masks, np.ndarray):
            self.masks = torch.from_numpy(self.masks)
        if isinstance(self.masks, Runs):
            self.size = self.masks.shape
        elif isinstance(self.masks, Tensor):
            self.size = (self.masks.shape[-2], self.masks.shape[-1])
        elif len(self.masks):
            first = self.masks[0]
            self.size = tuple(first["size"] if isinstance(first, Mapping) else first.size)
        scores = number if self.scores is None else len(self.scores)
        masks = number if self.is_map else len(self.masks)
        if not masks == number == scores == len(self.is_crowd):
            raise ValueError(
                f"{self.name}: {masks} masks, {number} class labels, {scores} scores and {len(self.is_crowd)} flags of "
                "crowds must be equally many."
            )

    def __len__(self) -> int:
        return len(self.class_labels)

    # -- forms of the masks ----------------------------------------------------------------------------------------

    @property
    def is_map(self) -> bool:
        """Whether masks are stored as an index map or its runs."""
        return isinstance(self.masks, Runs) or (isinstance(self.masks, Tensor) and self.masks.ndim == 2)

    @cached_property
    def runs(self) -> Runs:
        """Of the index map.

        Raises:
            ValueError: segments overlap, or the map has places of no segment.
        """
        runs = self.masks if isinstance(self.masks, Runs) else Runs.of(as_array(self.index_map))
        if runs.values.size and not NO_SEGMENT <= runs.values.min() <= runs.values.max() < len(self):
            raise ValueError(f"{self.name}: the index map holds places outside its {len(self)} segments.")
        return runs

    @cached_property
    def index_map(self) -> Tensor:
        """(H, W), of the smallest type of integers.

        Raises:
            ValueError: segments overlap.
        """
        if isinstance(self.masks, Tensor) and self.masks.ndim == 2:
            return self.masks
        if isinstance(self.masks, Runs):
            dtype = np.min_scalar_type(-len(self) - 2)
            return torch.from_numpy(self.runs.look_up(_table(np.arange(len(self)), dtype)).map())
        if self._painted is None:
            said = "segments overlap, so that no map holds them; stack and mask_runs do."
            raise ValueError(f"{self.name}: {said}" if self.name else said)
        return self._painted

    @cached_property
    def _painted(self) -> Tensor | None:
        """The index map of a stack or of run lengths; None where they overlap."""
        places = np.full(self.size, NO_SEGMENT, dtype=np.min_scalar_type(-len(self) - 2))
        if self.void is not None:
            places[as_array(self.void)] = VOID
        for place, mask in enumerate(self.mask_runs):
            box, inside = mask.window()
            part = places[box]
            if (part[inside] >= 0).any():
                return None
            part[inside] = place
        return torch.from_numpy(places)

    @cached_property
    def mask_runs(self) -> list[MaskRuns]:
        """(M,), whose memory does not grow with the pixels of the image for each."""
        if self.is_map:
            return MaskRuns.of_places(as_array(self.index_map), len(self))
        if isinstance(self.masks, Tensor):
            return [MaskRuns.of_masks(mask[None])[0] for mask in self.masks]
        masks: Any = self.masks
        return [mask if isinstance(mask, MaskRuns) else MaskRuns.of_rle(mask) for mask in masks]

    @cached_property
    def run_lengths(self) -> list[dict[str, Any]]:
        """COCO's compressed run lengths (M,); a file can list many more segments than its map has pixels."""
        if not isinstance(self.masks, (Runs, Tensor)) and all(isinstance(mask, Mapping) for mask in self.masks):
            return list(self.masks)  # as they were read
        empty = MaskRuns(self.size, *np.zeros((2, 0), dtype=np.int64)).rle()
        return [mask.rle() if mask.area else dict(empty) for mask in self.mask_runs]

    @property
    def stack(self) -> Tensor:
        """(M, H, W) bool."""
        if isinstance(self.masks, Tensor) and self.masks.ndim == 3:
            return self.masks
        return self._stack(len(self))

    def _stack(self, number: int) -> Tensor:
        """(number, H, W) bool, the masks and more that are empty."""
        stack = np.zeros((number, *self.size), dtype=bool)  # zeros that nothing is written to take no memory
        for place, mask in enumerate(self.mask_runs):
            box, inside = mask.window()
            stack[place][box] = inside
        return torch.from_numpy(stack)

    @property
    def visible(self) -> list[int]:
        """Places in `class_labels` of the segments that have a pixel."""
        if self.is_map:
            return [place for place in np.unique(self.runs.values).tolist() if place >= 0]
        return [place for place, mask in enumerate(self.mask_runs) if mask.area]

    @cached_property
    def overlap(self) -> bool:
        """Whether a pixel is in two segments."""
        if isinstance(self.masks, Tensor) and self.masks.ndim == 3:
            return _overlap(self.masks)
        return not self.is_map and self._painted is None

    # -- maps of classes -------------------------------------------------------------------------------------------

    def semantic_runs(self, void_id: int = 255) -> Runs:
        """`semantic_map` as runs; where the segments are runs themselves, a class may go on in the next one."""
        if not self.is_map:
            return Runs.of(as_array(self.semantic_map(void_id)))
        labels = as_array(torch.where(self.is_crowd, void_id, self.class_labels))
        return self.runs.look_up(_table(labels, np.int64, void_id, void_id))

    def semantic_map(self, void_id: int = 255) -> Tensor:
        """Class of each pixel (H, W) int64; `void_id` in no segment and in crowds.

        Raises:
            ValueError: segments of different classes overlap.
        """
        if self.is_map:
            return torch.from_numpy(self.semantic_runs(void_id).map())
        target = np.full(self.size, void_id, dtype=np.int64)
        for mask, label, is_crowd in zip(
            self.mask_runs, self.class_labels.tolist(), self.is_crowd.tolist(), strict=True
        ):
            box, inside = mask.window()
            part = target[box]
            if not is_crowd:
                if ((part[inside] != void_id) & (part[inside] != label)).any():
                    raise ValueError(
                        f"{self.name}: segments of different classes overlap (one of class {label}), but a map of "
                        "classes has one a pixel: remove the overlap, or use segments (label_format='segments')."
                    )
                part[inside] = label
        return torch.from_numpy(target)

    @property
    def records(self) -> list[dict[str, Any]]:
        """Of each segment its place as `id`, `label_id`, `area` in pixels, and `score` where there are scores; as
        pictures need them beside the index map.
        """
        scores = [None] * len(self) if self.scores is None else self.scores.tolist()
        return [
            dict(id=place, label_id=label, area=mask.area) | ({} if score is None else dict(score=score))
            for place, (label, mask, score) in enumerate(
                zip(self.class_labels.tolist(), self.mask_runs, scores, strict=True)
            )
        ]

    # -- other segments --------------------------------------------------------------------------------------------

    def select(self, places: Sequence[int]) -> Segments:
        """Some of the segments; pixels of the others are in none."""
        kept = torch.tensor(places, dtype=torch.int64, device="cpu")
        masks: Any
        if self.is_map:
            new = np.full(len(self), NO_SEGMENT, dtype=np.int64)
            new[as_array(kept)] = np.arange(len(kept))
            masks = self.runs.look_up(_table(new, np.int64))
        else:
            masks = self.masks[kept] if isinstance(self.masks, Tensor) else [self.masks[place] for place in places]
        return replace(
            self,
            masks=masks,
            class_labels=self.class_labels[kept],
            is_crowd=self.is_crowd[kept],
            areas=None if self.areas is None else self.areas[kept],
            scores=None if self.scores is None else self.scores[kept],
            ids=None if self.ids is None else [self.ids[place] for place in places],
        )

    def drawn(self, places: Iterable[int]) -> Segments:
        """Without overlap: some segments, each drawn over those before it; pixels of the others are in none."""
        index_map = np.full(self.size, NO_SEGMENT, dtype=np.min_scalar_type(-len(self) - 2))
        for place in places:
            self.mask_runs[place].paint(index_map, place)
        return replace(self, masks=index_map, void=None)

    @property
    def pixels(self) -> Tensor:
        """What transforms of pixels need: the index map (1, H, W), or where segments overlap a stack of their masks
        and, last, what is void: (M + 1, H, W) bool.
        """
        if not self.overlap:
            return self.index_map[None]
        pixels = self._stack(len(self) + 1)
        if self.void is not None:
            pixels[-1] = self.void
        return pixels

    def with_pixels(self, pixels: Tensor) -> Segments:
        """The same segments with changed `pixels`. Stated areas are of the whole image, and dropped."""
        pixels = pixels.as_subclass(Tensor)
        if pixels.dtype == torch.bool:
            return replace(self, masks=pixels[:-1], void=pixels[-1], areas=None)
        return replace(self, masks=pixels[0], void=None, areas=None)

    def resized(self, size: tuple[int, int], device: torch.device | str = "cpu") -> Segments:
        """Each pixel of (*size) is in the segment under its center."""
        return self if size == self.size else self.with_pixels(resize_nearest(self.pixels, size).to(device))

    # -- ways in ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_ids(
        cls,
        pixels: Tensor | NDArray[Any] | Runs,
        classes: Mapping[int, int | None],
        crowd_ids: Collection[int] = (),
        areas: Mapping[int, float] | None = None,
        name: str = "",
    ) -> Segments:
        """Of a map of ids (H, W) or its runs, or a stack of masks (M, H, W) bool whose ids are their places.

        Args:
            pixels: the ids.
            name: of the image, for messages.
            classes: id -> class; `VOID`: its pixels are unlabeled; None: they are in no segment. The segments come in
                this order.
            crowd_ids: ids of crowd regions.
            areas: id -> stated area.

        Raises:
            ValueError: the map holds ids that `classes` lacks.
        """
        labeled = [i for i, label in classes.items() if label is not None and label != VOID]
        known, void = set(crowd_ids), None
        masks: Runs | Tensor
        if not isinstance(pixels, Runs) and as_array(pixels).dtype == np.bool_:
            stack = torch.from_numpy(as_array(pixels))
            labeled = [i for i in labeled if i < len(stack)]
            masks = stack if labeled == list(range(len(stack))) else stack[labeled]  # a copy needs all its memory
            void = stack[[i for i in range(len(stack)) if classes[i] == VOID]].any(0)
        else:
            runs = pixels if isinstance(pixels, Runs) else Runs.of(as_array(pixels))
            masks = _runs_of_places(runs, classes, name)
        return cls(
            torch.tensor([classes[i] for i in labeled], dtype=torch.int64, device="cpu"),
            masks,
            torch.tensor([i in known for i in labeled], dtype=torch.bool, device="cpu"),
            None
            if not areas
            else torch.tensor([areas.get(i, math.nan) for i in labeled], dtype=torch.float64, device="cpu"),
            ids=labeled,
            name=name,
            void=void,
        )

    @classmethod
    def from_class_map(
        cls, class_map: Tensor | NDArray[Any] | Runs, void_id: int | None = None, name: str = ""
    ) -> Segments:
        """Of a map of classes (H, W) or its runs, each class a segment; `void_id` (None: -1) marks unlabeled pixels.

        Args:
            class_map: class id at each pixel.
            void_id: value of unlabeled pixels.
            name: of the image, for messages.

        Raises:
            ValueError: it is no map of integers.

        Examples:
            >>> Segments.from_class_map(torch.tensor([[3, 3], [7, 255]]), void_id=255).class_labels
            tensor([3, 7])
        """
        if not isinstance(class_map, Runs):
            ids = as_array(class_map)
            if ids.ndim != 2 or ids.dtype.kind not in "iub":
                raise ValueError(f"{name} is a map of {ids.dtype}, class ids are integers (H, W).".lstrip())
            class_map = Runs.of(ids)
        labels, runs = class_map.numbered()
        is_class = labels != (VOID if void_id is None else void_id)
        places = np.where(is_class, np.cumsum(is_class) - 1, VOID)
        labels = labels[is_class].astype(np.int64)
        return cls(torch.from_numpy(labels), runs.look_up(places), ids=labels.tolist(), name=name)

    @classmethod
    def from_output(cls, found: Any, name: str = "") -> Segments:
        """Of what the image processor's post-processing or a `Predictor` gives for an image.

        Args:
            name: of the image, for messages.
            found: a map of classes (H, W); or a dict with `segments_info`, records with `id`, `label_id` (and `score`),
                and their pixels: `masks`, run lengths, or `segmentation`, a map of ids (H, W), a stack (M, H, W) of
                masks or COCO's run lengths, one a record. Ids below 1 that `segments_info` lacks are no segment.

        Raises:
            ValueError: the map holds ids that `segments_info` lacks, or this names one twice.
        """
        if isinstance(found, Segments):
            return found
        if not isinstance(found, Mapping):
            return cls.from_class_map(found, name=name)
        infos = found["segments_info"]
        masks = found["masks"] if "masks" in found else found["segmentation"]
        labels = torch.tensor([info["label_id"] for info in infos], dtype=torch.int64, device="cpu")
        scores = None
        if all("score" in info for info in infos):
            scores = torch.tensor([info["score"] for info in infos], dtype=torch.float64, device="cpu")
        ids = [int(info["id"]) for info in infos]
        if isinstance(masks, (Tensor, np.ndarray)) and masks.ndim == 2:
            if len(set(ids)) < len(ids):
                raise ValueError(f"{name}: segments_info names an id twice: {sorted(ids)}.")
            runs = Runs.of(as_array(masks))
            places = places_in(runs.values, ids)
            unknown = runs.values[(places == len(ids)) & ~(runs.values <= 0)]  # NaN too
            if unknown.size:
                some = np.unique(unknown)[:5].tolist()
                raise ValueError(f"{name}: the predicted map holds ids {some} that segments_info lacks.")
            masks = runs._replace(values=np.where(places == len(ids), NO_SEGMENT, places))
        size = found.get("size") or getattr(found["segmentation"], "shape", (0, 0))[-2:]
        return cls(labels, masks, scores=scores, ids=ids, size=tuple(size), name=name)

    # -- ways out --------------------------------------------------------------------------------------------------

    def targets(
        self,
        padded_size: tuple[int, int],
        as_map: bool = False,
        device: torch.device | str = "cpu",
        keep_emptied: bool = False,
    ) -> dict[str, Tensor]:
        """What a model trains on: `mask_labels` (M', *padded_size) bool, `class_labels` (M',), `void_mask`.

        Segments without a pixel are left out unless `keep_emptied`, crowds and unlabeled pixels are void, padding is
        neither.

        Args:
            padded_size: height and width of the network's input.
            device: of the result.
            keep_emptied: also segments without a pixel.
            as_map: `mask_labels` (*padded_size) int32, the place of each pixel's segment, -1 in none, unless segments
                overlap.
        """
        if not self.is_map:
            found = self._targets_of_stack(padded_size, device, keep_emptied)
            masks = found["mask_labels"]
            return found | {"mask_labels": _as_map(masks)} if as_map and not _overlap(masks) else found
        runs = self.runs
        is_there = np.zeros(len(self) + 2, dtype=bool)
        is_there[runs.values] = True  # the last two places: NO_SEGMENT and VOID
        crowd = as_array(self.is_crowd)
        kept = (is_there[:-2] | keep_emptied) & ~crowd
        number = int(kept.sum())
        class_labels = self.class_labels[torch.from_numpy(kept)].to(device)
        void_mask = torch.zeros(padded_size, dtype=torch.bool, device=device)
        if is_there[VOID] or (is_there[:-2] & crowd).any():
            void = torch.from_numpy(runs.look_up(_table(crowd, np.bool_, False, True)).map()).to(device)
            void_mask[: self.size[0], : self.size[1]] = void
        outside = -1 if as_map else number
        dtype = np.int32 if as_map or number >= 256 else np.uint8
        places = np.where(kept, np.cumsum(kept) - 1, outside)
        pixels = torch.from_numpy(runs.look_up(_table(places, dtype, outside, outside)).map()).to(device)
        if as_map:
            return dict(mask_labels=pad(pixels, padded_size, -1), class_labels=class_labels, void_mask=void_mask)
        masks, inside = padding((number, *self.size), padded_size, dtype=torch.bool, device=pixels.device)
        if dtype == np.uint8:
            inside = inside.view(torch.uint8)  # torch compares several times as fast into the dtype that it compares
        torch.eq(pixels, torch.arange(number, dtype=pixels.dtype, device=pixels.device).view(-1, 1, 1), out=inside)
        return dict(mask_labels=masks, class_labels=class_labels, void_mask=void_mask)

    def _targets_of_stack(
        self, padded_size: tuple[int, int], device: torch.device | str, keep_emptied: bool
    ) -> dict[str, Tensor]:
        """A crowd or unlabeled pixels mark void where no segment covers them."""
        stack, crowd = self.stack.to(device), self.is_crowd.to(device)
        kept = ~crowd & (stack.flatten(1).any(1) | keep_emptied)
        masks, void = stack[kept], stack[crowd].any(0)
        if self.void is not None:
            void |= self.void.to(device)
        void &= ~masks.any(0)
        return dict(
            mask_labels=pad(masks, padded_size),
            class_labels=self.class_labels.to(device)[kept],
            void_mask=pad(void, padded_size),
        )

    def semantic_targets(
        self, padded_size: tuple[int, int], void_id: int | None, num_labels: int | None, device: torch.device | str
    ) -> Tensor:
        """Class ids (*padded_size) int64; void, no segment and padding are `void_id`, which must be no class.

        Args:
            padded_size: height and width of the network's input.
            void_id: value of pixels without a class.
            num_labels: K, where it is known.
            device: of the result.

        Raises:
            ValueError: `void_id` is None, negative, or a class.
        """
        is_class = void_id is not None and bool((self.class_labels[~self.is_crowd] == void_id).any())
        if void_id is None or void_id < 0 or void_id < (num_labels or 0) or is_class:
            raise ValueError(
                f"{self.name}: label_format='semantic' writes void_id={void_id} at void and padded pixels, so it must "
                "be a number that is no class id after label_offset; 255 is usual."
            )
        return pad(self.semantic_map(void_id).to(device), padded_size, void_id)

    def __getstate__(self) -> dict[str, Any]:
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        state["masks"] = self.runs if self.is_map else self.run_lengths
        if self.is_map:
            state["masks"] = self.runs.look_up(_table(np.arange(len(self)), np.min_scalar_type(-len(self) - 2)))
        state["void"] = None if self.void is None else Runs.of(as_array(self.void))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        void = state["void"]
        self.__dict__ |= state | {"void": None if void is None else torch.from_numpy(void.map())}


def _overlap(masks: Tensor) -> bool:
    """Whether a pixel is in two of the masks (M, H, W)."""
    return bool(masks.count_nonzero() > masks.any(0).count_nonzero())


def _as_map(masks: Tensor) -> Tensor:
    """Masks (M, H, W) without overlap -> (H, W) int32, the place of each pixel's mask, -1 in none."""
    places = torch.arange(len(masks), dtype=torch.int32, device=masks.device).view(-1, 1, 1)
    return torch.where(masks, places + 1, 0).sum(0, dtype=torch.int32) - 1


def _table(of_places: NDArray[Any], dtype: Any, no_segment: Any = NO_SEGMENT, void: Any = VOID) -> NDArray[Any]:
    """(M,) -> (M + 2,), which an index map can be looked up in: places -2 and -1 are the last two."""
    return np.concatenate([of_places, [no_segment, void]]).astype(dtype)


def _runs_of_places(runs: Runs, classes: Mapping[int, int | None], name: str) -> Runs:
    """Runs of ids -> runs of the index map, whose segments come in the order of `classes`."""
    known = list(classes)
    if far := [i for i in known if not -(2**63) <= i < 2**63]:
        raise ValueError(f"{name}: segment ids {far[:5]} have more than 64 bits.")
    place_of_run = places_in(runs.values, known)
    unknown = runs.values[place_of_run == len(known)]
    if unknown.size:
        missing = np.unique(unknown)[:5].tolist()
        raise ValueError(f"{name}: the map holds ids {missing} that have no class (instance_id_to_semantic_id).")
    labels = list(classes.values())
    is_segment = np.array([label is not None and label != VOID for label in labels], dtype=bool)
    others = np.array([NO_SEGMENT if label is None else VOID for label in labels], dtype=np.int64)
    places = np.where(is_segment, np.cumsum(is_segment) - 1, others)
    return runs._replace(values=places[place_of_run])


# -- labels that users give to the image processor -----------------------------------------------------------------


@dataclass(frozen=True)
class LabelRules:
    """How label values are read: `class = value - label_offset`; `void_id` and values below the offset are void.

    `void_id=None`: no value is void. `num_labels=None`: the upper end is not checked. `watch` is told the values of
    each map of classes.
    """

    void_id: int | None = 255
    label_offset: int = 0
    num_labels: int | None = None
    watch: Callable[[Sequence[int]], None] | None = None


def read_segments(
    segmentation_maps: Any,
    id_to_class: Any,
    class_labels: Any,
    rules: LabelRules,
    image_sizes: Sequence[tuple[int, int]],
    new_sizes: Sequence[tuple[int, int]],
) -> list[Segments]:
    """What a user gives as labels for a batch, or `Segments` -> checked segments of each image.

    Args:
        segmentation_maps: as of the image processor.
        id_to_class: its `instance_id_to_semantic_id`.
        class_labels: as of the image processor.
        rules: what label values mean.
        image_sizes: (height, width) that the labels must have.
        new_sizes: of the result; the label values are resized, each pixel to the one under its center.
    """
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
    found = []
    for i, (label_map, mapping, labels) in enumerate(zip(maps, id_to_class, values, strict=True)):
        with naming(f"image {i}"):
            if isinstance(label_map, Segments):
                _check_size(label_map.size, image_sizes[i])
                _classes_of_values(label_map.class_labels, replace(rules, void_id=None, label_offset=0), f"image {i}")
                found.append(replace(label_map, name=f"image {i}").resized(new_sizes[i]))
                continue
            if label_map is None:
                raise ValueError("there is no segmentation map; an image without segments needs one too, of void_id.")
            classes = None if mapping is None else _class_values(mapping)
            if class_labels is None:
                pixels, values_of_masks = read_label_map(label_map, f"image {i}"), None
            else:
                pixels = read_mask_stack(label_map, image_sizes[i], f"image {i}")
                values_of_masks = read_label_values(labels, f"image {i}")
            _check_size(tuple(pixels.shape), image_sizes[i])
            pixels = resize_nearest(pixels, new_sizes[i])
            if values_of_masks is None:
                found.append(_segments_of_map(pixels, classes, rules, f"image {i}"))
            else:
                found.append(_segments_of_stack(pixels, values_of_masks, rules, f"image {i}"))
    return found


def _segments_of_map(
    pixels: Tensor, id_to_class: Mapping[int, int | None] | None, rules: LabelRules, name: str
) -> Segments:
    """Segments in rising order of ids (H, W)."""
    ids, runs = Runs.of(as_array(pixels)).numbered()
    if id_to_class is None and rules.watch is not None and rules.void_id == 255 and rules.num_labels != 1:
        rules.watch(ids.tolist())
    classes = as_array(_classes_of_ids(torch.from_numpy(ids), rules, id_to_class, name))  # (I,)
    is_segment = classes >= 0
    places = np.where(is_segment, np.cumsum(is_segment) - 1, classes)
    return Segments(
        torch.from_numpy(classes[is_segment]), runs.look_up(places), ids=ids[is_segment].tolist(), name=name
    )


def _segments_of_stack(stack: Tensor, values: Tensor, rules: LabelRules, name: str) -> Segments:
    """Segments in the order of the stack (M, H, W); a mask labeled void marks void where no segment covers it."""
    if len(values) != len(stack):
        raise ValueError(f"{name}: {len(stack)} masks but {len(values)} class_labels.")
    classes = _classes_of_values(values, rules, name)  # (M,)
    is_segment = classes >= 0
    return Segments(classes[is_segment], stack[is_segment], name=name, void=stack[~is_segment].any(0))


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


def _classes_of_ids(ids: Tensor, rules: LabelRules, id_to_class: Mapping[int, int | None] | None, where: str) -> Tensor:
    """Ids of a map (I,) -> classes (I,) int64, VOID or NO_SEGMENT.

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
            f"Map each to its class, background to None (no segment), unlabeled pixels to void_id={rules.void_id}."
        )
    # an unnamed id is void; its place is filled with a value that needs no check
    named = [id_to_class.get(v) for v in values]
    classes = torch.tensor([rules.label_offset if c is None else c for c in named], device=ids.device)
    classes = _classes_of_values(classes.long(), rules, where)
    for i, (value, class_value) in enumerate(zip(values, named, strict=True)):
        if class_value is None:
            classes[i] = NO_SEGMENT if value in id_to_class else VOID
    return classes


def _classes_of_values(values: Tensor, rules: LabelRules, where: str, of_pixels: bool = False) -> Tensor:
    """Label values (I,) -> classes (I,), VOID for void. `of_pixels`: they are the values of a map themselves."""
    classes = values - rules.label_offset
    void = classes < 0
    if rules.void_id is not None:
        void |= values == rules.void_id
    if rules.num_labels is not None:
        outside = values[(classes >= rules.num_labels) & ~void].tolist()
        if outside:
            raise ValueError(_outside_message(outside, rules.num_labels, rules, where, of_pixels))
    return classes.masked_fill(void, VOID)


def _outside_message(outside: list[int], num_labels: int, rules: LabelRules, where: str, of_pixels: bool) -> str:
    first, last = rules.label_offset, rules.label_offset + num_labels - 1
    causes = []
    if outside == [last + 1]:
        causes.append(f"the classes are counted from {first + 1}: set label_offset={first + 1}")
    causes += [f"{v} marks unlabeled pixels: set void_id={v}" for v in (255, 65535) if v in outside]
    if of_pixels:
        causes.append("the map holds instance ids: give instance_id_to_semantic_id")
        causes.append("the map was converted from a palette or color image: open it without .convert()")
    causes.append("num_labels is too small")
    return (
        f"{where}: label ids {_shown(outside)} are outside the {num_labels} classes, whose ids go from "
        f"{first} to {last} (label_offset={rules.label_offset}, void_id={rules.void_id}). "
        f"Likely cause: {'; or '.join(causes)}."
    )


def _check_size(shape: tuple[int, ...], image_size: tuple[int, int]) -> None:
    map_size = shape[-2:]
    if map_size == image_size:
        return
    message = (
        f"the segmentation map is {map_size[0]} x {map_size[1]} but the image is {image_size[0]} x "
        f"{image_size[1]} (height x width); they must be equal."
    )
    if shape[:2] == image_size:
        message += f" The masks come first in a stack, (M, H, W); this one is {shape}."
    if map_size == image_size[::-1]:
        message += " Height and width are swapped: PIL images and files are turned upright by their EXIF orientation."
    raise ValueError(message)


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
