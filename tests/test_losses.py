"""The loss against the paper's own code, across processes and accumulated batches, and its edge cases."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import run_in_processes
from maskcls_hf import MaskClsCriterion
from maskcls_hf.models import matching
from maskcls_hf.models.losses import count_items, per_pixel_loss
from maskcls_hf.models.matching import Assignment, PaddedTargets, Predictions, masks_of_map, prepare_targets
from maskcls_hf.models.transformer_decoders import PixelLogits, SegmentLogits
from tiny import MAX_DEEPLAB, maskcls_config, pad_labels, pixel_mask, segments

PAPER_NAMES = {"loss_ce": "loss_cross_entropy", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}


VARIANTS = {"bipartite": {}, "box": {"matching": "box"}, "max_deeplab": MAX_DEEPLAB}


def leaf_layers(
    batch: int, number: int = 2, size: tuple[int, int] = (8, 12), queries: int = 7, variant: str = "bipartite"
) -> list[SegmentLogits]:
    def layer() -> SegmentLogits:
        boxes = torch.rand(batch, queries, 4) if variant == "box" else None
        return SegmentLogits(torch.randn(batch, queries, 6), 3 * torch.randn(batch, queries, *size), boxes)

    return [layer().map(torch.Tensor.requires_grad_) for _ in range(number)]


def leaf_pixels(batch: int, size: tuple[int, int] = (8, 12)) -> PixelLogits:
    return PixelLogits(torch.randn(batch, 4, *size, requires_grad=True), torch.randn(batch, 5, *size).requires_grad_())


def tensors(layers: list[SegmentLogits], pixels: PixelLogits) -> list[torch.Tensor]:
    return [tensor for part in (*layers, pixels) for tensor in part if tensor is not None]


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
    masks, labels = ([arrays[f"{name}_{i}"] for i in range(batch)] for name in ("masks", "labels"))
    if case == "nested_padding":
        criterion.matcher = stretching(criterion.matcher, masks, labels)
    terms = criterion(layers, masks, labels)
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


def stretching(matcher, masks: list[torch.Tensor], labels: list[torch.Tensor]):
    """The paper's matcher looks at one image after the other. Labels that are not padded yet are padded in its loss,
    but stretched over the image in its matching (its data loader pads them before). Ours pads them in both."""

    def match(predictions: Predictions, targets: PaddedTargets) -> Assignment:
        of_images = []
        for image in range(len(masks)):
            part = Predictions(predictions.class_logits[[image]], predictions.mask_logits[[image]])
            own = prepare_targets(masks[image : image + 1], labels[image : image + 1], 99, masks[0].device)
            found = matcher(part, own)
            of_images.append(torch.stack(found._replace(image=torch.full_like(found.image, image))))
        return Assignment(*torch.cat(of_images, 1))

    return match


def test_labels_of_mixed_sizes_are_padded_in_matching_as_in_the_loss():
    """Without pixel_mask: the same as labels that were padded before, to the largest or to the network's input."""
    masks, labels = segments([(32, 48), (20, 30)], [3, 2])
    maps = [as_map(m) for m in masks]
    for size in [(32, 48), (40, 48)]:
        for own in (masks, maps):
            layers = leaf_layers(2)
            criterion = MaskClsCriterion(maskcls_config())
            found = criterion(layers, own, labels, padded_size=size, image_sizes=torch.tensor([[32, 48], [20, 30]]))
            stacks = masks if own is masks else [masks_of_map(m, len(c)) for m, c in zip(maps, labels, strict=True)]
            expected = criterion(layers, pad_labels(stacks, size), labels)
            assert all(torch.equal(found[name], term) for name, term in expected.items())
    without_size = criterion(layers, masks, labels)
    expected = criterion(layers, pad_labels(masks, (32, 48)), labels)
    assert all(torch.equal(without_size[name], term) for name, term in expected.items())
    assert without_size["loss_mask"] != found["loss_mask"]


def test_a_map_beside_a_stack_is_read_as_one():
    masks, labels = segments([(32, 48)] * 2, [3, 2])
    maps = [as_map(m) for m in masks]
    stacks = [masks_of_map(m, len(c)) for m, c in zip(maps, labels, strict=True)]
    layers, criterion = leaf_layers(2), MaskClsCriterion(maskcls_config())
    found, expected = criterion(layers, [stacks[0], maps[1]], labels), criterion(layers, stacks, labels)
    assert all(torch.equal(found[name], term) for name, term in expected.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_void_and_padding_are_outside(variant):
    sizes, padded = [(32, 48), (20, 30)], (32, 48)
    masks, labels = segments(sizes, [3, 2])
    layers, pixels = leaf_layers(2, variant=variant), leaf_pixels(2)
    criterion = MaskClsCriterion(maskcls_config(**VARIANTS[variant]))
    valid_mask = pixel_mask(sizes, padded)
    valid_mask[0, 5:9, 5:9] = 0  # void
    before = criterion(layers, pad_labels(masks, padded), labels, valid_mask, pixels=pixels)
    flipped = [torch.where(c == 0, ~m, m) for m, c in zip(pad_labels(masks, padded), valid_mask, strict=True)]
    after = criterion(layers, flipped, labels, valid_mask, pixels=pixels)
    assert {name: term.item() for name, term in before.items()} == {name: term.item() for name, term in after.items()}
    everything = criterion(layers, flipped, labels, pixels=pixels)
    other = [name for name, term in before.items() if everything[name].item() != pytest.approx(term.item(), rel=1e-3)]
    assert {name for name in before if "cross_entropy" not in name} <= set(other)


def as_map(masks: torch.Tensor) -> torch.Tensor:
    """A stack as a map of places, the last of overlapping segments on top."""
    places = torch.full(masks.shape[1:], -1, dtype=torch.int32)
    for place, mask in enumerate(masks):
        places[mask] = place
    return places


@pytest.mark.parametrize("variant", ["fixed", *VARIANTS])
@pytest.mark.parametrize("with_padding", [True, False])
def test_maps_of_places_give_the_loss_and_gradients_of_stacks(variant, with_padding):
    sizes, padded = [(32, 48), (20, 30), (16, 16)], (32, 48)
    masks, _ = segments(sizes, [3, 2, 0])
    labels = [torch.tensor([4, 0, 2]), torch.tensor([1, 3]), torch.zeros(0, dtype=torch.int64)]
    maps = [as_map(m) for m in masks]
    stacks = [places == torch.arange(len(m)).view(-1, 1, 1) for places, m in zip(maps, masks, strict=True)]
    valid_mask = pixel_mask(sizes, padded) if with_padding else None
    config = maskcls_config(num_queries=5, **VARIANTS.get(variant, {"matching": variant}))
    layers, pixels = leaf_layers(3, queries=5, variant=variant), leaf_pixels(3)
    results = []
    for targets in (stacks, maps):
        own = part(layers, pixels, slice(None))
        criterion = MaskClsCriterion(config)
        total = criterion.total(criterion(own[0], targets, labels, valid_mask, pixels=own[1]))
        total.backward()
        results.append([total.detach(), *(tensor.grad for tensor in tensors(*own) if tensor.grad is not None)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_segments_give_a_finite_loss_and_zero_mask_terms(variant):
    layers, pixels = leaf_layers(2, variant=variant), leaf_pixels(2)
    criterion = MaskClsCriterion(maskcls_config(**VARIANTS[variant]))
    masks, labels = segments([(32, 48)] * 2, [0, 0])
    terms = criterion(layers, masks, labels, pixels=pixels)
    criterion.total(terms).backward()
    of_class = [name for name in terms if name.startswith(("loss_cross_entropy", "loss_pq"))]
    assert all(term.isfinite() and (term > 0) == (name in of_class) for name, term in terms.items())
    looked_at = [tensor for layer in layers for tensor in layer[1:] if tensor is not None]
    looked_at += pixels if variant == "max_deeplab" else ()
    assert all(tensor.grad.abs().sum() == 0 for tensor in looked_at), "no gradient, but in the graph, as DDP needs"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_whatever_comes_in(dtype, variant):
    def as_dtype(values, dtype):
        return type(values)(*(None if value is None else value.detach().to(dtype) for value in values))

    low = [as_dtype(layer, dtype) for layer in leaf_layers(2, variant=variant)]
    pixels = as_dtype(leaf_pixels(2), dtype)
    masks, labels = segments([(32, 48)] * 2, [3, 2])
    criterion = MaskClsCriterion(maskcls_config(**VARIANTS[variant]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = criterion(low, masks, labels, pixels=pixels)
    full = [as_dtype(layer, torch.float32) for layer in low]
    exact = criterion(full, masks, labels, pixels=as_dtype(pixels, torch.float32))
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert {n: t.item() for n, t in terms.items()} == {n: t.item() for n, t in exact.items()}


def test_holds_no_tensors():
    criterion = MaskClsCriterion(maskcls_config())
    assert not isinstance(criterion, torch.nn.Module)
    assert not any(isinstance(value, torch.Tensor) for value in vars(criterion).values())


def test_a_weight_counts_for_its_own_term_in_every_layer():
    """`loss_mask` begins the name of `loss_mask_id`."""
    criterion = MaskClsCriterion(maskcls_config(mask_weight=20, mask_id_weight=0.25, pq_weight=3))
    terms = {"loss_mask": 1.0, "loss_mask_0": 2.0, "loss_mask_id": 4.0, "loss_mask_id_11": 8.0, "loss_pq_0": -1.0}
    total = criterion.total({name: torch.tensor(value) for name, value in terms.items()})
    assert total.item() == 20 * (1 + 2) + 0.25 * (4 + 8) - 3


def test_losses_of_max_deeplab_come_only_with_a_weight():
    (layer,), pixels = leaf_layers(1, number=1), leaf_pixels(1)
    masks, labels = segments([(32, 48)], [2])
    every = {"pq_weight", "mask_id_weight", "instance_discrimination_weight", "semantic_weight"}
    plain = {"loss_cross_entropy", "loss_mask", "loss_dice"}
    assert MaskClsCriterion(maskcls_config())([layer], masks, labels).keys() == plain
    for name in every:
        terms = MaskClsCriterion(maskcls_config(**{name: 1.0}))([layer], masks, labels, pixels=pixels)
        assert terms.keys() == plain | {f"loss_{name.removesuffix('_weight')}"}


@pytest.mark.parametrize("weight", ["instance_discrimination_weight", "semantic_weight"])
def test_a_loss_of_pixels_without_pixels_is_refused(weight):
    masks, labels = segments([(32, 48)] * 2, [2, 0])
    with pytest.raises(ValueError, match=f"{weight} needs"):
        MaskClsCriterion(maskcls_config(**{weight: 1.0}))(leaf_layers(2), masks, labels)


@pytest.mark.parametrize(
    "masks, labels, message",
    [
        ([torch.zeros(2, 8, 8)], [torch.tensor([0, 1])], "2 images, but 1 mask_labels"),
        ([torch.zeros(2, 8, 8)] * 2, [torch.tensor([0, 1]), torch.tensor([0])], r"Image 1: .* same M"),
        (
            [torch.zeros(1, 8, 8)] * 2,
            [torch.tensor([0]), torch.tensor([5])],
            r"Image 1: class_labels \[5\] must .*0..4, .*reset_classes",
        ),
        ([torch.zeros(8, 8)] * 2, [torch.tensor([0])] * 2, "Image 0: .*: a map .* holds integers.*float32"),
        (
            [torch.ones(8, 8, dtype=torch.int32)] * 2,
            [torch.tensor([0])] * 2,
            r"holds 1\.\.1, but places in class_labels go from 0 to 0",
        ),
        (
            [torch.arange(64).view(1, 8, 8)] * 2,
            [torch.tensor([0])] * 2,
            "Image 0: mask_labels are 0 outside and 1, 255",
        ),
        ([torch.rand(1, 8, 8)] * 2, [torch.tensor([0])] * 2, "Image 0: mask_labels are 0 outside"),
        ([torch.full((1, 8, 8), torch.nan)] * 2, [torch.tensor([0])] * 2, r"Image 0: mask_labels .* hold \[nan"),
        ([-torch.eye(8)[None]] * 2, [torch.tensor([0])] * 2, r"Image 0: mask_labels .* hold \[-1.0, "),
        ([torch.zeros(1, 8, 8)] * 2, [torch.tensor([0.5])] * 2, "Image 0: class_labels: labels must be integers"),
        ([np.zeros((1, 8, 8))] * 2, [["sky"]] * 2, "Image 0: class_labels: an array of <U3 holds no real numbers"),
        ([[None]] * 2, [[0]] * 2, "Image 0: mask_labels: an array of object holds no real numbers"),
        (torch.zeros(2, 8, 8, 3), torch.tensor([[0, 1], [0, 1]]), "Image 0: .* must be"),
    ],
)
def test_labels_that_do_not_fit_are_refused(masks, labels, message):
    with pytest.raises(ValueError, match=message):
        MaskClsCriterion(maskcls_config())(leaf_layers(2), masks, labels)


@pytest.mark.parametrize(
    "convert",
    [
        lambda tensor: 255 * tensor.to(torch.uint8),
        lambda tensor: tensor.double(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy().astype(np.uint16),
        lambda tensor: tensor.tolist(),
    ],
)
def test_labels_of_every_type_give_the_loss_of_bool_masks(convert):
    masks, labels = segments([(32, 48)] * 2, [3, 1])
    layers = leaf_layers(2)
    criterion = MaskClsCriterion(maskcls_config())
    expected = criterion(layers, masks, labels)
    of_type = [np.asarray(v).tolist() if isinstance(convert(masks[0]), list) else v for v in labels]
    found = criterion(layers, [convert(mask) for mask in masks], of_type)
    assert all(torch.equal(found[name], term) for name, term in expected.items())
    as_floats = criterion(layers, masks, [label.float() for label in labels])
    assert all(torch.equal(as_floats[name], term) for name, term in expected.items())


def gradients(layers: list[SegmentLogits], pixels: PixelLogits, rows: slice) -> list[np.ndarray]:
    return [tensor.grad[rows].numpy() for tensor in tensors(layers, pixels) if tensor.grad is not None]


def union_batch(variant: str) -> tuple[list[SegmentLogits], PixelLogits, list, list]:
    torch.manual_seed(3)
    masks, labels = segments([(32, 48)] * 4, [3, 1, 0, 0])  # the second half has no segments
    return leaf_layers(4, variant=variant), leaf_pixels(4), masks, labels


def part(layers: list[SegmentLogits], pixels: PixelLogits, rows: slice) -> tuple[list[SegmentLogits], PixelLogits]:
    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows].detach().clone().requires_grad_()

    return [layer.map(leaf) for layer in layers], PixelLogits(*map(leaf, pixels))


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulated_batches_equal_their_union(variant):
    layers, pixels, masks, labels = union_batch(variant)
    criterion = MaskClsCriterion(maskcls_config(**VARIANTS[variant]))
    union = criterion.total(criterion(layers, masks, labels, pixels=pixels))
    union.backward()
    counts = count_items(labels[:2], 7) + count_items(labels[2:], 7)
    total = 0.0
    for rows in (slice(0, 2), slice(2, 4)):
        own = part(layers, pixels, rows)
        loss = criterion.total(criterion(own[0], masks[rows], labels[rows], num_items_in_batch=counts, pixels=own[1]))
        loss.backward()
        total += loss.item()
        for ours, theirs in zip(gradients(*own, slice(None)), gradients(layers, pixels, rows), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-7)
    assert total == pytest.approx(union.item(), rel=1e-6)


def losses_of_rank(rank: int) -> dict[str, tuple[float, list[np.ndarray]]]:
    results = {}
    for variant, fields in VARIANTS.items():
        layers, pixels, masks, labels = union_batch(variant)
        rows = slice(2 * rank, 2 * rank + 2)
        own, criterion = part(layers, pixels, rows), MaskClsCriterion(maskcls_config(**fields))
        loss = criterion.total(criterion(own[0], masks[rows], labels[rows], pixels=own[1]))
        loss.backward()
        results[variant] = loss.item(), gradients(*own, slice(None))
    return results


def test_two_processes_equal_one_on_the_union_batch():
    of_ranks = run_in_processes(losses_of_rank, 2)
    for variant, fields in VARIANTS.items():
        layers, pixels, masks, labels = union_batch(variant)
        criterion = MaskClsCriterion(maskcls_config(**fields))
        union = criterion.total(criterion(layers, masks, labels, pixels=pixels))
        union.backward()
        results = [of_rank[variant] for of_rank in of_ranks]
        assert np.mean([loss for loss, _ in results]) == pytest.approx(union.item(), rel=1e-6)
        for rank, (_, grads) in enumerate(results):  # averaging over processes divides each gradient by 2
            rows = slice(2 * rank, 2 * rank + 2)
            for ours, theirs in zip(grads, gradients(layers, pixels, rows), strict=True):
                np.testing.assert_allclose(ours / 2, theirs, atol=1e-7)


def test_per_pixel_loss_is_the_mean_over_labeled_pixels():
    logits, labels = torch.randn(2, 5, 8, 12), torch.randint(0, 5, (2, 32, 48))
    labels[0, :10] = 255
    upsampled = torch.nn.functional.interpolate(logits, size=(32, 48), mode="bilinear", align_corners=False)
    expected = torch.nn.functional.cross_entropy(upsampled, labels, ignore_index=255)
    assert per_pixel_loss(logits, labels, 255).item() == pytest.approx(expected.item(), rel=1e-6)
    assert per_pixel_loss(logits, torch.full_like(labels, 255), 255).item() == 0


class Operations(TorchDispatchMode):
    """How many operations are started: views are none."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["fixed", *VARIANTS])
@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("form", ["stacks", "maps"])
def test_a_step_starts_as_many_operations_for_any_number_of_images_and_layers(variant, with_padding, form, monkeypatch):
    """As long as one chunk holds all: small operations on many images are what a GPU would wait for."""
    monkeypatch.setattr(matching, "CPU_CHUNK", 2**40)
    criterion = MaskClsCriterion(maskcls_config(num_queries=5, **VARIANTS.get(variant, {"matching": variant})))
    numbers = set()
    for batch, depth in ((2, 6), (16, 1), (16, 6)):
        masks, _ = segments([(32, 48)] * batch, [3] * batch)
        labels = [torch.randperm(5)[:3] for _ in range(batch)]
        given = masks if form == "stacks" else [as_map(m) for m in masks]
        layers = leaf_layers(batch, depth, queries=5, variant=variant)
        valid_mask = torch.rand(batch, 32, 48) > 0.1 if with_padding else None
        with Operations() as operations:
            criterion.total(criterion(layers, given, labels, valid_mask, pixels=leaf_pixels(batch)))
        numbers.add(operations.number)
    assert len(numbers) == 1
    if variant == "bipartite":
        assert numbers.pop() < 150


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_chunks_on_several_threads_give_the_same(variant, monkeypatch):
    sizes = [(32, 48), (20, 30), (32, 48)]
    masks, labels = segments(sizes, [3, 0, 2])
    layers, pixels, valid_mask = leaf_layers(3, variant=variant), leaf_pixels(3), pixel_mask(sizes, (32, 48))
    criterion = MaskClsCriterion(maskcls_config(**VARIANTS[variant]))
    results = []
    for chunk, rows, threads in ((2**40, 64, 1), (2000, 3, 1), (2000, 3, 2)):
        monkeypatch.setattr(matching, "CPU_CHUNK", chunk)
        monkeypatch.setattr(matching, "MIN_ROWS", rows)
        torch.set_num_threads(threads)
        own = part(layers, pixels, slice(None))
        terms = criterion(own[0], masks, labels, valid_mask, pixels=own[1])
        criterion.total(terms).backward()
        torch.set_num_threads(1)
        results.append([*terms.values(), *(tensor.grad for tensor in tensors(*own) if tensor.grad is not None)])
    for expected, ours, on_threads in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(on_threads, ours)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int8])
def test_index_maps_of_small_and_unsigned_types_give_the_loss_of_wide_ones(dtype):
    criterion, layers = MaskClsCriterion(maskcls_config(num_queries=300)), leaf_layers(2, 1, queries=300)
    index_maps = [torch.randint(0, 100, (20, 48)), torch.randint(0, 100, (32, 40))]  # padded with -1
    class_labels = [torch.randint(5, (300,)) for _ in index_maps]  # 200 have no pixel
    valid = pixel_mask([(20, 48), (32, 40)], (32, 48))
    wide, small = (
        criterion(layers, maps, class_labels, valid)
        for maps in (index_maps, [of_image.to(dtype) for of_image in index_maps])
    )
    assert {name: term.item() for name, term in small.items()} == {name: term.item() for name, term in wide.items()}
