"""The loss against the paper's own code, across processes and accumulated batches, and its edge cases."""

import numpy as np
import pytest
import torch

from conftest import needs_shared
from distributed import run_in_processes
from maskcls_hf import MaskClsCriterion
from maskcls_hf.contracts import SegmentLogits
from maskcls_hf.criterion import count_items, per_pixel_loss
from tiny import maskcls_config, pad_labels, pixel_mask, segments

PAPER_NAMES = {"loss_ce": "loss_cross_entropy", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}


def leaf_layers(batch: int, number: int = 2, size: tuple[int, int] = (8, 12)) -> list[SegmentLogits]:
    return [
        SegmentLogits(torch.randn(batch, 7, 6, requires_grad=True), (3 * torch.randn(batch, 7, *size)).requires_grad_())
        for _ in range(number)
    ]


@needs_shared
@pytest.mark.parametrize("case", ["basic", "one_empty", "all_empty", "nested_padding"])
def test_equals_the_papers_code(oracle, case):
    arrays = {
        name: torch.from_numpy(a) if a.dtype.kind in "fiub" else a for name, a in oracle(f"criterion_{case}").items()
    }
    inner = sum(name.startswith("pred_logits_aux") for name in arrays)
    suffixes = [f"_aux{j}" for j in range(inner)] + [""]
    layers = [
        SegmentLogits(arrays[f"pred_logits{s}"].requires_grad_(), arrays[f"pred_masks{s}"].requires_grad_())
        for s in suffixes
    ]
    batch, _, classes = arrays["pred_logits"].shape
    config = maskcls_config(num_labels=classes - 1, no_object_weight=arrays["eos_coef"].item())
    criterion = MaskClsCriterion(config)
    masks = [arrays[f"masks_{i}"] for i in range(batch)]
    terms = criterion(layers, masks, [arrays[f"labels_{i}"] for i in range(batch)])
    for name, value in zip(arrays["loss_names"].tolist(), arrays["loss_values"].tolist(), strict=True):
        base, _, layer = name.rpartition("_") if name[-1].isdigit() else (name, "", "")
        ours = terms[PAPER_NAMES[base] + (f"_{layer}" if layer else "")]
        assert ours.item() == pytest.approx(value, abs=2e-6)
    total = criterion.total(terms)
    assert total.item() == pytest.approx(arrays["total_weighted"].item(), rel=1e-6)
    total.backward()
    for layer, suffix in zip(layers, suffixes, strict=True):
        torch.testing.assert_close(layer.class_logits.grad, arrays[f"grad_total_logits{suffix}"], atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(layer.mask_logits.grad, arrays[f"grad_total_masks{suffix}"], atol=1e-7, rtol=1e-5)


def test_void_and_padding_are_outside():
    sizes, padded = [(32, 48), (20, 30)], (32, 48)
    masks, labels = segments(sizes, [3, 2])
    layers, criterion = leaf_layers(2), MaskClsCriterion(maskcls_config())
    counted = pixel_mask(sizes, padded)
    counted[0, 5:9, 5:9] = 0  # void
    before = criterion(layers, pad_labels(masks, padded), labels, counted)
    flipped = [torch.where(c == 0, ~m, m) for m, c in zip(pad_labels(masks, padded), counted, strict=True)]
    after = criterion(layers, flipped, labels, counted)
    assert {name: term.item() for name, term in before.items()} == {name: term.item() for name, term in after.items()}
    everything = criterion(layers, pad_labels(masks, padded), labels)
    assert everything["loss_mask"].item() != pytest.approx(before["loss_mask"].item(), rel=1e-3)


def as_map(masks: torch.Tensor) -> torch.Tensor:
    """A stack as a map of places, the last of overlapping segments on top."""
    places = torch.full(masks.shape[1:], -1, dtype=torch.int32)
    for place, mask in enumerate(masks):
        places[mask] = place
    return places


@pytest.mark.parametrize("matching", ["bipartite", "fixed"])
@pytest.mark.parametrize("with_padding", [True, False])
def test_maps_of_places_give_the_loss_and_gradients_of_stacks(matching, with_padding):
    sizes, padded = [(32, 48), (20, 30), (16, 16)], (32, 48)
    masks, _ = segments(sizes, [3, 2, 0])
    labels = [torch.tensor([4, 0, 2]), torch.tensor([1, 3]), torch.zeros(0, dtype=torch.int64)]
    maps = [as_map(m) for m in masks]
    stacks = [places == torch.arange(len(m)).view(-1, 1, 1) for places, m in zip(maps, masks, strict=True)]
    counted = pixel_mask(sizes, padded) if with_padding else None
    config = maskcls_config(matching=matching, num_queries=5)
    layers = [
        SegmentLogits(torch.randn(3, 5, 6, requires_grad=True), torch.randn(3, 5, 8, 12, requires_grad=True))
        for _ in range(2)
    ]
    results = []
    for targets in (stacks, maps):
        copies = part(layers, slice(None))
        criterion = MaskClsCriterion(config)
        total = criterion.total(criterion(copies, targets, labels, counted))
        total.backward()
        results.append([total.detach(), *(tensor.grad for layer in copies for tensor in layer)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_no_segments_give_a_finite_loss_and_zero_mask_terms():
    layers, criterion = leaf_layers(2), MaskClsCriterion(maskcls_config())
    masks, labels = segments([(32, 48)] * 2, [0, 0])
    terms = criterion(layers, masks, labels)
    criterion.total(terms).backward()
    assert terms["loss_mask"] == terms["loss_dice"] == 0 and terms["loss_cross_entropy"].isfinite()
    assert all(layer.mask_logits.grad.abs().sum() == 0 for layer in layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_whatever_comes_in(dtype):
    layers = [SegmentLogits(*(t.detach().to(dtype) for t in layer)) for layer in leaf_layers(2)]
    masks, labels = segments([(32, 48)] * 2, [3, 2])
    criterion = MaskClsCriterion(maskcls_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = criterion(layers, masks, labels)
    exact = criterion([SegmentLogits(*(t.float() for t in layer)) for layer in layers], masks, labels)
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert {n: t.item() for n, t in terms.items()} == {n: t.item() for n, t in exact.items()}


def test_holds_no_tensors():
    criterion = MaskClsCriterion(maskcls_config())
    assert not isinstance(criterion, torch.nn.Module)
    assert not any(isinstance(value, torch.Tensor) for value in vars(criterion).values())


@pytest.mark.parametrize(
    "masks, labels, message",
    [
        ([torch.zeros(2, 8, 8)], [torch.tensor([0, 1])], "2 images, but 1 mask_labels"),
        ([torch.zeros(2, 8, 8)] * 2, [torch.tensor([0, 1]), torch.tensor([0])], r"Image 1: .* same M"),
        (
            [torch.zeros(1, 8, 8)] * 2,
            [torch.tensor([0]), torch.tensor([5])],
            r"Image 1: class_labels \[5\] must .*0..4",
        ),
        ([torch.zeros(8, 8)] * 2, [torch.tensor([0])] * 2, "Image 0: .*: a map .* holds integers.*float32"),
        (
            [torch.ones(8, 8, dtype=torch.int32)] * 2,
            [torch.tensor([0])] * 2,
            r"holds 1\.\.1, but places in class_labels go from 0 to 0",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(masks, labels, message):
    with pytest.raises(ValueError, match=message):
        MaskClsCriterion(maskcls_config())(leaf_layers(2), masks, labels)


def gradients(layers: list[SegmentLogits], rows: slice) -> list[np.ndarray]:
    return [tensor.grad[rows].numpy() for layer in layers for tensor in layer]


def union_batch() -> tuple[list[SegmentLogits], list, list]:
    torch.manual_seed(3)
    masks, labels = segments([(32, 48)] * 4, [3, 1, 0, 0])  # the second half has no segments
    return leaf_layers(4), masks, labels


def part(layers: list[SegmentLogits], rows: slice) -> list[SegmentLogits]:
    return [SegmentLogits(*(t[rows].detach().clone().requires_grad_() for t in layer)) for layer in layers]


def test_accumulated_batches_equal_their_union():
    layers, masks, labels = union_batch()
    criterion = MaskClsCriterion(maskcls_config())
    union = criterion.total(criterion(layers, masks, labels))
    union.backward()
    counts = count_items(labels[:2], 7) + count_items(labels[2:], 7)
    total = 0.0
    for rows in (slice(0, 2), slice(2, 4)):
        own = part(layers, rows)
        loss = criterion.total(criterion(own, masks[rows], labels[rows], num_items_in_batch=counts))
        loss.backward()
        total += loss.item()
        for ours, theirs in zip(gradients(own, slice(None)), gradients(layers, rows), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-7)
    assert total == pytest.approx(union.item(), rel=1e-6)


def loss_of_rank(rank: int) -> tuple[float, list[np.ndarray]]:
    layers, masks, labels = union_batch()
    rows = slice(2 * rank, 2 * rank + 2)
    own, criterion = part(layers, rows), MaskClsCriterion(maskcls_config())
    loss = criterion.total(criterion(own, masks[rows], labels[rows]))
    loss.backward()
    return loss.item(), gradients(own, slice(None))


def test_two_processes_equal_one_on_the_union_batch():
    layers, masks, labels = union_batch()
    criterion = MaskClsCriterion(maskcls_config())
    union = criterion.total(criterion(layers, masks, labels))
    union.backward()
    results = run_in_processes(loss_of_rank, 2)
    assert np.mean([loss for loss, _ in results]) == pytest.approx(union.item(), rel=1e-6)
    for rank, (_, grads) in enumerate(results):  # averaging over processes divides each gradient by 2
        for ours, theirs in zip(grads, gradients(layers, slice(2 * rank, 2 * rank + 2)), strict=True):
            np.testing.assert_allclose(ours / 2, theirs, atol=1e-7)


def test_per_pixel_loss_is_the_mean_over_labelled_pixels():
    logits, labels = torch.randn(2, 5, 8, 12), torch.randint(0, 5, (2, 32, 48))
    labels[0, :10] = 255
    upsampled = torch.nn.functional.interpolate(logits, size=(32, 48), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.cross_entropy(upsampled, labels, ignore_index=255)
    assert per_pixel_loss(logits, labels, 255).item() == pytest.approx(expected.item(), rel=1e-6)
    assert per_pixel_loss(logits, torch.full_like(labels, 255), 255).item() == 0
