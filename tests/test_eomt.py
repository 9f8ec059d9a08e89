"""EoMT beside transformers', with DINOv2 and with DINOv3."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    EomtConfig,
    EomtDinov3Config,
    EomtDinov3ForUniversalSegmentation,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    TimmBackboneConfig,
)

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, MaskClsImageProcessor, MaskClsModel
from maskcls_hf.convert import eomt, processor_to_transformers, save_as_transformers, to_transformers
from maskcls_hf.inference.loading import load_model
from tiny import pixel_mask, resnet

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


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_starts_anew_in_silence(family, tmp_path):
    """What a file lacks, and what it has too much, is in the report by our name; `load_model` refuses it."""
    theirs = theirs_of(family)
    state = dict(theirs.state_dict())
    gone = {"query.weight": "model.encoder.queries_embedder.weight", "layers.2.norm1.bias": None}
    for name in gone:
        del state[name]
    theirs.save_pretrained(tmp_path, state_dict=state | {"layers.9.norm1.bias": torch.zeros(32)})
    model, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    own = model.state_dict()
    assert len(report["missing_keys"]) == 2 and report["missing_keys"] <= own.keys()
    assert gone["query.weight"] in report["missing_keys"]
    assert any(name.endswith("layer.2.norm1.bias") for name in report["missing_keys"])
    assert report["unexpected_keys"] == {"layers.9.norm1.bias"}
    with pytest.raises(ValueError, match=r"lack 2 entries, such as model\.encoder\."):
        load_model(tmp_path)
    theirs.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    fresh = torch.equal(model.model.encoder.queries_embedder.weight, again.model.encoder.queries_embedder.weight)
    assert not fresh and torch.equal(again.model.encoder.queries_embedder.weight, theirs.query.weight)


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


@pytest.mark.parametrize("mask_probability", [0.0, 1.0])
@torch.no_grad()
def test_a_vit_of_timm(mask_probability, tmp_path):
    """From its saved weights: what timm's own blocks give, at another size than its own, with and without masks."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True).eval()
    for parameter in vit.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    timm.models.save_for_hf(vit, tmp_path)
    fields = dict(architecture="encoder_only", query_blocks=2, num_queries=9, mask_probabilities=[mask_probability] * 2)
    model, loaded = MaskClsForUniversalSegmentation.from_backbone(
        tmp_path, id2label=CLASSES, output_loading_info=True, **fields
    )
    assert (model.config.hidden_size, model.config.mask_feature_size, loaded.new) == (192, 192, [])
    own = model.model.encoder.vit._backbone.model.state_dict()
    assert own.keys() == vit.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in vit.state_dict().items())
    pixel_values = torch.randn(2, 3, 96, 256)
    found = model(pixel_values)
    tokens, mask = vit._pos_embed(vit.patch_embed(pixel_values)), None
    for number, block in enumerate(vit.blocks):
        if number == 10:
            queries = model.model.encoder.queries_embedder.weight[None].expand(2, -1, -1)
            tokens = torch.cat([queries, tokens], 1)
        if number >= 10 and mask_probability:
            seen = predicted(model, vit, tokens)[1].flatten(2) > 0
            mask = torch.ones(2, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool)
            mask[:, 0, :9, -96:] = seen
        tokens = block(tokens, attn_mask=mask)
    classes, _, masks = predicted(model, vit, tokens)
    torch.testing.assert_close(found.class_queries_logits, classes, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.masks_queries_logits, masks, rtol=0, atol=1e-4)
    again = MaskClsForUniversalSegmentation.from_pretrained(saved(model, tmp_path / "ours"))
    assert torch.equal(again(pixel_values).masks_queries_logits, found.masks_queries_logits)


def predicted(model, vit, tokens):
    """Class logits, masks at the grid and masks of tokens (2, T, C) with 9 queries first and 6 x 16 patches last."""
    normed = vit.norm(tokens)
    queries, patches = normed[:, :9], normed[:, -96:].transpose(1, 2).unflatten(2, (6, 16))
    for block in model.model.encoder.upscale:
        patches = block(patches)
    masks = torch.einsum("bnc,bchw->bnhw", model.segmentation_module.mask_embedder(queries), patches)
    at_grid = torch.nn.functional.interpolate(masks, (6, 16), mode="bilinear")
    return model.segmentation_module.class_predictor(queries), at_grid, masks


def test_what_is_no_plain_vit_of_timm():
    pytest.importorskip("timm")
    for name, kind in (("vit_small_patch16_dinov3", "Eva"), ("resnet18", "FeatureListNet")):
        with pytest.raises(ValueError, match=f"has '{name}', of {kind}"):
            ours(backbone_config=TimmBackboneConfig(backbone=name, out_indices=[-1]), query_blocks=2)


def test_the_grid_comes_from_the_image():
    """Of any whole patches, not reshaped to a square; other sizes are an error."""
    model = ours().eval()
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 32, 160), output_auxiliary_logits=True)
    assert outputs.masks_queries_logits.shape == (1, 9, 8, 40)
    assert len(outputs.auxiliary_logits) == 2
    with pytest.raises(ValueError, match=r"30 x 64 pixels are no whole patches of 8 x 8.*size_divisor=8"):
        model(torch.randn(1, 3, 30, 64))


@pytest.mark.parametrize("family", ["registers", "plain"])
@torch.no_grad()
def test_positions_at_other_sizes(family):
    """Of an image that is not square, at half and at twice the size: tokens of the ViT of transformers, which resizes
    positions with antialias where it has registers and without where not; at its own size they are left as they are."""
    fields = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8)
    config_class, model_class = {
        "registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
        "plain": (Dinov2Config, Dinov2Model),
    }[family]
    torch.manual_seed(0)
    vit = model_class(config_class(**fields)).eval()
    vit.embeddings.position_embeddings.normal_()
    model = ours(backbone_config=config_class(**fields), query_blocks=1).eval()
    encoder = model.model.encoder
    encoder.vit.load_state_dict({n: t for n, t in vit.state_dict().items() if n != "embeddings.mask_token"})
    positions = vit.embeddings.position_embeddings
    for size in ((64, 64), (32, 40), (128, 96), (32, 128)):  # the last one has as many patches as the first
        pixel_values = torch.randn(2, 3, *size)
        tokens = encoder.access.embed(encoder.vit, pixel_values)
        assert torch.equal(tokens, vit.embeddings(pixel_values))
        grid = positions[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        rows, columns = size[0] // 8, size[1] // 8
        resized = torch.nn.functional.interpolate(
            grid, (rows, columns), mode="bicubic", antialias=family == "registers"
        )
        resized = grid if size == (64, 64) else resized
        patches = vit.embeddings.patch_embeddings(pixel_values) + resized.flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens[:, -rows * columns :], patches, rtol=0, atol=1e-5)
        torch.testing.assert_close(tokens[:, 0], (vit.embeddings.cls_token + positions[:, :1])[:, 0].expand(2, -1))
        assert model(pixel_values).masks_queries_logits.shape[-2:] == (2 * rows, 2 * columns)


@torch.no_grad()
def test_a_checkpoint_at_other_sizes(tmp_path):
    """transformers takes one size alone; ours is what its ViT with resized positions gives: those of a checkpoint whose
    positions were resized before."""
    theirs = theirs_of("dinov2")
    theirs.attn_mask_probs.zero_()
    theirs.save_pretrained(tmp_path)
    model = MaskClsForUniversalSegmentation.from_pretrained(tmp_path)
    larger = theirs_of("dinov2", image_size=96)
    larger.attn_mask_probs.zero_()
    state = theirs.state_dict()
    grid = state["embeddings.position_embeddings.weight"].T.reshape(1, -1, 8, 8)
    resized = torch.nn.functional.interpolate(grid, (12, 12), mode="bicubic", antialias=True)
    larger.load_state_dict(state | {"embeddings.position_embeddings.weight": resized[0].flatten(1).T})
    pixel_values = torch.randn(1, 3, 96, 96)
    expected, found = larger(pixel_values), model(pixel_values)
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.class_queries_logits, expected.class_queries_logits, rtol=0, atol=1e-4)


def test_blocks_without_a_mask_are_not_predicted():
    """In inference nothing but the last prediction is made."""
    calls = []
    model = ours().eval()
    model.model.encoder.upscale[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert len(calls) == 1


@pytest.mark.parametrize("attend_to_padding", [False, True])
@torch.no_grad()
def test_the_vit_runs_once_for_each_size_of_images(attend_to_padding):
    """In whole patches, with nothing but zeros beyond the image; a model that attends to padding sees the batch."""
    model, seen = ours(attend_to_padding=attend_to_padding).eval(), []
    model.model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sizes, padded = [(50, 70), (64, 96), (52, 66), (64, 33)], (64, 96)
    images, mask = torch.randn(4, 3, *padded), pixel_mask(sizes, padded)
    batch = model(images, pixel_mask=mask, output_hidden_states=True)
    if attend_to_padding:
        assert [tuple(values.shape) for values in seen] == [(4, 3, *padded)] and torch.equal(seen[0], images)
        return
    assert [tuple(values.shape) for values in seen] == [(2, 3, 56, 72), (1, 3, *padded), (1, 3, 64, 40)]
    assert torch.equal(seen[0][1, :, :52, :66], images[2, :, :52, :66])
    assert not seen[0][1, :, 52:].any() and not seen[0][1, :, :, 66:].any()
    for place, size in enumerate(sizes):
        height, width = (-(-length // 8) * 8 for length in size)
        crop = images[place : place + 1, :, :height, :width] * mask[place, None, :height, :width]
        alone = model(crop, output_hidden_states=True)
        for found, expected in zip(batch.hidden_states, alone.hidden_states, strict=True):
            if expected.ndim == 4:  # a map goes on over the padding
                rows, columns = (found.shape[dim] - expected.shape[dim] for dim in (2, 3))
                expected = F.pad(expected, (0, columns, 0, rows), mode="replicate")
            torch.testing.assert_close(found[place : place + 1], expected, atol=1e-5, rtol=1e-4)
    assert batch.masks_queries_logits.shape == (4, 9, 16, 24) and batch.valid_sizes.tolist() == [[*s] for s in sizes]


def test_gradients_of_a_padded_batch_are_those_of_its_images():
    model, sizes, padded = ours().train(), [(50, 70), (64, 96), (52, 66)], (64, 96)
    mask = pixel_mask(sizes, padded)
    images = torch.randn(3, 3, *padded) * mask[:, None]
    weights = torch.randn(9, 16, 24)

    def total(output, height, width):
        masks = output.masks_queries_logits[..., : height // 4, : width // 4]
        return (masks * weights[:, : height // 4, : width // 4]).sum() + output.class_queries_logits.square().sum()

    def gradients(loss):
        return torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)

    batch = model(images, pixel_mask=mask)
    of_batch, of_images = torch.zeros(()), torch.zeros(())
    for place, size in enumerate(sizes):
        height, width = (-(-length // 8) * 8 for length in size)
        names = ("class_queries_logits", "masks_queries_logits")
        one = type(batch)(**{name: batch[name][place : place + 1] for name in names})
        of_batch = of_batch + total(one, height, width)
        of_images = of_images + total(model(images[place : place + 1, :, :height, :width]), height, width)
    for found, expected in zip(gradients(of_batch), gradients(of_images), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_images_of_one_size_run_as_they_are():
    """No copy is made where nothing is padded; padding to whole patches alone makes one run, too."""
    model, seen = ours().eval(), []
    model.model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(2, 3, 64, 96)
    model(images, pixel_mask=torch.ones(2, 64, 96))
    model(images, pixel_mask=pixel_mask([(60, 90)] * 2, (64, 96)))
    assert len(seen) == 2 and seen[0] is images and seen[1].shape == images.shape
    with pytest.raises(ValueError, match="60 x 96 pixels are no whole patches of 8 x 8"):
        model(images[:, :, :60], pixel_mask=pixel_mask([(48, 64)] * 2, (60, 96)))


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


# ---- ours as theirs ----


@torch.no_grad()
def ours_of(vit_config, **fields) -> MaskClsForUniversalSegmentation:
    """With every weight changed."""
    model = ours(backbone_config=vit_config, **fields).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_what_training_loses_is_said():
    model = ours(matching="box", mask_id_weight=0.3, loss_points=None, mask_loss="focal", deep_supervision=False)
    said = " ".join(eomt.changes(model.config))
    assert "deep_supervision=False" in said
    assert all(
        words in said
        for words in ("matching='box'", "no box head", "mask_id_weight", "loss_points=None", "mask_loss='focal'")
    )


VITS = {
    "dinov2": Dinov2Config,
    "dinov2 with swiglu": lambda **fields: Dinov2WithRegistersConfig(use_swiglu_ffn=True, **fields),
    "dinov2 with registers": Dinov2WithRegistersConfig,
    "dinov3": lambda **fields: DINOv3ViTConfig(intermediate_size=48, num_register_tokens=2, rope_theta=50.0, **fields),
}


@pytest.mark.parametrize("family", VITS)
@pytest.mark.parametrize("probability", [0.0, 1.0])
@torch.no_grad()
def test_a_model_becomes_theirs(family, probability, tmp_path):
    """Its logits, and its file loads again as ours. The position of a class token is part of the token there."""
    vit = VITS[family](hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8)
    model = ours_of(vit, mask_probabilities=[probability] * 2, no_object_weight=0.2)
    back = to_transformers(model)
    assert type(back) is (EomtDinov3ForUniversalSegmentation if family == "dinov3" else EomtForUniversalSegmentation)
    assert back.attn_mask_probs.tolist() == [probability] * 2 and back.config.no_object_weight == 0.2
    pixel_values = torch.randn(2, 3, 64, 64)
    expected, found = model(pixel_values), back(pixel_values)
    back.save_pretrained(tmp_path)
    again = MaskClsForUniversalSegmentation.from_pretrained(tmp_path)(pixel_values)
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert expected[name].std() > 0.1
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)
        torch.testing.assert_close(again[name], expected[name], rtol=0, atol=1e-4)


@torch.no_grad()
def test_masks_that_do_not_hold_in_evaluation_become_none():
    vit = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8)
    model = ours_of(vit, mask_probabilities=[1.0, 1.0], masks_in_evaluation=False)
    back, pixel_values = to_transformers(model), torch.randn(1, 3, 64, 64)
    assert back.attn_mask_probs.tolist() == [0.0, 0.0]
    expected, found = model(pixel_values).masks_queries_logits, back(pixel_values).masks_queries_logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family, tmp_path):
    """The same weights, and the same configuration."""
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    back = to_transformers(MaskClsForUniversalSegmentation.from_pretrained(tmp_path))
    assert back.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in back.state_dict().items())
    ignored = ("_name_or_path", "architectures", "transformers_version", "label2id")
    for name, value in theirs.config.to_dict().items():
        assert name in ignored or back.config.to_dict()[name] == value, name


@pytest.mark.parametrize(
    ("processor", "side"),
    [
        (dict(size={"shortest_edge": 64, "longest_edge": 64}, pad_size={"height": 64, "width": 64}, pad_value=0), 64),
        (dict(size={"shortest_edge": 96, "longest_edge": 96}, pad_size={"height": 96, "width": 96}, pad_value=0), 96),
        (dict(size={"shortest_edge": 96}, do_split_image=True, label_offset=1), 96),
    ],
)
@torch.no_grad()
def test_a_folder_becomes_theirs(processor, side, tmp_path):
    """For the size that its image processor gives, which is converted too."""
    vit = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8
    )
    model = ours_of(vit, attend_to_padding=True)  # as theirs does
    model.save_pretrained(tmp_path / "ours")
    MaskClsImageProcessor(**processor).save_pretrained(tmp_path / "ours")
    save_as_transformers(tmp_path / "ours", tmp_path / "theirs")
    theirs = EomtForUniversalSegmentation.from_pretrained(tmp_path / "theirs")
    their_processor = EomtImageProcessor.from_pretrained(tmp_path / "theirs")
    image = torch.randint(0, 256, (3, 60, 100), dtype=torch.uint8)
    inputs = their_processor(image, return_tensors="pt")
    our_inputs = MaskClsImageProcessor.from_pretrained(tmp_path / "ours")(image, return_tensors="pt")
    assert inputs.pixel_values.shape[-2:] == (side, side) == (theirs.config.image_size,) * 2
    torch.testing.assert_close(our_inputs.pixel_values, inputs.pixel_values, rtol=0, atol=1e-5)
    found, expected = theirs(**inputs), model(**our_inputs)
    torch.testing.assert_close(found.masks_queries_logits, expected.masks_queries_logits, rtol=0, atol=1e-4)
    assert their_processor.ignore_index == (255 if processor.get("label_offset") else None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_priors": True}, "query_priors=True"),
        ({"exclusive_masks": True}, "exclusive_masks=True"),
        ({"backbone_config": Dinov2Config(hidden_act="relu")}, "backbone_config.hidden_act='relu'"),
        ({"backbone_config": Dinov2Config(qkv_bias=False)}, "backbone_config.qkv_bias=False"),
        ({"backbone_config": TimmBackboneConfig(backbone="vit_tiny_patch16_224")}, "model_type='timm_backbone'"),
    ],
)
def test_what_eomt_of_transformers_lacks(fields, message):
    with torch.device("meta"), pytest.raises(ValueError, match=f"EoMT cannot represent.*\n- .*{message}"):
        to_transformers(ours(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "size={.*512.*}, pad_size=None"),
        ({"size": {"height": 64, "width": 64}}, "size="),
        ({"size": {"shortest_edge": 64}, "do_split_image": True, "do_autocontrast": True}, "do_autocontrast=True"),
        ({"size": {"shortest_edge": 64, "longest_edge": 99}, "do_split_image": True}, "with do_split_image=True"),
        ({"label_offset": 2}, "label_offset=2"),
    ],
)
def test_images_that_eomt_of_transformers_cannot_make(fields, message):
    with pytest.raises(ValueError, match=message):
        processor_to_transformers(MaskClsImageProcessor(**fields), EomtImageProcessor)
