"""State dicts of the paper's official configurations, made of names and shapes."""

import importlib.util
import json
from types import ModuleType

import numpy as np
import pytest

from conftest import SHARED

ORACLE = SHARED / "oracle"
# For parametrize, which takes no empty list: without the folder one test is there, and skipped.
KEYS = sorted(path.stem for path in (ORACLE / "keys").glob("*.json")) or [
    pytest.param("none", marks=pytest.mark.skip(reason=f"needs {ORACLE / 'keys'}"))
]


def keys(variant: str) -> dict:
    """Content of a keys file: `shapes` by name, `parameters`, `flops`, ... ."""
    path = ORACLE / "keys" / f"{variant}.json"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return json.loads(path.read_text())


def weight_rule() -> ModuleType:
    """The module that fills tensors from their names."""
    spec = importlib.util.spec_from_file_location("det_weights", ORACLE / "det_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(variant: str) -> dict[str, np.ndarray]:
    """The weights that the oracle's cases were made with."""
    shapes = keys(variant)["shapes"]  # first: skips without the oracle
    return weight_rule().state_dict(shapes)


def empty(variant: str) -> dict[str, np.ndarray]:
    """All names of a checkpoint, constants included, with zeros, which take no memory until they are touched."""
    return {name: np.zeros(shape, np.float32) for name, shape in keys(variant)["shapes"].items()}
