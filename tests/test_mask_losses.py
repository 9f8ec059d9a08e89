"""Focal and dice losses against their definitions, and their gradients against autograd's."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskcls_hf.models import losses, matching
from maskcls_hf.models.losses import paired_losses
from maskcls_hf.models.matching import PaddedTargets, pairwise_losses


def by_definition(logits: Tensor, targets: Tensor, valid_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """RetinaNet's Eq. 5 and V-Net's dice with 1 added to both parts, one mask after the other."""
    upsampled = F.interpolate(logits[None], size=targets.shape[1:], mode="bilinear", align_corners=False)[0]
    focal, dice = [], []
    for mask, target, looked_at in zip(
        upsampled, targets, torch.ones_like(targets) if valid_mask is None else valid_mask, strict=True
    ):
        p, t = mask.sigmoid()[looked_at], target[looked_at].to(mask.dtype)
        p_t = p * t + (1 - p) * (1 - t)
        alpha = 0.25 * t + 0.75 * (1 - t)
        focal.append((-alpha * (1 - p_t) ** 2 * p_t.log()).sum() / max(1, p.numel()))
        dice.append(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    return torch.stack(focal), torch.stack(dice)


def losses_of_pairs(logits: Tensor, targets: Tensor, valid_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of masks (M, h, w) with their own segments (M, H, W), each of an image of its own."""
    number = len(targets)
    padded = PaddedTargets(targets, torch.zeros(number, dtype=torch.int64), [1] * number, valid_mask)
    return paired_losses(logits, padded, torch.arange(number), torch.zeros(number, dtype=torch.int64))


@pytest.fixture(params=["all pixels", "some pixels", "none of one mask", "fewer pixels than cells"])
def masks(request) -> tuple[Tensor, Tensor, Tensor | None]:
    logits = 3 * torch.randn(5, 6, 9, dtype=torch.float64)
    size = (4, 7) if request.param == "fewer pixels than cells" else (20, 31)
    targets = torch.rand(5, *size) > 0.7
    valid_mask = None if request.param == "all pixels" else torch.rand(5, *size) > 0.2
    if request.param == "none of one mask":
        valid_mask[2] = False
    return logits.requires_grad_(), targets, valid_mask


@pytest.mark.parametrize("masks_a_chunk", [1, 2, 100])
@pytest.mark.parametrize("tile", [(256, 512), (7, 5), (1, 1)])
def test_paired_losses_and_gradients_follow_the_definition(masks, masks_a_chunk, tile, monkeypatch):
    logits, targets, valid_mask = masks
    monkeypatch.setattr(losses, "CPU_TILE", tile)
    pixels = targets[0].numel()
    monkeypatch.setattr(matching, "CPU_CHUNK", masks_a_chunk * (5 * 8 * min(tile[0] * tile[1], pixels) + 4 * pixels))
    factors = torch.rand(2, 5, dtype=torch.float64)
    results = []
    for losses_of in (losses_of_pairs, by_definition):
        values = torch.stack(losses_of(logits, targets, valid_mask))
        results.append((values.detach(), *torch.autograd.grad((factors * values).sum(), logits)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9)


def test_paired_losses_without_gradients_are_the_same(masks):
    logits, targets, valid_mask = masks
    with torch.no_grad():
        without = losses_of_pairs(logits, targets, valid_mask)
    assert torch.equal(torch.stack(without), torch.stack(losses_of_pairs(logits, targets, valid_mask)))


def test_paired_losses_and_gradients_stay_finite_at_extreme_logits():
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4]).view(4, 1, 1).requires_grad_()
    for inside in (True, False):
        values = torch.stack(losses_of_pairs(logits, torch.full((4, 2, 2), inside), None))
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert values.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 4000, 2**23])
def test_pairwise_losses_are_the_paired_losses_of_every_pair(chunk, monkeypatch):
    """Of two images; a chunk is a pixel, some pixels, or both images."""
    monkeypatch.setattr(matching, "CPU_CHUNK", chunk)
    logits, targets = 3 * torch.randn(2, 4, 6, 8, dtype=torch.float64), torch.rand(2, 3, 6, 8) > 0.6
    valid = torch.rand(2, 6, 8) > 0.3
    inside = targets & valid[:, None]
    costs = torch.stack(pairwise_losses(logits.flatten(2), inside.flatten(2), valid.flatten(1)))
    for image in range(2):
        for segment, target in enumerate(targets[image]):
            expected = by_definition(logits[image], target.expand(4, -1, -1), valid[image].expand(4, -1, -1))
            torch.testing.assert_close(costs[:, image, :, segment], torch.stack(expected), atol=1e-12, rtol=1e-9)
