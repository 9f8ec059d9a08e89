"""Augmented samples of a data set, in an order that seed and epoch decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Dataset, Sampler

from ..models.options import require_range
from .errors import naming_image
from .sample import Sample
from .transforms import stable_seed

Key = int | tuple[int, ...]


class AugmentedDataset(Dataset[Sample]):
    """Samples of a data set, each augmented with a seed of its own.

    A key is what `EpochSampler` yields: (epoch, index), or (epoch, index, occurrence) where an image occurs several
    times an epoch; a plain index is epoch 0. The sample is a function of `seed` and key, in whichever process it is
    made.

    Args:
        dataset: gives samples by index.
        transform: called as `transform(sample, (seed, epoch, index))`, with the occurrence behind it if the key has
            one; such as [`TrainTransform`].
        seed: at least 0; another one gives other augmentations.

    Raises:
        ValueError: `seed` is negative.
        DataError: (on access) what the transform raises, with the name of the image.
    """

    def __init__(self, dataset: Dataset[Sample], transform: Callable[[Sample, tuple[int, ...]], Sample], seed: int):
        require_range("seed", seed, "[0, inf)", integer=True)
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> Sample:
        epoch, index, *occurrence = (0, key) if isinstance(key, int) else key
        sample = self.dataset[index]
        with naming_image(sample["segments"].name, often_named=False):
            return self.transform(sample, (self.seed, epoch, index, *occurrence))


class EpochSampler(Sampler[tuple[int, ...]]):
    """Keys of an `AugmentedDataset`; their order is a function of seed and epoch.

    So a resumed run skips the batches it has seen and goes on with the same ones, and processes that each take
    their share of the batches agree on them.

    Args:
        length: of the data set, in images.
        seed: of the order.
        shuffle: False: in the order of the data set.
        repeats: how often each image occurs an epoch, see [`repeats_by_area`]; keys then are
            (epoch, index, occurrence).

    Raises:
        ValueError: `repeats` is not one number of at least 0 for each image, or all are 0.

    Examples:
        >>> sampler = EpochSampler(3, seed=0, shuffle=False, repeats=[1, 2, 0])
        >>> sampler.set_epoch(5)
        >>> list(sampler)
        [(5, 0, 0), (5, 1, 0), (5, 1, 1)]
    """

    def __init__(self, length: int, seed: int, shuffle: bool = True, repeats: Sequence[int] | None = None):
        if repeats is not None and (len(repeats) != length or min(repeats, default=0) < 0 or not any(repeats)):
            raise ValueError(
                f"repeats must say of each of the {length} images how often it occurs an epoch, got {len(repeats)} "
                f"numbers with sum {sum(repeats)}."
            )
        require_range("seed", seed, "[0, inf)", integer=True)
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        self.places: list[tuple[int, ...]] = [(index,) for index in range(length)]
        if repeats is not None:
            self.places = [(index, occurrence) for index in range(length) for occurrence in range(repeats[index])]

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose keys the next iteration gives, counted from 0; the Trainer and Accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        epoch = self.epoch
        order = list(range(len(self.places)))
        if self.shuffle:
            generator = torch.Generator().manual_seed(stable_seed(self.seed, epoch))
            order = torch.randperm(len(order), generator=generator).tolist()
        return ((epoch, *self.places[place]) for place in order)


def repeats_by_area(sizes: Sequence[tuple[int, int]], side: int) -> list[int]:
    """How many squares of `side` pixels each image holds by its area, at least 1.

    With it as `repeats`, crops see each pixel of a large image about as often as one of a small image.

    Args:
        sizes: (height, width) of each image, in pixels.
        side: of the training crop, in pixels.

    Returns:
        A number for each image.

    Raises:
        ValueError: `side` is below 1.

    Examples:
        >>> repeats_by_area([(300, 300), (1000, 1500)], side=500)
        [1, 6]
    """
    if side < 1:
        raise ValueError(f"side must be at least 1 pixel, got {side}.")
    return [max(1, height * width // side**2) for height, width in sizes]
