"""Writes numbers.json, the golden numbers: `PYTHONPATH=src:tests python tests/golden/make.py`.

To be run only where a change of behavior is meant; the difference of the file then shows what it is.
"""

import json
from pathlib import Path
from typing import Any

from golden.cases import GROUPS, maps, scores

FILE = Path(__file__).with_name("numbers.json")


def integers(numbers: Any) -> Any:
    """Without the floats."""
    if isinstance(numbers, dict):
        return {key: integers(value) for key, value in numbers.items()}
    if isinstance(numbers, (list, tuple)):
        return [integers(value) for value in numbers]
    return None if isinstance(numbers, float) else numbers


def shortened(numbers: Any) -> Any:
    """Floats with 9 digits."""
    if isinstance(numbers, dict):
        return {str(key): shortened(value) for key, value in numbers.items()}
    if isinstance(numbers, (list, tuple)):
        return [shortened(value) for value in numbers]
    return float(f"{numbers:.9g}") if isinstance(numbers, float) else numbers


if __name__ == "__main__":
    for group in (maps, scores):
        for jitter in (3e-6, -3e-6):
            if integers(group()) != integers(group(jitter)):
                raise SystemExit(f"{group.__name__}: a pixel hangs on rounding; choose other seeds.")
    groups = {name: shortened(make()) for name, make in GROUPS.items()}
    lines = [
        f"{json.dumps(name)}: {{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in cases.items()) + "\n}"
        for name, cases in groups.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
