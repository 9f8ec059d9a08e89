"""Averaged weights, a budget of time, annealed masks and a guard against empty ones.

All of them are for the Trainer and for loops of one's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.utils import logging

from ..models.options import require_range
from .processes import is_main_process

logger = logging.get_logger(__name__)


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

    Examples:
        >>> model = nn.Linear(1, 1)
        >>> ema = ExponentialMovingAverage(model, decay=0.999)
        >>> ema.update(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1)
        >>> with ema.swapped(model):
        ...     averaged = model.weight.item()
        >>> round(model.weight.item() - averaged, 4)
        1.0
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
        """The decay of the next update, after so many.

        It rises to `decay`, so that the average is over about the last tenth of a young training and not over its
        beginning (as in TensorFlow's ExponentialMovingAverage).
        """
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count the weights of `model`, after an optimizer step."""
        self._follow(model)
        self.average.update_parameters(model)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` has the averaged weights; afterwards its own ones, bit for bit.

        Without an update so far it keeps its own.
        """
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
        """The averaged weights, and the number of updates, for a checkpoint."""
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
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

    Examples:
        >>> budget = TimeBudget(max_minutes=10)
        >>> budget.minutes_spent = 5.0
        >>> budget.progress(step=100, max_steps=1000)
        0.5
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
        """The minutes spent, for a checkpoint."""
        return {"minutes_spent": self.minutes_spent}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            ValueError: the minutes are negative or infinite.
        """
        require_range("minutes_spent", state["minutes_spent"], "[0, inf)")
        self.minutes_spent = state["minutes_spent"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time counts from here."""
        self.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the training with an evaluation and a checkpoint when no time is left."""
        self.tick(args.device)
        if self.spent:
            control.should_training_stop = control.should_save = control.should_evaluate = True


class MaskAnnealing(TrainerCallback):
    """Anneals the masked attention of an EoMT, so that inference needs no masks.

    Each block that sees the queries masks with a probability that is 1 before its part of the training, 0 after it and
    (1 - progress) ** 0.9 inside (Kerssies et al., CVPR 2025, Section 3.3).

    The probabilities are numbers in the model's configuration, which wrappers and adapters share: a checkpoint has
    those of its step. `torch.compile(dynamic=True)` takes them as symbols, and compiles anew only where one becomes 0.
    In a loop of one's own: `set(step, max_steps)` before the first step and after each.

    Args:
        model: an EoMT, without wrappers.
        intervals: (start, end) of each block in shares of the training, 0 to 1; None: [`annealing_intervals`].
        progress: share of the training that is done, of a step and the number of all, such as `TimeBudget.progress`;
            None: the share of steps.

    Raises:
        ValueError: another model, or intervals that are not one for each block, within the training.
    """

    def __init__(
        self,
        model: Any,
        intervals: Sequence[Sequence[float]] | None = None,
        progress: Callable[[int, int], float] | None = None,
    ):
        self.config = model.config
        if not _has_attention_masks(model):
            raise ValueError("mask_annealing: only an EoMT (architecture='encoder_only') has masks to anneal.")
        blocks = self.config.query_blocks
        self.intervals = annealing_intervals(blocks) if intervals is None else [tuple(pair) for pair in intervals]
        if len(self.intervals) != blocks or not all(
            len(pair) == 2 and 0 <= pair[0] < pair[1] <= 1 for pair in self.intervals
        ):
            raise ValueError(
                f"mask_annealing={self.intervals} must have start and end, in shares of the training from 0 to 1, for "
                f"each of the query_blocks={blocks}."
            )
        self.progress = progress or (lambda step, max_steps: step / max_steps)

    def set(self, step: int, max_steps: int) -> None:
        """Sets the probabilities after so many steps."""
        done = self.progress(step, max_steps)
        shares = [(done - start) / (end - start) for start, end in self.intervals]
        self.config.mask_probabilities = [(1 - min(max(share, 0.0), 1.0)) ** 0.9 for share in shares]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the probabilities of the step at which the training begins or goes on."""
        self.set(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sets the probabilities of the next step."""
        self.set(state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the best checkpoint is loaded: its weights were trained with its probabilities."""
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and (file := Path(best) / "config.json").is_file():
            self.config.mask_probabilities = json.loads(file.read_text(encoding="utf-8"))["mask_probabilities"]


def annealing_intervals(blocks: int) -> list[tuple[float, float]]:
    """Start and end of each block in shares of the training, as in the published trainings.

    A sixth each, the first from 1/6 on, the last from 4/6 on.

    Examples:
        >>> [(round(start, 2), round(end, 2)) for start, end in annealing_intervals(4)]
        [(0.17, 0.33), (0.33, 0.5), (0.5, 0.67), (0.67, 0.83)]
    """
    starts = [(1 + 3 * block / max(1, blocks - 1)) / 6 for block in range(blocks)]
    return [(start, start + 1 / 6) for start in starts]


def _has_attention_masks(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "architecture", None) == "encoder_only"


def choose_annealing(
    model: Any,
    choice: bool | Sequence[Sequence[float]] | None,
    progress: Callable[[int, int], float] | None = None,
) -> MaskAnnealing | None:
    """The annealing of a training, if it has one; what happens to an EoMT's masks is logged by the main process.

    Args:
        model: any, without wrappers.
        choice: True, False, or the intervals of `MaskAnnealing`; None: anneal the masks of an EoMT that was not loaded
            from a checkpoint, whose own probabilities would stay.
        progress: as in `MaskAnnealing`.

    Raises:
        ValueError: as in `MaskAnnealing`.
    """
    if not _has_attention_masks(model) and not choice:
        return None
    loaded_from = getattr(model.config, "name_or_path", None)
    if choice is None:
        choice = not loaded_from
    log = logger.warning if is_main_process() else logger.debug
    if choice is False:
        log(
            f"The attention of the EoMT is masked with the probabilities {model.config.mask_probabilities} throughout "
            "the training. mask_annealing=true anneals them from 1 to 0."
        )
        return None
    annealing = MaskAnnealing(model, None if choice is True else choice, progress)
    parts = ", ".join(f"{start:.3g} to {end:.3g}" for start, end in annealing.intervals)
    anew = f" anew, instead of the {annealing.config.mask_probabilities} of {loaded_from}," if loaded_from else ""
    log(f"Masked attention is annealed{anew} from 1 to 0, by block at {parts} of the training.")
    return annealing


class CollapseGuard:
    """Warns of a training that has collapsed to empty masks.

    So it has when no query has a class, and a pixel above 0.5, on the training images since the last look.

    One reduction a batch, on its device; the host looks where losses are logged. Nothing is said of images without
    segments, of outputs without masks, and before the end of the warm-up or of the first tenth of the training.
    """

    def __init__(self) -> None:
        self.found: Tensor | None = None
        self.has_collapsed = False

    @torch.no_grad()
    def watch(self, outputs: Any, class_labels: Sequence[Tensor] | None) -> None:
        """Counts a batch of the training.

        Args:
            outputs: of the model, with `class_queries_logits` (B, N, K+1) and `masks_queries_logits` (B, N, h, w).
            class_labels: (M,) of each image; None, or all empty: the batch does not count.
        """
        names = ("class_queries_logits", "masks_queries_logits")
        classes, masks = (outputs.get(name) if hasattr(outputs, "get") else None for name in names)
        if classes is None or masks is None or not any(map(len, class_labels or ())):
            return
        has_class = classes.argmax(-1) != classes.shape[-1] - 1  # (B, N)
        found = (has_class & (masks.flatten(2).amax(-1) > 0)).any()
        self.found = found if self.found is None else self.found | found

    def check(self, step: int, max_steps: int, warmup_steps: int = 0) -> None:
        """Looks, and warns once of a collapse.

        Args:
            step: number of steps that are done.
            max_steps: of the training.
            warmup_steps: in which nothing is said.
        """
        found, self.found = self.found, None
        if found is None or step <= max(warmup_steps, max_steps / 10):
            return
        has_collapsed = not bool(found)
        if has_collapsed and not self.has_collapsed:
            logger.warning(
                f"Step {step}: no query has a class and a mask above 0.5 on the training images any more. The training "
                "has collapsed to empty masks: lower the learning rate, clip gradients, or warm up for longer."
            )
        self.has_collapsed = has_collapsed
