"""Matching against the paper's own code, by brute force, and its errors."""

import itertools
import logging

import numpy as np
import pytest
import torch

from conftest import needs_shared
from maskcls_hf.contracts import SegmentLogits
from maskcls_hf.matchers import BipartiteMatcher, FixedMatcher, SegmentTargets
from tiny import maskcls_config, segments


def logits(batch: int, queries: int, classes: int, size: tuple[int, int] = (8, 12)) -> SegmentLogits:
    return SegmentLogits(torch.randn(batch, queries, classes + 1), 3 * torch.randn(batch, queries, *size))


@needs_shared
@pytest.mark.parametrize("case", ["matcher_basic", "matcher_odd_ratio", "matcher_more_targets_than_queries"])
def test_equals_the_papers_code(oracle, case):
    arrays = oracle(case)
    layer = SegmentLogits(torch.from_numpy(arrays["pred_logits"]), torch.from_numpy(arrays["pred_masks"]))
    images = range(len(layer.class_logits))
    targets = SegmentTargets(
        [torch.from_numpy(arrays[f"masks_{i}"]) != 0 for i in images],
        [torch.from_numpy(arrays[f"labels_{i}"]).long() for i in images],
    )
    weights = dict(
        zip(
            ("cross_entropy_weight", "mask_weight", "dice_weight"),
            arrays["weights_class_mask_dice"].tolist(),
            strict=True,
        )
    )
    matcher = BipartiteMatcher(maskcls_config(num_labels=layer.class_logits.shape[-1] - 1, **weights))
    assignments = matcher([layer], targets)[0]
    for i in images:
        terms = matcher.terms(layer, i, *targets.resampled(i, layer.mask_logits.shape[-2:]))
        for term, cost in terms.items():
            np.testing.assert_allclose(cost.numpy(), arrays[f"cost_{term}_{i}"], atol=1e-6)
        total = sum(matcher.weights[term] * cost for term, cost in terms.items())
        np.testing.assert_allclose(total.numpy(), arrays[f"cost_{i}"], atol=1e-5)
        np.testing.assert_array_equal(assignments[i].query_indices.numpy(), arrays[f"src_{i}"])
        np.testing.assert_array_equal(assignments[i].segment_indices.numpy(), arrays[f"tgt_{i}"])


@pytest.mark.parametrize("queries, number", [(5, 3), (3, 5), (4, 4), (4, 0)])
def test_no_assignment_is_cheaper(queries, number):
    layer, size = logits(1, queries, 5), (32, 48)
    masks, labels = segments([size], [number])
    targets = SegmentTargets(masks, labels, torch.rand(1, *size) > 0.2)
    matcher = BipartiteMatcher(maskcls_config(num_queries=queries))
    found = matcher([layer], targets)[0][0]
    terms = matcher.terms(layer, 0, *targets.resampled(0, layer.mask_logits.shape[-2:]))
    cost = sum(matcher.weights[term] * value for term, value in terms.items())  # (N, M)
    pairs = min(queries, number)
    assert len(found.query_indices) == len(found.segment_indices) == pairs
    best = min(
        cost[list(rows), list(columns)].sum().item()
        for rows in itertools.permutations(range(queries), pairs)
        for columns in itertools.combinations(range(number), pairs)
    )
    assert cost[found.query_indices, found.segment_indices].sum().item() == pytest.approx(best, abs=1e-5)


def test_uncounted_pixels_do_not_matter():
    layer, size = logits(1, 6, 5), (32, 48)
    masks, labels = segments([size], [4])
    counted = torch.ones(1, *size, dtype=torch.bool)
    counted[:, :, 24:] = False
    matcher = BipartiteMatcher(maskcls_config())
    before = matcher.terms(layer, 0, *SegmentTargets(masks, labels, counted).resampled(0, (8, 12)))
    masks[0][:, :, 24:] = ~masks[0][:, :, 24:]
    layer.mask_logits[..., 6:] = 9.0
    after = matcher.terms(layer, 0, *SegmentTargets(masks, labels, counted).resampled(0, (8, 12)))
    for term in before:
        torch.testing.assert_close(before[term], after[term])


def test_all_layers_and_images_leave_the_device_in_one_transfer(monkeypatch):
    transfers = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(self.shape) or self)
    masks, labels = segments([(32, 48)] * 3, [2, 0, 3])
    BipartiteMatcher(maskcls_config())([logits(3, 7, 5) for _ in range(4)], SegmentTargets(masks, labels))
    assert transfers == [(4 * 7 * (2 + 0 + 3),)]


@pytest.mark.parametrize("term, bad", [("class", "class_logits"), ("mask", "mask_logits")])
def test_a_nan_cost_is_named(term, bad):
    layers = [logits(2, 7, 5) for _ in range(3)]
    getattr(layers[1], bad)[1, 4] = float("nan")
    masks, labels = segments([(32, 48)] * 2, [2, 3])
    with pytest.raises(ValueError, match=f"The {term} cost of image 1 in decoder layer 1 of 3 is NaN for 3 of 21"):
        BipartiteMatcher(maskcls_config())(layers, SegmentTargets(masks, labels))


def test_too_many_segments_are_said_once(caplog):
    masks, labels = segments([(32, 48)] * 2, [2, 9])
    matcher = BipartiteMatcher(maskcls_config())
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        for _ in range(3):
            matcher([logits(2, 7, 5)], SegmentTargets(masks, labels))
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "Image 1" in said[0] and "9 ground-truth" in said[0] and "num_queries=7" in said[0]


def test_fixed_matching_gives_query_k_to_class_k():
    masks, labels = segments([(32, 48)] * 2, [3, 0])
    labels[0] = torch.tensor([4, 0, 2])
    matcher = FixedMatcher(maskcls_config(num_queries=5, matching="fixed"))
    first, second = matcher([logits(2, 5, 5)] * 2, SegmentTargets(masks, labels))
    assert first[0].query_indices.tolist() == [4, 0, 2] and first[0].segment_indices.tolist() == [0, 1, 2]
    assert first[1].query_indices.tolist() == [] and second[0] == first[0]


def test_fixed_matching_needs_as_many_queries_as_classes():
    with pytest.raises(ValueError, match="num_queries=7 must equal num_labels=5"):
        FixedMatcher(maskcls_config())


def test_fixed_matching_refuses_two_segments_of_a_class():
    masks, _ = segments([(32, 48)] * 2, [1, 2])
    targets = SegmentTargets(masks, [torch.tensor([1]), torch.tensor([3, 3])])
    with pytest.raises(ValueError, match=r"image 1 has several of class \[3\]"):
        FixedMatcher(maskcls_config(num_queries=5))([logits(2, 5, 5)], targets)
