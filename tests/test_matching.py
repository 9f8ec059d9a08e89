"""Matching against the paper's own code, by brute force, and its errors."""

import itertools
import logging

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, masks_to_boxes
from transformers.loss.loss_for_object_detection import HungarianMatcher

from maskcls_hf.models.configuration_maskcls import MATCHERS
from maskcls_hf.models.matching import (
    Assignment,
    BipartiteMatcher,
    FixedMatcher,
    PaddedTargets,
    Predictions,
    masks_of_map,
    prepare_targets,
)
from maskcls_hf.models.transformer_decoders import SegmentLogits
from tiny import maskcls_config, segments

BY_COST = ["bipartite", "box", "pq"]


def logits(batch: int, queries: int, classes: int, size: tuple[int, int] = (8, 12)) -> SegmentLogits:
    shape = (batch, queries)
    return SegmentLogits(torch.randn(*shape, classes + 1), 3 * torch.randn(*shape, *size), torch.rand(*shape, 4))


def make_matcher(matching: str, **fields):
    return MATCHERS[matching](maskcls_config(matching=matching, **fields))


def targets_of(
    masks: list[torch.Tensor], labels: list[torch.Tensor], valid: torch.Tensor | None = None
) -> PaddedTargets:
    return prepare_targets(masks, labels, 99, torch.device("cpu"), valid)


def costs(matcher, layer: SegmentLogits, targets: PaddedTargets, image: int = 0) -> dict[str, torch.Tensor]:
    """Of an image, (N, M)."""
    terms = matcher.cost_terms(Predictions.of_layers([layer]), targets)
    return {name: term[image, 0, :, : targets.numbers[image]] for name, term in terms.items()}


def match(
    matcher, layers: list[SegmentLogits], targets: PaddedTargets
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Queries and segments of each layer and image."""
    found = matcher(Predictions.of_layers(layers), targets)
    assert isinstance(found, Assignment)
    assert all(index.shape == found.layer.shape and index.dtype == torch.int64 for index in found)
    return [
        [
            tuple(index[(found.layer == layer) & (found.image == image)] for index in (found.query, found.segment))
            for image in range(len(targets.numbers))
        ]
        for layer in range(len(layers))
    ]


@pytest.mark.parametrize("case", ["matcher_basic", "matcher_odd_ratio", "matcher_more_targets_than_queries"])
def test_equals_the_papers_code(oracle, case):
    arrays = oracle(case)
    layer = SegmentLogits(torch.from_numpy(arrays["pred_logits"]), torch.from_numpy(arrays["pred_masks"]))
    images = range(len(layer.class_logits))
    targets = targets_of(
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
    assignments = match(matcher, [layer], targets)[0]
    for i in images:
        terms = costs(matcher, layer, targets, i)
        for term, cost in terms.items():
            np.testing.assert_allclose(cost.numpy(), arrays[f"cost_{term}_{i}"], atol=1e-6)
        total = sum(matcher.weights[term] * cost for term, cost in terms.items())
        np.testing.assert_allclose(total.numpy(), arrays[f"cost_{i}"], atol=1e-5)
        queries, segments_found = assignments[i]
        np.testing.assert_array_equal(queries.numpy(), arrays[f"src_{i}"])
        np.testing.assert_array_equal(segments_found.numpy(), arrays[f"tgt_{i}"])


@pytest.mark.parametrize("at_centers, mode", [(False, "nearest"), (True, "nearest-exact")])
@pytest.mark.parametrize("size", [(8, 12), (7, 5), (32, 48), (40, 50)])
def test_targets_are_resampled_as_torch_does(at_centers, mode, size):
    """Two images of three and one segments, with void and without; the second image's missing ones are nowhere."""
    masks = [torch.rand(3, 32, 48) > 0.5, torch.rand(1, 32, 48) > 0.5]
    labels = [torch.tensor([4, 2, 3]), torch.tensor([1])]
    valid = torch.rand(2, 32, 48) > 0.5
    padded = torch.cat([masks[0], masks[1], torch.zeros(2, 32, 48, dtype=torch.bool)]).view(2, 3, 32, 48)
    for valid_mask in (valid, None):
        targets = targets_of(masks, labels, valid_mask)
        ours, looked_at = targets.resampled(size, at_centers)
        inside = torch.ones_like(valid) if valid_mask is None else valid_mask
        stacks = torch.cat([padded & inside[:, None], inside[:, None]], 1).float()
        expected = torch.nn.functional.interpolate(stacks, size=size, mode=mode)
        assert torch.equal(torch.cat([ours, looked_at[:, None]], 1).float(), expected.flatten(2))
        assert targets.labels[0].tolist() == [4, 2, 3] and targets.labels[1, 0] == 1


@pytest.mark.parametrize("at_centers", [False, True])
def test_maps_of_places_are_resampled_as_their_masks(at_centers):
    places = torch.randint(-1, 3, (2, 32, 48), dtype=torch.int16)
    places[1][places[1] == 2] = -1
    labels = [torch.tensor([4, 2, 3]), torch.tensor([1, 0])]
    stacks = [masks_of_map(own, len(own_labels)) for own, own_labels in zip(places, labels, strict=True)]
    valid = torch.rand(2, 32, 48) > 0.5
    of_maps, of_stacks = targets_of(list(places), labels, valid), targets_of(stacks, labels, valid)
    for ours, expected in zip(
        of_maps.resampled((7, 5), at_centers), of_stacks.resampled((7, 5), at_centers), strict=True
    ):
        assert torch.equal(ours, expected)
    image, segment = torch.tensor([0, 1, 0, 1]), torch.tensor([2, 1, 0, 0])
    expected = torch.stack([stacks[b][m] for b, m in zip(image.tolist(), segment.tolist(), strict=True)])
    assert torch.equal(of_maps.masks_of(image, segment), expected)
    assert torch.equal(of_stacks.masks_of(image, segment), expected)
    assert torch.equal(of_maps.boxes[1, :2], of_stacks.boxes[1, :2])
    assert torch.equal(of_maps.boxes[0], of_stacks.boxes[0])


@pytest.mark.parametrize("matching", BY_COST)
@pytest.mark.parametrize("queries, number", [(5, 3), (3, 5), (4, 4), (4, 0)])
def test_no_assignment_is_cheaper(queries, number, matching):
    layer, size = logits(1, queries, 5), (32, 48)
    masks, labels = segments([size], [number])
    targets = targets_of(masks, labels, torch.rand(1, *size) > 0.2)
    matcher = make_matcher(matching, num_queries=queries)
    ((found,),) = match(matcher, [layer], targets)
    cost = sum(matcher.weights[term] * value for term, value in costs(matcher, layer, targets).items())  # (N, M)
    pairs = min(queries, number)
    assert len(found[0]) == len(found[1]) == pairs
    best = min(
        cost[list(rows), list(columns)].sum().item()
        for rows in itertools.permutations(range(queries), pairs)
        for columns in itertools.combinations(range(number), pairs)
    )
    assert cost[found].sum().item() == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("matching", BY_COST)
def test_uncounted_pixels_do_not_matter(matching):
    layer, size = logits(1, 6, 5), (32, 48)
    masks, labels = segments([size], [4])
    valid_mask = torch.ones(1, *size, dtype=torch.bool)
    valid_mask[:, :, 24:] = False
    matcher = make_matcher(matching)
    before = costs(matcher, layer, targets_of(masks, labels, valid_mask))
    masks[0][:, :, 24:] = ~masks[0][:, :, 24:]
    layer.mask_logits[..., 6:] = 9.0
    after = costs(matcher, layer, targets_of(masks, labels, valid_mask))
    for term in before:
        torch.testing.assert_close(before[term], after[term])


@pytest.mark.parametrize("matching", BY_COST)
def test_all_layers_and_images_leave_the_device_in_one_transfer(matching, monkeypatch):
    transfers = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(self.shape) or self)
    masks, labels = segments([(32, 48)] * 3, [2, 0, 3])
    match(make_matcher(matching), [logits(3, 7, 5) for _ in range(4)], targets_of(masks, labels))
    assert transfers == [(3, 4, 7, 3)]


@pytest.mark.parametrize(
    "matching, term, bad",
    [
        ("bipartite", "class", "class_logits"),
        ("bipartite", "mask", "mask_logits"),
        ("box", "box", "boxes"),
        ("pq", "similarity", "mask_logits"),
    ],
)
def test_a_nan_cost_is_named(matching, term, bad):
    layers = [logits(2, 7, 5) for _ in range(3)]
    getattr(layers[1], bad)[1, 4] = float("nan")
    masks, labels = segments([(32, 48)] * 2, [2, 3])
    with pytest.raises(ValueError, match=f"The {term} cost of image 1 in decoder layer 1 of 3 is NaN for 3 of 21"):
        match(make_matcher(matching), layers, targets_of(masks, labels))


def test_a_nan_box_is_found_where_no_segment_has_a_box():
    layer = logits(1, 7, 5)
    layer.boxes[0, 4] = float("nan")
    with pytest.raises(ValueError, match="The box cost of image 0"):
        match(make_matcher("box"), [layer], targets_of([torch.zeros(1, 8, 8, dtype=torch.bool)], [torch.tensor([2])]))


def test_similarity_is_the_probability_of_the_class_times_dice():
    """Two queries and two segments on four pixels, by hand."""
    masks = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [1, 0]]]).bool()
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.4, 0.4]])  # two classes and "no object"
    m = torch.tensor([[0.75, 0.25, 0.5, 0.5], [0.125, 0.125, 0.5, 0.25]])
    layer = SegmentLogits(p.log()[None], m.logit().view(1, 2, 2, 2))
    targets = targets_of([masks], [torch.tensor([0, 1])])
    (cost,) = costs(make_matcher("pq", num_labels=2), layer, targets).values()
    # Dice 2 |a b| / (|a| + |b|): query 0 has area 2 and overlaps 1 and 0.5; query 1 has area 1 and overlaps 0.25, 0.5.
    dice = torch.tensor([[2 * 1 / (2 + 2), 2 * 0.5 / (2 + 1)], [2 * 0.25 / (1 + 2), 2 * 0.5 / (1 + 1)]])
    torch.testing.assert_close(cost, -torch.tensor([[0.5, 0.25], [0.2, 0.4]]) * dice)
    # The pairs (0, 0), (1, 1) have 0.25 + 0.2 in all, the pairs (0, 1), (1, 0) have 0.083 + 0.033.
    (((queries, found),),) = match(make_matcher("pq", num_labels=2), [layer], targets)
    assert queries.tolist() == found.tolist() == [0, 1]


@pytest.mark.parametrize("queries", [7, 3])
def test_matching_by_boxes_equals_detrs(queries):
    theirs = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    for _ in range(20):
        layer = logits(2, queries, 5)
        masks, labels = segments([(32, 48), (20, 30)], [4, 2])
        targets = targets_of(masks, labels)
        boxes = [to_centres(masks_to_boxes(m) + torch.tensor([0, 0, 1, 1])) / size_of(m) for m in masks]
        outputs = {"logits": layer.class_logits, "pred_boxes": layer.boxes}
        annotations = [{"class_labels": c, "boxes": b} for c, b in zip(labels, boxes, strict=True)]
        expected = theirs(outputs, annotations)
        for pairs, (rows, columns) in zip(match(make_matcher("box"), [layer], targets)[0], expected, strict=True):
            assert torch.equal(pairs[0], rows) and torch.equal(pairs[1], columns)


def to_centres(corners: torch.Tensor) -> torch.Tensor:
    return box_convert(corners, "xyxy", "cxcywh")


def size_of(masks: torch.Tensor) -> torch.Tensor:
    height, width = masks.shape[-2:]
    return torch.tensor([width, height, width, height])


def test_a_segment_without_pixels_is_matched_by_its_class():
    layer = logits(1, 4, 5)
    masks, _ = segments([(32, 48)], [2])
    masks[0][1] = False
    layer.class_logits[0, 2] = torch.tensor([0, 0, 0, 99.0, 0, 0])
    targets = targets_of(masks, [torch.tensor([0, 3])])
    terms = costs(make_matcher("box"), layer, targets)
    assert (terms["box"][:, 1] == 4).all() and (terms["giou"][:, 1] == 2).all()
    (((queries, found),),) = match(make_matcher("box", cross_entropy_weight=50), [layer], targets)
    assert dict(zip(found.tolist(), queries.tolist(), strict=True))[1] == 2


def test_matching_by_boxes_needs_boxes():
    masks, labels = segments([(32, 48)], [2])
    with pytest.raises(ValueError, match="needs predicted boxes"):
        match(make_matcher("box"), [logits(1, 7, 5)._replace(boxes=None)], targets_of(masks, labels))


def test_too_many_segments_are_said_once(caplog):
    masks, labels = segments([(32, 48)] * 2, [2, 9])
    matcher = BipartiteMatcher(maskcls_config())
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        for _ in range(3):
            match(matcher, [logits(2, 7, 5)], targets_of(masks, labels))
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "Image 1" in said[0] and "9 ground-truth" in said[0] and "num_queries=7" in said[0]


def test_fixed_matching_gives_query_k_to_class_k():
    masks, labels = segments([(32, 48)] * 2, [3, 0])
    labels[0] = torch.tensor([4, 0, 2])
    matcher = FixedMatcher(maskcls_config(num_queries=5, matching="fixed"))
    for first, second in match(matcher, [logits(2, 5, 5)] * 2, targets_of(masks, labels)):
        assert first[0].tolist() == [4, 0, 2] and first[1].tolist() == [0, 1, 2]
        assert second[0].tolist() == second[1].tolist() == []


def test_fixed_matching_needs_as_many_queries_as_classes():
    with pytest.raises(ValueError, match="num_queries=7 must equal num_labels=5"):
        FixedMatcher(maskcls_config())


def test_fixed_matching_refuses_two_segments_of_a_class():
    masks, _ = segments([(32, 48)] * 2, [1, 2])
    targets = targets_of(masks, [torch.tensor([1]), torch.tensor([3, 3])])
    with pytest.raises(ValueError, match=r"image 1 has several of class \[3\]"):
        match(FixedMatcher(maskcls_config(num_queries=5)), [logits(2, 5, 5)], targets)
