"""A training that ends on time: the schedule follows the clock as well as the steps."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.options import require_range


class TimeBudget(TrainerCallback):
    """Ends training after `max_minutes` with the learning rate at its end, whatever the speed of the machine.

    Progress is the larger of the share of steps done and the share of time spent. Each checkpoint keeps the time
    spent, so that a resume goes on with the rest. In a loop of one's own: `start()`, `tick()` after each step.

    Args:
        max_minutes: the budget; None leaves the steps alone to decide.

    Raises:
        ValueError: the budget is not above 0, or infinite.
    """

    def __init__(self, max_minutes: float | None = None):
        if max_minutes is not None:
            require_range("max_minutes", max_minutes, "(0, inf)")
        self.max_minutes = max_minutes
        self.minutes_spent = 0.0
        self._last_time = 0.0

    def progress(self, step: int, max_steps: int) -> float:
        """Share of the training that is done, 0 to 1."""
        by_time = self.minutes_spent / self.max_minutes if self.max_minutes else 0.0
        return min(1.0, max(step / max_steps, by_time))

    @property
    def spent(self) -> bool:
        """No time is left."""
        return self.max_minutes is not None and self.minutes_spent >= self.max_minutes

    def start(self) -> None:
        """Time counts from here."""
        self._last_time = time.monotonic()

    def tick(self, device: torch.device | str = "cpu") -> None:
        """Count the time since the last call; all processes take that of the slowest, and so end together."""
        now = time.monotonic()
        self.minutes_spent += (now - self._last_time) / 60
        self._last_time = now
        if self.max_minutes is not None and dist.is_available() and dist.is_initialized():
            minutes = torch.tensor(self.minutes_spent, dtype=torch.float32, device=device)
            dist.all_reduce(minutes, dist.ReduceOp.MAX)
            self.minutes_spent = minutes.item()

    def state_dict(self) -> dict[str, float]:
        return {"minutes_spent": self.minutes_spent}

    def load_state_dict(self, state: dict[str, float]) -> None:
        require_range("minutes_spent", state["minutes_spent"], "[0, inf)")
        self.minutes_spent = state["minutes_spent"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.tick(args.device)
        if self.spent:
            control.should_training_stop = control.should_save = control.should_evaluate = True
