"""Options as users give them: numbers of NumPy and torch become Python's, unknown names are pointed out."""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Of `from_pretrained`, for every file that it reads.
DOWNLOAD_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
)  # fmt: skip


def plain(value: Any) -> Any:
    """Numbers and arrays of NumPy and torch, also inside of lists, sets and dicts (keys too), as Python has them."""
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
    """The known name that `name`, not one of them, is most likely a misspelling of, if any."""
    found = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return found[0] if found else None


def unused(name: str, known: Collection[str], of: str) -> str:
    """What is said of an option that `of`, a class, does not have."""
    meant = similar(name, known)
    return f"{of} has no {name!r}" + (f": did you mean {meant!r}?" if meant else ", it has no effect.")


def warn_about_unused(names: Iterable[str], known: Collection[str], of: str) -> None:
    """Names that begin with an underscore are transformers' own."""
    for name in names:
        if name not in known and not name.startswith("_"):
            logger.warning(unused(name, known, of))


def require_range(name: str, value: Any, interval: str, integer: bool = False) -> None:
    """`ValueError`, with `name`, for a value that is no number in the interval.

    Args:
        interval: such as "[0, 1)": 0 is in it, 1 is not. Only "inf]" has infinity in it.
        integer: only integers are in it.
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
    return {name: options[name] for name in names if name in options}
