"""Configurations: round trips, and refusals that name field, value and choices."""

import json

import numpy as np
import pytest
from transformers import AutoConfig

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, PerPixelConfig
from tiny import MAX_DEEPLAB, maskcls_config, perpixel_config, swin


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
        ({"pixel_decoder": 3}, "pixel_decoder=3 must be the name of a part"),
        ({"transformer_decoder": None}, "transformer_decoder=None must be the name of a part"),
        ({"matching": True}, "matching=True must be the name of a part"),
        ({"losses": {"mine": -1}}, r"losses\['mine'\]=-1 must be a number at least 0"),
        ({"losses": ["mine"]}, r"losses=\['mine'\] must be a dict by names"),
        ({"loss_options": {"mine": {}}}, r"loss_options of \['mine'\], which losses does not have"),
        ({"pixel_decoder_options": 3}, "pixel_decoder_options=3 must be a dict by names"),
        ({"num_queries": 0}, "num_queries=0 must be an integer at least 1"),
        ({"decoder_layers": 2.5}, "decoder_layers=2.5 must be an integer from 1 to 1000"),
        ({"dropout": 1.5}, "dropout=1.5 must be a number from 0 to 1"),
        ({"mask_weight": -1}, "mask_weight=-1 must be a number at least 0"),
        ({"mask_weight": float("inf")}, "mask_weight=inf must be a number at least 0"),
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


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"pixel_decoder": "unet"},
            r"pixel_decoder='unet' must be one of \['deformable', 'fpn', 'fpn_encoder', 'per_pixel'\]",
        ),
        (
            {"transformer_decoder": "big"},
            r"transformer_decoder='big' must be one of \['masked_attention', 'standard'\]",
        ),
        ({"matching": "greedy"}, r"matching='greedy' must be one of \['bipartite', 'box', 'fixed', 'pq'\]"),
    ],
)
def test_names_of_parts_are_refused_where_the_part_is_made(fields, message):
    """Any configuration can be read: the part may come with a checkpoint."""
    config = maskcls_config(**fields)
    with pytest.raises(ValueError, match=message):
        MaskClsForUniversalSegmentation(config).criterion  # noqa: B018


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone": "microsoft/resnet-18", "use_pretrained_backbone": True},
        {"backbone": "resnet18", "use_timm_backbone": True, "backbone_kwargs": {"out_indices": [1, 2]}},
        {"use_pretrained_backbone": True},
    ],
)
@pytest.mark.parametrize("config_class", [MaskClsConfig, PerPixelConfig])
def test_a_backbone_by_name_is_refused(config_class, fields, tmp_path):
    name = fields.get("backbone", "NAME")
    advice = rf"has no .*backbone.*: write {config_class.__name__}.from_backbone\('{name}', .*pretrained weights too"
    with pytest.raises(ValueError, match=advice):
        config_class(**fields)
    config_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=advice):
        config_class.from_pretrained(tmp_path, **fields)


def test_the_decoder_of_transformers_maskformer_is_refused():
    with pytest.raises(ValueError, match=r"has no decoder_config: its fields are num_queries, .* of this class"):
        MaskClsConfig(decoder_config={"model_type": "detr", "num_queries": 7})


def test_unknown_fields_are_pointed_out(tmp_path, caplog):
    backbone = {"model_type": "resnet", "depth": [1, 1], "out_features": ["stage1", "stage2"]}
    MaskClsConfig(num_querys=7, foo=1, backbone_config=backbone)
    MaskClsConfig().save_pretrained(tmp_path)
    MaskClsConfig.from_pretrained(tmp_path, decoder_layer=2)
    for name, meant in (("num_querys", "num_queries"), ("depth", "depths"), ("decoder_layer", "decoder_layers")):
        assert f"no '{name}': did you mean '{meant}'?" in caplog.text
    assert "MaskClsConfig has no 'foo', it has no effect" in caplog.text


@pytest.mark.parametrize("config", [MaskClsConfig(), PerPixelConfig(), MaskClsConfig(backbone_config=swin())])
def test_what_transformers_keeps_is_not_pointed_out(config, tmp_path, caplog):
    config.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(tmp_path, trust_remote_code=False, revision="main", num_labels=3)
    type(config)(**config.to_dict())
    type(config)(**config.to_diff_dict())
    type(config)(output_attentions=True, attn_implementation="eager", torch_dtype="float32", use_cache=False)
    assert not caplog.text


def test_numbers_of_numpy_are_saved_and_count_as_pythons(tmp_path):
    config = MaskClsConfig(
        num_queries=np.int64(7), dropout=np.float32(0.5), deep_supervision=np.bool_(True),
        id2label={np.int64(1): "b", np.uint8(0): "a"},
        backbone_config={"model_type": "resnet", "depths": np.array([1, 1]), "out_features": ["stage1", "stage2"],
                         "hidden_sizes": [np.int64(8), 16]},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = MaskClsConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert (loaded.num_queries, loaded.dropout, loaded.deep_supervision) == (7, 0.5, True)
    assert list(config.id2label.items()) == [(0, "a"), (1, "b")] and config.backbone_config.depths == [1, 1]


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({1: "a", 2: "b"}, r"ids must be 0..K-1 without gaps, got \[1, 2\]"),
        ({"0": "a", "2": "b"}, r"ids must be 0..K-1 without gaps, got \[0, 2\]"),
        ({}, r"ids must be 0..K-1 without gaps, got \[\]"),
        ({"a": 0}, "must be a dict of class ids 0, 1, ... and names, got {'a': 0}"),
        ({0: None}, "must be a dict of class ids 0, 1, ... and names, got {0: None}"),
        ({0.5: "a"}, "must be a dict of class ids 0, 1, ... and names"),
        (["a", "b"], "must be a dict of class ids"),
    ],
)
def test_ids_of_classes_count_from_0(id2label, message, tmp_path):
    for config_class in (MaskClsConfig, PerPixelConfig):
        with pytest.raises(ValueError, match=message):
            config_class(id2label=id2label)
    MaskClsConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "id2label": id2label}))
    with pytest.raises(ValueError, match="id2label"):
        MaskClsConfig.from_pretrained(tmp_path)


def test_an_id_given_twice_is_refused():
    with pytest.raises(ValueError, match="ids must be 0..K-1 without gaps"):
        MaskClsConfig(id2label={"0": "a", 0: "b"})


def test_names_of_classes_alone_are_not_ignored():
    assert MaskClsConfig(label2id={"b": 1, "a": 0, "c": 2}).id2label == {0: "a", 1: "b", 2: "c"}
    assert MaskClsConfig(id2label={0: "a", 1: "b"}).label2id == {"a": 0, "b": 1}


def test_numbers_of_classes_that_contradict_each_other(tmp_path, caplog):
    with pytest.raises(ValueError, match="num_labels=3 but id2label has 1"):
        MaskClsConfig(num_labels=3, id2label={0: "a"})
    assert MaskClsConfig(id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0}).label2id == {"a": 0, "b": 1}
    assert "label2id contradicts id2label" in caplog.text
    caplog.clear()
    MaskClsConfig(id2label={0: "a", 1: "b"}).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, num_labels=3).num_labels == 3  # for a new head
    other = MaskClsConfig.from_pretrained(tmp_path, id2label={0: "c", 1: "d", 2: "e"})
    assert (other.num_labels, other.label2id) == (3, {"c": 0, "d": 1, "e": 2}) and not caplog.text


def test_what_is_changed_while_loading_is_checked(tmp_path):
    MaskClsConfig().save_pretrained(tmp_path)
    assert MaskClsConfig.from_pretrained(tmp_path, num_queries=np.int64(7)).num_queries == 7
    with pytest.raises(ValueError, match="num_queries=0 must be an integer at least 1"):
        MaskClsConfig.from_pretrained(tmp_path, num_queries=0)
    with pytest.raises(ValueError, match="matching=3 must be the name of a part"):
        AutoConfig.from_pretrained(tmp_path, matching=3)


@pytest.mark.parametrize("transformer_module", [False, True])
def test_a_per_pixel_model_needs_two_classes(transformer_module):
    for fields in ({"num_labels": 1}, {"id2label": {0: "nucleus"}}):
        with pytest.raises(ValueError, match="one class has nothing to tell apart: give it two"):
            PerPixelConfig(transformer_module=transformer_module, **fields)


def test_wrong_values_of_the_baseline_are_refused():
    with pytest.raises(ValueError, match="PerPixelConfig: transformer_module='on' must be one of"):
        PerPixelConfig(transformer_module="on")


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder_layers": 10**7},
        {"encoder_layers": 10**7, "pixel_decoder": "fpn_encoder"},
        {"backbone_config": {"model_type": "resnet", "depths": [3, 4, 10**9, 3]}},
        {"backbone_config": {"model_type": "swin", "depths": [2] * 10**5}},
        {"backbone_config": {"model_type": "dinov2", "num_hidden_layers": 10**9}},
        {"backbone_config": {"model_type": "upernet", "backbone_config": {"model_type": "swin", "depths": [1e9]}}},
    ],
)
def test_a_few_bytes_do_not_ask_for_millions_of_layers(fields, tmp_path):
    with pytest.raises(ValueError, match="layers"):
        MaskClsConfig(**fields)
    maskcls_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | fields))
    with pytest.raises(ValueError, match="layers"):
        AutoConfig.from_pretrained(tmp_path)
