"""A tiny training with everything that makes resumes inexact, for tests that kill it.

`python resumable.py OUTPUT --loop trainer ...` trains; `losses.txt` gets a line "step loss" of each step, the loss in
hexadecimal, and `weights.pt` has the final weights, raw and averaged. Dropout, batch norm, accumulation, workers that
stay alive, evaluation in between.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from transformers import TrainerCallback, TrainingArguments, set_seed

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.data import MaskClsCollator
from maskcls_hf.data.augmented import AugmentedDataset, EpochSampler
from maskcls_hf.data.sample import Sample, Segments
from maskcls_hf.training import ExponentialMovingAverage, MaskClsTrainer, build_optimizer, build_scheduler, checkpoints
from maskcls_hf.training.checkpoints import checkpoint_to_resume, load_state, rng_free, save_state
from maskcls_hf.training.loop import epoch_batches
from maskcls_hf.training.processes import items_of_step, share_buffers
from tiny import maskcls_config

# 4 steps an epoch in one process, 2 in two: checkpoints lie within the first and a later epoch, and between two.
STEPS, SAVE_EVERY, EVALUATE_EVERY, ACCUMULATE, SEED = 8, 3, 4, 2, 5


class Squares(Dataset):
    """Image i shows i % 4 squares, so that batches differ in their numbers of segments."""

    def __init__(self, length: int = 16):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        numbers = torch.Generator().manual_seed(index)
        image = torch.randint(120, (3, 48, 48), dtype=torch.uint8, generator=numbers)
        ids = torch.zeros(48, 48, dtype=torch.int32)
        for number in range(index % 4):
            top, left = torch.randint(40, (2,), generator=numbers).tolist()
            ids[top : top + 8, left : left + 8] = number + 1
            image[:, top : top + 8, left : left + 8] += 100
        classes: dict[int, int | None] = {0: None} | {number + 1: number % 2 for number in range(3)}
        return Sample(
            image=tv_tensors.Image(image),
            segments=Segments.from_ids(ids, classes, name=str(index)),
        )


def noise(sample: Sample, seed: int | tuple[int, ...]) -> Sample:
    """An augmentation that is a function of the seed."""
    numbers = torch.Generator().manual_seed(hash(seed) % 2**32)
    change = torch.randint(20, sample["image"].shape, dtype=torch.uint8, generator=numbers)
    return {**sample, "image": tv_tensors.Image(sample["image"] + change)}


def make_parts(model=None, processor=None):
    set_seed(SEED)
    processor = processor or MaskClsImageProcessor(num_labels=2, do_resize=False)
    if model is None:
        model = MaskClsForUniversalSegmentation(maskcls_config(dropout=0.3, id2label={0: "even", 1: "odd"}))
    model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, 1e-3, 1e-2, 0.5)
    scheduler = build_scheduler(optimizer, "poly", STEPS, warmup_steps=2)
    set_seed(SEED)  # as Trainer does when it is made
    return model, optimizer, scheduler, MaskClsCollator(processor), ExponentialMovingAverage(model, 0.9)


def write_loss(output: Path, step: int, loss: float) -> None:
    with (output / "losses.txt").open("a") as file:
        file.write(f"{step} {loss.hex()}\n")


class WriteLosses(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs) -> None:
        for name in ("loss", "eval_loss"):
            if name in logs and state.is_world_process_zero:
                step = state.global_step if name == "loss" else -state.global_step
                write_loss(Path(args.output_dir), step, logs[name])


def make_trainer(
    output: Path, workers: int, batch: int, steps: int = STEPS, model=None, processor=None, **options
) -> MaskClsTrainer:
    model, optimizer, scheduler, collator, ema = make_parts(model, processor)
    fields = dict(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=batch, per_device_eval_batch_size=batch,
        gradient_accumulation_steps=ACCUMULATE, save_steps=SAVE_EVERY, logging_steps=1, eval_strategy="steps",
        eval_steps=EVALUATE_EVERY, seed=SEED, use_cpu=True, report_to="none", disable_tqdm=True, save_total_limit=2,
        dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0, dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    data = Squares()
    return MaskClsTrainer(
        model=model, args=TrainingArguments(**fields | options), train_dataset=AugmentedDataset(data, noise, SEED),
        eval_dataset=Squares(5), data_collator=collator, sampler=EpochSampler(len(data), SEED),
        optimizers=(optimizer, scheduler), ema=ema, callbacks=[WriteLosses()],
    )  # fmt: skip


def train_trainer(output: Path, resume: bool | str, workers: int, batch: int, steps: int = STEPS) -> None:
    trainer = make_trainer(output, workers, batch, steps)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        torch.save({"model": trainer.model.state_dict(), "ema": trainer.ema.state_dict()}, output / "weights.pt")


def train_accelerate(output: Path, resume: bool, workers: int, batch: int, steps: int = STEPS) -> None:
    accelerator = Accelerator(cpu=True)
    bare, optimizer, scheduler, collator, ema = make_parts()
    data = Squares()
    sampler = EpochSampler(len(data), SEED)
    loader = DataLoader(
        AugmentedDataset(data, noise, SEED), batch, sampler=sampler, collate_fn=collator, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip
    model, optimizer, loader = accelerator.prepare(bare, optimizer, loader)
    eval_loader = rng_free(accelerator.prepare(DataLoader(Squares(5), batch, collate_fn=collator)))
    accelerator.register_for_checkpointing(scheduler, ema)
    step = 0
    folder = checkpoint_to_resume(output, accelerator) if resume else None
    if folder is not None:
        load_state(accelerator, folder)
        step = scheduler.last_epoch
    steps_an_epoch = len(rng_free(loader)) // ACCUMULATE
    while step < steps:
        batches = iter(epoch_batches(loader, sampler, step // steps_an_epoch, step % steps_an_epoch * ACCUMULATE))
        for parts in zip(*[batches] * ACCUMULATE, strict=False):
            items = items_of_step(parts, bare.config, accelerator)
            total = 0.0
            for number, part in enumerate(parts):
                last = number + 1 == len(parts)
                with accelerator.no_sync(model) if not last else torch.enable_grad():
                    loss = model(**part, num_items_in_batch=items).loss * accelerator.num_processes
                    accelerator.backward(loss)
                total += loss.detach()
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            ema.update(bare)
            step += 1
            total = accelerator.reduce(total, "mean").item()
            if accelerator.is_main_process:
                write_loss(output, step, total)
            if step % EVALUATE_EVERY == 0:
                evaluate(accelerator, bare, ema, eval_loader, output, step)
            if step % SAVE_EVERY == 0 or step == steps:
                save_state(accelerator, output, step, limit=2)
            if step == steps:
                break
    if accelerator.is_main_process:
        torch.save({"model": bare.state_dict(), "ema": ema.state_dict()}, output / "weights.pt")
    accelerator.end_training()


@torch.no_grad()
def evaluate(accelerator, model, ema, loader, output: Path, step: int) -> None:
    model.eval()
    with ema.swapped(model):
        share_buffers(model)
        losses = [accelerator.reduce(model(**batch).loss, "mean") for batch in loader]
    model.train()
    if accelerator.is_main_process:
        write_loss(output, -step, sum(losses).item())


LOOPS = {"trainer": train_trainer, "accelerate": train_accelerate}


def stop_inside(output: Path, step: int) -> None:
    """Let the checkpoint of a step stay half written: the process sleeps, for the test to kill it."""
    save = torch.save

    def half(state, file, *args, **kwargs):
        save(state, file, *args, **kwargs)
        if Path(file).parent.name == f"checkpoint-{step}" and "optimizer" in str(file):
            os.truncate(file, os.path.getsize(file) // 2)
            (output / "stopped").touch()
            time.sleep(600)

    torch.save = half


def stop_before_rename(output: Path, step: int) -> None:
    """Let the checkpoint of a step be written and keep its temporary name."""
    write_manifest = checkpoints._write_manifest

    def and_sleep(folder: Path) -> None:
        write_manifest(folder)
        if folder.name == f"checkpoint-{step}":
            (output / "stopped").touch()
            time.sleep(600)

    checkpoints._write_manifest = and_sleep


def stop_after(output: Path, step: int) -> None:
    """Sleep after the loss of a step was written."""
    write = write_loss

    def and_sleep(folder: Path, done: int, loss: float) -> None:
        write(folder, done, loss)
        if done == step:
            (output / "stopped").touch()
            time.sleep(600)

    globals()["write_loss"] = and_sleep


STOPS = {"inside": stop_inside, "before_rename": stop_before_rename, "after": stop_after}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--loop", choices=LOOPS, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--stop", choices=STOPS)
    parser.add_argument("--stop-step", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.stop:
        STOPS[arguments.stop](arguments.output, arguments.stop_step)
    LOOPS[arguments.loop](arguments.output, arguments.resume, arguments.workers, arguments.batch)
