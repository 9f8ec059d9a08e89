"""Configurations: round trips, and refusals that name field, value and choices."""

import pytest

from maskcls_hf import MaskClsConfig, PerPixelConfig
from tiny import MAX_DEEPLAB, maskcls_config, perpixel_config


def test_defaults_are_the_papers():
    config = MaskClsConfig()
    assert config.backbone_config.model_type == "resnet" and len(config.backbone_config.out_features) == 4
    assert (config.num_queries, config.decoder_layers, config.hidden_size, config.mask_feature_size) == (
        100,
        6,
        256,
        256,
    )
    assert (config.mask_weight, config.dice_weight, config.cross_entropy_weight, config.no_object_weight) == (
        20,
        1,
        1,
        0.1,
    )
    assert config.deep_supervision and not config.attend_to_padding and config.matching == "bipartite"
    assert (config.box_weight, config.giou_weight) == (5, 2)  # DETR's
    assert not config.exclusive_masks and not any(getattr(config, name) for name in MAX_DEEPLAB if "weight" in name)


@pytest.mark.parametrize("make", [maskcls_config, perpixel_config])
def test_save_and_load(make, tmp_path):
    fields = MAX_DEEPLAB if make is maskcls_config else {}
    config = make(hidden_size=64, id2label={0: "a", 1: "b"}, **fields)
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.backbone_config.hidden_sizes == [8, 16, 24, 32] and loaded.id2label == {0: "a", 1: "b"}


def test_max_deeplab_has_none_of_the_weights_of_the_paper():
    config = maskcls_config(**MAX_DEEPLAB, cross_entropy_weight=0, mask_weight=0, dice_weight=0)
    assert config.matching == "pq" and config.exclusive_masks


def test_backbone_from_a_dict():
    config = MaskClsConfig(
        backbone_config={"model_type": "swin", "embed_dim": 48, "out_features": ["stage1", "stage2"]}
    )
    assert config.backbone_config.embed_dim == 48


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mask_kernel_size": 4}, "mask_kernel_size=4 must be odd"),
        ({"mask_upsampling": 2}, "mask_upsampling=2 is for pixel_decoder='per_pixel' only"),
        (
            {"pixel_decoder": "per_pixel", "mask_upsampling": 2, "semantic_weight": 1},
            "masks as large as their embeddings, that is mask_upsampling=1, not 2",
        ),
        ({"pixel_decoder": "unet"}, r"pixel_decoder='unet' must be one of \['fpn', 'fpn_encoder', 'per_pixel'\]"),
        ({"transformer_decoder": "big"}, r"transformer_decoder='big' must be one of \['standard'\]"),
        ({"matching": "greedy"}, r"matching='greedy' must be one of \['bipartite', 'fixed', 'box', 'pq'\]"),
        ({"num_queries": 0}, "num_queries=0 must be an integer at least 1"),
        ({"decoder_layers": 2.5}, "decoder_layers=2.5 must be an integer at least 1"),
        ({"dropout": 1.5}, "dropout=1.5 must be a number from 0 to 1"),
        ({"mask_weight": -1}, "mask_weight=-1 must be a number at least 0"),
        ({"deep_supervision": "yes"}, "deep_supervision='yes' must be one of"),
        ({"hidden_size": 100}, "hidden_size=100 must be divisible by 16"),
        ({"backbone_config": {"model_type": "nope"}}, "model_type='nope' is not a model type"),
        ({"backbone_config": 3}, "backbone_config=3 must be"),
        ({"matching": "fixed", "num_queries": 4, "num_labels": 5}, "num_queries=4 must equal num_labels=5"),
        (
            {"cross_entropy_weight": 0, "mask_weight": 0, "dice_weight": 0},
            "matching='bipartite' needs a weight above 0 among cross_entropy_weight, mask_weight, dice_weight",
        ),
        (
            {"matching": "box", "cross_entropy_weight": 0, "box_weight": 0, "giou_weight": 0.0},
            "matching='box' needs a weight above 0 among cross_entropy_weight, box_weight, giou_weight",
        ),
        ({"giou_weight": -2}, "giou_weight=-2 must be a number at least 0"),
        ({"semantic_weight": "on"}, "semantic_weight='on' must be a number at least 0"),
        ({"pq_weight": True}, "pq_weight=True must be a number at least 0"),
        ({"exclusive_masks": 1}, "exclusive_masks=1 must be one of"),
        ({"exclusive_masks": True, "num_queries": 1}, "num_queries=1 must be at least 2"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MaskClsConfig(**fields)


def test_wrong_values_of_the_baseline_are_refused():
    with pytest.raises(ValueError, match="PerPixelConfig: transformer_module='on' must be one of"):
        PerPixelConfig(transformer_module="on")
