"""Averaged weights (exponential moving average), for the Trainer and for loops of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..models.options import require_range


class ExponentialMovingAverage:
    """Average of a model's parameters and buffers over the optimiser steps: torch's `AveragedModel`.

    The first update copies the weights; each later one moves the average by 1 - decay towards them. `MaskClsTrainer`
    takes it as `ema`; a loop of one's own calls `update` after each step and evaluates inside `swapped`.

    Args:
        model: the model without wrappers for distributed training, before these share out its weights.
        decay: 0.999 remembers about 1000 steps.

    Raises:
        ValueError: the decay is not between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        require_range("decay", decay, "[0, 1]")
        move = get_ema_multi_avg_fn(decay)

        def average(averaged: Any, current: Any, number: Any) -> None:
            if averaged[0].is_floating_point():
                move(averaged, current, number)
            else:  # counts and indices: torch would average them too, and cut off the fraction
                torch._foreach_copy_(averaged, current)

        self.average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.average.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count the weights of `model`, after an optimiser step."""
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
