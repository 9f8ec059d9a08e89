"""Settings of a training that other implementations stumble over: each trains a step here, for each of the three
families, and gradient checkpointing gives the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Dinov2Config, DINOv3ViTConfig

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.training import add_lora, build_optimizer
from maskcls_hf.training.build import enable_gradient_checkpointing
from test_eomt import ours
from test_eomt_training import labels, trainer_of
from test_lora import MASK2FORMER, swin_model

VIT = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8)
WITH_DROPOUT = dict(attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.2, drop_path_rate=0.2)
DINOV3 = dict(intermediate_size=48, attention_dropout=0.2, drop_path_rate=0.2)


def eomt(vit=None, **fields) -> MaskClsForUniversalSegmentation:
    return ours(backbone_config=vit or Dinov2Config(**VIT), mask_probabilities=[1.0, 0.5], loss_points=64, **fields)


FAMILIES = {
    "MaskFormer": swin_model,
    "Mask2Former": lambda **fields: swin_model(**MASK2FORMER, loss_points=64, **fields),
    "EoMT": eomt,
}
DROPPED = {
    "MaskFormer": lambda: swin_model(dropout=0.3),
    "Mask2Former": lambda: FAMILIES["Mask2Former"](dropout=0.3),
    "EoMT": lambda: eomt(Dinov2Config(**VIT, **WITH_DROPOUT)),
    "EoMT, DINOv3": lambda: eomt(DINOv3ViTConfig(**VIT | DINOV3)),
}


def batch() -> dict[str, object]:
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(2, 3, 64, 64)} | {name: 2 * value for name, value in labels().items()}


def trains(model, **options) -> torch.Tensor:
    """A step: its loss is finite, every parameter that learns has a gradient, and weights change."""
    optimizer = build_optimizer(model, 1e-3, 0.05)
    before = copy.deepcopy(model.state_dict())
    outputs = model.train()(**batch(), **options)
    loss = outputs[0]
    loss.backward()
    assert loss.isfinite()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or p.grad.isnan().any())]
    optimizer.step()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return outputs


@pytest.mark.parametrize("name", DROPPED)
def test_dropout(name):
    """It drops activations: the next step sees others, evaluation none."""
    model = DROPPED[name]()
    trains(model)
    with torch.no_grad():
        losses = [float(model(**batch()).loss) for _ in range(2)]  # of the same random points
        torch.manual_seed(2)
        inputs = batch()
        assert model(**inputs).loss != model(**inputs).loss
        model.eval()
        logits = [model(inputs["pixel_values"]).class_queries_logits for _ in range(2)]
    assert losses[0] == losses[1]
    if not name.startswith("EoMT"):  # whose masks of attention are random in evaluation, too, until they are annealed
        assert torch.equal(*logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_deep_supervision(name):
    outputs = trains(FAMILIES[name](deep_supervision=False))
    assert sorted(outputs.loss_dict) == ["loss_cross_entropy", "loss_dice", "loss_mask"]


@pytest.mark.parametrize("name", FAMILIES)
def test_tuples_with_labels(name, tmp_path):
    """`return_dict=False`, of the call and of the configuration, which the Trainer then trains with."""
    outputs = trains(FAMILIES[name](), return_dict=False)
    assert isinstance(outputs, tuple) and outputs[0].ndim == 0
    model = FAMILIES[name]()
    model.config.return_dict = False
    trainer = trainer_of(model, tmp_path, MaskClsImageProcessor(num_labels=3, do_resize=False), steps=1)
    assert isinstance(model(**batch()), tuple)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


CHECKPOINTED = {**FAMILIES, **{f"{name} with dropout": make for name, make in DROPPED.items()}}
CHECKPOINTED["EoMT, frozen ViT"] = lambda: eomt(freeze_backbone=True)
CHECKPOINTED["EoMT, LoRA"] = lambda: add_lora(eomt(), rank=2)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    """With what is random drawn alike; the layers do run again."""
    model = CHECKPOINTED[name]().train()
    runs = []
    ends = ("layer.3.norm1", "transformer_decoder.layers.0.mlp")
    counted = next(m for n, m in model.named_modules() if n.endswith(ends))
    counted.register_forward_hook(lambda *_: runs.append(1))
    gradients, times = [], []
    for enabled in (False, True):
        if enabled:
            enable_gradient_checkpointing(model)
        model.zero_grad()
        runs.clear()
        inputs = batch()
        torch.manual_seed(3)
        model(**inputs).loss.backward()
        times.append(len(runs))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert times[1] == 2 * times[0] > 0
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-5, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_with_heads_in_modules_to_save(name):
    model = add_lora(FAMILIES[name](), rank=2, modules_to_save=["segmentation_module"])
    trains(model)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[2] for n in learning if "lora_" not in n} == {"segmentation_module"}


@pytest.mark.parametrize("vit", [None, DINOv3ViTConfig(**VIT | DINOV3)])
def test_a_vit_runs_twice_and_not_thrice(vit):
    """Families whose blocks checkpoint themselves do not do so within ours."""
    model = eomt(vit).train()
    enable_gradient_checkpointing(model)
    runs = []
    model.model.encoder.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    model(**batch()).loss.backward()
    assert len(runs) == 2
