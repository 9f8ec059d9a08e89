"""Images to network inputs, annotations to targets, and network outputs back to maps of the images."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, logging

from .image_geometry import padded_sizes, padding, resized_size
from .image_reading import autocontrast, image_list, image_to_tensor, open_image, with_fourth_byte
from .output_maps import OutputMapsMixin
from .ranges import require_range
from .segment_labels import Annotation, LabelRules, Segments, read_annotations

logger = logging.get_logger(__name__)

LABEL_FORMATS = ("segments", "segment_map", "semantic")
PER_SEGMENT = ("mask_labels", "class_labels")  # images differ in the number of segments: never stacked


class MaskClsImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    size_divisor (`int`, *optional*, defaults to 32):
        Images are padded to a multiple of it, at the bottom and right; never distorted. `None`: no multiple.
    pad_size (`dict[str, int]`, *optional*):
        Pad to this height and width instead of those of the largest image of the batch.
    void_id (`int`, *optional*, defaults to 255):
        Value of unlabelled pixels in segmentation maps, before `label_offset`. `None`: every value is a label.
    label_offset (`int`, *optional*, defaults to 0):
        Class id = label value - `label_offset`; lower values are void. 1 for ADE20K's maps, where 0 is "other".
    num_labels (`int`, *optional*):
        Number of classes. When known, an id outside is an error.
    label_format (`str`, *optional*, defaults to `"segments"`):
        `"segments"`: `mask_labels`, `class_labels`, `void_mask`. `"segment_map"`: the same in few bytes, each image's
        `mask_labels` a map of places. `"semantic"`: `labels`, one class id a pixel.
    label_ids_to_fuse (`list[int]`, *optional*):
        Classes without instances (stuff): panoptic post-processing makes one segment of each.
    do_autocontrast (`bool`, *optional*, defaults to `False`):
        Stretch each channel of each image to the full range first; for microscopes and other dim images.
    do_flip_channel_order (`bool`, *optional*, defaults to `False`):
        Networks that were trained on BGR: red and blue change places.
    ignore_index (`int`, *optional*):
        transformers' name of `void_id`; where given, it sets `void_id`.
    do_reduce_labels (`bool`, *optional*):
        transformers' name of `label_offset=1`; where given, it sets `label_offset`.
    """

    size_divisor: int | None
    void_id: int | None
    label_offset: int
    num_labels: int | None
    label_format: str
    label_ids_to_fuse: list[int] | tuple[int, ...] | set[int] | None
    do_autocontrast: bool
    do_flip_channel_order: bool
    ignore_index: int | None
    do_reduce_labels: bool | None


class MaskClsImageProcessor(OutputMapsMixin, TorchvisionBackend):
    """Prepares images and annotations for the models of this package, and turns their outputs into maps.

    Resize -> rescale -> normalise -> pad with 0 at the bottom and right. Defaults: shortest edge 512, longest at
    most 2048 (the paper's ADE20K test setting), ImageNet mean and deviation, multiples of 32 pixels.
    """

    _auto_class = "AutoImageProcessor"  # type: ignore[assignment]  # saved with the code that reads it
    valid_kwargs = MaskClsImageProcessorKwargs  # type: ignore[assignment]
    model_input_names = ["pixel_values", "pixel_mask"]
    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 512, "longest_edge": 2048}
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = True
    size_divisor = 32
    void_id = 255
    label_offset = 0
    num_labels = None
    label_format = "segments"
    label_ids_to_fuse = None
    do_autocontrast = False
    do_flip_channel_order = False

    def __init__(self, **kwargs: Unpack[MaskClsImageProcessorKwargs]) -> None:
        """Also reads the older names in configs of transformers' MaskFormer."""
        options: dict[str, Any] = dict(kwargs)
        for old, new in (("size_divisibility", "size_divisor"), ("reduce_labels", "do_reduce_labels")):
            if old in options:
                options.setdefault(new, options.pop(old))
        longest_edges = [options.pop(name, None) for name in ("max_size", "_max_size")]
        if isinstance(options.get("size"), int) and any(longest_edges):
            options["size"] = {"shortest_edge": options["size"], "longest_edge": max(filter(None, longest_edges))}
        super().__init__(**options)

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: Any = None,
        instance_id_to_semantic_id: Mapping[int, int | None] | Sequence[Mapping[int, int | None]] | None = None,
        class_labels: Any = None,
        **kwargs: Unpack[MaskClsImageProcessorKwargs],
    ) -> BatchFeature:
        """Preprocess one image or several, with their annotations where given.

        Args:
            images: PIL images of any mode, arrays, tensors, paths or URLs; one or a list. 16-bit images are
                brought to 0..255 and EXIF rotation is applied.
            segmentation_maps: one for each image, of its size: a map of ids (H, W) as PIL image (palette: its
                indices), array, tensor or path; or, with `class_labels`, a stack of masks that may overlap,
                (M, H, W) or a list of M masks.
            instance_id_to_semantic_id: for maps of instance ids, instance id -> label value; one dict for all
                images or one for each. `None` as label: no segment (background). Ids that are not in it are
                void where they equal `void_id` or lie below `label_offset`, else an error.
            class_labels: for stacks, M label values for each image. A mask labelled `void_id` marks void.
            kwargs: any option of the processor, for this call.

        Returns:
            `pixel_values` (B, 3, H, W) float32, `pixel_mask` (B, H, W) int64 with 1 on the image and 0 on padding,
            `original_sizes` (B, 2) int64, height and width before resizing. With annotations `mask_labels`, a
            list of B (M, H, W) bool; `class_labels`, a list of B (M,) int64; `void_mask` (B, H, W) bool. For
            `label_format="segment_map"`, `mask_labels` are B maps (H, W) int32, the place of each pixel's segment in
            `class_labels` and -1 in none (overlapping masks stay a stack). For `label_format="semantic"` only
            `labels` (B, H, W) int64 with `void_id` at void and padded pixels. Segments without a pixel after
            resizing are left out. `return_tensors=None`: lists of tensors.

        Raises:
            ValueError: an annotation and its image differ in size, an id is outside the classes or has no class,
                a map has colours, an image is larger than `pad_size`. The message names the image.
        """
        return super().preprocess(images, segmentation_maps, instance_id_to_semantic_id, class_labels, **kwargs)

    def _standardize_kwargs(  # type: ignore[override]
        self, ignore_index: int | None = None, do_reduce_labels: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Canonical forms; transformers' aliases move to `void_id` and `label_offset` and are None afterwards."""
        kwargs = super()._standardize_kwargs(**kwargs)
        if ignore_index is not None:
            kwargs["void_id"] = ignore_index
        if do_reduce_labels is not None:
            kwargs["label_offset"] = int(do_reduce_labels)
        if kwargs.get("label_ids_to_fuse") is not None:
            kwargs["label_ids_to_fuse"] = sorted(int(label) for label in kwargs["label_ids_to_fuse"])
        check_image_options(kwargs)
        if kwargs.get("label_format") not in LABEL_FORMATS:
            raise ValueError(f"label_format must be one of {LABEL_FORMATS}, got {kwargs.get('label_format')!r}.")
        if (kwargs.get("size_divisor") or 0) < 0:
            raise ValueError(f"size_divisor must be positive or None, got {kwargs['size_divisor']}.")
        if kwargs.get("do_center_crop"):
            raise ValueError("do_center_crop is not supported: crop image and labels together beforehand.")
        return kwargs | {"ignore_index": None, "do_reduce_labels": None}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths and URLs -> images; a local file keeps its own mode and depth."""
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(item) for item in source]
        if isinstance(source, os.PathLike) or (isinstance(source, str) and os.path.isfile(source)):
            try:
                return open_image(source)
            except ValueError as error:
                raise ValueError(f"{os.fspath(source)}: {error}") from error
        return super().fetch_images(source) if isinstance(source, str) else source

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        device: Any = None,
        **options: Any,
    ) -> Tensor:
        """One image -> (C, H, W) on the 0..255 scale."""
        return image_to_tensor(image, bool(do_convert_rgb), input_data_format).to(device)

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: ImageInput,
        segmentation_maps: Any,
        instance_id_to_semantic_id: Any,
        class_labels: Any,
        **options: Any,
    ) -> BatchFeature:
        tensors = []
        for i, image in enumerate(image_list(self.fetch_images(images))):
            try:
                tensors.append(self.process_image(image, **options))
            except ValueError as error:
                raise ValueError(f"image {i}: {error}") from error
        labels = (segmentation_maps, instance_id_to_semantic_id, class_labels)
        if all(given is None for given in labels):
            return self._preprocess(tensors, **options)
        annotations = read_annotations(*labels, [_size(image) for image in tensors])
        return self._preprocess(tensors, annotations, **options)

    def _preprocess(  # type: ignore[override]
        self,
        images: list[Tensor],
        annotations: list[Annotation] | None = None,
        *,
        return_tensors: Any = None,
        **options: Any,
    ) -> BatchFeature:
        resized = [self._resized(image, f"image {i}", **options) for i, image in enumerate(images)]
        sizes = [_size(image) for image in resized]
        padded = padded_sizes(sizes, options["do_pad"], options["pad_size"], options["size_divisor"])
        data: dict[str, list[Tensor]] = {
            "pixel_values": [self._normalized(i, size, **options) for i, size in zip(resized, padded, strict=True)],
            "pixel_mask": [pixel_mask(_size(i), size, i.device) for i, size in zip(resized, padded, strict=True)],
            "original_sizes": [torch.tensor(_size(image), device=image.device) for image in images],
        }
        if annotations is not None:
            rules = LabelRules(options["void_id"], options["label_offset"], options["num_labels"])
            annotations = [
                annotation.resized(size, image.device)
                for annotation, size, image in zip(annotations, sizes, images, strict=True)
            ]
            if options["label_format"] == "semantic":
                data["labels"] = [a.semantic(rules, size) for a, size in zip(annotations, padded, strict=True)]
            else:
                form = Annotation.segments if options["label_format"] == "segments" else Annotation.segment_map
                segments = [form(a, rules, size) for a, size in zip(annotations, padded, strict=True)]
                data |= {name: [getattr(s, name) for s in segments] for name in Segments._fields}
        return _batch_feature(data, return_tensors)

    def _resized(
        self,
        image: Tensor,
        where: str,
        *,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        do_autocontrast: bool,
        do_flip_channel_order: bool,
        **options: Any,
    ) -> Tensor:
        """(C, H, W) -> (C, h, w), still on the scale and of the dtype that it came in."""
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if do_normalize and isinstance(values, (list, tuple)) and len(values) != len(image):
                raise ValueError(
                    f"{where} has {len(image)} channels but {name} has {len(values)} values. Set do_convert_rgb=True "
                    "for RGB, or give as many values."
                )
        if do_rescale and image.is_floating_point() and 0 < float(image.max()) <= 1:
            logger.warning_once(
                "A floating-point image has no value above 1: it seems to be scaled to 0..1 already, and is "
                "multiplied by rescale_factor again. Pass do_rescale=False for such images."
            )
        if do_autocontrast:
            image = autocontrast(image)
        if do_resize:
            image = self.resize(image, size, resample)  # fastest as images lie in memory, channels last
        return image.flip(0) if do_flip_channel_order else image

    def _normalized(
        self,
        image: Tensor,
        padded_size: tuple[int, int],
        *,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        **options: Any,
    ) -> Tensor:
        """(C, h, w) -> rescaled, normalised, padded with 0: (C, *padded_size) float32."""
        padded, inside = padding(image.shape, padded_size, dtype=torch.float32, device=image.device)
        inside.copy_(image)
        if do_normalize:
            scale = 1.0 / rescale_factor if do_rescale else 1.0
            mean, std = (torch.tensor(values, device=image.device) * scale for values in (image_mean, image_std))
            self.normalize(inside, mean, std, inplace=True)
        elif do_rescale:
            inside *= rescale_factor
        return padded

    def resize(  # type: ignore[override]
        self, image: Tensor, size: SizeDict, resample: Any = None, **kwargs: Any
    ) -> Tensor:
        """(C, H, W) -> (C, h, w) by any form of `size`; the aspect ratio stays unless height and width are given."""
        height, width = resized_size(_size(image), size)
        resized = super().resize(with_fourth_byte(image), SizeDict(height=height, width=width), resample, **kwargs)
        return resized[: len(image)]


def check_image_options(options: Mapping[str, Any]) -> None:
    """ValueError for sizes, deviations and factors with which no image could be made."""
    for name in ("size", "pad_size"):
        for edge, length in dict(options.get(name) or {}).items():
            if length is not None:
                require_range(f"{name}[{edge!r}]", length, "[1, inf)")
    for name, interval in (("image_mean", "(-inf, inf)"), ("image_std", "(0, inf)"), ("rescale_factor", "(0, inf)")):
        values = options.get(name)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is not None:
                require_range(name, value, interval)
    resample = options.get("resample")
    if isinstance(resample, int) and resample not in list(PILImageResampling):
        raise ValueError(f"resample={resample} must be one of {', '.join(map(str, PILImageResampling))}.")


def pixel_mask(size: tuple[int, int], padded_size: tuple[int, int], device: torch.device) -> Tensor:
    """1 inside, 0 in the padding: (*padded_size) int64."""
    mask, inside = padding(size, padded_size, dtype=torch.int64, device=device)
    inside.fill_(1)
    return mask


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _batch_feature(data: dict[str, list[Any]], return_tensors: Any) -> BatchFeature:
    """Stacks what has one shape for all images; what has one entry a segment stays a list."""
    if return_tensors is not None and TensorType(return_tensors) == TensorType.NUMPY:
        data = {name: [value.cpu().numpy() for value in values] for name, values in data.items()}
    elif return_tensors is not None and len(data["pixel_values"]) == 1:
        data = {k: v if k in PER_SEGMENT else v[0][None] for k, v in data.items()}  # stacking one would copy it
    feature = BatchFeature({k: v for k, v in data.items() if k not in PER_SEGMENT}, tensor_type=return_tensors)
    feature.update({k: v for k, v in data.items() if k in PER_SEGMENT})
    return feature
