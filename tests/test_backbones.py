"""Every kind of backbone through the same questions; then the simple feature pyramid of plain ViTs."""

import copy
from collections.abc import Callable, Collection, Iterable
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    BeitConfig,
    BitConfig,
    ConvNextV2Config,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    FocalNetConfig,
    MaskFormerSwinConfig,
    PreTrainedConfig,
    ResNetConfig,
    Swinv2Config,
    TimmBackboneConfig,
    VitDetConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from distributed import run_in_processes
from maskcls_hf import MaskClsForUniversalSegmentation
from maskcls_hf.convert import open_backbone, to_transformers
from maskcls_hf.models.backbones import build_backbone, check_maps, dry_run
from maskcls_hf.training.optim import build_optimizer
from tiny import STAGES, convnext, maskcls_config, pad_labels, pixel_mask, resnet, segments, swin

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def timm_backbone(name: str, *out_indices: int) -> Callable[[], PreTrainedConfig]:
    return lambda: TimmBackboneConfig(backbone=name, out_indices=out_indices)


def dinov2(**fields) -> Dinov2Config:
    return Dinov2Config(**VIT, image_size=56, patch_size=14, **fields)


def dinov3_vit(**fields) -> DINOv3ViTConfig:
    return DINOv3ViTConfig(**VIT, intermediate_size=48, num_register_tokens=2, image_size=64, **fields)


STAGED: dict[str, Callable[[], PreTrainedConfig]] = {
    "resnet": resnet,
    "swin": swin,
    "swinv2": lambda: Swinv2Config(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4, image_size=128, out_features=STAGES
    ),
    "convnext": convnext,
    "convnextv2": lambda: ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=STAGES),
    "dinov3_convnext": lambda: DINOv3ConvNextConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=STAGES
    ),
    "timm_resnet18": timm_backbone("resnet18", 1, 2, 3, 4),
    "timm_resnet50": timm_backbone("resnet50", 1, 2, 3, 4),
    "timm_mobilenetv3": timm_backbone("mobilenetv3_small_050", 1, 2, 3, 4),
    "timm_efficientnet": timm_backbone("efficientnet_b0", 1, 2, 3, 4),
    "timm_convnext": timm_backbone("convnext_atto", 0, 1, 2, 3),
}
PLAIN: dict[str, Callable[[], PreTrainedConfig]] = {
    "dinov2": dinov2,
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**VIT, image_size=64, patch_size=16),
    "dinov3_vit": dinov3_vit,
    "timm_vit": timm_backbone("vit_tiny_patch16_224", -1),
    "beit": lambda: BeitConfig(**VIT, intermediate_size=48, image_size=64),
    "vitdet": lambda: VitDetConfig(**VIT, image_size=64, pretrain_image_size=64),
}
ONE_SIZE = ("swin", "swinv2", "dinov2_with_registers", "vitdet")  # an exported program takes no other
HEAVY = ("timm_resnet50", "timm_efficientnet")


def each(names: Iterable[str], slow: Collection[str] = HEAVY) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names])


every_backbone = each((*STAGED, *PLAIN))
every_plain_vit = each(PLAIN)


def config_of(name: str) -> PreTrainedConfig:
    return (STAGED | PLAIN)[name]()


def model_of(name: str, **fields) -> MaskClsForUniversalSegmentation:
    torch.manual_seed(0)
    fields = {"decoder_layers": 1, "dropout": 0.0, **fields}
    model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=config_of(name), **fields)).eval()
    for parameter_name, parameter in model.model.backbone.named_parameters():
        if "grn." in parameter_name:  # zero at first: response norms would do nothing
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def batch_of(sizes: list[tuple[int, int]], padded: tuple[int, int]) -> dict:
    masks, labels = segments(sizes, [3] * len(sizes))
    mask = pixel_mask(sizes, padded)
    values = torch.randn(len(sizes), 3, *padded) * mask[:, None]
    return {
        "pixel_values": values,
        "pixel_mask": mask,
        "mask_labels": pad_labels(masks, padded),
        "class_labels": labels,
    }


@every_backbone
def test_every_parameter_learns_and_the_loss_falls(name):
    """In a padded batch; DDP would stop at a parameter without a gradient."""
    model = model_of(name).train()
    batch = batch_of([(64, 96), (50, 70)], (64, 96))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)  # of stochastic depth
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        assert [n for n, parameter in parameters.items() if parameter.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


PARTLY_USED: dict[str, Callable[[], PreTrainedConfig]] = {
    "resnet_without_its_last_stage": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES[:3]
    ),
    "bit": lambda: BitConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_groups=4, out_features=STAGES
    ),
    "focalnet": lambda: FocalNetConfig(
        embed_dim=8, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], out_features=STAGES
    ),
    "maskformer-swin": lambda: MaskFormerSwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=STAGES
    ),
    "pp_lcnet": lambda: CONFIG_MAPPING["pp_lcnet"](out_features=STAGES),
    "timm_resnet18_without_its_last_stage": timm_backbone("resnet18", 1, 2, 3),
}


@pytest.mark.parametrize("name", PARTLY_USED)
def test_what_no_map_depends_on_is_kept_and_does_not_learn(name, tmp_path):
    """DDP would stop at a parameter without a gradient; a checkpoint has it as ever."""
    torch.manual_seed(0)
    config = PARTLY_USED[name]()
    model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=config, decoder_layers=1)).train()
    model(**batch_of([(64, 96), (50, 70)], (64, 96))).loss.backward()
    assert [n for n, parameter in model.named_parameters() if parameter.grad is None] == []
    assert model.model.backbone.state_dict().keys() == AutoBackbone.from_config(config).state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in loaded.state_dict().items())


@every_backbone
def test_saved_and_loaded_it_gives_the_same(name, tmp_path):
    model = model_of(name)
    inputs = torch.randn(1, 3, 64, 96)
    model.save_pretrained(tmp_path)
    loaded, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    loaded = copy.deepcopy(loaded)  # weights lie in a file without alignment, for which oneDNN may round otherwise
    with torch.no_grad():
        expected, output = model(inputs), loaded(inputs)
    torch.testing.assert_close(output.masks_queries_logits, expected.masks_queries_logits, atol=0, rtol=0)


@every_backbone
def test_odd_sizes(name):
    model = model_of(name)
    with torch.no_grad():
        output = model(torch.randn(2, 3, 67, 93), output_hidden_states=True)
    maps = output.encoder_hidden_states
    assert [tuple(m.shape[:2]) for m in maps] == [(2, channels) for channels in model.model.backbone.channels]
    heights, widths = [m.shape[2] for m in maps], [m.shape[3] for m in maps]
    assert heights == sorted(heights, reverse=True) and widths == sorted(widths, reverse=True)
    assert output.masks_queries_logits.shape == (2, 7, heights[0], widths[0])
    assert output.masks_queries_logits.isfinite().all()


@each(STAGED)
def test_padding_is_not_seen(name):
    """Staged backbones: the same alone or padded, as long as it is to multiples of 32."""
    model = model_of(name)
    size, alone, padded = (50, 70), (64, 96), (128, 160)
    image = torch.randn(1, 3, *size)
    outputs = []
    for shape in (alone, padded):
        values = F.pad(image, (0, shape[1] - size[1], 0, shape[0] - size[0]))
        with torch.no_grad():
            outputs.append(model(values, pixel_mask=pixel_mask([size], shape), output_hidden_states=True))
    one, other = outputs
    torch.testing.assert_close(other.class_queries_logits, one.class_queries_logits, atol=1e-4, rtol=1e-3)
    for stride, here, there in zip((4, 8, 16, 32), one.encoder_hidden_states, other.encoder_hidden_states, strict=True):
        cells = (..., slice(0, -(-size[0] // stride)), slice(0, -(-size[1] // stride)))
        scale = here[cells].abs().max()
        torch.testing.assert_close(there[cells] / scale, here[cells] / scale, atol=1e-5, rtol=1e-4)


@each((*STAGED, *PLAIN), slow={*STAGED, *PLAIN} - {"timm_resnet18", "dinov2"})
def test_exports(name):
    """With a batch and images of any size; DINOv2 with whole patches. Some code of transformers fixes the size."""
    model, unit, any_size = model_of(name), 28 if name == "dinov2" else 32, torch.export.Dim.DYNAMIC
    dynamic = {0: any_size} if name in ONE_SIZE else {0: any_size, 2: any_size, 3: any_size}
    shapes = {"pixel_values": dynamic, "pixel_mask": {max(0, dim - 1): size for dim, size in dynamic.items()}}

    def inputs(images: int, height: int, width: int) -> dict:
        padded = height * unit, width * unit
        mask = pixel_mask([padded, *[(unit + 5, unit + 7)] * (images - 1)], padded)
        return {"pixel_values": torch.randn(images, 3, *padded), "pixel_mask": mask}

    one, other = inputs(2, 2, 3), inputs(3, 2, 3) if name in ONE_SIZE else inputs(3, 3, 5)
    with torch.no_grad():
        program = torch.export.export(model, (), one, dynamic_shapes=shapes, strict=False)
        expected, output = model(**other), program.module()(**other)
    for field in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(output[field], expected[field], atol=1e-4, rtol=1e-3)


@each(["swinv2", *(name for name in PLAIN if name != "timm_vit")])
def test_gradient_checkpointing_changes_nothing(name):
    gradients = []
    for checkpointing in (False, True):
        model = model_of(name).train()
        checkpointed = [m for m in model.model.backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert checkpointed and all(layer.gradient_checkpointing == checkpointing for layer in checkpointed)
        torch.manual_seed(0)  # of stochastic depth
        model(**batch_of([(64, 96), (50, 70)], (64, 96))).loss.backward()
        gradients.append({n: parameter.grad for n, parameter in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, msg=parameter)


class TestSimpleFeaturePyramid:
    @every_plain_vit
    def test_strides(self, name):
        backbone = build_backbone(config_of(name)).eval()
        rows, columns = backbone.patch_size
        with torch.no_grad():
            maps = backbone(torch.randn(1, 3, 4 * rows, 6 * columns)).feature_maps
        last = backbone.vit.channels[-1]
        assert backbone.channels == [m.shape[1] for m in maps] == [last // 4, last // 2, last, last]
        assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]

    @every_plain_vit
    @pytest.mark.parametrize("size", [(67, 93), (33, 112), (15, 17)])
    def test_any_size_is_that_of_the_image_padded_by_hand(self, name, size):
        backbone = build_backbone(config_of(name)).eval()
        patch = backbone.patch_size[0]
        image = torch.randn(1, 3, *size)
        by_hand = F.pad(image, (0, -size[1] % patch, 0, -size[0] % patch))
        with torch.no_grad():
            maps, whole = backbone(image).feature_maps, backbone(by_hand).feature_maps
            last = backbone.vit(by_hand).feature_maps[-1]
        for stride, found, expected in zip((patch / 4, patch / 2, patch, patch * 2), maps, whole, strict=True):
            height, width = (-int(-length // stride) for length in size)
            assert found.shape[2:] == (height, width)
            torch.testing.assert_close(found, expected[..., :height, :width], atol=0, rtol=0)
        torch.testing.assert_close(maps[2], last, atol=0, rtol=0)
        torch.testing.assert_close(maps[3], F.max_pool2d(last, 2, ceil_mode=True), atol=0, rtol=0)

    def test_finer_levels_are_those_of_the_paper(self):
        """A transposed convolution of stride 2 makes 2 x 2 cells of one, each by a matrix of its own."""
        backbone = build_backbone(dinov3_vit()).eval()
        torch.nn.init.normal_(backbone.feature_pyramid[0][1].weight)
        with torch.no_grad():
            finest, finer, same, _ = backbone(torch.randn(1, 3, 32, 32)).feature_maps

            def doubled(layer, cell):  # (C,) -> (2, 2, C')
                return torch.einsum("c,cdyx->yxd", cell, layer.weight) + layer.bias

            first, norm, _, second = backbone.feature_pyramid[0]
            cell = same[0, :, 1, 0]
            torch.testing.assert_close(
                finer[0, :, 2:, :2].movedim(0, -1), doubled(backbone.feature_pyramid[1], cell), atol=1e-5, rtol=1e-4
            )
            inner = doubled(first, cell)[0, 1]
            inner = (inner - inner.mean()) / (inner.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
            expected = doubled(second, F.gelu(inner))
            torch.testing.assert_close(finest[0, :, 4:6, 2:4].movedim(0, -1), expected, atol=1e-5, rtol=1e-4)

    def test_several_maps_of_a_vit_are_no_pyramid(self):
        several = build_backbone(dinov2(out_features=["stage1", "stage2"])).eval()
        one = build_backbone(dinov2()).eval()
        one.load_state_dict(several.state_dict())
        image = torch.randn(1, 3, 56, 56)
        for found, expected in zip(several(image).feature_maps, one(image).feature_maps, strict=True):
            torch.testing.assert_close(found, expected, atol=0, rtol=0)

    def test_an_earlier_map_is_refused(self):
        with pytest.raises(ValueError, match="ends before the last layer, 'stage2'"):
            build_backbone(dinov2(out_features=["stage1"]))

    def test_tokens_in_a_row_are_refused(self):
        with pytest.raises(ValueError, match="needs reshape_hidden_states=True"):
            build_backbone(dinov2(reshape_hidden_states=False))

    def test_without_its_norm_every_parameter_learns(self):
        config = maskcls_config(backbone_config=dinov2(apply_layernorm=False))
        backbone = MaskClsForUniversalSegmentation(config).model.backbone
        sum(m.sum() for m in backbone(torch.randn(1, 3, 56, 56)).feature_maps).backward()
        assert [name for name, parameter in backbone.named_parameters() if parameter.grad is None] == []
        assert backbone.state_dict().keys() == build_backbone(dinov2()).state_dict().keys()

    @pytest.mark.parametrize("config", [resnet(), TimmBackboneConfig(backbone="resnet18")])
    def test_forgotten_stages_of_others_stay_an_error(self, config):
        if config.model_type == "resnet":
            config.out_features = ["stage4"]
        with pytest.raises(ValueError, match="list its stages in out_features, or in out_indices for timm"):
            build_backbone(config)

    def test_the_new_convolutions_start_with_the_variance_of_their_input(self):
        torch.manual_seed(0)
        config = maskcls_config(backbone_config=Dinov2Config(**VIT | {"hidden_size": 512}, patch_size=14))
        pyramid = MaskClsForUniversalSegmentation(config).model.backbone.feature_pyramid
        with torch.no_grad():
            assert pyramid[1].bias.abs().max() == 0
            assert 0.9 < pyramid[1](torch.randn(2, 512, 8, 8)).std() < 1.1

    def test_what_a_checkpoint_lacks_is_initialized(self, tmp_path):
        """As where a ViT gets its pyramid only now: never what the memory held."""
        model = model_of("dinov2")
        state = {n: t for n, t in model.state_dict().items() if "feature_pyramid" not in n}
        model.save_pretrained(tmp_path, state_dict=state)
        loaded, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
        assert len(report["missing_keys"]) == 8
        first, norm, _, second = loaded.model.backbone.feature_pyramid[0]
        for convolution in (first, second, loaded.model.backbone.feature_pyramid[1]):
            bound = (3 / convolution.in_channels) ** 0.5
            assert 0.9 * bound < convolution.weight.abs().max() <= bound and convolution.bias.abs().max() == 0
        assert norm.weight.min() == 1 and norm.bias.abs().max() == 0

    @each(["dinov2", "dinov3_vit", "timm_vit"])
    def test_learning_rates(self, name):
        """The ViT learns at the backbone's rate; the pyramid is new, and learns as the pixel decoder does."""
        model = model_of(name)
        groups = build_optimizer(model, 1.0, 0.5, backbone_multiplier=0.1).param_groups
        group_of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        rates = {n: group_of[id(p)] for n, p in model.model.backbone.named_parameters()}
        assert {rate for n, (rate, _) in rates.items() if n.startswith("vit.")} == {0.1}
        assert {rate for n, (rate, _) in rates.items() if n.startswith("feature_pyramid.")} == {1.0}
        undecayed = {n for n, (_, decay) in rates.items() if decay == 0}
        tables = ("token", "register_tokens", "pos_embed", "position_embeddings")
        expected = {n for n in rates if "norm" in n or n.startswith("feature_pyramid.0.1.") or n.endswith(tables)}
        assert undecayed == expected

    @each(["dinov2", "dinov3_vit", "beit"])
    def test_attention_of_the_vit_follows(self, name):
        model = model_of(name)
        inputs = torch.randn(1, 3, 56, 64)
        with torch.no_grad():
            expected = model(inputs).masks_queries_logits
            assert model.model.backbone.vit.config._attn_implementation == "sdpa"
            model.set_attn_implementation("eager")
            assert model.model.backbone.vit.config._attn_implementation == "eager"
            torch.testing.assert_close(model(inputs).masks_queries_logits, expected, atol=1e-5, rtol=1e-4)

    def test_weights_of_a_classifier(self, tmp_path):
        classifier = Dinov2ForImageClassification(dinov2())
        classifier.save_pretrained(tmp_path)
        model = model_of("dinov2")
        pyramid = copy.deepcopy(model.model.backbone.feature_pyramid.state_dict())
        open_backbone(tmp_path).load_into(model)
        loaded, expected = model.model.backbone.vit.state_dict(), classifier.dinov2.state_dict()
        assert len(loaded) > 20 and loaded.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
        for name, tensor in model.model.backbone.feature_pyramid.state_dict().items():
            assert torch.equal(tensor, pyramid[name])

    def test_weights_of_a_headless_model(self, tmp_path):
        pretrained = DINOv3ViTModel(dinov3_vit())
        pretrained.save_pretrained(tmp_path)
        model = model_of("dinov3_vit")
        open_backbone(tmp_path).load_into(model)
        loaded, expected = model.model.backbone.vit.state_dict(), pretrained.state_dict()
        assert len(loaded) > 20 and loaded.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())

    @pytest.mark.parametrize("layers", [1, 3])
    def test_weights_of_another_depth_are_refused(self, tmp_path, layers):
        config = dinov2()
        config.num_hidden_layers = layers
        Dinov2ForImageClassification(config).save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match="another architecture than the backbone: weights are .*encoder.layer.[12]"
        ):
            open_backbone(tmp_path).load_into(model_of("dinov2"))

    def test_weights_of_another_library_are_refused(self, tmp_path):
        Dinov2ForImageClassification(dinov2()).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds a dinov2, backbone_config a timm_backbone"):
            open_backbone(tmp_path).load_into(model_of("timm_vit"))


def test_swinv2_trains_in_float16():
    """Zeros fill up its windows; a cosine attention of transformers makes NaN of them."""
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model_of("swinv2").train()(**batch_of([(64, 96), (50, 70)], (64, 96))).loss
    assert loss.isfinite()


def test_transformers_maskformer_has_no_pyramid_for_vits():
    with pytest.raises(ValueError, match="MaskFormer has no feature pyramid for plain ViTs"):
        to_transformers(model_of("dinov2"))


def steps_in_parallel(name: str, rank: int) -> list[float]:
    torch.manual_seed(0)
    parallel = torch.nn.parallel.DistributedDataParallel(model_of(name).train())
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    for _ in range(2):  # DDP notices in the second step what had no gradient in the first
        optimizer.zero_grad()
        parallel(**batch_of([(64, 96)], (64, 96))).loss.backward()
        optimizer.step()
    return [parameter.sum().item() for parameter in parallel.parameters()]


@pytest.mark.slow
@each(["dinov2", "dinov3_vit", "swinv2", "timm_mobilenetv3"])
def test_trains_in_two_processes(name):
    one, other = run_in_processes(partial(steps_in_parallel, name), 2)
    assert one == other


def test_a_swinv2_whose_windows_are_full_is_that_of_transformers():
    """Guarding changes nothing where there is nothing to guard."""
    config = config_of("swinv2")
    model = model_of("swinv2")
    plain = AutoBackbone.from_config(config).eval()
    plain.load_state_dict(model.model.backbone.state_dict())
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        maps = model(image, output_hidden_states=True).encoder_hidden_states
        for found, expected in zip(maps, plain(image).feature_maps, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("error", [AssertionError, TypeError, KeyError, NotImplementedError])
def test_a_backbone_that_cannot_be_tried_on_meta_tensors_is_accepted(error):
    class Picky(nn.Module):
        def forward(self, pixel_values):
            raise error("of another size")

    assert dry_run(Picky(), 3) is None


@pytest.mark.parametrize("shape", [(2, 7, 7, 32), (2, 49, 32)])
def test_maps_with_channels_last_are_refused_at_once(shape):
    class Backbone(nn.Module):
        channels = (32,)

    with pytest.raises(ValueError, match="channels last"):
        check_maps(Backbone(), [torch.empty(shape, device="meta")])
