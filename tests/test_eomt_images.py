"""EoMT's image processors: windows and squares, beside transformers' own maps."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from transformers import EomtImageProcessor, pipeline
from transformers.image_utils import SizeDict
from transformers.utils import ModelOutput

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.data.sample import as_sample
from maskcls_hf.inference import Predictor
from maskcls_hf.metrics import Evaluator
from maskcls_hf.models.resampling import resized_size, windows_along
from maskcls_hf.models.segments import Segments
from maskcls_hf.training import load_recipe
from maskcls_hf.training.run import build_collators
from test_eomt import theirs_of

SIDE = 64
WINDOWS = dict(size={"shortest_edge": SIDE, "longest_edge": None}, do_split_image=True, do_pad=False)
SQUARE = dict(size={"shortest_edge": SIDE, "longest_edge": SIDE}, do_split_image=False, do_pad=True)
# 480 x 640 at 512 in small: sizes that leave a fraction, and both orientations; a square; one that is cut in three.
IMAGES = [(60, 80), (121, 75), (64, 64), (50, 129)]


@torch.no_grad()
def transformers_model():
    """Whose maps are not of one class."""
    model = theirs_of("dinov2")
    model.attn_mask_probs.zero_()
    model.class_predictor.weight.mul_(12)
    model.mask_head.fc3.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a model of transformers with each of its image processors."""
    found = {}
    for name, options in (("windows", WINDOWS), ("square", SQUARE)):
        found[name] = tmp_path_factory.mktemp(name)
        transformers_model().save_pretrained(found[name])
        EomtImageProcessor(**options).save_pretrained(found[name])
    return found


def images() -> list[torch.Tensor]:
    torch.manual_seed(3)
    rough = [torch.rand(3, 6, 8) for _ in IMAGES]
    resized = [F.interpolate(image[None], size, mode="bicubic")[0] for image, size in zip(rough, IMAGES, strict=True)]
    return [(image.clamp(0, 1) * 255).byte() for image in resized]


@torch.no_grad()
def outputs_of(folder):
    """What transformers gives, and what we do, each with its image processor."""
    their_processor = EomtImageProcessor.from_pretrained(folder)
    inputs = their_processor(images(), return_tensors="pt")
    processor = MaskClsImageProcessor.from_pretrained(folder)
    our_inputs = processor(images(), return_tensors="pt")
    torch.testing.assert_close(our_inputs.pixel_values, inputs.pixel_values, rtol=0, atol=1e-5)
    model = MaskClsForUniversalSegmentation.from_pretrained(folder).eval()
    return their_processor, transformers_model()(**inputs), processor, model(**our_inputs)


def assert_same_classes(found, scores):
    """But where the two best `scores` (K, H, W) tie."""
    best = scores.topk(2, 0).values
    decided = best[0] - best[1] > 1e-4
    expected = scores.argmax(0)
    assert found.shape == expected.shape and decided.float().mean() > 0.9
    assert torch.equal(found[decided], expected[decided])


def test_semantic_maps_of_windows(folders):
    """Windows along the long side, scores averaged: the maps of transformers, from its folder, with no argument."""
    their_processor, expected, processor, found = outputs_of(folders["windows"])
    assert found.patch_offsets.tolist() == [offset.tolist() for offset in expected.patch_offsets]
    assert len(found.patch_offsets) > len(IMAGES) == len(found.original_sizes)
    theirs = their_processor.post_process_semantic_segmentation(expected, IMAGES, return_segmentation_scores=True)
    scores = [of_image["segmentation_scores"] for of_image in theirs]
    assert max(len(of_image.argmax(0).unique()) for of_image in scores) > 1
    for of_theirs, of_ours in ((expected, 1e-5), (found, 1e-4)):  # outputs of transformers too
        ours = processor.post_process_semantic_segmentation(of_theirs, IMAGES, return_segmentation_scores=True)
        for one, other in zip(ours, scores, strict=True):
            torch.testing.assert_close(one["segmentation_scores"], other, rtol=0, atol=of_ours)
            assert_same_classes(one["segmentation"], other)
    maps = processor.post_process_semantic_segmentation(found)
    predictor = Predictor.from_pretrained(folders["windows"], task="semantic", batch_size=3)
    predicted = predictor(images())
    for one, other, expected_scores in zip(maps, predicted, scores, strict=True):
        assert_same_classes(one, expected_scores)
        assert_same_classes(other["segmentation"], expected_scores)
    none = processor.post_process_semantic_segmentation(found, score_threshold=1.0)
    assert all(
        bool(((class_map == -1) == (of_image.amax(0) <= 1)).all())
        for class_map, of_image in zip(none, scores, strict=True)
    )


def test_a_pipeline_of_windows(folders):
    segment = pipeline(
        "image-segmentation",
        model=MaskClsForUniversalSegmentation.from_pretrained(folders["windows"]),
        image_processor=MaskClsImageProcessor.from_pretrained(folders["windows"]),
    )
    image = images()[3]
    found = segment(to_pil_image(image), subtask="semantic")
    predicted = Predictor.from_pretrained(folders["windows"])(image, task="semantic")
    assert len(found) == len(predicted["segments_info"])
    for record, info in zip(found, predicted["segments_info"], strict=True):
        assert (pil_to_tensor(record["mask"]) > 0).sum() == info["area"]


@pytest.mark.parametrize("name", ["windows", "square"])
def test_other_sizes_of_images(name, folders):
    """Several scales, tiles, and pixels enlarged: the square goes with its size, windows with theirs."""
    for options in ({"scales": (0.5, 1.0, 1.5)}, {"enlarge": 2.0}, {"tile": 64}):
        predict = Predictor.from_pretrained(folders[name], task="semantic", **options)
        for found, size in zip(predict(images()), IMAGES, strict=True):
            assert found["segmentation"].shape == size and found["segmentation"].min() >= 0


def test_maps_of_segments_are_of_images(folders):
    """Not of windows: one list entry an image, of its size, with what each of its windows sees."""
    _, _, processor, found = outputs_of(folders["windows"])
    for task, options in (("instance", {}), ("panoptic", {"overlap_mask_area_threshold": 0.2})):
        results = getattr(processor, f"post_process_{task}_segmentation")(found, **options)
        assert [tuple(result["segmentation"].shape) for result in results] == IMAGES
        assert all(result["segments_info"] for result in results)
    options = dict(threshold=0.6, max_mask_iou=1.0, max_hole_share=0.0, min_fragment_share=0.0, return_binary_maps=True)
    sizes = [resized_size(size, SizeDict(shortest_edge=SIDE)) for size in IMAGES]
    (whole, *_) = processor.post_process_instance_segmentation(found, target_sizes=sizes, **options)
    seen = ModelOutput({k: v for k, v in found.items() if k not in ("patch_offsets", "original_sizes")})
    expected = []
    for (image, start, end), of_window in zip(
        found.patch_offsets.tolist(), processor.post_process_instance_segmentation(seen, **options), strict=True
    ):
        for mask, info in zip(of_window["segmentation"], of_window["segments_info"], strict=True):
            placed = torch.zeros(sizes[0], dtype=torch.bool)
            if image == 0:
                placed[:, start:end] = mask
                expected.append((info["score"], placed))
    expected.sort(key=lambda pair: -pair[0])
    assert len(expected) == len(whole["segmentation"]) > 4
    assert all(torch.equal(mask, placed) for mask, (_, placed) in zip(whole["segmentation"], expected, strict=True))
    with pytest.raises(ValueError, match=r"8 outputs of 8 windows \(patch_offsets\) of 4 images; target_sizes"):
        processor.post_process_semantic_segmentation(found, target_sizes=[(9, 9)] * 8)


def test_semantic_maps_of_padded_images(folders):
    """The padding is cropped before maps are resized to the image; transformers stretches it."""
    _, expected, processor, found = outputs_of(folders["square"])
    assert expected.patch_offsets == []  # no windows, which is not None
    whole = processor.post_process_semantic_segmentation(expected, IMAGES)
    assert [tuple(class_map.shape) for class_map in whole] == IMAGES
    maps = processor.post_process_semantic_segmentation(found)
    masks = F.interpolate(expected.masks_queries_logits, (SIDE, SIDE), mode="bilinear").sigmoid()
    class_probs = expected.class_queries_logits.softmax(-1)[..., :-1]
    scores = torch.einsum("bqc,bqhw->bchw", class_probs, masks)
    for class_map, of_image, size in zip(maps, scores, IMAGES, strict=True):
        height, width = (int(edge) for edge in resized_size(size, SizeDict(**SQUARE["size"])))
        assert (height, width) != (SIDE, SIDE) or size == (SIDE, SIDE)
        assert_same_classes(class_map, F.interpolate(of_image[None, :, :height, :width], size, mode="bilinear")[0])


def test_panoptic_and_instance_maps(folders):
    """Resized and padded to a square: the segments of transformers, of the same pixels."""
    their_processor, expected, processor, found = outputs_of(folders["square"])
    given = dict(overlap_mask_area_threshold=0.3, threshold=0.5)
    theirs = their_processor.post_process_panoptic_segmentation(expected, IMAGES, **given)
    ours = processor.post_process_panoptic_segmentation(found, **given)
    assert sum(len(result["segments_info"]) for result in theirs) > 4
    for one, other in zip(ours, theirs, strict=True):  # ids from 1 here, and 0 for void; there from 0, and -1
        assert (one["segmentation"] != other["segmentation"] + 1).float().mean() < 1e-3
        assert [info["label_id"] for info in one["segments_info"]] == [
            info["label_id"] for info in other["segments_info"]
        ]
        for info, record in zip(one["segments_info"], other["segments_info"], strict=True):
            assert info["id"] == record["id"] + 1 and abs(info["score"] - record["score"]) < 1e-4
    theirs = their_processor.post_process_instance_segmentation(expected, IMAGES, threshold=0.6)
    ours = processor.post_process_instance_segmentation(found, threshold=0.6, return_binary_maps=True)
    assert sum(len(result["segments_info"]) for result in theirs) > 4
    for one, other in zip(ours, theirs, strict=True):
        painted = torch.full_like(other["segmentation"], -1)
        records = {
            (info["label_id"], round(info["score"], 4)): mask
            for info, mask in zip(one["segments_info"], one["segmentation"], strict=True)
        }
        assert len(one["segments_info"]) == len(other["segments_info"])
        for record in other["segments_info"]:  # in the order of the queries, the last on top
            painted[records[record["label_id"], round(record["score"], 4)]] = record["id"]
        assert (painted != other["segmentation"]).float().mean() < 1e-3


def test_windows_cover_every_pixel():
    """The last one ends at the edge; as few as cover it, evenly spread."""
    for length in range(1, 700):
        windows = windows_along(length, 64)
        assert windows[0][0] == 0 and windows[-1][1] == length and len(windows) == max(1, -(-length // 64))
        assert {end - start for start, end in windows} == {min(64, length)}
        assert all(following[0] <= end for (_, end), following in zip(windows, windows[1:], strict=False))
    size = SizeDict(shortest_edge=512)
    assert resized_size((480, 640), size) == (512, 682)
    assert resized_size((480, 640), size, "nearest") == (512, 683)
    assert resized_size((480, 640), SizeDict(shortest_edge=640, longest_edge=640), "nearest") == (480, 640)
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    for options, end in (
        ({}, 66),
        ({"compatibility": "transformers", "image_fit": "pad"}, 66),
        ({"compatibility": "paper"}, 67),
        ({"compatibility": "paper", "size_rounding": "down"}, 66),
        ({"size_rounding": "nearest"}, 67),
    ):
        processor = MaskClsImageProcessor(size={"shortest_edge": 50}, do_split_image=True, **options)
        assert processor(image).patch_offsets[-1].tolist() == [0, end - 50, end], options


def test_labels_of_windows(folders):
    """Are cut as the images are; a step of training takes them."""
    processor = MaskClsImageProcessor.from_pretrained(folders["windows"], void_id=255)
    label_map = torch.zeros(50, 129, dtype=torch.uint8)
    label_map[:, 100:], label_map[:20, :20] = 2, 255
    batch = processor(images()[3:], [label_map], return_tensors="pt")
    assert [labels.tolist() for labels in batch.class_labels] == [[0], [0], [0, 2]]
    assert batch.void_mask.flatten(1).any(1).tolist() == [True, False, False]
    outputs = MaskClsForUniversalSegmentation.from_pretrained(folders["windows"]).train()(**batch)
    outputs.loss.backward()
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("ignored", [None, 255])
def test_reduced_labels_and_void(ignored, tmp_path):
    """Their `ignore_index` means both: 0 is ignored, the others are one less; 255 stays void, and is no class 254."""
    EomtImageProcessor(ignore_index=ignored, **SQUARE).save_pretrained(tmp_path)
    processor = MaskClsImageProcessor.from_pretrained(tmp_path)
    assert (processor.void_id, processor.label_offset) == (255, 0 if ignored is None else 1)
    assert (dict(processor.pad_size), processor.do_split_image) == ({"height": SIDE, "width": SIDE}, False)
    label_map = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    label_map[:8], label_map[8:16] = 3, 255
    (batch,) = [processor(torch.zeros(3, SIDE, SIDE, dtype=torch.uint8), [label_map])]
    assert batch.class_labels[0].tolist() == ([0, 3] if ignored is None else [2])
    assert batch.void_mask[0].sum() == (8 if ignored is None else 56) * SIDE
    processor.save_pretrained(tmp_path / "ours")
    again = MaskClsImageProcessor.from_pretrained(tmp_path / "ours")
    assert again.to_dict() == processor.to_dict()


@pytest.mark.parametrize("name", ["windows", "square"])
def test_batches_of_training(name, folders):
    """Crops keep their size; the evaluation sees whole images as the image processor gives them."""
    recipe = load_recipe("finetune", ["augmentation.crop_size=80"])
    train, evaluation = build_collators(recipe, MaskClsImageProcessor.from_pretrained(folders[name]))
    label_map = torch.zeros(80, 120, dtype=torch.int64)
    sample = as_sample(torch.zeros(3, 80, 120, dtype=torch.uint8), Segments.from_class_map(label_map), "one")
    assert train([sample])["pixel_values"].shape == (1, 3, 96, 128)
    batch = evaluation([sample])
    assert batch["pixel_values"].shape == ((2, 3, SIDE, SIDE) if name == "windows" else (1, 3, SIDE, SIDE))
    assert len(batch["ground_truth"]) == 1
    outputs = MaskClsForUniversalSegmentation.from_pretrained(folders[name])(
        **{name: value for name, value in batch.items() if name != "ground_truth"}
    )
    evaluator = Evaluator(evaluation.image_processor, {0: "sky", 1: "road", 2: "car"}, tasks=("semantic",))
    evaluator.add(evaluator.measure(outputs, batch["ground_truth"]))
    assert 0 <= evaluator.compute()["pixel_accuracy"] <= 1
