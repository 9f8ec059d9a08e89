"""Weights that are at hand only when their module is called: offloaded ones, and adapters in the place of layers."""

import pytest
import torch
from torch import nn

from maskcls_hf import MaskClsForUniversalSegmentation, PerPixelConfig, PerPixelForSemanticSegmentation
from maskcls_hf.models.layers import ValidRegion
from maskcls_hf.models.pixel_decoders import PixelFeatures
from tiny import maskcls_config, pixel_mask, resnet

WHOLE = {"": "disk"}
MAPS = [
    WHOLE,
    {"model": "cpu", "segmentation_module": "disk"},
    {"model": "disk", "segmentation_module": "cpu"},
    {"model.backbone": "disk", "model.pixel_decoder": "cpu", "model.transformer_decoder": "disk",
     "segmentation_module": "cpu"},
]  # fmt: skip
VARIANTS = {
    "plain": {},
    "priors": {"query_priors": True},
    "encoder": {"pixel_decoder": "fpn_encoder"},
    "boxes": {"matching": "box"},
    "pixels": {"semantic_weight": 1.0, "instance_discrimination_weight": 1.0},
    "exclusive": {"exclusive_masks": True},
}


def padded_batch() -> dict:
    mask = pixel_mask([(64, 96), (50, 70)], (64, 96))
    return {"pixel_values": torch.randn(2, 3, 64, 96) * mask[:, None], "pixel_mask": mask}


@pytest.mark.parametrize(("variant", "device_map"), [("plain", m) for m in MAPS] + [(v, WHOLE) for v in VARIANTS])
def test_offloaded_weights(variant, device_map, tmp_path):
    model = MaskClsForUniversalSegmentation(maskcls_config(**VARIANTS[variant])).eval()
    inputs = padded_batch()
    with torch.no_grad():
        expected = model(**inputs)
    model.save_pretrained(tmp_path / "model")
    offloaded = MaskClsForUniversalSegmentation.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        found = offloaded(**inputs, output_hidden_states=variant == "plain")
    for field in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(found[field], expected[field], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transformer_module", [False, True])
def test_offloaded_baselines(transformer_module, tmp_path):
    config = PerPixelConfig(
        backbone_config=resnet(), num_labels=4, transformer_module=transformer_module, hidden_size=32,
        num_attention_heads=4, decoder_layers=1, decoder_ffn_dim=48, fpn_feature_size=32, mask_feature_size=16,
    )  # fmt: skip
    model = PerPixelForSemanticSegmentation(config).eval()
    inputs = padded_batch()
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "model")
    offloaded = PerPixelForSemanticSegmentation.from_pretrained(
        tmp_path / "model", device_map=WHOLE, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        torch.testing.assert_close(offloaded(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


class Adapter(nn.Module):
    """As those of peft: the weights are those of the layer below, the output is not. `pretend`: with its attributes."""

    def __init__(self, base: nn.Module, pretend: bool):
        super().__init__()
        self.base_layer, self.calls = base, 0
        if pretend:
            for name in (
                "out_channels",
                "in_channels",
                "padding",
                "out_features",
                "num_embeddings",
                "num_groups",
                "eps",
            ):
                if hasattr(base, name):
                    setattr(self, name, getattr(base, name))

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, *inputs, **options):
        self.calls += 1
        return self.base_layer(*inputs, **options) * 1.5


def layers(model: nn.Module) -> list[str]:
    kinds = (nn.Conv2d, nn.Linear, nn.Embedding, nn.GroupNorm, nn.LayerNorm)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and "backbone" not in name]


@pytest.mark.parametrize("pretend", [False, True])
def test_an_adapter_on_any_layer_is_called(pretend):
    torch.manual_seed(0)
    model = MaskClsForUniversalSegmentation(maskcls_config(query_priors=True, matching="box")).eval()
    for prior in (model.segmentation_module.class_priors, model.segmentation_module.mask_priors):
        nn.init.normal_(prior.weight)
    inputs = padded_batch()
    found = layers(model)
    assert len(found) > 40
    for path in found:
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(path)
        adapter = Adapter(module, pretend)
        setattr(model.get_submodule(parent), name, adapter)
        with torch.no_grad():
            predicted = model(**inputs)
        calls = adapter.calls
        learned = model(**inputs)
        setattr(model.get_submodule(parent), name, module)
        assert calls and adapter.calls > calls, path
        for field in ("class_queries_logits", "masks_queries_logits", "pred_boxes"):
            torch.testing.assert_close(predicted[field], learned[field], atol=1e-4, rtol=1e-3, msg=path)


def test_a_hook_on_the_mask_projection_is_called():
    model = MaskClsForUniversalSegmentation(maskcls_config()).eval()
    calls = []
    model.model.pixel_decoder.mask_projection.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(**padded_batch())
    assert calls


def test_features_move_to_the_device_of_the_part_that_takes_them():
    """accelerate moves what has a method `to`."""
    region = ValidRegion(torch.tensor([[16, 8]]), (16, 16), complete=False)
    features = PixelFeatures(torch.randn(1, 4, 2, 2), [torch.randn(1, 4, 4, 4)], nn.Conv2d(4, 3, 1), region)
    assert features.to("cpu") is features
    moved = features.to("meta")
    tensors = [moved.context, *moved.pyramid, moved.project(), moved.region.sizes]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.mask_logits(torch.empty(1, 5, 3, device="meta")).shape == (1, 5, 4, 4)
