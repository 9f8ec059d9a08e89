"""Augmentation: geometry, colors, class swaps, seeds, and the order of an epoch."""

from __future__ import annotations

import colorsys
import json
import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from conftest import SHARED, needs_shared
from maskcls_hf.data.augmented import AugmentedDataset, EpochSampler, repeats_by_area
from maskcls_hf.data.sample import VOID, Sample, Segments
from maskcls_hf.data.transforms import (
    CenterCrop,
    RandomRotate90,
    SSDColor,
    TrainTransform,
    class_swaps,
    fitted_size,
    no_class_dominates,
    random_crop,
    resize,
    scale_saturation,
    shortest_edge_size,
    ssd_color,
    stable_seed,
    window_size,
)
from maskcls_hf.training.recipe import load_recipe
from samples import class_of_id, crowd_ids, id_map, same_segments, sample_of

NAMES = {0: "road", 1: "left_door", 2: "right_door", 3: "left_light", 4: "right_light"}
MODES = [
    {"resize": "crop_first", "crop_size": [24, 32]},
    {"resize": "large_scale_jitter", "crop_size": 32, "scale": [0.3, 2.0]},
    {"resize": "shortest_edge", "short_edges": [24, 40], "longest_edge": 60, "crop_size": 32},
    {"resize": "detr", "short_edges": [24, 30], "first_short_edges": [30, 50], "crop_range": [20, 40]},
    {"resize": None, "crop_size": 24},
]
NOTHING = {"resize": None, "flip": False, "color": None}

modes = st.sampled_from(MODES)
seeds = st.integers(0, 2**40)
sizes = st.tuples(st.integers(16, 64), st.integers(16, 64))


def coordinates(height: int, width: int) -> Sample:
    """Every pixel has its own id, row * 64 + column; red is the row, green the column."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width).expand(height, width)
    ids = (rows * 64 + columns).int()
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    return sample_of(ids, {segment: segment % 5 for segment in ids.flatten().tolist()}, [7], "coordinates", image)


def classes(height: int = 20, width: int = 30, numbers: int = 5) -> Sample:
    """Stripes of classes with a void corner, on noise."""
    ids = (torch.arange(width) * numbers // width).to(torch.uint8).expand(height, width).clone()
    ids[:4, :4] = 255
    return sample_of(ids, name="classes", image=torch.randint(256, (3, height, width), dtype=torch.uint8))


def stack(height: int = 20, width: int = 30) -> Sample:
    sample = classes(height, width)
    masks = torch.cat([id_map(sample) == place for place in range(3)])
    masks[0, 5:9] = True
    return sample_of(masks, {0: 0, 1: 1, 2: VOID}, image=sample["image"])


def same(one: Sample, other: Sample) -> bool:
    return torch.equal(one["image"], other["image"]) and same_segments(one, other)


class TestGeometry:
    @given(mode=modes, size=sizes, seed=seeds, any_orientation=st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_image_and_map_stay_aligned(self, mode, size, seed, any_orientation):
        sample = coordinates(*size)
        out = TrainTransform(**mode, any_orientation=any_orientation, color=None)(sample, seed)
        image, ids = out["image"].int(), id_map(out)
        assert isinstance(out["image"], tv_tensors.Image) and type(out["segments"].index_map) is torch.Tensor
        assert out["image"].dtype == torch.uint8 and out["segments"].index_map.dtype == torch.int16
        assert image.shape[1:] == ids.shape[1:]
        rows, columns = (ids[0] // 64), ids[0] % 64
        shrunk = max(1, *(max(int(c.diff(dim=d).abs().max()) for d in (0, 1)) for c in (rows, columns)))
        assert (image[0] - rows).abs().max() <= 1 + shrunk / 2
        assert (image[1] - columns).abs().max() <= 1 + shrunk / 2

    @given(mode=modes, size=sizes, seed=seeds)
    @settings(max_examples=60, deadline=None)
    def test_sizes(self, mode, size, seed):
        height, width = TrainTransform(**mode, color=None)(coordinates(*size), seed)["image"].shape[1:]
        if mode["resize"] == "crop_first":
            assert [height, width] == mode["crop_size"]
        elif mode["resize"] == "large_scale_jitter":
            assert height <= 32 and width <= 32 and max(height, width) >= round(0.3 * 32) - 1
        elif mode["resize"] == "shortest_edge":
            assert height <= 32 and width <= 32
        elif mode["resize"] == "detr":
            assert min(height, width) in (24, 30)
        else:
            assert (height, width) == (min(24, size[0]), min(24, size[1]))

    @given(size=sizes, short_edge=st.integers(8, 200), longest_edge=st.none() | st.integers(8, 200))
    def test_shortest_edge(self, size, short_edge, longest_edge):
        new = shortest_edge_size(size, short_edge, longest_edge)
        limit = longest_edge or 10**6
        assert max(new) <= limit
        assert min(new) == short_edge or max(new) == limit
        assert abs(new[0] * size[1] - new[1] * size[0]) <= 0.51 * sum(size)

    def test_sizes_are_rounded_as_by_the_papers_code(self):
        assert shortest_edge_size((683, 1024), 307, 2048) == (307, 460)  # 460.27
        assert shortest_edge_size((512, 683), 409, 2048) == (409, 546)  # 545.6
        assert shortest_edge_size((300, 1500), 512, 2048) == (410, 2048)  # 409.6
        assert fitted_size((480, 640), (1024, 1024), 0.5) == (384, 512)

    @given(size=sizes, target=sizes, factor=st.floats(0.25, 4))
    def test_a_window_fits_and_has_the_shape_of_the_crop(self, size, target, factor):
        window = window_size(size, target, factor)
        assert 1 <= window[0] <= size[0] and 1 <= window[1] <= size[1]
        assert abs(window[0] * target[1] - window[1] * target[0]) <= 0.51 * sum(target)

    def test_detr_crops_half_of_the_images(self):
        """Short edge 60, then a window of 20 to 40 pixels on each side, then short edge 30."""
        mode = {"resize": "detr", "short_edges": [30], "first_short_edges": [60], "crop_range": [20, 40]}
        transform = TrainTransform(**mode, flip=False, color=None)
        whole, sides = 0, []
        for seed in range(200):
            ids = id_map(transform(coordinates(60, 60), seed))[0]
            shown = [int(axis.max() - axis.min()) for axis in (ids // 64, ids % 64)]
            whole += min(shown) > 50
            sides += [] if min(shown) > 50 else shown
        assert 70 < whole < 130
        assert 17 <= min(sides) <= 21 and 37 <= max(sides) <= 39  # of the centers of the outermost pixels

    def test_crop_first_enlarges_by_the_factor(self):
        sample = coordinates(60, 60)
        out = id_map(TrainTransform(32, scale=[2, 2], flip=False, color=None)(sample, 0))
        assert out.max() // 64 - out.min() // 64 == 15
        small = id_map(TrainTransform(32, scale=[1, 1], flip=False, color=None)(coordinates(10, 10), 0))
        assert set((small // 64).unique().tolist()) == set(range(10))

    def test_factors_are_drawn_from_the_whole_range(self):
        """Half of the crops enlarge: log-uniform in 1/2..2. Jittered sizes are uniform in 16..64, limited by 32."""
        options = {"crop_size": 32, "scale": [0.5, 2], "flip": False, "color": None}
        sample = coordinates(64, 64)
        rows = [id_map(TrainTransform(**options)(sample, seed)) // 64 for seed in range(200)]
        shown = np.array([int(r.max() - r.min()) + 1 for r in rows])
        assert shown.min() < 20 and shown.max() > 56 and 75 < (shown < 32).sum() < 125
        jitter = TrainTransform(**options, resize="large_scale_jitter")
        lengths = np.array([jitter(sample, seed)["image"].shape[-1] for seed in range(200)])
        assert lengths.min() < 18 and lengths.max() == 32 and 45 < (lengths < 32).sum() < 90

    @pytest.mark.parametrize("length", [1, 4, 5, 8, 21, 32, 50])
    def test_ids_are_resized_as_by_pillow(self, length):
        ids = np.arange(15 * 15, dtype=np.uint8).reshape(15, 15)  # odd: no center falls between two pixels
        expected = np.array(Image.fromarray(ids).resize((length, length), Image.Resampling.NEAREST))
        _, resized = resize(tv_tensors.Image(ids[None]), tv_tensors.Mask(ids[None]), (length, length))
        assert torch.equal(resized[0], torch.from_numpy(expected))

    def test_large_ids_stay_exact(self):
        ids = torch.tensor([[[2**24 - 1, 2**24 + 1, 2**31 - 1]]], dtype=torch.int32)
        _, resized = resize(tv_tensors.Image(torch.zeros(3, 1, 3)), tv_tensors.Mask(ids), (2, 6))
        assert torch.equal(resized, ids.repeat_interleave(2, 1).repeat_interleave(2, 2))

    @pytest.mark.parametrize("mode", MODES, ids=lambda mode: str(mode["resize"]))
    def test_stacks_keep_their_masks(self, mode):
        transform = TrainTransform(**mode, single_category_limit=None, color=None, any_orientation=True)
        sample = stack()
        out = transform(sample, 3)
        assert sample["segments"].overlap and out["segments"].stack.shape[0] == 2
        for mask, found in zip(sample["segments"].pixels, out["segments"].pixels, strict=True):  # the last is void
            as_ids = sample_of(mask.int(), {0: None, 1: 0}, image=sample["image"])
            assert torch.equal(found, id_map(transform(as_ids, 3))[0].bool())
        empty = sample_of(torch.zeros(0, 20, 30, dtype=torch.bool), {}, image=sample["image"])
        out = transform(empty, 3)
        assert out["segments"].stack.shape == (0, *out["image"].shape[1:])

    def test_quarter_turns_change_no_value(self):
        sample = coordinates(6, 6)
        image, ids = sample["image"], tv_tensors.Mask(id_map(sample))
        turned = {tuple(RandomRotate90()(image, ids)[1].flatten().tolist()) for _ in range(50)}
        assert turned == {tuple(torch.rot90(ids[0], k).flatten().tolist()) for k in range(4)}

    def test_any_orientation_is_all_eight(self):
        transform = TrainTransform(**{**NOTHING, "flip": True}, any_orientation=True)
        sample = coordinates(5, 5)
        seen = {tuple(id_map(transform(sample, seed)).flatten().tolist()) for seed in range(100)}
        assert len(seen) == 8

    def test_center_crop_of_a_sample(self):
        out = CenterCrop(16)(coordinates(20, 12))
        assert (id_map(out)[0, :, 0] // 64).tolist() == list(range(2, 18))
        assert out["image"].shape == (3, 16, 12)
        assert out["segments"].name == "coordinates" and crowd_ids(out) == [7]


class TestSingleCategoryLimit:
    @given(seed=st.integers(0, 1000), limit=st.floats(0.2, 0.95))
    @settings(max_examples=40, deadline=None)
    def test_the_rule(self, seed, limit):
        """Restated from the paper's configuration: shares of the labeled pixels, void left out."""
        rng = np.random.default_rng(seed)
        ids = rng.choice([0, 1, 2, 255], size=(1, 8, 8), p=rng.dirichlet([1, 1, 1, 1])).astype(np.uint8)
        areas = np.array([(ids == label).sum() for label in range(3)])
        expected = (areas > 0).sum() > 1 and areas.max() < limit * areas.sum()

        def accepted(segments: Segments) -> bool:
            return no_class_dominates(tv_tensors.Mask(segments.pixels), segments.class_labels, limit)

        assert accepted(Segments.from_class_map(ids[0], 255)) == expected
        # The same as segments, two of them of class 0, and as a stack.
        as_segments = np.where((ids == 0) & (np.arange(8) < 4), 9, ids)[0].astype(np.int32)
        of_segments = {0: 0, 9: 0, 1: 1, 2: 2, 255: VOID}
        assert accepted(Segments.from_ids(as_segments, of_segments)) == expected
        assert accepted(Segments.from_ids(as_segments, {**of_segments, 255: None})) == expected
        masks = torch.cat([torch.from_numpy(ids == value) for value in (0, 1, 2, 255)])
        labels = torch.arange(3)
        assert no_class_dominates(tv_tensors.Mask(masks), labels, limit) == expected  # the last of a stack is void

    @given(good=st.integers(0, 12))
    def test_ten_tries_then_the_last(self, good):
        """Crop number `good` would be the first acceptable one."""
        seen = []

        def acceptable(window):
            seen.append(window)
            return len(seen) > good

        sample = coordinates(40, 40)
        image, ids = random_crop(sample["image"], tv_tensors.Mask(id_map(sample)), (8, 8), acceptable)
        assert len(seen) == min(good + 1, 10)
        assert torch.equal(ids, seen[-1])
        assert torch.equal(image[0].int(), ids[0] // 64)

    @pytest.mark.parametrize(
        "mode", [mode for mode in MODES if mode["resize"] != "detr"], ids=lambda m: str(m["resize"])
    )
    def test_crops_of_one_class_become_rare(self, mode):
        ids = id_map(classes(64, 64, numbers=1))
        ids[:, :, 34:46] = 1
        sample = sample_of(ids)

        def dominated(limit):
            options = {**mode, "crop_size": 12, **({"scale": [2, 5]} if "scale" in mode else {})}
            transform = TrainTransform(**options, single_category_limit=limit, color=None)
            crops = [transform(sample, seed)["segments"] for seed in range(60)]
            return sum(not no_class_dominates(crop.pixels, crop.class_labels, 0.75) for crop in crops)

        without, with_limit = dominated(None), dominated(0.7)
        assert without > 10 and with_limit < without / 2


class TestClassSwaps:
    def test_a_mirrored_map_of_classes(self):
        transform = TrainTransform(
            **{**NOTHING, "flip": True},
            swap_on_flip={"left_door": "right_door", 3: 4},
            id2label=NAMES,
        )
        sample = classes()
        mirrored = torch.tensor([0, 2, 1, 4, 3] + list(range(5, 256)))[id_map(sample).flip(-1)]
        outs = [transform(sample, seed) for seed in range(20)]
        flipped = [out for out in outs if not torch.equal(out["image"], sample["image"])]
        assert 3 < len(flipped) < 17
        for out in outs:
            if any(out is other for other in flipped):
                assert torch.equal(out["image"], sample["image"].flip(-1))
                assert torch.equal(out["segments"].semantic_map(255)[None], mirrored)
                assert out["segments"].index_map.dtype == torch.int8
            else:
                assert same(out, sample)

    @pytest.mark.parametrize(
        "make", [classes, stack, lambda: coordinates(20, 30)], ids=["classes", "stack", "segments"]
    )
    def test_mirroring_twice_changes_nothing(self, make):
        transform = TrainTransform(**{**NOTHING, "flip": True}, swap_on_flip={1: 2, 3: 4})
        sample = make()
        seed = next(s for s in range(20) if not torch.equal(transform(sample, s)["image"], sample["image"]))
        once = transform(sample, seed)
        assert not same(once, sample)
        assert same(transform(once, seed), sample)

    def test_segments_keep_their_ids_and_swap_their_class(self):
        transform = TrainTransform(**{**NOTHING, "flip": True}, swap_on_flip={0: 1})
        sample = stack()
        out = next(
            out
            for out in (transform(sample, seed) for seed in range(20))
            if not torch.equal(out["image"], sample["image"])
        )
        assert torch.equal(out["segments"].pixels, sample["segments"].pixels.flip(-1))
        assert class_of_id(out) == {0: 1, 1: 0} and class_of_id(sample) == {0: 0, 1: 1}

    def test_both_directions_of_a_pair(self):
        assert class_swaps({1: 2}) == class_swaps({1: 2, 2: 1}) == {1: 2, 2: 1}
        swaps = class_swaps({"left_door": "right_door", "right_light": 3}, NAMES)
        assert swaps == {1: 2, 2: 1, 4: 3, 3: 4}
        assert all(swaps[swaps[label]] == label for label in swaps)

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({1: 2, 2: 3}, "class 2 with two others"),
            ({1: 1}, "with itself"),
            ({"left_door": "rigth_door"}, "no classes are called 'rigth_door'.*2 right_door"),
            ({1: 9}, "no classes are called 9"),
        ],
    )
    def test_unfit_tables_are_refused(self, table, message):
        with pytest.raises(ValueError, match=message):
            TrainTransform(32, swap_on_flip=table, id2label=NAMES)

    def test_names_need_the_names_of_all_classes(self):
        with pytest.raises(ValueError, match="id2label"):
            TrainTransform(32, swap_on_flip={"left_door": "right_door"})

    def test_sides_without_a_table_are_warned_of(self, monkeypatch):
        warned = []
        monkeypatch.setattr("maskcls_hf.data.transforms.logger.warning", warned.append)
        TrainTransform(32, id2label=NAMES, flip=False)
        TrainTransform(32, id2label=NAMES, swap_on_flip={})
        TrainTransform(32, id2label={0: "left", 1: "middle"})
        assert not warned
        TrainTransform(32, id2label=NAMES)
        assert "left_door, left_light" in warned[0]

    @needs_shared
    def test_the_car_parts(self):
        names = json.loads((SHARED / "data" / "car_parts" / "labels.json").read_text())
        id2label = dict(enumerate(names.values()))
        table = {name: name.replace("left", "right") for name in names.values() if "left" in name}
        swaps = class_swaps(table, id2label)
        assert len(swaps) == 10
        assert {id2label[a].replace("left", "right") for a in swaps} == {
            name for name in names.values() if "right" in name
        }


class TestColor:
    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    unchanged = {"brightness": None, "contrast": None, "saturation": None, "hue": None, "contrast_first": True}

    @given(delta=st.floats(-32, 32), factor=st.floats(0.5, 1.5), first=st.booleans())
    @settings(deadline=None)
    def test_brightness_and_contrast_as_in_numpy(self, delta, factor, first):
        pixels = self.image.numpy().astype(np.float32)
        brighter = np.clip(pixels + np.float32(delta), 0, 255).astype(np.uint8)
        expected = np.clip(brighter.astype(np.float32) * np.float32(factor), 0, 255).astype(np.uint8)
        options = {**self.unchanged, "brightness": delta, "contrast": factor, "contrast_first": first}
        assert np.array_equal(ssd_color(self.image, **options).numpy(), expected)

    @pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.2, 1.5])
    def test_saturation_as_by_colorsys(self, factor):
        self.compare_hsv(scale_saturation(self.image, factor), lambda h, s, v: (h, min(1, s * factor), v))

    @pytest.mark.parametrize("shift", [-0.1, -0.03, 0.0, 0.1])
    def test_hue_as_by_colorsys(self, shift):
        self.compare_hsv(
            ssd_color(self.image, **{**self.unchanged, "hue": shift}), lambda h, s, v: ((h + shift) % 1, s, v)
        )

    def compare_hsv(self, changed, change):
        expected = [
            colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel)))
            for pixel in (self.image.flatten(1).T / 255).tolist()
        ]
        difference = changed.flatten(1).T.float() - 255 * torch.tensor(expected)
        assert difference.abs().max() <= 1.01

    def test_gray_stays_gray(self):
        gray = self.image[:1].expand(3, -1, -1)
        options = {**self.unchanged, "saturation": 1.5, "hue": 0.1}
        assert torch.equal(ssd_color(gray, **options), gray)

    def test_contrast_comes_first_or_last(self):
        options = {**self.unchanged, "contrast": 1.5, "saturation": 0.5}
        first, last = (ssd_color(self.image, **{**options, "contrast_first": value}) for value in (True, False))
        assert torch.equal(first, scale_saturation(F.adjust_brightness(self.image, 1.5), 0.5))
        assert torch.equal(last, F.adjust_brightness(scale_saturation(self.image, 0.5), 1.5))
        assert not torch.equal(first, last)

    def test_each_change_is_made_half_of_the_time_within_its_bounds(self):
        drawn = [SSDColor().make_params([]) for _ in range(400)]
        for name, low, high in [
            ("brightness", -32, 32),
            ("contrast", 0.5, 1.5),
            ("saturation", 0.5, 1.5),
            ("hue", -0.1, 0.1),
        ]:
            values = [params[name] for params in drawn if params[name] is not None]
            assert 140 < len(values) < 260
            assert low <= min(values) < low + 0.1 * (high - low)
            assert high - 0.1 * (high - low) < max(values) <= high
        assert 140 < sum(params["contrast_first"] for params in drawn) < 260

    @pytest.mark.parametrize("color", ["ssd", 0.4])
    def test_maps_keep_their_values(self, color):
        sample = classes()
        outs = [TrainTransform(**{**NOTHING, "color": color}, any_contrast=True)(sample, s) for s in range(20)]
        assert all(same_segments(out, sample) for out in outs)
        assert all(out["image"].dtype == torch.uint8 and isinstance(out["image"], tv_tensors.Image) for out in outs)
        assert sum(not torch.equal(out["image"], sample["image"]) for out in outs) > 15

    @pytest.mark.parametrize("color", ["ssd", 0.4])
    def test_images_of_16_bit_files_keep_their_scale(self, color):
        """They are float32 in 0..255: the same change as of 8-bit images, which are truncated after each step."""
        sample = classes()
        sample["image"] = tv_tensors.Image(self.image)
        exact = Sample(**{**sample, "image": tv_tensors.Image(self.image.float())})
        transform = TrainTransform(**{**NOTHING, "color": color})
        for seed in range(30):
            image = transform(exact, seed)["image"]
            assert image.dtype == torch.float32 and isinstance(image, tv_tensors.Image)
            assert (image - transform(sample, seed)["image"].float()).abs().mean() < 3
        stretched = TrainTransform(**NOTHING, any_contrast=True)
        assert all(stretched(exact, seed)["image"].max() > 100 for seed in range(30))

    def test_black_has_no_saturation(self):
        black = torch.zeros(3, 2, 2)
        assert torch.equal(scale_saturation(black, 1.5), black)


class TestSeeds:
    @given(mode=modes, seed=seeds, epoch=st.integers(0, 1000), index=st.integers(0, 10**6))
    @settings(max_examples=20, deadline=None)
    def test_a_sample_is_a_function_of_the_seed(self, mode, seed, epoch, index):
        transform = TrainTransform(**mode, color="ssd", any_orientation=True, any_contrast=True)
        sample = coordinates(40, 50)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        one = transform(sample, (seed, epoch, index))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
        torch.rand(3)
        assert same(one, pickle.loads(pickle.dumps(transform))(sample, (seed, epoch, index)))
        others = [transform(sample, (seed, epoch + 1 + step, index)) for step in range(4)]
        assert not all(same(one, other) for other in others)

    def test_samples_are_not_changed_in_place(self):
        for make in (classes, stack):
            sample = make()
            before = pickle.loads(pickle.dumps(sample))
            transform = TrainTransform(**{**NOTHING, "flip": True, "color": "ssd"}, swap_on_flip={1: 2})
            for seed in range(10):
                transform(sample, seed)
            assert same(sample, before)

    def test_accelerators_are_not_seeded(self, monkeypatch):
        """With torch.manual_seed the dropout of a GPU would start again with every sample of the main process."""

        def refuse(seed):
            raise AssertionError("seeds every device")

        monkeypatch.setattr(torch, "manual_seed", refuse)
        monkeypatch.setattr(torch.random, "manual_seed", refuse)
        TrainTransform(16)(classes(), 0)

    def test_seeds_are_the_same_everywhere(self):
        assert stable_seed(0, 1, 2) == 3071860871404845570
        assert len({stable_seed(a, b) for a in range(30) for b in range(30)}) == 900


class Numbered(torch.utils.data.Dataset):
    """Ten small samples."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        sample = coordinates(24, 20 + index)
        sample["segments"].name = str(index)
        return sample


class TestAugmentedDataset:
    def test_keys(self):
        data = AugmentedDataset(Numbered(), TrainTransform(16), seed=5)
        assert len(data) == 10
        assert same(data[3], data[(0, 3)])
        assert same(data[(2, 3)], TrainTransform(16)(Numbered()[3], (5, 2, 3)))
        assert not same(data[(0, 3)], data[(1, 3)])
        assert not same(data[(0, 3, 1)], data[(0, 3, 2)])

    @pytest.mark.parametrize("repeats", [None, [1, 2] * 5])
    def test_loader_workers_do_not_matter(self, repeats):
        data = AugmentedDataset(Numbered(), TrainTransform(16, color="ssd"), seed=5)

        def epoch(workers, number):
            sampler = EpochSampler(10, seed=5, repeats=repeats)
            sampler.set_epoch(number)
            loader = DataLoader(data, batch_size=3, sampler=sampler, num_workers=workers, collate_fn=list)
            return [sample for batch in loader for sample in batch]

        alone, with_workers, later = epoch(0, 1), epoch(2, 1), epoch(0, 2)
        assert len(alone) == len(with_workers) == (10 if repeats is None else 15)
        assert all(same(one, other) for one, other in zip(alone, with_workers, strict=True))
        assert [s["segments"].name for s in alone] != [s["segments"].name for s in later]


class TestEpochSampler:
    def test_order(self):
        sampler = EpochSampler(50, seed=1)
        first = list(sampler)
        torch.rand(7)
        assert first == list(sampler) == list(EpochSampler(50, seed=1)) and len(sampler) == 50
        assert first != list(EpochSampler(50, seed=2))
        assert {epoch for epoch, _ in first} == {0}
        assert sorted(index for _, index in first) == list(range(50))
        sampler.set_epoch(3)
        assert {epoch for epoch, _ in sampler} == {3}
        assert [index for _, index in sampler] != [index for _, index in first]
        assert list(EpochSampler(3, seed=1, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]

    def test_an_epoch_in_progress_keeps_its_number(self):
        sampler = EpochSampler(5, seed=1)
        running = iter(sampler)
        sampler.set_epoch(1)
        assert {epoch for epoch, _ in running} == {0}

    def test_repeats(self):
        sampler = EpochSampler(3, seed=1, repeats=[2, 0, 1])
        assert len(sampler) == 3
        assert sorted(sampler) == [(0, 0, 0), (0, 0, 1), (0, 2, 0)]

    def test_a_seed_below_0(self):
        for make in (lambda: EpochSampler(3, seed=-1), lambda: AugmentedDataset([], None, seed=-1)):
            with pytest.raises(ValueError, match="seed=-1 must not be negative"):
                make()

    @pytest.mark.parametrize("repeats", [[1, 2], [0, 0, 0], [1, -1, 3]])
    def test_unfit_repeats_are_refused(self, repeats):
        with pytest.raises(ValueError, match="each of the 3 images"):
            EpochSampler(3, seed=1, repeats=repeats)

    def test_repeats_by_area(self):
        assert repeats_by_area([(100, 100), (200, 200), (256, 512), (1024, 1024)], 256) == [1, 1, 2, 16]
        with pytest.raises(ValueError, match="side"):
            repeats_by_area([(10, 10)], 0)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "'crop_first' needs crop_size"),
            ({"resize": "stretch"}, "'stretch' is not a way of resizing.*shortest_edge"),
            ({"resize": "shortest_edge"}, "needs short_edges"),
            ({"resize": "shortest_edge", "short_edges": []}, "short_edges=.*lengths"),
            ({"resize": "shortest_edge", "short_edges": 512}, "short_edges=.*lengths"),
            ({"crop_size": 0}, "crop_size="),
            ({"crop_size": [1, 2, 3]}, "crop_size="),
            ({"crop_size": "512"}, "crop_size="),
            ({"crop_size": True}, "crop_size="),
            ({"crop_size": 8, "scale": [1, math.inf]}, "scale="),
            ({"crop_size": 8, "scale": [math.nan, 1]}, "scale="),
            ({"crop_size": 8, "color": math.inf}, "color=inf"),
            ({"crop_size": 8, "single_category_limit": True}, "single_category_limit="),
            ({"crop_size": 8, "scale": [2, 1]}, "scale=.*low <= high"),
            ({"crop_size": 8, "scale": [0, 1]}, "scale="),
            ({"crop_size": 8, "single_category_limit": 1.5}, "single_category_limit="),
            ({"crop_size": 8, "short_edges": [8]}, "not short_edges: leave it out"),
            ({"resize": "detr", "short_edges": [8], "single_category_limit": 0.7}, "not single_category_limit"),
            ({"crop_size": 8, "color": "sdd"}, "color='sdd'"),
            ({"crop_size": 8, "color": -1}, "color=-1"),
        ],
    )
    def test_unfit_options_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            TrainTransform(**options)

    def test_recipes_take_the_spelling_of_before_with_a_warning(self, tmp_path, monkeypatch):
        warned: list[str] = []
        monkeypatch.setattr("maskcls_hf.training.recipe.logger.warning", warned.append)
        path = tmp_path / "old.yaml"
        path.write_text("base: camvid\naugmentation: {colour: 0.1}\n")
        assert load_recipe(path).augmentation["color"] == 0.1 and len(warned) == 1
        assert f"{path}: augmentation.colour is called augmentation.color now" in warned[0]
        assert load_recipe("camvid", ["augmentation.colour=ssd"]).augmentation["color"] == "ssd" and len(warned) == 2
        assert "colour" not in load_recipe(path).augmentation
        path.write_text("augmentation: {colour: 0.1, color: 0.2}\n")
        with pytest.raises(ValueError, match=r"colour is the old name of augmentation\.color: give one"):
            load_recipe(path)

    def test_the_semantic_recipe_of_the_paper(self):
        """ADE20K: crops are 512 x 512, smaller where the resized image is, and never padded here."""
        edges = [int(x * 0.1 * 512) for x in range(5, 21)]
        transform = TrainTransform(
            resize="shortest_edge", short_edges=edges, longest_edge=2048, crop_size=512, color="ssd"
        )
        drawn = {tuple(transform(coordinates(48, 64), seed)["image"].shape[1:]) for seed in range(40)}
        expected = {tuple(min(512, side) for side in shortest_edge_size((48, 64), edge, 2048)) for edge in edges}
        assert drawn <= expected and len(drawn) >= len(expected) - 1
