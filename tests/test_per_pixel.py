"""Per-pixel models become mask classifiers: the same semantic map at first, and everything that ours can do."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForUniversalSegmentation,
    BeitImageProcessor,
    DPTImageProcessor,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerImageProcessor,
    pipeline,
)

import tiny
from checkpoints import picture
from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.convert import from_per_pixel, processor_from_per_pixel, save_from_per_pixel
from maskcls_hf.convert.to_transformers import obstacles
from maskcls_hf.models.per_pixel_networks import PER_PIXEL_NETWORKS, PerPixelNetwork
from maskcls_hf.models.post_processing import semantic_map
from maskcls_hf.training.optim import parameter_groups
from per_pixel_models import CLASSES, FAMILIES, SQUARE_ONLY, images, segformer, with_varied_scores

SIZES = dict(hidden_size=32, num_attention_heads=4, decoder_layers=2, decoder_ffn_dim=32)


def converted(source: nn.Module, num_queries: int | None = None, **fields) -> MaskClsForUniversalSegmentation:
    sizes = {} if source.config.model_type == "maskcls_perpixel" else SIZES
    return from_per_pixel(source, num_queries, **(sizes | fields))


@torch.no_grad()
def maps(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Semantic maps at the size of the input (B, H, W)."""
    outputs, size = model(pixel_values), pixel_values.shape[-2:]
    frame = {"padded_size": size, "valid_size": size, "target_size": size}
    pairs = zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
    return torch.stack([semantic_map(classes, masks, **frame) for classes, masks in pairs])


@torch.no_grad()
def expected(source, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of the per-pixel model, and where its two best scores differ by more than rounding."""
    logits = F.interpolate(source(pixel_values=pixel_values).logits, size=pixel_values.shape[-2:], mode="bilinear")
    best = logits.topk(2, dim=1).values
    return logits.argmax(1), best[:, 0] - best[:, 1] > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_queries", [None, 10])
def test_same_semantic_map_before_training(family, num_queries):
    pixel_values = images(family)
    source = with_varied_scores(FAMILIES[family](), pixel_values)
    model = converted(source, num_queries)
    wanted, clear = expected(source, pixel_values)
    assert len(wanted.unique()) >= 3 and clear.float().mean() > 0.97
    found = maps(model, pixel_values)
    if family != "baseline_plus" or num_queries is None:  # its queries attend to each other, the new ones too
        assert torch.equal(found[clear], wanted[clear])
    assert model.config.matching == ("fixed" if num_queries is None else "bipartite")
    assert model.config.id2label == CLASSES and not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_is_loaded_again(family, tmp_path):
    pixel_values = images(family)
    model = converted(FAMILIES[family](), 10).train()
    size = pixel_values.shape[-2:]
    mask_labels, class_labels = tiny.segments([size, size], [3, 2], num_labels=len(CLASSES))
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.0))
    losses = []
    for _ in range(4):
        torch.manual_seed(0)  # one dropout pattern
        loss = model(pixel_values, mask_labels=mask_labels, class_labels=class_labels).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 2:  # the first step leaves what a zero layer hides
            assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = copy.deepcopy(AutoModelForUniversalSegmentation.from_pretrained(tmp_path))  # weights aligned in memory
    with torch.no_grad():
        before, after = model(pixel_values), loaded(pixel_values)
    assert torch.equal(before.masks_queries_logits, after.masks_queries_logits)
    assert torch.equal(before.class_queries_logits, after.class_queries_logits)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"beit", "data2vec", "dpt_hybrid"}))
def test_odd_sizes_lose_no_pixel(family):
    """Their maps are the part of a larger map that belongs to them, to a cell."""
    model = converted(FAMILIES[family]()).eval()
    multiple = getattr(model.model.backbone, "multiple", 1)
    height, width = -(-67 // multiple) * multiple, -(-93 // multiple) * multiple
    with torch.no_grad():
        masks = model(torch.randn(1, 3, 67, 93)).masks_queries_logits
        whole = model(torch.randn(1, 3, height, width)).masks_queries_logits
    upsampling = model.config.mask_upsampling
    assert 0 <= masks.shape[-2] - 67 * whole.shape[-2] / height < upsampling
    assert 0 <= masks.shape[-1] - 93 * whole.shape[-1] / width < upsampling


@pytest.mark.parametrize("family", ["beit", "data2vec"])
def test_networks_of_one_size_say_so(family):
    with pytest.raises(ValueError, match="takes images of 64 x 64 pixels, got 64 x 96"):
        converted(FAMILIES[family]())(torch.randn(1, 3, 64, 96))


def test_more_queries_start_without_object_and_with_an_empty_mask():
    source = with_varied_scores(segformer(), images("segformer"))
    model = converted(source, 9)
    with torch.no_grad():
        outputs = model(images("segformer"))
    probabilities = outputs.class_queries_logits.softmax(-1)[0]
    torch.testing.assert_close(probabilities[:6].diagonal(), torch.full((6,), 0.9))
    torch.testing.assert_close(probabilities[6:, -1], torch.full((3,), 0.9))
    torch.testing.assert_close(outputs.masks_queries_logits[:, 6:].sigmoid().max().item(), 0.01)


def test_a_common_shift_of_the_scores_changes_nothing():
    pixel_values = images("segformer")
    source = with_varied_scores(segformer(), pixel_values)
    wanted, clear = expected(source, pixel_values)
    with torch.no_grad():
        source.decode_head.classifier.bias += 100.0  # sigmoids of which are all 1
    assert torch.equal(maps(converted(source), pixel_values)[clear], wanted[clear])


def test_unchanged_source():
    source = segformer().eval()
    before = {name: value.clone() for name, value in source.state_dict().items()}
    converted(source)
    assert source.config.num_labels == 6 and source.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())


def test_half_precision_and_training_mode_carry_over():
    model = converted(segformer().to(torch.bfloat16).train())
    assert model.dtype == torch.bfloat16 and model.training


# -- processors, folders, pipelines, remote code ----------------------------------------------------------------------


def test_folder_to_folder_and_through_the_pipeline(tmp_path):
    source = with_varied_scores(segformer(), images("segformer"))
    source.save_pretrained(tmp_path / "theirs")
    SegformerImageProcessor(size={"height": 64, "width": 96}, do_reduce_labels=True).save_pretrained(
        tmp_path / "theirs"
    )
    save_from_per_pixel(tmp_path / "theirs", tmp_path / "ours")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(processor, MaskClsImageProcessor) and processor.label_offset == 1
    image = picture(64, 96)
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        logits = source(**theirs(image, return_tensors="pt"))
    wanted = theirs.post_process_semantic_segmentation(logits, [(64, 96)])[0].numpy()
    segmenter = pipeline("image-segmentation", model=str(tmp_path / "ours"))
    found = np.zeros_like(wanted)
    for segment in segmenter(image, subtask="semantic"):
        found[np.asarray(segment["mask"]) > 0] = segmenter.model.config.label2id[segment["label"]]
    assert (found == wanted).mean() > 0.999


def random_image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "theirs",
    [
        SegformerImageProcessor(size={"height": 64, "width": 96}),
        BeitImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False),
        DPTImageProcessor(size={"height": 64, "width": 64}),
        MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_same_network_input(theirs):
    image = random_image(64, 64)
    wanted = theirs(image, return_tensors="pt")["pixel_values"]
    found = processor_from_per_pixel(theirs)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=0)  # theirs rounds to bytes after resizing


def test_what_a_processor_of_ours_cannot_do_is_said(caplog):
    processor = processor_from_per_pixel(
        DPTImageProcessor(size={"height": 96, "width": 64}, keep_aspect_ratio=True, ensure_multiple_of=32)
    )
    assert "sizes can differ" in caplog.text
    assert processor(random_image(64, 128), return_tensors="pt")["pixel_values"].shape[-2:] == (64, 128)
    ours = MaskClsImageProcessor(label_format="semantic", size_divisor=64, label_offset=1)
    kept = processor_from_per_pixel(ours)
    assert (kept.label_format, kept.size_divisor, kept.label_offset) == ("segments", 64, 1)


# -- other classes, other libraries, refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("num_queries", [None, 9])
def test_reset_classes_keeps_the_start_of_those_that_stay(num_queries):
    pixel_values = images("segformer")
    source = with_varied_scores(segformer(), pixel_values)
    model = converted(source, num_queries).reset_classes({0: "dog", 1: "sky", 2: "horse"})
    with torch.no_grad():
        masks = model(pixel_values).masks_queries_logits
        classes = model(pixel_values).class_queries_logits
        before = converted(source, num_queries)(pixel_values).masks_queries_logits
    dog, sky = (0, 1) if num_queries is None else (4, 0)
    for found, expected in ((masks[:, dog], before[:, 4]), (masks[:, sky], before[:, 0])):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)  # products of other sizes round otherwise
    assert classes[0, dog].argmax() == 0 and classes[0, sky].argmax() == 1


def test_query_priors_are_learned_without_decay():
    model = converted(segformer(), 9)
    groups = parameter_groups(model, 1.0, 0.5)
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    module = model.segmentation_module
    assert {id(module.class_priors.weight), id(module.mask_priors.weight)} <= undecayed


def test_transformers_maskformer_cannot_hold_it():
    reasons = " ".join(obstacles(converted(segformer()).config))
    assert "pixel_decoder='per_pixel'" in reasons and "query_priors" in reasons


@pytest.mark.skipif(importlib.util.find_spec("segmentation_models_pytorch") is None, reason="needs smp")
@pytest.mark.parametrize("architecture", ["Unet", "FPN", "DeepLabV3Plus"])
def test_segmentation_models_pytorch(architecture, tmp_path, monkeypatch):
    """`examples/adapt_smp.py`: kernels of 3 x 3, and scores that are upsampled with aligned corners."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    adapt_smp = importlib.import_module("adapt_smp")
    import segmentation_models_pytorch as smp

    pixel_values = images("segformer")
    source = smp.create_model(architecture, "resnet18", encoder_weights=None, classes=5).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    adapt_smp.main(
        ["--architecture", architecture, "--classes", "5", "--queries", "7"]
        + ["--weights", str(tmp_path / "weights.pth"), "--out", str(tmp_path / "out")]
    )
    model = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        best = source(pixel_values).topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-5
    assert clear.float().mean() > 0.9
    assert torch.equal(maps(model, pixel_values)[clear], source(pixel_values).argmax(1)[clear])


def test_refusals(tmp_path):
    classifier = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4))
    with pytest.raises(ValueError, match=r"(?s)ResNetForImageClassification \(model_type='resnet'\).*Missing.*adapter"):
        from_per_pixel(classifier)
    with pytest.raises(ValueError, match="Sequential has no configuration with a model_type"):
        from_per_pixel(nn.Sequential())
    classifier.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a resnet, which is no semantic segmentation model"):
        from_per_pixel(tmp_path)
    with pytest.raises(ValueError, match="num_queries=3 must be at least the number of classes, 6"):
        from_per_pixel(segformer(), 3)
    with pytest.raises(ValueError, match="num_queries=10 must equal num_labels=6"):
        from_per_pixel(segformer(), 10, "fixed")
    one = segformer().config
    one.num_labels = 1
    with pytest.raises(ValueError, match="one class has no classes to tell apart"):
        from_per_pixel(segformer(), config=one)
    other = segformer().config
    other.depths = [2, 1, 1, 1]
    with pytest.raises(ValueError, match="the config does not describe this model"):
        from_per_pixel(segformer(), config=other)


def test_an_adapter_is_told_all_that_it_lacks(monkeypatch):
    class Incomplete(PerPixelNetwork):
        classifier = "decode_head.linear_fuse.convolution"

    monkeypatch.setitem(PER_PIXEL_NETWORKS, "segformer", Incomplete)
    with pytest.raises(ValueError) as error:
        from_per_pixel(segformer())
    for missing in ("one convolution at the adapter's `classifier`", "`features`", "`context_channels`"):
        assert missing in str(error.value)
    Incomplete.classifier = "segformer.stages.0.patch_embeddings.proj"
    with pytest.raises(ValueError, match="there are 0|stride 1"):
        from_per_pixel(segformer())


def test_every_family_is_tested():
    tested = {FAMILIES[name]().config.model_type for name in FAMILIES} - {"maskcls_perpixel"}
    assert tested == set(PER_PIXEL_NETWORKS) - {"smp"} and set(FAMILIES) > SQUARE_ONLY


@pytest.mark.parametrize("family", ["segformer", "dpt"])
def test_export(family):
    model, pixel_values = converted(FAMILIES[family]()).eval(), images(family)
    program = torch.export.export(model, (pixel_values,), strict=False)
    with torch.no_grad():
        wanted = model(pixel_values).masks_queries_logits
        torch.testing.assert_close(program.module()(pixel_values).masks_queries_logits, wanted)
