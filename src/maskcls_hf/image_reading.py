"""Images and label maps of any kind and mode become tensors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

from .label_tensors import array_as_tensor, integers, label_tensor

try:
    import pyarrow
except ImportError:  # images are then copied
    pyarrow = None


def open_image(source: str | os.PathLike) -> Image.Image:
    """A local file as PIL image in its own mode: palette, depth and EXIF orientation are still to be read."""
    with Image.open(source) as image:
        image.load()
        return image


@contextmanager
def reading(source: Any) -> Iterator[None]:
    """Around the reading of a file, URL or encoded image: what goes wrong becomes a ValueError that names it. Of a
    missing file there is an error that does so already."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # broken files raise errors of many kinds
        name = os.fspath(source)
        name = name if len(name) <= 200 else f"{name[:80]}..."  # an image in a data URL is long
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def image_list(images: Any) -> list[Any]:
    """An image, a batch array (B, C, H, W) or (B, H, W, C), or nested lists of these -> a flat list of images.

    Raises ValueError for no image at all, TypeError for what is no image.
    """
    found = _flattened(images)
    if not found:
        raise ValueError("no image given.")
    for i, image in enumerate(found):
        if not isinstance(image, (Image.Image, np.ndarray, Tensor)):
            raise TypeError(f"image {i} is a {type(image).__name__}; expected a PIL image, array, tensor or path.")
    return found


def _flattened(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)):
        return [image for item in images for image in _flattened(item)]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def image_to_tensor(
    image: Image.Image | np.ndarray | Tensor,
    to_rgb: bool = True,
    input_data_format: str | ChannelDimension | None = None,
) -> Tensor:
    """Image -> (C, H, W): uint8, or float32 for 16-bit (0..65535 becomes 0..255) and floating-point images.

    PIL images are turned upright by their EXIF orientation. `to_rgb` makes three channels of one (grey), two
    (grey, alpha), four (RGBA), a palette or CMYK; transparency is laid over white, as transformers does.
    Arrays and tensors are (H, W), or have 1, 3 or 4 channels first or last, which `input_data_format` settles
    where it is ambiguous.
    """
    if isinstance(image, Image.Image):
        pixels = _pil_pixels(image, to_rgb)
        input_data_format = ChannelDimension.LAST
    elif isinstance(image, np.ndarray):
        pixels = array_as_tensor(image)
    else:
        pixels = image
    if pixels.ndim == 2:
        pixels, input_data_format = pixels[None], ChannelDimension.FIRST
    if pixels.ndim != 3:
        raise ValueError(f"an image has 2 or 3 dimensions, got shape {tuple(pixels.shape)}.")
    if not pixels.numel():
        raise ValueError(f"the image is empty: shape {tuple(pixels.shape)}.")
    if input_data_format is None:
        try:
            input_data_format = infer_channel_dimension_format(pixels, num_channels=(1, 3, 4))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(
                f"no axis of shape {tuple(pixels.shape)} holds 1, 3 or 4 channels; convert the image to RGB, or give "
                "input_data_format for another number of channels."
            ) from error
    if ChannelDimension(input_data_format) == ChannelDimension.LAST:
        pixels = pixels.permute(2, 0, 1)
    pixels = _to_8_bit_scale(pixels)
    return _to_rgb(pixels) if to_rgb else pixels


def read_label_map(label_map: Any, where: str) -> Tensor:
    """PIL image (palette: its indices), path, array or tensor -> integer ids (H, W).

    Raises ValueError for more than one channel (colours) and for values that are no integers.
    """
    if isinstance(label_map, (str, os.PathLike)):
        if not os.path.isfile(label_map):
            raise ValueError(f"{where}: segmentation map {os.fspath(label_map)!r} is not a file.")
        with reading(label_map):
            label_map = open_image(label_map)
    kind = "array"
    if isinstance(label_map, Image.Image):
        kind = f"image of mode {label_map.mode!r}"
        label_map = np.array(ImageOps.exif_transpose(label_map))
    if not isinstance(label_map, Tensor):
        label_map = label_tensor(label_map)
    shape = tuple(label_map.shape)
    if label_map.ndim == 3 and 1 in (shape[0], shape[-1]):
        label_map = label_map.squeeze(0 if shape[0] == 1 else -1)
    if label_map.ndim != 2:
        raise ValueError(
            f"{where}: the segmentation map is an {kind} of shape {shape}; expected one id for each pixel, (H, W). "
            "Turn colours into ids first. COCO panoptic PNG: id = R + 256 * G + 65536 * B, and give "
            "instance_id_to_semantic_id={segment['id']: segment['category_id'], ...}. A palette file must be "
            "opened without .convert('RGB'). A stack of masks (M, H, W) needs class_labels."
        )
    return integers(label_map, where)


def coloured_ids(colours: np.ndarray) -> np.ndarray:
    """(..., 3) -> (...) int32, R + 256 G + 65536 B, as in COCO panoptic files."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return red + 256 * green + 65536 * blue


def read_coloured_map(image: Image.Image | np.ndarray, where: str) -> Tensor:
    """RGB image or array (H, W, 3) -> its `coloured_ids` (H, W); ValueError for other channels."""
    if isinstance(image, Image.Image) and image.mode == "RGB" and sys.byteorder == "little":
        in_place = _memory_of(image)
        if in_place is not None:
            return in_place.view(torch.int32)[..., 0] & 0xFFFFFF
    colours = np.asarray(image)
    if colours.ndim != 3 or colours.shape[-1] != 3:
        mode = getattr(image, "mode", "array")
        raise ValueError(f"{where} has shape {colours.shape} ({mode}), a COCO panoptic map has three channels (RGB).")
    return torch.from_numpy(coloured_ids(colours))


def read_mask_stack(stack: Any, image_size: tuple[int, int], where: str) -> Tensor:
    """Array or tensor (M, H, W), or a list of M masks -> bool (M, H, W). Masks may overlap; nonzero is inside."""
    if isinstance(stack, (list, tuple)):
        masks = [_inside(read_label_map(mask, where), where) for mask in stack]
        sizes = sorted({tuple(mask.shape) for mask in masks})
        if len(sizes) > 1:
            raise ValueError(f"{where}: the masks of one stack have different sizes: {sizes}.")
        return torch.stack(masks) if masks else torch.zeros((0, *image_size), dtype=torch.bool, device="cpu")
    stack = stack if isinstance(stack, Tensor) else label_tensor(stack)
    if stack.ndim != 3:
        raise ValueError(
            f"{where}: with class_labels the segmentation map must be a stack of masks (M, H, W), "
            f"got shape {tuple(stack.shape)}. Leave class_labels out for a map of ids (H, W)."
        )
    return _inside(integers(stack, where), where)


def _inside(masks: Tensor, where: str) -> Tensor:
    inside = masks != 0
    if masks.numel() and bool((inside & (masks != masks.max())).any()):
        values = torch.unique(masks)[:10].tolist()
        raise ValueError(f"{where}: a mask has one nonzero value (1, 255 or True); these hold {values}.")
    return inside


def _pil_pixels(image: Image.Image, to_rgb: bool) -> Tensor:
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = np.array(image).astype(np.int64)
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 65535:
            raise ValueError(f"an image of mode {image.mode!r} holds values from {low} to {high}; expected 0..65535.")
        # Pillow opens a 16-bit file as I;16 or, by version, I. An 8-bit image can also have been converted to I.
        is_8_bit = image.mode == "I" and high <= 255
        return torch.from_numpy(pixels.astype(np.uint8 if is_8_bit else np.uint16))
    if to_rgb and image.mode not in ("1", "L", "F", "RGB"):
        transparent = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
        image = image.convert("RGBA" if transparent else "RGB")
    elif to_rgb and "transparency" in image.info:
        image = image.convert("RGBA")
    in_place = _memory_of(image) if image.mode == "RGB" else None
    return torch.from_numpy(np.array(image)) if in_place is None else in_place[..., :3]


def _memory_of(image: Image.Image) -> Tensor | None:
    """An RGB image (H, W, 4) without a copy, where the fourth byte says nothing; None where that cannot be had."""
    try:
        pixels = torch.from_dlpack(pyarrow.array(image).values)
    except (AttributeError, TypeError, ValueError):  # no pyarrow, an older one or Pillow; memory in many pieces
        return None
    return pixels.view(image.height, image.width, 4)


def with_fourth_byte(pixels: Tensor) -> Tensor:
    """RGB as Pillow keeps it, four bytes a pixel: all four of them, of which resizing needs no copy. Else `pixels`."""
    _, height, width = pixels.shape
    as_in_pillow = len(pixels) == 3 and pixels.dtype == torch.uint8 and pixels.stride() == (1, 4 * width, 4)
    if not as_in_pillow or pixels.untyped_storage().nbytes() < pixels.storage_offset() + 4 * height * width:
        return pixels
    return pixels.as_strided((4, height, width), pixels.stride())


def _to_8_bit_scale(pixels: Tensor) -> Tensor:
    if pixels.is_complex():
        raise ValueError(f"an image of {pixels.dtype} holds no real numbers.")
    if pixels.dtype in (torch.uint32, torch.uint64):  # torch has few operations on them
        pixels = pixels.long()
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.dtype == torch.uint16:
        return pixels.to(torch.float32) / 257
    if pixels.is_floating_point():
        pixels = pixels.to(torch.float32)
        if not bool(pixels.amin().isfinite() & pixels.amax().isfinite()):
            bad = int((~pixels.isfinite()).sum())
            raise ValueError(
                f"{bad} of the {pixels.numel()} values of the image are NaN or infinite. Give such pixels a number, "
                "and mark them as void in the annotation."
            )
        return pixels
    if pixels.dtype != torch.uint8:
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 255:
            raise ValueError(
                f"an image of {pixels.dtype} holds values from {low} to {high}; integers must lie in 0..255. Give "
                "16-bit images as uint16 (0..65535), other ranges as float32 with a matching rescale_factor."
            )
    return pixels.to(torch.uint8)


def _to_rgb(pixels: Tensor) -> Tensor:
    channels = pixels.shape[0]
    if channels in (2, 4):
        colour, alpha = pixels[:-1].float(), pixels[-1:].float()
        white = 255.0
        if pixels.is_floating_point() and float(pixels.max()) <= 1:
            white = 1.0
        composed = (colour * alpha + white * (white - alpha)) / white
        pixels = composed if pixels.is_floating_point() else composed.round().to(pixels.dtype)
    elif channels not in (1, 3):
        raise ValueError(f"cannot make RGB of {channels} channels; expected 1, 2, 3 or 4.")
    return pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels


def autocontrast(image: Tensor) -> Tensor:
    """(C, H, W) on the 0..255 scale, uint8 or floating point -> the same, each channel from 0 to 255."""
    if image.is_floating_point():
        return 255 * tvF.autocontrast(image / 255)  # torchvision's scale of floating-point images is 0..1
    return tvF.autocontrast(image)
