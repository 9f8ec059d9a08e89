"""Mask2Former: its parts beside transformers', its checkpoints loaded and saved, and what transformers does wrong."""

import json
import math
import pickle

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    SwinConfig,
)

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, MaskClsImageProcessor, MaskClsModel
from maskcls_hf.convert import from_original, mask2former, save_as_transformers, save_from_original, to_transformers
from maskcls_hf.convert.mask2former import CONFIG_FIELDS, config_from_mask2former, config_to_mask2former
from maskcls_hf.convert.maskformer import rename
from maskcls_hf.convert.original_names import swin_modules
from maskcls_hf.models.deformable_attention import (
    attend_by_bags,
    attend_by_gathering,
    attend_by_grids,
    reference_points,
)
from maskcls_hf.models.transformer_decoders import foreground
from tiny import STAGES, convnext, resnet, swin

CLASSES = {0: "sky", 1: "road", 2: "car"}
LOGITS = ("class_queries_logits", "masks_queries_logits")
SIZES = dict(
    feature_size=32, mask_feature_size=24, hidden_dim=32, encoder_feedforward_dim=40, dim_feedforward=48,
    num_attention_heads=4, encoder_layers=2, decoder_layers=5, num_queries=7, train_num_points=112,
)  # fmt: skip


@torch.no_grad()
def randomized(model):
    """No parameter has a special value: neither the offsets of deformable attention nor its weights are zero."""
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or name.startswith("criterion"):
            continue
        noise = 2 * torch.rand_like(value) - 1
        if value.ndim > 1:
            scale = 3 if "queries" in name else (3 / value[0].numel()) ** 0.5
            value.copy_(noise * scale)
        elif "sampling_offsets" in name:
            value.copy_(noise * 3)
        else:
            value.copy_(0.3 * noise + float(name.endswith(("weight", "running_var"))))
    return model.eval()


def theirs_with(backbone, **fields) -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    options = {"backbone_config": backbone, "id2label": CLASSES} | fields
    return randomized(Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**options)))


def ours_with(**fields) -> MaskClsForUniversalSegmentation:
    """Of ours as it is made new: padding is masked."""
    torch.manual_seed(0)
    config = config_from_mask2former(Mask2FormerConfig(backbone_config=resnet(), id2label=CLASSES, **SIZES).to_dict())
    config = MaskClsConfig(**(config | {"attend_to_padding": False} | fields))
    return randomized(MaskClsForUniversalSegmentation(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mask2former")
    theirs_with(swin(), **SIZES, mask_weight=3.0, no_object_weight=0.3).save_pretrained(path)
    Mask2FormerImageProcessor(
        size={"height": 64, "width": 96}, ignore_index=255, do_reduce_labels=True, num_labels=3
    ).save_pretrained(path)
    return path


@torch.no_grad()
def assert_same_logits(first, second, size: tuple[int, int] = (64, 96), dtype: torch.dtype = torch.float32) -> None:
    """Of all layers, within 1e-4 at a deviation of 0.1 at least."""
    pixel_values = torch.randn(2, 3, *size, dtype=dtype)
    first, second = (model(pixel_values, output_auxiliary_logits=True) for model in (first, second))
    layers = [zip(first.auxiliary_logits, second.auxiliary_logits, strict=True), [(first, second)]]
    for one, other in (pair for pairs in layers for pair in pairs):
        for name in LOGITS:
            assert one[name].std() > 0.1
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-4)


# ---- checkpoints ----


@pytest.mark.parametrize(
    "backbone", [ResNetConfig(out_features=STAGES), SwinConfig(out_features=STAGES)], ids=["r50", "swin_tiny"]
)
def test_full_size(backbone, tmp_path):
    """In float64: in float32 one cell of a masked attention that flips at a tie would exceed any bound."""
    theirs = theirs_with(backbone)
    theirs.save_pretrained(tmp_path)
    ours, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and ours.config.decoder_layers == 9
    assert_same_logits(theirs.double(), ours.double(), (96, 160), torch.float64)


@pytest.mark.parametrize("backbone", [resnet, swin, convnext], ids=["resnet", "swin", "convnext"])
def test_every_kind_of_backbone_and_back(backbone, tmp_path):
    """Theirs as ours, ours as theirs, and those as ours again: the same logits, and the same weights."""
    theirs = theirs_with(backbone(), **SIZES)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(report.values())
    assert_same_logits(theirs, ours)
    back = to_transformers(ours)
    assert type(back) is Mask2FormerForUniversalSegmentation
    state = back.state_dict()
    unused = ".encoder.swin.layernorm."
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items() if unused not in name)


def test_a_folder_both_ways(folder, tmp_path):
    ours = AutoModelForUniversalSegmentation.from_pretrained(folder)
    assert type(ours) is Mask2FormerForUniversalSegmentation  # transformers' own
    ours = MaskClsForUniversalSegmentation.from_pretrained(folder)
    processor = MaskClsImageProcessor.from_pretrained(folder)
    assert (processor.label_offset, processor.void_id, processor.num_labels) == (1, 255, 3)
    ours.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours/config.json").read_text())["model_type"] == "maskcls"
    save_as_transformers(tmp_path / "ours", tmp_path / "theirs")
    again = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "theirs")
    assert_same_logits(ours, again)
    assert type(Mask2FormerImageProcessor.from_pretrained(tmp_path / "theirs")) is Mask2FormerImageProcessor


def test_configuration(folder):
    config = MaskClsConfig.from_pretrained(folder)
    assert config.id2label == {0: "sky", 1: "road", 2: "car"}
    assert (config.pixel_decoder, config.transformer_decoder) == ("deformable", "masked_attention")
    assert (config.mask_loss, config.loss_points, config.mask_weight) == ("cross_entropy", 112, 3.0)
    assert config.decoder_layers == 4 and config.attend_to_padding and config.deep_supervision


def test_fields_both_ways():
    fields = dict(
        feature_size=64, mask_feature_size=24, hidden_dim=48, encoder_layers=3, encoder_feedforward_dim=40,
        dim_feedforward=56, num_attention_heads=6, num_queries=11, dropout=0.3, class_weight=3.0, mask_weight=4.0,
        dice_weight=6.0, no_object_weight=0.5, train_num_points=99, oversample_ratio=2.0, importance_sample_ratio=0.5,
        use_auxiliary_loss=False, init_xavier_std=0.7, output_auxiliary_logits=True, dtype="float16",
        id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1},
    )  # fmt: skip
    assert set(fields) == set(CONFIG_FIELDS.values())
    theirs = Mask2FormerConfig(backbone_config=resnet(), decoder_layers=4, **fields)
    ours = MaskClsConfig(**config_from_mask2former(theirs.to_dict()))
    back = config_to_mask2former(ours)
    assert ours.decoder_layers == 3 and back.decoder_layers == 4
    for name in fields:
        assert getattr(back, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("field", "value"),
    [("pre_norm", True), ("activation_function", "gelu"), ("common_stride", 8), ("enforce_input_projection", True),
     ("feature_strides", [8, 16, 32, 64]), ("decoder_layers", 1)],
)  # fmt: skip
def test_what_has_no_counterpart(field, value):
    with pytest.raises(ValueError, match=rf"Mask2FormerConfig: {field}="):
        config_from_mask2former(Mask2FormerConfig(backbone_config=resnet(), **{field: value}).to_dict())


@pytest.mark.parametrize("options", [{"mask_kernel_size": 3}, {"query_priors": True}, {"fpn_feature_size": 16}])
def test_what_mask2former_lacks(options):
    with pytest.raises(ValueError, match=f"Mask2Former cannot represent.*\n- {next(iter(options))}="):
        to_transformers(ours_with(**options))


def test_what_training_loses_is_said():
    model = ours_with(matching="box", mask_id_weight=0.3, loss_points=None, mask_loss="focal")
    said = " ".join(mask2former.changes(model.config))
    assert all(
        words in said
        for words in ("matching='box'", "no box head", "mask_id_weight", "loss_points=None", "mask_loss='focal'")
    )


# ---- the parts ----


def test_three_forms_of_deformable_attention():
    """One is for GPUs, one for CPUs, one for exporters; with their gradients, and places beyond the maps."""
    torch.manual_seed(0)
    sizes = [(3, 5), (6, 10), (1, 2)]
    values = torch.randn(2, sum(height * width for height, width in sizes), 4, 3, dtype=torch.float64)
    places = torch.rand(2, 9, 4, 3, 2, 2, dtype=torch.float64) * 14 - 2
    weights = torch.rand(2, 9, 4, 6, dtype=torch.float64).softmax(-1)
    inputs = [tensor.requires_grad_() for tensor in (values, places, weights)]
    out = torch.randn(2, 9, 12, dtype=torch.float64)
    results = []
    for form in (attend_by_grids, attend_by_bags, attend_by_gathering):
        attended = form(values, sizes, places, weights)
        results.append([attended, *torch.autograd.grad((attended * out).sum(), inputs)])
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("form", [attend_by_grids, attend_by_bags, attend_by_gathering])
def test_places_far_away_and_none(form):
    """What is far beyond a level counts as zero; a place that is no number shows in the result, of that query alone."""
    values, weights = torch.ones(1, 6, 1, 2), torch.ones(1, 3, 1, 1)
    places = torch.tensor([[1.5, 1.0], [1e30, -1e30], [math.nan, 1.0]]).view(1, 3, 1, 1, 1, 2)
    attended = form(values, [(2, 3)], places, weights)
    torch.testing.assert_close(attended[0], torch.tensor([[1.0] * 2, [0.0] * 2, [math.nan] * 2]), equal_nan=True)


def test_fewer_scales_than_the_decoder_looks_at():
    backbone = resnet()
    backbone.set_output_features_output_indices(out_features=["stage3", "stage4"], out_indices=None)
    config = ours_with(backbone_config=backbone).config
    with pytest.raises(ValueError, match=r"looks at 3 scales, but there are 2: .*\{'levels': 2\}"):
        MaskClsForUniversalSegmentation(config)(torch.randn(1, 3, 64, 64))
    config.transformer_decoder_options = {"levels": 2}
    MaskClsForUniversalSegmentation(config)(torch.randn(1, 3, 64, 64))


def test_reference_points_are_centers_of_cells():
    points = reference_points([(1, 2), (2, 4)], None, torch.empty(0))  # (1, 10, 2, 2)
    assert points[0, :2].tolist() == [[[0.5, 0.5], [1.0, 1.0]], [[1.5, 0.5], [3.0, 1.0]]]
    valid = [torch.tensor([[1, 1]]), torch.tensor([[2, 2]])]
    assert reference_points([(1, 2), (2, 4)], valid, torch.empty(0))[0, 0].tolist() == [[0.5, 0.5], [1.0, 1.0]]


def test_foreground():
    logits = torch.tensor([[[1.0, -1.0, 0.0], [-1.0, -2.0, -3.0], [-1.0, -1.0, 5.0]]])
    assert foreground(logits, None).tolist() == [[[True, False, True], [True] * 3, [False, False, True]]]
    inside = torch.tensor([[[True, True, False]]])  # an empty foreground is the valid image, never padding
    assert foreground(logits, inside).tolist() == [[[True, False, False], [True, True, False], [True, True, False]]]


def test_the_mask_of_an_attention_is_the_resized_mask():
    """Resizing commutes with the product: no mask of full size is made for it."""
    model = ours_with()
    features = model.model.encode(torch.randn(1, 3, 64, 96), None)[1]
    embeddings = torch.randn(1, 7, 32)
    full = model.segmentation_module(embeddings, features).mask_logits
    small = model.segmentation_module(embeddings, features, (2, 3)).mask_logits
    torch.testing.assert_close(small, F.interpolate(full, (2, 3), mode="bilinear"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", [resnet, swin, convnext], ids=["resnet", "swin", "convnext"])
def test_an_image_alone_and_in_a_batch(backbone):
    """Padded keys get no weight, values at padded places are zero after their projection, valid ratios and positions
    come from the mask: the valid area has the same logits."""
    model = ours_with(backbone_config=backbone())
    small, large = torch.randn(3, 64, 96), torch.randn(3, 128, 160)
    pixel_values, pixel_mask = torch.zeros(2, 3, 128, 160), torch.zeros(2, 128, 160)
    pixel_values[0, :, :64, :96], pixel_values[1] = small, large
    pixel_mask[0, :64, :96] = pixel_mask[1] = 1
    with torch.no_grad():
        alone = model(small[None], output_auxiliary_logits=True)
        both = model(pixel_values, pixel_mask=pixel_mask, output_auxiliary_logits=True)
    layers = [*zip(alone.auxiliary_logits, both.auxiliary_logits, strict=True), (alone, both)]
    for one, other in layers:
        torch.testing.assert_close(one["class_queries_logits"][0], other["class_queries_logits"][0], rtol=0, atol=1e-4)
        masks = other["masks_queries_logits"][0, :, :16, :24]
        torch.testing.assert_close(one["masks_queries_logits"][0], masks, rtol=0, atol=1e-4)


def test_half_of_the_parts_each():
    """Masked attention works with the paper's pixel decoder, and deformable attention with its transformer decoder."""
    for fields in ({"pixel_decoder": "fpn"}, {"transformer_decoder": "standard"}):
        model = ours_with(**fields)
        outputs = model(torch.randn(1, 3, 64, 96), output_auxiliary_logits=True)
        assert len(outputs.auxiliary_logits) == (4 if fields.get("pixel_decoder") else 3)


def test_the_base_model_says_that_it_needs_masks():
    with pytest.raises(ValueError, match="call MaskClsForUniversalSegmentation"):
        MaskClsModel(ours_with().config)(torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_half_precision(precision):
    """Places stay in float32, so that bfloat16 moves no offsets: masks stay where they are."""
    model, image = ours_with(), torch.randn(1, 3, 512, 768)
    with torch.no_grad():
        expected = model(image)
        if precision == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                found = model(image)
        else:
            found = model.to(torch.bfloat16)(image.bfloat16())
    masks = found.masks_queries_logits.float()
    assert torch.corrcoef(torch.stack([masks.flatten(), expected.masks_queries_logits.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.1}, {"deep_supervision": False}, {"loss_points": None}, {"mask_loss": "focal"},
     {"output_auxiliary_logits": True}],
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_training(options, checkpointing):
    """A gradient for every parameter that is trained, images without objects or not."""
    model = ours_with(**options).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    labels = [torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)]
    masks = [torch.zeros(2, 64, 96, dtype=torch.bool), torch.zeros(0, 64, 96, dtype=torch.bool)]
    masks[0][0, :20], masks[0][1, 30:] = True, True
    loss = model(torch.randn(2, 3, 64, 96), mask_labels=masks, class_labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_initialization():
    """Of the paper's code (Mask2Former, detectron2): by group of parameters."""
    torch.manual_seed(0)
    config = config_from_mask2former(Mask2FormerConfig(backbone_config=resnet()).to_dict())
    model = MaskClsForUniversalSegmentation(MaskClsConfig(**config))
    state = model.state_dict()
    for name in ("queries_embedder", "queries_features", "level_embedding"):
        weight = state[f"model.transformer_decoder.{name}.weight"]
        assert abs(weight.mean()) < 0.1 and 0.9 < weight.std() < 1.1, name
    attention = "model.pixel_decoder.layers.0.self_attn"
    assert state[f"{attention}.sampling_offsets.weight"].abs().max() == 0
    assert state[f"{attention}.attention_weights.weight"].abs().max() == 0
    bias = state[f"{attention}.sampling_offsets.bias"].view(8, 3, 4, 2)
    torch.testing.assert_close(bias[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    torch.testing.assert_close(bias[1, 2, 1], torch.tensor([2.0, 2.0]))
    for name, inputs, outputs in (
        (f"{attention}.value_proj", 256, 256),
        ("model.pixel_decoder.layers.0.mlp.fc1", 256, 1024),
        ("model.transformer_decoder.layers.0.mlp.fc2", 2048, 256),
        ("model.transformer_decoder.layers.0.cross_attn.q_proj", 256, 3 * 256),
    ):
        expected = (2 / (inputs + outputs)) ** 0.5
        torch.testing.assert_close(state[f"{name}.weight"].std(), torch.tensor(expected), rtol=0.03, atol=0)


# ---- the paper's code ----


def papers_state(theirs, ours, static_query: bool) -> dict[str, torch.Tensor]:
    """Weights by the names of facebookresearch/Mask2Former: those of its decoders written down here, those of the
    backbone as the checkpoints of MaskFormer have them (which the oracle tests)."""
    backbone = {name: original for original, name in swin_modules(ours.config.backbone_config.depths)}
    state = {"criterion.empty_weight": torch.ones(4), "pixel_mean": torch.ones(3, 1, 1)}
    own = {name: value for name, value in ours.state_dict().items() if name.startswith("model.backbone.")}
    for name, value in own.items():
        original = rename(name, backbone)
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [own[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            original, value = original.replace(".q_proj.", ".qkv."), torch.cat(parts)
        state[original] = value
    values = theirs.state_dict()
    pixel, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    decoder, module = "model.pixel_level_module.decoder", "model.transformer_module"
    names = {f"{pixel}.transformer.level_embed": f"{decoder}.level_embed"}
    for leaf in ("weight", "bias"):
        names[f"{predictor}.class_embed.{leaf}"] = f"class_predictor.{leaf}"
        names[f"{predictor}.decoder_norm.{leaf}"] = f"{module}.decoder.layernorm.{leaf}"
        names[f"{pixel}.mask_features.{leaf}"] = f"{decoder}.mask_projection.{leaf}"
        for level in range(3):
            names[f"{predictor}.mask_embed.layers.{level}.{leaf}"] = (
                f"{module}.decoder.mask_predictor.mask_embedder.{level}.0.{leaf}"
            )
            for index in (0, 1):
                names[f"{pixel}.input_proj.{level}.{index}.{leaf}"] = (
                    f"{decoder}.input_projections.{level}.{index}.{leaf}"
                )
        for kind in ("adapter_1", "layer_1"):
            names[f"{pixel}.{kind}.norm.{leaf}"] = f"{decoder}.{kind}.1.{leaf}"
        for layer in range(SIZES["encoder_layers"]):
            one, other = f"{pixel}.transformer.encoder.layers.{layer}", f"{decoder}.encoder.layers.{layer}"
            for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
                names[f"{one}.self_attn.{part}.{leaf}"] = f"{other}.self_attn.{part}.{leaf}"
            for part, of in zip(
                ("norm1", "norm2", "linear1", "linear2"),
                ("self_attn_layer_norm", "final_layer_norm", "fc1", "fc2"),
                strict=True,
            ):
                names[f"{one}.{part}.{leaf}"] = f"{other}.{of}.{leaf}"
        for layer in range(SIZES["decoder_layers"] - 1):
            other = f"{module}.decoder.layers.{layer}"
            one = f"{predictor}.transformer_self_attention_layers.{layer}"
            state[f"{one}.self_attn.in_proj_{leaf}"] = torch.cat(
                [values[f"{other}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            )
            names[f"{one}.self_attn.out_proj.{leaf}"] = f"{other}.self_attn.out_proj.{leaf}"
            names[f"{one}.norm.{leaf}"] = f"{other}.self_attn_layer_norm.{leaf}"
            one = f"{predictor}.transformer_cross_attention_layers.{layer}"
            names[f"{one}.multihead_attn.in_proj_{leaf}"] = f"{other}.cross_attn.in_proj_{leaf}"
            names[f"{one}.multihead_attn.out_proj.{leaf}"] = f"{other}.cross_attn.out_proj.{leaf}"
            names[f"{one}.norm.{leaf}"] = f"{other}.cross_attn_layer_norm.{leaf}"
            one = f"{predictor}.transformer_ffn_layers.{layer}"
            names[f"{one}.norm.{leaf}"] = f"{other}.final_layer_norm.{leaf}"
            for index in (1, 2):
                names[f"{one}.linear{index}.{leaf}"] = f"{other}.fc{index}.{leaf}"
    for kind in ("adapter_1", "layer_1"):
        names[f"{pixel}.{kind}.weight"] = f"{decoder}.{kind}.0.weight"
    query = "static_query" if static_query else "query_feat"
    names[f"{predictor}.{query}.weight"] = f"{module}.queries_features.weight"
    names[f"{predictor}.query_embed.weight"] = f"{module}.queries_embedder.weight"
    names[f"{predictor}.level_embed.weight"] = f"{module}.level_embed.weight"
    return state | {name: values[other] for name, other in names.items()}


@pytest.mark.parametrize("static_query", [False, True])
def test_checkpoints_of_the_papers_code(static_query, tmp_path):
    """`static_query` is an older name of `query_feat`; a name without a place is an error."""
    theirs = theirs_with(swin(), **SIZES)
    theirs.save_pretrained(tmp_path)
    ours = MaskClsForUniversalSegmentation.from_pretrained(tmp_path)
    state = papers_state(theirs, ours, static_query)
    (tmp_path / "model.pkl").write_bytes(
        pickle.dumps({"model": {name: value.numpy() for name, value in state.items()}, "__author__": "x"})
    )
    loaded = from_original(tmp_path / "model.pkl", num_attention_heads=4, id2label=CLASSES)
    assert_same_logits(theirs, loaded)
    assert (loaded.config.compatibility, loaded.config.attend_to_padding, loaded.config.dropout) == ("paper", True, 0)
    save_from_original(tmp_path / "model.pkl", tmp_path / "saved", num_attention_heads=4, id2label=CLASSES)
    assert MaskClsImageProcessor.from_pretrained(tmp_path / "saved").compatibility == "paper"
    for name in ("mask_loss", "loss_points", "mask_weight", "cross_entropy_weight", "encoder_layers", "decoder_layers"):
        expected = getattr(ours.config, name) if name != "loss_points" else 12544
        assert getattr(loaded.config, name) == expected, name
    state["sem_seg_head.predictor.unheard_of.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match="1 without a place in the model: sem_seg_head.predictor.unheard_of.weight"):
        from_original({name: value.numpy() for name, value in state.items()}, num_attention_heads=4)
