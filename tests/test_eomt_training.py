"""Training of EoMT: annealed masks, learning rates by layer, a frozen encoder, and the guard against empty masks."""

from __future__ import annotations

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import ModelOutput

from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation
from maskcls_hf.data import MaskClsCollator
from maskcls_hf.training import (
    CollapseGuard,
    ExponentialMovingAverage,
    MaskAnnealing,
    MaskClsTrainer,
    TimeBudget,
    annealing_intervals,
    build_optimizer,
    build_scheduler,
)
from maskcls_hf.training.callbacks import choose_annealing
from resumable import Squares
from test_eomt import ours, saved
from tiny import maskcls_config

# -- annealing of the masks --------------------------------------------------------------------------------------------

# Of the published configurations: steps of the training, starts and ends of the blocks with queries.
PUBLISHED = {
    "coco, 12 epochs, 4 blocks": (88692, [14782, 29564, 44346, 59128], [29564, 44346, 59128, 73910]),
    "coco, 12 epochs, 3 blocks": (88692, [14782, 36955, 59128], [29564, 51737, 73910]),
    "coco, 12 epochs, 5 blocks": (88692, [14782, 25869, 36955, 48042, 59128], [29564, 40651, 51737, 62824, 73910]),
    "coco, 24 epochs, 3 blocks": (177384, [29564, 73910, 118256], [59128, 103474, 147820]),
    "ade20k, 4 blocks": (39120, [6520, 13040, 19560, 26080], [13040, 19560, 26080, 32600]),
    "ade20k, 5 blocks": (39120, [6520, 11410, 16300, 21190, 26080], [13040, 17930, 22820, 27710, 32600]),
    "cityscapes, 4 blocks": (19902, [3317, 6634, 9951, 13268], [6634, 9951, 13268, 16585]),
}


def labels(size: tuple[int, int] = (64, 64)) -> dict[str, list[torch.Tensor]]:
    mask = torch.zeros(2, *size, dtype=torch.bool)
    mask[0, :20] = mask[1, 30:] = True
    return {"mask_labels": [mask], "class_labels": [torch.tensor([0, 2])]}


def trainer_of(model: nn.Module, folder, processor, steps: int = 6, **options) -> MaskClsTrainer:
    fields = dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=3, logging_steps=1, seed=1,
        use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, learning_rate=1e-4,
    )  # fmt: skip
    own = {name: options.pop(name) for name in list(options) if name in TrainingArguments.__dataclass_fields__}
    return MaskClsTrainer(
        model=model, args=TrainingArguments(**fields | own), train_dataset=Squares(8),
        data_collator=MaskClsCollator(processor), **options,
    )  # fmt: skip


@pytest.fixture
def processor():
    from maskcls_hf import MaskClsImageProcessor

    return MaskClsImageProcessor(num_labels=3, do_resize=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_intervals_are_those_of_the_published_trainings(name):
    max_steps, starts, ends = PUBLISHED[name]
    found = [(start * max_steps, end * max_steps) for start, end in annealing_intervals(len(starts))]
    for interval, expected in zip(found, zip(starts, ends, strict=True), strict=True):
        assert interval == pytest.approx(expected, abs=0.51)


def test_one_before_its_start_zero_from_its_end_and_a_polynomial_between():
    """Shares of the training, whatever its number of steps."""
    model = ours()
    annealing = MaskAnnealing(model)
    for max_steps in (60, 600):
        for tenth, expected in ((0, [1, 1]), (10, [1, 1]), (15, [0.5**0.9, 1]), (20, [0, 1]), (45, [0, 0.5**0.9])):
            annealing.set(tenth * max_steps // 60, max_steps)
            assert model.config.mask_probabilities == pytest.approx(expected)
        annealing.set(max_steps * 5 // 6, max_steps)
        assert model.config.mask_probabilities == [0, 0]


def test_progress_by_the_clock_ends_it_too():
    budget = TimeBudget(max_minutes=1)
    model = ours()
    annealing = MaskAnnealing(model, progress=budget.progress)
    annealing.set(0, 100)
    assert model.config.mask_probabilities == [1, 1]
    budget.minutes_spent = 1.0
    annealing.set(1, 100)
    assert model.config.mask_probabilities == [0, 0]


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([[0, 0.5]], "for each of the query_blocks=2"),
        ([[0, 0.5], [0.5, 0.5]], "start and end, in shares of the training"),
        ([[0, 0.5], [0.5, 3000]], "start and end, in shares of the training"),
        ([[0, 0.5], [0.5]], "start and end"),
    ],
)
def test_wrong_intervals(intervals, message):
    with pytest.raises(ValueError, match=message):
        MaskAnnealing(ours(), intervals)


def test_other_models_have_none():
    model = MaskClsForUniversalSegmentation(maskcls_config())
    assert choose_annealing(model, None) is None and choose_annealing(model, False) is None
    with pytest.raises(ValueError, match="only an EoMT"):
        choose_annealing(model, True)


def test_fine_tuning_anneals_by_an_explicit_choice_that_is_logged(tmp_path, caplog):
    """Probabilities of 0, as published, stay unless somebody says otherwise; of a new model they are annealed."""
    assert choose_annealing(ours(), None) is not None
    loaded = MaskClsForUniversalSegmentation.from_pretrained(saved(ours(), tmp_path))
    caplog.clear()
    assert choose_annealing(loaded, None) is None
    assert "masked with the probabilities [0.0, 0.0] throughout" in caplog.text
    caplog.clear()
    assert choose_annealing(loaded, True) is not None
    assert "annealed anew, instead of the [0.0, 0.0] of" in caplog.text


class Write(TrainerCallback):
    """The probabilities with which each forward pass of the training is made."""

    def __init__(self, model):
        self.seen: list[list[float]] = []
        model.register_forward_pre_hook(lambda module, _: self.seen.append([*module.config.mask_probabilities]))


def test_the_trainer_anneals_saves_and_resumes(tmp_path, processor):
    model = ours()
    seen = Write(model)
    trainer_of(model, tmp_path, processor, callbacks=[seen]).train()
    assert seen.seen == [[1, 1], [1, 1], [0, 1], [0, 1], [0, 1], [0, 0]]
    stored = [json.loads((tmp_path / f"checkpoint-{step}/config.json").read_text()) for step in (3, 6)]
    assert [config["mask_probabilities"] for config in stored] == [[0, 1], [0, 0]]
    again = ours()
    seen = Write(again)
    trainer_of(again, tmp_path, processor, callbacks=[seen]).train(str(tmp_path / "checkpoint-3"))
    assert seen.seen == [[0, 1], [0, 1], [0, 0]]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    _, report = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "checkpoint-3", output_loading_info=True)
    assert not any(report.values())
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():  # no masks in inference: nothing is drawn
        state = torch.get_rng_state()
        model.eval()(pixel_values)
        assert torch.equal(torch.get_rng_state(), state)


def test_the_best_checkpoint_has_its_own_probabilities(tmp_path, processor):
    model = ours()
    options = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=3, metric_for_best_model="loss")
    trainer = trainer_of(model, tmp_path, processor, eval_dataset=Squares(2), **options)
    trainer.evaluate = lambda *_, **__: {"eval_loss": trainer.state.global_step}  # the first one is the best
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert model.config.mask_probabilities == [0, 1]


def test_averaged_weights_follow_the_probabilities_of_the_model(processor):
    """What the average copies are weights: they are run, and saved, with the model's own configuration."""
    model = ours()
    ema = ExponentialMovingAverage(model, 0.5)
    MaskAnnealing(model).set(1, 1)
    ema.update(model)
    with ema.swapped(model):
        assert model.config.mask_probabilities == [0, 0]


@pytest.mark.parametrize(("dynamic", "programs"), [(True, 3), (None, 5)])
def test_a_compiled_model_is_not_compiled_anew_at_each_step(dynamic, programs):
    """Once for each block whose probability becomes 0; without dynamic=True once more to take it as a symbol."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = ours().train()
    encoder, module = model.model.encoder, model.segmentation_module

    @torch.compile(backend=counter, fullgraph=True, dynamic=dynamic)
    def embed(pixel_values):
        return encoder(pixel_values, lambda *arguments: module(*arguments), True).segment_embeddings[-1]

    annealing = MaskAnnealing(model)
    with torch.no_grad():
        for step in range(61):
            annealing.set(step, 60)
            embed(torch.zeros(1, 3, 64, 64))
    assert counter.frame_count <= programs


# -- learning rates by layer -------------------------------------------------------------------------------------------


def rates(model: nn.Module, **options) -> dict[str, tuple[float, float]]:
    optimizer = build_optimizer(model, 1.0, 0.05, **options)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


@pytest.mark.parametrize("family", ["dinov2", "dinov3", "pyramid"])
def test_blocks_learn_slower_the_deeper_they_lie(family):
    """Block i of N has 0.8 ** (N - 1 - i) of the rate, embeddings count as block 0, the last norm learns in full."""
    if family == "dinov2":
        model, layers, norm = ours(), "encoder.layer", "layernorm"
    elif family == "dinov3":
        from transformers import DINOv3ViTConfig

        vit = DINOv3ViTConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, patch_size=8
        )
        model, layers, norm = ours(backbone_config=vit), "model.layer", "norm"
    else:
        vit = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=8)
        model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=vit))
        layers, norm = "encoder.layer", "layernorm"
    for name, (rate, decay) in rates(model, layer_decay=0.8, decay_norms=True).items():
        inside = name.partition(".vit.")[2]
        if inside.startswith(layers):
            expected = 0.8 ** (3 - int(inside.removeprefix(f"{layers}.").split(".")[0]))
        else:
            expected = 0.8**3 if inside.startswith("embeddings") else 1.0
        assert rate == pytest.approx(expected), name
        assert decay == 0.05
        assert not inside or inside.startswith((layers, norm, "embeddings")), name


def test_blocks_with_queries_may_learn_at_the_whole_rate():
    """As in the published trainings with DINOv3."""
    model = ours()
    found = rates(model, layer_decay=0.8, decay_query_blocks=False)
    of_block = {n.split("encoder.layer.")[1][0]: rate for n, (rate, _) in found.items() if "encoder.layer." in n}
    assert of_block == {"0": pytest.approx(0.8**3), "1": pytest.approx(0.8**2), "2": 1.0, "3": 1.0}


def test_norms_and_tokens_of_the_vit_have_no_decay_by_default():
    found = rates(ours())
    assert found["model.encoder.vit.embeddings.cls_token"] == (1.0, 0.0)
    assert found["model.encoder.queries_embedder.weight"] == (1.0, 0.0)
    assert found["model.encoder.vit.layernorm.weight"] == (1.0, 0.0)
    assert found["model.encoder.vit.encoder.layer.0.mlp.fc1.weight"] == (1.0, 0.05)


def test_the_vit_of_an_eomt_is_its_backbone():
    found = rates(ours(), backbone_multiplier=0.1)
    assert all((rate == 0.1) == (".vit." in name) for name, (rate, _) in found.items())


def test_layer_decay_needs_a_plain_vit():
    with pytest.raises(ValueError, match="layer_decay is for the blocks of a plain ViT"):
        build_optimizer(MaskClsForUniversalSegmentation(maskcls_config()), 1.0, 0.05, layer_decay=0.8)
    with pytest.raises(ValueError, match="layer_decay=0 must"):
        build_optimizer(ours(), 1.0, 0.05, layer_decay=0)


def test_heads_warm_up_first_and_then_the_encoder():
    """The encoder is at 0 for the warm-up of the heads; both curves begin after their warm-up."""
    optimizer = build_optimizer(ours(), 1.0, 0.05, layer_decay=0.8)
    scheduler = build_scheduler(optimizer, "poly", 100, warmup_steps=10, warmup_factor=0.0, backbone_warmup_steps=20)
    full = [group["initial_lr"] for group in optimizer.param_groups]
    for step in range(101):
        for group, whole in zip(optimizer.param_groups, full, strict=True):
            if group["of_backbone"]:
                warmup, begin = (step - 10) / 20, 30
            else:
                warmup, begin = step / 10, 10
            curve = (1 - max(0, step - begin) / (100 - begin)) ** 0.9
            assert group["lr"] == pytest.approx(whole * min(1, max(0, warmup)) * curve), step
        optimizer.step()
        scheduler.step()
    assert {group["of_backbone"] for group in optimizer.param_groups} == {True, False}
    assert not optimizer.param_groups[0]["of_backbone"]  # whose rate is logged


# -- a frozen encoder --------------------------------------------------------------------------------------------------


def pyramid_over_vit(drop: float = 0.5, **fields) -> MaskClsForUniversalSegmentation:
    vit = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8, drop_path_rate=drop,
        hidden_dropout_prob=drop,
    )  # fmt: skip
    return MaskClsForUniversalSegmentation(maskcls_config(backbone_config=vit, num_queries=9, **fields))


FROZEN = {
    "EoMT": lambda: ours(freeze_backbone=True, mask_probabilities=[1.0, 0.5]),
    "ViT and decoder": lambda: pyramid_over_vit(freeze_backbone=True),
    "ResNet": lambda: MaskClsForUniversalSegmentation(maskcls_config(freeze_backbone=True)),
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_encoder(name):
    """No gradients, no state of the optimizer, no dropout, no new statistics: all else learns."""
    model = FROZEN[name]().train()
    frozen = getattr(model.model, "backbone", None) or model.model.encoder
    frozen = getattr(frozen, "vit", frozen)
    inside = {id(p) for p in frozen.parameters()}
    before = copy.deepcopy(frozen.state_dict())
    assert not any(module.training for module in frozen.modules())
    optimizer = build_optimizer(model, 1e-3, 0.05)
    assert not inside & {id(p) for group in optimizer.param_groups for p in group["params"]}
    model(torch.randn(1, 3, 64, 64), **labels()).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in inside), parameter_name
    optimizer.step()
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()} - inside
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    model.eval()
    model.train()
    assert not any(parameter.requires_grad for parameter in frozen.parameters()) and model.training


# -- the guard against empty masks -------------------------------------------------------------------------------------


def outputs(class_score: float, mask: float) -> ModelOutput:
    classes = torch.zeros(1, 2, 4)
    classes[..., 0] = class_score
    return ModelOutput(class_queries_logits=classes, masks_queries_logits=torch.full((1, 2, 4, 4), mask))


@pytest.mark.parametrize(
    ("class_score", "mask", "segments", "step", "is_said"),
    [
        (1.0, -1.0, 1, 60, True),  # no mask
        (-1.0, 1.0, 1, 60, False),  # another class than no object is the best still
        (1.0, 1.0, 1, 60, False),
        (1.0, -1.0, 0, 60, False),  # images without segments
        (1.0, -1.0, 1, 50, False),  # in the warm-up
    ],
)
def test_collapse_to_empty_masks(class_score, mask, segments, step, is_said, caplog):
    guard = CollapseGuard()
    guard.watch(outputs(class_score, mask), [torch.zeros(segments, dtype=torch.long)])
    guard.check(step, 100, warmup_steps=50)
    assert ("collapsed to empty masks" in caplog.text) == is_said


def test_no_object_everywhere_is_a_collapse_said_once(caplog):
    guard = CollapseGuard()
    found = outputs(0.0, 1.0)
    found["class_queries_logits"][..., -1] = 2.0
    for step in (60, 70):
        guard.watch(found, [torch.zeros(1, dtype=torch.long)])
        guard.check(step, 100)
    assert caplog.text.count("collapsed") == 1
    guard.watch(outputs(1.0, 1.0), [torch.zeros(1, dtype=torch.long)])
    guard.watch(found, [torch.zeros(1, dtype=torch.long)])  # one batch since is enough
    guard.check(80, 100)
    guard.watch(found, [torch.zeros(1, dtype=torch.long)])
    guard.check(90, 100)
    assert caplog.text.count("collapsed") == 2


def test_nothing_is_said_of_outputs_without_masks(caplog):
    guard = CollapseGuard()
    guard.watch(ModelOutput(logits=torch.zeros(1)), None)
    guard.watch((torch.zeros(1),), [torch.zeros(1, dtype=torch.long)])
    guard.check(60, 100)
    assert guard.found is None and "collapsed" not in caplog.text


def test_watching_starts_no_transfer_to_the_host():
    """On meta tensors, whose values nobody can ask for."""
    guard = CollapseGuard()
    on_meta = ModelOutput(
        class_queries_logits=torch.zeros(1, 2, 4, device="meta"),
        masks_queries_logits=torch.zeros(1, 2, 4, 4, device="meta"),
    )
    for _ in range(2):
        guard.watch(on_meta, [torch.zeros(1, dtype=torch.long)])
    assert guard.found.device.type == "meta"


def test_the_trainer_warns(tmp_path, processor, caplog):
    model = ours()
    nn.init.zeros_(model.segmentation_module.class_predictor.weight)
    nn.init.zeros_(model.segmentation_module.class_predictor.bias)
    with torch.no_grad():
        model.segmentation_module.class_predictor.bias[-1] = 50.0
    with caplog.at_level(logging.WARNING):
        trainer_of(model, tmp_path, processor, steps=2).train()
    assert caplog.text.count("Step 1: no query has a class") == 1


def test_configurations_of_other_kinds_have_no_annealing():
    assert choose_annealing(SimpleNamespace(config=MaskClsConfig()), None) is None


# -- from weights of other patches -------------------------------------------------------------------------------------


def test_patches_and_positions_are_resampled_as_timm_does(tmp_path, caplog):
    """EoMT has patches of 16 pixels, made of DINOv2's of 14; the class token's position stays."""
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    fields = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    source = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=70, patch_size=14, **fields))
    torch.nn.init.normal_(source.embeddings.position_embeddings)
    source.save_pretrained(tmp_path)
    vit = Dinov2WithRegistersConfig(image_size=128, patch_size=16, **fields)
    model = MaskClsForUniversalSegmentation.from_backbone(
        tmp_path, architecture="encoder_only", query_blocks=2, backbone_config=vit
    )
    found, given = model.model.encoder.vit.state_dict(), source.state_dict()
    kernels, positions = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"
    expected = resample_patch_embed(given[kernels], [16, 16])
    torch.testing.assert_close(found[kernels], expected, rtol=0, atol=1e-5)
    expected = resample_abs_pos_embed(given[positions], new_size=[8, 8], num_prefix_tokens=1)
    torch.testing.assert_close(found[positions], expected, rtol=0, atol=1e-5)
    assert all(torch.equal(value, given[n]) for n, value in found.items() if n not in (kernels, positions))
    assert caplog.text.count("is resampled") == 2
    assert choose_annealing(model, None) is not None  # as it is new
