"""Image and label files, read as the image processor reads them; every error names the file."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..image_reading import image_to_tensor, open_image, read_coloured_map, read_label_map, size_in_header
from ..runs import Runs

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")


def read_image(source: Any, where: str = "") -> Tensor:
    """Path, PIL image, array or a `datasets` record of `bytes` and `path` -> (3, H, W), on the scale of 0..255.

    uint8; float32 of 16-bit and floating-point images.
    """
    where = where or str(source)
    image = decoded(source, where)
    try:
        return image_to_tensor(image)
    except Exception as error:  # as of what decodes it
        raise ValueError(f"{where}: {str(error) or type(error).__name__}") from error


def read_map(source: Any, where: str = "") -> Tensor:
    """Label map (H, W) of integers from a file or a value as for [`read_image`]; a palette gives its indices."""
    where = where or str(source)
    return read_label_map(decoded(source, where), where)


def read_coloured_ids(source: Any, where: str = "") -> Tensor:
    """Ids (H, W) int32 of a COCO panoptic PNG: R + 256 G + 65536 B."""
    where = where or str(source)
    return read_coloured_map(decoded(source, where), where)


def unique_ids(ids: Tensor) -> list[int]:
    """The values of a map of ids, rising: of its runs, which are far fewer than its pixels."""
    return np.unique(Runs.of(ids.numpy()).values).tolist()


def int32_ids(ids: Tensor, where: str) -> Tensor:
    """A map of ids (H, W) as int32; ValueError where they do not fit."""
    if ids.dtype == torch.int64 and ids.numel() and not -(2**31) <= int(ids.min()) <= int(ids.max()) < 2**31:
        raise ValueError(f"{where} holds ids from {int(ids.min())} to {int(ids.max())}, which are to lie below 2^31.")
    return ids.int()


def decoded(source: Any, where: str) -> Any:
    """A path, the bytes of a file or a record of bytes and path as PIL image; anything else as it is."""
    source = _file_of(source)
    if source is None:
        raise ValueError(f"{where} is empty.")
    if isinstance(source, (str, Path, io.BytesIO)):
        return _opened_as(open_image, source, where)
    return source if isinstance(source, (Image.Image, Tensor)) else np.asarray(source)


def _file_of(source: Any) -> Any:
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _opened_as(read: Callable[[Any], Any], source: Any, where: str) -> Any:
    try:
        return read(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: no file {source}." if str(source) != where else f"No file {where}."
        ) from error
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as an image: {error}") from error


def image_size(source: Any, where: str = "") -> tuple[int, int]:
    """Height and width of an image, upright by its EXIF orientation, from the header alone."""
    where = where or str(source)
    return _opened_as(size_in_header, _file_of(source), where)


def require_folder(path: Path, kind: str, available: Iterable[str] | None = None) -> None:
    if not path.is_dir():
        hint = f" There are: {', '.join(sorted(available)) or 'none'}." if available is not None else ""
        raise FileNotFoundError(f"No {kind} folder {path}.{hint}")


def pair_files(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Each image of a folder with the label map of the same name, sorted by name."""
    image_paths = _by_stem(images, IMAGE_SUFFIXES, "Images")
    label_paths = _by_stem(labels, LABEL_SUFFIXES, "Label maps")
    if not image_paths:
        raise ValueError(f"No images in {images} (looked for {', '.join(IMAGE_SUFFIXES)}).")
    if missing := sorted(set(image_paths) - set(label_paths)):
        raise FileNotFoundError(
            f"{len(missing)} images have no label map ({', '.join(LABEL_SUFFIXES)}) in {labels}: {some(missing)}."
        )
    if extra := sorted(set(label_paths) - set(image_paths)):
        raise FileNotFoundError(f"{len(extra)} label maps have no image in {images}: {some(extra)}.")
    return [(path, label_paths[stem]) for stem, path in sorted(image_paths.items())]


def _by_stem(folder: Path, suffixes: Sequence[str], kind: str) -> dict[str, Path]:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    found = {path.stem: path for path in paths}
    if len(found) < len(paths):
        twice = sorted(stem for stem, number in Counter(path.stem for path in paths).items() if number > 1)
        raise ValueError(f"{kind} of the same name in {folder}: {some(twice)}.")
    return found


def some(names: Sequence[Any], limit: int = 5) -> str:
    """The first names of a list, for a message."""
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")


def read_json(path: Path) -> Any:
    """Raises FileNotFoundError or ValueError, with the path."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"No file {path}.") from None
    except ValueError as error:  # also of the encoding
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_class_names(names: Mapping[int, str] | str | Path) -> dict[int, str]:
    """Label id -> name, from a mapping or a JSON file such as {"0": "sky", "1": "road"}."""
    where = "id2label"
    content: Any = names
    if not isinstance(names, Mapping):
        where, path = str(names), Path(names)
        if not path.is_file():
            raise FileNotFoundError(f'No {path}: it names the classes, like {{"0": "sky", "1": "road"}}.')
        content = read_json(path)
    try:
        class_names = {int(label): str(name) for label, name in content.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{where} is not a JSON object like {{"0": "sky", "1": "road"}}: {error}') from error
    if not class_names:
        raise ValueError(f"{where} names no classes.")
    return class_names
