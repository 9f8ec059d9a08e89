"""EoMT beside transformers', with DINOv2 and with DINOv3."""

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
)

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, MaskClsModel
from tiny import resnet

CLASSES = {0: "sky", 1: "road", 2: "car"}
SIZES = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8, num_blocks=2,
    num_queries=9, num_register_tokens=2, num_upscale_blocks=1, train_num_points=112, id2label=CLASSES,
)  # fmt: skip
FAMILIES = {
    "dinov2": (EomtForUniversalSegmentation, EomtConfig, {}),
    "dinov2 with swiglu": (EomtForUniversalSegmentation, EomtConfig, {"use_swiglu_ffn": True}),
    "dinov3": (EomtDinov3ForUniversalSegmentation, EomtDinov3Config, {"intermediate_size": 48}),
    "dinov3 gated": (
        EomtDinov3ForUniversalSegmentation,
        EomtDinov3Config,
        {"intermediate_size": 48, "use_gated_mlp": True, "key_bias": True},
    ),
}


@torch.no_grad()
def theirs_of(family: str, **fields):
    torch.manual_seed(0)
    model_class, config_class, options = FAMILIES[family]
    model = model_class(config_class(**(SIZES | options | fields)))
    for name, value in model.named_parameters():
        noise = torch.randn_like(value)
        value.add_(noise * 0.1)
        if "layer_scale" in name:
            value.copy_(0.5 + 0.2 * noise)
    return model.eval()


def ours(**fields) -> MaskClsForUniversalSegmentation:
    vit = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8)
    options = dict(architecture="encoder_only", backbone_config=vit, query_blocks=2, upscale_blocks=1, num_queries=9)
    torch.manual_seed(0)
    return MaskClsForUniversalSegmentation(MaskClsConfig(id2label=CLASSES, **(options | fields)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("probability", [0.0, 1.0])
@torch.no_grad()
def test_checkpoints_of_transformers(family, probability, tmp_path):
    """Whether inference has masks (as a network that is still trained) or not (as published)."""
    theirs = theirs_of(family)
    theirs.attn_mask_probs.fill_(probability)
    theirs.save_pretrained(tmp_path)
    model, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert model.config.mask_probabilities == [probability] * 2
    assert (model.config.mask_loss, model.config.loss_points) == ("cross_entropy", 112)
    pixel_values = torch.randn(2, 3, 64, 64)
    expected, found = theirs(pixel_values), model(pixel_values)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert expected[name].std() > 0.1
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)
    again = MaskClsForUniversalSegmentation.from_pretrained(saved(model, tmp_path / "ours"))
    assert torch.equal(again(pixel_values).masks_queries_logits, found.masks_queries_logits)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("probabilities", [[1.0, 1.0], [1.0, 0.5], [0.0, 0.0]])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_a_step_of_training(probabilities, deep_supervision):
    model = ours(mask_probabilities=probabilities, deep_supervision=deep_supervision).train()
    masks = [torch.zeros(2, 64, 96, dtype=torch.bool), torch.zeros(0, 64, 96, dtype=torch.bool)]
    masks[0][0, :20] = masks[0][1, 30:] = True
    labels = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)]
    outputs = model(torch.randn(2, 3, 64, 96), mask_labels=masks, class_labels=labels)
    outputs.loss.backward()
    assert len(outputs.loss_dict) == (9 if deep_supervision else 3)
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_from_a_pretrained_vit(family, tmp_path):
    """One line: its weights, its size, and nothing of it random."""
    fields = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8)
    if family == "dinov2":
        vit = Dinov2Model(Dinov2Config(**fields))
    else:
        vit = DINOv3ViTModel(DINOv3ViTConfig(intermediate_size=48, **fields))
    vit.save_pretrained(tmp_path)
    model = MaskClsForUniversalSegmentation.from_backbone(
        tmp_path, id2label=CLASSES, architecture="encoder_only", query_blocks=2, upscale_blocks=1
    )
    assert model.config.hidden_size == model.config.mask_feature_size == 32
    weights, own = vit.state_dict(), model.model.encoder.vit.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in own.items())
    assert set(weights) - set(own) == {"embeddings.mask_token"}


def test_the_grid_comes_from_the_image():
    """Of any whole patches, not reshaped to a square; other sizes are an error."""
    model = ours().eval()
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 32, 160), output_auxiliary_logits=True)
    assert outputs.masks_queries_logits.shape == (1, 9, 8, 40)
    assert len(outputs.auxiliary_logits) == 2
    with pytest.raises(ValueError, match=r"30 x 64 pixels are no whole patches of 8 x 8.*size_divisor=8"):
        model(torch.randn(1, 3, 30, 64))


def test_blocks_without_a_mask_are_not_predicted():
    """In inference nothing but the last prediction is made."""
    calls = []
    model = ours().eval()
    model.model.encoder.upscale[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone_config": resnet()}, "takes a plain ViT, model_type dinov2 or .* has 'resnet'"),
        ({"query_blocks": 5, "mask_probabilities": [0.0] * 5}, "query_blocks=5 of 4 blocks"),
        ({"mask_probabilities": [0.5]}, r"mask_probabilities=\[0.5\] must be a list of query_blocks=2"),
        ({"mask_probabilities": [0.5, 2]}, "mask_probabilities=2 must be a number from 0 to 1"),
        ({"architecture": "decoder_only"}, "architecture='decoder_only' must be one of"),
    ],
)
def test_wrong_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        ours(**fields)


def test_the_base_class_says_what_it_is_not():
    with pytest.raises(ValueError, match="architecture='encoder_only' has not"):
        MaskClsModel(ours().config)
