"""LoRA: adapters of the backbone, the rest in full; saved, merged, reloaded equal; in recipes, Trainer and the loop."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.training import ExponentialMovingAverage, add_lora, build_optimizer, merge_adapter
from test_eomt import ours, saved
from test_eomt_training import labels, pyramid_over_vit, trainer_of
from tiny import maskcls_config, swin

MASK2FORMER = dict(pixel_decoder="deformable", transformer_decoder="masked_attention", mask_loss="cross_entropy")


def swin_model(**fields) -> MaskClsForUniversalSegmentation:
    return MaskClsForUniversalSegmentation(maskcls_config(backbone_config=swin(), num_queries=9, **fields))


MODELS = {
    "MaskFormer": swin_model,
    "Mask2Former": lambda **fields: swin_model(**MASK2FORMER, loss_points=64, **fields),
    "EoMT": ours,
    "ViT and decoder": lambda **fields: pyramid_over_vit(drop=0.0, **fields),
}


@pytest.fixture
def processor():
    return MaskClsImageProcessor(num_labels=3, do_resize=False)


def logits(model, pixel_values) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=pixel_values).masks_queries_logits


@pytest.mark.parametrize("name", MODELS)
def test_a_step_with_heads_in_full(name, tmp_path):
    """The backbone's weights stay, its adapters and all else learn; merged and reloaded it is the same model."""
    torch.manual_seed(0)
    saved(MODELS[name](), tmp_path / "base")
    model = add_lora(MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "base").train(), rank=2, alpha=16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, 1e-2, 0.0)
    for _ in range(2):  # after the first one of the two matrices is 0 still
        loss = model(pixel_values=torch.randn(1, 3, 64, 64), **labels()).loss
        loss.backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    still = {n for n, p in model.named_parameters() if p.requires_grad} - changed
    assert all("layers.0.self_attn.v_proj" in n for n in still)  # of what is zero there
    for n in changed:
        assert "lora_" in n or "modules_to_save" in n, n
        assert ("lora_" in n) == ((".backbone." in n or ".vit." in n) and ".feature_pyramid." not in n), n
    assert any("segmentation_module.modules_to_save" in n for n in changed)
    pixel_values = torch.randn(1, 3, 64, 64)
    expected = logits(model, pixel_values)
    trainer_of(model, tmp_path / "run", MaskClsImageProcessor(num_labels=3)).save_model()
    merge_adapter(tmp_path / "run", tmp_path / "merged")
    merged, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values())
    assert (expected - logits(MODELS[name](), pixel_values)).abs().max() > 0.01
    torch.testing.assert_close(logits(merged, pixel_values), expected, rtol=1e-4, atol=1e-4)
    again = PeftModel.from_pretrained(
        MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "base"), tmp_path / "run"
    )
    torch.testing.assert_close(logits(again, pixel_values), expected, rtol=0, atol=0)


def test_targets_by_the_ends_of_their_names():
    model = add_lora(ours(), rank=2, targets=["fc1"])
    assert {n.split(".lora_")[0].split(".")[-1] for n, _ in model.named_parameters() if "lora_" in n} == {"fc1"}
    model = add_lora(MaskClsForUniversalSegmentation(maskcls_config()), rank=2, targets=["convolution"])
    assert model.config.freeze_batch_norm and any("lora_" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (ours, {"targets": ["fc_1"]}, r"lora.targets: nothing in the backbone is called fc_1 \(did you mean fc1\?"),
        (ours, {"targets": ["class_predictor"]}, "nothing in the backbone is called class_predictor"),
        (ours, {"targets": []}, "lora.targets: nothing"),
        (ours, {"modules_to_save": ["head"]}, "lora.modules_to_save: nothing in the model is called head"),
        (lambda: ours(freeze_backbone=True), {}, "a frozen backbone does not learn"),
        (lambda: MaskClsForUniversalSegmentation(maskcls_config()), {}, "lora.targets: nothing"),  # no linear layers
    ],
)
def test_wrong_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(model(), rank=2, **options)


def test_without_peft(monkeypatch):
    monkeypatch.setattr("maskcls_hf.training.lora.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install maskcls-hf\[lora\]"):
        add_lora(ours(), rank=2)


def test_a_resume_continues_exactly(tmp_path, processor):
    """Annealed masks, averaged weights and adapters."""

    def train(folder, checkpoint=None):
        model = add_lora(ours(), rank=2)
        ema = ExponentialMovingAverage(model, 0.5)
        trainer = trainer_of(model, folder, processor, ema=ema, learning_rate=1e-2)
        trainer.train(checkpoint)
        trainer.save_model()
        return model, ema

    (model, ema), (again, ema_again) = train(tmp_path), train(tmp_path / "again", str(tmp_path / "checkpoint-3"))
    for one, other in ((model, again), (ema.average, ema_again.average)):
        state = other.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    assert again.config.mask_probabilities == [0, 0]
    assert not (tmp_path / "checkpoint-3/model.safetensors").exists()
    # What is saved has the averaged weights.
    adapter = PeftModel.from_pretrained(ours(), tmp_path)
    pixel_values = torch.randn(1, 3, 64, 64)
    with ema.swapped(model):
        expected = logits(model, pixel_values)
    assert torch.equal(logits(adapter, pixel_values), expected)
    assert not torch.equal(logits(model, pixel_values), expected)


def test_a_model_that_peft_has_wrapped_itself(tmp_path, processor):
    saved(ours(), tmp_path / "base")
    base = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["segmentation_module", "upscale.0"])
    trainer = trainer_of(get_peft_model(base, settings), tmp_path / "run", processor, mask_annealing=True)
    trainer.train()
    trainer.save_model()
    assert trainer.model_accepts_loss_kwargs and base.config.mask_probabilities == [0, 0]
    pixel_values = torch.randn(1, 3, 64, 64)
    expected = logits(trainer.model, pixel_values)
    for source in ("run", "run/checkpoint-6"):
        merge_adapter(tmp_path / source, tmp_path / "merged" / source)
        merged = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "merged" / source)
        torch.testing.assert_close(logits(merged, pixel_values), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged(tmp_path, processor):
    with pytest.raises(FileNotFoundError, match="holds no adapter of this package"):
        merge_adapter(saved(ours(), tmp_path / "model"), tmp_path / "out")
    trainer_of(add_lora(ours(), rank=2), tmp_path / "run", processor).save_model()
    with pytest.raises(FileNotFoundError, match="does not say which weights"):
        merge_adapter(tmp_path / "run", tmp_path / "out")
    file = tmp_path / "run" / "lora_base.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": str(tmp_path / "model")}))
    merge_adapter(tmp_path / "run", tmp_path / "out")
    whole = file.read_text()
    for broken in ("{", "[]", '{"config": {}}', '{"config": {"model_type": "bert"}}'):
        file.write_text(broken)
        with pytest.raises(ValueError):
            merge_adapter(tmp_path / "run", tmp_path / "out")
    file.write_text(whole)
    adapter = tmp_path / "run" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"modules_to_save": ["segmentation_module"]}))
    saved(ours(num_queries=7), tmp_path / "model")
    with pytest.raises(ValueError, match="has 1 weights, such as model.encoder.queries_embedder.weight"):
        merge_adapter(tmp_path / "run", tmp_path / "out")
