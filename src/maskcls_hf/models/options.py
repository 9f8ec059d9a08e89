"""Options and labels as users give them -> what can be computed with, or an error that says what is wrong, and where.

Of options, numbers of NumPy and torch become Python's and unknown names are pointed out; labels become tensors.
"""

import difflib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of `from_pretrained`, for every file that it reads.
DOWNLOAD_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip


# Opens pretrained backbones: `maskcls_hf.convert` puts itself here where the package is installed.
BACKBONE_READERS: list[Callable[..., Any]] = []


def open_backbone(name_or_path: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None) -> Any:
    """`maskcls_hf.convert.open_backbone`, which does not travel with checkpoints.

    Raises:
        `ImportError`: this is the code of a checkpoint.
    """
    if not BACKBONE_READERS:
        raise ImportError(
            "The code of a checkpoint reads no pretrained backbones: pip install maskcls-hf, and call from_backbone of "
            "the classes in maskcls_hf."
        )
    return BACKBONE_READERS[0](name_or_path, weights)


def plain(value: Any) -> Any:
    """Numbers and arrays of NumPy and torch, also inside of lists, sets and dicts (keys too), as Python has them.

    Examples:
        >>> plain({"ids": np.arange(2)})
        {'ids': [0, 1]}
    """
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    if type(value) is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(plain(item) for item in value)
    return value


def checked_label_ids(ids: Any) -> list[int]:
    """`label_ids_to_fuse` as sorted integers.

    Raises:
        ValueError: it is no collection of class ids.
    """
    ids = plain(ids)
    values = list(ids) if isinstance(ids, Collection) and not isinstance(ids, str) else [ids]
    if values == [ids] or any(not isinstance(label, int) or label < 0 for label in values):
        raise ValueError(f"label_ids_to_fuse must be a list of class ids, got {ids!r}.")
    return sorted(set(values))


def similar(name: str, known: Collection[str]) -> str | None:
    """The known name that `name`, not one of them, is most likely a misspelling of, if any.

    Examples:
        >>> similar("num_query", ["num_queries", "hidden_size"])
        'num_queries'
    """
    found = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return found[0] if found else None


def unused(name: str, known: Collection[str], of: str) -> str:
    """What is said of an option that `of`, a class, does not have.

    Args:
        name: as it was given.
        known: names that there are.
        of: the class, for the message.
    """
    meant = similar(name, known)
    return f"{of} has no {name!r}" + (f": did you mean {meant!r}?" if meant else ", it has no effect.")


def warn_about_unused(names: Iterable[str], known: Collection[str], of: str) -> None:
    """Names that begin with an underscore are transformers' own.

    Args:
        names: as they were given.
        known: names that there are.
        of: the class, for the message.
    """
    for name in names:
        if name not in known and not name.startswith("_"):
            logger.warning(unused(name, known, of))


def require_range(name: str, value: Any, interval: str, integer: bool = False) -> None:
    """`ValueError`, with `name`, for a value that is no number in the interval.

    Args:
        name: of the option, for the message.
        value: as it was given.
        interval: such as "[0, 1)": 0 is in it, 1 is not. Only "inf]" has infinity in it.
        integer: only integers are in it.

    Examples:
        >>> require_range("threshold", 0.5, "[0, 1]")
        >>> require_range("threshold", 2, "[0, 1]")
        Traceback (most recent call last):
        ValueError: threshold=2 must be from 0 to 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral if integer else Real):
        raise ValueError(f"{name}={value!r} must be {'an integer' if integer else 'a number'}.")
    number: Any = value
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        finite = " and finite" if isinstance(number, float) and not math.isfinite(number) else ""
        raise ValueError(f"{name}={value} must {_in_words(low, high, interval)}{finite}.")


def _in_words(low: float, high: float, interval: str) -> str:
    if math.isinf(low):
        return "be a number"
    if math.isinf(high):
        if interval[0] == "[" and low == 0:
            return "not be negative"
        return f"be at least {low:g}" if interval[0] == "[" else f"be above {low:g}"
    if interval[0] == "(" and interval[-1] == ")":
        return f"be between {low:g} and {high:g}"
    excluded = f", without {high:g}" if interval[-1] == ")" else ""
    return f"be from {low:g} to {high:.10g}{excluded}"


def chosen(options: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The options of these names that were given."""
    return {name: options[name] for name in names if name in options}


# ---- labels ----


@contextmanager
def naming(where: str) -> Iterator[None]:
    """What is wrong with a value that is read inside becomes a ValueError that begins with `where`."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error


def array_as_tensor(array: np.ndarray) -> Tensor:
    """Of the same numbers; of a wider type where torch knows the array's by name only. ValueError for no numbers."""
    if np.ma.is_masked(array):
        raise ValueError("some values of the array are masked: put numbers there, with its filled().")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an array of {array.dtype} holds no real numbers.")
    if array.dtype.kind == "u" and array.dtype.itemsize > 2:
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"an array of {array.dtype} holds {int(array.max())}, more than 64 bits with a sign can.")
        array = array.astype(np.int64)
    elif array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def label_tensor(labels: Any) -> Tensor:
    """Labels of any form as a tensor; uint16, with which torch can do little, becomes int32."""
    array = np.asanyarray(labels)
    return array_as_tensor(array.astype(np.int32) if array.dtype.kind == "u" and array.dtype.itemsize == 2 else array)


def as_labels(labels: Any, where: str) -> Tensor:
    """A tensor as it is; arrays and lists as one. ValueError for what holds no numbers."""
    if isinstance(labels, Tensor):
        return labels
    with naming(where):
        return label_tensor(labels if isinstance(labels, np.ndarray) else plain(labels))


def integers(values: Tensor, where: str) -> Tensor:
    """Labels as a tensor of integers that torch can compare; ValueError where they have fractions."""
    if values.is_complex():
        raise ValueError(f"{where}: labels must be integers, got {values.dtype}.")
    if values.dtype == torch.bool:
        return values.to(torch.uint8)
    if values.is_floating_point():
        whole = values.long()
        if not torch.equal(whole.to(values.dtype), values):
            raise ValueError(f"{where}: labels must be integers, got {values.dtype} with fractions or NaN.")
        return whole
    narrow = (torch.uint8, torch.int8, torch.int16, torch.int32)
    return values if values.dtype in narrow else values.long()


def read_label_values(labels: Any, where: str) -> Tensor:
    """Label values of one image, in any form -> (M,) int64 on the CPU; ValueError for what is no integer."""
    return integers(label_tensor(plain(labels)).flatten(), where).long()
