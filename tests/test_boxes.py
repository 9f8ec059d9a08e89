"""Boxes against torchvision's, and the box losses against DETR's in transformers."""

import pytest
import torch
from torch import Tensor
from torchvision import ops
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

from maskcls_hf import MaskClsCriterion
from maskcls_hf.models.matching import (
    PaddedTargets,
    box_distances,
    boxes_of_index_maps,
    boxes_of_masks,
    generalized_box_iou,
    prepare_targets,
    to_centers,
    to_corners,
)
from maskcls_hf.models.transformer_decoders import SegmentLogits
from test_losses import as_map
from tiny import maskcls_config, pixel_mask, segments


def random_corners(number: int) -> Tensor:
    first, size = torch.rand(number, 2, dtype=torch.float64), torch.rand(number, 2, dtype=torch.float64)
    return torch.cat([first, first + size], dim=1)


def test_both_forms():
    corners = random_corners(9)
    torch.testing.assert_close(to_centers(corners), ops.box_convert(corners, "xyxy", "cxcywh"))
    torch.testing.assert_close(to_corners(to_centers(corners)), corners)


def test_generalized_iou():
    some, others = random_corners(30), random_corners(20)
    some[0], some[1] = others[0], torch.tensor([5, 5, 6, 7.0])  # the same; far from all
    expected = ops.generalized_box_iou(some, others)
    assert expected.max() == 1 and expected.min() < -0.9
    torch.testing.assert_close(generalized_box_iou(some[:, None], others), expected)
    torch.testing.assert_close(generalized_box_iou(some[:20], others), expected[:20].diag())


def test_generalized_iou_by_hand():
    """Boxes of 2 x 2 and 2 x 1 that share 1 x 1: union 4 + 2 - 1, hull 3 x 2."""
    box, other = torch.tensor([0, 0, 2, 2.0]), torch.tensor([1, 1, 3, 2.0])
    assert generalized_box_iou(box, other).item() == pytest.approx(1 / 5 - (6 - 5) / 6)
    distance, loss = box_distances(to_centers(box), to_centers(other))  # centers (1, 1), (2, 1.5)
    assert distance.item() == pytest.approx(1 + 0.5 + 0 + 1) and loss.item() == pytest.approx(1 - (1 / 5 - 1 / 6))


def test_gradients_of_box_losses():
    boxes, targets = (to_centers(random_corners(6)) for _ in range(2))
    assert torch.autograd.gradcheck(lambda b: box_distances(b, targets), (boxes.requires_grad_(),))


def test_boxes_without_area_have_finite_losses_and_gradients():
    boxes = torch.tensor([[0.5, 0.5, 0, 0], [0.2, 0.2, 0, 0.3]], requires_grad=True)
    targets = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0.2, 0.2]])
    losses = torch.stack(box_distances(boxes, targets))
    losses.sum().backward()
    assert losses.isfinite().all() and boxes.grad.isfinite().all()


def test_boxes_of_masks():
    masks = torch.rand(40, 17, 23) > 0.97
    masks = masks[masks.any(2).any(1)]
    masks[0] = True
    expected = ops.masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])  # torchvision's end at the last pixel's index
    assert torch.equal(boxes_of_masks(masks).float(), expected)


@pytest.mark.parametrize("with_void", [False, True])
def test_boxes_of_a_map_are_those_of_its_masks(with_void):
    places = as_map(torch.rand(6, 19, 21) > 0.98)
    places[places == 3] = -1  # a segment without pixels
    stack = places == torch.arange(6).view(-1, 1, 1)
    valid_mask = torch.rand(19, 21) > 0.3 if with_void else None
    (boxes,) = boxes_of_index_maps(places[None], 6, valid_mask if valid_mask is None else valid_mask[None])
    assert boxes[3].tolist() == [0, 0, 0, 0] and boxes[0].sum() > 0
    assert torch.equal(boxes, boxes_of_masks(stack, valid_mask))
    if with_void:
        assert torch.equal(boxes, boxes_of_masks(stack & valid_mask))


def test_no_segments_have_no_boxes():
    assert boxes_of_masks(torch.zeros(0, 5, 7, dtype=torch.bool)).shape == (0, 4)
    assert boxes_of_index_maps(torch.full((2, 5, 7), -1), 0).shape == (2, 0, 4)


def test_boxes_are_relative_to_the_image_without_padding():
    masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    masks[0, 5:10, 15:30] = True  # of an image of 20 x 30
    targets = PaddedTargets(masks, torch.tensor([0]), [1], image_sizes=torch.tensor([[20, 30]]))
    assert targets.boxes.tolist() == [[[22.5 / 30, 7.5 / 20, 15 / 30, 5 / 20]]]
    without = PaddedTargets(masks, torch.tensor([0]), [1])
    assert without.boxes.tolist() == [[[22.5 / 60, 7.5 / 40, 15 / 60, 5 / 40]]]
    own = prepare_targets([masks[:, :20, :30], masks], [torch.tensor([0])] * 2, 1, masks.device)
    assert own.boxes.tolist() == [[[22.5 / 30, 7.5 / 20, 15 / 30, 5 / 20]], [[22.5 / 60, 7.5 / 40, 15 / 60, 5 / 40]]]


@pytest.mark.parametrize("numbers", [[3, 2], [4, 0], [0, 0], [9, 1]])
def test_loss_equals_detrs(numbers):
    """All terms but the masks', which transformers averages over pixels in another way, for two layers."""
    sizes, padded = [(32, 48), (20, 30)], (32, 48)
    masks, labels = segments(sizes, numbers)
    layers = [
        SegmentLogits(torch.randn(2, 7, 6), torch.randn(2, 7, 8, 12), torch.rand(2, 7, 4)).map(Tensor.requires_grad_)
        for _ in range(2)
    ]
    criterion = MaskClsCriterion(maskcls_config(matching="box"))
    terms = criterion(layers, masks, labels, pixel_mask(sizes, padded), image_sizes=torch.tensor(sizes))
    ours = {name: term for name, term in terms.items() if "mask" not in name and "dice" not in name}
    criterion.total(ours).backward()

    theirs = ImageLoss(HungarianMatcher(1, 5, 2), num_classes=5, eos_coef=0.1, losses=["labels", "boxes"])
    annotations = []
    for m, c, (height, width) in zip(masks, labels, sizes, strict=True):
        corners = ops.masks_to_boxes(m) + torch.tensor([0, 0, 1, 1])
        boxes = ops.box_convert(corners / torch.tensor([width, height, width, height]), "xyxy", "cxcywh")
        annotations.append({"class_labels": c, "boxes": boxes})
    copies = [layer.map(lambda tensor: tensor.detach().clone().requires_grad_()) for layer in layers]
    inner, deepest = ({"logits": layer.class_logits, "pred_boxes": layer.boxes} for layer in copies)
    expected = theirs({**deepest, "auxiliary_outputs": [inner]}, annotations)
    expected = {name.replace("loss_ce", "loss_cross_entropy"): term for name, term in expected.items()}
    assert ours.keys() == expected.keys()
    for name, term in expected.items():
        torch.testing.assert_close(ours[name], term, atol=1e-6, rtol=1e-5)
    weights = {"cross_entropy": 1, "bbox": 5, "giou": 2}
    sum(weights[name.removeprefix("loss_").removesuffix("_0")] * term for name, term in expected.items()).backward()
    for layer, copied in zip(layers, copies, strict=True):
        torch.testing.assert_close(layer.class_logits.grad, copied.class_logits.grad, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(layer.boxes.grad, copied.boxes.grad, atol=1e-6, rtol=1e-5)


def test_a_segment_without_pixels_adds_nothing_to_the_box_distances():
    masks, labels = segments([(32, 48)], [3])
    layer = SegmentLogits(torch.randn(1, 7, 6), torch.randn(1, 7, 8, 12), torch.rand(1, 7, 4, requires_grad=True))
    criterion = MaskClsCriterion(maskcls_config(matching="box"))
    masks[0][1] = False
    terms = criterion([layer], masks, labels)
    (terms["loss_bbox"] + terms["loss_giou"]).backward()
    assert (layer.boxes.grad.abs().sum(-1) > 0).sum() == 2
    without = criterion([layer], [masks[0][[0, 2]]], [labels[0][[0, 2]]])
    for name in ("loss_bbox", "loss_giou"):
        assert terms[name].item() == pytest.approx(without[name].item() * 2 / 3, rel=1e-5)
