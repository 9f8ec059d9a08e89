"""Images and label maps of any kind and mode become tensors."""

from __future__ import annotations

import io
import math
import os
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

from .options import array_as_tensor, integers, label_tensor, naming

try:
    import pyarrow
except ImportError:  # images are then copied
    pyarrow = None


MAX_PIXELS = "MASKCLS_MAX_IMAGE_PIXELS"  # environment variable
ONE_PICTURE = ("MPO", "PSD")  # previews, depth or layers come after the picture
LOSSY = ("JPEG", "MPO")
NO_DATA = 1e30  # larger numbers mark pixels without data, such as the largest of float32 in maps of the earth
STARTS = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file: run `git lfs pull`",
    b"<!DOCTYPE": "it is a web page: the download failed",
    b"<html": "it is a web page: the download failed",
}
TIFF_BYTE_ORDERS = {b"II*\0": "<", b"II+\0": "<", b"MM\0*": ">", b"MM\0+": ">"}
EXIF_ORIENTATION = 0x0112
TURNED = (5, 6, 7, 8)  # orientations that swap height and width
# Tags of a TIFF that are looked at, and what its samples are by their format.
SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
DESCRIPTION, BANDS, STRIP_BYTES, FORMAT, DEPTH = 270, 277, 279, 339, 32997
NUMBERS = {3: "H", 4: "L"}  # types of tags
SAMPLES = {1: "uint", 2: "int", 3: "float", 5: "complex int", 6: "complex"}


def open_image(source: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
    """A local file as PIL image in its own mode: palette, depth and EXIF orientation are still to be read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, holds several pictures, or more pixels than `MASKCLS_MAX_IMAGE_PIXELS`.
    """
    with opened(source) as image:
        image.load()
        return image


@contextmanager
def opened(source: str | os.PathLike[str] | io.BytesIO) -> Iterator[Image.Image]:
    """As `open_image`, with the header alone; what fails inside is such a ValueError too."""
    try:
        _allow_pixels(os.environ.get(MAX_PIXELS))
        with Image.open(source) as image:
            _check_whole(image)
            image.info["bits_a_value"] = _bits(image)
            yield image
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise errors of many types for broken files
        raise ValueError(_cause(source, error)) from error


def size_in_header(source: str | os.PathLike[str] | io.BytesIO) -> tuple[int, int]:
    """Height and width of a file that is opened so, upright."""
    with opened(source) as image:
        width, height = image.size
        if image.format == "TIFF":  # newer versions of Pillow have turned this size already
            width, height = image.tag_v2[WIDTH], image.tag_v2[HEIGHT]  # type: ignore[attr-defined]
        return (width, height) if image.getexif().get(EXIF_ORIENTATION) in TURNED else (height, width)


def _allow_pixels(number: str | None) -> None:
    """Raise Pillow's limit, which guards against small files that become very large images."""
    if not number:
        return
    if not number.isdecimal():
        raise ValueError(f"the environment variable {MAX_PIXELS}={number} is no number of pixels.")
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, int(number))


def _check_whole(image: Any) -> None:
    """Pillow's first view of a file is all that it holds."""
    if image.format == "TIFF":
        tags = image.tag_v2
        # 1: a smaller copy, 4: a mask of transparency
        are_pictures = [
            not (tag.get(SUBFILE, (0,))[0] & 5 or tag.get(OLD_SUBFILE, (0,))[0] == 2)
            for tag in _tiff_directories(image.fp)
            if WIDTH in tag
        ]
        pages = sum(are_pictures)
        if pages == 1:
            pages = _pages_without_directory(image)
        if pages and not are_pictures[0]:
            raise ValueError("its first page is a smaller copy or a mask of another one: save that one as a file.")
        if pages <= 1 and tags.get(PHOTOMETRIC, 0) in (0, 1, 3) and tags.get(BANDS, 1) > len(image.getbands()):
            raise ValueError(f"it is {_tiff_kind(image.fp)}, of which Pillow gives the first. {_TIFF_ADVICE}")
    else:
        pages = 1 if image.format in ONE_PICTURE else getattr(image, "n_frames", 1)
    if pages > 1:
        raise ValueError(f"it has {pages} pages (frames), where one picture is expected: save each as a file.")


def _pages_without_directory(image: Any) -> int:
    """Pages of a TIFF with one directory: of a volume, or of a stack of ImageJ or tifffile, which lie one by one."""
    tags = image.tag_v2
    text, pages = str(tags.get(DESCRIPTION, "")), 1
    if tags.get(DEPTH, 1) > 1:
        return tags[DEPTH]
    if text.startswith("ImageJ=") and (stated := re.search(r"^images=(\d{1,9})$", text, re.M)):
        pages = int(stated[1])
    elif stated := re.match(r'{"shape": \[([\d, ]+)\]', text):
        numbers = math.prod(int(number) for number in stated[1].split(",")[:8])
        pages = numbers // (tags[WIDTH] * tags[HEIGHT] * tags.get(BANDS, 1))
    page = sum(tags.get(STRIP_BYTES, ()))
    # saved again, one page of them can have the text still
    return pages if page and pages * page <= image.fp.seek(0, os.SEEK_END) else 1


_TIFF_ADVICE = "Save it with 8 or 16 bits as gray (one band), RGB or RGBA, or as float32 of one band."


def _tiff_directories(file: IO[bytes]) -> Iterator[dict[int, tuple[int, ...]]]:
    """Of each page of a TIFF the tags that are a few whole numbers; up to where the file is cut off."""
    file.seek(0)
    start = file.read(16)
    order, is_big = TIFF_BYTE_ORDERS[start[:4]], 43 in start[2:4]
    word, counter, entry = (f"{order}{form}" for form in (("Q", "Q", "HHQ8s") if is_big else ("L", "H", "HHL4s")))
    unread = file.seek(0, os.SEEK_END)  # pages could overlap, so that there were more tags than bytes
    seen: set[int] = set()
    try:
        (place,) = struct.unpack_from(word, start, 8 if is_big else 4)
        while place and place not in seen:
            seen.add(place)
            file.seek(place)
            (count,) = struct.unpack(counter, file.read(struct.calcsize(counter)))
            unread -= (length := count * struct.calcsize(entry))
            if unread < 0:
                return
            entries = file.read(length)
            (place,) = struct.unpack(word, file.read(struct.calcsize(word)))
            yield {
                tag: _tiff_numbers(file, f"{order}{number}{NUMBERS[kind]}", value, word)
                for tag, kind, number, value in struct.iter_unpack(entry, entries)
                if kind in NUMBERS and 0 < number <= 64
            }
    except struct.error:
        return


def _tiff_numbers(file: IO[bytes], form: str, value: bytes, word: str) -> tuple[int, ...]:
    """Of a tag: they stand in its place or, if they are too many, elsewhere."""
    if struct.calcsize(form) > len(value):
        file.seek(*struct.unpack(word, value))
        value = file.read(struct.calcsize(form))
    return struct.unpack_from(form, value)


def _tiff_kind(file: IO[bytes]) -> str:
    """Such as "a TIFF of 5 bands of uint8"."""
    tags = next(_tiff_directories(file))
    bits, formats, bands = tags.get(BITS, (1,)), tags.get(FORMAT, (1,)), tags.get(BANDS, (1,))[0]
    kinds = dict.fromkeys(f"{SAMPLES.get(f, 'unknown')}{b}" for f, b in zip(formats * len(bits), bits, strict=False))
    return (
        f"a TIFF of {bands} band{'s' * (bands > 1)} of {' and '.join(kinds)} (photometric interpretation "
        f"{tags.get(PHOTOMETRIC, (0,))[0]}, compression {tags.get(COMPRESSION, (1,))[0]})"
    )


def _cause(source: str | os.PathLike[str] | io.BytesIO, error: Exception) -> str:
    """Why a file cannot be read."""
    if isinstance(error, IsADirectoryError):
        return "it is a folder, not a file"
    if isinstance(error, OSError) and error.strerror:  # of the system, not of a decoder
        return error.strerror
    if isinstance(error, MemoryError):
        return "there is not enough memory for its pixels"
    if isinstance(error, Image.DecompressionBombError):
        size = str(error).partition(", could")[0]
        return (
            f"{size}, against small files that become very large images. To read it, set the environment variable "
            f"{MAX_PIXELS} to its number of pixels"
        )
    with nullcontext(source) if isinstance(source, io.BytesIO) else open(source, "rb") as file:
        file.seek(0)
        start = file.read(64)
        if not start:
            return "it is empty (0 bytes)"
        for known, meaning in STARTS.items():
            if start.startswith(known):
                return meaning
        if isinstance(error, (UnidentifiedImageError, KeyError)):
            if start[:4] not in TIFF_BYTE_ORDERS:
                return "it is in no format that Pillow knows"
            try:
                return f"it is {_tiff_kind(file)}, which Pillow does not read. {_TIFF_ADVICE}"
            except StopIteration:
                return "it is a TIFF that is cut off or damaged"
    return str(error) or type(error).__name__


@contextmanager
def reading(source: Any) -> Iterator[None]:
    """Around the reading of a file, URL or encoded image: what goes wrong becomes a ValueError that names it.

    Of a missing file there is an error that does so already.
    """
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

    PIL images are turned upright by their EXIF orientation. `to_rgb` makes three channels of one (gray), two
    (gray, alpha), four (RGBA), a palette or CMYK; transparency is laid over white, as transformers does.
    Arrays and tensors are (H, W), or have 1, 3 or 4 channels first or last, which `input_data_format` settles
    where it is ambiguous.

    Args:
        image: of any mode, type and size.
        to_rgb: False: as many channels as there are.
        input_data_format: "channels_first" or "channels_last" of an array or tensor; None: looked for.

    Raises:
        ValueError: no image: another number of dimensions or channels, no pixel, values out of range, NaN.
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

    Raises ValueError for more than one channel (colors) and for values that are no integers.
    """
    if isinstance(label_map, (str, os.PathLike)):
        if not os.path.isfile(label_map):
            raise ValueError(f"{where}: segmentation map {os.fspath(label_map)!r} is not a file.")
        with naming(where), reading(label_map):
            label_map = open_image(label_map)
    kind = "array"
    if isinstance(label_map, Image.Image):
        kind = f"image of mode {label_map.mode!r}"
        _refuse_lossy(label_map, where)
        label_map = _stored_values(label_map)
    if not isinstance(label_map, Tensor):
        with naming(where):
            label_map = label_tensor(label_map)
    shape = tuple(label_map.shape)
    if label_map.ndim == 3 and 1 in (shape[0], shape[-1]):
        label_map = label_map.squeeze(0 if shape[0] == 1 else -1)
    if label_map.ndim != 2:
        raise ValueError(
            f"{where}: the segmentation map is an {kind} of shape {shape}; expected one id for each pixel, (H, W). "
            "Turn colors into ids first. COCO panoptic PNG: id = R + 256 * G + 65536 * B, and give "
            "instance_id_to_semantic_id={segment['id']: segment['category_id'], ...}. A palette file must be "
            "opened without .convert('RGB'). A stack of masks (M, H, W) needs class_labels."
        )
    return integers(label_map, where)


def _refuse_lossy(image: Image.Image, where: str) -> None:
    if image.format in LOSSY:
        raise ValueError(f"{where}: the segmentation map is a JPEG, which changes ids: export it again as PNG.")


def colored_ids(colors: np.ndarray) -> np.ndarray:
    """(..., 3) -> (...) int32, R + 256 G + 65536 B, as in COCO panoptic files."""
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return red + 256 * green + 65536 * blue


def read_colored_map(image: Image.Image | np.ndarray, where: str) -> Tensor:
    """RGB image or array (H, W, 3) -> its `colored_ids` (H, W); ValueError for other channels or depths, or a JPEG."""
    if isinstance(image, Image.Image):
        _refuse_lossy(image, where)
        if _bits(image) > 8:  # of which Pillow gives the upper 8
            raise ValueError(f"{where} has {_bits(image)} bits a channel, a COCO panoptic map has 8.")
    if isinstance(image, Image.Image) and image.mode == "RGB" and sys.byteorder == "little":
        in_place = _memory_of(image)
        if in_place is not None:
            return in_place.view(torch.int32)[..., 0] & 0xFFFFFF
    colors = np.asarray(image)
    if colors.ndim != 3 or colors.shape[-1] != 3:
        mode = getattr(image, "mode", "array")
        raise ValueError(f"{where} has shape {colors.shape} ({mode}), a COCO panoptic map has three channels (RGB).")
    return torch.from_numpy(colored_ids(colors))


def read_mask_stack(stack: Any, image_size: tuple[int, int], where: str) -> Tensor:
    """Array or tensor (M, H, W), or a list of M masks -> bool (M, H, W). Masks may overlap; nonzero is inside.

    Args:
        stack: the masks; each one of a list is read as a label map, so that it may be a path.
        image_size: height and width, for a list without masks.
        where: names the image in messages.

    Raises:
        ValueError: other dimensions, masks of several sizes, or with several values inside.
    """
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
    return stack if stack.dtype == torch.bool else _inside(integers(stack, where), where)


def _inside(masks: Tensor, where: str) -> Tensor:
    inside = masks != 0
    if masks.numel() and bool((inside & (masks != masks.max())).any()):
        values = torch.unique(masks)[:10].tolist()
        raise ValueError(f"{where}: a mask has one nonzero value (1, 255 or True); these hold {values}.")
    return inside


def _bits(image: Any) -> int:
    """Bits of a value of gray in the file, which Pillow forgets when it decodes a PNG."""
    if image.format == "TIFF":
        return image.tag_v2.get(BITS, (1,))[0]
    arguments = image.tile[0][3] if getattr(image, "tile", None) else ()
    raw = arguments if isinstance(arguments, str) else next(iter(arguments or ()), None)
    return image.info.get("bits_a_value", {"L;2": 2, "L;4": 4, "RGB;16B": 16}.get(str(raw), 8))


def _stored_values(image: Image.Image) -> np.ndarray:
    """The values of the file, upright.

    Pillow inverts gray of a TIFF in which 0 is white, spreads values of 2 and 4 bits over 0..255, and does not tell
    int8 from uint8, or uint32 from int32.
    """
    bits, mode = _bits(image), image.mode
    values = np.array(ImageOps.exif_transpose(image))
    tags = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    if mode in ("1", "L") and tags.get(PHOTOMETRIC, 0 if tags else 1) == 0:
        values = ~values
    if mode == "L" and bits < 8:
        values //= 255 // (2**bits - 1)
    sample = tags.get(FORMAT, (1,))[0]
    if mode == "L" and sample == 2:
        return values.view(np.int8)
    return values.view(np.uint32) if mode == "I" and tags and sample == 1 and bits == 32 else values


def _pil_pixels(image: Image.Image, to_rgb: bool) -> Tensor:
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = _stored_values(image).astype(np.int64)
        low, high = int(pixels.min()), int(pixels.max())
        if low < 0 or high > 65535:
            raise ValueError(f"an image of mode {image.mode!r} holds values from {low} to {high}; expected 0..65535.")
        # Pillow opens a 16-bit file as I;16 or, by version, I. An 8-bit image can also have been converted to I.
        is_8_bit = image.mode == "I" and high <= 255
        return torch.from_numpy(pixels.astype(np.uint8 if is_8_bit else np.uint16))
    if image.mode == "L" and (signed := _stored_values(image)).dtype == np.int8:
        return torch.from_numpy(signed)
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
        if wrong := int((~(pixels.abs() <= NO_DATA)).sum()):
            raise ValueError(
                f"the image holds NaN or infinity at {wrong} of {pixels.numel()} values (or numbers beyond "
                f"{NO_DATA:g}): replace them, such as by 0."
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
        color, alpha = pixels[:-1].float(), pixels[-1:].float()
        white = 255.0
        if pixels.is_floating_point() and float(pixels.max()) <= 1:
            white = 1.0
        composed = (color * alpha + white * (white - alpha)) / white
        pixels = composed if pixels.is_floating_point() else composed.round().to(pixels.dtype)
    elif channels not in (1, 3):
        raise ValueError(f"cannot make RGB of {channels} channels; expected 1, 2, 3 or 4.")
    return pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels


def autocontrast(image: Tensor) -> Tensor:
    """(C, H, W) on the 0..255 scale, uint8 or floating point -> the same, each channel from 0 to 255."""
    if image.is_floating_point():
        return 255 * tvF.autocontrast(image / 255)  # torchvision's scale of floating-point images is 0..1
    return tvF.autocontrast(image)
