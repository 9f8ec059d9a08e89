"""Run lengths of maps and masks: the same from pixels, from a map and from COCO's encoding."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from maskcls_hf.metrics import MeanIoU
from maskcls_hf.models.run_lengths import MaskRuns, Runs, overlay, rle_counts
from maskcls_hf.models.segments import NO_SEGMENT, Segments

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


SIZE = (23, 17)


def random_masks(number: int) -> np.ndarray:
    random = np.random.default_rng(0)
    masks = np.zeros((number, *SIZE), dtype=bool)
    for mask in masks:
        top, left, height, width = random.integers(0, (*SIZE, *SIZE))
        mask[top : top + height, left : left + width] = random.random() < 0.5
        mask &= random.random(SIZE) < random.choice([0.5, 1, 1])
    masks[0] = True
    masks[1] = False
    return masks


def encoded(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


class TestMaskRuns:
    def test_of_pixels_of_a_map_and_of_an_encoding(self):
        for mask in random_masks(40):
            places = np.where(mask, 1, np.arange(mask.size).reshape(SIZE) % 2 - 1)  # 1, 0 or -1
            of_map = MaskRuns.of_places(places, 3)
            assert not of_map[2].area
            for runs in (MaskRuns.of_masks(mask[None])[0], of_map[1], MaskRuns.of_rle(encoded(mask))):
                assert (runs.dense() == mask).all() and runs.area == mask.sum()
                assert runs.rle() == {"size": list(SIZE), "counts": encoded(mask)["counts"].decode()}
                box, inside = runs.window()
                assert (inside == mask[box]).all() and inside.sum() == mask.sum()
                assert runs.box == coco_mask.toBbox(encoded(mask)).astype(int).tolist()

    def test_runs_without_a_pixel(self):
        mask = np.zeros(SIZE, dtype=bool)
        mask[3:5, 2] = mask[0, 3] = True
        counts = [0, 0, 2 * 23 + 3, 1, 0, 1, 18, 0, 0, 1, 0, 0]
        counts.append(mask.size - sum(counts))
        runs = MaskRuns.of_rle(coco_mask.frPyObjects({"size": list(SIZE), "counts": counts}, *SIZE))
        assert (runs.dense() == mask).all() and (runs.window()[1] == mask[runs.window()[0]]).all()

    @pytest.mark.parametrize("counts", ["", "zz", "P", "é", "PPPPPPPPPPPPPPPPP0", "\ud800"])
    def test_broken_encodings(self, counts):
        with pytest.raises(ValueError, match="no run lengths"):
            rle_counts(counts)


class TestDrawing:
    def test_map_and_stack(self):
        masks = random_masks(12)[2:]
        codes = [encoded(mask) for mask in masks]
        segments = Segments([0] * len(codes), codes)
        assert (segments.stack.numpy() == masks).all() and segments.overlap
        void = ~masks.any(0)
        with_void = Segments([0] * len(codes), codes, void=torch.from_numpy(void)).pixels.numpy()
        assert (with_void[:-1] == masks).all() and (with_void[-1] == void).all()
        with pytest.raises(ValueError, match="segments overlap"):
            _ = segments.index_map
        first = [masks[0] & ~masks[1], masks[1]]
        apart = Segments([0, 0], [encoded(mask) for mask in first])
        assert not apart.overlap
        assert (apart.index_map.numpy() == np.select(first, [0, 1], NO_SEGMENT)).all()
