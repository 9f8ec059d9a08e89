"""Image -> segments: whole or in tiles, once or at several scales."""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel

from ..models.image_processing_maskcls import MaskClsImageProcessor
from ..models.image_reading import image_list
from ..models.inference_defaults import defaults_of, knows_only_stuff, saved_task, task_options
from ..models.mask_cleanup import clean_map, clean_masks
from ..models.options import naming, plain, require_range, unused
from ..models.post_processing import NO_CLASS, least_score, map_of_scores
from ..models.run_lengths import MaskRuns
from ..utils.tasks import TASKS, Task
from .eval_mode import in_eval_mode
from .faster import DTYPES, Dtype, autocast, faster_network
from .loading import class_of_saved, load_image_processor, load_model
from .stitching import InstanceStitch, PanopticStitch, SemanticBlend
from .test_time_augmentation import mean_scores, scaled_size
from .tiling import TileGrid, check_tile
from .universal import as_processor, pairs_of

Result = dict[str, Any]
Item = TypeVar("Item")

# Options of the post-processing that it sets itself.
_OWN_OPTIONS = {
    "target_sizes": "maps have the size of their image",
    "return_segmentation_scores": "it gives the map of the highest scores; for the scores, call the image processor's "
    "post_process_semantic_segmentation",
    "return_coco_annotation": "each of its masks is MaskRuns, whose rle() is COCO's encoding",
    "return_binary_maps": "each of its masks is MaskRuns, whose dense() is the binary map",
}
_OVERLAP = 0.25  # of tiles
BLEND_MEMORY = 256 << 20  # bytes of class scores that wait for the next row of tiles
# Holes and fragments are those of whole segments, not of their parts in a tile.
_NO_SHARES = {task: dict(max_hole_share=0.0, min_fragment_share=0.0) for task in ("panoptic", "instance")}
WINDOW = 4  # batches among whose images those of one size are looked for
_BATCH_ON_GPU = 8  # images that keep a GPU busy; on a CPU one at a time is as fast


class Predictor:
    """A model and its image processor, for images of any size.

    The model predicts in evaluation mode, in whatever mode it is, and is left as it is: see [`in_eval_mode`]. Several
    threads may use one predictor, also while another trains the model. What is saved are the `inference_defaults` of
    the image processor; see models/inference_defaults.py.

    Args:
        model: a mask-classification or per-pixel model; or one of transformers as it is, such as OneFormer, whose
            outputs have `class_queries_logits` and `masks_queries_logits`.
        image_processor: its `MaskClsImageProcessor`, or the processor of transformers. OneFormer's is told the task:
            several tasks are as many forward passes.
        device: where the model is moved to. None: it stays where it is.
        dtype: "bfloat16": products in half precision, the weights as they are; for GPUs, and processors with AMX or
            AVX512-BF16. "float16", for GPUs: a copy of the weights in half precision, without what the model learns
            later. "float32": such a copy of a model in half precision. "auto": as the model is.
        compile: by `torch.compile`: the first images of a kind of size take minutes, the others less time. Where it
            fails, a warning says why, and the model predicts as it is. A compiled EoMT sees padding.
        task: what is predicted where a call does not say. None: the task that the image processor has saved, else
            panoptic; semantic for per-pixel models and with scales or flip.
        tile: cut larger images into overlapping tiles of so many pixels of the image, each of which is an image to the
            image processor and the model: N queries then are N segments a tile. None: as saved, else never; 0: never.
        overlap: part of a tile that it shares with the next one at least, 0 to 0.5. None: as saved, else 0.25.
        scales: average class scores over these factors of the image's size; for semantic segmentation. None: [1].
        flip: average class scores over mirrored copies too; for semantic segmentation.
        batch_size: images, or tiles of an image, that the model sees at once, those of one size together where there
            are enough. None: 8 on a GPU, else 1.
        enlarge: network pixels an image pixel, instead of the resizing of the image processor. None: as saved, else
            that; 0: that.

    Raises:
        ValueError: an unknown task; a tile, an overlap or a scale outside its range; a dtype that the device does not
            compute with; a model or processor of transformers that cannot run as it is.

    Example::

        predict = Predictor.from_pretrained("model_cards/maskcls-nuclei-tiny", tile=128)
        result = predict("slide.png", task="panoptic", threshold=0.5)
        result["segmentation"], result["segments_info"]
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        image_processor: Any,
        *,
        device: str | torch.device | None = None,
        dtype: Dtype = "auto",
        compile: bool = False,
        task: Task | None = None,
        tile: int | None = None,
        overlap: float | None = None,
        scales: Sequence[float] | None = None,
        flip: bool = False,
        batch_size: int | None = None,
        enlarge: float | None = None,
    ):
        image_processor = as_processor(image_processor, model)
        saved = defaults_of(image_processor)
        tile = plain(saved.get("tile") if tile is None else tile) or None
        overlap = saved.get("overlap", _OVERLAP) if overlap is None else overlap
        enlarge = (saved.get("enlarge") if enlarge is None else enlarge) or None
        batch_size = plain(batch_size)
        for name, value in (("tile", tile), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive integer.")
        if tile is not None:
            check_tile(tile, overlap)
        if any(not 0 < scale < math.inf for scale in (*(scales or ()), enlarge or 1.0)):
            raise ValueError(f"scales and enlarge must be positive numbers, got {scales} and {enlarge}.")
        if task is not None:
            _check_task(task)
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}.")
        self.tile, self.overlap = tile, overlap
        self.scales, self.flip, self.enlarge = tuple(scales or (1.0,)), flip, enlarge
        self._task = task
        self.dtype, self._batch_size = dtype, batch_size
        self.image_processor = image_processor
        self.model: Any = model if device is None or model is None else model.to(device)  # type: ignore[arg-type]
        # What predicts, where it is not the model itself in evaluation mode.
        self.network: Any = None if model is None else faster_network(model, dtype, compile)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], device: str | torch.device | None = None, **options: Any
    ) -> Predictor:
        """A saved model of this package or a universal one of transformers.

        Args:
            name: its folder, or its name on the Hub.
            device: None: the CPU.
            options: those of the class.

        Raises:
            ValueError: no model there, one of another kind, or weights that are not whole; an option outside its range.
            OSError: files are missing, or are not those that the checkpoint was saved with.
        """
        check_predictor_options(**options)
        class_of_saved(name)
        image_processor = load_image_processor(name)  # before the weights, which take longest
        return cls(load_model(name, dtype=torch.float32), image_processor, device=device, **options)

    @property
    def batch_size(self) -> int:
        """Images that the model sees at once."""
        return self._batch_size or (1 if self.model.device.type == "cpu" else _BATCH_ON_GPU)

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the model's classes 0..K-1."""
        id2label: dict[int, str] = self.model.config.id2label
        return id2label

    @property
    def finds_segments(self) -> bool:
        """False for models that classify pixels: they do semantic segmentation only."""
        return bool(self.model.config.model_type != "maskcls_perpixel")

    @property
    def _defaults(self) -> dict[str, Any]:
        return defaults_of(self.image_processor)

    @property
    def task(self) -> Task:
        """What is predicted where a call does not say."""
        if self._task is None and (not self.finds_segments or self._augments):
            return "semantic"
        return self._task or saved_task(self.image_processor)

    def __call__(self, images: Any, task: Task | None = None, **options: Any) -> Result | list[Result]:
        """The segments of an image, or of each image of a list.

        Args:
            images: PIL image, array, tensor or path; or a list of them.
            task: "semantic", "panoptic" or "instance"; None: `self.task`.
            options: arguments of the image processor's `post_process_<task>_segmentation`, such as `threshold`. What is
                not given is as saved with the model.

        Returns:
            For each image `segmentation`, a map (H, W) on the CPU, and `segments_info`. Semantic: classes, int64, -1
            for none (see `score_threshold`), and a record (id, label_id, area) for each class that is there. Panoptic:
            as `post_process_panoptic_segmentation`. Instance: as `post_process_instance_segmentation`, and `masks`, the
            whole `MaskRuns` of each instance.

        Raises:
            ValueError: the model or the options cannot do the task; an image is no image. The message names the option,
                or the image by its file or its place.
            TypeError: an option that there is not.
        """
        task = task or self.task
        several = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
        results = [result[task] for result in self.predict(images, {task: options})]
        return results if several else results[0]

    @torch.no_grad()
    def predict(
        self, images: Any, tasks: Mapping[Task, dict[str, Any]], input_data_format: str | None = None
    ) -> list[dict[Task, Result]]:
        """The results of several tasks from the same forward passes.

        Args:
            images: one or a list, as for a call.
            tasks: the options of each task.
            input_data_format: "channels_first" or "channels_last" for arrays and tensors; None: that of the image
                processor.

        Returns:
            For each image the result of each task, as a call gives them.

        Raises:
            ValueError: as a call.
            TypeError: as a call.
        """
        self.check(tasks)
        if self.network is None:
            predictor = copy.copy(self)
            predictor.network = in_eval_mode(self.model)
            return predictor.predict(images, tasks, input_data_format)
        pixels = []
        for i, image in enumerate(image_list(self.image_processor.fetch_images(images))):
            with naming(f"image {i}"):
                pixels.append(self._pixels(image, input_data_format))
        results: list[dict[Task, Result]] = [{} for _ in pixels]
        whole = [i for i, image in enumerate(pixels) if self._fits(image)]
        number = 1 if self._sizes_by_image else self.batch_size
        for batch in same_size_together(whole, lambda i: pixels[i].shape[-2:], number):
            found = self._batch([pixels[i] for i in batch], tasks)
            for place, i in enumerate(batch):
                results[i] = {task: RESULTS[task](ones[place]) for task, ones in found.items()}
        for i, image in enumerate(pixels):
            if not self._fits(image):
                results[i] = self._of_tiles(image, tasks)
        return results

    def _of_tiles(self, image: Tensor, tasks: Mapping[Task, dict[str, Any]]) -> dict[Task, Result]:
        """Of one image (3, H, W), larger than a tile."""
        assert self.tile is not None
        grid = TileGrid((image.shape[-2], image.shape[-1]), self.tile, self.overlap)
        options = {task: task_options(self._defaults, task, tasks[task]) for task in tasks}
        of_tiles = {task: options[task] | _NO_SHARES.get(task, {}) for task in tasks}
        stitchers: dict[Task, Any] = {task: _STITCHERS[task](grid) for task in tasks if task != "semantic"}
        columns = None
        if "semantic" in tasks:
            stitchers["semantic"] = SemanticBlend(grid, self._least_score(tasks["semantic"]))
            columns = max(2, BLEND_MEMORY // (4 * len(self.id2label) * math.ceil(self.tile**2 * self.overlap) + 1))
        visits = grid.visits(columns)
        while batch := list(islice(visits, self.batch_size)):
            crops = [grid.crop(image, tile) for tile in batch]
            for task, found in self._batch(crops, of_tiles, scores=True).items():
                for tile, of_tile in zip(batch, found, strict=True):
                    stitchers[task].add(tile, of_tile)
        return {
            task: RESULTS[task](_clean_stitched(task, stitcher.result(), options[task]))
            for task, stitcher in stitchers.items()
        }

    def _batch(
        self, images: Sequence[Tensor], tasks: Mapping[Task, dict[str, Any]], scores: bool = False
    ) -> dict[Task, list[Any]]:
        """What the image processor makes of a batch; for semantic segmentation the class scores, if `scores`."""
        if self._augments:
            of_classes = mean_scores(images, self._scores_at, self.scales, self.flip)
            least = self._least_score(tasks["semantic"])
            return {"semantic": of_classes if scores else [map_of_scores(found, least) for found in of_classes]}
        outputs = None
        found: dict[Task, list[Any]] = {}
        for task, options in tasks.items():
            if outputs is None or self._takes_task:
                outputs = self._outputs(images, 1.0, task)
            post_process = getattr(self.image_processor, f"post_process_{task}_segmentation")
            if task == "instance":
                options = options | {"return_binary_maps": True}
            if task == "semantic" and scores:
                found[task] = self._scores(outputs)
            else:
                found[task] = post_process(outputs, **options)
        return found

    def _least_score(self, options: Mapping[str, Any]) -> float:
        """That the class of a pixel must have more than; 0: each pixel has a class."""
        if not self.finds_segments:
            return 0.0
        threshold = task_options(self._defaults, "semantic", options)["score_threshold"]
        return least_score(threshold, len(self.id2label))

    def _scores(self, outputs: Any) -> list[Tensor]:
        """Class scores (K, H, W) of each image."""
        maps = self.image_processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
        return [found["segmentation_scores"] for found in maps]

    def _scores_at(self, images: Sequence[Tensor], scale: float) -> list[Tensor]:
        return self._scores(self._outputs(images, scale, "semantic"))

    def _outputs(self, images: Sequence[Tensor], scale: float = 1.0, task: Task = "panoptic") -> Any:
        """Outputs of the model for one batch of images."""
        options: dict[str, Any] = {"task": task} if self._takes_task else {}
        if scale != 1.0 or self.enlarge is not None:
            own_size = (images[0].shape[-2], images[0].shape[-1]) if self._sizes_by_image else None
            size = scaled_size(self.image_processor.size, own_size, scale * (self.enlarge or 1.0), max(self.scales))
            options |= {"do_resize": True, "size": size}
        inputs = self.image_processor(list(images), input_data_format="channels_first", return_tensors="pt", **options)
        mask = inputs["pixel_mask"]
        if mask.device.type == "cpu" and mask.all():  # a GPU, where the model cannot look, is spared what padding costs
            del inputs["pixel_mask"]
        return self.outputs(inputs)

    @torch.no_grad()
    def outputs(self, inputs: BatchFeature) -> Any:
        """Outputs of the model for what its image processor gives, in the predictor's dtype."""
        network = in_eval_mode(self.model) if self.network is None else self.network
        device, dtype = self.model.device, next(network.parameters()).dtype
        with autocast(device, self.dtype):
            return pairs_of(network, self.model, inputs.to(device, dtype=dtype))

    @property
    def _takes_task(self) -> bool:
        """Whether the model predicts something else for each task."""
        return getattr(self.image_processor, "takes_task", False)

    @property
    def _augments(self) -> bool:
        return self.scales != (1.0,) or self.flip

    @property
    def _sizes_by_image(self) -> bool:
        """Whether the image processor is told a size for each image: then a batch has images of one size."""
        return self.enlarge is not None or (self.scales != (1.0,) and not self.image_processor.do_resize)

    def _fits(self, image: Tensor) -> bool:
        return self.tile is None or max(image.shape[-2:]) <= self.tile

    def _pixels(self, image: Any, input_data_format: str | None) -> Tensor:
        """Image -> (3, H, W) on the 0..255 scale."""
        processor = self.image_processor
        pixels: Tensor = processor.process_image(
            image, processor.do_convert_rgb, input_data_format or processor.input_data_format, processor.device
        )
        return pixels

    def check(self, tasks: Mapping[Task, dict[str, Any]]) -> None:
        """Refuses tasks and options, before the model runs.

        Args:
            tasks: the options of each task.

        Raises:
            ValueError: a task that the model or the predictor's options cannot do; a threshold outside 0..1.
            TypeError: an option that there is not.
        """
        for task, options in tasks.items():
            _check_task(task)
            if task != "semantic" and not self.finds_segments:
                raise ValueError(f"a per-pixel model knows no segments: its only task is semantic, not {task}.")
            if task != "semantic" and self._augments:
                raise ValueError(f"scales and flip average class scores: for semantic segmentation, not {task}.")
            if (
                task == "instance"
                and options.get("label_ids_to_fuse") is None
                and knows_only_stuff(self.image_processor)
            ):
                raise ValueError(
                    "all classes of the model are stuff, which has no instances (label_ids_to_fuse of its image "
                    "processor): use the task panoptic or semantic, or label_ids_to_fuse=[] for instances all the same."
                )
            allowed = options_of(task)
            for name in tasks[task]:
                if name in _OWN_OPTIONS:
                    raise ValueError(f"{name} is not for a Predictor: {_OWN_OPTIONS[name]}.")
                if task == "instance" and name == "overlap_mask_area_threshold":
                    raise ValueError(f"{name} is not for instances: they may overlap.")
                if name not in allowed:
                    raise TypeError(unused(name, allowed, f"post_process_{task}_segmentation"))
            for name, value in options.items():
                if value is not None and name.endswith(("threshold", "_share", "_iou")):
                    require_range(name, value, "[0, 1]")


def _check_task(task: Any) -> None:
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")


def options_of(task: Task) -> list[str]:
    """Names of the options of a task that a [`Predictor`] takes.

    Examples:
        >>> "threshold" in options_of("panoptic"), "return_binary_maps" in options_of("instance")
        (True, False)
    """
    post_process = getattr(MaskClsImageProcessor, f"post_process_{task}_segmentation")
    return [
        name for name in inspect.signature(post_process).parameters if name not in {"self", "outputs", *_OWN_OPTIONS}
    ]


def check_predictor_options(**options: Any) -> None:
    """Refuses options of [`Predictor`], without a model.

    Raises:
        ValueError: one of them is outside its range.

    Examples:
        >>> check_predictor_options(tile=512, overlap=0.7)
        Traceback (most recent call last):
        ValueError: overlap must be a part of the tile from 0 to 0.5, got 0.7.
    """
    Predictor(None, None, **options)


def same_size_together(items: Iterable[Item], size_of: Callable[[Item], Any], number: int) -> Iterator[list[Item]]:
    """Batches of `number` items, the last of fewer, those of one size together where it can be had.

    Each begins with the first item that is left; of those that follow it closely, the ones of its size go before the
    others.

    Args:
        items: any.
        size_of: what must be equal.
        number: of items in a batch.

    Examples:
        >>> list(same_size_together(["a", "bb", "c", "dd"], len, 2))
        [['a', 'c'], ['bb', 'dd']]
    """
    waiting: list[Item] = []

    def places_of_first_size() -> list[int]:
        return [i for i, item in enumerate(waiting) if size_of(item) == size_of(waiting[0])]

    def take() -> list[Item]:
        places = list(dict.fromkeys([*places_of_first_size(), *range(len(waiting))]))[:number]
        batch = [waiting[i] for i in places]
        waiting[:] = [item for i, item in enumerate(waiting) if i not in places]
        return batch

    for item in items:
        waiting.append(item)
        if len(waiting) == WINDOW * number or len(places_of_first_size()) == number:
            yield take()
    while waiting:
        yield take()


def _semantic_result(class_map: Tensor) -> Result:
    """Map (H, W) -> map and records of its classes."""
    classes = class_map.flatten()
    areas = (classes if classes.min() >= 0 else classes[classes != NO_CLASS]).bincount().tolist()
    records = [dict(id=label, label_id=label, area=area) for label, area in enumerate(areas) if area]
    return {"segmentation": class_map.cpu(), "segments_info": records}


def _panoptic_result(found: Result) -> Result:
    return found | {"segmentation": found["segmentation"].cpu()}


def _clean_stitched(task: Task, found: Any, options: Mapping[str, Any]) -> Any:
    """Without the small holes and fragments of whole segments."""
    shares = {name: options[name] for name in _NO_SHARES.get(task, ())}
    if task == "panoptic":
        segmentation, segments_info = clean_map(found["segmentation"], found["segments_info"], **shares)
        return {"segmentation": segmentation, "segments_info": segments_info}
    if task == "instance":
        masks, segments_info = clean_masks(found["segmentation"], found["segments_info"], **shares)
        return found | {"segmentation": masks, "segments_info": segments_info}
    return found


def _instance_result(found: Result) -> Result:
    """Masks (n, H, W) or runs, best first -> map of ids, -1 where there is none and the best where they overlap."""
    masks = found["segmentation"]
    size = found["size"] if isinstance(masks, list) else tuple(masks.shape[1:])
    masks = masks if isinstance(masks, list) else MaskRuns.of_masks(masks)
    ids = np.full(size, -1, dtype=np.int32)
    for index in reversed(range(len(masks))):
        masks[index].paint(ids, index)
    return {"segmentation": torch.from_numpy(ids), "segments_info": found["segments_info"], "masks": masks}


_STITCHERS: dict[Task, Any] = {"panoptic": PanopticStitch, "instance": InstanceStitch}
RESULTS: dict[Task, Any] = {"semantic": _semantic_result, "panoptic": _panoptic_result, "instance": _instance_result}
