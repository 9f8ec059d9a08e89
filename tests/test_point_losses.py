"""Costs and losses at points, beside transformers' Mask2Former and the definitions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from maskcls_hf import MaskClsConfig
from maskcls_hf.models.losses import MaskClsCriterion
from maskcls_hf.models.point_sampling import PointSampler
from maskcls_hf.models.transformer_decoders import SegmentLogits

QUERIES, CLASSES, SIZE, GRID = 12, 5, (48, 64), (12, 16)
WEIGHTS = {"cross_entropy_weight": 2.0, "mask_weight": 5.0, "dice_weight": 5.0, "mask_loss": "cross_entropy"}


def config(points: int | None = 200, **options) -> MaskClsConfig:
    return MaskClsConfig(num_queries=QUERIES, num_labels=CLASSES, loss_points=points, **(WEIGHTS | options))


def layers(number: int = 3, images: int = 2, requires_grad: bool = True) -> list[SegmentLogits]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(requires_grad)

    return [SegmentLogits(noise(images, QUERIES, CLASSES + 1), noise(images, QUERIES, *GRID)) for _ in range(number)]


def index_maps(segments: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Blocks of 4 x 4 pixels of segments, and of none."""
    rng = np.random.default_rng(seed)
    maps = [rng.integers(-1, number, (SIZE[0] // 4, SIZE[1] // 4)) for number in segments]
    return [torch.from_numpy(m.repeat(4, 0).repeat(4, 1)) for m in maps]


def stacks(maps: list[torch.Tensor], segments: list[int]) -> list[torch.Tensor]:
    return [m == torch.arange(number).view(-1, 1, 1) for m, number in zip(maps, segments, strict=True)]


SEGMENTS = [3, 5]
LABELS = [torch.tensor([0, 4, 2]), torch.tensor([1, 1, 3, 0, 2])]


@pytest.fixture
def same_points(monkeypatch):
    """Whoever draws gets the same points, in every row."""
    base = torch.rand(2000, 2, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(
        torch, "rand", lambda rows, points, two, device=None: base[:points].expand(rows, -1, -1).clone()
    )


@pytest.mark.parametrize("form", ["maps", "stacks"])
@pytest.mark.parametrize("importance", [0.75, 0.0, 1.0])
def test_transformers_losses_and_gradients(same_points, form, importance):
    ours, theirs = layers(), layers()
    maps = index_maps(SEGMENTS)
    criterion = MaskClsCriterion(config(attend_to_padding=True, loss_importance=importance))
    terms = criterion(ours, maps if form == "maps" else stacks(maps, SEGMENTS), LABELS)

    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    reference_config = SimpleNamespace(
        num_labels=CLASSES, no_object_weight=0.1, train_num_points=200, oversample_ratio=3.0,
        importance_sample_ratio=importance, class_weight=2.0, mask_weight=5.0, dice_weight=5.0,
    )  # fmt: skip
    reference = Mask2FormerLoss(reference_config, weights)
    auxiliary = [
        {"class_queries_logits": layer.class_logits, "masks_queries_logits": layer.mask_logits} for layer in theirs[:-1]
    ]
    masks = [stack.float() for stack in stacks(maps, SEGMENTS)]
    expected = reference(theirs[-1].mask_logits, theirs[-1].class_logits, masks, LABELS, auxiliary)

    assert terms.keys() == expected.keys() and len(terms) == 9
    for name, term in terms.items():
        torch.testing.assert_close(term, expected[name], rtol=1e-5, atol=1e-6)
    criterion.total(terms).backward()
    sum(
        weight * term for name, term in expected.items() for of, weight in weights.items() if name.startswith(of)
    ).backward()
    for layer, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(layer.mask_logits.grad, other.mask_logits.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(layer.class_logits.grad, other.class_logits.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mask_loss", ["focal", "cross_entropy"])
def test_many_points_are_all_pixels(mask_loss):
    """With uniform points their losses tend to those of the upsampled masks."""
    torch.manual_seed(0)
    mask_weights = {"mask_loss": mask_loss, "attend_to_padding": False}
    maps = index_maps(SEGMENTS)
    whole = MaskClsCriterion(config(None, **mask_weights))(layers(), maps, LABELS)
    points = MaskClsCriterion(config(200_000, loss_importance=0, **mask_weights))(layers(), maps, LABELS)
    for name, term in whole.items():
        if "mask" in name:
            torch.testing.assert_close(points[name], term, rtol=4e-2, atol=0)  # labels between pixels are shares


@pytest.mark.parametrize("points", [None, 500])
def test_whole_masks_in_cross_entropy(points):
    """Against torch's own, at all pixels; and the gradient, at pixels and at points, against differences."""
    maps, criterion = index_maps(SEGMENTS), MaskClsCriterion(config(points, loss_importance=0))
    made = [SegmentLogits(layer.class_logits, layer.mask_logits.double()) for layer in layers(1)]
    logits = made[0].mask_logits.detach().requires_grad_()
    made = [SegmentLogits(made[0].class_logits, logits)]
    torch.manual_seed(3)
    terms = criterion(made, maps, LABELS)
    if points is None:
        targets = stacks(maps, SEGMENTS)
        assignment = criterion.matcher(*prepared(made, maps))
        losses = []
        for _, image, query, segment in zip(*(part.tolist() for part in assignment), strict=True):
            up = F.interpolate(logits[image, query][None, None].float(), size=SIZE, mode="bilinear")[0, 0]
            losses.append(F.binary_cross_entropy_with_logits(up, targets[image][segment].float()))
        torch.testing.assert_close(terms["loss_mask"].float(), torch.stack(losses).sum() / sum(SEGMENTS))
    (terms["loss_mask"] + terms["loss_dice"]).backward()
    moved = torch.zeros_like(logits).normal_(generator=torch.Generator().manual_seed(5)) * 2e-3
    with torch.no_grad():
        sums = []
        for sign in (1, -1):
            torch.manual_seed(3)
            shifted = [SegmentLogits(made[0].class_logits, logits + sign * moved)]
            found = criterion(shifted, maps, LABELS)
            sums.append(found["loss_mask"] + found["loss_dice"])
    expected = (sums[0] - sums[1]) / 2
    torch.testing.assert_close((logits.grad * moved).sum().float(), expected.float(), rtol=2e-2, atol=0)


def prepared(made, maps):
    from maskcls_hf.models.matching import Predictions, prepare_targets

    return Predictions.of_layers(made), prepare_targets(maps, LABELS, CLASSES, torch.device("cpu"))


class TestVoidAndPadding:
    def valid(self) -> torch.Tensor:
        mask = torch.ones(2, *SIZE, dtype=torch.bool)
        mask[0, :, 40:] = False  # padding
        mask[1, 8:32, 8:40] = False  # void
        return mask

    @pytest.mark.parametrize("form", ["maps", "stacks"])
    def test_logits_there_change_nothing(self, form):
        """Cells that are nowhere near a valid pixel: no cost, loss or gradient sees them."""
        maps, valid = index_maps(SEGMENTS), self.valid()
        labels = maps if form == "maps" else stacks(maps, SEGMENTS)
        cells = F.max_pool2d(valid[:, None].float(), 4)[:, 0]  # (2, 12, 16) with a valid pixel
        unseen = F.max_pool2d(cells[:, None], 3, 1, 1)[:, 0] == 0  # and none around
        assert unseen.sum() > 20
        found = []
        for change in (0.0, 1e4):
            made = [
                SegmentLogits(
                    layer.class_logits, (layer.mask_logits.detach() + change * unseen[:, None]).requires_grad_()
                )
                for layer in layers()
            ]
            torch.manual_seed(7)
            terms = MaskClsCriterion(config())(made, labels, LABELS, valid)
            sum(terms.values()).backward()
            found.append((terms, [layer.mask_logits.grad for layer in made]))
        for name, term in found[0][0].items():
            assert torch.equal(term, found[1][0][name]), name
        for gradient, other in zip(found[0][1], found[1][1], strict=True):
            assert torch.equal(gradient, other)
            assert gradient[unseen[:, None].expand_as(gradient)].abs().max() == 0 < gradient.abs().max()

    def test_labels_there_change_nothing(self):
        maps, valid = index_maps(SEGMENTS), self.valid()
        found = []
        for value in (-1, 1):
            torch.manual_seed(7)
            changed = [m.where(mask, value) for m, mask in zip(maps, valid, strict=True)]
            found.append(MaskClsCriterion(config())(layers(), changed, LABELS, valid))
        for name, term in found[0].items():
            torch.testing.assert_close(term, found[1][name], rtol=0, atol=0)

    def test_points_are_uniform_on_valid_pixels(self):
        torch.manual_seed(0)
        valid, maps = self.valid(), index_maps(SEGMENTS)
        from maskcls_hf.models.matching import prepare_targets

        targets = prepare_targets(maps, LABELS, CLASSES, torch.device("cpu"), valid)
        points = PointSampler(config()).on_valid_pixels(torch.tensor([1, 0, 1]), 60_000, targets)
        for row, image in enumerate((1, 0, 1)):
            place = (points[row] * torch.tensor([SIZE[1], SIZE[0]])).long()
            number = torch.zeros(SIZE, dtype=torch.long).index_put_(
                (place[:, 1], place[:, 0]), torch.ones(len(place), dtype=torch.long), accumulate=True
            )
            assert number[~valid[image]].sum() == 0
            mean = 60_000 / valid[image].sum()
            assert ((number[valid[image]] - mean).abs() < 7 * mean.sqrt()).all()

    def test_an_image_all_void_has_no_mask_loss(self):
        valid = torch.ones(2, *SIZE, dtype=torch.bool)
        valid[0] = False
        made = layers()
        terms = MaskClsCriterion(config())(made, index_maps(SEGMENTS), LABELS, valid)
        sum(term for name, term in terms.items() if "cross" not in name).backward()
        assert all(torch.isfinite(term) for term in terms.values())
        for layer in made:
            assert layer.mask_logits.grad[0].abs().max() == 0 < layer.mask_logits.grad[1].abs().max()


def test_images_without_objects():
    """Of one image, and of both: finite, mask losses 0 where nothing is, gradients everywhere."""
    for segments in ([0, 5], [0, 0]):
        made = layers()
        labels = [torch.zeros(0, dtype=torch.long) if number == 0 else LABELS[1] for number in segments]
        terms = MaskClsCriterion(config())(made, index_maps(segments), labels)
        total = MaskClsCriterion(config()).total(terms)
        total.backward()
        assert torch.isfinite(total)
        assert (terms["loss_mask"] == 0) == (segments == [0, 0])
        assert all(layer.class_logits.grad is not None and layer.mask_logits.grad is not None for layer in made)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_matches_as_float32(autocast):
    """Costs and losses are computed in float32, of logits in bfloat16 and under autocast too."""
    maps = index_maps(SEGMENTS)
    made = [SegmentLogits(layer.class_logits, layer.mask_logits.detach().bfloat16()) for layer in layers()]
    wide = [SegmentLogits(layer.class_logits, layer.mask_logits.float()) for layer in made]
    found, assignments = [], []
    for some, enabled in ((made, autocast), (wide, False)):
        criterion = MaskClsCriterion(config())
        matcher = criterion.matcher
        criterion.matcher = lambda *given, matcher=matcher: assignments.append(matcher(*given)) or assignments[-1]
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(criterion(some, maps, LABELS))
    assert all(torch.equal(one, other) for one, other in zip(*assignments, strict=True))
    for name, term in found[0].items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, found[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_points": 0}, "loss_points=0 must be an integer at least 1"),
        ({"loss_points": 2.5}, "loss_points=2.5"),
        ({"loss_importance": 1.5}, "loss_importance=1.5 must be a number from 0 to 1"),
        ({"loss_oversampling": 0.5}, "loss_oversampling=0.5 must be a number at least 1"),
        ({"mask_loss": "bce"}, r"mask_loss='bce' must be one of \['focal', 'cross_entropy'\]"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        MaskClsConfig(num_labels=CLASSES, **options)
