"""Other classes for a trained model: the rows of its layers that stand for classes."""

from collections import Counter
from typing import Any

import torch
from torch import nn


def kept_classes(old: dict[int, str], new: dict[int, str]) -> list[int | None]:
    """For each new class the old id of the same name, or None."""
    names = [new[index] for index in range(len(new))]
    if len(set(names)) < len(names):
        raise ValueError(
            f"id2label: names given twice: {sorted(name for name, times in Counter(names).items() if times > 1)}."
        )
    ids = {name: index for index, name in old.items()}
    return [ids.get(name) for name in names]


def set_classes(config: Any, id2label: dict[int, str]) -> None:
    config.id2label = dict(id2label)
    config.label2id = {name: index for index, name in id2label.items()}


@torch.no_grad()
def with_rows(layer: Any, rows: list[int | None]) -> Any:
    """A layer like `layer` (linear, 1x1 convolution, embedding) whose outputs are its `rows`; None: a fresh one."""
    if isinstance(layer, nn.Linear):
        new: nn.Module = nn.Linear(layer.in_features, len(rows))
    elif isinstance(layer, nn.Conv2d):
        new = nn.Conv2d(layer.in_channels, len(rows), kernel_size=1)
    else:
        new = type(layer)(len(rows), layer.embedding_dim)
    new.to(layer.weight.device, layer.weight.dtype)
    for index, row in enumerate(rows):
        if row is not None:
            for name, parameter in new.named_parameters():
                parameter[index] = getattr(layer, name)[row]
    return new


@torch.no_grad()
def with_columns(table: Any, columns: list[int | None]) -> Any:
    """An embedding like `table` whose vectors have its `columns`; None: zero."""
    new = type(table)(table.num_embeddings, len(columns)).to(table.weight.device, table.weight.dtype)
    for index, column in enumerate(columns):
        new.weight[:, index] = 0 if column is None else table.weight[:, column]
    return new
