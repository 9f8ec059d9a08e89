"""Maps as runs of equal pixels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from maskcls_hf.metrics import MeanIoU
from maskcls_hf.models.runs import Runs, overlay

sizes = st.tuples(st.integers(1, 9), st.integers(1, 40))


def maps(shape: tuple[int, int], most: int = 3) -> st.SearchStrategy:
    return arrays.arrays(np.int32, shape, elements=st.integers(-1, most))


@given(sizes.flatmap(maps))
def test_a_map_comes_back(pixels):
    runs = Runs.of(pixels)
    assert np.array_equal(runs.map(), pixels)
    assert (runs.values[1:] != runs.values[:-1]).all() and runs.lengths.min() > 0


@given(sizes.flatmap(lambda shape: st.tuples(maps(shape), maps(shape))))
def test_overlay_counts_pairs_of_pixels(pair):
    counted: Counter = Counter()
    for *values, pixels in zip(*overlay(*map(Runs.of, pair)), strict=True):
        assert pixels > 0
        counted[tuple(values)] += pixels
    assert counted == Counter(zip(*(pixels.ravel().tolist() for pixels in pair), strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_maps_without_pixels(shape):
    runs = Runs.of(np.zeros(shape, dtype=np.uint8))
    assert runs.map().shape == shape and not overlay(runs, runs)[2].size


def test_long_runs():
    pixels = np.zeros((300, 400), dtype=np.int64)
    pixels[100:103, 50:60] = 7
    assert Runs.of(pixels).starts.tolist() == [
        0,
        *(i for row in (100, 101, 102) for i in (row * 400 + 50, row * 400 + 60)),
    ]


def test_an_unknown_prediction_on_void_that_starts_with_it():
    metric = MeanIoU({0: "a", 1: "b"})
    assert metric.measure(np.array([[0, 9, 9, 1]]), np.array([[0, 255, 255, 1]])).tolist() == [[1, 1]] * 3
