"""What went wrong elsewhere with Mask2Former and EoMT, in labels, losses, maps and loading: the right values."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision import tv_tensors
from transformers import Dinov2Config, Dinov2Model, Mask2FormerImageProcessor, ResNetModel

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.cli.coco import color_id, map_image
from maskcls_hf.data import MaskClsCollator, Sample
from maskcls_hf.metrics import Segments
from maskcls_hf.models.losses import MaskClsCriterion
from maskcls_hf.models.matching import CostsNotFinite, Predictions, prepare_targets
from maskcls_hf.models.modeling_maskcls import MaskClsForUniversalSegmentationOutput
from maskcls_hf.models.transformer_decoders import SegmentLogits
from maskcls_hf.training import DivergenceError, reraise_as_divergence
from maskcls_hf.visual.drawing import segment_colors
from test_eomt import ours as eomt
from test_point_losses import LABELS, SEGMENTS, config, index_maps, layers
from tiny import maskcls_config, resnet

CPU = torch.device("cpu")
EXACT = dict(max_hole_share=0.0, min_fragment_share=0.0)


def output(labels: list[int], masks: torch.Tensor, num_labels: int = 3, score: float = 0.99):
    """Outputs of one image: the classes of the queries, each with a probability of `score`; mask logits (N, h, w)."""
    others = torch.tensor((1 - score) / num_labels).log()
    logits = others.expand(len(labels), num_labels + 1).clone()
    logits[range(len(labels)), labels] = torch.tensor(score).log()
    return MaskClsForUniversalSegmentationOutput(class_queries_logits=logits[None], masks_queries_logits=masks[None])


def columns(*ends: tuple[int, int], size: tuple[int, int] = (8, 32), logit: float = 9.0) -> torch.Tensor:
    """Mask logits (N, *size): columns from the first end to before the second."""
    masks = torch.full((len(ends), *size), -9.0)
    for mask, (start, end) in zip(masks, ends, strict=True):
        mask[:, start:end] = logit
    return masks


class TestLabels:
    @pytest.mark.parametrize("void_id", [255, None])
    def test_padded_masks_hold_0_and_1_alone(self, void_id):
        """Padded with the void id they held 255."""
        images = [torch.zeros(3, *size, dtype=torch.uint8) for size in ((40, 50), (64, 64))]
        maps = [torch.arange(size[0])[:, None].expand(size) % 3 for size in ((40, 50), (64, 64))]
        batch = MaskClsImageProcessor(do_resize=False, void_id=void_id)(images, maps, return_tensors="pt")
        for masks in batch.mask_labels:
            assert masks.shape[1:] == (64, 64) and masks.float().unique().tolist() == [0, 1]
        assert not batch.mask_labels[0][:, 40:].any() and not batch.mask_labels[0][..., 50:].any()
        theirs = Mask2FormerImageProcessor(do_resize=False, ignore_index=255)(images, maps, return_tensors="pt")
        assert 255 in theirs["mask_labels"][0]  # so that this test has a reason

    def emptied(self, overlap: bool) -> Segments:
        """Three segments, the second of which a crop has emptied."""
        index_map = torch.full((64, 64), 2)
        index_map[:8] = 0
        stack = index_map == torch.arange(3).view(-1, 1, 1)
        stack[0, :16] = overlap or stack[0, :16]
        return Segments(torch.tensor([1, 0, 2]), stack if overlap else index_map, name="a")

    @pytest.mark.parametrize("overlap", [False, True])
    @pytest.mark.parametrize("label_format", ["segments", "segment_map"])
    def test_masks_that_a_crop_emptied_are_no_targets(self, overlap, label_format):
        """They do not count in the normalizer; the panoptic mapper of Mask2Former's code keeps them: an option."""
        image = tv_tensors.Image(torch.zeros(3, 64, 64, dtype=torch.uint8))
        sample = Sample(image=image, segments=self.emptied(overlap))
        model = MaskClsForUniversalSegmentation(maskcls_config(num_labels=3, loss_points=50)).eval()
        losses = []
        for keep in (False, True):
            processor = MaskClsImageProcessor(
                do_resize=False, void_id=None, keep_emptied_targets=keep, label_format=label_format
            )
            batch = MaskClsCollator(processor)([sample])
            assert batch["class_labels"][0].tolist() == ([1, 0, 2] if keep else [1, 2])
            torch.manual_seed(0)
            losses.append(model(**batch).loss_dict["loss_mask"])
        assert losses[0].isfinite() and losses[1].isfinite() and losses[0] != losses[1]

    def test_overlapping_annotations_train(self):
        stack = torch.zeros(2, 64, 64, dtype=torch.bool)
        stack[0, :20], stack[1, 10:] = True, True
        processor = MaskClsImageProcessor(do_resize=False)
        batch = processor(
            torch.zeros(3, 64, 64, dtype=torch.uint8), [stack], class_labels=[[0, 2]], return_tensors="pt"
        )
        assert torch.equal(batch.mask_labels[0], stack)
        model = MaskClsForUniversalSegmentation(maskcls_config(num_labels=3)).train()
        loss = model(**batch).loss
        loss.backward()
        assert loss.isfinite()


class TestLosses:
    def test_void_changes_no_cost(self):
        """Logits of void pixels change neither costs at points nor costs at all pixels."""
        valid = torch.ones(2, 48, 64, dtype=torch.bool)
        valid[1, 8:32, 8:40] = False
        targets = prepare_targets(index_maps(SEGMENTS), LABELS, 5, CPU, valid)
        unseen = 1 - F.max_pool2d(F.max_pool2d(valid[:, None].float(), 4), 3, 1, 1)  # (2, 1, 12, 16)
        assert unseen.sum() > 4
        for points in (200, None):
            matcher, found = MaskClsCriterion(config(points)).matcher, []
            for change in (0.0, 1e4):
                made = [SegmentLogits(m.class_logits, m.mask_logits.detach() + change * unseen) for m in layers()]
                torch.manual_seed(2)
                found.append(matcher.cost_terms(Predictions.of_layers(made), targets))
            assert all(torch.equal(term, found[1][name]) for name, term in found[0].items())

    def test_a_bad_image_is_named_with_its_step_and_term(self):
        """And its costs are those of no other image."""
        targets = prepare_targets(index_maps(SEGMENTS), LABELS, 5, CPU)
        matcher, found = MaskClsCriterion(config()).matcher, []
        for bad in (False, True):
            made = layers(requires_grad=False)
            if bad:
                made[1].mask_logits[1, 4] = torch.nan
            torch.manual_seed(2)
            found.append(matcher.cost_terms(Predictions.of_layers(made), targets))
        assert all(torch.equal(term[0], found[1][name][0]) for name, term in found[0].items())
        message = "The mask cost of image 1 in decoder layer 1 of 3 is NaN for 5 of 60 pairs"
        with pytest.raises(CostsNotFinite, match=message):
            matcher(Predictions.of_layers(made), targets)
        with pytest.raises(DivergenceError, match=f"(?s)step 7.*{message}"), reraise_as_divergence(7):
            matcher(Predictions.of_layers(made), targets)

    def test_no_object_is_a_weight_inside_the_cross_entropy(self):
        """Which as a whole is weighted 2 then; costs and losses have the same weights and the same number of points."""
        criterion, made = MaskClsCriterion(config(no_object_weight=0.1)), layers(1)
        torch.manual_seed(0)
        terms = criterion(made, index_maps(SEGMENTS), LABELS)
        torch.manual_seed(0)
        targets = prepare_targets(index_maps(SEGMENTS), LABELS, 5, CPU)
        assignment = criterion.matcher(Predictions.of_layers(made), targets)
        classes = torch.full(made[0].class_logits.shape[:2], 5)
        for _, image, query, segment in zip(*(part.tolist() for part in assignment), strict=True):
            classes[image, query] = LABELS[image][segment]
        weight = torch.tensor([1.0] * 5 + [0.1])
        expected = F.cross_entropy(made[0].class_logits.transpose(1, 2), classes, weight)
        torch.testing.assert_close(terms["loss_cross_entropy"], expected)
        total = 2 * terms["loss_cross_entropy"] + 5 * terms["loss_mask"] + 5 * terms["loss_dice"]
        torch.testing.assert_close(criterion.total(terms), total)
        assert criterion.matcher.weights == {"class": 2.0, "mask": 5.0, "dice": 5.0}
        assert criterion.matcher.sampler.number == 200


class TestMaps:
    def test_a_stripe_of_two_pixels_survives(self):
        """In logits 1024 wide; through 384 x 384 it is gone or another one."""
        masks = columns((0, 1024), (700, 702), size=(64, 1024))
        masks[0, :, 700:702] = -9.0
        (found,) = MaskClsImageProcessor().post_process_semantic_segmentation(output([0, 1], masks))
        assert torch.equal(found == 1, masks[1] > 0)
        (squeezed,) = MaskClsImageProcessor(compatibility="transformers").post_process_semantic_segmentation(
            output([0, 1], masks)
        )
        assert not torch.equal(squeezed, found)

    @pytest.mark.parametrize("compatibility", ["exact", "transformers", "paper"])
    def test_ids_are_unique_and_those_of_the_map(self, compatibility):
        """Sky, person, sky, car: the car has an id of its own, and the sky is listed once."""
        outputs = output([0, 1, 0, 2], columns((0, 8), (8, 16), (16, 24), (24, 32)))
        processor = MaskClsImageProcessor(compatibility=compatibility, label_ids_to_fuse=[0])
        (found,) = processor.post_process_panoptic_segmentation(outputs, **EXACT)
        assert [(info["id"], info["label_id"]) for info in found["segments_info"]] == [(1, 0), (2, 1), (3, 2)]
        assert set(found["segmentation"].unique().tolist()) == {1, 2, 3}

    def test_thresholds_are_of_the_mask(self):
        """With a class score of 0.6 and a mask of 0.7 a segment is kept, though the product is below 0.5; in the
        paper's maps pixels below 0.5 are void."""
        masks = columns((0, 16), logit=float(torch.tensor(0.7).logit()))
        masks[:, :, 16:] = -0.1
        outputs = output([1], masks, score=0.6)
        for rule, area in (("exact", 256), ("paper", 128)):
            (found,) = MaskClsImageProcessor().post_process_panoptic_segmentation(outputs, threshold=0.5, rule=rule)
            assert [info["area"] for info in found["segments_info"]] == [area]
            assert (found["segmentation"] == 0).sum() == 256 - area
        (theirs,) = MaskClsImageProcessor().post_process_panoptic_segmentation(outputs, rule="transformers")
        assert theirs["segments_info"] == []

    @pytest.mark.parametrize("compatibility", ["exact", "transformers", "paper"])
    def test_instances_overlap(self, compatibility):
        """As many masks as records, in their order, in every form; none is painted over."""
        outputs = output([1, 2], columns((0, 20), (10, 32)))
        processor = MaskClsImageProcessor(compatibility=compatibility)
        options = dict(threshold=0.5)
        (found,) = processor.post_process_instance_segmentation(outputs, **options, return_binary_maps=True)
        (coded,) = processor.post_process_instance_segmentation(outputs, **options, return_coco_annotation=True)
        areas = [info["area"] for info in found["segments_info"]]
        assert sorted(areas) == [160, 176] and found["segmentation"].sum((1, 2)).tolist() == areas
        assert (found["segmentation"][0] & found["segmentation"][1]).sum() == 80
        assert len(coded["segmentation"]) == len(coded["segments_info"]) == 2
        assert [info["id"] for info in coded["segments_info"]] == [0, 1]

    @pytest.mark.parametrize("compatibility", ["exact", "transformers", "paper"])
    def test_one_value_for_void(self, compatibility):
        """Whether something is found or not."""
        processor = MaskClsImageProcessor(compatibility=compatibility)
        for labels in ([1], [3]):  # the last is no object
            outputs = output(labels, columns((0, 16)))
            for task, void in (("panoptic", 0), ("instance", -1)):
                (found,) = getattr(processor, f"post_process_{task}_segmentation")(outputs, threshold=0.5)
                segmentation = found["segmentation"]
                assert segmentation.dtype == torch.int32 and (segmentation[:, 20:] == void).all() or labels == [1]
                assert (segmentation == void).all() == (labels == [3])
                assert segmentation.shape == (8, 32)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_ids_in_written_pictures_begin_at_1(task):
    """0 is void in a PNG."""
    outputs = output([1, 2], columns((0, 8), (10, 20)))
    processor = MaskClsImageProcessor(compatibility="paper")
    (found,) = getattr(processor, f"post_process_{task}_segmentation")(outputs, threshold=0.5)
    result = Segments.from_output(found)
    colors = segment_colors(result.records, 3, [])
    pixels = np.asarray(map_image(result, task, colors, 3)).astype(int) @ [1, 256, 65536]
    ids = [color_id(color) for color in colors]
    assert min(ids) >= 1 and len(set(ids)) == 2
    assert np.unique(pixels[:, :20]).tolist() == sorted({0, *ids}) and (pixels[:, 20:] == 0).all()


@pytest.mark.parametrize("family", ["MaskFormer", "Mask2Former", "EoMT"])
def test_nothing_of_a_backbone_stays_random(family, tmp_path):
    """After construction it equals its source; after `from_pretrained` nothing was made anew."""
    torch.manual_seed(0)
    if family == "EoMT":
        vit = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8)
        source = Dinov2Model(Dinov2Config(**vit))
        fields = dict(architecture="encoder_only", query_blocks=2, upscale_blocks=1)
    else:
        source, fields = ResNetModel(resnet()), {}
        if family == "Mask2Former":
            fields = dict(pixel_decoder="deformable", transformer_decoder="masked_attention", mask_kernel_size=1)
    with torch.no_grad():
        for value in source.parameters():
            value.add_(torch.randn_like(value))
    source.save_pretrained(tmp_path / "backbone")
    model, report = MaskClsForUniversalSegmentation.from_backbone(
        tmp_path / "backbone", num_labels=3, output_loading_info=True, **fields
    )
    prefix, weights = "model.encoder.vit." if family == "EoMT" else "model.backbone.", source.state_dict()
    own = {name.removeprefix(prefix): v for name, v in model.state_dict().items() if name.startswith(prefix)}
    assert len(own) > 10 and set(own) <= set(weights)
    assert all(torch.equal(value, weights[name]) for name, value in own.items())
    model.save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    loaded, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class TestMasksInEvaluation:
    @torch.no_grad()
    def test_by_the_stored_probability_or_not_at_all(self):
        """Whatever the probabilities are, the setting turns masks off in evaluation; training has them."""
        image = torch.randn(1, 3, 64, 64)
        with_masks, without = eomt(mask_probabilities=[1.0, 1.0]).eval(), eomt().eval()
        for model in (with_masks, without):
            for name, value in model.named_parameters():
                torch.manual_seed(sum(map(ord, name)))
                value.add_(0.1 * torch.randn_like(value))
        off = MaskClsForUniversalSegmentation(
            MaskClsConfig(**(with_masks.config.to_diff_dict() | {"masks_in_evaluation": False}))
        )
        off.load_state_dict(with_masks.state_dict())
        off.eval()
        expected = without(image).masks_queries_logits
        assert torch.equal(off(image).masks_queries_logits, expected)
        assert not torch.equal(with_masks(image).masks_queries_logits, expected)
        assert not torch.equal(off.train()(image).masks_queries_logits, expected)


def test_gray_padding_in_the_papers_training(tmp_path):
    """128 before normalization; 0 after it in tests, as in exact ones, and whatever is set counts more."""
    image = torch.full((3, 40, 50), 7, dtype=torch.uint8)
    gray = MaskClsImageProcessor(do_resize=False, pad_value=128)(image, return_tensors="pt").pixel_values[0, :, -1, -1]
    expected = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(gray, expected, rtol=0, atol=1e-5)
    assert (
        MaskClsImageProcessor(do_resize=False)(image, return_tensors="pt").pixel_values[0, :, -1, -1].abs().max() == 0
    )
    from maskcls_hf.training import load_recipe
    from maskcls_hf.training.run import build_collators

    recipe = load_recipe("camvid")
    for compatibility, options, values in (
        ("paper", {}, (128, None)),
        ("exact", {}, (None, None)),
        ("paper", {"pad_value": 0}, (None, None)),
    ):
        collators = build_collators(recipe, MaskClsImageProcessor(compatibility=compatibility, **options))
        assert tuple(collator.processor_kwargs.get("pad_value") for collator in collators) == values


def test_dropout_of_the_papers_decoder_is_0():
    masked = dict(pixel_decoder="deformable", transformer_decoder="masked_attention")
    assert maskcls_config(compatibility="paper", **masked).dropout == 0
    assert maskcls_config(compatibility="paper", dropout=0.2, **masked).dropout == 0.2
    assert maskcls_config(compatibility="paper").dropout == maskcls_config(**masked).dropout == 0.1
