"""Image and label files, read as the image processor reads them; every error names the file."""

from __future__ import annotations

import io
import json
import operator
import os
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.image_reading import image_to_tensor, open_image, read_colored_map, read_label_map, size_in_header
from ..models.run_lengths import Runs

Read = TypeVar("Read")

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control characters, half characters, ends of lines


def read_image(source: Any, where: str = "") -> Tensor:
    """Path, PIL image, array or a `datasets` record of `bytes` and `path` -> (3, H, W), on the scale of 0..255.

    Args:
        source: the image; a file is turned upright by its EXIF orientation.
        where: what messages call it; "": as `source`.

    Returns:
        uint8; float32 of 16-bit and floating-point images.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image.
    """
    where = where or str(source)
    image = decoded(source, where)
    try:
        return image_to_tensor(image)
    except Exception as error:  # as of what decodes it
        raise ValueError(f"{where}: {str(error) or type(error).__name__}") from error


def read_map(source: Any, where: str = "") -> Tensor:
    """Label map (H, W) of integers from a file or a value as for [`read_image`]; a palette gives its indices.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or has several channels.
    """
    where = where or str(source)
    return read_label_map(decoded(source, where), where)


def read_colored_ids(source: Any, where: str = "") -> Tensor:
    """Ids (H, W) int32 of a COCO panoptic PNG: R + 256 G + 65536 B.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or not of three channels.
    """
    where = where or str(source)
    return read_colored_map(decoded(source, where), where)


def unique_ids(ids: Tensor | Runs) -> list[int]:
    """The values of a map of ids, rising: of its runs, which are far fewer than its pixels.

    Examples:
        >>> unique_ids(torch.tensor([[0, 0, 5], [5, 2, 2]]))
        [0, 2, 5]
    """
    values: list[int] = np.unique((ids if isinstance(ids, Runs) else Runs.of(ids.numpy())).values).tolist()
    return values


def int32_ids(ids: Tensor, where: str) -> Tensor:
    """A map of ids (H, W) as int32.

    Raises:
        ValueError: an id is 2^31 or more, or below -2^31; `where` is the map's name in the message.
    """
    if ids.dtype == torch.int64 and ids.numel() and not -(2**31) <= int(ids.min()) <= int(ids.max()) < 2**31:
        raise ValueError(f"{where} holds ids from {int(ids.min())} to {int(ids.max())}, which are to lie below 2^31.")
    return ids.int()


def decoded(source: Any, where: str) -> Any:
    """A path, the bytes of a file or a record of bytes and path as PIL image; anything else as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, or no image; `where` is its name in the message.
    """
    source = _file_of(source)
    if source is None:
        raise ValueError(f"{where} is empty.")
    if isinstance(source, (str, Path, io.BytesIO)):
        return _opened_as(open_image, source, where)
    if isinstance(source, (Image.Image, Tensor)):
        return source
    try:
        return np.asarray(source)
    except (ValueError, TypeError) as error:  # rows of different lengths
        raise ValueError(f"{where}: {error}") from error


def _file_of(source: Any) -> Any:
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _opened_as(read: Callable[[Any], Read], source: Any, where: str) -> Read:
    try:
        return read(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: no file {source}." if str(source) != where else f"No file {where}."
        ) from error
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as an image: {error}") from error


def image_size(source: Any, where: str = "") -> tuple[int, int]:
    """Height and width of an image, upright by its EXIF orientation, from the header alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image.
    """
    where = where or str(source)
    return _opened_as(size_in_header, _file_of(source), where)


def folders_in(path: Path) -> list[str]:
    """Names of the folders in a folder; none where it does not exist."""
    return [entry.name for entry in os.scandir(path) if entry.is_dir()] if path.is_dir() else []


def some(names: Sequence[Any], limit: int = 5) -> str:
    """The first names of a list, for a message.

    Examples:
        >>> some([3, 5, 8], limit=2)
        '3, 5, ...'
    """
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")


def shown(value: Any) -> str:
    """A value of a file in a message: short, on one line, and a text other than a number."""
    return "null" if value is None else reprlib.repr(value)


def class_name(value: Any) -> str:
    """The value itself, if it can be the name of a class.

    Raises:
        ValueError: it is no text, a blank one, or one that no file can hold.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{shown(value)} is no text, or a blank one")
    if any(unicodedata.category(character) == "Cs" for character in value):
        raise ValueError(f"{shown(value)} has half characters (surrogates)")
    return value


def has_controls(text: str) -> bool:
    r"""Whether there are characters in a text that a terminal would obey, or that end a line.

    Examples:
        >>> has_controls("road"), has_controls("ro\nad")
        (False, True)
    """
    return not text.isprintable() and any(unicodedata.category(character) in _CONTROL for character in text)


def with_split(pattern: str, split: str | None) -> str:
    """The path of a split, of a pattern with `{split}` in it.

    Raises:
        ValueError: the pattern is no text.

    Examples:
        >>> with_split("annotations/{split}.json", "train")
        'annotations/train.json'
    """
    if not isinstance(pattern, str):
        raise ValueError(f"A folder is a text such as 'images/{{split}}', got {shown(pattern)}.")
    return pattern.replace("{split}", split or "")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty, no JSON, nested too deeply, or has a key twice in one object. Messages have the path.
    """
    try:
        content = path.read_bytes()
        if not content or content.isspace():
            raise ValueError("the file is empty")
        return json.loads(content, object_pairs_hook=_without_doubles)
    except FileNotFoundError:
        raise FileNotFoundError(f"No file {path}.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply.") from None
    except ValueError as error:  # also of the encoding
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return found


def read_class_names(names: Mapping[int, str] | str | Path) -> dict[int, str]:
    """Label id -> name, from a mapping or a JSON file such as {"0": "sky", "1": "road"}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names no classes, or one twice; a key is no number, a name no text.

    Examples:
        >>> read_class_names({"0": "sky", "1": "road"})
        {0: 'sky', 1: 'road'}
    """
    where = "id2label"
    content: Any = names
    if not isinstance(names, Mapping):
        where, path = str(names), Path(names)
        if not path.is_file():
            raise FileNotFoundError(f'No {path}: it names the classes, like {{"0": "sky", "1": "road"}}.')
        content = read_json(path)
    if not isinstance(content, Mapping):
        raise ValueError(f'{where} is {shown(content)}, not a JSON object like {{"0": "sky", "1": "road"}}.')
    if not content:
        raise ValueError(f"{where} names no classes.")
    return checked_names(content.items(), where)


def checked_names(names: Iterable[tuple[Any, Any]], where: str) -> dict[int, str]:
    """Names by label id.

    Args:
        names: pairs of label id, a number or the text of one, and name.
        where: they stand, for messages.

    Raises:
        ValueError: an id is no number or stands twice, a name is no text.
    """
    checked: dict[int, str] = {}
    for key, name in names:
        if (label := _label_id(key)) is None:
            raise ValueError(f'{where}: the key {shown(key)} is no label id, as in {{"0": "sky", "1": "road"}}.')
        if label in checked:
            raise ValueError(f"{where} names class {label} twice: {shown(checked[label])} and {shown(name)}.")
        try:
            checked[label] = class_name(name)
        except ValueError as error:
            raise ValueError(f"{where}: the name of class {label}: {error}.") from None
    return checked


def _label_id(key: Any) -> int | None:
    if isinstance(key, str):
        return int(key) if re.fullmatch(r"-?[0-9]{1,18}", key) else None
    try:
        return None if isinstance(key, bool) else operator.index(key)
    except TypeError:
        return None
