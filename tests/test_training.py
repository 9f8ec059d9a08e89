"""Parts of a training: the time budget, averaged weights, progress, gradient checkpointing, and the Trainer by hand."""

from __future__ import annotations

import copy
import errno
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.data import AugmentedDataset, EpochSampler, MaskClsCollator, SegmentationFolder, TrainTransform
from maskcls_hf.metrics import Evaluator
from maskcls_hf.training import (
    ExponentialMovingAverage,
    LossMeans,
    MaskClsTrainer,
    ShowProgress,
    TimeBudget,
    TrainingLog,
    TrainingProgress,
    build_scheduler,
)
from maskcls_hf.training.build import enable_gradient_checkpointing
from maskcls_hf.training.divergence import DivergenceError
from recipes import write_squares
from tiny import maskcls_config, segments, swin

# -- time budget -------------------------------------------------------------------------------------------------


class TestTimeBudget:
    @pytest.fixture
    def clock(self, monkeypatch) -> list[float]:
        """Seconds, one for each look at the clock."""
        times: list[float] = []
        monkeypatch.setattr("maskcls_hf.training.callbacks.time.monotonic", lambda: times.pop(0))
        return times

    def test_steps_alone(self):
        budget = TimeBudget()
        budget.start()
        budget.tick()
        assert budget.progress(3, 4) == 0.75 and not budget.spent

    @pytest.mark.parametrize("minutes", [0, -1.0, math.nan, math.inf])
    def test_wrong_budgets(self, minutes):
        with pytest.raises(ValueError, match=f"max_minutes={minutes} must be above 0"):
            TimeBudget(minutes)

    def test_the_clock_ends_it(self, clock):
        clock += [0.0, 30.0, 61.0]
        budget = TimeBudget(max_minutes=1)
        control = SimpleNamespace(should_training_stop=False, should_save=False, should_evaluate=False)
        arguments = TrainingArguments(output_dir="absent")
        budget.on_train_begin(arguments, None, control)
        budget.on_step_end(arguments, None, control)
        assert budget.progress(0, 1000) == pytest.approx(0.5)
        assert not control.should_training_stop
        budget.on_step_end(arguments, None, control)
        assert control.should_training_stop and control.should_save and control.should_evaluate
        assert budget.progress(0, 1000) == 1.0

    def test_the_learning_rate_follows_the_clock(self, clock):
        clock += [0.0, 30.0, 60.0]
        budget = TimeBudget(max_minutes=1)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler = build_scheduler(optimizer, "cosine", 1000, progress=lambda step: budget.progress(step, 1000))
        budget.start()
        rates = []
        for _ in range(2):
            budget.tick()
            optimizer.step()
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
        assert rates == pytest.approx([1.0, 0.0])

    def test_time_spent_survives_a_checkpoint(self):
        first, second = TimeBudget(max_minutes=10), TimeBudget(max_minutes=10)
        first.minutes_spent = 4.0
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        second.start()
        assert second.progress(0, 100) == pytest.approx(0.4)

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="max_minutes"):
            TimeBudget(0)


# -- averaged weights --------------------------------------------------------------------------------------------


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def steps(model: nn.Module, number: int):
    """`model` after each of some steps of training on random numbers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(number):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        yield {name: value.clone() for name, value in model.state_dict().items()}


class TestExponentialMovingAverage:
    @pytest.mark.parametrize("decay", [-0.1, 1.5, math.nan])
    def test_wrong_decays(self, decay):
        with pytest.raises(ValueError, match=f"decay={decay} must be from 0 to 1"):
            ExponentialMovingAverage(nn.Linear(2, 2), decay)

    def test_is_the_average_by_hand(self):
        model, decay = with_batch_norm(), 0.5
        ema, expected = ExponentialMovingAverage(model, decay), None
        for number, state in enumerate(steps(model, 12)):
            ema.update(model)
            ramp = min(decay, (1 + number) / (10 + number))
            expected = state if expected is None else {
                name: ramp * expected[name] + (1 - ramp) * value if value.is_floating_point() else value
                for name, value in state.items()
            }  # fmt: skip
        assert ramp == decay
        assert expected is not None
        with ema.swapped(model):
            for name, value in model.state_dict().items():
                torch.testing.assert_close(value, expected[name], msg=name)

    def test_the_decay_rises(self):
        ema = ExponentialMovingAverage(nn.Linear(2, 2), 0.99)
        decays = [ema.decay_after(updates) for updates in range(2000)]
        assert decays[:3] == [1 / 10, 2 / 11, 3 / 12]
        assert decays == sorted(decays) and max(decays) == decays[-1] == 0.99
        assert decays[889] < 0.99 == decays[890]  # (1 + t) / (10 + t) reaches it
        share = {steps: math.prod(decays[steps // 2 : steps]) for steps in (20, 200, 2000)}  # of the first half
        assert all(left < 0.01 for left in share.values()), share
        constant = ExponentialMovingAverage(nn.Linear(2, 2), 0.05)
        assert {constant.decay_after(updates) for updates in range(20)} == {0.05}

    @pytest.mark.parametrize("number", [5, 30, 100])
    def test_after_few_steps_it_is_near_the_model(self, number):
        """Of the outputs of a network with batch norm, evaluated. Without the rise the statistics are those of the
        first step, when the inputs looked to be around 0."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))
        ema, images = ExponentialMovingAverage(model, 0.999), 5 + 3 * torch.randn(8, 3, 8, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for _ in range(number):
            optimizer.zero_grad()
            (model(images + torch.randn_like(images)) - images[:, :1, 1:-1, 1:-1]).square().mean().backward()
            optimizer.step()
            ema.update(model)

        @torch.no_grad()
        def evaluated() -> torch.Tensor:
            model.eval()
            return model(images)

        own = evaluated()
        with ema.swapped(model):
            averaged = evaluated()
        assert (averaged - own).norm() < 0.25 * own.norm()
        variance = model[1].running_var
        assert torch.allclose(ema.average.module[1].running_var, variance, rtol=0.35)

    def test_counts_and_indices_are_copied(self):
        model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=swin()))
        ema = ExponentialMovingAverage(model, 0.9)
        for _ in range(20):
            ema.update(model)
        whole = {name: value for name, value in model.named_buffers() if not value.is_floating_point()}
        assert any("relative_position_index" in name for name in whole)
        for name, value in ema.average.module.named_buffers():
            assert name not in whole or torch.equal(value, whole[name]), name

    def test_the_model_has_its_own_weights_afterwards(self):
        model = with_batch_norm()
        ema = ExponentialMovingAverage(model, 0.9)
        for _ in steps(model, 3):
            ema.update(model)
        own = copy.deepcopy(model.state_dict())
        averaged = copy.deepcopy(ema.state_dict())
        with pytest.raises(KeyError), ema.swapped(model):
            assert not torch.equal(model[0].weight, own["0.weight"])
            raise KeyError
        assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
        assert all(torch.equal(value, averaged[name]) for name, value in ema.state_dict().items())

    def test_before_the_first_step_there_is_no_average(self):
        model = with_batch_norm()
        ema = ExponentialMovingAverage(model, 0.9)
        model[0].weight.data += 1
        own = model[0].weight.clone()
        with ema.swapped(model):
            assert torch.equal(model[0].weight, own)

    def test_goes_on_from_its_saved_state(self):
        torch.manual_seed(1)
        model = with_batch_norm()
        one, other = ExponentialMovingAverage(model, 0.99), ExponentialMovingAverage(model, 0.99)
        for number, _ in enumerate(steps(model, 4)):  # the decay rises all the time
            if number == 2:
                state = io.BytesIO()
                torch.save(one.state_dict(), state)
                state.seek(0)
                other.load_state_dict(torch.load(state, weights_only=True))
            one.update(model)
            if number >= 2:
                other.update(model)
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())

    def test_states_of_before_are_read_and_count(self):
        """They are those of torch's `AveragedModel` at a constant decay."""
        before = AveragedModel(nn.Linear(2, 2), multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
        for _ in range(31):
            before.update_parameters(nn.Linear(2, 2))
        model = nn.Linear(2, 2)
        ema = ExponentialMovingAverage(model, 0.999)
        ema.load_state_dict(before.state_dict())
        ema.update(model)
        expected = torch.lerp(before.module.weight, model.weight, 1 - 32 / 41)
        torch.testing.assert_close(ema.average.module.weight, expected)


# -- progress ----------------------------------------------------------------------------------------------------


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)


ENTRY = {"loss": 3.25, "loss_mask": 0.05, "learning_rate": 1e-4, "grad_norm": 2.0}
SCORES = {"eval_loss": 3.0, "eval_mean_iou": 0.5, "eval_iou_sky": 0.25, "eval_runtime": 9.0}


class TestProgress:
    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch) -> None:
        """Half a second between looks at the clock."""
        times = iter(range(10**6))
        monkeypatch.setattr("maskcls_hf.training.progress.time.monotonic", lambda: next(times) / 2)

    def test_lines_without_a_terminal(self):
        progress = TrainingProgress(100, 8, console=console(False))
        progress.start()
        for step in (1, 2):
            progress.advance(step)
        progress.log(ENTRY)
        progress.log(SCORES)
        progress.stop()
        assert progress.console.file.getvalue() == (
            "step 2/100  loss 3.25  mask 0.05  learning rate 0.0001  16 images/s  0:00:49 left\n"
            "step 2/100  evaluation: loss 3  mean_iou 0.5\n"
        )

    def test_a_bar_on_a_terminal(self):
        progress = TrainingProgress(100, 8, console=console(True))
        progress.start(40)
        progress.log(ENTRY)
        progress.advance(41)
        progress.evaluating(1, 2)
        progress.log(SCORES)
        progress.stop()
        text = progress.console.file.getvalue()
        assert "41/100" in text and "loss 3.25  mask 0.05" in text and "16 images/s  0:00:30 left" in text
        assert "Evaluating" in text and "mean_iou 0.5" in text

    def test_evaluation_is_no_part_of_the_speed(self):
        progress = TrainingProgress(100, 8, console=console(False))
        progress.start()
        progress.advance(1)
        for _ in range(50):
            progress.resume_clock()
        progress.advance(2)
        progress.log(ENTRY)
        assert "16 images/s" in progress.console.file.getvalue()

    def test_the_budget_bounds_the_time_left(self):
        budget = TimeBudget(max_minutes=1)
        budget.minutes_spent = 0.5
        progress = TrainingProgress(10**6, 8, budget, console=console(False))
        progress.start()
        progress.advance(1)
        progress.log(ENTRY)
        assert "0:00:30 left" in progress.console.file.getvalue()

    def test_only_the_main_process_shows_it(self):
        for terminal in (True, False):
            progress = TrainingProgress(100, 8, show=False, console=console(terminal))
            progress.start()
            progress.advance(1)
            progress.log(ENTRY)
            progress.stop()
            assert progress.console.file.getvalue() == ""

    def test_log_and_means(self, tmp_path):
        means, log = LossMeans(), TrainingLog(max_steps=9)
        for value in (1.0, 2.0):
            means.add({"loss": torch.tensor(value), "loss_mask": torch.tensor(3.0), "loss_mask_0": torch.tensor(4.0)})
        accelerator = SimpleNamespace(num_processes=1)
        log.add(2, 0.5, means.pop(accelerator))
        means.add({"loss": torch.tensor(7.0)})
        log.add(3, 0.75, means.pop(accelerator))
        again = TrainingLog(max_steps=9)
        again.load_state_dict(log.state_dict())
        again.save(tmp_path)
        assert json.loads((tmp_path / "trainer_state.json").read_text()) == {
            "global_step": 3,
            "max_steps": 9,
            "log_history": [
                {"loss": 1.5, "loss_mask": 3.0, "epoch": 0.5, "step": 2},
                {"loss": 7.0, "epoch": 0.75, "step": 3},
            ],
        }


# -- gradients, Trainer ------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients():
    model = MaskClsForUniversalSegmentation(maskcls_config(pixel_decoder="fpn_encoder", dropout=0.1))
    images = torch.randn(2, 3, 64, 64)
    mask_labels, class_labels = segments([(64, 64), (64, 64)], [2, 3])
    gradients = []
    for enabled in (False, True):
        if enabled:
            enable_gradient_checkpointing(model)
            assert model.model.transformer_decoder.layers[0].gradient_checkpointing
        model.zero_grad()
        torch.manual_seed(0)
        model(images, mask_labels=mask_labels, class_labels=class_labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def make_trainer(folder: Path, **options) -> MaskClsTrainer:
    """As the README shows it, without a recipe."""
    train_data, val_data = (SegmentationFolder(folder, split) for split in ("train", "val"))
    image_processor = MaskClsImageProcessor(do_resize=False, **train_data.processor_fields())
    model = MaskClsForUniversalSegmentation(maskcls_config(id2label=train_data.id2label))
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, per_device_train_batch_size=2, max_steps=3, logging_steps=1,
        dataloader_drop_last=True,
    )  # fmt: skip
    transform = TrainTransform(crop_size=32, id2label=train_data.id2label)
    defaults = {
        "data_collator": MaskClsCollator(image_processor, do_resize=False),
        "eval_collator": MaskClsCollator(image_processor, keep_ground_truth=True),
        "processing_class": image_processor,
    }
    return MaskClsTrainer(
        model=model,
        args=arguments,
        train_dataset=AugmentedDataset(train_data, transform, seed=0),
        eval_dataset=val_data,
        evaluator=Evaluator(image_processor, train_data.id2label, train_data.stuff_ids),
        **(defaults | options),
    )


class TestTrainer:
    def test_train_and_evaluate_without_a_recipe(self, tmp_path):
        shown = console(False)
        trainer = make_trainer(write_squares(tmp_path), callbacks=[ShowProgress(2, console=shown)])
        trainer.train()
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] > 0 and 0 <= metrics["eval_mean_iou"] <= 1
        assert trainer.evaluate()["eval_mean_iou"] == metrics["eval_mean_iou"]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 3
        for step, loss in enumerate(losses, start=1):
            assert f"step {step}/3  loss {loss:.4g}  cross_entropy" in shown.file.getvalue()

    def test_weights_that_are_nan_are_said_of_the_evaluation(self, tmp_path):
        trainer = make_trainer(write_squares(tmp_path))
        for parameter in trainer.model.parameters():
            parameter.data.fill_(float("nan"))
        trainer.state.global_step = 3
        with pytest.raises(DivergenceError, match=r"evaluation after step 3 \(images image0, image1, image2\)"):
            trainer.evaluate()

    def test_augmented_data_brings_its_sampler(self, tmp_path):
        trainer = make_trainer(write_squares(tmp_path))
        sampler = trainer.get_train_dataloader().base_dataloader.batch_sampler.sampler
        assert isinstance(sampler, EpochSampler)
        sampler.set_epoch(2)
        assert {epoch for epoch, _ in sampler} == {2}

    @pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
    def test_evaluation_in_half_precision(self, tmp_path, option):
        trainer = make_trainer(write_squares(tmp_path))
        expected = trainer.evaluate()
        setattr(trainer.args, option, True)
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=0.02)
        assert 0 <= found["eval_mean_iou"] <= 1

    def test_without_a_collator_the_image_processor_makes_one(self, tmp_path):
        expected = make_trainer(write_squares(tmp_path)).evaluate()
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, data_collator=None, eval_collator=None)
        assert trainer.evaluate()["eval_mean_iou"] == expected["eval_mean_iou"]
        assert "ground_truth" not in next(iter(trainer.get_train_dataloader()))
        with pytest.raises(ValueError, match="needs data_collator=maskcls_hf.data.MaskClsCollator"):
            make_trainer(tmp_path, data_collator=None, processing_class=None)

    @pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics"])
    def test_what_the_evaluator_replaces_is_refused_by_name(self, tmp_path, name):
        with pytest.raises(TypeError, match=f"MaskClsTrainer has no {name}: .*evaluator=maskcls_hf.metrics.Evaluator"):
            make_trainer(write_squares(tmp_path), **{name: lambda *_: {}})

    def test_several_gpus_in_one_process_are_refused(self):
        with pytest.raises(ValueError, match="accelerate launch"):
            MaskClsTrainer(model=nn.Linear(1, 1), args=SimpleNamespace(n_gpu=2))

    def test_an_evaluator_without_ground_truth_is_refused_before_the_training(self, tmp_path):
        processor = MaskClsImageProcessor()
        with pytest.raises(ValueError, match="needs ground_truth: eval_collator with keep_ground_truth=True"):
            MaskClsTrainer(
                model=MaskClsForUniversalSegmentation(maskcls_config()),
                args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
                data_collator=MaskClsCollator(processor),
                evaluator=Evaluator(processor, {0: "a"}),
            )


# -- what is overridden of transformers' Trainer, and why ----------------------------------------------------------


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x - labels).square().mean()}


def plain_trainer(folder: Path, **options) -> Trainer:
    """transformers' own, on four samples: with batches of one an epoch has four steps."""
    arguments = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=1,
        dataloader_pin_memory=False, max_steps=3, save_steps=3,
    )  # fmt: skip
    samples = [{"x": torch.ones(1), "labels": torch.zeros(1)}] * 4
    return Trainer(model=Line(), args=arguments, train_dataset=samples, **options)


class TestPrivateMethods:
    """Each that is overridden, and what transformers' Trainer would do without. Where one of these tests fails, Trainer
    has learned it, and the method can go."""

    def test_there_are_three(self):
        own = {name for kind in MaskClsTrainer.__mro__ if kind not in Trainer.__mro__ for name in vars(kind)}
        private = {name for name in own if name.startswith("_") and not name.startswith("__")}
        assert {name for name in private if hasattr(Trainer, name)} == {
            "_get_grad_norm",
            "_run_epoch",
            "_save_checkpoint",
        }
        assert not {name for name in private if name in vars(plain_trainer(Path("absent")))}

    def test_save_checkpoint_would_leave_half_of_one(self, tmp_path, monkeypatch):
        save = torch.save

        def until_full(state, file, *args, **kwargs):
            if str(file).endswith("scheduler.pt"):
                raise OSError(errno.ENOSPC, "No space left on device")
            save(state, file, *args, **kwargs)

        monkeypatch.setattr(torch, "save", until_full)
        for out, trainer in (
            (tmp_path / "plain", plain_trainer(tmp_path / "plain")),
            (tmp_path / "out", make_trainer(write_squares(tmp_path))),
        ):
            trainer.args.save_strategy, trainer.args.save_steps = "steps", 3
            with pytest.raises(OSError, match="No space left on device"):
                trainer.train()
            assert (get_last_checkpoint(str(out)) is None) == isinstance(trainer, MaskClsTrainer)

    def test_run_epoch_would_make_a_step_more(self, tmp_path):
        """Of a finished training that ended within an epoch; `test_a_finished_training_makes_no_step_more` is ours."""
        plain_trainer(tmp_path).train()
        again = plain_trainer(tmp_path)
        again.train(resume_from_checkpoint=True)
        assert again.args.max_steps == 3 and again.state.global_step == 4

    def test_no_callback_is_told_the_norm_of_the_gradients(self, tmp_path):
        class Told(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                self.names = set(kwargs)

        told = Told()
        trainer = plain_trainer(tmp_path, callbacks=[told])
        trainer.train()
        assert "model" in told.names and not any("norm" in name for name in told.names)
        assert not any("norm" in name for name in vars(trainer))
