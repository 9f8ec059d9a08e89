"""An image gives the same features whatever it is padded to, whoever else uses the model at the same time."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, PreTrainedConfig, TimmBackboneConfig

from maskcls_hf import MaskClsForUniversalSegmentation
from maskcls_hf.models import backbones
from maskcls_hf.models.backbones import PaddingMaskHooks, as_pair, build_backbone, sees_padding
from maskcls_hf.models.layers import ValidRegion
from tiny import STAGES, maskcls_config, pad_labels, pixel_mask, resnet, segments, swin

FOUR = {"depths": [1, 1, 1, 1], "out_features": STAGES}
SIZES = {"hidden_sizes": [8, 16, 24, 32], **FOUR}
WINDOWS = {"embed_dim": 8, "num_heads": [1, 1, 2, 2], "depths": [2, 1, 1, 1], "window_size": 4, "out_features": STAGES}


def of_transformers(model_type: str, **fields) -> Callable[[], PreTrainedConfig]:
    return lambda: CONFIG_MAPPING[model_type](**fields)


def of_timm(name: str, *out_indices: int) -> Callable[[], PreTrainedConfig]:
    return lambda: TimmBackboneConfig(backbone=name, out_indices=out_indices or (1, 2, 3, 4))


GUARDED = {
    "bit": of_transformers("bit", embedding_size=8, num_groups=4, **SIZES),
    "convnext": of_transformers("convnext", **SIZES),
    "convnextv2": of_transformers("convnextv2", **SIZES),
    "dinov3_convnext": of_transformers("dinov3_convnext", **SIZES),
    "focalnet": of_transformers("focalnet", embed_dim=8, hidden_sizes=[16, 32, 64, 64], **FOUR),
    "hgnet_v2": of_transformers("hgnet_v2", hidden_sizes=[128, 512, 1024, 2048], out_features=STAGES),
    "maskformer-swin": of_transformers("maskformer-swin", **WINDOWS),
    "pp_lcnet": of_transformers("pp_lcnet", out_features=["stage2", "stage3", "stage4", "stage5"]),
    "pp_lcnet_v4": of_transformers("pp_lcnet_v4", out_features=STAGES),
    "resnet": resnet,
    "rt_detr_resnet": of_transformers("rt_detr_resnet", embedding_size=8, layer_type="basic", **SIZES),
    "swin": of_transformers("swin", **WINDOWS),
    "swinv2": of_transformers("swinv2", image_size=128, **WINDOWS),
    "textnet": of_transformers("textnet", out_features=STAGES),
    **{
        f"timm_{name}": of_timm(name)
        for name in (
            *("resnet10t", "seresnet18", "ecaresnet26t", "gcresnet33ts", "skresnet18", "resnest14d", "resnetblur18"),
            *("resnetv2_18", "resnetv2_50d_gn", "seresnext26t_32x4d", "res2net50_14w_8s", "regnety_002"),
            *("efficientnet_lite0", "tf_efficientnet_lite0", "mobilenetv2_035", "mobilenetv3_small_050", "lcnet_035"),
            *("mobilenetv4_conv_small_035", "ghostnet_050", "hardcorenas_a", "rexnet_100", "ese_vovnet19b_dw"),
            *("hrnet_w18_small", "dla34", "densenet121", "nf_regnet_b0", "gernet_s", "cs3darknet_focus_s"),
            *("repghostnet_050", "legacy_seresnet18"),
        )
    },
    **{
        f"timm_{name}": of_timm(name, 0, 1, 2, 3)
        for name in (
            *("convnext_atto", "convnextv2_atto", "poolformer_s12", "inception_next_atto", "fasternet_t0"),
            "hgnetv2_b0",
        )
    },
}
HEAVY = ("hgnet_v2", "textnet", "timm_resnetv2_50d_gn", "timm_densenet121", "timm_dla34", "timm_rexnet_100",
         "timm_res2net50_14w_8s", "timm_ese_vovnet19b_dw", "timm_inception_next_atto")  # fmt: skip
SEEING = {
    "dinov2": of_transformers("dinov2", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=14),
    "pvt_v2": of_transformers("pvt_v2", out_features=STAGES),
    "bit without padding in its stem": of_transformers("bit", num_groups=4, global_padding="SAME", **SIZES),
    **{
        f"timm_{name}": of_timm(name, 0, 1, 2, 3)
        for name in ("edgenext_xx_small", "mobilevit_xxs", "pvt_v2_b0", "caformer_s18", "mobilenetv4_hybrid_medium")
    },
    "timm_lambda_resnet26t": of_timm("lambda_resnet26t"),
}


def model_of(config: PreTrainedConfig, **fields) -> MaskClsForUniversalSegmentation:
    """With weights as after some training: where they start at zero, layers would do nothing."""
    torch.manual_seed(0)
    fields = {"decoder_layers": 1, "dropout": 0.0, **fields}
    model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=config, **fields)).eval()
    for weight in model.model.backbone.parameters():
        if weight.ndim <= 1:
            weight.data = torch.where(weight.abs() < 1e-3, torch.rand_like(weight) * 0.5 + 0.25, weight)
    return model


def batch_of(*sizes: tuple[int, int], padded: tuple[int, int] = (128, 128)) -> dict:
    mask = pixel_mask(list(sizes), padded)
    return {"pixel_values": torch.randn(len(sizes), 3, *padded) * mask[:, None], "pixel_mask": mask}


def alone(batch: dict, height: int, width: int) -> dict:
    """The first image of a batch."""
    return {name: tensor[:1, ..., :height, :width] for name, tensor in batch.items()}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in GUARDED])
def test_an_image_is_the_same_alone_and_beside_a_larger_one(name):
    model = model_of(GUARDED[name]()).double()
    assert sees_padding(model.model.backbone) is None
    batch = batch_of((102, 64), (128, 128))
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        one, other = model(**alone(batch, 128, 64)), model(**batch)
    height, width = one.masks_queries_logits.shape[-2:]
    masks, classes = other.masks_queries_logits[:1, :, :height, :width], other.class_queries_logits[:1]
    for found, expected in ((masks, one.masks_queries_logits), (classes, one.class_queries_logits)):
        assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_at_least_thirty_families_are_guarded():
    assert len(GUARDED) >= 30


@pytest.mark.parametrize("name", SEEING)
def test_a_backbone_that_sees_padding_is_named(name, caplog):
    with torch.device("meta"):
        backbone = build_backbone(SEEING[name]())
    assert sees_padding(backbone)


@pytest.mark.parametrize("attend_to_padding", [False, True])
def test_a_model_warns_at_construction(attend_to_padding, recwarn, caplog, monkeypatch):
    said = []
    monkeypatch.setattr("maskcls_hf.models.modeling_maskcls.logger.warning_once", said.append)
    config = maskcls_config(backbone_config=SEEING["dinov2"](), attend_to_padding=attend_to_padding)
    MaskClsForUniversalSegmentation(config)
    assert [("dinov2" in text, "padding" in text) for text in said] == [(True, True)] * (not attend_to_padding)


@pytest.mark.parametrize("name", ["SwinLayer", "SwinPatchMerging"])
def test_a_rename_upstream_is_noticed(name, monkeypatch):
    backbone = build_backbone(swin())
    for module in backbone.modules():
        if type(module).__name__ == name:
            module.__class__ = type(f"New{name}", (type(module),), {})
    assert "swin" in sees_padding(backbone)


def test_a_backbone_of_somebody_else_is_named():
    assert "Sequential" in sees_padding(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_padding_of_all_images_is_spared_the_backbone():
    model = model_of(resnet())
    seen = []
    model.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:]))
    batch = batch_of((50, 40), (33, 64), padded=(128, 160))
    with torch.no_grad():
        padded = model(**batch, output_hidden_states=True)
        tight = model(**{name: tensor[..., :64, :64] for name, tensor in batch.items()})
    assert seen == [(64, 64), (64, 64)]
    assert padded.masks_queries_logits.shape[2:] == (32, 40)
    assert [m.shape[2:] for m in padded.encoder_hidden_states] == [(32, 40), (16, 20), (8, 10), (4, 5)]
    torch.testing.assert_close(padded.masks_queries_logits[..., :16, :16], tight.masks_queries_logits)
    torch.testing.assert_close(padded.class_queries_logits, tight.class_queries_logits)


def test_trimming_leaves_multiples_of_the_strides_inside():
    """HRNet and DLA go down to stride 32 for maps of stride 4."""
    config = resnet()
    config.out_features = ["stage1", "stage2"]
    assert model_of(config).model.trimming == 32


def test_filling_up_by_a_layer_when_compiled():
    """Dynamo does not show F.pad to modes of torch functions."""
    layers = nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2))
    hooks = PaddingMaskHooks(layers)
    hooks.watch_functions = True
    batch = batch_of((40, 96), (96, 90), padded=(96, 96))
    region = ValidRegion.of_batch(batch["pixel_values"], batch["pixel_mask"])

    def features(maps: torch.Tensor) -> torch.Tensor:
        with hooks.batch(region):
            return layers(maps)

    maps = torch.randn(2, 4, 24, 24)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(features, backend="eager")(maps), features(maps))


def test_kernel_sizes_of_every_form():
    assert as_pair(3) == as_pair([3, 3]) == as_pair((3, 3)) == (3, 3)  # MViT of timm has lists


class TestNothingIsKept:
    """Of a call, by any module: threads, calls within calls and layers that run again are right by construction."""

    @staticmethod
    def state(model: nn.Module) -> dict:
        plain = {}
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    plain[path, name] = id(value) if not isinstance(value, (int, float, str, tuple)) else value
        return plain | {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}

    @pytest.mark.parametrize("name", ["resnet", "swin", "swinv2", "maskformer-swin", "timm_skresnet18"])
    def test_on_the_model(self, name):
        model = model_of(GUARDED[name]())
        assert model.criterion  # made when first asked for
        before, hooks = self.state(model), dict(vars(model.model.padding_masks))
        masks, labels = segments([(40, 96), (96, 96)], [2, 3])
        batch = batch_of((40, 96), (96, 96), padded=(96, 96))
        model(**batch, mask_labels=pad_labels(masks, (96, 96)), class_labels=labels).loss.backward()
        assert self.state(model) == before
        assert vars(model.model.padding_masks) == hooks
        assert backbones.CURRENT.batch is None

    @pytest.mark.parametrize("name", ["resnet", "swin", "swinv2", "timm_seresnet18"])
    def test_threads(self, name):
        model = model_of(GUARDED[name]())
        batches = [batch_of((40, 96), (96, 90), padded=(96, 96)), batch_of((96, 50), (90, 96), padded=(96, 96))]

        def logits(batch: dict) -> torch.Tensor:
            with torch.no_grad():
                return model(**batch).class_queries_logits

        expected = [logits(batch) for batch in batches]
        found: list[list] = [[], []]

        def serve(which: int) -> None:
            found[which] = [logits(batches[which]) for _ in range(8)]

        threads = [threading.Thread(target=serve, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for which in (0, 1):
            assert len(found[which]) == 8
            for output in found[which]:
                torch.testing.assert_close(output, expected[which])

    def test_a_call_within_a_call(self):
        model = model_of(swin())
        outer, inner = batch_of((40, 96), (96, 90), padded=(96, 96)), batch_of((64, 33), padded=(64, 64))
        with torch.no_grad():
            expected = model(**outer).class_queries_logits
            handle = None

            def call(module: nn.Module, inputs: tuple) -> None:
                handle.remove()
                model(**inner)

            handle = model.model.backbone.swin.encoder.layers[0].register_forward_hook(
                lambda module, inputs, output: call(module, inputs)
            )
            torch.testing.assert_close(model(**outer).class_queries_logits, expected, atol=0, rtol=0)

    def test_an_error_leaves_nothing_behind(self):
        model = model_of(resnet())
        handle = model.model.backbone.encoder.stages[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch_of((40, 96), (96, 90), padded=(96, 96)))
        handle.remove()
        assert backbones.CURRENT.batch is None
        assert torch.overrides._get_current_function_mode() is None

    @pytest.mark.parametrize("name", ["resnet", "swin", "swinv2", "bit", "dinov2"])
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_two_passes_before_one_backward_with_checkpoints(self, name, reentrant):
        """The first pass's layers run again after the second pass, on another batch."""
        batches = [batch_of((40, 96), (96, 90), padded=(96, 96)), batch_of((96, 50), (90, 96), padded=(96, 96))]
        gradients = []
        for checkpointing in (False, True):
            model = model_of((GUARDED | SEEING)[name]()).train()
            for module in model.modules():  # their statistics would count a batch twice
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            for batch in batches:
                batch["pixel_values"].requires_grad_()
            torch.manual_seed(0)  # of stochastic depth
            sum(model(**batch).masks_queries_logits.square().mean() for batch in batches).backward()
            gradients.append({n: parameter.grad for n, parameter in model.model.backbone.named_parameters()})
        for parameter, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][parameter], gradient, atol=1e-5, rtol=1e-3, msg=parameter)

    def test_layers_that_run_again_without_their_batch_are_an_error(self):
        model = model_of(resnet())
        stage = model.model.backbone.encoder.stages[2]
        forward = stage.forward
        stage.forward = lambda features: checkpoint(forward, features, use_reentrant=False)
        output = model(**batch_of((40, 96), (96, 90), padded=(96, 96)))
        with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
            output.masks_queries_logits.sum().backward()


class TestPixelMask:
    @pytest.mark.parametrize("which", ["half the height", "transposed", "one for two", "without a batch"])
    def test_of_another_shape_is_refused(self, which):
        mask = pixel_mask([(64, 96), (64, 50)], (64, 96))
        wrong = {
            "half the height": mask[:, :32],
            "transposed": mask.transpose(1, 2),
            "one for two": mask[:1],
            "without a batch": mask[0],
        }[which]
        with pytest.raises(ValueError, match=r"pixel_mask has the shape .* must be \(2, 64, 96\)"):
            model_of(resnet())(torch.randn(2, 3, 64, 96), pixel_mask=wrong)

    def test_without_a_pixel_is_refused(self):
        mask = pixel_mask([(64, 96), (64, 50)], (64, 96))
        mask[1] = 0
        with pytest.raises(ValueError, match="image 1 of the batch has no pixel"):
            model_of(resnet())(torch.randn(2, 3, 64, 96), pixel_mask=mask)

    @pytest.mark.parametrize("edge", ["left", "top", "hole"])
    def test_padding_elsewhere_is_refused(self, edge):
        mask = torch.ones(1, 64, 96)
        place = {"left": (0, slice(None), slice(3)), "top": (0, slice(3)), "hole": (0, 5, 5)}[edge]
        mask[place] = 0
        with pytest.raises(ValueError, match="padding of image 0 is not at the bottom and on the right"):
            model_of(resnet())(torch.randn(1, 3, 64, 96), pixel_mask=mask)

    def test_one_image_without_a_batch_is_refused(self):
        with pytest.raises(ValueError, match=r"pixel_values must be \(B, C, H, W\)"):
            model_of(resnet())(torch.randn(3, 64, 96))
