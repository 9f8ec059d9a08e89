"""Outputs of other models as probability-mask pairs: their own maps and scores come out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.models.detection import maskrcnn_resnet50_fpn
from transformers import (
    DetrConfig,
    DetrForSegmentation,
    DetrImageProcessor,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.convert import pairs_from_detections, pairs_from_detr, pairs_from_logits
from maskcls_hf.inference import Predictor
from maskcls_hf.metrics import Evaluator, MaskAP, Segments
from maskcls_hf.models.inference_defaults import NO_CLEAN_UP
from maskcls_hf.models.post_processing import per_pixel_map
from maskcls_hf.visual import draw_overlay, segment_colors
from tiny import STAGES, pixel_mask

PROCESSOR = MaskClsImageProcessor()
SEGFORMER = SegformerConfig(
    hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
    num_labels=4,
)  # fmt: skip
NAMES = {0: "sky", 1: "road", 2: "car", 3: "tree"}


@pytest.fixture(scope="module")
def detr():
    """(model, outputs of two images of 64 x 96 and 48 x 80, their pixel mask)."""
    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
    )
    config = DetrConfig(
        backbone_config=backbone, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=8,
        decoder_attention_heads=8, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=6, num_labels=4,
    )  # fmt: skip
    model = DetrForSegmentation(config).eval()
    with torch.no_grad():
        for head in (model.detr.class_labels_classifier, model.mask_head.output_conv):
            head.weight.mul_(40 / head.weight.std())  # sure of something
        mask = pixel_mask([(64, 96), (48, 80)], (64, 96))
        outputs = model(torch.randn(2, 3, 64, 96) * mask[:, None], pixel_mask=mask)
    return outputs, mask


def detection(labels: list[int], scores: list[float], boxes: list[tuple[int, int, int, int]], size=(40, 60)) -> dict:
    """Soft masks that are sure inside boxes (top, left, bottom, right)."""
    masks = torch.zeros(len(boxes), 1, *size)
    for mask, (top, left, bottom, right) in zip(masks, boxes, strict=True):
        mask[0, top:bottom, left:right] = 0.9
        mask[0, top, left:right] = 0.3
    return {"labels": torch.tensor(labels, dtype=torch.int64), "scores": torch.tensor(scores), "masks": masks}


DETECTIONS = [
    detection([3, 1, 3], [0.95, 0.9, 0.6], [(2, 3, 20, 30), (10, 20, 35, 50), (25, 0, 39, 15)]),
    detection([], [], [], size=(50, 30)),
    detection([2], [0.85], [(0, 0, 20, 20)], size=(32, 64)),
]


class TestDetr:
    def test_semantic_maps_are_those_of_transformers(self, detr):
        outputs, _ = detr
        for sizes in (None, [(50, 70), (33, 120)]):
            found = PROCESSOR.post_process_semantic_segmentation(pairs_from_detr(outputs, sizes))
            expected = DetrImageProcessor().post_process_semantic_segmentation(outputs, sizes)
            assert len(expected[0].unique()) > 1
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours != theirs).float().mean() < 1e-3  # ties

    def test_panoptic_maps_are_those_of_transformers_where_nothing_is_resized(self, detr):
        """And no mask is dropped: transformers takes a mask's own area to be where its score times its probability
        reaches the threshold, the paper where its probability does."""
        outputs, _ = detr
        pairs, options = pairs_from_detr(outputs), NO_CLEAN_UP["panoptic"]
        found = PROCESSOR.post_process_panoptic_segmentation(pairs, 0.4, 0.0, 0.0, **options)
        expected = DetrImageProcessor().post_process_panoptic_segmentation(outputs, 0.4, 0.0, 0.0)
        assert sum(len(image["segments_info"]) for image in expected) > 2
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours["segmentation"], theirs["segmentation"])
            for mine, other in zip(ours["segments_info"], theirs["segments_info"], strict=True):
                assert (mine["id"], mine["label_id"]) == (other["id"], other["label_id"])
                assert mine["score"] == pytest.approx(other["score"], abs=1e-6)

    def test_padding_is_cropped(self, detr):
        outputs, mask = detr
        pairs = pairs_from_detr(outputs, [(64, 96), (96, 160)], mask)
        assert pairs.valid_sizes.tolist() == [[64, 96], [48, 80]] and pairs.padded_sizes.tolist() == [[64, 96]] * 2
        scores = torch.einsum("nk,nyx->kyx", outputs.logits[1].softmax(-1)[:, :-1], resized(outputs.pred_masks[1]))
        expected = F.interpolate(scores[None, :, :48, :80], (96, 160), mode="bilinear")[0].argmax(0)
        found = PROCESSOR.post_process_semantic_segmentation(pairs)[1]
        assert found.shape == (96, 160) and (found != expected).float().mean() < 1e-3

    def test_other_outputs_are_refused(self):
        with pytest.raises(ValueError, match="need logits .* and pred_masks"):
            pairs_from_detr(SimpleNamespace(logits=torch.zeros(1, 3, 4)))
        with pytest.raises(ValueError, match=r"one \(height, width\) for each of 2 images"):
            outputs = SimpleNamespace(logits=torch.zeros(2, 3, 4), pred_masks=torch.zeros(2, 3, 8, 8))
            pairs_from_detr(outputs, [(8, 8)])


def resized(masks: torch.Tensor) -> torch.Tensor:
    return F.interpolate(masks[None], (64, 96), mode="bilinear")[0].sigmoid()


class TestDetections:
    def test_instances_are_the_detections(self):
        pairs = pairs_from_detections(DETECTIONS, num_labels=4)
        results = PROCESSOR.post_process_instance_segmentation(pairs, threshold=0.0, return_binary_maps=True)
        for found, true in zip(results, DETECTIONS, strict=True):
            masks = true["masks"][:, 0]
            inside = masks > 0.5
            scores = true["scores"] * (masks * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
            order = scores.argsort(descending=True)
            assert [info["label_id"] for info in found["segments_info"]] == (true["labels"][order] - 1).tolist()
            assert [info["score"] for info in found["segments_info"]] == pytest.approx(scores[order].tolist(), abs=1e-5)
            assert torch.equal(found["segmentation"], inside[order])

    def test_panoptic_and_semantic_maps(self):
        pairs = pairs_from_detections(DETECTIONS, num_labels=4)
        panoptic = PROCESSOR.post_process_panoptic_segmentation(pairs, threshold=0.5, overlap_mask_area_threshold=0.1)
        semantic = PROCESSOR.post_process_semantic_segmentation(pairs)
        for found, classes, true in zip(panoptic, semantic, DETECTIONS, strict=True):
            assert found["segmentation"].shape == classes.shape == true["masks"].shape[2:]
            if not len(true["labels"]):
                assert found["segments_info"] == [] and int(found["segmentation"].max()) == 0
                continue
            weighted = true["scores"][:, None, None] * true["masks"][:, 0]
            covered = weighted.amax(0) > 0.2
            label_of = {info["id"]: info["label_id"] for info in found["segments_info"]}
            ids = found["segmentation"][covered].tolist()
            assert [label_of[i] for i in ids] == (true["labels"][weighted.argmax(0)] - 1)[covered].tolist()
            by_class = torch.zeros(4, *weighted.shape[1:]).index_add_(0, true["labels"] - 1, weighted)
            assert torch.equal(classes[covered], by_class.argmax(0)[covered])

    def test_filling_up_changes_nothing(self):
        """An image alone gives what it gives beside one with more detections and of another size."""
        together = pairs_from_detections([DETECTIONS[2], DETECTIONS[0]], num_labels=4)
        alone = pairs_from_detections([DETECTIONS[2]], num_labels=4)
        assert together.class_queries_logits.shape == (2, 3, 5) and alone.class_queries_logits.shape == (1, 1, 5)
        for task, options in (("semantic", {}), ("panoptic", {"threshold": 0.0}), ("instance", {"threshold": 0.0})):
            post_process = getattr(PROCESSOR, f"post_process_{task}_segmentation")
            one, other = post_process(alone, **options)[0], post_process(together, **options)[0]
            if task == "semantic":
                assert torch.equal(one, other)
            else:
                assert one["segments_info"] == other["segments_info"] != []
                assert torch.equal(one["segmentation"], other["segmentation"])

    def test_nothing_found_anywhere(self):
        pairs = pairs_from_detections([detection([], [], [])], num_labels=4)
        assert PROCESSOR.post_process_panoptic_segmentation(pairs)[0]["segments_info"] == []
        assert PROCESSOR.post_process_instance_segmentation(pairs, threshold=0.0)[0]["segments_info"] == []
        assert PROCESSOR.post_process_semantic_segmentation(pairs)[0].shape == (40, 60)

    def test_a_real_mask_rcnn(self):
        torch.manual_seed(0)
        model = maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=96, box_score_thresh=0.0,
            box_detections_per_img=6, rpn_post_nms_top_n_test=50,
        ).eval()  # fmt: skip
        with torch.no_grad():
            detections = model([torch.rand(3, 60, 90), torch.rand(3, 64, 64)])
        assert [len(found["labels"]) for found in detections] == [6, 6]
        pairs = pairs_from_detections(detections, num_labels=4)
        options = NO_CLEAN_UP["instance"] | {"threshold": 0.0, "return_binary_maps": True}
        results = PROCESSOR.post_process_instance_segmentation(pairs, **options)
        for found, true in zip(results, detections, strict=True):
            masks = true["masks"][:, 0]
            assert found["segmentation"].shape[1:] == masks.shape[1:]
            there = (masks > 0.5).flatten(1).any(1)
            assert sorted(i["label_id"] for i in found["segments_info"]) == sorted((true["labels"][there] - 1).tolist())
            assert {i["area"] for i in found["segments_info"]} == set((masks[there] > 0.5).sum((1, 2)).tolist())

    def test_average_precision_is_that_of_the_detections(self):
        """The evaluator, which asks for all instances, gets no other than the detections."""
        truth = ground_truth((40, 60), [(2, 3, 20, 31), (10, 19, 35, 50), (25, 0, 39, 15)], [2, 0, 1])
        evaluator = Evaluator(PROCESSOR, NAMES, tasks=("instance",))
        evaluator.add(evaluator.measure(pairs_from_detections(DETECTIONS[:1], num_labels=4), [truth]))
        true = DETECTIONS[0]
        inside = true["masks"][:, 0] > 0.5
        means = (true["masks"][:, 0] * inside).sum((1, 2)) / inside.sum((1, 2))
        metric = MaskAP(NAMES)
        found = Segments(true["labels"] - 1, inside, scores=true["scores"] * means)
        metric.add(metric.measure(found, truth)[None])
        expected = metric.compute()
        scores = evaluator.compute()
        assert 0 < expected["ap"] < 1
        assert {name: scores[name] for name in expected} == pytest.approx(expected, nan_ok=True)

    def test_maps_of_another_size(self):
        pairs = pairs_from_detections(DETECTIONS[:1], num_labels=4, image_sizes=[(80, 120)])
        found = PROCESSOR.post_process_instance_segmentation(pairs, return_binary_maps=True)[0]["segmentation"]
        expected = F.interpolate(DETECTIONS[0]["masks"], (80, 120), mode="bilinear")[:, 0] > 0.5
        assert found.shape == expected.shape and (found != expected).float().mean() < 0.02

    def test_labels_that_start_at_0(self):
        shifted = [{**DETECTIONS[0], "labels": DETECTIONS[0]["labels"] - 1}]
        expected = pairs_from_detections(DETECTIONS[:1], num_labels=4)
        found = pairs_from_detections(shifted, num_labels=4, label_offset=0)
        assert torch.equal(found.class_queries_logits, expected.class_queries_logits)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": torch.tensor([0, 1, 5])}, r"image 0: labels \[0, 5\] are not from 1 to 4"),
            ({"labels": torch.tensor([1])}, r"image 0: labels \(1,\), scores \(3,\) and masks"),
            ({"scores": torch.tensor([0.5, 1.5, 0.1])}, "image 0: scores must be probabilities"),
            ({"masks": torch.full((3, 1, 4, 4), -2.0)}, "image 0: masks must be probabilities"),
        ],
    )
    def test_wrong_detections_are_named(self, change, message):
        with pytest.raises(ValueError, match=message):
            pairs_from_detections([DETECTIONS[0] | change], num_labels=4)
        with pytest.raises(ValueError, match="detections are empty"):
            pairs_from_detections([], num_labels=4)


class TestLogits:
    @settings(max_examples=150, deadline=None)
    @given(
        st.integers(2, 40), st.integers(1, 7), st.integers(1, 7), st.integers(1, 40), st.integers(1, 40),
        st.sampled_from([0.01, 1.0, 10.0, 100.0]), st.booleans(), st.integers(0, 2**31),
    )  # fmt: skip
    def test_the_semantic_map_is_that_of_the_logits(self, labels, h, w, height, width, scale, extreme, seed):
        torch.manual_seed(seed)
        logits = (2 * torch.rand(1, labels, h, w) - 1) * scale
        if extreme:  # every logit at an end of the range: differences as large as they can be
            logits = logits.sign() * scale * (1 - 0.1 * torch.rand(1, labels, h, w))
        pairs = pairs_from_logits(logits, [(height, width)])
        found = PROCESSOR.post_process_semantic_segmentation(pairs)[0]
        exact = F.interpolate(logits.double(), (height, width), mode="bilinear", align_corners=False)[0]
        lost = exact.amax(0) - exact.gather(0, found[None])[0]
        assert found.shape == (height, width)
        assert lost.max() < 1e-5

        sizes = dict.fromkeys(("padded_size", "valid_size", "target_size"), (height, width))
        first, second = exact.topk(2, 0).values
        clear = first - second > 1e-5
        assert torch.equal(found[clear], per_pixel_map(logits[0], **sizes)[clear])

    def test_the_winner_has_its_softmax_probability(self):
        logits = torch.randn(2, 5, 6, 7)
        probabilities, winner = logits.softmax(1).max(1, keepdim=True)
        masks = pairs_from_logits(logits).masks_queries_logits
        torch.testing.assert_close(masks.gather(1, winner).sigmoid(), probabilities)
        torch.testing.assert_close(masks - masks[:, :1], logits - logits[:, :1])
        assert pairs_from_logits(logits * 30).masks_queries_logits.max() == 6

    def test_any_class_probability_gives_the_same_semantic_map(self):
        logits = 5 * torch.randn(1, 6, 9, 9)
        pairs = pairs_from_logits(logits, [(50, 70)])
        expected = PROCESSOR.post_process_semantic_segmentation(pairs)[0]
        for surely in (-2.0, 0.0, 3.0):
            pairs.class_queries_logits[..., -1] = surely  # "no object"
            assert (PROCESSOR.post_process_semantic_segmentation(pairs)[0] != expected).float().mean() < 1e-3

    def test_a_segformer(self):
        torch.manual_seed(0)
        model = SegformerForSemanticSegmentation(SEGFORMER).eval()
        processor = SegformerImageProcessor(size={"height": 64, "width": 64})
        images = [np.random.randint(0, 255, (50, 90, 3), dtype=np.uint8) for _ in range(2)]
        with torch.no_grad():
            outputs = model(**processor(images, return_tensors="pt"))
        sizes = [(50, 90), (70, 40)]
        expected = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        found = PROCESSOR.post_process_semantic_segmentation(pairs_from_logits(outputs.logits, sizes))
        assert len(expected[0].unique()) > 1
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours != theirs).float().mean() < 1e-3  # ties

    def test_a_model_that_returns_pairs_goes_to_the_predictor(self):
        class Pairs(SegformerForSemanticSegmentation):
            def forward(self, pixel_values, original_sizes, **others):
                return pairs_from_logits(super().forward(pixel_values).logits, original_sizes)

        torch.manual_seed(0)
        predict = Predictor(Pairs(SEGFORMER), MaskClsImageProcessor(size={"height": 64, "width": 96}), tile=80)
        for size in ((50, 70), (90, 120)):  # whole, and in tiles
            image = np.random.randint(0, 255, (*size, 3), dtype=np.uint8)
            for task, options in (
                ("semantic", {}),
                ("panoptic", {"mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0}),
            ):
                result = predict(image, task, **options)
                assert result["segmentation"].shape == size and result["segments_info"]

    def test_panoptic_segments_are_the_classes(self):
        logits = F.one_hot(torch.arange(4).repeat_interleave(25).view(1, 10, 10), 4).movedim(-1, 1) * 4.0
        panoptic = PROCESSOR.post_process_panoptic_segmentation(pairs_from_logits(logits, [(20, 20)]))[0]
        assert [info["label_id"] for info in panoptic["segments_info"]] == [0, 1, 2, 3]
        semantic = PROCESSOR.post_process_semantic_segmentation(pairs_from_logits(logits, [(20, 20)]))[0]
        assert torch.equal(panoptic["segmentation"], semantic.int() + 1)

    @pytest.mark.parametrize(
        ("logits", "message"),
        [
            (torch.zeros(1, 1, 4, 4), r"Of a binary model make two: torch.cat"),
            (torch.zeros(2, 4, 4), r"logits must be \(B, K, h, w\)"),
            (torch.full((1, 2, 2, 2), torch.nan), "8 of the 8 logits are NaN or infinite"),
        ],
    )
    def test_wrong_logits_are_named(self, logits, message):
        with pytest.raises(ValueError, match=message):
            pairs_from_logits(logits)


def ground_truth(size: tuple[int, int], boxes: list[tuple[int, int, int, int]], labels: list[int]) -> Segments:
    stack = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(stack, boxes, strict=True):
        mask[top:bottom, left:right] = True
    segment_map = torch.full(size, -1)
    for place, mask in enumerate(stack):
        segment_map[mask] = place
    return Segments(torch.tensor(labels), segment_map)


@pytest.mark.parametrize("kind", ["detr", "detections", "logits"])
def test_the_evaluator_scores_and_the_viewer_draws(kind, detr):
    if kind == "detr":
        pairs = pairs_from_detr(detr[0], [(40, 60), (50, 30)], detr[1])
    elif kind == "detections":
        pairs = pairs_from_detections(DETECTIONS[:2], num_labels=4)
    else:
        pairs = pairs_from_logits(3 * torch.randn(2, 4, 10, 15), [(40, 60), (50, 30)])
    truth = [
        ground_truth((40, 60), [(2, 3, 20, 30), (10, 20, 35, 50)], [2, 0]),
        ground_truth((50, 30), [(0, 0, 50, 30)], [1]),
    ]
    evaluator = Evaluator(PROCESSOR, NAMES, stuff_ids=[0], tasks=("semantic", "panoptic", "instance"))
    evaluator.add(evaluator.measure(pairs, truth))
    scores = evaluator.compute()
    assert {"mean_iou", "pq", "ap"} <= scores.keys() and 0 <= scores["mean_iou"] <= 1
    if kind == "detections":
        assert scores["pq"] > 0.2 and scores["ap"] > 0.2

    panoptic = PROCESSOR.post_process_panoptic_segmentation(pairs, 0.3, overlap_mask_area_threshold=0.0)[0]
    segments = panoptic["segments_info"]
    colors = segment_colors(segments, len(NAMES), one_per_class=[0])
    image = np.full((40, 60, 3), 128, dtype=np.uint8)
    drawn = draw_overlay(image, panoptic["segmentation"].numpy(), segments, colors, NAMES)
    assert segments and len(np.unique(np.asarray(drawn))) > 2
