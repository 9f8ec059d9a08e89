"""Pairs to maps: equal to the paper's code, the same in slices, and true to what the records say."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MaskFormerImageProcessor

from maskcls_hf.models import device_maps, post_processing, tiled_maps
from maskcls_hf.models.device_maps import DeviceMaps
from maskcls_hf.models.post_processing import (
    PlainMaps,
    ResizeGeometry,
    instance_segments,
    panoptic_segments,
    per_pixel_map,
    semantic_map,
)
from maskcls_hf.models.run_lengths import mask_to_coco_rle
from maskcls_hf.models.tiled_maps import TiledMaps

IMAGES = [("batch", 0), ("batch", 1), ("batch", 2), ("nopad_up", 0), ("pad_up", 0), ("nothing", 0)]
THRESHOLDS = ["0.8_0.8", "0.7_0.8", "0_0", "0.5_0.6"]
WAYS = ["plain", "tiles of 16", "tiles of 5", "tiles of 2", "tiles of 1", "device", "device in chunks"]
PAIR_FUNCTIONS = [semantic_map, panoptic_segments, instance_segments]


@contextmanager
def made(way: str):
    """Within, maps are made in this way, whatever their device and size; edges of tiles are padded pixels."""
    maps = PlainMaps if way == "plain" else DeviceMaps if way.startswith("device") else TiledMaps
    edge = int(way.split()[-1]) if maps is TiledMaps else 64
    chunk = 3000 if way == "device in chunks" else 2**28  # bytes: few maps, or one
    with (
        mock.patch.object(
            post_processing, "maps_of", lambda logits, *sizes: maps(ResizeGeometry.checked(logits, *sizes))
        ),
        mock.patch.object(tiled_maps, "TILE", edge),
        mock.patch.object(device_maps, "CHUNK_BYTES", chunk),
    ):
        yield


def plain_maps(logits: torch.Tensor, sizes: dict) -> PlainMaps:
    return PlainMaps(ResizeGeometry.checked(logits, **sizes))


def square(size: int, valid: int | None = None, target: int | None = None) -> dict:
    valid = size if valid is None else valid
    target = valid if target is None else target
    return dict(padded_size=(size, size), valid_size=(valid, valid), target_size=(target, target))


def one_hot_classes(labels: list[int], num_labels: int, scale: float = 10.0) -> torch.Tensor:
    """Class logits (N, K+1) that are sure of `labels`; `num_labels` itself is no-object."""
    return functional.one_hot(torch.tensor(labels), num_labels + 1).float() * scale


def boxes_to_logits(boxes: list[tuple[int, int, int, int]], size: int, scale: float = 10.0) -> torch.Tensor:
    """Mask logits (N, size, size), `scale` inside (top, left, bottom, right) and -`scale` outside."""
    masks = torch.full((len(boxes), size, size), -scale)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = scale
    return masks


@st.composite
def predictions(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Logits and sizes of one image: any N and K, up and down, unsure and sure masks."""
    num_queries = draw(st.one_of(st.integers(0, 6), st.integers(7, 60)))
    num_labels = draw(st.one_of(st.integers(1, 5), st.integers(6, 80)))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    padded = (height * draw(st.integers(1, 4)), width * draw(st.integers(1, 4)))
    valid = (draw(st.integers(1, padded[0])), draw(st.integers(1, padded[1])))
    target = draw(st.one_of(st.just(valid), st.tuples(st.integers(1, 40), st.integers(1, 40))))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    class_logits = draw(st.sampled_from([3, 12])) * torch.randn(num_queries, num_labels + 1, generator=generator)
    mask_logits = draw(st.sampled_from([1, 4, 20])) * torch.randn(num_queries, height, width, generator=generator)
    return class_logits.to(dtype), mask_logits.to(dtype), dict(padded_size=padded, valid_size=valid, target_size=target)


# ------------------------------------------------------------------ the paper's code


def oracle_image(oracle, name: str, image: int):
    case = {key: torch.from_numpy(value) for key, value in oracle(f"postprocess_{name}").items()}
    pair = case["pred_logits"][image], case["pred_masks"][image]
    sizes = dict(
        padded_size=case["padded_size"],
        valid_size=case["image_sizes"][image],
        target_size=case["output_sizes"][image],
    )
    return case, pair, sizes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("resize", "key"), [("scores", "sem_seg_after"), ("logits", "sem_seg_before")])
@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_semantic_equals_the_papers_code(oracle, name, image, resize, key, way):
    case, pair, sizes = oracle_image(oracle, name, image)
    with made(way):
        result, scores = semantic_map(*pair, **sizes, resize=resize, return_scores=True)
        pruned = semantic_map(*pair, **sizes, resize=resize)
    torch.testing.assert_close(scores[:, ::5, ::7], case[f"{key}_{image}_every_5_7"], atol=5e-5, rtol=0)
    if f"{key}_{image}" in case:  # of all pixels: outside of the repository
        torch.testing.assert_close(scores, case[f"{key}_{image}"], atol=5e-5, rtol=0)
    assert result.dtype == torch.int64
    assert torch.equal(result, case[f"{key}_{image}_argmax"].long())
    assert torch.equal(pruned, result)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_panoptic_equals_the_papers_code(oracle, name, image, thresholds, way):
    case, pair, sizes = oracle_image(oracle, name, image)
    things = case["thing_classes"].tolist()
    threshold, overlap = map(float, thresholds.split("_"))
    stuff = set(range(pair[0].shape[1] - 1)) - set(things)
    options = dict(threshold=threshold, overlap_mask_area_threshold=overlap, label_ids_to_fuse=stuff)
    with made(way):
        segmentation, segments = panoptic_segments(*pair, **sizes, **options)
    assert segmentation.dtype == torch.int32
    assert torch.equal(segmentation, case[f"panoptic_{thresholds}_{image}"])
    rows = [[s["id"], s["label_id"], s["label_id"] in things, s["area"]] for s in segments]
    assert rows == case[f"panoptic_{thresholds}_{image}_segments"].tolist()
    assert all(s["was_fused"] != (s["label_id"] in things) for s in segments)


def test_per_pixel_is_upsample_crop_resize_argmax():
    logits = torch.randn(5, 9, 7)
    sizes = dict(padded_size=(36, 28), valid_size=(30, 25), target_size=(51, 20))
    upsampled = functional.interpolate(logits[None], (36, 28), mode="bilinear")[..., :30, :25]
    expected = functional.interpolate(upsampled, (51, 20), mode="bilinear")[0]
    for way in WAYS:
        with made(way):
            result, scores = per_pixel_map(logits, **sizes, return_scores=True)
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
            assert torch.equal(result, expected.argmax(0))
            assert torch.equal(per_pixel_map(logits, **sizes), result)


def test_kernels_equal_the_plain_order():
    """In Triton's interpreter; on a GPU test_gpu.py runs them."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / "interpreted_kernels.py"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ transformers' processor, where it means the same


def transformers_outputs(pair) -> SimpleNamespace:
    return SimpleNamespace(class_queries_logits=pair[0][None], masks_queries_logits=pair[1][None])


@pytest.mark.parametrize("target", [16, 37, 9])
def test_semantic_equals_transformers(target):
    pair = torch.randn(8, 5) * 2, torch.randn(8, 16, 16) * 3
    (theirs,) = MaskFormerImageProcessor().post_process_semantic_segmentation(
        transformers_outputs(pair), target_sizes=[(target, target)]
    )
    assert torch.equal(semantic_map(*pair, **square(16, target=target)), theirs)


def test_panoptic_equals_transformers_for_sure_masks():
    # their area rule looks at the weighted mask; for scores and masks near 0 or 1 it is the same
    pair = (
        one_hot_classes([0, 2, 1, 0, 3], 3),
        boxes_to_logits([(0, 0, 8, 6), (0, 6, 8, 16), (8, 0, 16, 9), (8, 9, 16, 16), (0, 0, 16, 16)], 16),
    )
    (theirs,) = MaskFormerImageProcessor().post_process_panoptic_segmentation(
        transformers_outputs(pair), threshold=0.8, label_ids_to_fuse=set()
    )
    segmentation, segments = panoptic_segments(*pair, **square(16))
    assert torch.equal(segmentation, theirs["segmentation"].to(torch.int32))
    assert len(segments) == 4
    for ours, other in zip(segments, theirs["segments_info"], strict=True):
        assert {key: ours[key] for key in ("id", "label_id", "was_fused")} == {
            key: other[key] for key in ("id", "label_id", "was_fused")
        }
        assert ours["score"] == pytest.approx(other["score"], abs=1e-5)


# ------------------------------------------------------------------ panoptic rules


def test_dropped_query_leaves_its_pixels_empty():
    # query 1 lies under query 0 but for a quarter of its area
    pair = one_hot_classes([0, 1], 2), boxes_to_logits([(0, 0, 6, 8), (0, 0, 8, 8)], 8)
    pair[0][1] *= 0.5
    segmentation, segments = panoptic_segments(*pair, **square(8), threshold=0.5)
    assert [s["label_id"] for s in segments] == [0]
    assert segmentation[:6].eq(1).all() and segmentation[6:].eq(0).all()
    _, segments = panoptic_segments(*pair, **square(8), threshold=0.5, overlap_mask_area_threshold=0.25)
    assert [(s["label_id"], s["area"]) for s in segments] == [(0, 48), (1, 16)]


def test_area_rule_uses_the_unweighted_mask():
    # a mask of probability 0.51 counts, though times the class score 0.9 it is below 0.5
    class_logits = torch.tensor([[2.2, 0.0]])
    mask_logits = torch.full((1, 4, 4), 0.05)
    _, segments = panoptic_segments(class_logits, mask_logits, **square(4))
    assert [s["area"] for s in segments] == [16]
    _, segments = panoptic_segments(class_logits, mask_logits, **square(4), mask_threshold=0.6)
    assert segments == []


@pytest.mark.parametrize(("weak", "strong"), [(0, 2), (2, 0)])
def test_fused_queries_are_one_record(weak, strong):
    class_logits = one_hot_classes([1, 0, 1, 0], 2)
    class_logits[weak] *= 0.5
    pair = class_logits, boxes_to_logits([(0, 0, 4, 4), (0, 4, 4, 8), (4, 4, 8, 8), (4, 0, 8, 4)], 8)
    segmentation, segments = panoptic_segments(*pair, **square(8), label_ids_to_fuse=[1])
    assert [(s["id"], s["label_id"], s["was_fused"], s["area"]) for s in segments] == [
        (1, 1, True, 32),
        (2, 0, False, 16),
        (3, 0, False, 16),
    ]
    assert segments[0]["score"] == pytest.approx(float(class_logits[strong].softmax(-1)[1]), abs=1e-6)
    expected = torch.tensor([[1, 2], [3, 1]], dtype=torch.int32)
    assert torch.equal(segmentation, expected.repeat_interleave(4, 0).repeat_interleave(4, 1))
    _, segments = panoptic_segments(*pair, **square(8))
    assert [s["id"] for s in segments] == [1, 2, 3, 4]
    assert not any(s["was_fused"] for s in segments)


# ------------------------------------------------------------------ instance rules


def test_instances_overlap_and_are_scored_by_class_and_mask():
    class_logits = torch.tensor([[0.0, 4.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    mask_logits = boxes_to_logits([(0, 0, 6, 6), (3, 3, 8, 8), (0, 0, 8, 8)], 8, scale=2.0)
    masks, segments = instance_segments(class_logits, mask_logits, **square(8))
    assert torch.equal(masks, torch.stack([mask_logits[1] > 0, mask_logits[0] > 0]))
    assert [(s["id"], s["label_id"], s["area"], s["was_fused"]) for s in segments] == [
        (1, 0, 25, False),
        (2, 1, 36, False),
    ]
    mask_prob = float(torch.tensor(2.0).sigmoid())
    for segment, query in zip(segments, (1, 0), strict=True):
        class_prob = float(class_logits[query].softmax(-1).max())
        assert segment["score"] == pytest.approx(class_prob * mask_prob, abs=1e-6)


def test_instances_one_query_can_have_several_classes():
    class_logits = torch.tensor([[2.0, 1.0, 0.0, -9.0], [-9.0, -9.0, -9.0, 9.0]])
    mask_logits = boxes_to_logits([(1, 1, 3, 4), (0, 0, 4, 4)], 4)
    masks, segments = instance_segments(class_logits, mask_logits, **square(4), top_k=2, threshold=0.0)
    assert [s["label_id"] for s in segments] == [0, 1]
    assert torch.equal(masks, (mask_logits[:1] > 0).expand(2, 4, 4))


def test_no_empty_instance():
    # nothing of the first mask is left after the crop
    pair = one_hot_classes([0, 1], 2), boxes_to_logits([(6, 6, 8, 8), (0, 0, 3, 3)], 8)
    masks, segments = instance_segments(*pair, **square(8, valid=4), threshold=0.0)
    assert segments and masks.flatten(1).any(1).all()
    assert {s["area"] for s in segments} == {9}
    masks, segments = instance_segments(pair[0][:1], pair[1][:1], **square(8, valid=4), threshold=0.0)
    assert masks.shape == (0, 4, 4) and segments == []


# ------------------------------------------------------------------ the plain order


def assert_greatest(result: torch.Tensor, values: torch.Tensor) -> None:
    """`result` (H, W) is the index of the greatest of `values` (C, H, W), or of one within 1e-5 of it."""
    greatest = values.amax(0)
    chosen = values.gather(0, result[None])[0]
    scale = greatest.abs().clamp(min=1)  # scores that are sums over many queries lie above 1
    assert ((greatest - chosen) / scale).max() <= 1e-5


SOME_WAY = st.sampled_from(WAYS[1:])


@settings(max_examples=150, deadline=None)
@given(predictions(), st.sampled_from(["scores", "logits"]), SOME_WAY)
def test_semantic_equals_the_plain_order(prediction, resize, way):
    class_logits, mask_logits, sizes = prediction
    class_probs = class_logits.float().softmax(-1)[:, :-1]
    expected = plain_maps(mask_logits, sizes).semantic_scores(class_probs, mask_logits.float(), resize)
    with made(way):
        result = semantic_map(class_logits, mask_logits, **sizes, resize=resize)
        same, scores = semantic_map(class_logits, mask_logits, **sizes, resize=resize, return_scores=True)
    assert result.shape == sizes["target_size"] and result.dtype == torch.int64
    assert scores.dtype == torch.float32 and scores.min() >= 0 and scores.max() <= len(class_logits) + 1e-5
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert_greatest(result, expected)
    assert torch.equal(same, scores.argmax(0))


@settings(max_examples=100, deadline=None)
@given(predictions(), SOME_WAY)
def test_per_pixel_equals_the_plain_order(prediction, way):
    logits, sizes = prediction[1], prediction[2]
    if len(logits):
        expected = plain_maps(logits, sizes).resize(logits.float())
        with made(way):
            assert_greatest(per_pixel_map(logits, **sizes), expected)


@settings(max_examples=150, deadline=None)
@given(predictions(), st.sampled_from([0.0, 0.3, 0.6]), st.sampled_from([0.1, 0.5, 0.9]), SOME_WAY)
def test_panoptic_equals_the_plain_order(prediction, threshold, mask_threshold, way):
    """Without a rule for overlaps and with ids of their own, segments are what their queries win."""
    class_logits, mask_logits, sizes = prediction
    scores, labels = class_logits.float().softmax(-1).max(-1)
    queries = ((labels < class_logits.shape[1] - 1) & (scores > threshold)).nonzero()[:, 0]
    if not len(queries):
        return
    scores, mask_logits = scores[queries], mask_logits[queries].float()
    mask_logit = torch.tensor(mask_threshold, dtype=torch.float64).logit().item()
    with made(way):
        maps = post_processing.maps_of(mask_logits, *sizes.values())
        winners, areas, mask_areas = maps.assign_pixels(scores, mask_logits, mask_logit)
    logits = plain_maps(mask_logits, sizes).resize(mask_logits)
    assert_greatest(winners.long(), scores[:, None, None] * logits.sigmoid())
    assert torch.equal(areas, winners.flatten().bincount(minlength=len(scores)))
    near = (logits - mask_logit).abs() <= 1e-5
    assert ((mask_areas - (logits >= mask_logit).sum((1, 2))).abs() <= near.sum((1, 2))).all()


@settings(max_examples=100, deadline=None)
@given(predictions(), st.sampled_from([0.0, 0.3]), st.sampled_from([0.1, 0.5, 0.9]), SOME_WAY)
def test_instances_equal_the_plain_order(prediction, threshold, mask_threshold, way):
    class_logits, mask_logits, sizes = prediction
    options = dict(**sizes, threshold=threshold, mask_threshold=mask_threshold, top_k=10_000)
    with made(way):
        masks, segments = instance_segments(class_logits, mask_logits, **options)
        ids, same = instance_segments(class_logits, mask_logits, **options, as_map=True)
    assert segments == same
    drawn = torch.zeros_like(ids)
    for index in reversed(range(len(masks))):
        drawn[masks[index]] = index + 1
    assert torch.equal(ids, drawn) and ids.dtype == torch.int32

    probs = plain_maps(mask_logits, sizes).resize(mask_logits.float()).sigmoid()
    inside = probs > mask_threshold
    near = (probs - mask_threshold).abs() <= 1e-5
    mask_scores = (probs * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    pair_scores = class_logits.float().softmax(-1)[:, :-1] * mask_scores[:, None]
    assert len(segments) == pytest.approx(
        int(((pair_scores >= threshold) & inside.any(2).any(1)[:, None]).sum()), abs=near.sum().item()
    )
    for mask, segment in zip(masks, segments, strict=True):
        pairs = (pair_scores[:, segment["label_id"]] - segment["score"]).abs() <= 1e-5 + near.sum((1, 2))
        assert any(not ((mask != inside[query]) & ~near[query]).any() for query in pairs.nonzero()[:, 0])


# ------------------------------------------------------------------ properties


@settings(max_examples=60, deadline=None)
@given(predictions(), st.sampled_from(["scores", "logits"]))
def test_semantic_does_not_depend_on_the_order_of_queries(prediction, resize):
    class_logits, mask_logits, sizes = prediction
    options = dict(**sizes, resize=resize, return_scores=True)
    result, scores = semantic_map(class_logits, mask_logits, **options)
    order = torch.randperm(len(class_logits))
    permuted, permuted_scores = semantic_map(class_logits[order], mask_logits[order], **options)
    torch.testing.assert_close(permuted_scores, scores, atol=1e-5, rtol=0)
    best = scores.topk(min(2, len(scores)), dim=0).values
    clear = best[0] - best[-1] > 1e-5 if len(scores) > 1 else torch.ones_like(result, dtype=torch.bool)
    assert torch.equal(permuted[clear], result[clear])


@settings(max_examples=60, deadline=None)
@given(predictions(), st.sets(st.integers(0, 4)), st.sampled_from([0.0, 0.3, 0.6]))
def test_panoptic_records_tell_the_map(prediction, label_ids_to_fuse, threshold):
    class_logits, mask_logits, sizes = prediction
    segmentation, segments = panoptic_segments(
        class_logits,
        mask_logits,
        **sizes,
        threshold=threshold,
        overlap_mask_area_threshold=threshold,
        label_ids_to_fuse=label_ids_to_fuse,
    )
    assert segmentation.shape == sizes["target_size"] and segmentation.dtype == torch.int32
    assert [s["id"] for s in segments] == list(range(1, len(segments) + 1))
    counts = Counter(segmentation.flatten().tolist())
    assert counts.keys() - {0} == {s["id"] for s in segments}
    for segment in segments:
        assert set(segment) == {"id", "label_id", "was_fused", "score", "area"}
        assert segment["area"] == counts[segment["id"]] > 0
        assert threshold < segment["score"] <= 1
        assert segment["was_fused"] == (segment["label_id"] in label_ids_to_fuse)
    fused = [s["label_id"] for s in segments if s["was_fused"]]
    assert len(fused) == len(set(fused))


@settings(max_examples=60, deadline=None)
@given(predictions(), st.integers(1, 30), st.sampled_from([0.0, 0.3, 0.6]))
def test_instance_records_tell_the_masks(prediction, top_k, threshold):
    class_logits, mask_logits, sizes = prediction
    masks, segments = instance_segments(class_logits, mask_logits, **sizes, top_k=top_k, threshold=threshold)
    assert masks.shape == (len(segments), *sizes["target_size"]) and masks.dtype == torch.bool
    assert len(segments) <= top_k
    assert [s["id"] for s in segments] == list(range(1, len(segments) + 1))
    assert [s["area"] for s in segments] == masks.sum((1, 2)).tolist()
    scores = [s["score"] for s in segments]
    assert scores == sorted(scores, reverse=True)
    assert all(threshold <= score <= 1 for score in scores)
    assert all(s["area"] > 0 and not s["was_fused"] for s in segments)


@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(function, dtype):
    pair = (torch.randn(7, 4) * 3).to(dtype), (torch.randn(7, 6, 6) * 3).to(dtype)
    sizes = square(24, valid=20, target=31)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = function(*pair, **sizes)
    full = function(*(logits.float() for logits in pair), **sizes)
    torch.testing.assert_close(half, full, atol=0, rtol=0)


def test_inputs_stay_as_they_are():
    pair = torch.randn(4, 3), torch.randn(4, 8, 8).requires_grad_()
    before = [logits.clone() for logits in pair]
    for function in PAIR_FUNCTIONS:
        function(*pair, **square(8))
        function(*pair, **square(8, valid=5, target=9))
    assert all(torch.equal(now, then) for now, then in zip(pair, before, strict=True))


# ------------------------------------------------------------------ memory


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still alive; `peak` is the most at a time."""

    def __init__(self):
        super().__init__()
        self.users, self.sizes, self.peak = Counter(), {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made_outside = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor, made_outside)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

    def track(self, tensor, made_outside):
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in made_outside and key not in self.sizes:
            return
        self.users[key] += 1
        self.sizes[key] = storage.nbytes()
        weakref.finalize(tensor, self.release, key)

    def release(self, key):
        self.users[key] -= 1
        if not self.users[key]:
            self.sizes.pop(key, None)


@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
def test_temporaries_do_not_grow_with_the_map(function):
    pair = one_hot_classes([i % 12 for i in range(20)], 12), torch.randn(20, 75, 75)
    temporaries = []
    for target in (600, 1200, 2400):
        with LiveMemory() as memory:
            function(*pair, **square(300, valid=280, target=target))
        results = 12 * target * target if function is panoptic_segments else 8 * target * target  # int64 + int32; int64
        if function is instance_segments:
            results = 20 * target * target  # bool
        temporaries.append(memory.peak - results)
    assert max(temporaries) < 42e6  # bytes, by far less than one map of all queries


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damaged_mask_logits_are_refused(function, value):
    mask_logits = torch.zeros(3, 4, 4)
    mask_logits[1, 2, 2] = value
    with pytest.raises(ValueError, match="1 of the 48 values of masks_queries_logits are NaN or infinite"):
        function(torch.zeros(3, 5), mask_logits, **square(4))


@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_class_logits_are_refused(function, value):
    class_logits = torch.zeros(3, 5)
    class_logits[0, 4] = value
    with pytest.raises(ValueError, match="values of class_queries_logits are NaN or infinite"):
        function(class_logits, torch.zeros(3, 4, 4), **square(4))


def test_a_class_can_be_ruled_out():
    class_logits = torch.tensor([[-float("inf"), 1.0, 0.0]])
    assert semantic_map(class_logits, torch.zeros(1, 2, 2), **square(2)).eq(1).all()


def test_damaged_per_pixel_logits_are_refused():
    with pytest.raises(ValueError, match="1 of the 8 values of logits"):
        per_pixel_map(torch.tensor([0.0] * 7 + [float("nan")]).view(2, 2, 2), **square(2))
    with pytest.raises(ValueError, match=r"\(K, h, w\)"):
        per_pixel_map(torch.zeros(1, 2, 2, 2), **square(2))


@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
@pytest.mark.parametrize(
    ("class_shape", "mask_shape"),
    [((3, 5), (4, 2, 2)), ((1, 3, 5), (1, 3, 2, 2)), ((3, 1), (3, 2, 2)), ((3, 5), (3, 0, 2)), ((5,), (3, 2, 2))],
)
def test_shapes_that_do_not_belong_together(function, class_shape, mask_shape):
    with pytest.raises(ValueError, match="must be .N, K.1. and .N, h, w."):
        function(torch.zeros(class_shape), torch.zeros(mask_shape), **square(4))


@pytest.mark.parametrize("function", [*PAIR_FUNCTIONS, per_pixel_map])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(valid_size=(9, 8)), ValueError, r"valid_size \(9, 8\) does not fit into padded_size \(8, 8\)"),
        (dict(valid_size=(8, 9)), ValueError, "does not fit"),
        (dict(target_size=(0, 4)), ValueError, "target_size must be .* positive"),
        (dict(padded_size=(8,)), ValueError, "padded_size must be"),
        (dict(target_size=(8.5, 8)), TypeError, "target_size must be .* two integers"),
        (dict(target_size=8), TypeError, "target_size must be .* two integers"),
    ],
)
def test_wrong_sizes(function, change, error, message):
    logits = (torch.zeros(2, 4, 4),) if function is per_pixel_map else (torch.zeros(2, 3), torch.zeros(2, 4, 4))
    with pytest.raises(error, match=message):
        function(*logits, **square(8) | change)


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (semantic_map, dict(resize="masks"), 'resize must be "scores" or "logits"'),
        (panoptic_segments, dict(threshold=1.5), "threshold must lie in"),
        (panoptic_segments, dict(overlap_mask_area_threshold=-0.1), "overlap_mask_area_threshold must lie in"),
        (instance_segments, dict(mask_threshold=float("nan")), "mask_threshold must lie in"),
        (instance_segments, dict(top_k=0), "top_k must be at least 1"),
    ],
)
def test_wrong_options(function, change, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 3), torch.zeros(2, 4, 4), **square(8), **change)


# ------------------------------------------------------------------ run-length encoding


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]), st.integers(0, 2**20))
def test_rle_equals_pycocotools(height, width, fill, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(height, width, generator=generator) < fill
    rle = mask_to_coco_rle(mask)
    reference = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    assert rle == {"size": [height, width], "counts": reference["counts"].decode()}
    assert np.array_equal(coco_mask.decode(rle), mask.numpy())


def test_rle_of_long_runs():
    mask = torch.zeros(700, 900, dtype=torch.uint8)
    mask[100:650, 30:860] = 1
    mask[300, 400] = 0
    rle = mask_to_coco_rle(mask)
    assert np.array_equal(coco_mask.decode(rle), mask.numpy())
    assert coco_mask.area(rle) == int(mask.sum())


@pytest.mark.parametrize("mask", [torch.rand(3, 3), torch.full((3, 3), 255), torch.ones(1, 3, 3, dtype=torch.bool)])
def test_rle_refuses_what_is_no_binary_mask(mask):
    with pytest.raises(ValueError, match=r"mask must be \(H, W\)"):
        mask_to_coco_rle(mask)
