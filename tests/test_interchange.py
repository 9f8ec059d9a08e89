"""Checkpoints of transformers' MaskFormer load as ours, and ours can be saved as theirs."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    MaskFormerModel,
    ResNetConfig,
    SwinConfig,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from maskcls_hf import (
    MaskClsConfig,
    MaskClsForUniversalSegmentation,
    MaskClsImageProcessor,
    MaskClsModel,
    PerPixelForSemanticSegmentation,
)
from maskcls_hf.convert import processor_to_transformers, save_as_transformers, to_transformers
from maskcls_hf.convert.maskformer import (
    CONFIG_FIELDS,
    DECODER_FIELDS,
    config_from_maskformer,
    maskformer_modules,
    rename,
)
from tiny import STAGES, convnext, maskcls_config, perpixel_config, resnet, swin

DEEPLAB = resnet().to_dict() | {"layer_type": "bottleneck", "stem_type": "deep", "depths": [1, 1, 1, 3]}
BACKBONES = {"resnet": resnet, "swin": swin, "convnext": convnext}
LOGITS = ("class_queries_logits", "masks_queries_logits")


@torch.no_grad()
def randomised(model):
    """No parameter and no statistic of a norm has a special value, and queries differ."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or name.endswith("empty_weight"):
            continue
        noise = 2 * torch.rand_like(value) - 1
        if value.ndim > 1:
            value.copy_(noise * 3 if "queries_embedder" in name else noise * (3 / value[0].numel()) ** 0.5)
        else:
            value.copy_(0.3 * noise + float(name.endswith(("weight", "running_var"))))
    return model.eval()


def theirs_like(config: MaskClsConfig, **fields) -> MaskFormerForInstanceSegmentation:
    """A random MaskFormer of transformers with the sizes of `config`."""
    decoder = {theirs: getattr(config, ours) for ours, theirs in DECODER_FIELDS.items()} | {"model_type": "detr"}
    sizes = {name: getattr(config, name) for name in ("fpn_feature_size", "mask_feature_size", "backbone_config")}
    options = {"decoder_config": decoder, "id2label": config.id2label, **sizes, **fields}
    return randomised(MaskFormerForInstanceSegmentation(MaskFormerConfig(**options)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checkpoint of transformers' MaskFormer, with its image processor."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("maskformer")
    config = maskcls_config(backbone_config=swin(), id2label={0: "sky", 1: "road", 2: "car"}, dropout=0.2)
    theirs_like(config, mask_weight=5.0, no_object_weight=0.3).save_pretrained(path)
    MaskFormerImageProcessor(
        size={"height": 64, "width": 96}, ignore_index=255, do_reduce_labels=True, num_labels=3
    ).save_pretrained(path)
    return path


@torch.no_grad()
def assert_same_logits(first, second, tolerance: float = 1e-4, size: tuple[int, int] = (64, 96)) -> None:
    pixel_values = torch.randn(2, 3, *size)
    first, second = first(pixel_values), second(pixel_values)
    for name in LOGITS:
        assert first[name].std() > 0.1
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


# ------------------------------------------------------------------ theirs -> ours


@pytest.mark.parametrize(
    ("backbone", "save_options"),
    [(ResNetConfig(out_features=STAGES), {"max_shard_size": "60MB"}), (SwinConfig(out_features=STAGES), {})],
    ids=["r50_sharded", "swin_tiny"],
)
def test_full_size(backbone, save_options, tmp_path):
    theirs = randomised(MaskFormerForInstanceSegmentation(MaskFormerConfig(backbone_config=backbone, num_labels=150)))
    theirs.save_pretrained(tmp_path, **save_options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(save_options)
    ours, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert not ours.training
    assert_same_logits(theirs, ours, size=(96, 160))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_kind_of_backbone_and_back(name, tmp_path):
    """Ours, saved as theirs by transformers, loads as ours with nothing changed."""
    config = maskcls_config(backbone_config=BACKBONES[name](), attend_to_padding=True)
    ours = randomised(MaskClsForUniversalSegmentation(config))
    theirs = to_transformers(ours)
    assert_same_logits(ours, theirs)
    theirs.save_pretrained(tmp_path)
    again = MaskClsForUniversalSegmentation.from_pretrained(tmp_path)
    state, expected = again.state_dict(), ours.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def test_heads_that_they_lack_stay_behind():
    config = maskcls_config(matching="box", semantic_weight=1.0, attend_to_padding=True)
    ours = randomised(MaskClsForUniversalSegmentation(config))
    assert_same_logits(ours, to_transformers(ours))


def test_configuration(folder):
    config = MaskClsConfig.from_pretrained(folder)
    assert isinstance(config, MaskClsConfig) and config.model_type == "maskcls"
    assert config.id2label == {0: "sky", 1: "road", 2: "car"}
    assert (config.mask_weight, config.no_object_weight, config.dropout) == (5.0, 0.3, 0.2)
    assert config.attend_to_padding and config.deep_supervision and not config.freeze_batch_norm
    assert config.backbone_config.model_type == "swin" and config.backbone_config.window_size == 4
    assert MaskClsConfig.from_pretrained(folder, num_queries=9).num_queries == 9
    assert MaskClsConfig.from_pretrained(folder, num_labels=6).num_labels == 6


def test_fields_both_ways():
    """Every field in the tables survives the way there and back."""
    changed = dict(fpn_feature_size=64, mask_feature_size=24, num_queries=11, hidden_size=48, num_attention_heads=6)
    changed |= dict(decoder_layers=2, decoder_ffn_dim=40, dropout=0.3, cross_entropy_weight=2.0, mask_weight=3.0)
    changed |= dict(dice_weight=4.0, no_object_weight=0.5, init_xavier_std=0.7, dtype="float16")
    changed |= dict(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, output_auxiliary_logits=True)
    changed |= dict(attend_to_padding=True)
    fields = CONFIG_FIELDS.keys() | DECODER_FIELDS.keys()
    assert fields == changed.keys() - {"attend_to_padding"}
    config = maskcls_config(**changed)
    model = MaskClsForUniversalSegmentation(config)
    again = MaskClsConfig(**config_from_maskformer(to_transformers(model).config.to_dict()))
    assert {name: getattr(again, name) for name in changed} == {name: getattr(config, name) for name in changed}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_config": {"model_type": "detr", "auxiliary_loss": True}}, "decoder_config.auxiliary_loss=True"),
        ({"decoder_config": {"model_type": "detr", "activation_function": "gelu"}}, "activation_function='gelu'"),
        ({"backbone_config": {"model_type": "swin", "use_absolute_embeddings": True}}, "use_absolute_embeddings=True"),
    ],
)
def test_configurations_without_counterpart(fields, message, tmp_path):
    MaskFormerConfig(**fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MaskClsConfig.from_pretrained(tmp_path)


def test_names_are_one_to_one():
    modules = maskformer_modules(3, swin())
    back = {theirs: ours for ours, theirs in modules.items()}
    assert len(back) == len(modules)
    names = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=swin())).state_dict()
    assert all(rename(rename(name, modules), back) == name for name in names)
    assert not {name for name in names if rename(name, modules) == name}


def test_options_of_from_pretrained(folder):
    def load(**options):
        return MaskClsForUniversalSegmentation.from_pretrained(folder, **options)

    plain = load()
    assert plain.config.name_or_path == plain.name_or_path == str(folder)
    assert load(dtype=torch.float16).dtype == torch.float16 and plain.dtype == torch.float32
    assert load(id2label={0: "a", 1: "b", 2: "c"}).config.id2label == {0: "a", 1: "b", 2: "c"}
    assert load(attn_implementation="eager").config._attn_implementation == "eager"
    assert not load(attend_to_padding=False).config.attend_to_padding

    fewer, report = load(num_labels=2, ignore_mismatched_sizes=True, output_loading_info=True)
    assert fewer.segmentation_module.class_predictor.out_features == 3
    assert {entry[0] for entry in report["mismatched_keys"]} == {
        "segmentation_module.class_predictor.weight",
        "segmentation_module.class_predictor.bias",
    }
    config = MaskClsConfig.from_pretrained(folder)
    config.mask_weight = 7.0
    assert load(config=config).config.mask_weight == 7.0
    assert_same_logits(plain, load(config=config), tolerance=0)


def test_the_network_without_heads(folder):
    headless = MaskClsModel.from_pretrained(folder)
    whole = MaskClsForUniversalSegmentation.from_pretrained(folder).model
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in headless.state_dict().items())


def test_missing_weights_are_reported(folder, tmp_path):
    """A checkpoint of theirs without heads: ours start fresh, and the report says so."""
    MaskFormerModel.from_pretrained(folder).save_pretrained(tmp_path)
    model, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    heads = {name for name in model.state_dict() if name.startswith("segmentation_module.")}
    assert set(report["missing_keys"]) == heads and not report["unexpected_keys"]


def test_torch_files(folder, tmp_path):
    """Files of tensors in a pickle; nothing else in it is unpickled."""
    theirs = MaskFormerForInstanceSegmentation.from_pretrained(folder)
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ours = MaskClsForUniversalSegmentation.from_pretrained(tmp_path)
    assert_same_logits(theirs, ours)

    torch.save({"class_predictor.weight": RunsCode(tmp_path / "trace")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        MaskClsForUniversalSegmentation.from_pretrained(tmp_path)
    assert not (tmp_path / "trace").exists()


class RunsCode:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_what_was_loaded_is_saved_as_ours(folder, tmp_path):
    model = MaskClsForUniversalSegmentation.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "maskcls"
    assert_same_logits(model, MaskClsForUniversalSegmentation.from_pretrained(tmp_path), tolerance=0)


def test_our_own_checkpoints_go_the_ordinary_way(tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("read as a checkpoint of transformers' MaskFormer")

    monkeypatch.setattr(MaskFormerForInstanceSegmentation, "from_pretrained", never)
    for model in (
        MaskClsForUniversalSegmentation(maskcls_config()),
        PerPixelForSemanticSegmentation(perpixel_config()),
    ):
        model.save_pretrained(tmp_path)
        assert type(model).from_pretrained(tmp_path).config.to_dict().keys() == model.config.to_dict().keys()
        assert type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    with pytest.raises(OSError, match="nowhere"):
        MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "nowhere")


def test_image_processor(folder):
    theirs, ours = MaskFormerImageProcessor.from_pretrained(folder), MaskClsImageProcessor.from_pretrained(folder)
    assert (ours.void_id, ours.label_offset, ours.num_labels, ours.size_divisor) == (255, 1, 3, 32)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    labels = np.random.default_rng(1).integers(0, 4, (40, 50), dtype=np.uint8)
    theirs, ours = (processor(image, labels, return_tensors="pt") for processor in (theirs, ours))
    torch.testing.assert_close(theirs["pixel_values"], ours["pixel_values"])
    assert torch.equal(theirs["class_labels"][0], ours["class_labels"][0])
    assert torch.equal(theirs["mask_labels"][0], ours["mask_labels"][0].float())


# ------------------------------------------------------------------ ours -> theirs


def warnings_of(convert, *arguments) -> str:
    with CaptureLogger(logging.get_logger("maskcls_hf.convert.to_transformers")) as captured:
        convert(*arguments)
    return captured.out


def test_a_folder_becomes_theirs(tmp_path):
    config = maskcls_config(backbone_config=swin(), attend_to_padding=True)
    ours = randomised(MaskClsForUniversalSegmentation(config))
    ours.save_pretrained(tmp_path / "ours")
    assert "has no image processor" in warnings_of(save_as_transformers, tmp_path / "ours", tmp_path / "theirs")
    MaskClsImageProcessor(label_offset=1, num_labels=5).save_pretrained(tmp_path / "ours")
    save_as_transformers(tmp_path / "ours", tmp_path / "theirs")
    theirs = AutoModelForUniversalSegmentation.from_pretrained(tmp_path / "theirs")
    assert type(theirs) is MaskFormerForInstanceSegmentation
    assert_same_logits(ours, theirs)
    processor = MaskFormerImageProcessor.from_pretrained(tmp_path / "theirs")
    assert (processor.ignore_index, processor.do_reduce_labels, processor.num_labels) == (255, True, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pixel_decoder": "fpn_encoder"}, "pixel_decoder='fpn_encoder'"),
        ({"fpn_feature_size": 48}, "fpn_feature_size=48"),
        ({"exclusive_masks": True}, "exclusive_masks=True"),
        ({"backbone_config": ResNetConfig(**DEEPLAB)}, "stem_type='deep'"),
        ({"backbone_config": ResNetConfig(**DEEPLAB, last_stage_dilations=[1, 2, 4])}, "last_stage_dilations"),
        (
            {"backbone_config": SwinConfig(**swin().to_dict() | {"out_features": STAGES[1:], "out_indices": None})},
            "all four stages",
        ),
    ],
)
def test_models_that_they_cannot_represent(fields, message):
    with pytest.raises(ValueError, match=message):
        to_transformers(MaskClsForUniversalSegmentation(maskcls_config(**fields)))


def test_per_pixel_models_and_label_offsets_that_they_cannot_represent(tmp_path):
    model = PerPixelForSemanticSegmentation(perpixel_config())
    with pytest.raises(ValueError, match="model_type='maskcls_perpixel'"):
        to_transformers(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type='maskcls_perpixel'"):
        save_as_transformers(tmp_path, tmp_path / "theirs")
    with pytest.raises(ValueError, match="label_offset=2"):
        processor_to_transformers(MaskClsImageProcessor(label_offset=2))


def test_what_gets_lost_is_said():
    """What changes training or padded batches only is a warning; without any such thing there is none."""
    lost = dict(attend_to_padding=False, deep_supervision=True, freeze_batch_norm=True)
    lost |= dict(matching="fixed", num_queries=5)
    kept = dict(attend_to_padding=True, deep_supervision=False)
    words = ("pixel_mask", "use_auxiliary_loss", "batch norms", "bipartite")
    boxes = kept | dict(matching="box", semantic_weight=1.0, pq_weight=3.0)
    words_of_boxes = ("bipartite", "pred_boxes", "pq_weight, semantic_weight.")
    for fields, expected in ((lost, words), (kept, ()), (boxes, words_of_boxes)):
        model = MaskClsForUniversalSegmentation(maskcls_config(**fields))
        said = warnings_of(to_transformers, model)
        assert [word for word in dict.fromkeys(words + words_of_boxes) if word in said] == list(expected)
    said = warnings_of(processor_to_transformers, MaskClsImageProcessor(label_ids_to_fuse=[1, 2]))
    assert "label_ids_to_fuse=[1, 2]" in said and "aspect ratio" in said
