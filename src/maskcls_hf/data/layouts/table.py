"""Tables of the `datasets` library with a column of images and one of label maps: map-style, and streamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ...models.run_lengths import Runs
from ..dataset import Classes, Kind, SegmentationDataset, check_size
from ..errors import naming_image
from ..files import (
    decoded,
    image_size,
    int32_ids,
    read_class_names,
    read_colored_ids,
    read_image,
    read_map,
    some,
    unique_ids,
)
from ..sample import VOID, Sample, Segments, as_sample
from .label_maps import LabelValues, as_values

if TYPE_CHECKING:
    import datasets

_CLASS_KEYS = ("category_id", "label_id", "label")  # of a record of a segment


class SegmentationTable(SegmentationDataset):
    """A `datasets.Dataset` of images with label maps.

    Semantic maps have the class of each pixel. Instance maps have the segment of each pixel, as a number or as the
    color R + 256 G + 65536 B, and `segments_column` says which class each segment has: a list of records with `id`,
    `category_id` (or `label_id`, `label`) and `iscrowd` where it is a crowd, or a dict of id -> class.

    Args:
        dataset: the table. Images may be encoded, PIL images or arrays.
        columns: `image_column` and `label_column`, also by name: of the images ("image") and of the maps ("label").
        cache: see [`SegmentationDataset`].
        options: by name,
            `id2label`: names of the classes by the value that the table has, or a JSON file of them;
            `segments_column`: of the classes of instances; None: the maps are semantic;
            `name_column`: of names; None: the number of the row;
            `stuff`: the table's values of classes without instances; None: all of semantic maps, none of instance maps;
            `void_values`: label values that are void: beside 255 and 65535 in semantic maps, alone in instance maps;
            `background`: what pixels of id 0 are in instance maps when no segment has the id: "void" (unlabeled) or
            "negatives" (in no segment).

    Raises:
        ValueError: the table lacks a column; or (on access) what is wrong with a row. The message names it.
        TypeError: it is a stream, or a dict of splits.
    """

    def __init__(self, dataset: datasets.Dataset, *columns: str, cache: bool = False, **options: Any):
        if not hasattr(dataset, "__len__"):
            raise TypeError("The table is a stream, of which rows cannot be chosen: SegmentationStream reads it.")
        self._rows = rows = _RowReader(*columns, **options)
        super().__init__(rows.classes.class_names, rows.classes.kind, stuff=rows.classes.stuff_labels, cache=cache)
        self.dataset = rows.undecoded(dataset)
        names = range(len(dataset)) if rows.name_column is None else dataset.with_format(None)[rows.name_column]
        self.names = [str(name) for name in names]

    def annotation(self, index: int) -> str:
        """Column and row of the label map."""
        return f"column {self._rows.label_column!r} of row {index}"

    def raw_map(self, index: int) -> Tensor:
        """The ids (H, W) as the table has them."""
        return self._rows.raw_map(self.dataset[index], f"row {index}")

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image, from the headers of encoded ones."""
        images = self.dataset.select_columns([self._rows.image_column])
        return [self._rows.image_size(row, f"row {index}") for index, row in enumerate(images)]

    def segments(self, index: int) -> Segments:
        """Segments of a row, whose image is read, too."""
        return self._read(index)[1]

    def _read(self, index: int) -> tuple[Tensor, Segments]:
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
        columns: see [`SegmentationTable`].
        transform: called as `transform(sample, (seed, epoch, number))`, such as `TrainTransform`. `number` counts the
            samples of an epoch; with W loader workers those of worker w are w, w + W, w + 2 W, ...
        seed: of the transform.
        options: id2label, segments_column, name_column, stuff, void_values, background: see [`SegmentationTable`].

    Raises:
        ValueError: as [`SegmentationTable`].
        TypeError: the rows are a table, or a dict of splits.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        *columns: str,
        transform: Callable[[Sample, tuple[int, ...]], Sample] | None = None,
        seed: int = 0,
        **options: Any,
    ):
        if hasattr(rows, "__len__") and not isinstance(rows, Mapping):
            raise TypeError("The rows are a table, no stream: SegmentationTable reads it, or to_iterable_dataset().")
        self._rows = _RowReader(*columns, **options)
        classes = self._rows.classes
        super().__init__(classes.class_names, classes.kind, classes.stuff_labels)
        self.rows = self._rows.undecoded(rows)
        self.transform, self.seed = transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration, from which its order and the seeds of its transforms follow."""
        self._epoch.fill_(epoch)
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch = int(self._epoch)
        for place, row in enumerate(self.rows):
            number = first + place * step
            name = str(number)
            if self._rows.name_column is not None:
                with naming_image(f"row {number}"):
                    name = str(cell(row, self._rows.name_column, f"row {number} of the stream"))
            with naming_image(f"row {name}"):
                sample = as_sample(*self._rows.read(row, f"row {name} of the stream"), name)
                if self.transform is not None:
                    sample = self.transform(sample, (self.seed, epoch, number))
            yield sample


class _RowReader:
    """Rows of a table -> images and segments. The arguments are those of [`SegmentationTable`]."""

    def __init__(
        self,
        image_column: str = "image",
        label_column: str = "label",
        *,
        id2label: Mapping[int, str] | str,
        segments_column: str | None = None,
        name_column: str | None = None,
        stuff: Collection[int] | None = None,
        void_values: Collection[int] = (),
        background: Literal["void", "negatives"] = "void",
    ):
        if background not in ("void", "negatives"):
            raise ValueError(f'background={background!r}: needs "void" or "negatives".')
        if background != "void" and segments_column is None:
            raise ValueError(
                f"background={background!r} is of instance maps: segments_column says which classes they have."
            )
        self.image_column, self.label_column = image_column, label_column
        self.segments_column, self.name_column = segments_column, name_column
        kind: Kind = "semantic" if segments_column is None else "panoptic" if stuff else "instance"
        self.classes = Classes(read_class_names(id2label), kind, stuff)
        self.background = VOID if background == "void" else None
        self.void_values = as_values(void_values)
        self._modes: dict[str, str | None] = {}  # that `datasets` converts the images of a column to
        self._label_values = None
        if segments_column is None:
            self._label_values = LabelValues(self.classes.label_ids, self.void_values)

    def undecoded(self, table: Any) -> Any:
        """The table with encoded images, so that they are decoded here, where they are needed."""
        from datasets import Image  # a second

        if isinstance(table, Mapping):
            raise TypeError(f"One split of the table is needed: choose from {', '.join(map(str, table))}.")
        table = table.with_format(None) if hasattr(table, "__len__") else table
        needed = (self.image_column, self.label_column, self.segments_column, self.name_column)
        for column in filter(None, needed):
            if table.column_names is not None and column not in table.column_names:
                raise ValueError(f"The table has no column {column!r}; it has {', '.join(table.column_names)}.")
            feature = None if table.features is None else table.features.get(column)
            if isinstance(feature, Image):
                self._modes[column] = feature.mode
                table = table.cast_column(column, Image(mode=feature.mode, decode=False))
        return table

    def read(self, row: Mapping[str, Any], where: str) -> tuple[Tensor, Segments]:
        image = read_image(self._value(row, self.image_column, where), f"column {self.image_column!r} of {where}")
        ids = self.raw_map(row, where)
        label = f"column {self.label_column!r} of {where}"
        size, expected = (ids.shape[-2], ids.shape[-1]), (image.shape[-2], image.shape[-1])
        check_size(size, expected, label, f"column {self.image_column!r}")
        if self._label_values is not None:
            return image, self._label_values(ids, label)
        segments = cell(row, str(self.segments_column), where)
        return image, self._instances(ids, segments, f"column {self.segments_column!r} of {where}")

    def _value(self, row: Mapping[str, Any], column: str, where: str) -> Any:
        """The image of a column, decoded, in the mode that its feature asks for."""
        value = decoded(cell(row, column, where), f"column {column!r} of {where}")
        mode = self._modes.get(column)
        return value.convert(mode) if mode and isinstance(value, PIL.Image.Image) and value.mode != mode else value

    def raw_map(self, row: Mapping[str, Any], where: str) -> Tensor:
        """The ids (H, W) as the table has them."""
        value = self._value(row, self.label_column, where)
        where = f"column {self.label_column!r} of {where}"
        if self.segments_column is not None and np.asarray(value).ndim == 3:
            return read_colored_ids(value, where)
        return read_map(value, where)

    def image_size(self, row: Mapping[str, Any], where: str) -> tuple[int, int]:
        """Height and width, from the header of an encoded image."""
        value = cell(row, self.image_column, where)
        where = f"column {self.image_column!r} of {where}"
        if isinstance(value, (dict, bytes, str)):
            return image_size(value, where)
        image = read_image(value, where)
        return image.shape[-2], image.shape[-1]

    def _instances(self, ids: Tensor, segments: Any, where: str) -> Segments:
        runs = Runs.of(int32_ids(ids, where).numpy())
        records = sorted(_segment_records(segments, where))
        listed = [segment for segment, _, _ in records]
        if twice := [segment for segment, times in Counter(listed).items() if times > 1]:
            raise ValueError(f"{where} lists segments twice: {some(twice)}.")
        if both := sorted(self.void_values & set(listed)):
            raise ValueError(f"{where} lists segments {some(both)}, which void_values calls void.")
        classes: dict[int, int | None] = {0: self.background, **dict.fromkeys(self.void_values, VOID)}
        for segment, label, _ in records:
            if label not in self.classes.class_of_label:
                raise ValueError(f"{where}: segment {segment} has class {label}, which id2label does not name.")
            classes[segment] = self.classes.class_of_label[label]
        if unknown := [segment for segment in unique_ids(runs) if segment not in classes]:
            raise ValueError(f"{where} does not list {len(unknown)} segments of the map: {some(unknown)}.")
        return Segments.from_ids(runs, classes, [segment for segment, _, crowd in records if crowd])


def cell(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value of a row in a column; `where` names the row in messages.

    Args:
        row: of a table.
        column: its name.
        where: the row stands.

    Raises:
        ValueError: a row without the column.
    """
    if column not in row:
        raise ValueError(f"{where} has no column {column!r}; it has {', '.join(map(str, row))}.")
    return row[column]


def _segment_records(segments: Any, where: str) -> list[tuple[int, int, bool]]:
    """Id, class value and whether it is a crowd, of each segment; see [`SegmentationTable`] for the forms."""
    try:
        if isinstance(segments, Mapping) and "id" in segments:  # a list of records, as `datasets` may store it
            keys = [key for key in segments if segments[key] is not None]
            segments = [dict(zip(keys, row, strict=True)) for row in zip(*(segments[k] for k in keys), strict=True)]
        if isinstance(segments, Mapping):  # in a table each row has the ids of all rows, None where it lacks one
            return [(whole(segment), whole(label), False) for segment, label in segments.items() if label is not None]
        records = []
        for record in segments:
            key = next(key for key in _CLASS_KEYS if record.get(key) is not None)
            crowd = whole(record.get("iscrowd") or 0)
            if crowd not in (0, 1):
                raise ValueError(f"iscrowd {crowd}")
            records.append((whole(record["id"]), whole(record[key]), bool(crowd)))
        return records
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, OverflowError) as error:
        raise ValueError(
            f"{where} is no list of segments with id and {' or '.join(_CLASS_KEYS)}, and no dict of id -> class: "
            f"{str(segments)[:120]}."
        ) from error


def whole(value: Any) -> int:
    """A number, or the text of one, without a fraction.

    Raises:
        ValueError: it has one.

    Examples:
        >>> whole("12"), whole(3.0)
        (12, 3)
    """
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError(f"{value} is no whole number")
    return number
