"""Predicting with a model that is in training."""

from __future__ import annotations

import copy
from itertools import chain
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def in_eval_mode(model: Model) -> Model:
    """The model itself if all of it is in evaluation mode; else its [`eval_copy`].

    The model's own mode is never touched, not even for a moment: another thread may train it meanwhile, or predict. (A
    model in evaluation mode is used itself: no thread may call its `train()` while another predicts.)
    """
    return eval_copy(model) if any(module.training for module in model.modules()) else model


def eval_copy(model: Model) -> Model:
    """A copy of the modules in evaluation mode, which shares the parameters and buffers of the model.

    In evaluation mode nothing writes to them.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> copied = eval_copy(model)
        >>> copied.training, model.training, copied[0].weight is model[0].weight
        (False, True, True)
    """
    shared = (*chain(model.parameters(), model.buffers()), getattr(model, "config", None))
    copied = copy.deepcopy(model, {id(value): value for value in shared})
    for module in copied.modules():  # not eval(), which modules may override
        module.training = False
    return copied
