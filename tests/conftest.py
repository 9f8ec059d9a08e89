"""Shared by all tests: the data beside the repository, one thread, one seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"
PAPERS_CODE = Path(__file__).parent / "data" / "papers_code"  # see its README.md
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
def oracle() -> Callable[..., Mapping[str, np.ndarray]]:
    """``oracle("name")``: numbers of the paper's code, of ``tests/data/papers_code/cases/name.npz`` and, where they are
    there, those of ``shared/oracle/cases/name.npz``; skips without the latter if asked for the `complete` case."""

    def load(name: str, complete: bool = False) -> Mapping[str, np.ndarray]:
        ours, outside = (folder / "cases" / f"{name}.npz" for folder in (PAPERS_CODE, SHARED / "oracle"))
        if not outside.exists() and (complete or not ours.exists()):
            pytest.skip(f"needs {outside}")
        case: dict[str, np.ndarray] = {}
        for path in (outside, ours):  # ours last: it is tested wherever it has a number
            if path.exists():
                with np.load(path) as arrays:
                    case |= arrays
        return case

    return load
