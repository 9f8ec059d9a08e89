"""Shared by all tests: the data beside the repository, one thread, one seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"needs the data folder {SHARED}")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    value = 0
    torch.manual_seed(value)
    np.random.seed(value)
    return value


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], Mapping[str, np.ndarray]]:
    """``oracle("name")``: the arrays of ``shared/oracle/cases/name.npz``; skips when the file is absent."""

    def load(name: str) -> Mapping[str, np.ndarray]:
        path = SHARED / "oracle" / "cases" / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"needs {path}")
        with np.load(path) as arrays:
            return dict(arrays)

    return load
