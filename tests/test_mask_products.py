"""Masks that are left as factors until a loss looks at them, beside masks that are made."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskcls_hf import MaskClsConfig, MaskClsCriterion, MaskClsForUniversalSegmentation
from maskcls_hf.models.matching import Assignment, Predictions
from maskcls_hf.models.pixel_decoders import PixelFeatures
from maskcls_hf.models.transformer_decoders import MaskProduct, SegmentLogits
from tiny import maskcls_config, resnet

IMAGES, QUERIES, CLASSES, CHANNELS, GRID, LAYERS = 3, 6, 5, 4, (8, 12), 3
LABELS = [torch.tensor([0, 4, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([3])]


class ManyToMany:
    """Two queries for each segment, and one query for all segments of an image."""

    def __call__(self, predictions, targets):
        pairs = [
            (layer, image, query, segment)
            for layer in range(LAYERS)
            for image, number in enumerate(targets.numbers)
            for segment in range(number)
            for query in (0, segment + 1)
        ]
        return Assignment(*torch.tensor(pairs).T)


def factors(shared: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        *[(IMAGES, QUERIES, CLASSES + 1)] * LAYERS,
        *[(IMAGES, QUERIES, CHANNELS)] * LAYERS,
        *[(IMAGES, CHANNELS, *GRID)] * (1 if shared else LAYERS),
    ]
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def layers_of(leaves: list[torch.Tensor], as_product: bool) -> list[SegmentLogits]:
    made = [PixelFeatures(of, [of], None, None, of) for of in leaves[2 * LAYERS :]]
    features = made * (LAYERS // len(made))
    products = [MaskProduct(*pair) for pair in zip(leaves[LAYERS : 2 * LAYERS], features, strict=True)]
    masks = [product if as_product else product.logits() for product in products]
    return [SegmentLogits(*pair) for pair in zip(leaves[:LAYERS], masks, strict=True)]


@pytest.mark.parametrize("points", [None, 50])
@pytest.mark.parametrize("matcher", ["bipartite", "pq", "many_to_many"])
@pytest.mark.parametrize("shared", [True, False])
def test_losses_and_gradients_are_those_of_the_masks(shared, matcher, points):
    config = maskcls_config(num_queries=QUERIES, num_labels=CLASSES, loss_points=points)
    if matcher == "pq":
        config.matching, config.pq_weight = "pq", 3.0
    criterion = MaskClsCriterion(config)
    if matcher == "many_to_many":
        criterion.matcher = ManyToMany()
        criterion.losses["mask"].one_to_one = False
    maps = [torch.randint(-1, max(1, len(labels)), (32, 48)) for labels in LABELS]
    maps[1].fill_(-1)
    results = []
    for as_product in (False, True):
        torch.manual_seed(1)
        leaves = factors(shared)
        terms = criterion(layers_of(leaves, as_product), maps, LABELS)
        criterion.total(terms).backward()
        results.append([*terms.values(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_masks_made_for_matching_are_made_again_for_a_loss():
    leaves = factors(shared=True)
    predictions = Predictions.of_layers(layers_of(leaves, as_product=True))
    with torch.no_grad():
        masks = predictions.mask_logits
        assert predictions.mask_logits is masks
    predictions.mask_logits.sum().backward()
    assert predictions.mask_logits is predictions.mask_logits
    torch.testing.assert_close(predictions.mask_logits, masks)
    assert leaves[-1].grad.abs().min() > 0


def test_a_batch_without_segments_gives_zeros_to_every_factor():
    leaves = factors(shared=True)
    criterion = MaskClsCriterion(maskcls_config(num_queries=QUERIES, num_labels=CLASSES))
    maps, labels = [torch.full((32, 48), -1)] * IMAGES, [torch.tensor([], dtype=torch.int64)] * IMAGES
    terms = criterion(layers_of(leaves, as_product=True), maps, labels)
    criterion.total(terms).backward()
    assert all(leaf.grad.abs().max() == 0 for leaf in leaves[LAYERS:])


class Shapes(TorchDispatchMode):
    """Of all that operations make."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.seen += [tuple(made.shape)] if isinstance(made, torch.Tensor) else []
        return made


def test_a_step_with_points_makes_no_masks_of_all_queries():
    """Of the deepest layer they are in the output."""
    config = MaskClsConfig(
        backbone_config=resnet(), num_queries=50, num_labels=3, fpn_feature_size=16, mask_feature_size=16,
        hidden_size=16, num_attention_heads=2, decoder_layers=3, decoder_ffn_dim=32, loss_points=64,
    )  # fmt: skip
    model = MaskClsForUniversalSegmentation(config)
    labels = {"mask_labels": [torch.zeros(64, 64, dtype=torch.int64)], "class_labels": [torch.tensor([1])]}
    with Shapes() as shapes:
        found = model(torch.randn(1, 3, 64, 64), **labels)
        found.loss.backward()
    masks = [shape for shape in shapes.seen if shape[-2:] == (16, 16) and 50 in shape]
    assert found.masks_queries_logits.shape == (1, 50, 16, 16)
    assert {shape[:-2] for shape in masks} <= {(1, 50)} and len(masks) < 6
    with torch.no_grad():
        same = model(torch.randn(1, 3, 64, 64), **labels, output_auxiliary_logits=True)
    assert len(same.auxiliary_logits) == 2


def test_autocast_keeps_losses_and_types():
    config = maskcls_config(num_queries=QUERIES, num_labels=CLASSES)
    model = MaskClsForUniversalSegmentation(config)
    model.eval()  # no dropout
    images = torch.randn(2, 3, 64, 64)
    labels = SimpleNamespace(masks=[torch.zeros(64, 64, dtype=torch.int64)] * 2, classes=[torch.tensor([1])] * 2)
    losses = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(images, labels.masks, labels.classes).loss
        loss.backward()
        losses.append(loss.detach())
    assert losses[0].dtype == losses[1].dtype == torch.float32
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)
