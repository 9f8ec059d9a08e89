"""Tables of the `datasets` library with a column of images and one of label maps: map-style, and streamed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .dataset import Classes, SegmentationDataset, Targets, as_sample, check_sizes
from .files import decoded, image_size, read_class_names, read_coloured_ids, read_image, read_map, some, unique_ids
from .folder_dataset import LabelValues
from .sample import VOID, Sample

if TYPE_CHECKING:
    import datasets

CLASS_KEYS = ("category_id", "label_id", "label")  # of a record of a segment


class SegmentationTable(SegmentationDataset):
    """A `datasets.Dataset` of images with label maps.

    Semantic maps have the class of each pixel. Instance maps have the segment of each pixel, as a number or as the
    colour R + 256 G + 65536 B, and `segments_column` says which class each segment has: a list of records with `id`,
    `category_id` (or `label_id`, `label`) and `iscrowd` where it is a crowd, or a dict of id -> class.

    Args:
        dataset: the table. Images may be encoded, PIL images or arrays.
        image_column, label_column: names of the columns.
        id2label: names of the classes by the value that the table has, or a JSON file of them.
        segments_column: of the classes of instances; None: the maps are semantic.
        name_column: of names; None: the number of the row.
        stuff: the table's values of classes without instances; None: all of semantic maps, none of instance maps.
        void_values: label values of semantic maps that are void, beside 255 and 65535.
        background: what pixels of id 0 are in instance maps when no segment has the id: "void" (unlabelled) or
            "negatives" (in no segment).
        cache: see [`SegmentationDataset`].

    Raises:
        ValueError: the table lacks a column; or (on access) what is wrong with a row. The message names it.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str = "image",
        label_column: str = "label",
        *,
        id2label: Mapping[int, str] | str,
        segments_column: str | None = None,
        name_column: str | None = None,
        stuff: Collection[int] | None = None,
        void_values: Collection[int] = (),
        background: Literal["void", "negatives"] = "void",
        cache: bool = False,
    ):
        kind: Any = "semantic" if segments_column is None else "panoptic" if stuff else "instance"
        super().__init__(read_class_names(id2label), kind, stuff=stuff, cache=cache)
        self._rows = RowReader(self, image_column, label_column, segments_column, void_values, background)
        self.dataset = self._rows.undecoded(dataset.with_format(None))
        if name_column is None:
            self.names = [str(row) for row in range(len(dataset))]
        else:
            self.names = [str(name) for name in dataset.with_format(None)[name_column]]

    def annotation(self, index: int) -> str:
        return f"column {self._rows.label_column!r} of row {index}"

    def raw_map(self, index: int) -> Tensor:
        return self._rows.raw_map(self.dataset[index], f"row {index}")

    def sizes(self) -> list[tuple[int, int]]:
        images = self.dataset.select_columns([self._rows.image_column])
        return [self._rows.image_size(row, f"row {index}") for index, row in enumerate(images)]

    def _read(self, index: int) -> tuple[Tensor, Targets]:
        return self._rows.read(self.dataset[index], f"row {index}")


class SegmentationStream(Classes, IterableDataset[Sample]):
    """A `datasets.IterableDataset` (`load_dataset(..., streaming=True)`) of images with label maps, without a length.

    Loader workers share the shards of the stream, as `datasets` does it. Shuffle with
    `rows.shuffle(seed, buffer_size)`; the order changes with the epoch, also with persistent workers.

    transformers' Trainer needs `max_steps`. accelerate must not read batches on one process and cut them up, which
    would cut the lists of segments too: `DataLoaderConfiguration(dispatch_batches=False)`; `MaskClsTrainer` sees to
    it. Then every process reads the stream and keeps its share of the samples.

    Args:
        rows: the stream.
        transform: called as `transform(sample, (seed, epoch, number))`, such as `TrainTransform`. `number` counts the
            samples of an epoch; with W loader workers those of worker w are w, w + W, w + 2 W, ...
        seed: of the transform.
        image_column, label_column, id2label, segments_column, name_column, stuff, void_values, background: see
            [`SegmentationTable`].
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        image_column: str = "image",
        label_column: str = "label",
        *,
        id2label: Mapping[int, str] | str,
        transform: Callable[[Sample, tuple[int, ...]], Sample] | None = None,
        seed: int = 0,
        segments_column: str | None = None,
        name_column: str | None = None,
        stuff: Collection[int] | None = None,
        void_values: Collection[int] = (),
        background: Literal["void", "negatives"] = "void",
    ):
        kind: Any = "semantic" if segments_column is None else "panoptic" if stuff else "instance"
        super().__init__(read_class_names(id2label), kind, stuff)
        self._rows = RowReader(self, image_column, label_column, segments_column, void_values, background)
        self.rows = self._rows.undecoded(rows)
        self.transform, self.seed, self.name_column = transform, seed, name_column
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch = int(self._epoch)
        for place, row in enumerate(self.rows):
            number = first + place * step
            name = str(number) if self.name_column is None else str(row[self.name_column])
            sample = as_sample(*self._rows.read(row, f"row {name} of the stream"), name)
            yield sample if self.transform is None else self.transform(sample, (self.seed, epoch, number))


class RowReader:
    """Rows of a table -> images and targets. The arguments are those of [`SegmentationTable`]."""

    def __init__(
        self,
        classes: Classes,
        image_column: str,
        label_column: str,
        segments_column: str | None,
        void_values: Collection[int],
        background: str,
    ):
        if background not in ("void", "negatives"):
            raise ValueError(f'background={background!r}: needs "void" or "negatives".')
        self.image_column, self.label_column, self.segments_column = image_column, label_column, segments_column
        self.class_of_label = classes.class_of_label
        self.background = VOID if background == "void" else None
        self._label_values = None
        if segments_column is None:
            self._label_values = LabelValues(classes.label_ids, void_values, classes.void_id)

    def undecoded(self, table: Any) -> Any:
        """The table with encoded images, so that they are decoded here, where they are needed."""
        from datasets import Image  # a second

        for column in (self.image_column, self.label_column):
            if table.column_names is not None and column not in table.column_names:
                raise ValueError(f"The table has no column {column!r}; it has {', '.join(table.column_names)}.")
            if table.features is not None and isinstance(table.features.get(column), Image):
                table = table.cast_column(column, Image(decode=False))
        return table

    def read(self, row: Mapping[str, Any], where: str) -> tuple[Tensor, Targets]:
        image = read_image(row[self.image_column], f"column {self.image_column!r} of {where}")
        ids = self.raw_map(row, where)
        check_sizes(ids, image, f"column {self.label_column!r} of {where}", f"column {self.image_column!r}")
        if self._label_values is not None:
            return image, Targets(self._label_values(ids, f"column {self.label_column!r} of {where}"))
        column = str(self.segments_column)
        return image, self._instances(ids.int(), row[column], f"column {column!r} of {where}")

    def raw_map(self, row: Mapping[str, Any], where: str) -> Tensor:
        """The ids (H, W) as the table has them."""
        where = f"column {self.label_column!r} of {where}"
        value = decoded(row[self.label_column], where)
        if self.segments_column is not None and np.asarray(value).ndim == 3:
            return read_coloured_ids(value, where)
        return read_map(value, where)

    def image_size(self, row: Mapping[str, Any], where: str) -> tuple[int, int]:
        """Height and width, from the header of an encoded image."""
        value = row[self.image_column]
        where = f"column {self.image_column!r} of {where}"
        if isinstance(value, dict):
            return image_size(value, where)
        image = read_image(value, where)
        return image.shape[-2], image.shape[-1]

    def _instances(self, ids: Tensor, segments: Any, where: str) -> Targets:
        records = segment_records(segments, where)
        classes: dict[int, int | None] = {0: self.background}
        for segment, label, _ in records:
            if label not in self.class_of_label:
                raise ValueError(f"{where}: segment {segment} has class {label}, which id2label does not name.")
            classes[segment] = self.class_of_label[label]
        if unknown := [segment for segment in unique_ids(ids) if segment not in classes]:
            raise ValueError(f"{where} does not list {len(unknown)} segments of the map: {some(unknown)}.")
        return Targets(ids, classes, [segment for segment, _, crowd in records if crowd])


def segment_records(segments: Any, where: str) -> list[tuple[int, int, bool]]:
    """Id, class value and whether it is a crowd, of each segment; see [`SegmentationTable`] for the forms."""
    try:
        if isinstance(segments, Mapping) and "id" in segments:  # a list of records, as `datasets` may store it
            keys = [key for key in segments if segments[key] is not None]
            segments = [dict(zip(keys, row, strict=True)) for row in zip(*(segments[k] for k in keys), strict=True)]
        if isinstance(segments, Mapping):  # in a table each row has the ids of all rows, None where it lacks one
            return [(int(segment), int(label), False) for segment, label in segments.items() if label is not None]
        records = []
        for record in segments:
            key = next(key for key in CLASS_KEYS if record.get(key) is not None)
            records.append((int(record["id"]), int(record[key]), bool(record.get("iscrowd"))))
        return records
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"{where} is no list of segments with id and {' or '.join(CLASS_KEYS)}, and no dict of id -> class: "
            f"{str(segments)[:120]}."
        ) from error
