"""Numbers in their ranges; a NaN is in none."""

import math
from numbers import Integral, Real
from typing import Any


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
