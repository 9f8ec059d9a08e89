"""2 processes x batch 2, 1 x batch 4 and 2 accumulated batches of 2 make the same step; several processes agree."""

from __future__ import annotations

import errno
import math
import os
import re
import tempfile
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, Subset
from transformers import TrainerCallback, TrainingArguments

from distributed import run_in_processes
from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor, PerPixelForSemanticSegmentation
from maskcls_hf.data import MaskClsCollator
from maskcls_hf.metrics import Evaluator
from maskcls_hf.training import MaskClsTrainer, StopSignals
from maskcls_hf.training.checkpoints import saving
from maskcls_hf.training.divergence import DivergenceError, check_finite
from maskcls_hf.training.loop import evaluate
from maskcls_hf.training.processes import items_of_step, share_buffers
from maskcls_hf.utils.writing import CannotWrite
from resumable import Squares, make_trainer
from tiny import maskcls_config, perpixel_config, segments

Step = dict[str, torch.Tensor]  # gradients, by name of the parameter, and losses
# Segments of the four images of the step; in two processes the first two images are of process 0. There are 7 queries.
SEGMENTS = {"different": [1, 9, 5, 0], "none on one": [0, 0, 3, 1], "none at all": [0, 0, 0, 0]}
# Labeled rows of their label maps.
LABELED = {"different": [48, 1, 7, 30], "none on one": [0, 0, 13, 48]}
CASES = [("mask", name) for name in SEGMENTS] + [("pixel", name) for name in LABELED]
SPLITS = {"2 processes": (2, 1), "2 batches": (2, 2), "1 batch": (4, 1)}  # batch size, accumulated batches


class Images(Dataset):
    def __init__(self, kind: str, case: str):
        numbers = torch.Generator().manual_seed(3)
        torch.manual_seed(4)
        self.images = torch.randn(4, 3, 48, 48, generator=numbers)
        if kind == "mask":
            masks, classes = segments([(48, 48)] * 4, SEGMENTS[case])
            self.targets = [{"mask_labels": m, "class_labels": c} for m, c in zip(masks, classes, strict=True)]
        else:
            labels = torch.randint(5, (4, 48, 48), generator=numbers)
            for image, rows in enumerate(LABELED[case]):
                labels[image, rows:] = 255
            self.targets = [{"labels": of_image} for of_image in labels]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], **self.targets[index]}


class Stream(IterableDataset):
    def __iter__(self):
        data = Images("mask", "different")
        return (data[index] for index in range(len(data)))


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    stacked = ("pixel_values", "labels")
    values = {name: [item[name] for item in items] for name in items[0]}
    return {name: torch.stack(value) if name in stacked else value for name, value in values.items()}


def make_model(kind: str):
    """Nothing in it is random or couples the images."""
    torch.manual_seed(0)
    fields = dict(freeze_batch_norm=True, dropout=0.0)
    if kind == "mask":
        return MaskClsForUniversalSegmentation(maskcls_config(**fields))
    return PerPixelForSemanticSegmentation(perpixel_config(**fields))


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.step: Step = {}

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.step |= gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_of_trainer(kind: str, case: str, batch: int, accumulate: int, stream: bool = False) -> Step:
    keep = KeepGradients()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0, logging_steps=1, save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False, train_sampling_strategy="sequential",
            per_device_eval_batch_size=batch * accumulate,
        )  # fmt: skip
        data = Images(kind, case)
        trainer = MaskClsTrainer(
            model=make_model(kind), args=arguments, train_dataset=Stream() if stream else data, eval_dataset=data,
            data_collator=collate, callbacks=[keep],
        )  # fmt: skip
        keep.step["eval_loss"] = torch.tensor(trainer.evaluate()["eval_loss"])
        trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    keep.step |= {name: torch.tensor(log[name]) for name in log if name.startswith("loss")}
    return keep.step


def step_of_loop(kind: str, case: str, batch: int, accumulate: int, exact: bool = True) -> Step:
    """A step of a loop with Accelerate. Not `exact`: the model itself counts; without accumulation it knows all."""
    accelerator = Accelerator(cpu=True)
    bare, data = make_model(kind), Images(kind, case)
    loader = DataLoader(data, batch, sampler=SequentialSampler(data), collate_fn=collate)
    model, loader = accelerator.prepare(bare, loader)
    batches = list(loader)
    assert len(batches) == accumulate
    items = items_of_step(batches, bare.config, accelerator)
    total = torch.zeros(())
    for number, part in enumerate(batches):
        with torch.enable_grad() if number == accumulate - 1 else accelerator.no_sync(model):
            if exact:
                loss = model(**part, num_items_in_batch=items).loss * accelerator.num_processes
            else:
                loss = model(**part).loss
            accelerator.backward(loss)
        total += loss.detach()
    return gradients(bare) | {"loss": accelerator.reduce(total, "mean")}


@cache
def steps(case: tuple[str, str], split: str) -> dict[str, Step]:
    batch, accumulate = SPLITS[split]
    made = {
        "trainer": step_of_trainer(*case, batch, accumulate),
        "loop": step_of_loop(*case, batch, accumulate),
    }
    if accumulate == 1:
        made["model"] = step_of_loop(*case, batch, 1, exact=False)
    return made


UNEVEN = (5, 7, 1)  # images that two processes with batches of 2 do not share evenly: of 5 and of 1 one has none


def scores(batch: int, images: int = 5, loop: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    names = {0: "even", 1: "odd"}
    processor = MaskClsImageProcessor(num_labels=2, do_resize=False)
    evaluator = Evaluator(processor, names, (0,), tasks=("semantic", "panoptic", "instance"), threshold=0.2)
    model = MaskClsForUniversalSegmentation(maskcls_config(id2label=names))
    collator = MaskClsCollator(processor, keep_ground_truth=True)
    if loop:
        accelerator = Accelerator(cpu=True)
        loader = accelerator.prepare(DataLoader(Squares(images), batch, collate_fn=collator))
        run = SimpleNamespace(evaluator=evaluator, averaged=lambda network: nullcontext())
        model, out, stop = accelerator.prepare(model), Path("absent"), StopSignals()
        metrics = evaluate(run, model, loader, accelerator, out, 0, stop)
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, per_device_eval_batch_size=batch, use_cpu=True, report_to="none", disable_tqdm=True,
                dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = MaskClsTrainer(
                model=model, args=arguments, eval_dataset=Squares(images), data_collator=MaskClsCollator(processor),
                evaluator=evaluator, eval_collator=collator,
            )  # fmt: skip
            metrics = trainer.evaluate()
    measured = ("loss", "mean_iou", "pixel_accuracy", "pq", "sq", "rq", "ap", "ap50")
    return {name: metrics[f"eval_{name}"] for name in measured}


def per_pixel_loss(batch: int, images: int) -> float:
    """Of images with very different numbers of labeled pixels."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_eval_batch_size=batch, use_cpu=True, report_to="none",
            dataloader_pin_memory=False,
        )  # fmt: skip
        data = Subset(Images("pixel", "different"), range(images))
        trainer = MaskClsTrainer(model=make_model("pixel"), args=arguments, eval_dataset=data, data_collator=collate)
        return trainer.evaluate()["eval_loss"]


class Processes:
    """All that the tests need of two processes, in one start of them (it takes longer than the rest)."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, rank: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        made = {case: steps(case, "2 processes") for case in CASES}
        made["stream"] = step_of_trainer("mask", "different", 2, 1, stream=True)
        torch.save(made, self.folder / f"steps-{rank}.pt")
        return {
            "diverged": diverge_on_one(rank),
            "buffers": shared_buffers(rank),
            "saved": self.save_late(rank),
            "unwritten": self.fail_to_save_on_one(rank),
            "scores": {(images, loop): scores(2, images, loop) for images in UNEVEN for loop in (False, True)},
            "per_pixel_loss": per_pixel_loss(2, 3),
            "best": self.load_best(),
        }

    def load_best(self) -> str:
        """The checkpoint that a training ends with."""
        trainer = make_trainer(
            self.folder / "best", workers=0, batch=2, steps=2, eval_steps=1, save_steps=1, load_best_model_at_end=True
        )
        trainer.train()
        return str(trainer.state.best_model_checkpoint)

    def save_late(self, rank: int) -> list[str]:
        accelerator = Accelerator(cpu=True)
        with saving(self.folder / "checkpoint-1", accelerator) as folder:
            time.sleep(0.5 * rank)
            (folder / str(rank)).write_text("a")
        return sorted(os.listdir(self.folder / "checkpoint-1"))

    def fail_to_save_on_one(self, rank: int) -> str:
        try:
            with saving(self.folder / "checkpoint-2", Accelerator(cpu=True)):
                if rank == 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
        except CannotWrite as error:
            return str(error)
        return "written"


def diverge_on_one(rank: int) -> list[str]:
    terms = {"loss_mask": torch.tensor(1.0), "loss_dice": torch.tensor(math.nan if rank else 1.0)}
    try:
        check_finite(torch.tensor(1.0), terms, 1)
    except DivergenceError as error:
        return [name for name in terms if name in str(error)]
    return []


def shared_buffers(rank: int) -> list[float]:
    norm = torch.nn.BatchNorm2d(1)
    norm.running_mean += 1 + rank
    share_buffers(norm)
    return norm.running_mean.tolist()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    results = run_in_processes(Processes(folder), 2)
    return {"results": results, "steps": [torch.load(folder / f"steps-{rank}.pt") for rank in range(2)]}


def assert_equal(step: Step, whole: Step) -> None:
    assert step.keys() == whole.keys() and len(step) > 30
    norm = math.sqrt(sum(float(value.square().sum()) for value in whole.values()))
    for name, expected in whole.items():
        torch.testing.assert_close(step[name], expected, rtol=1e-4, atol=1e-6 * norm, msg=name)


@pytest.mark.parametrize("case", CASES, ids="-".join)
class TestEqualSteps:
    @pytest.fixture
    def whole(self, case) -> dict[str, Step]:
        return steps(case, "1 batch")

    def test_accumulated_batches(self, case, whole):
        for loop, step in steps(case, "2 batches").items():
            assert_equal(step, whole[loop])

    def test_processes(self, case, whole, processes):
        for of_rank in processes["steps"]:
            for loop, step in of_rank[case].items():
                assert_equal(step, whole[loop])

    def test_trainer_and_loop(self, whole):
        trainer = {name: value for name, value in whole["trainer"].items() if name in whole["loop"]}
        assert_equal(trainer, whole["loop"])
        assert_equal(whole["model"], whole["loop"])


class TestProcesses:
    def test_all_learn_of_a_divergence_on_one(self, processes):
        assert [result["diverged"] for result in processes["results"]] == [["loss_dice"], ["loss_dice"]]

    def test_buffers_of_the_main_one(self, processes):
        assert [result["buffers"] for result in processes["results"]] == [[1.0], [1.0]]

    def test_streamed_samples(self, processes):
        whole = step_of_trainer("mask", "different", 4, 1, stream=True)
        assert_equal(whole, steps(("mask", "different"), "1 batch")["trainer"])
        for of_rank in processes["steps"]:
            assert_equal(of_rank["stream"], whole)

    @pytest.mark.parametrize("images", UNEVEN)
    @pytest.mark.parametrize("loop", [False, True])
    def test_scores_and_loss_count_each_image_once(self, processes, images, loop):
        expected = scores(4, images)
        for result in processes["results"]:
            assert result["scores"][images, loop] == pytest.approx(expected, rel=1e-5, nan_ok=True)
        assert expected["loss"] > 0
        if images > 1:
            assert 0 < expected["mean_iou"] < 1 and 0 < expected["pixel_accuracy"] < 1

    def test_the_loss_of_per_pixel_models_counts_each_image_once(self, processes):
        expected = per_pixel_loss(4, 3)
        assert [result["per_pixel_loss"] for result in processes["results"]] == [pytest.approx(expected)] * 2

    def test_all_load_the_best_checkpoint_by_its_final_name(self, processes):
        first, second = (Path(result["best"]) for result in processes["results"])
        assert first == second and first.parent.name == "best" and first.name.startswith("checkpoint-")

    def test_a_checkpoint_waits_for_all(self, processes):
        assert [result["saved"] for result in processes["results"]] == [["0", "1", "manifest.json"]] * 2

    def test_all_learn_of_what_one_could_not_write(self, processes):
        for result in processes["results"]:
            assert re.fullmatch(
                "The checkpoint checkpoint-2 could not be .*: No space left on device.", result["unwritten"]
            )


def test_counts():
    mask, pixel = maskcls_config(), perpixel_config()
    batches = [{"class_labels": [torch.zeros(3), torch.zeros(9)]}, {"class_labels": [torch.zeros(0)]}]
    assert items_of_step(batches, mask).tolist() == [12, 3 + 7, 3]  # 7 queries
    labels = torch.tensor([[[0, 255], [4, 255]]])
    assert items_of_step([{"labels": labels}, {"labels": labels[:, :1]}], pixel).item() == 3
