"""What is special to some models; what all of them do is in test_every_family.py."""

import copy

import numpy as np
import pytest
import torch

from families import FAMILIES, PADDED, SIZES
from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsModel, PerPixelForSemanticSegmentation
from tiny import (
    MAX_DEEPLAB,
    bottleneck_resnet,
    convnext,
    maskcls_config,
    pad_labels,
    perpixel_config,
    pixel_mask,
    resnet,
    segments,
    swin,
)


def test_output_fields_come_in_the_order_of_transformers():
    from transformers.models.maskformer.modeling_maskformer import (
        MaskFormerForInstanceSegmentationOutput,
        MaskFormerModelOutput,
    )

    from maskcls_hf.models.modeling_maskcls import MaskClsForUniversalSegmentationOutput, MaskClsModelOutput

    for ours, theirs in (
        (MaskClsModelOutput, MaskFormerModelOutput),
        (MaskClsForUniversalSegmentationOutput, MaskFormerForInstanceSegmentationOutput),
    ):
        names = list(theirs.__dataclass_fields__)
        assert list(ours.__dataclass_fields__)[: len(names)] == names


@pytest.mark.parametrize("pixel_decoder", ["fpn", "fpn_encoder"])
def test_shapes_of_everything_asked_for(pixel_decoder):
    model = MaskClsForUniversalSegmentation(maskcls_config(pixel_decoder=pixel_decoder)).eval()
    output = model(
        torch.randn(2, 3, *PADDED), output_hidden_states=True, output_attentions=True, output_auxiliary_logits=True
    )
    assert output.class_queries_logits.shape == (2, 7, 6) and output.masks_queries_logits.shape == (2, 7, 16, 24)
    assert len(output.auxiliary_logits) == 2
    for inner in output.auxiliary_logits:
        assert inner["class_queries_logits"].shape == (2, 7, 6)
        assert inner["masks_queries_logits"].shape == (2, 7, 16, 24)
    assert output.encoder_last_hidden_state.shape == (2, 32, 2, 3)
    assert output.pixel_decoder_last_hidden_state.shape == (2, 16, 16, 24)
    assert output.transformer_decoder_last_hidden_state.shape == (2, 7, 32)
    assert [tuple(h.shape[2:]) for h in output.encoder_hidden_states] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [tuple(h.shape[2:]) for h in output.pixel_decoder_hidden_states] == [(2, 3), (4, 6), (8, 12), (16, 24)]
    assert [h.shape for h in output.transformer_decoder_hidden_states] == [(2, 7, 32)] * 4
    assert [a.shape for a in output.attentions] == [(2, 4, 7, 7)] * 3
    assert [a.shape for a in output.cross_attentions] == [(2, 4, 7, 6)] * 3
    assert output.valid_sizes.tolist() == output.padded_sizes.tolist() == [[64, 96]] * 2


def test_predicting_gives_what_training_does():
    model = MaskClsForUniversalSegmentation(maskcls_config()).eval()
    inputs = {"pixel_values": torch.randn(2, 3, *PADDED), "pixel_mask": pixel_mask([(64, 96), (50, 70)], PADDED)}
    expected = model(**inputs)
    assert expected.pixel_decoder_last_hidden_state.shape == (2, 16, 16, 24)
    with torch.no_grad():
        output, full = model(**inputs), model(**inputs, output_hidden_states=True)
    for found in (output, full):
        torch.testing.assert_close(found.pixel_decoder_last_hidden_state, expected.pixel_decoder_last_hidden_state)
    torch.testing.assert_close(output.masks_queries_logits, expected.masks_queries_logits)
    torch.testing.assert_close(full.masks_queries_logits, output.masks_queries_logits, atol=0, rtol=0)


def test_loss_is_the_weighted_sum_of_its_terms_over_all_layers():
    model = MaskClsForUniversalSegmentation(maskcls_config())
    output = model(**FAMILIES["maskformer"].batch())
    assert sorted(output.loss_dict) == sorted(
        f"loss_{term}{layer}" for term in ("cross_entropy", "mask", "dice") for layer in ("", "_0", "_1")
    )
    weights = {"cross_entropy": 1, "mask": 20, "dice": 1}
    expected = sum(weights[name.removeprefix("loss_").rstrip("_01")] * t for name, t in output.loss_dict.items())
    torch.testing.assert_close(output.loss, expected)
    model.config.deep_supervision = False
    assert sorted(model(**FAMILIES["maskformer"].batch()).loss_dict) == ["loss_cross_entropy", "loss_dice", "loss_mask"]


PLAIN_TERMS = ["loss_cross_entropy", "loss_mask", "loss_dice"]
VARIANTS = {
    "box": ({"matching": "box"}, [*PLAIN_TERMS, "loss_bbox", "loss_giou"], []),
    "max_deeplab": (
        MAX_DEEPLAB,
        [*PLAIN_TERMS, "loss_pq", "loss_mask_id"],
        ["loss_instance_discrimination", "loss_semantic"],
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_terms_of_the_loss(variant, training):
    fields, of_layers, of_pixels = VARIANTS[variant]
    model = MaskClsForUniversalSegmentation(maskcls_config(**fields)).train(training)
    with torch.set_grad_enabled(training):
        output = model(**FAMILIES["maskformer"].batch())
        model.config.deep_supervision = False
        deepest = model(**FAMILIES["maskformer"].batch())
    layered = [f"{name}{layer}" for name in of_layers for layer in ("", "_0", "_1")]
    assert sorted(output.loss_dict) == sorted(layered + of_pixels)
    assert sorted(deepest.loss_dict) == sorted(of_layers + of_pixels)
    assert all(term.isfinite() for term in output.loss_dict.values())


def test_heads_come_with_their_settings_only():
    plain = MaskClsForUniversalSegmentation(maskcls_config())
    assert plain(torch.randn(1, 3, *PADDED)).get("pred_boxes") is None
    names = plain.state_dict().keys()
    for fields, head in (
        ({"matching": "box"}, "segmentation_module.bbox_predictor."),
        ({"semantic_weight": 1.0}, "segmentation_module.semantic_predictor."),
        (MAX_DEEPLAB | {"semantic_weight": 0.0}, "none"),
    ):
        more = MaskClsForUniversalSegmentation(maskcls_config(**fields)).state_dict().keys()
        assert names == {name for name in more if not name.startswith(head)}
        assert any(name.startswith(head) for name in more) == (head != "none")


def test_boxes_of_all_layers():
    model = MaskClsForUniversalSegmentation(maskcls_config(matching="box")).eval()
    output = model(**FAMILIES["maskformer"].inputs(), output_auxiliary_logits=True)
    boxes = [output.pred_boxes, *(inner["pred_boxes"] for inner in output.auxiliary_logits)]
    assert len(boxes) == 3
    for of_layer in boxes:
        assert of_layer.shape == (2, 7, 4) and of_layer.min() > 0 and of_layer.max() < 1


@pytest.mark.parametrize("attend_to_padding", [False, True])
def test_boxes_are_relative_to_the_image_without_padding(attend_to_padding):
    """A segment that fills the second image, 50 x 70 of 64 x 96, has the box of the whole image."""
    config = maskcls_config(matching="box", attend_to_padding=attend_to_padding, num_queries=1)
    model, batch = MaskClsForUniversalSegmentation(config).eval(), FAMILIES["maskformer"].batch()
    batch["mask_labels"] = [batch["mask_labels"][0][:0], batch["pixel_mask"][1:] != 0]
    batch["class_labels"] = [torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
    output = model(**batch)
    distance = (output.pred_boxes[1, 0] - torch.tensor([0.5, 0.5, 1, 1])).abs().sum()
    torch.testing.assert_close(output.loss_dict["loss_bbox"], distance)


def test_exclusive_masks_share_out_each_pixel():
    model = MaskClsForUniversalSegmentation(maskcls_config(exclusive_masks=True)).eval()
    free = MaskClsForUniversalSegmentation(maskcls_config()).eval()
    free.load_state_dict(model.state_dict())
    masks = model(**FAMILIES["maskformer"].inputs()).masks_queries_logits.sigmoid()
    torch.testing.assert_close(masks, free(**FAMILIES["maskformer"].inputs()).masks_queries_logits.softmax(1))
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 16, 24))


def test_inner_layers_are_normed_like_the_last():
    model = MaskClsForUniversalSegmentation(maskcls_config()).eval()
    output = model(torch.randn(1, 3, *PADDED), output_hidden_states=True)
    for embeddings in output.transformer_decoder_hidden_states[1:]:
        torch.testing.assert_close(embeddings.mean(-1), torch.zeros(1, 7), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        *({"pixel_decoder": name} for name in ("fpn", "fpn_encoder")),
        *(fields for fields, _, _ in VARIANTS.values()),
    ],
)
@pytest.mark.parametrize("backbone", [resnet, bottleneck_resnet, convnext, swin])
@pytest.mark.parametrize("padded", [(64, 128), (128, 160)])
def test_an_image_gives_the_same_alone_or_padded(fields, backbone, padded):
    torch.manual_seed(0)
    config = maskcls_config(backbone_config=backbone(), **fields)
    model = MaskClsForUniversalSegmentation(config).eval()
    size, alone = (50, 70), (64, 96)
    masks, labels = segments([size], [3])
    image = torch.randn(1, 3, *size)

    def run(shape):
        values = torch.zeros(1, 3, *shape)
        values[:, :, : size[0], : size[1]] = image
        return model(values, pad_labels(masks, shape), labels, pixel_mask=pixel_mask([size], shape))

    one, other = run(alone), run(padded)
    torch.testing.assert_close(other.class_queries_logits, one.class_queries_logits, atol=1e-5, rtol=1e-4)
    cells = (..., slice(0, 13), slice(0, 18))
    torch.testing.assert_close(other.masks_queries_logits[cells], one.masks_queries_logits[cells], atol=1e-5, rtol=1e-4)
    for name, term in one.loss_dict.items():
        torch.testing.assert_close(other.loss_dict[name], term, atol=1e-5, rtol=1e-4, msg=name)

    def upsampled(output, shape):
        maps = torch.nn.functional.interpolate(output.masks_queries_logits, size=shape, mode="bilinear")
        return maps[..., : size[0], : size[1]]

    torch.testing.assert_close(upsampled(other, padded), upsampled(one, alone), atol=1e-5, rtol=1e-4)


def test_copies_of_a_model_do_not_share_what_is_padding():
    model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=swin())).eval()
    inputs = FAMILIES["maskformer"].inputs()
    expected = model(**inputs)
    twin = copy.deepcopy(model)
    model(torch.randn(1, 3, 32, 64))
    torch.testing.assert_close(twin(**inputs).masks_queries_logits, expected.masks_queries_logits, atol=0, rtol=0)


@pytest.mark.parametrize("backbone", [resnet, swin])
def test_no_pixel_mask_means_no_padding(backbone):
    model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=backbone())).eval()
    pixel_values = torch.randn(1, 3, 72, 104)  # windows that the image does not fill
    expected = model(pixel_values, pixel_mask=torch.ones(1, 72, 104))
    torch.testing.assert_close(model(pixel_values).masks_queries_logits, expected.masks_queries_logits, atol=0, rtol=0)


def test_attend_to_padding_sees_the_padding():
    config = maskcls_config(attend_to_padding=True)
    model = MaskClsForUniversalSegmentation(config).eval()
    batch = FAMILIES["maskformer"].batch()
    with_mask = model(**batch)
    batch.pop("pixel_mask")
    without = model(**batch)
    torch.testing.assert_close(with_mask.masks_queries_logits, without.masks_queries_logits, atol=0, rtol=0)
    torch.testing.assert_close(with_mask.loss, without.loss, atol=0, rtol=0)
    assert with_mask.valid_sizes.tolist() == [list(s) for s in SIZES]


def test_void_is_left_out_of_the_loss():
    model, batch = MaskClsForUniversalSegmentation(maskcls_config()).eval(), FAMILIES["maskformer"].batch()
    void = torch.zeros(2, *PADDED, dtype=torch.bool)
    void[0, :20] = True
    terms = model(**batch, void_mask=void).loss_dict
    batch["mask_labels"] = [masks ^ v for masks, v in zip(batch["mask_labels"], void, strict=True)]
    flipped = model(**batch, void_mask=void).loss_dict
    assert {n: t.item() for n, t in terms.items()} == {n: t.item() for n, t in flipped.items()}


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("convert", [torch.Tensor.int, torch.Tensor.float, torch.Tensor.byte, torch.Tensor.numpy])
def test_void_counts_whatever_its_type(convert, with_padding):
    model, batch = MaskClsForUniversalSegmentation(maskcls_config()).eval(), FAMILIES["maskformer"].batch()
    if not with_padding:
        del batch["pixel_mask"]
    void = torch.zeros(2, *PADDED, dtype=torch.bool)
    void[0, :20] = True
    assert model(**batch, void_mask=convert(void)).loss == model(**batch, void_mask=void).loss != model(**batch).loss


@pytest.mark.parametrize("map_of_places", [False, True])
@pytest.mark.parametrize("size", [(32, 48), (96, 64), (64, 95), (50, 69)])
def test_labels_of_another_size_are_refused(size, map_of_places):
    model, batch = MaskClsForUniversalSegmentation(maskcls_config()), FAMILIES["maskformer"].batch()
    masks = torch.zeros(size, dtype=torch.int32) if map_of_places else torch.ones(1, *size, dtype=torch.bool)
    batch |= {
        "mask_labels": [batch["mask_labels"][0], masks],
        "class_labels": [torch.tensor([0, 1, 2]), torch.tensor([1])],
    }
    with pytest.raises(
        ValueError, match=rf"Image 1: mask_labels .* are {size[0]} x {size[1]}, but pixel_values are 64 x 96"
    ):
        model(**batch)
    with pytest.raises(ValueError, match=r"void_mask .* must be \(2, 64, 96\)"):
        model(**{**FAMILIES["maskformer"].batch(), "void_mask": torch.zeros(2, *size, dtype=torch.bool)})
    baseline = PerPixelForSemanticSegmentation(perpixel_config())
    with pytest.raises(ValueError, match=r"labels .* must be \(B, H, W\), \(2, 64, 96\) as pixel_values"):
        baseline(batch["pixel_values"], labels=torch.zeros(2, *size, dtype=torch.int64))


def test_masks_of_the_images_without_padding_are_padded():
    model, batch = MaskClsForUniversalSegmentation(maskcls_config()).eval(), FAMILIES["maskformer"].batch()
    own = [masks[:, :height, :width] for masks, (height, width) in zip(batch["mask_labels"], SIZES, strict=True)]
    assert model(**{**batch, "mask_labels": own}).loss == model(**batch).loss
    with pytest.raises(ValueError, match="Image 1: mask_labels .* are 50 x 70"):
        model(**{**batch, "mask_labels": own, "pixel_mask": None})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((1, 64, 96), 5), "labels from 5 to 5 do not fit num_labels=5"),
        (torch.full((1, 64, 96), -1), "labels from -1 to -1 do not fit num_labels=5"),
        (torch.full((1, 64, 96), 0.5), "labels: labels must be integers, got torch.float32 with fractions"),
        (torch.zeros(1, 64, 96, 1, dtype=torch.int64), r"labels \(1, 64, 96, 1\) must be \(B, H, W\)"),
        (torch.zeros(2, 64, 96, dtype=torch.int64), r"labels \(2, 64, 96\) must be \(B, H, W\), \(1, 64, 96\)"),
        (torch.zeros(64, 96, dtype=torch.int64), r"labels \(64, 96\) must be \(B, H, W\)"),
    ],
)
def test_pixel_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        PerPixelForSemanticSegmentation(perpixel_config())(torch.randn(1, 3, *PADDED), labels=labels)


def test_pixel_labels_of_every_type_give_the_same_loss():
    model, pixel_values = PerPixelForSemanticSegmentation(perpixel_config()).eval(), torch.randn(1, 3, *PADDED)
    labels = torch.randint(5, (1, *PADDED))
    labels[:, :9] = 255
    expected = model(pixel_values, labels=labels).loss
    for same in (labels.float(), labels.byte(), labels.numpy(), labels.numpy().astype("uint16"), labels.tolist()):
        assert model(pixel_values, labels=same).loss == expected


def test_half_of_the_labels_is_refused():
    with pytest.raises(ValueError, match="belong together"):
        MaskClsForUniversalSegmentation(maskcls_config())(torch.randn(1, 3, *PADDED), class_labels=[torch.tensor([1])])


def test_frozen_batch_norm_stays_as_loaded():
    model = MaskClsForUniversalSegmentation(maskcls_config(freeze_batch_norm=True)).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    model(**FAMILIES["maskformer"].batch()).loss.backward()
    assert norms and all(not norm.training and norm.weight.grad is None for norm in norms)
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))


def test_model_without_heads():
    output = MaskClsModel(maskcls_config()).eval()(torch.randn(2, 3, *PADDED))
    assert output.transformer_decoder_last_hidden_state.shape == (2, 7, 32)


OLD = {0: "road", 1: "sky", 2: "car", 3: "tree", 4: "person"}
NEW = {0: "sky", 1: "bus", 2: "person"}


def unchanged(before: dict, model, changed: list[str]) -> bool:
    return all(torch.equal(before[n], p) for n, p in model.state_dict().items() if not any(c in n for c in changed))


@pytest.mark.parametrize(
    "fields", [{"matching": "bipartite"}, {"matching": "fixed", "num_queries": 5}, {"matching": "box"}, MAX_DEEPLAB]
)
def test_reset_classes_keeps_what_has_the_same_name(fields, tmp_path):
    model = MaskClsForUniversalSegmentation(maskcls_config(id2label=OLD, **fields))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reset_classes(NEW)
    weight, bias = model.segmentation_module.class_predictor.weight, model.segmentation_module.class_predictor.bias
    old_weight, old_bias = (before[f"segmentation_module.class_predictor.{n}"] for n in ("weight", "bias"))
    for row, old_row in ((0, 1), (2, 4), (3, 5)):  # the last is "no object"
        assert torch.equal(weight[row], old_weight[old_row]) and bias[row] == old_bias[old_row]
    assert not any(torch.equal(weight[1], row) for row in old_weight)
    changed = ["class_predictor"]
    if fields.get("semantic_weight"):
        changed.append("semantic_predictor")
        semantic = model.segmentation_module.semantic_predictor.weight
        assert torch.equal(semantic[[0, 2]], before["segmentation_module.semantic_predictor.weight"][[1, 4]])
    if fields["matching"] == "fixed":
        changed.append("queries_embedder")
        queries = model.model.transformer_decoder.queries_embedder.weight
        assert torch.equal(queries[[0, 2]], before["model.transformer_decoder.queries_embedder.weight"][[1, 4]])
    assert unchanged(before, model, changed)
    assert model.config.id2label == NEW and model.config.label2id["bus"] == 1 and model.config.num_labels == 3
    batch = FAMILIES["maskformer"].batch()
    batch["class_labels"][0] = torch.tensor([0, 1, 2])
    assert model(**batch).loss.isfinite()
    model.save_pretrained(tmp_path)
    assert MaskClsForUniversalSegmentation.from_pretrained(tmp_path).config.id2label == NEW


@pytest.mark.parametrize("transformer_module", [False, True])
def test_reset_classes_of_the_baselines(transformer_module):
    config = perpixel_config(id2label=OLD, transformer_module=transformer_module)
    model = PerPixelForSemanticSegmentation(config).eval()
    pixel_values = torch.randn(1, 3, *PADDED)
    before = model(pixel_values).logits
    after = model.reset_classes(NEW)(pixel_values).logits
    assert after.shape[1] == 3
    if not transformer_module:  # with a transformer the queries also see each other
        torch.testing.assert_close(after[:, [0, 2]], before[:, [1, 4]])


@pytest.mark.parametrize("ids", [[0, 1, 2], ["0", "1", "2"], [np.int64(0), np.uint8(1), np.int32(2)], torch.arange(3)])
def test_reset_classes_takes_ids_in_every_form(ids, tmp_path):
    for model in (
        MaskClsForUniversalSegmentation(maskcls_config()),
        PerPixelForSemanticSegmentation(perpixel_config()),
    ):
        model.reset_classes(dict(zip(ids, NEW.values(), strict=True))).save_pretrained(tmp_path)
        assert model.config.id2label == NEW == type(model).from_pretrained(tmp_path).config.id2label


def test_reset_classes_leaves_a_baseline_two_classes():
    model = PerPixelForSemanticSegmentation(perpixel_config(id2label=OLD))
    with pytest.raises(ValueError, match="give it two, one of background"):
        model.reset_classes({0: "sky"})
    assert model.config.id2label == OLD and model.classifier.out_channels == len(OLD)


@pytest.mark.parametrize(
    "names, message",
    [
        ({0: "a", 2: "b"}, "without gaps"),
        ({"1": "a", "2": "b"}, "without gaps"),
        ({"a": 0}, "must be a dict of class ids"),
        ({}, "without gaps"),
        ({0: "a", 1: "a"}, "given twice"),
    ],
)
def test_reset_classes_refuses(names, message):
    with pytest.raises(ValueError, match=message):
        MaskClsForUniversalSegmentation(maskcls_config()).reset_classes(names)


def test_from_pretrained_with_other_classes(tmp_path):
    MaskClsForUniversalSegmentation(maskcls_config()).save_pretrained(tmp_path)
    loaded = MaskClsForUniversalSegmentation.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    classifier = loaded.segmentation_module.class_predictor
    assert classifier.out_features == 10
    assert 0 < classifier.weight.abs().max() <= classifier.in_features**-0.5  # torch's initialization, not old memory


def test_a_backbone_without_a_pyramid_is_refused():
    backbone = resnet()
    backbone.out_features = ["stage4"]
    with pytest.raises(ValueError, match="needs a feature pyramid"):
        MaskClsModel(maskcls_config(backbone_config=backbone))


def test_initialization_follows_the_papers_code():
    torch.manual_seed(0)
    model = MaskClsForUniversalSegmentation(maskcls_config(hidden_size=256, decoder_ffn_dim=1024))
    layer = model.model.transformer_decoder.layers[0]

    def bound(weight, gain=1.0):  # of Xavier's uniform distribution
        return gain * (6 / sum(weight.shape)) ** 0.5

    for weight, limit in (
        (layer.self_attn.q_proj.weight, bound(layer.self_attn.q_proj.weight, 0.5**0.5)),
        (layer.cross_attn.o_proj.weight, bound(layer.cross_attn.o_proj.weight)),
        (layer.mlp.fc1.weight, bound(layer.mlp.fc1.weight)),
    ):
        assert 0.98 * limit < weight.abs().max() <= limit
    assert layer.self_attn.v_proj.bias.abs().max() == layer.cross_attn.o_proj.bias.abs().max() == 0
    assert layer.mlp.fc1.bias.abs().max() > 0
    assert 0.9 < model.model.transformer_decoder.queries_embedder.weight.std() < 1.1
    convolution = model.model.pixel_decoder.mask_projection
    limit = (3 / convolution.weight[0].numel()) ** 0.5  # Kaiming's uniform distribution with a = 1
    assert 0.9 * limit < convolution.weight.abs().max() <= limit and convolution.bias.abs().max() == 0


def test_nothing_of_the_loss_is_saved():
    model = MaskClsForUniversalSegmentation(maskcls_config())
    model(**FAMILIES["maskformer"].batch())
    assert not [
        name for name in model.state_dict() if "criterion" in name or "matcher" in name or "weight_dict" in name
    ]
