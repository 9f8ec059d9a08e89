"""Progress of a training on the console, and the log that is kept of it."""

from __future__ import annotations

import atexit
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import TrainerCallback

from ..utils.plain_text import PlainConsole, printable
from ..utils.writing import write_json
from .callbacks import TimeBudget
from .stopping import unread

SPEED = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")  # of an evaluation, beside its scores
WINDOW = 50  # steps that speed and remaining time are measured over


class _Console(PlainConsole):
    def on_broken_pipe(self) -> None:
        """Goes on where rich would end the process; see [`unread`]."""
        raise


class TrainingProgress:
    """A bar with losses, images per second and remaining time; lines of text where there is no terminal.

    Args:
        max_steps: of the training.
        images_a_step: over all processes and accumulated batches.
        budget: its minutes bound the remaining time.
        show: False in all processes but the main one.
        console: default: standard error.
    """

    def __init__(
        self,
        max_steps: int,
        images_a_step: int,
        budget: TimeBudget | None = None,
        show: bool = True,
        console: Console | None = None,
    ):
        self.max_steps, self.images_a_step, self.budget, self.show = max_steps, images_a_step, budget, show
        self.console = console or _Console(stderr=True)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._mark, self._step = 0.0, 0
        self._losses = ""
        self._bar: Progress | None = None
        self._task = self._evaluation = TaskID(0)

    def start(self, step: int = 0) -> None:
        """Begin, or go on, after `step` steps."""
        self._step = step
        if self.show and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}", markup=False), console=self.console)
            self._task = self._bar.add_task("Training", total=self.max_steps, completed=step, text="")
            self._evaluation = self._bar.add_task("Evaluating", visible=False, text="")
            self._bar.start()
            atexit.register(self.stop)  # an error ends the training: the terminal gets its cursor back
        self.resume_clock()

    def resume_clock(self) -> None:
        """After evaluation or saving, which are no part of the speed."""
        self._mark = time.monotonic()

    def advance(self, step: int) -> None:
        """The optimizer step number `step` is done."""
        now = time.monotonic()
        self._seconds.append(now - self._mark)
        self._mark, self._step = now, step
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=f"{self._losses}  {self._speed()}")

    def log(self, entry: Mapping[str, Any]) -> None:
        """Show an entry of the log: losses on the bar or in a line, scores always in a line."""
        losses = {name: value for name, value in entry.items() if name.startswith("loss")}
        if losses:
            self._losses = "  ".join(f"{name.removeprefix('loss_')} {value:.4g}" for name, value in losses.items())
            if self._bar is None:
                rate = f"  learning rate {entry['learning_rate']:.3g}" if "learning_rate" in entry else ""
                self._print(f"{self._losses}{rate}  {self._speed()}")
        scores = {name: value for name, value in entry.items() if _is_score(name)}
        if scores:
            text = "  ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in scores.items())
            self._print(f"evaluation: {text}")

    def evaluating(self, done: int, total: int | None) -> None:
        """`done` of `total` batches are evaluated; the bar goes away with the last one."""
        if self._bar is not None:
            self._bar.update(self._evaluation, completed=done, total=total, visible=done != total)

    def stop(self) -> None:
        """Takes the bar away; nothing where there is none."""
        atexit.unregister(self.stop)
        if self._bar is not None:
            with unread():
                self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        if self.show:
            line = f"step {self._step}/{self.max_steps}  {text}"
            with unread():
                self.console.print(printable(line), soft_wrap=True, markup=False, emoji=False, highlight=False)

    def _speed(self) -> str:
        if not self._seconds or not sum(self._seconds):
            return ""
        seconds_a_step = sum(self._seconds) / len(self._seconds)
        remaining = (self.max_steps - self._step) * seconds_a_step
        if self.budget is not None and self.budget.max_minutes is not None:
            remaining = min(remaining, 60 * (self.budget.max_minutes - self.budget.minutes_spent))
        return f"{self.images_a_step / seconds_a_step:.3g} images/s  {_clock(remaining)} left"


def _is_score(name: str) -> bool:
    """One of the whole evaluation: neither of a single class nor about the speed."""
    return name.startswith("eval_") and name not in SPEED and not name.startswith(("eval_iou_", "eval_accuracy_"))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class ShowProgress(TrainerCallback):
    """A `TrainingProgress` for the Trainer, in place of its own bar.

    Args:
        images_a_step: over all processes and accumulated batches.
        budget: its minutes bound the remaining time.
        console: default: standard error.
    """

    def __init__(self, images_a_step: int, budget: TimeBudget | None = None, console: Console | None = None):
        self.images_a_step, self.budget, self.console = images_a_step, budget, console
        self.progress = TrainingProgress(0, images_a_step, show=False)  # before a training
        self._batches = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins the bar, in the main process."""
        show = state.is_world_process_zero
        self.progress = TrainingProgress(state.max_steps, self.images_a_step, self.budget, show, self.console)
        self.progress.start(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar on."""
        self.progress.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Shows losses and scores."""
        self.progress.log(logs or {})

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar of the evaluation on."""
        self._batches += 1
        loader = kwargs.get("eval_dataloader")
        if loader is not None:
            self.progress.evaluating(self._batches, len(loader))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the time of saving, and of evaluation, out of the speed."""
        self._batches = 0
        self.progress.resume_clock()

    on_evaluate = on_save

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the bar away."""
        self.progress.stop()


class TrainingLog:
    """The log of a loop of one's own, in the form of Trainer's trainer_state.json.

    Args:
        max_steps: of the training.

    Examples:
        >>> log = TrainingLog(max_steps=100)
        >>> log.add(50, 0.5, {"loss": 2.0})
        {'loss': 2.0, 'epoch': 0.5, 'step': 50}
        >>> log.has(50, "loss")
        True
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.entries: list[dict[str, Any]] = []

    def add(self, step: int, epoch: float, values: Mapping[str, float]) -> dict[str, Any]:
        """Adds a line.

        Args:
            step: number of steps that are done.
            epoch: passes over the data that are done.
            values: losses or scores.

        Returns:
            The line.
        """
        entry = {**values, "epoch": epoch, "step": step}
        self.entries.append(entry)
        return entry

    def has(self, step: int, name: str) -> bool:
        """Whether a value of this name was logged after `step` steps."""
        return any(entry["step"] == step and name in entry for entry in self.entries)

    def save(self, folder: str | Path) -> None:
        """Write FOLDER/trainer_state.json."""
        step = self.entries[-1]["step"] if self.entries else 0
        state = {"global_step": step, "max_steps": self.max_steps, "log_history": self.entries}
        write_json(Path(folder) / "trainer_state.json", state, indent=2)

    def state_dict(self) -> dict[str, Any]:
        """The lines, for a checkpoint."""
        return {"entries": self.entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.entries = [{**entry, "step": int(entry["step"])} for entry in state["entries"]]


class LossMeans:
    """Mean losses over the steps since the last line of a log: the whole loss, and the terms of the deepest layer."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def __bool__(self) -> bool:
        """There are losses since the last line."""
        return bool(self._sums)

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds losses of one step; nothing is transferred.

        Args:
            losses: () each; those of inner layers, whose names end with a number, are left out.
        """
        self._steps += 1
        for name, value in losses.items():
            if not name[-1].isdigit():
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()

    def pop(self, accelerator: Accelerator, over_processes: str = "mean") -> dict[str, float]:
        """The means over steps, and the "mean" or "sum" of these over processes; then start anew."""
        names, steps = list(self._sums), self._steps
        sums = torch.stack([self._sums[name] for name in names])
        if accelerator.num_processes > 1:
            sums = cast(Tensor, accelerator.reduce(sums, over_processes))
        self._sums, self._steps = {}, 0
        return {name: total / steps for name, total in zip(names, sums.tolist(), strict=True)}
