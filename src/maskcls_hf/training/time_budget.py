"""A training that ends on time: the schedule follows the clock as well as the steps."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Learning rate over progress, 1 to 0 over 0 to 1.
SCHEDULES = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "poly": lambda progress: (1 - progress) ** 0.9,
}


class TimeBudget(TrainerCallback):
    """Ends training after `max_minutes` with the learning rate at its end, whatever the speed of the machine.

    Progress is the larger of the share of steps done and the share of time spent. Each checkpoint keeps the time
    spent, so that a resume goes on with the rest.

    Args:
        max_minutes: the budget; None leaves the steps alone to decide.
    """

    def __init__(self, max_minutes: float | None = None):
        if max_minutes is not None and max_minutes <= 0:
            raise ValueError(f"max_minutes must be positive, got {max_minutes}.")
        self.max_minutes = max_minutes
        self.minutes_spent = 0.0
        self._last_time = 0.0

    def schedule(self, optimizer: Optimizer, kind: str, warmup_steps: int, max_steps: int) -> LambdaLR:
        """Linear warm-up over `warmup_steps`, then down to 0: `"cosine"` or `"poly"` (power 0.9, as the paper)."""
        if kind not in SCHEDULES:
            raise ValueError(f"Unknown schedule {kind!r}, choose one of {sorted(SCHEDULES)}.")
        curve = SCHEDULES[kind]

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / (warmup_steps + 1)) * curve(self.progress(step, max_steps))

        return LambdaLR(optimizer, factor)

    def progress(self, step: int, max_steps: int) -> float:
        """Share of the training that is done, 0 to 1."""
        by_time = self.minutes_spent / self.max_minutes if self.max_minutes else 0.0
        return min(1.0, max(step / max_steps, by_time))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        file = _file(args, state)
        if file.is_file():
            self.minutes_spent = json.loads(file.read_text())["minutes_spent"]
        self._last_time = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        self.minutes_spent += (now - self._last_time) / 60
        self._last_time = now
        if self.max_minutes is not None and args.world_size > 1:  # all processes need one learning rate and one end
            minutes = torch.tensor(self.minutes_spent, dtype=torch.float32, device=args.device)
            dist.all_reduce(minutes, dist.ReduceOp.MAX)
            self.minutes_spent = minutes.item()
        if self.max_minutes is not None and self.minutes_spent >= self.max_minutes:
            control.should_training_stop = control.should_save = control.should_evaluate = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _file(args, state).write_text(json.dumps({"minutes_spent": self.minutes_spent}))


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / "time_budget.json"
