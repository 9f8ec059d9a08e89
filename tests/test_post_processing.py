"""Pairs to maps: equal to the paper's code, the same in slices, and true to what the records say."""

from __future__ import annotations

import weakref
from collections import Counter
from types import SimpleNamespace

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

from maskcls_hf.post_processing import (
    instance_segments,
    mask_to_coco_rle,
    panoptic_segments,
    per_pixel_map,
    semantic_map,
)

IMAGES = [("batch", 0), ("batch", 1), ("batch", 2), ("nopad_up", 0), ("pad_up", 0), ("nothing", 0)]
THRESHOLDS = ["0.8_0.8", "0.7_0.8", "0_0", "0.5_0.6"]
MEMORY = [None, 200_000, 1]  # the last: a row at a time
PAIR_FUNCTIONS = [semantic_map, panoptic_segments, instance_segments]


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
    """Logits and sizes of one image: any N and K, up and down, smooth masks so that segments are found."""
    num_queries, num_labels = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    padded = (height * draw(st.integers(1, 4)), width * draw(st.integers(1, 4)))
    valid = (draw(st.integers(1, padded[0])), draw(st.integers(1, padded[1])))
    target = draw(st.one_of(st.just(valid), st.tuples(st.integers(1, 40), st.integers(1, 40))))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    class_logits = 3 * torch.randn(num_queries, num_labels + 1, generator=generator)
    mask_logits = 4 * torch.randn(num_queries, height, width, generator=generator)
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


@pytest.mark.parametrize("max_memory", MEMORY)
@pytest.mark.parametrize(("resize", "key"), [("scores", "sem_seg_after"), ("logits", "sem_seg_before")])
@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_semantic_equals_the_papers_code(oracle, name, image, resize, key, max_memory):
    case, pair, sizes = oracle_image(oracle, name, image)
    result, scores = semantic_map(*pair, **sizes, resize=resize, return_scores=True, max_memory=max_memory)
    torch.testing.assert_close(scores, case[f"{key}_{image}"], atol=5e-5, rtol=0)
    assert result.dtype == torch.int64
    assert torch.equal(result, case[f"{key}_{image}_argmax"].long())


@pytest.mark.parametrize("max_memory", MEMORY)
@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize(("name", "image"), IMAGES)
def test_panoptic_equals_the_papers_code(oracle, name, image, thresholds, max_memory):
    case, pair, sizes = oracle_image(oracle, name, image)
    things = case["thing_classes"].tolist()
    threshold, overlap = map(float, thresholds.split("_"))
    segmentation, segments = panoptic_segments(
        *pair,
        **sizes,
        threshold=threshold,
        overlap_mask_area_threshold=overlap,
        label_ids_to_fuse=set(range(pair[0].shape[1] - 1)) - set(things),
        max_memory=max_memory,
    )
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
    for max_memory in MEMORY:
        result, scores = per_pixel_map(logits, **sizes, return_scores=True, max_memory=max_memory)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
        assert torch.equal(result, expected.argmax(0))
        assert torch.equal(per_pixel_map(logits, **sizes, max_memory=max_memory), result)


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


# ------------------------------------------------------------------ properties


@settings(max_examples=60, deadline=None)
@given(predictions(), st.sampled_from(["scores", "logits"]), st.integers(1, 20_000))
def test_semantic_in_slices_and_under_permutation(prediction, resize, max_memory):
    class_logits, mask_logits, sizes = prediction
    options = dict(**sizes, resize=resize, return_scores=True)
    result, scores = semantic_map(class_logits, mask_logits, **options)
    assert scores.shape == (class_logits.shape[1] - 1, *sizes["target_size"])
    assert scores.dtype == torch.float32 and scores.min() >= 0 and scores.max() <= len(class_logits) + 1e-5
    assert torch.equal(result, scores.argmax(0))

    sliced, sliced_scores = semantic_map(class_logits, mask_logits, **options, max_memory=max_memory)
    assert torch.equal(sliced, result)
    torch.testing.assert_close(sliced_scores, scores, atol=1e-6, rtol=0)

    order = torch.randperm(len(class_logits))
    permuted, permuted_scores = semantic_map(class_logits[order], mask_logits[order], **options)
    torch.testing.assert_close(permuted_scores, scores, atol=1e-5, rtol=0)
    best = scores.topk(min(2, len(scores)), dim=0).values
    clear = best[0] - best[-1] > 1e-5 if len(scores) > 1 else torch.ones_like(result, dtype=torch.bool)
    assert torch.equal(permuted[clear], result[clear])


@settings(max_examples=60, deadline=None)
@given(predictions(), st.sets(st.integers(0, 4)), st.sampled_from([0.0, 0.3, 0.6]), st.integers(1, 20_000))
def test_panoptic_records_tell_the_map(prediction, label_ids_to_fuse, threshold, max_memory):
    class_logits, mask_logits, sizes = prediction
    options = dict(
        **sizes,
        threshold=threshold,
        overlap_mask_area_threshold=threshold,
        label_ids_to_fuse=label_ids_to_fuse,
    )
    segmentation, segments = panoptic_segments(class_logits, mask_logits, **options)
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

    sliced, sliced_segments = panoptic_segments(class_logits, mask_logits, **options, max_memory=max_memory)
    assert torch.equal(sliced, segmentation)
    assert sliced_segments == segments


@settings(max_examples=60, deadline=None)
@given(predictions(), st.integers(1, 30), st.sampled_from([0.0, 0.3, 0.6]), st.integers(1, 20_000))
def test_instance_records_tell_the_masks(prediction, top_k, threshold, max_memory):
    class_logits, mask_logits, sizes = prediction
    options = dict(**sizes, top_k=top_k, threshold=threshold)
    masks, segments = instance_segments(class_logits, mask_logits, **options)
    assert masks.shape == (len(segments), *sizes["target_size"]) and masks.dtype == torch.bool
    assert len(segments) <= top_k
    assert [s["id"] for s in segments] == list(range(1, len(segments) + 1))
    assert [s["area"] for s in segments] == masks.sum((1, 2)).tolist()
    scores = [s["score"] for s in segments]
    assert scores == sorted(scores, reverse=True)
    assert all(threshold <= score <= 1 for score in scores)
    assert all(s["area"] > 0 and not s["was_fused"] for s in segments)

    sliced, sliced_segments = instance_segments(class_logits, mask_logits, **options, max_memory=max_memory)
    assert torch.equal(sliced, masks)
    for ours, whole in zip(sliced_segments, segments, strict=True):
        assert ours.pop("score") == pytest.approx(whole.pop("score"), abs=1e-6)
        assert ours == whole


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
@pytest.mark.parametrize("target", [120, 300, 600])
def test_max_memory_bounds_the_temporaries(function, target):
    pair = one_hot_classes([i % 12 for i in range(20)], 12), torch.randn(20, 75, 75)
    results = 12 * target * target if function is panoptic_segments else 8 * target * target  # int64 + int32; int64
    if function is instance_segments:
        results = 2 * 20 * target * target  # bool, and once more in the order of the scores
    peaks = []
    for max_memory in (2_000_000, None):
        with LiveMemory() as memory:
            function(*pair, **square(300, valid=280, target=target), max_memory=max_memory)
        peaks.append(memory.peak)
    assert peaks[0] <= 2_000_000 + results + 200_000
    assert peaks[1] > 3 * 2_000_000 + results  # or the bound would mean nothing here


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
        (dict(max_memory=0), ValueError, "max_memory must be a positive number"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("function", PAIR_FUNCTIONS)
def test_on_a_gpu(function):
    pair = torch.randn(20, 7) * 3, torch.randn(20, 40, 40) * 3
    sizes = square(160, valid=150, target=233)
    on_gpu = function(*(logits.cuda() for logits in pair), **sizes, max_memory=2_000_000)
    on_cpu = function(*pair, **sizes)
    if function is semantic_map:
        on_gpu, on_cpu = (on_gpu, []), (on_cpu, [])
    assert on_gpu[0].is_cuda and on_gpu[0].shape == on_cpu[0].shape
    assert (on_gpu[0].cpu() != on_cpu[0]).float().mean() < 1e-3
    assert [s["label_id"] for s in on_gpu[1]] == [s["label_id"] for s in on_cpu[1]]
