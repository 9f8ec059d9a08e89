"""Arrays, lists and tensors of numbers -> tensors that torch can compute with, or an error that says whose they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .options import plain


@contextmanager
def naming(where: str) -> Iterator[None]:
    """What is wrong with a value that is read inside becomes a ValueError that begins with `where`."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error


def array_as_tensor(array: np.ndarray) -> Tensor:
    """Of the same numbers; of a wider type where torch knows the array's by name only. ValueError for no numbers."""
    if np.ma.is_masked(array):
        raise ValueError("some values of the array are masked: put numbers there, with its filled().")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an array of {array.dtype} holds no real numbers.")
    if array.dtype.kind == "u" and array.dtype.itemsize > 2:
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"an array of {array.dtype} holds {int(array.max())}, more than 64 bits with a sign can.")
        array = array.astype(np.int64)
    elif array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def label_tensor(labels: Any) -> Tensor:
    array = np.asanyarray(labels)
    return array_as_tensor(array.astype(np.int32) if array.dtype.kind == "u" and array.dtype.itemsize == 2 else array)


def as_labels(labels: Any, where: str) -> Tensor:
    """A tensor as it is; arrays and lists as one. ValueError for what holds no numbers."""
    if isinstance(labels, Tensor):
        return labels
    with naming(where):
        return label_tensor(labels if isinstance(labels, np.ndarray) else plain(labels))


def integers(values: Tensor, where: str) -> Tensor:
    """Labels as a tensor of integers that torch can compare; ValueError where they have fractions."""
    if values.is_complex():
        raise ValueError(f"{where}: labels must be integers, got {values.dtype}.")
    if values.dtype == torch.bool:
        return values.to(torch.uint8)
    if values.is_floating_point():
        whole = values.long()
        if not torch.equal(whole.to(values.dtype), values):
            raise ValueError(f"{where}: labels must be integers, got {values.dtype} with fractions or NaN.")
        return whole
    narrow = (torch.uint8, torch.int8, torch.int16, torch.int32)
    return values if values.dtype in narrow else values.long()


def read_label_values(labels: Any, where: str) -> Tensor:
    """Label values of one image, in any form -> (M,) int64 on the CPU; ValueError for what is no integer."""
    return integers(label_tensor(plain(labels)).flatten(), where).long()
