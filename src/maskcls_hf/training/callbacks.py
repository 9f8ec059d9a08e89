"""Averaged weights and a budget of time, for the Trainer and for loops of one's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from ..models.options import require_range


class ExponentialMovingAverage:
    """Average of a model's parameters and buffers over the optimizer steps: torch's `AveragedModel`.

    The first update copies the weights; each later one moves the average by 1 - [`decay_after`] toward them.
    `MaskClsTrainer` takes it as `ema`; a loop of one's own calls `update` after each step and evaluates inside
    `swapped`.

    The running statistics of batch norm are averaged with the weights, over the same steps. The first ones are of
    random weights, and those of the last step alone would be of other weights than the averaged ones.

    Args:
        model: the model without wrappers for distributed training, before these share out its weights.
        decay: of a long training; 0.999 remembers about 1000 steps.

    Raises:
        ValueError: the decay is not between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        require_range("decay", decay, "[0, 1]")
        self.decay = decay

        def average(averaged: Any, current: Any, number: Any) -> None:
            if averaged[0].is_floating_point():
                get_ema_multi_avg_fn(self.decay_after(int(number)))(averaged, current, number)
            else:  # counts and indices: torch would average them too, and cut off the fraction
                torch._foreach_copy_(averaged, current)

        self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.average.requires_grad_(False)

    def decay_after(self, updates: int) -> float:
        """The decay of the next update. It rises to `decay`, so that the average is over about the last tenth of a
        young training and not over its beginning (as in TensorFlow's ExponentialMovingAverage)."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count the weights of `model`, after an optimizer step."""
        self._follow(model)
        self.average.update_parameters(model)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the averaged weights; afterwards its own ones, bit for bit. Without an update so far it
        keeps its own."""
        if not int(self.average.n_averaged):
            yield
            return
        self._follow(model)
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)

    def _follow(self, model: nn.Module) -> None:
        """To the device of `model`."""
        device = next(model.parameters()).device
        if next(self.average.module.parameters()).device != device:
            self.average.to(device)

    def _swap(self, model: nn.Module) -> None:
        for own, averaged in zip(_tensors(model), _tensors(self.average.module), strict=True):
            own.data, averaged.data = averaged.data, own.data


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tick(args.device)
        if self.spent:
            control.should_training_stop = control.should_save = control.should_evaluate = True
