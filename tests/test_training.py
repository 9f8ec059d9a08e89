"""Optimiser groups, the time budget, the Trainer and the training example on tiny data."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import SwinConfig, TrainerState, TrainingArguments

from conftest import SHARED, needs_shared
from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.data import CentreCrop, MaskClsCollator, SegmentationFolder
from maskcls_hf.metrics import SemanticEvaluator
from maskcls_hf.training import MaskClsTrainer, TimeBudget, build_optimizer, parameter_groups
from test_data import write_instances, write_semantic
from tiny import maskcls_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import evaluate_instances
import train_trainer

SWIN_TINY = SwinConfig(
    embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.3,
    out_features=["stage1", "stage2", "stage3", "stage4"],
)  # fmt: skip


def test_large_images_are_seen_by_their_area():
    images = [{"image": torch.zeros(3, *size)} for size in ((64, 64), (128, 192), (20, 20))]
    assert train_trainer.by_area(images, 64).indices == [0, 1, 1, 1, 1, 1, 1, 2]


def test_crops_side_by_side_or_the_middle_one():
    image, ids = torch.zeros(3, 70, 40), torch.arange(70 * 40).view(70, 40)
    side_by_side = [crop for _, crop in evaluate_instances.crops_of(image, ids, 32)]
    assert [int(crop[0, 0]) for crop in side_by_side] == [3 * 40 + 4, 35 * 40 + 4]
    ((_, middle),) = evaluate_instances.crops_of(image, ids, 32, middle=True)
    assert torch.equal(middle, ids[19:51, 4:36])


class TestOptimizer:
    @needs_shared
    @pytest.mark.parametrize(
        ("variant", "fields", "rates"),
        [
            ("ade20k_r50", {"freeze_batch_norm": True}, (1e-4, 1e-4, 0.1)),
            ("ade20k_swin_tiny", {"backbone_config": SWIN_TINY}, (6e-5, 1e-2, 1.0)),
        ],
    )
    def test_groups_hold_as_many_numbers_as_those_of_the_papers_code(self, variant, fields, rates):
        oracle = SHARED / "oracle"
        shapes = json.loads((oracle / "keys" / f"{variant}.json").read_text())["shapes"]
        settings = json.loads((oracle / "cases" / "optimizer.json").read_text())[variant]
        expected: Counter = Counter()
        for name, group in settings["parameters_lr_weight_decay"].items():
            expected[tuple(group)] += torch.Size(shapes[name]).numel()
        with torch.device("meta"):
            model = MaskClsForUniversalSegmentation(MaskClsConfig(num_labels=150, **fields)).train()
        groups = {
            (round(group["lr"], 12), group["weight_decay"]): sum(p.numel() for p in group["params"])
            for group in parameter_groups(model, *rates)
        }
        assert groups == {(round(lr, 12), decay): count for (lr, decay), count in expected.items()}

    def test_every_parameter_once(self):
        model = MaskClsForUniversalSegmentation(maskcls_config(pixel_decoder="fpn_encoder"))
        model.model.backbone.embedder.requires_grad_(False)
        grouped = [p for group in parameter_groups(model, 1e-3, 0.1, 0.1) for p in group["params"]]
        wanted = [p for p in model.parameters() if p.requires_grad]
        assert len(grouped) == len(wanted) and {id(p) for p in grouped} == {id(p) for p in wanted}

    def test_norms_embeddings_and_backbone(self):
        model = MaskClsForUniversalSegmentation(maskcls_config())
        group_of = {
            id(p): (group["lr"], group["weight_decay"])
            for group in build_optimizer(model, 1.0, 0.5, 0.1).param_groups
            for p in group["params"]
        }
        network = model.model
        assert group_of[id(network.transformer_decoder.queries_embedder.weight)] == (1.0, 0.0)
        assert group_of[id(network.pixel_decoder.laterals[0].norm.bias)] == (1.0, 0.0)
        assert group_of[id(network.pixel_decoder.mask_projection.bias)] == (1.0, 0.5)
        norm = next(m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d))
        assert group_of[id(norm.weight)] == (0.1, 0.0)


def make_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)


class TestTimeBudget:
    def test_steps_alone(self):
        optimizer = make_optimizer()
        scheduler = TimeBudget().schedule(optimizer, "cosine", warmup_steps=0, max_steps=4)
        rates = []
        for _ in range(5):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([2.0, 1.7071, 1.0, 0.2929, 0.0], abs=1e-4)

    def test_warm_up_and_poly(self):
        optimizer = make_optimizer()
        scheduler = TimeBudget().schedule(optimizer, "poly", warmup_steps=3, max_steps=10)
        assert scheduler.get_last_lr() == [pytest.approx(0.5)]
        for _ in range(5):
            optimizer.step()
            scheduler.step()
        assert scheduler.get_last_lr() == [pytest.approx(2 * 0.5**0.9)]

    def test_the_clock_ends_it(self, monkeypatch):
        clock = iter([0.0, 30.0, 61.0])
        monkeypatch.setattr("maskcls_hf.training.time_budget.time.monotonic", lambda: next(clock))
        budget = TimeBudget(max_minutes=1)
        control = SimpleNamespace(should_training_stop=False, should_save=False, should_evaluate=False)
        arguments = TrainingArguments(output_dir="absent")
        budget.on_train_begin(arguments, TrainerState(), control)
        budget.on_step_end(arguments, None, control)
        assert budget.progress(0, 1000) == pytest.approx(0.5)
        assert not control.should_training_stop
        budget.on_step_end(arguments, None, control)
        assert control.should_training_stop and control.should_save
        assert budget.progress(0, 1000) == 1.0

    def test_time_spent_survives_a_checkpoint(self, tmp_path):
        arguments, state = TrainingArguments(output_dir=str(tmp_path)), TrainerState(global_step=7)
        (tmp_path / "checkpoint-7").mkdir()
        first, second = TimeBudget(max_minutes=10), TimeBudget(max_minutes=10)
        first.minutes_spent = 4.0
        first.on_save(arguments, state, None)
        second.on_train_begin(arguments, state, None)
        assert second.progress(0, 100) == pytest.approx(0.4)

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="max_minutes"):
            TimeBudget(0)
        with pytest.raises(ValueError, match=r"\['cosine', 'poly'\]"):
            TimeBudget().schedule(make_optimizer(), "linear", 0, 1)


def make_trainer(folder: Path, **options) -> MaskClsTrainer:
    """A tiny model on images of three squares; nothing is random and no batch norm couples the images."""
    data = SegmentationFolder(folder, "train")
    processor = MaskClsImageProcessor(num_labels=2, size={"shortest_edge": 32})
    torch.manual_seed(0)
    fields = dict(id2label=data.id2label, freeze_batch_norm=True, dropout=0.0)
    model = MaskClsForUniversalSegmentation(maskcls_config(**fields))
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0,
        train_sampling_strategy="sequential", report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, lr_scheduler_type="constant", logging_steps=1, **options,
    )  # fmt: skip
    return MaskClsTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data,
        data_collator=MaskClsCollator(processor, CentreCrop(40), do_resize=False),
        evaluator=SemanticEvaluator(processor, data.id2label),
    )  # fmt: skip


class TestTrainer:
    def test_accumulated_batches_equal_one_batch(self, tmp_path):
        folder = write_instances(tmp_path, count=4)
        # The crop cuts some squares off, so that the batches differ in their numbers of segments.
        weights, losses = [], []
        for options in (
            {"per_device_train_batch_size": 4},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        ):
            trainer = make_trainer(folder, **options)
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
            weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5, msg=name)

    def test_counts_of_a_step(self, tmp_path):
        trainer = make_trainer(write_instances(tmp_path), per_device_train_batch_size=2)
        batches = [{"class_labels": [torch.zeros(3), torch.zeros(9)]}, {"class_labels": [torch.zeros(0)]}]
        counts = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        assert counts.tolist() == [12, 3 + 7, 3]  # 7 queries

    def test_evaluation_keeps_counts_only(self, tmp_path):
        trainer = make_trainer(write_instances(tmp_path), per_device_eval_batch_size=3)
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] > 0
        assert 0 <= metrics["eval_mean_iou"] <= 1
        assert trainer.evaluate()["eval_mean_iou"] == metrics["eval_mean_iou"]

    def test_several_gpus_in_one_process_are_refused(self):
        with pytest.raises(ValueError, match="accelerate launch"):
            MaskClsTrainer(model=nn.Linear(1, 1), args=SimpleNamespace(n_gpu=2))


def run_example(data: Path, output: Path, *options: str) -> dict[str, float]:
    return train_trainer.main(
        [
            f"--data={data}", f"--output={output}", "--preset=tiny", "--crop=32", "--image-size=32", "--workers=0",
            "--eval-crop=32", "--batch-size=2", "--save-every=2", "--eval-every=1000", "--log-every=2", *options,
        ]
    )  # fmt: skip


class TestExamples:
    def test_train_resume_fine_tune_evaluate(self, tmp_path, capsys):
        squares = write_instances(tmp_path / "squares")
        write_instances(squares, "val", count=2)
        output = tmp_path / "out"
        metrics = run_example(squares, output, "--max-steps=2")
        assert metrics["eval_loss"] > 0 and "eval_iou_square" in metrics
        options = ("--resume", "--any-orientation", "--any-contrast", "--max-minutes=5")
        run_example(squares, output, "--max-steps=4", *options)
        minutes = [json.loads(file.read_text())["minutes_spent"] for file in output.glob("*/time_budget.json")]
        assert len(minutes) == 2 and minutes[0] != minutes[1]
        assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 4
        assert (output / "preprocessor_config.json").is_file()

        scores = evaluate_instances.main(
            [f"--model={output}", f"--data={squares}", "--crop", "0", "24", f"--output={tmp_path / 'scores.json'}"]
        )
        assert set(scores) == {"whole images", "24 px crops"}
        assert {"iou_square", "f1", "ap"} <= set(scores["24 px crops"])
        assert (
            json.loads((tmp_path / "scores.json").read_text())["whole images"].keys() == scores["whole images"].keys()
        )

        halves = write_semantic(tmp_path / "halves", sizes=((32, 40), (40, 32)))
        write_semantic(halves, sizes=((32, 40),), split="val")
        metrics = run_example(halves, tmp_path / "fine", "--max-steps=1", f"--model={output}")
        assert {"eval_iou_left", "eval_iou_right"} <= set(metrics)

    def test_learns(self, tmp_path):
        squares = write_instances(tmp_path)
        write_instances(squares, "val")
        options = ("--max-steps=60", "--lr=3e-3", "--warmup-steps=5", "--batch-size=4", "--cache", "--save-every=1000")
        assert run_example(squares, tmp_path / "out", *options, "--scale", "1", "1")["eval_mean_iou"] > 0.8

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--model=absent"], "no saved model"),
            (["--resume"], "no checkpoint"),
            (["--train-split=absent"], "No split folder"),
        ],
    )
    def test_bad_paths(self, tmp_path, capsys, options, message):
        squares = write_instances(tmp_path)
        write_instances(squares, "val")
        with pytest.raises(SystemExit) as error:
            run_example(squares, tmp_path / "out", *options)
        assert message in capsys.readouterr().err + str(error.value)
