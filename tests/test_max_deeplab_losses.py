"""Losses of Max-DeepLab by hand, their gradients, and masks that exclude each other."""

from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor

from maskcls_hf.models import losses
from maskcls_hf.models.matching import Assignment
from maskcls_hf.models.modeling_maskcls import exclusive_logits

NO_PAIRS = Assignment(*torch.zeros(4, 0, dtype=torch.int64))


def pairs(*of_query: tuple[int, int]) -> Assignment:
    """Queries and segments of the only layer and image."""
    return Assignment(*torch.tensor([(0, 0, *pair) for pair in of_query]).T)


# The losses of one image and layer, masks (M, P) float and valid pixels (P,) float.


def pq_style_loss(class_logits, mask_logits, masks, labels, valid_mask, matched: Assignment) -> Tensor:
    inside = ((masks > 0) & (valid_mask > 0))[None]
    of_layer = class_logits[None, None], mask_logits[None, None]
    (loss,) = losses.pq_style_loss(*of_layer, inside, labels[None], valid_mask[None] > 0, matched)
    return loss


def instance_discrimination_loss(embeddings: Tensor, masks: Tensor, valid_mask: Tensor) -> Tensor:
    (loss,) = losses.instance_discrimination_loss(embeddings[None], ((masks > 0) & (valid_mask > 0))[None])
    return loss


def mask_id_loss(log_p: Tensor, masks: Tensor, valid_mask: Tensor, matched: Assignment) -> Tensor:
    ((loss,),) = losses.mask_id_loss(log_p[None, None], ((masks > 0) & (valid_mask > 0))[None], matched)
    return loss


def semantic_loss(logits: Tensor, masks: Tensor, labels: Tensor, valid_mask: Tensor) -> Tensor:
    (loss,) = losses.semantic_loss(logits[None], ((masks > 0) & (valid_mask > 0))[None], labels[None])
    return loss


def stack(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def random_case() -> tuple[Tensor, Tensor, Tensor, Assignment]:
    """Three segments on 12 pixels, of which some are void and some in none: masks, labels, valid_mask, pairs."""
    places = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1, 0])
    valid_mask = torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1], dtype=torch.float64)
    masks = (places == torch.arange(3)[:, None]).double()
    return masks, torch.tensor([1, 0, 1]), valid_mask, pairs((3, 0), (0, 1), (2, 2))


class TestPQStyleLoss:
    p = stack([0.5, 0.25, 0.25], [0.2, 0.4, 0.4], [0.25, 0.5, 0.25])  # two classes and "no object"
    m = stack([0.75, 0.25, 0.5, 0.5], [0.125, 0.125, 0.5, 0.25], [0.5, 0.5, 0.5, 0.5])
    masks = stack([1, 1, 0, 0], [0, 0, 1, 0])
    labels = torch.tensor([0, 1])

    def loss(self, masks: Tensor, labels: Tensor, valid_mask: Tensor, matched: Assignment) -> float:
        return pq_style_loss(self.p.log(), self.m.logit(), masks, labels, valid_mask, matched).item()

    def test_by_hand(self):
        # Query 0 has p(c) = 0.5 and Dice = 2 (0.75 + 0.25) / (2 + 2) = 0.5, query 1 p(c) = 0.4 and
        # Dice = 2 * 0.5 / (1 + 1) = 0.5; query 2 is not matched and has p(no object) = 0.25.
        positive = (0.5 * -0.5 + 0.5 * -log(0.5)) + (0.4 * -0.5 + 0.5 * -log(0.4))
        expected = (0.75 * positive + 0.25 * -log(0.25)) / 3
        matched = pairs((0, 0), (1, 1))
        assert self.loss(self.masks, self.labels, torch.ones(4), matched) == pytest.approx(expected, rel=1e-6)

    def test_void(self):
        # Without pixel 0: the Dice of query 0 is 2 * 0.25 / (1.25 + 1), that of query 1 is 2 * 0.5 / (0.875 + 1).
        first, second = 0.5 / 2.25, 1 / 1.875
        positive = (0.5 * -first + first * -log(0.5)) + (0.4 * -second + second * -log(0.4))
        expected = (0.75 * positive + 0.25 * -log(0.25)) / 3
        valid_mask = torch.tensor([0.0, 1, 1, 1], dtype=torch.float64)
        matched = pairs((0, 0), (1, 1))
        assert self.loss(self.masks, self.labels, valid_mask, matched) == pytest.approx(expected, rel=1e-6)

    def test_no_segments(self):
        expected = 0.25 * -(log(0.25) + log(0.4) + log(0.25)) / 3
        loss = self.loss(self.masks[:0], self.labels[:0], torch.ones(4), NO_PAIRS)
        assert loss == pytest.approx(expected, rel=1e-6)

    def test_a_segment_without_pixels_has_a_dice_of_zero(self):
        # Query 0: p(c) * -0 + 0 * -log p(c); the gradient of the empty mask is zero, not NaN.
        expected = 0.25 * -(log(0.4) + log(0.25)) / 3
        masks = torch.zeros(1, 4, dtype=torch.float64)
        assert self.loss(masks, self.labels[:1], torch.ones(4), pairs((0, 0))) == pytest.approx(expected, rel=1e-6)
        logits = self.m.logit().requires_grad_()
        nothing = torch.zeros(4, dtype=torch.float64)
        pq_style_loss(self.p.log(), logits, masks, self.labels[:1], nothing, pairs((0, 0))).backward()
        assert (logits.grad == 0).all()

    def test_gradients_are_those_with_constant_first_factors(self):
        """Finite differences of the loss as it is written, with p(c) and Dice of the point itself as first factors."""
        masks, labels, valid_mask, matched = random_case()
        class_logits, mask_logits = (torch.randn(5, n, dtype=torch.float64).requires_grad_() for n in (3, 12))
        pq_style_loss(class_logits, mask_logits, masks, labels, valid_mask, matched).backward()

        def factors(class_logits: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
            _, _, queries, segments = matched
            m, t = mask_logits.sigmoid()[queries][:, valid_mask > 0], masks[segments][:, valid_mask > 0]
            dice = 2 * (m * t).sum(1) / (m.sum(1) + t.sum(1))
            return class_logits.softmax(1)[queries, labels[segments]], dice

        with torch.no_grad():
            constant_p, constant_dice = factors(class_logits, mask_logits)

            def loss(class_logits: Tensor, mask_logits: Tensor) -> float:
                p, dice = factors(class_logits, mask_logits)
                positive = (constant_p * -dice + constant_dice * -p.log()).sum()
                unmatched = [query for query in range(5) if query not in matched.query.tolist()]
                negative = -class_logits.softmax(1)[unmatched, 2].log().sum()
                return float(0.75 * positive + 0.25 * negative) / 5

            for leaf in (class_logits, mask_logits):
                for index, gradient in enumerate(leaf.grad.flatten().tolist()):
                    value = leaf.view(-1)[index].item()
                    losses = []
                    for step in (1e-5, -1e-5):
                        leaf.view(-1)[index] = value + step
                        losses.append(loss(class_logits, mask_logits))
                    leaf.view(-1)[index] = value
                    assert gradient == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=1e-9)


class TestInstanceDiscrimination:
    # Two segments, {0, 1} and {2}; pixel 3 is in none and pixel 4, alone in a third, is void.
    embeddings = stack([2, 0, 5, 7, 3], [0, 3, 0, 1, 3])
    masks = stack([1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1])
    valid_mask = torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64)

    def test_by_hand(self):
        # Normalized: (1, 0), (0, 1), (1, 0). The first segment is (1, 1) / sqrt(2), the second (1, 0). Their cosines
        # with the pixels: (r, 1), (r, 0), (r, 1), r = 1 / sqrt(2). Two classes: -log p = log(1 + exp(other - own)).
        r = 1 / sqrt(2)
        losses = [log(1 + exp((1 - r) / 0.3)), log(1 + exp((0 - r) / 0.3)), log(1 + exp((r - 1) / 0.3))]
        loss = instance_discrimination_loss(self.embeddings, self.masks, self.valid_mask).item()
        assert loss == pytest.approx(sum(losses) / 3, rel=1e-9)

    def test_one_segment_has_nothing_to_tell_apart(self):
        assert instance_discrimination_loss(self.embeddings, self.masks[:1], self.valid_mask).item() == 0

    @pytest.mark.parametrize("number", [0, 2])
    def test_nothing_inside(self, number):
        embeddings = self.embeddings.clone().requires_grad_()
        loss = instance_discrimination_loss(embeddings, self.masks[:number] * 0, self.valid_mask)
        loss.backward()
        assert loss == 0 and (embeddings.grad == 0).all()

    def test_gradients(self):
        masks, _, valid_mask, _ = random_case()
        embeddings = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda e: instance_discrimination_loss(e, masks, valid_mask), (embeddings,))


class TestMaskId:
    p = stack([0.5, 0.25, 0.125], [0.25, 0.5, 0.125], [0.25, 0.25, 0.75])  # three masks on three pixels
    masks = stack([1, 0, 0], [0, 1, 1])

    def loss(self, masks: Tensor, matched: Assignment, valid_mask: list[int]) -> float:
        return mask_id_loss(self.p.log(), masks, torch.tensor(valid_mask, dtype=torch.float64), matched).item()

    def test_by_hand(self):
        # Pixel 0 belongs to query 2, pixels 1 and 2 to query 0.
        expected = -(log(0.25) + log(0.25) + log(0.125)) / 3
        assert self.loss(self.masks, pairs((2, 0), (0, 1)), [1, 1, 1]) == pytest.approx(expected, rel=1e-6)

    def test_void_and_segments_that_lost_out(self):
        assert self.loss(self.masks, pairs((2, 0), (0, 1)), [1, 1, 0]) == pytest.approx(-log(0.25), rel=1e-6)
        assert self.loss(self.masks, pairs((1, 1)), [1, 1, 1]) == pytest.approx(-(log(0.5) + log(0.125)) / 2, rel=1e-6)
        assert self.loss(self.masks, NO_PAIRS, [1, 1, 1]) == 0

    def test_where_segments_overlap_either_is_right(self):
        # Pixel 0 is in both: 0.5 + 0.25.
        masks = stack([1, 0, 0], [1, 1, 0])
        expected = -(log(0.75) + log(0.5)) / 2
        assert self.loss(masks, pairs((0, 0), (1, 1)), [1, 1, 1]) == pytest.approx(expected, rel=1e-6)

    def test_of_exclusive_masks(self):
        """The sigmoid of a mask is then the probability of the query."""
        masks, _, valid_mask, matched = random_case()
        logits = torch.randn(5, 12, dtype=torch.float64)
        as_softmax = mask_id_loss(logits.log_softmax(0), masks, valid_mask, matched)
        own = exclusive_logits(logits.view(1, 5, 3, 4)).flatten(2)[0]
        as_mask = mask_id_loss(own.sigmoid().log(), masks, valid_mask, matched)
        torch.testing.assert_close(as_mask, as_softmax)

    def test_gradients(self):
        masks, _, valid_mask, matched = random_case()
        logits = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
        for log_p in (lambda x: x.log_softmax(0), torch.nn.functional.logsigmoid):
            assert torch.autograd.gradcheck(
                lambda x, f=log_p: mask_id_loss(f(x), masks, valid_mask, matched), (logits,)
            )


class TestSemantic:
    p = stack([0.5, 0.25, 0.125, 0.25], [0.25, 0.5, 0.125, 0.25], [0.25, 0.25, 0.75, 0.5])

    def loss(self, masks: Tensor, labels: list[int], valid_mask: list[int]) -> float:
        labels = torch.tensor(labels, dtype=torch.int64)
        return semantic_loss(self.p.log(), masks, labels, torch.tensor(valid_mask, dtype=torch.float64)).item()

    def test_by_hand(self):
        # Pixel 0 has class 1, pixels 1 and 2 class 2, pixel 3 none.
        masks = stack([1, 0, 0, 0], [0, 1, 1, 0])
        expected = -(log(0.25) + log(0.25) + log(0.75)) / 3
        assert self.loss(masks, [1, 2], [1, 1, 1, 1]) == pytest.approx(expected, rel=1e-6)
        assert self.loss(masks, [1, 2], [1, 0, 1, 1]) == pytest.approx(-(log(0.25) + log(0.75)) / 2, rel=1e-6)

    def test_two_segments_of_a_class_count_a_pixel_once(self):
        masks = stack([1, 1, 0, 0], [1, 0, 0, 0])
        assert self.loss(masks, [0, 0], [1, 1, 1, 1]) == pytest.approx(-(log(0.5) + log(0.25)) / 2, rel=1e-6)

    def test_no_segments(self):
        assert self.loss(torch.zeros(0, 4, dtype=torch.float64), [], [1, 1, 1, 1]) == 0

    def test_gradients(self):
        masks, labels, valid_mask, _ = random_case()
        logits = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: semantic_loss(x, masks, labels, valid_mask), (logits,))


class TestExclusiveMasks:
    def test_the_sigmoid_is_the_softmax_over_the_masks(self):
        logits = 5 * torch.randn(2, 7, 3, 4, dtype=torch.float64)
        torch.testing.assert_close(exclusive_logits(logits).sigmoid(), logits.softmax(1))

    def test_by_hand(self):
        # Three masks of weights 1, 2, 5: the odds are 1 to 7, 2 to 6, 5 to 3.
        logits = torch.tensor([1.0, 2, 5]).log().view(1, 3, 1, 1)
        expected = [log(1 / 7), log(2 / 6), log(5 / 3)]
        assert exclusive_logits(logits).flatten().tolist() == pytest.approx(expected, rel=1e-6)

    def test_two_equal_masks_have_even_odds(self):
        assert exclusive_logits(torch.full((1, 2, 1, 1), 3.0)).flatten().tolist() == [0, 0]

    def test_gradients(self):
        logits = 3 * torch.randn(1, 4, 2, 3, dtype=torch.float64)
        logits[0, :2, 0, 0] += 40  # two masks that lead by far
        assert torch.autograd.gradcheck(exclusive_logits, (logits.requires_grad_(),))

    @pytest.mark.parametrize("scale", [1e2, 1e4])
    def test_stays_exact_and_finite_where_a_mask_is_sure(self, scale):
        """In float32 1 - p is 0 there; the odds are still the distance to the next."""
        logits = (scale * torch.randn(1, 6, 8, 8)).requires_grad_()
        odds = exclusive_logits(logits)
        odds.sum().backward()
        exact = exclusive_logits(logits.detach().double())
        torch.testing.assert_close(odds.double(), exact, rtol=1e-5, atol=1e-4)
        assert odds.isfinite().all() and logits.grad.isfinite().all()

    def test_keeps_the_type(self):
        assert exclusive_logits(torch.randn(1, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_losses_of_a_batch_are_the_sums_of_its_images():
    """Images with three, no and two segments; two layers."""
    numbers = (3, 0, 2)
    masks, valid = torch.zeros(3, 3, 12, dtype=torch.bool), torch.rand(3, 12) > 0.3
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    matched = []
    for image, number in enumerate(numbers):
        places = torch.randint(-1, max(number, 1), (12,))
        masks[image, :number] = (places == torch.arange(number)[:, None]) & valid[image]
        matched += [(layer, image, 4 - layer - m, m) for layer in range(2) for m in range(number)]
    assignment = Assignment(*torch.tensor(matched).T)
    shapes = (3, 2, 5, 3), (3, 2, 5, 12), (3, 4, 12), (3, 2, 12)
    classes, logits, embeddings, semantic = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    log_p = logits.log_softmax(2)
    mask_id = losses.mask_id_loss(log_p, masks, assignment)
    contrast = losses.instance_discrimination_loss(embeddings, masks)
    of_class = losses.semantic_loss(semantic, masks, labels)
    expected = torch.zeros(2, dtype=torch.float64)
    for image, number in enumerate(numbers):
        own, own_labels, valid_mask = masks[image, :number].double(), labels[image, :number], valid[image].double()
        for layer in range(2):
            of_layer = pairs(*((4 - layer - m, m) for m in range(number))) if number else NO_PAIRS
            of_image = classes[image, layer], logits[image, layer], own, own_labels, valid_mask, of_layer
            expected[layer] += pq_style_loss(*of_image)
            torch.testing.assert_close(
                mask_id[image, layer], mask_id_loss(log_p[image, layer], own, valid_mask, of_layer)
            )
        torch.testing.assert_close(contrast[image], instance_discrimination_loss(embeddings[image], own, valid_mask))
        torch.testing.assert_close(of_class[image], semantic_loss(semantic[image], own, own_labels, valid_mask))
    assert mask_id[1].tolist() == [0, 0] and contrast[1] == of_class[1] == 0
    assert (mask_id[[0, 2]] > 0).all() and (contrast[[0, 2]] > 0).all()
    pq = losses.pq_style_loss(classes, logits, masks, labels, valid, assignment)
    torch.testing.assert_close(pq, expected)
