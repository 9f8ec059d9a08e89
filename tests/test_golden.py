"""The numbers of tests/golden/numbers.json: losses, gradients, maps, tensors of the image processor, scores.

They were written by the code as it was on 2026-11-28, and hold whatever the code is made of.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from golden.cases import GROUPS

NUMBERS = json.loads((Path(__file__).parent / "golden" / "numbers.json").read_text())


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Where they differ: floats by more than 1e-5 of their size, all else at all."""
    if isinstance(found, dict) and isinstance(expected, dict):
        found = {str(key): value for key, value in found.items()}
        if found.keys() != expected.keys():
            return [f"{where}: {sorted(found.keys() ^ expected.keys())} on one side only"]
        parts = [differences(found[key], expected[key], f"{where} / {key}") for key in expected]
    elif isinstance(found, (list, tuple)) and isinstance(expected, list):
        if len(found) != len(expected):
            return [f"{where}: {len(found)} instead of {len(expected)}"]
        parts = [differences(*pair, f"{where} [{i}]") for i, pair in enumerate(zip(found, expected, strict=True))]
    elif isinstance(found, float) and isinstance(expected, (int, float)):
        parts = [[] if found == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True) else [1]]
        return [f"{where}: {found} instead of {expected}"] if parts[0] else []
    else:
        return [] if found == expected else [f"{where}: {found} instead of {expected}"]
    return [line for part in parts for line in part]


@pytest.mark.parametrize("group", GROUPS)
def test_numbers_are_those_of_before(group):
    wrong = differences(GROUPS[group](), NUMBERS[group])
    assert not wrong, "\n".join([f"{len(wrong)} numbers differ", *wrong[:30]])


def test_every_group_is_there():
    assert list(NUMBERS) == list(GROUPS)


@pytest.mark.parametrize(
    ("found", "expected"),
    [(1.00002, 1.0), (float("nan"), 1.0), (3, 4), ([1], [1, 2]), ({"a": 1}, {"a": 1, "b": 2}), (None, 0.5)],
)
def test_a_difference_is_seen(found, expected):
    assert differences({"x": [found]}, {"x": [expected]})
    assert not differences({"x": [expected]}, {"x": [expected]})
