"""State dicts of the paper's official configurations, made of names and shapes."""

import gzip
import json
from functools import cache
from typing import Any

import numpy as np

import weight_rule
from conftest import PAPERS_CODE


@cache
def numbers(name: str) -> dict[str, Any]:
    """A file of tests/data/papers_code, by configuration."""
    return json.loads(gzip.decompress((PAPERS_CODE / f"{name}.json.gz").read_bytes()))


KEYS = sorted(numbers("keys"))


def keys(variant: str) -> dict[str, Any]:
    """`shapes` by name, `parameters`, `flops`, ... of a configuration."""
    return numbers("keys")[variant]


def filled(variant: str) -> dict[str, np.ndarray]:
    """The weights that the cases were made with."""
    return weight_rule.state_dict(keys(variant)["shapes"])


def empty(variant: str) -> dict[str, np.ndarray]:
    """All names of a checkpoint, constants included, with zeros, which take no memory until they are touched."""
    return {name: np.zeros(shape, np.float32) for name, shape in keys(variant)["shapes"].items()}
