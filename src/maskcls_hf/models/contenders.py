"""Which classes or queries can have the greatest score somewhere: the others need not be computed there.

Interpolation is convex: between some places a score lies between its least and its greatest value at them. What nowhere
reaches the least value of another one cannot win.
"""

import torch
from torch import Tensor


def contenders(least: Tensor, most: Tensor) -> Tensor:
    """Bounds of C scores at some places (C, y, x) -> (C,) bool: who can win at any of them."""
    return leads(least, most).flatten(1).amax(1) >= 0


def leads(least: Tensor, most: Tensor) -> Tensor:
    """Bounds of C scores at some places (C, y, x) -> how far each can be ahead there (C, y, x); below 0 it cannot win.

    Of floats torch finds the maximum over places faster than it compares them.
    """
    return most - least.amax(0)


def corner_bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values at pixels (C, y, x) -> the least and the greatest of four neighbours (C, y - 1, x - 1): the bounds of what
    is interpolated between them. An axis with a single pixel stays as it is."""
    least = most = values
    for dim in (1, 2):
        if (pairs := values.shape[dim] - 1) > 0:
            least = torch.minimum(least.narrow(dim, 0, pairs), least.narrow(dim, 1, pairs))
            most = torch.maximum(most.narrow(dim, 0, pairs), most.narrow(dim, 1, pairs))
    return least, most


def indices_by_place(chosen: Tensor) -> tuple[Tensor, ...]:
    """(C, P) bool -> for each place the indices of what is chosen there."""
    return chosen.T.nonzero()[:, 1].split(chosen.sum(0).tolist())


def draw_greatest(area: Tensor, scores: Tensor, names: Tensor) -> None:
    """Write into `area` (H, W) the name (k,) of the greatest score (k, H, W), the first where several are equal."""
    if area.device.type != "cpu":
        area.copy_(names[scores.argmax(0)])
        return
    # On a CPU torch's argmax over the first of several dimensions takes a hundred times as long a pixel.
    first, *others = names.tolist()
    area.fill_(first)
    best = scores[0]
    for name, score in zip(others, scores[1:], strict=True):
        area.masked_fill_(score > best, name)
        best = torch.maximum(best, score)
