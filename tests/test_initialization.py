"""Each parameter that is made new has the mean and the deviation that it has in the papers' code."""

import re

import pytest
import torch
from transformers import Dinov2Config

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation
from tiny import resnet

MASK2FORMER = dict(
    backbone_config=resnet(), pixel_decoder="deformable", transformer_decoder="masked_attention", mask_kernel_size=1,
    decoder_layers=2, encoder_layers=1, encoder_ffn_dim=1024,
)  # fmt: skip
MODELS = {
    "MaskFormer": dict(backbone_config=resnet(), decoder_layers=2),
    "MaskFormer with an encoder": dict(
        backbone_config=resnet(), pixel_decoder="fpn_encoder", encoder_layers=1, decoder_layers=1
    ),
    "Mask2Former": MASK2FORMER,
    "EoMT": dict(
        architecture="encoder_only", query_blocks=1, upscale_blocks=2,
        backbone_config=Dinov2Config(
            hidden_size=128, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
        ),
    ),
}  # fmt: skip


def fans(weight: torch.Tensor) -> tuple[int, int]:
    """Inputs and outputs, as torch counts them."""
    area = weight[0, 0].numel()  # 1 of a matrix
    return weight.shape[1] * area, weight.shape[0] * area


# Groups of weights, the first that matches counts -> bound of their uniform distribution.
UNIFORM = (
    # in_proj_weight of torch's attention has the three one above the other
    (r"_attn\.[qkv]_proj\.", lambda w: (6 / (4 * w.shape[1])) ** 0.5),  # Xavier
    (r"_attn\.(o_proj|value_proj|output_proj)\.|layers\.\d+\.mlp\.|input_projections\.\d\.conv\.",
     lambda w: (6 / sum(fans(w))) ** 0.5),  # Xavier
    (r"pixel_decoder\.|transformer_decoder\.input_projection", lambda w: (3 / fans(w)[0]) ** 0.5),  # Kaiming, a = 1
    (r"segmentation_module\.|upscale\.", lambda w: fans(w)[0] ** -0.5),  # torch's own
)  # fmt: skip
NORMAL = r"queries_(embedder|features)\.|level_embedding\."
ZERO = r"sampling_offsets\.weight|attention_weights\."
# Biases that torch draws; those of attention and of convolutions are 0.
DRAWN_BIASES = r"mlp\.fc\d\.bias|segmentation_module\.|upscale\.\d\.0\."


@pytest.mark.parametrize("family", MODELS)
def test_mean_and_deviation_of_every_group(family):
    """Queries, class head, mask MLP, offsets of deformable attention, projections, FPN, attention, upscaling."""
    torch.manual_seed(0)
    model = MaskClsForUniversalSegmentation(MaskClsConfig(num_labels=40, **MODELS[family]))
    new = {
        name: value
        for name, value in model.named_parameters()
        if ".backbone." not in name and ".vit." not in name and value.numel()
    }
    assert len(new) > 10
    seen = set()
    for name, value in new.items():
        is_norm = "norm" in name.split(".")[-2] or name.split(".")[-2] == "3"
        if is_norm:
            expected, deviation = float(name.endswith("weight")), 0.0
        elif re.search(NORMAL, name):
            expected, deviation = 0.0, 1.0
        elif re.search(ZERO, name):
            expected, deviation = 0.0, 0.0
        elif name.endswith("sampling_offsets.bias"):
            assert value.view(8, 3, 4, 2)[0, 0].tolist() == [[1, 0], [2, 0], [3, 0], [4, 0]], name
            continue
        elif name.endswith("bias"):
            weight = new[name.replace("bias", "weight")]
            expected, deviation = 0.0, (3 * fans(weight)[0]) ** -0.5 if re.search(DRAWN_BIASES, name) else 0.0
        else:
            group, bound = next(pair for pair in UNIFORM if re.search(pair[0], name))
            seen.add(group)
            expected, deviation = 0.0, bound(value) / 3**0.5
            assert value.abs().max() <= bound(value) * 1.0001, name
        error = 5 * deviation / value.numel() ** 0.5
        assert abs(value.mean() - expected) <= error + 1e-7, name
        assert abs(value.std(correction=0) - deviation) <= error + 0.01 * deviation, (name, value.std(), deviation)
    assert len(seen) == (1 if family == "EoMT" else 4)
