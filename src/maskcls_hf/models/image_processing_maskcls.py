"""Images to network inputs, annotations to targets, and network outputs back to maps of the images."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType, logging

from .checkpoint_manifest import PROCESSOR_FILES, require_whole
from .configuration_maskcls import COMPATIBILITIES, CONFIG_READERS
from .image_reading import autocontrast, image_list, image_to_tensor, open_image, reading, with_fourth_byte
from .inference_defaults import OF_EOMT, WITHOUT_DEFAULTS, checked_inference_defaults
from .options import checked_label_ids, naming, open_backbone, plain, require_range, unused, warn_about_unused
from .post_processing import OutputMapsMixin, give_back_memory
from .resampling import padded_sizes, padding, resized_size, windows_along
from .segments import LabelRules, Segments, read_segments

logger = logging.get_logger(__name__)

# What the files of transformers' image processors do not say; its MaskFormer's are read as exact ones.
OF_ORIGIN: dict[str, dict[str, Any]] = {
    "Mask2Former": {"compatibility": "transformers", "inference_defaults": {}},
    "Eomt": {"compatibility": "transformers", "inference_defaults": OF_EOMT, "image_fit": "pad"},
}
CHOICES: dict[str, tuple[str, ...]] = {
    "label_format": ("segments", "segment_map", "semantic"),
    "compatibility": COMPATIBILITIES,
    "image_fit": ("pad", "stretch"),
    "size_rounding": ("down", "nearest"),
}
INTEGERS = ("void_id", "label_offset", "num_labels", "size_divisor", "pad_value")
# What transformers keeps in files of image processors, and what its from_pretrained and pipelines (which give the
# model's options to the image processor too) hand on.
IN_FILES = ("auto_map", "feature_extractor_type", "image_processor_type", "processor_class")
OF_LOADING = (
    "attn_implementation", "backend", "code_revision", "config", "device_map", "dtype", "ignore_mismatched_sizes",
    "key_mapping", "low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_folder", "output_loading_info",
    "quantization_config", "return_unused_kwargs", "state_dict", "torch_dtype", "tp_plan", "trust_remote_code",
    "use_fast", "use_safetensors", "variant", "weights_only",
)  # fmt: skip
BINARY_MAPS = 16  # so many of 0 and 255 alone, before any other map, are no chance
PER_SEGMENT = ("mask_labels", "class_labels")  # images differ in the number of segments: never stacked


class MaskClsImageProcessorKwargs(ImagesKwargs, total=False):
    r"""Options of the image processor, beside those of transformers' `ImagesKwargs`.

    compatibility (`str`, *optional*, defaults to `"exact"`):
        Whose images and maps these are where implementations differ: `"exact"`, `"transformers"` or `"paper"`. The file
        of transformers' Mask2Former or EoMT is read as `"transformers"`; its MaskFormer's as `"exact"`, as ever. What
        follows from it counts more where it is given: `image_fit`, and the `rule` of a task in `inference_defaults`.
    image_fit (`str`, *optional*):
        How images get a size that `size_divisor` divides: `"pad"`, or `"stretch"`, resized to it. `None`: `"stretch"`
        with the compatibility `"transformers"`, else `"pad"`.
    size_divisor (`int`, *optional*, defaults to 32):
        Images are padded to a multiple of it, at the bottom and right (see `image_fit`). `None`: no multiple.
    pad_size (`dict[str, int]`, *optional*):
        Pad to this height and width instead of those of the largest image of the batch.
    pad_value (`int`, *optional*):
        Of the padding, on the scale of the images: 0 is black. `None`: 0 after normalization, the mean color.
    void_id (`int`, *optional*, defaults to 255):
        Value of unlabeled pixels in segmentation maps, before `label_offset`. `None`: every value is a label.
    label_offset (`int`, *optional*, defaults to 0):
        Class id = label value - `label_offset`; lower values are void. 1 for ADE20K's maps, where 0 is "other".
    num_labels (`int`, *optional*):
        Number of classes. When known, an id outside is an error.
    label_format (`str`, *optional*, defaults to `"segments"`):
        `"segments"`: `mask_labels`, `class_labels`, `void_mask`. `"segment_map"`: the same in few bytes, each image's
        `mask_labels` a map of places. `"semantic"`: `labels`, one class id a pixel.
    keep_emptied_targets (`bool`, *optional*, defaults to `False`):
        Segments without a pixel, as a crop leaves them, are targets whose mask is empty, as in the panoptic mapper of
        Mask2Former's code; else they are left out.
    label_ids_to_fuse (`list[int]`, *optional*):
        Classes without instances (stuff): panoptic post-processing makes one segment of each.
    do_autocontrast (`bool`, *optional*, defaults to `False`):
        Stretch each channel of each image to the full range first; for microscopes and other dim images.
    do_flip_channel_order (`bool`, *optional*, defaults to `False`):
        Networks that were trained on BGR: red and blue change places.
    do_split_image (`bool`, *optional*, defaults to `False`):
        Cut each resized image into windows of `size["shortest_edge"]` along its longer side, each an image to the
        network (EoMT, semantic segmentation); maps are of whole images again, with averaged scores.
    size_rounding (`str`, *optional*):
        Of the edge that the aspect ratio gives: `"down"`, or `"nearest"` as in the papers' code. `None`: `"nearest"`
        with the compatibility `"paper"`, else `"down"`.
    inference_defaults (`dict`, *optional*):
        How the model is run well where a caller does not say: `task`, `tile`, `overlap` and `enlarge` of `Predictor`,
        and under `semantic`, `panoptic` and `instance` options of `post_process_<task>_segmentation`.
    ignore_index (`int`, *optional*):
        transformers' name of `void_id`; where given, it sets `void_id`.
    do_reduce_labels (`bool`, *optional*):
        transformers' name of `label_offset=1`; where given, it sets `label_offset`.
    """

    compatibility: str
    image_fit: str | None
    size_divisor: int | None
    pad_value: int | None
    void_id: int | None
    label_offset: int
    num_labels: int | None
    label_format: str
    keep_emptied_targets: bool
    label_ids_to_fuse: list[int] | tuple[int, ...] | set[int] | None
    do_autocontrast: bool
    do_flip_channel_order: bool
    do_split_image: bool
    size_rounding: str | None
    inference_defaults: dict[str, Any] | None
    ignore_index: int | None
    do_reduce_labels: bool | None


class MaskClsImageProcessor(OutputMapsMixin, TorchvisionBackend):
    """Prepares images and annotations for the models of this package, and turns their outputs into maps.

    Resize -> rescale -> normalize -> pad with 0 at the bottom and right. Defaults: shortest edge 512, longest at
    most 2048 (the paper's ADE20K test setting), ImageNet mean and deviation, multiples of 32 pixels.

    Examples:
        >>> import numpy as np
        >>> from maskcls_hf import MaskClsImageProcessor
        >>> image, class_map = np.zeros((60, 80, 3), np.uint8), np.zeros((60, 80), np.uint8)
        >>> class_map[10:20, 10:20] = 1
        >>> image_processor = MaskClsImageProcessor(size={"shortest_edge": 60}, num_labels=2)
        >>> inputs = image_processor(image, class_map, return_tensors="pt")
        >>> inputs["pixel_values"].shape, inputs["mask_labels"][0].shape, inputs["class_labels"][0]
        (torch.Size([1, 3, 64, 96]), torch.Size([2, 64, 96]), tensor([0, 1]))
    """

    _auto_class = "AutoImageProcessor"  # type: ignore[assignment]  # saved with the code that reads it
    valid_kwargs = MaskClsImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]
    compatibility = "exact"
    image_fit = None
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
    pad_value = None
    void_id = 255
    label_offset = 0
    num_labels = None
    label_format = "segments"
    keep_emptied_targets = False
    label_ids_to_fuse = None
    do_autocontrast = False
    do_flip_channel_order = False
    do_split_image = False
    size_rounding = None
    inference_defaults: dict[str, Any] = {}  # always saved: a file without it is of before, or of others
    _binary_maps: int | None = None  # maps of 0 and 255 so far; None: they are not watched for

    @classmethod
    def get_image_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers; of a checkpoint with a manifest, its files are verified first."""
        require_whole(pretrained_model_name_or_path, PROCESSOR_FILES, kwargs.get("subfolder") or "")
        return super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)

    def __init__(self, **kwargs: Unpack[MaskClsImageProcessorKwargs]) -> None:
        """Also reads the older names in configs of transformers' MaskFormer. A name without meaning is warned about."""
        options = _own_names(kwargs)
        warn_about_unused(options, {*self.valid_kwargs.__annotations__, *IN_FILES}, type(self).__name__)
        super().__init__(**options)
        if "void_id" not in options:
            self._binary_maps = 0

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; `kwargs` count more than the dict, by whichever name an option is given.

        What was saved without `inference_defaults` keeps the panoptic threshold that it was saved with, 0.8.

        Raises:
            ValueError: the dict is of an image processor that does something else.
        """
        cls.require_readable(image_processor_dict)
        options = _own_names(kwargs)
        if not options.get("return_unused_kwargs"):
            warn_about_unused(options, {*cls.valid_kwargs.__annotations__, *OF_LOADING}, cls.__name__)
        origin = str(image_processor_dict.get("image_processor_type"))
        fields = next((OF_ORIGIN[name] for name in OF_ORIGIN if origin.startswith(name)), {})
        own = _own_names(fields_of_eomt(image_processor_dict) if origin.startswith("Eomt") else image_processor_dict)
        result = super().from_dict({"inference_defaults": WITHOUT_DEFAULTS, **fields, **own}, **options)
        processor = result[0] if isinstance(result, tuple) else result
        processor._binary_maps = None if "void_id" in options else 0
        return result

    @classmethod
    def require_readable(cls, image_processor_dict: Mapping[str, Any]) -> None:
        """Raise `ValueError` for the options of a class whose images are not those of a segmentation network, a
        classifier or a backbone: it does more with them than these options say.
        """
        from transformers.models.auto import modeling_auto as auto

        names = [image_processor_dict.get(key) for key in ("image_processor_type", "feature_extractor_type")]
        name = next(filter(None, names), cls.__name__)
        family = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name).lower()
        read = {
            *CONFIG_READERS,
            *auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            *auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
            *auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
        }
        own = {base.__name__ for base in cls.__mro__}
        if name not in own and family not in {re.sub("[-_]", "", model_type) for model_type in read}:
            raise ValueError(
                f"{name} is no image processor that {cls.__name__} reads: of its own, of {', '.join(CONFIG_READERS)}, "
                "and of classifiers, backbones and per-pixel models of transformers. AutoImageProcessor may read it; "
                "of a universal segmentation model such as OneFormer, maskcls_hf.Predictor runs it with the model."
            )

    def to_dict(self) -> dict[str, Any]:
        """As in transformers."""
        return {name: value for name, value in super().to_dict().items() if name != "_binary_maps"}

    @classmethod
    def from_backbone(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """An image processor that prepares images as a pretrained backbone wants them: mean, deviation, interpolation.

        Args:
            name_or_path: as in `MaskClsForUniversalSegmentation.from_backbone`.
            options: others of this class; they count more.
        """
        return cls(**{**open_backbone(name_or_path).processor_fields(), **options})

    @property
    def ignore_index(self) -> int | None:
        """Transformers' name of `void_id`."""
        return self.void_id

    @ignore_index.setter
    def ignore_index(self, value: int | None) -> None:
        self.void_id = value  # type: ignore[assignment]  # None is a value too

    @property
    def do_reduce_labels(self) -> bool:
        """Transformers' name of `label_offset=1`."""
        return bool(self.label_offset)

    @do_reduce_labels.setter
    def do_reduce_labels(self, value: bool) -> None:
        self.label_offset = int(value)

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
                indices), array, tensor or path; with `class_labels` a stack of masks that may overlap, (M, H, W) or
                a list of M masks; or `Segments`, with classes of their own.
            instance_id_to_semantic_id: for maps of instance ids, instance id -> label value; one dict for all
                images or one for each. `None` as label: no segment (background). Ids that are not in it are
                void where they equal `void_id` or lie below `label_offset`, else an error.
            class_labels: for stacks, M label values for each image. A mask labeled `void_id` marks void.
            kwargs: any option of the processor, for this call.

        Returns:
            `pixel_values` (B, 3, H, W) float32, `pixel_mask` (B, H, W) int64 with 1 on the image and 0 on padding,
            `original_sizes` (B, 2) int64, height and width before resizing. With annotations `mask_labels`, a
            list of B (M, H, W) bool; `class_labels`, a list of B (M,) int64; `void_mask` (B, H, W) bool. For
            `label_format="segment_map"`, `mask_labels` are B maps (H, W) int32, the place of each pixel's segment in
            `class_labels` and -1 in none (overlapping masks stay a stack). For `label_format="semantic"` only
            `labels` (B, H, W) int64 with `void_id` at void and padded pixels. Segments without a pixel after
            resizing are left out, unless `keep_emptied_targets`. With `do_split_image` B counts windows (but for
            `original_sizes`), and `patch_offsets` (B, 3) int64 has the image of each, its first pixel and its end along
            the longer side. `return_tensors=None`: lists of tensors.

        Raises:
            ValueError: an annotation and its image differ in size, an id is outside the classes or has no class,
                a map has colors, an image is larger than `pad_size`. The message names the image.
        """
        options = _own_names(kwargs)
        for name in options:
            if name not in self.valid_kwargs.__annotations__:
                raise TypeError(unused(name, self.valid_kwargs.__annotations__, type(self).__name__))
        if options.get("size") is not None and self._pads_to_size:
            options.setdefault("pad_size", None)
        return super().preprocess(images, segmentation_maps, instance_id_to_semantic_id, class_labels, **options)

    @property
    def _pads_to_size(self) -> bool:
        """Whether `pad_size` is the square that images are resized to, as EoMT's, and so goes with that size alone."""
        size, pad_size = dict(self.size or {}), dict(getattr(self, "pad_size", None) or {})
        return {*pad_size.values()} == {size.get("shortest_edge")} == {size.get("longest_edge")}

    def _standardize_kwargs(  # type: ignore[override]
        self, ignore_index: int | None = None, do_reduce_labels: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Canonical forms, checked. transformers' aliases drop out: `_own_names` has read them."""
        kwargs = super()._standardize_kwargs(**kwargs)
        for name in INTEGERS:
            value = kwargs.get(name)
            if not isinstance(value, int) and (value is not None or name == "label_offset"):
                raise ValueError(f"{name}={value!r} must be an integer.")
        if kwargs.get("num_labels") is not None and kwargs["num_labels"] < 1:
            raise ValueError(f"num_labels={kwargs['num_labels']} must be at least 1, or None.")
        _check_image_options(kwargs)
        for name, value in kwargs.items():
            if name.startswith("do_") and isinstance(value, str):
                raise ValueError(f"{name}={value!r} must be True or False.")
        if kwargs.get("data_format") not in (None, "channels_first", ChannelDimension.FIRST):
            raise ValueError(f"data_format={kwargs['data_format']!r}: pixel_values are (B, C, H, W), channels first.")
        if kwargs.get("label_ids_to_fuse") is not None:
            kwargs["label_ids_to_fuse"] = checked_label_ids(kwargs["label_ids_to_fuse"])
            if kwargs["label_ids_to_fuse"] and kwargs["label_ids_to_fuse"][-1] >= (kwargs["num_labels"] or math.inf):
                raise ValueError(
                    f"label_ids_to_fuse={kwargs['label_ids_to_fuse']} must be class ids below num_labels="
                    f"{kwargs['num_labels']}."
                )
        if kwargs.get("image_fit") is None:
            kwargs["image_fit"] = "stretch" if kwargs["compatibility"] == "transformers" else "pad"
        if kwargs.get("size_rounding") is None:
            kwargs["size_rounding"] = "nearest" if kwargs["compatibility"] == "paper" else "down"
        kwargs["inference_defaults"] = checked_inference_defaults(kwargs.get("inference_defaults") or {})
        for name, choices in CHOICES.items():
            if kwargs.get(name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {kwargs.get(name)!r}.")
        if (kwargs.get("size_divisor") or 0) < 0:
            raise ValueError(f"size_divisor must be positive or None, got {kwargs['size_divisor']}.")
        if kwargs.get("do_center_crop"):
            raise ValueError("do_center_crop is not supported: crop image and labels together beforehand.")
        return kwargs

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths and URLs -> images; a local file keeps its own mode and depth."""
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(item) for item in source]
        if not isinstance(source, (str, os.PathLike)):
            return source
        with reading(source):
            if isinstance(source, os.PathLike) or os.path.isfile(source):
                return open_image(source)
            return super().fetch_images(source)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        device: Any = None,
        **options: Any,
    ) -> Tensor:
        """One image -> (C, H, W) on the 0..255 scale.

        Args:
            image: PIL image, array or tensor.
            do_convert_rgb: make three channels of gray, palettes, CMYK and transparency.
            input_data_format: "channels_first" or "channels_last", where an array does not tell.
            device: of the result.
            options: of the image processor, which have no part in it.
        """
        return image_to_tensor(image, bool(do_convert_rgb), input_data_format).to(device)

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: ImageInput,
        segmentation_maps: Any,
        instance_id_to_semantic_id: Any,
        class_labels: Any,
        **options: Any,
    ) -> BatchFeature:
        give_back_memory()
        tensors = []
        for i, image in enumerate(image_list(self.fetch_images(images))):
            with naming(f"image {i}"):
                tensors.append(self.process_image(image, **options))
        labels = (segmentation_maps, instance_id_to_semantic_id, class_labels)
        if all(given is None for given in labels):
            return self._preprocess(tensors, **options)
        sizes = [_size(image) for image in tensors]
        resized = [fitted_size(size, **options) for size in sizes] if options["do_resize"] else sizes
        watch = None if self._binary_maps is None else self._refuse_binary_maps
        rules = LabelRules(options["void_id"], options["label_offset"], options["num_labels"], watch)
        return self._preprocess(tensors, read_segments(*labels, rules, sizes, resized), **options)

    def _refuse_binary_maps(self, values: Sequence[int]) -> None:
        """Told the values of each map of classes.

        ValueError: `BINARY_MAPS` of them hold 0 and 255 alone and no other one anything else: masks whose second class
        is 255, of which nothing would be learned.

        One map does not tell, as it may show nothing but class 0; nor do any where the user has said what is void.
        """
        if self._binary_maps is None or set(values) - {0, 255}:
            self._binary_maps = None
        elif len(values) == 2:
            self._binary_maps += 1
            if self._binary_maps >= BINARY_MAPS:
                raise ValueError(
                    f"{self._binary_maps} segmentation maps hold 0 and 255 alone, and there was no other one. 255 is "
                    "read as unlabeled, so the class that it marks would not be learned: if these are masks, give "
                    "(mask > 0).astype('uint8'). If 255 does mark unlabeled pixels, say void_id=255 where the image "
                    "processor is made or loaded."
                )

    def _preprocess(  # type: ignore[override]
        self,
        images: list[Tensor],
        segments: list[Segments] | None = None,
        *,
        return_tensors: Any = None,
        **options: Any,
    ) -> BatchFeature:
        resized = [self._resized(image, f"image {i}", **options) for i, image in enumerate(images)]
        offsets: list[tuple[int, int, int]] = []
        if options["do_split_image"]:
            offsets = _window_offsets([_size(image) for image in images], [_size(image) for image in resized], options)
            if segments is not None:
                segments = [segments[i].with_pixels(_window_of(segments[i].pixels, *ends)) for i, *ends in offsets]
            resized = [_window_of(resized[i], *ends) for i, *ends in offsets]
        sizes = [_size(image) for image in resized]
        padded = padded_sizes(sizes, options["do_pad"], options["pad_size"], options["size_divisor"])
        data: dict[str, list[Tensor]] = {
            "pixel_values": [self._normalized(i, size, **options) for i, size in zip(resized, padded, strict=True)],
            "pixel_mask": [pixel_mask(_size(i), size, i.device) for i, size in zip(resized, padded, strict=True)],
            "original_sizes": [torch.tensor(_size(image), device=image.device) for image in images],
        }
        if offsets:
            data["patch_offsets"] = [torch.tensor(offset, device=images[0].device) for offset in offsets]
        for i, of_image in enumerate(segments or []):
            if options["label_format"] == "semantic":
                known = (options["void_id"], options["num_labels"])
                targets = {"labels": of_image.semantic_targets(padded[i], *known, resized[i].device)}
            else:
                as_map = options["label_format"] == "segment_map"
                keep_emptied = options["keep_emptied_targets"]
                targets = of_image.targets(padded[i], as_map, resized[i].device, keep_emptied)
            for name, target in targets.items():
                data.setdefault(name, []).append(target)
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
        rescale_factor: float,
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
        if do_rescale and image.is_floating_point():
            low, high = float(image.min()), float(image.max())
            if 0 < high <= 1:
                logger.warning_once(
                    "A floating-point image has no value above 1: it seems to be scaled to 0..1 already, and is "
                    "multiplied by rescale_factor again. Pass do_rescale=False for such images."
                )
            elif (low < 0 or high > 255) and math.isclose(rescale_factor, 1 / 255):
                logger.warning_once(
                    f"{where} holds floating-point values from {low:.6g} to {high:.6g}, but rescale_factor=1/255 is "
                    "for 0..255. Pass the rescale_factor of this range, or do_rescale=False."
                )
        if do_autocontrast:
            image = autocontrast(image)
        if do_resize:
            height, width = fitted_size(_size(image), size, **options)
            # Fastest as images lie in memory, channels last.
            image = self.resize(image, SizeDict(height=height, width=width), resample)
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
        pad_value: int | None,
        **options: Any,
    ) -> Tensor:
        """(C, h, w) -> rescaled, normalized, padded: (C, *padded_size) float32."""
        shape, fill = image.shape, pad_value or 0
        padded, inside = padding(shape, padded_size, fill, dtype=torch.float32, device=image.device)
        inside.copy_(image)
        inside = inside if pad_value is None else padded
        if do_normalize:
            scale = 1.0 / rescale_factor if do_rescale else 1.0
            mean, std = (
                (torch.tensor(values, device=image.device) * scale).view(-1, 1, 1) for values in (image_mean, image_std)
            )
            inside.sub_(mean).div_(std)  # self.normalize of transformers 5.17 is not in place
        elif do_rescale:
            inside *= rescale_factor
        return padded

    def resize(  # type: ignore[override]
        self, image: Tensor, size: SizeDict, resample: Any = None, **kwargs: Any
    ) -> Tensor:
        """(C, H, W) -> (C, h, w) by any form of `size`; the aspect ratio stays unless height and width are given.

        Args:
            image: (C, H, W).
            size: shortest and longest edge, height and width, or their maxima; in pixels.
            resample: of `PILImageResampling`. None: bilinear.
            kwargs: of transformers' `resize`.
        """
        height, width = resized_size(_size(image), size)
        resized = super().resize(with_fourth_byte(image), SizeDict(height=height, width=width), resample, **kwargs)
        return resized[: len(image)]


def fields_of_eomt(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of transformers' EoMT image processor says, by our names.

    It pads to the square that it resizes to, in black; `ignore_index` means that labels are reduced: 0 is ignored.
    """
    fields = dict(saved)
    size = {"shortest_edge": 640, "longest_edge": 640, **(fields.get("size") or {})}
    if fields.get("do_pad"):
        shortest = size["shortest_edge"]
        fields["pad_size"] = {"height": shortest, "width": size["longest_edge"] or shortest}
    fields |= {"size": size, "do_pad": True, "pad_value": 0}  # without it, images of one size only make a batch
    if fields.get("ignore_index") is not None:
        fields["do_reduce_labels"] = True
    return fields


def _window_offsets(
    sizes: Sequence[tuple[int, int]], resized: Sequence[tuple[int, int]], options: Mapping[str, Any]
) -> list[tuple[int, int, int]]:
    """Of images (height, width), windows along their longer side after resizing: image, first pixel, end."""
    offsets = []
    for i, (before, after) in enumerate(zip(sizes, resized, strict=True)):
        windows = windows_along(max(after), options["size"].shortest_edge or min(after))
        if len(windows) > 1 and (before[0] > before[1]) != (after[0] > after[1]):
            raise ValueError(f"image {i}: do_split_image cuts along the longer side; {before} became {after}.")
        offsets += [(i, *ends) for ends in windows]
    return offsets


def _window_of(pixels: Tensor, start: int, end: int) -> Tensor:
    """(..., H, W) -> a window of it, a view."""
    return pixels[..., start:end, :] if pixels.shape[-2] > pixels.shape[-1] else pixels[..., start:end]


def fitted_size(
    image_size: tuple[int, int],
    size: SizeDict,
    image_fit: str,
    size_divisor: int | None,
    size_rounding: str,
    **options: Any,
) -> tuple[int, int]:
    """Height and width of an image after resizing.

    Args:
        image_size: height and width before.
        size: as of the image processor's `size`.
        image_fit: "stretch" rounds up to multiples of `size_divisor`, "pad" does not.
        size_divisor: None: 1.
        size_rounding: "down" or "nearest", of the edge that the aspect ratio gives.
        options: further ones of the image processor, which have no part in it.
    """
    resized = resized_size(image_size, size, size_rounding)
    if image_fit == "stretch":
        return padded_sizes([resized], True, None, size_divisor)[0]
    return resized


def _own_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the names that they are kept under, their numbers as Python's.

    Raises:
        ValueError: an option has two values, by two names.
    """
    given: dict[str, Any] = plain(dict(options))
    for old, new in (("size_divisibility", "size_divisor"), ("reduce_labels", "do_reduce_labels")):
        if old in given:
            given.setdefault(new, given.pop(old))
    longest_edges = [given.pop(name, None) for name in ("max_size", "_max_size")]
    if isinstance(given.get("size"), int) and any(longest_edges):
        given["size"] = {"shortest_edge": given["size"], "longest_edge": max(filter(None, longest_edges))}
    for alias, name, convert in (("ignore_index", "void_id", lambda v: v), ("do_reduce_labels", "label_offset", int)):
        value = given.pop(alias, None)
        if value is None:
            continue
        if name in given and given[name] != convert(value):
            raise ValueError(f"{alias}={value!r} is another name of {name}={convert(value)}: {name}={given[name]!r}?")
        given[name] = convert(value)
    return given


def _check_image_options(options: Mapping[str, Any]) -> None:
    """ValueError for sizes, deviations and factors with which no image could be made."""
    for name in ("size", "pad_size"):
        for edge, length in dict(options.get(name) or {}).items():
            if length is not None:
                require_range(f"{name}[{edge!r}]", length, "[1, inf)", integer=True)
    for name, interval in (("image_mean", "(-inf, inf)"), ("image_std", "(0, inf)"), ("rescale_factor", "(0, inf)")):
        values = options.get(name)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is not None:
                require_range(name, value, interval)
    resample = options.get("resample")
    if isinstance(resample, int) and resample not in list(PILImageResampling):
        raise ValueError(f"resample={resample} must be one of {', '.join(map(str, PILImageResampling))}.")


def pixel_mask(size: tuple[int, int], padded_size: tuple[int, int], device: torch.device) -> Tensor:
    """1 inside, 0 in the padding: (*padded_size) int64.

    Args:
        size: height and width of the image.
        padded_size: height and width with its padding.
        device: of the result.
    """
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
