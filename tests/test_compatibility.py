"""`compatibility`: exact for new models, of whoever made it for imported ones; single settings count more."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    EomtImageProcessor,
    Mask2FormerConfig,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerImageProcessor,
)

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.convert.maskformer import config_from_maskformer
from maskcls_hf.inference import Predictor
from maskcls_hf.models.modeling_maskcls import MaskClsForUniversalSegmentationOutput
from test_mask2former import SIZES, theirs_with
from tiny import maskcls_config, resnet

TARGET = (90, 130)
STUFF = {0, 1}


class TestConfiguration:
    def test_new_ones_are_exact_and_imported_ones_are_of_their_origin(self, tmp_path):
        assert MaskClsConfig().compatibility == "exact" and not MaskClsConfig().attend_to_padding
        theirs = Mask2FormerConfig(backbone_config=resnet())
        theirs.save_pretrained(tmp_path)
        loaded = MaskClsConfig.from_pretrained(tmp_path)
        assert (loaded.compatibility, loaded.attend_to_padding) == ("transformers", True)
        of_maskformer = MaskClsConfig(**config_from_maskformer(MaskFormerConfig().to_dict()))
        assert (of_maskformer.compatibility, of_maskformer.attend_to_padding) == ("transformers", True)

    def test_single_settings_count_more_and_a_new_choice_sets_them_anew(self, tmp_path):
        maskcls_config(compatibility="paper", attend_to_padding=False).save_pretrained(tmp_path)
        kept = MaskClsConfig.from_pretrained(tmp_path)
        assert (kept.compatibility, kept.attend_to_padding) == ("paper", False)
        chosen = MaskClsConfig.from_pretrained(tmp_path, compatibility="transformers")
        assert (chosen.compatibility, chosen.attend_to_padding) == ("transformers", True)
        both = MaskClsConfig.from_pretrained(tmp_path, compatibility="exact", attend_to_padding=True)
        assert (both.compatibility, both.attend_to_padding) == ("exact", True)
        with pytest.raises(ValueError, match="compatibility='papers' must be one of"):
            maskcls_config(compatibility="papers")


class TestImageProcessor:
    @pytest.mark.parametrize(
        ("processor_class", "expected"),
        [
            (Mask2FormerImageProcessor, "transformers"),
            (EomtImageProcessor, "transformers"),
            (MaskFormerImageProcessor, "exact"),
            (MaskClsImageProcessor, "exact"),
        ],
    )
    def test_is_of_its_origin(self, processor_class, expected, tmp_path):
        processor_class().save_pretrained(tmp_path)
        processor = MaskClsImageProcessor.from_pretrained(tmp_path)
        assert processor.compatibility == expected
        processor.save_pretrained(tmp_path / "ours")
        assert MaskClsImageProcessor.from_pretrained(tmp_path / "ours").compatibility == expected
        assert MaskClsImageProcessor.from_pretrained(tmp_path, compatibility="paper").compatibility == "paper"
        with pytest.raises(ValueError, match="compatibility must be one of"):
            MaskClsImageProcessor(compatibility="theirs")

    def test_images_are_stretched_as_by_transformers(self, tmp_path):
        """To a multiple of 32, each image by itself; those of new models keep their aspect ratio, and are padded."""
        Mask2FormerImageProcessor(size={"shortest_edge": 70, "longest_edge": 150}).save_pretrained(tmp_path)
        torch.manual_seed(0)
        images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((100, 150), (80, 70), (64, 64))]
        labels = [image[0] % 3 for image in images]
        theirs = Mask2FormerImageProcessor.from_pretrained(tmp_path)(images, labels, return_tensors="pt")
        ours = MaskClsImageProcessor.from_pretrained(tmp_path)(images, labels, return_tensors="pt")
        torch.testing.assert_close(ours.pixel_values, theirs["pixel_values"], rtol=0, atol=1e-5)
        assert torch.equal(ours.pixel_mask, theirs["pixel_mask"])
        assert ours.pixel_mask.sum((1, 2)).tolist() == [96 * 128, 96 * 96, 96 * 96]
        for one, other in zip(ours.mask_labels, theirs["mask_labels"], strict=True):
            assert torch.equal(one, other[:, : one.shape[-2], : one.shape[-1]].bool())
        fitted = MaskClsImageProcessor.from_pretrained(tmp_path, image_fit="pad")(images, return_tensors="pt")
        assert fitted.pixel_mask.sum((1, 2)).tolist() == [70 * 105, 80 * 70, 70 * 70]
        exact = MaskClsImageProcessor.from_pretrained(tmp_path, compatibility="exact")(images, return_tensors="pt")
        assert torch.equal(exact.pixel_mask, fitted.pixel_mask)
        with pytest.raises(ValueError, match="image_fit must be one of"):
            MaskClsImageProcessor(image_fit="crop")(images)


def pairs(seed: int = 0, num_queries: int = 12, num_labels: int = 5, size: tuple[int, int] = (24, 40)):
    """Outputs of smooth masks of one image, padded by a fourth; no two classes are alike."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(1, num_queries, num_labels + 1, generator=generator) * 4
    coarse = torch.randn(1, num_queries, 5, 6, generator=generator) * 8 - 2
    masks = F.interpolate(coarse, size, mode="bicubic")
    padded = torch.tensor([[4 * size[0], 4 * size[1]]])
    return MaskClsForUniversalSegmentationOutput(
        class_queries_logits=classes,
        masks_queries_logits=masks,
        padded_sizes=padded,
        valid_sizes=padded * 3 // 4,
        original_sizes=torch.tensor([TARGET]),
    )


def scores_at(outputs, size, valid, target):
    """Class scores (K, *target), made at `size`, cropped to `valid`."""
    masks = F.interpolate(outputs.masks_queries_logits, size, mode="bilinear")[..., : valid[0], : valid[1]].sigmoid()
    probs = outputs.class_queries_logits.softmax(-1)[..., :-1]
    return F.interpolate(torch.einsum("bqc,bqhw->bchw", probs, masks), target, mode="bilinear")[0]


def assert_same_but_at_ties(found, scores):
    best = scores.topk(2, 0).values
    decided = best[0] - best[1] > 1e-5
    assert decided.float().mean() > 0.99 and torch.equal(found[decided], scores.argmax(0)[decided])


def panoptic_of_the_paper(outputs, threshold=0.8, overlap=0.8):
    """Written from what Mask2Former's code does: {pixels (as bytes): (class, score)} of things, stuff together."""
    height, width = outputs.valid_sizes[0].tolist()
    masks = F.interpolate(outputs.masks_queries_logits, outputs.padded_sizes[0].tolist(), mode="bilinear")
    masks = F.interpolate(masks[..., :height, :width], TARGET, mode="bilinear")[0].sigmoid()
    scores, labels = outputs.class_queries_logits[0].softmax(-1).max(-1)
    kept = [q for q in range(len(scores)) if labels[q] < 5 and scores[q] > threshold]
    found = []
    if not kept:
        return found
    winners = torch.stack([scores[q] * masks[q] for q in kept]).argmax(0)
    for place, q in enumerate(kept):
        won, own = winners == place, masks[q] >= 0.5
        visible = won & own
        if not visible.any() or won.sum() / own.sum() < overlap:
            continue
        label = int(labels[q])
        same = [segment for segment in found if segment[0] == label and label in STUFF]
        if same:
            same[0][1] |= visible
        else:
            found.append([label, visible])
    return found


class TestMaps:
    """Each rule beside whoever has it. Sizes are such that masks are resized twice and padding is cropped."""

    @pytest.mark.parametrize("seed", range(3))
    def test_semantic(self, seed):
        """Masks pass through 384 x 384, padding and all, in transformers; the papers make them at the input's size."""
        outputs = pairs(seed)
        processor = MaskClsImageProcessor(compatibility="transformers")
        (theirs,) = Mask2FormerImageProcessor().post_process_semantic_segmentation(
            outputs, [TARGET], return_segmentation_scores=True
        )
        (ours,) = processor.post_process_semantic_segmentation(outputs)
        assert_same_but_at_ties(ours, theirs["segmentation_scores"])
        (scored,) = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
        torch.testing.assert_close(scored["segmentation_scores"], theirs["segmentation_scores"], rtol=0, atol=1e-5)
        expected = scores_at(outputs, outputs.padded_sizes[0].tolist(), outputs.valid_sizes[0].tolist(), TARGET)
        for rule in ("exact", "paper"):
            (found,) = processor.post_process_semantic_segmentation(outputs, rule=rule)
            assert_same_but_at_ties(found, expected)
            assert (found != ours).float().mean() > 0.1

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("options", [{}, {"threshold": 0.4, "overlap_mask_area_threshold": 0.3}])
    def test_panoptic_of_transformers(self, seed, options):
        outputs = pairs(seed)
        processor = MaskClsImageProcessor(compatibility="transformers")
        (ours,) = processor.post_process_panoptic_segmentation(outputs, **options)
        (theirs,) = Mask2FormerImageProcessor().post_process_panoptic_segmentation(
            outputs, target_sizes=[TARGET], **options, label_ids_to_fuse=set()
        )
        assert len(ours["segments_info"]) == len(theirs["segments_info"])
        for one, other in zip(ours["segments_info"], theirs["segments_info"], strict=True):
            assert (one["id"], one["label_id"]) == (other["id"], other["label_id"])
            assert abs(one["score"] - other["score"]) < 1e-5
        assert (ours["segmentation"] != theirs["segmentation"].clamp(min=0)).float().mean() < 1e-3

    def test_these_have_segments(self):
        """So that the test above compares something, and void too."""
        processor = MaskClsImageProcessor(compatibility="transformers")
        for options, least in (({}, 3), ({"threshold": 0.4, "overlap_mask_area_threshold": 0.3}, 20)):
            found = [processor.post_process_panoptic_segmentation(pairs(seed), **options)[0] for seed in range(6)]
            assert sum(len(of_image["segments_info"]) for of_image in found) >= least
            assert all((of_image["segmentation"] == 0).any() for of_image in found)

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("thresholds", [(), (0.4, 0.3)])
    def test_panoptic_of_the_paper(self, seed, thresholds):
        """0.8 and 0.8, the mask alone against its threshold, and void outside of it."""
        outputs = pairs(seed)
        processor = MaskClsImageProcessor(compatibility="paper", label_ids_to_fuse=STUFF)
        options = dict(zip(("threshold", "overlap_mask_area_threshold"), thresholds, strict=False))
        (ours,) = processor.post_process_panoptic_segmentation(outputs, **options)
        expected = panoptic_of_the_paper(outputs, *thresholds)
        assert [info["label_id"] for info in ours["segments_info"]] == [label for label, _ in expected]
        for info, (_, visible) in zip(ours["segments_info"], expected, strict=True):
            found = ours["segmentation"] == info["id"]
            assert (found != visible).float().mean() < 1e-3 and info["area"] == found.sum()

    @pytest.mark.parametrize("seed", range(4))
    def test_instances_of_transformers(self, seed):
        """The best N pairs; score and outline at 384 x 384, then nearest."""
        outputs = pairs(seed)
        processor = MaskClsImageProcessor(compatibility="transformers")
        (ours,) = processor.post_process_instance_segmentation(outputs, return_binary_maps=True)
        (theirs,) = Mask2FormerImageProcessor().post_process_instance_segmentation(
            outputs, target_sizes=[TARGET], return_binary_maps=True
        )
        order = sorted(range(len(theirs["segments_info"])), key=lambda i: -theirs["segments_info"][i]["score"])
        assert len(ours["segments_info"]) == len(order) > 1
        for i, info, mask in zip(order, ours["segments_info"], ours["segmentation"], strict=True):
            assert info["label_id"] == theirs["segments_info"][i]["label_id"]
            assert abs(info["score"] - theirs["segments_info"][i]["score"]) < 1e-5
            assert (mask != theirs["segmentation"][i].bool()).float().mean() < 1e-3
        (as_map,) = processor.post_process_instance_segmentation(outputs)
        best = ours["segmentation"].int().argmax(0).where(ours["segmentation"].any(0), -1)
        assert torch.equal(as_map["segmentation"], best)

    @pytest.mark.parametrize("seed", range(4))
    def test_instances_of_the_paper(self, seed):
        """The best 100 pairs of query and class at full size, whatever their score; those of stuff go last."""
        outputs = pairs(seed, num_queries=30)
        processor = MaskClsImageProcessor(compatibility="paper", label_ids_to_fuse=STUFF)
        (ours,) = processor.post_process_instance_segmentation(outputs, return_binary_maps=True)
        height, width = outputs.valid_sizes[0].tolist()
        logits = F.interpolate(outputs.masks_queries_logits, outputs.padded_sizes[0].tolist(), mode="bilinear")
        logits = F.interpolate(logits[..., :height, :width], TARGET, mode="bilinear")[0]
        probs, places = outputs.class_queries_logits[0].softmax(-1)[:, :-1].flatten().topk(100)
        expected = []
        for prob, place in zip(probs, places.tolist(), strict=True):
            mask = logits[place // 5] > 0
            if place % 5 not in STUFF and mask.any():
                score = prob * (logits[place // 5].sigmoid() * mask).sum() / (mask.sum() + 1e-6)
                expected.append((float(score), place % 5, mask))
        expected.sort(key=lambda found: -found[0])
        assert len(ours["segments_info"]) == len(expected) > 30
        for info, mask, (score, _, of_paper) in zip(ours["segments_info"], ours["segmentation"], expected, strict=True):
            assert abs(info["score"] - score) < 1e-5
            if score > 1e-4:  # those of equal scores have any order
                assert (mask != of_paper).float().mean() < 1e-3

    def test_every_way_to_a_map_heeds_it(self, tmp_path):
        """A processor that says "exact" makes the exact maps of the outputs, whatever it was read from; an option or
        `inference_defaults` decide for one task."""
        Mask2FormerImageProcessor().save_pretrained(tmp_path)
        outputs, exact = pairs(), MaskClsImageProcessor()
        for task in ("semantic", "panoptic", "instance"):

            def maps(processor, task=task, **options):
                (found,) = getattr(processor, f"post_process_{task}_segmentation")(outputs, **options)
                return found if task == "semantic" else found["segmentation"]

            theirs = MaskClsImageProcessor.from_pretrained(tmp_path)
            again = MaskClsImageProcessor.from_pretrained(tmp_path, compatibility="exact")
            assert torch.equal(maps(again), maps(exact)) and not torch.equal(maps(theirs), maps(exact))
            assert torch.equal(maps(theirs, rule="exact"), maps(exact))
            single = MaskClsImageProcessor.from_pretrained(tmp_path, inference_defaults={task: {"rule": "exact"}})
            assert torch.equal(maps(single), maps(exact))
            theirs.compatibility = "exact"
            assert torch.equal(maps(theirs), maps(exact))
            with pytest.raises(ValueError, match="rule='detectron' must be one of exact, transformers, paper"):
                maps(exact, rule="detectron")
        with pytest.raises(ValueError, match="rule='detectron' must be one of"):
            MaskClsImageProcessor(inference_defaults={"panoptic": {"rule": "detectron"}})(torch.zeros(3, 40, 40))


def test_a_folder_of_transformers_gives_the_maps_of_transformers(tmp_path):
    """With one line, no option given; and the exact maps where these are asked for."""
    theirs = theirs_with(resnet(), **SIZES)
    torch.manual_seed(0)
    with torch.no_grad():  # so that there are segments
        theirs.class_predictor.weight.normal_(std=1 / 3)
        theirs.class_predictor.bias.zero_()
    theirs.save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"shortest_edge": 90, "longest_edge": 200}).save_pretrained(tmp_path)
    torch.manual_seed(0)
    images = [F.interpolate(torch.rand(1, 3, 6, 8), size, mode="bicubic")[0] for size in ((75, 100), (120, 91))]
    images = [(image.clamp(0, 1) * 255).byte() for image in images]
    sizes = [tuple(image.shape[1:]) for image in images]
    their_processor = Mask2FormerImageProcessor.from_pretrained(tmp_path)
    for i, image in enumerate(images):
        with torch.no_grad():
            outputs = theirs(**their_processor(image, return_tensors="pt"))
        (semantic,) = their_processor.post_process_semantic_segmentation(
            outputs, [sizes[i]], return_segmentation_scores=True
        )
        (panoptic,) = their_processor.post_process_panoptic_segmentation(
            outputs, target_sizes=[sizes[i]], label_ids_to_fuse=set()
        )
        assert panoptic["segments_info"]
        predictor = Predictor.from_pretrained(tmp_path)
        (scores,) = predictor._scores(predictor._outputs([image]))
        assert semantic["segmentation_scores"].std() > 0.01
        torch.testing.assert_close(scores, semantic["segmentation_scores"], rtol=0, atol=1e-4)
        found = predictor(image, task="semantic")["segmentation"]
        assert (found != semantic["segmentation"]).float().mean() < 1e-3
        found = predictor(image, task="panoptic")
        assert len(found["segments_info"]) == len(panoptic["segments_info"])
        assert (found["segmentation"] != panoptic["segmentation"].clamp(min=0)).float().mean() < 2e-3
    exact = Predictor(
        MaskClsForUniversalSegmentation.from_pretrained(tmp_path, compatibility="exact"),
        MaskClsImageProcessor.from_pretrained(tmp_path, compatibility="exact"),
    )
    new = Predictor(exact.model, MaskClsImageProcessor(size={"shortest_edge": 90, "longest_edge": 200}))
    assert not exact.model.config.attend_to_padding
    for task in ("semantic", "panoptic", "instance"):
        for one, other in zip(exact(images, task=task), new(images, task=task), strict=True):
            assert torch.equal(one["segmentation"], other["segmentation"])
