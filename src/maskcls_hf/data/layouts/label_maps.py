"""What layouts with a label file for each image share: pairs of files, values that become classes, their check."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ...models.image_reading import colored_ids
from ...models.run_lengths import Runs
from ...models.segments import NO_SEGMENT
from ..checks import Checked, Picture, ReportFault, compare_sizes, refuse, regions, shown_path
from ..dataset import Kind, SegmentationDataset
from ..files import IMAGE_SUFFIXES, LABEL_SUFFIXES, decoded, int32_ids, read_map, some, unique_ids
from ..sample import VOID, Segments

FilePair = tuple[Path | None, Path | None]  # image and label; one can be missing for a check alone
VOID_VALUES = (255, 65535)  # void in label files unless a class has the id
_LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")


class LabelMapDataset(SegmentationDataset):
    """Images, each with a file of class ids, or of instance ids, whose classes a subclass tells.

    Args:
        root: folder of the data.
        files: pairs of image and label file; where `report` does not raise, one of the two can be None.
        class_names: see [`SegmentationDataset`].
        void_values: label values that are void; in maps of classes beside 255 and 65535.
        kind: see [`SegmentationDataset`].
        stuff: see [`SegmentationDataset`].
        cache: see [`SegmentationDataset`].
        report: see [`SegmentationDataset`].
    """

    unknown_ids = "holds ids {}: 0 is background, 1..n are instances."

    def __init__(
        self,
        root: Path,
        files: Sequence[FilePair],
        class_names: Mapping[int, str],
        void_values: Collection[int] = (),
        kind: Kind = "semantic",
        stuff: Collection[int] | None = None,
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        super().__init__(class_names, kind, stuff=stuff, cache=cache, report=report)
        self.root, self.files = root, list(files)
        self.names = [(image or label or root).stem for image, label in self.files]
        self.void_values = set(void_values)
        if kind == "semantic":
            self.void_values = {*void_values, *VOID_VALUES} - set(class_names)
            try:
                self._classes = LabelValues(self.label_ids, void_values)
            except ValueError as error:
                report("bad_class_names", str(error), error=ValueError(f"{root}: {error}"))

    def image_path(self, index: int) -> Path:
        """File of an image; None where it is missing, which only a check lets pass."""
        return self.files[index][0]  # type: ignore[return-value]  # complete, but for a check

    def label_path(self, index: int) -> Path | None:
        """Label file of an image; None where it is missing, which only a check lets pass."""
        return self.files[index][1]

    def is_labeled(self, index: int) -> bool:
        """Whether the label file is there."""
        return self.files[index][1] is not None

    def annotation(self, index: int) -> str:
        """Path of the label file."""
        return str(self.files[index][1])

    def raw_map(self, index: int) -> Tensor:
        """The values (H, W) of the label file."""
        return read_map(self.files[index][1])

    def label_of(self, value: int) -> int | None:
        """Id of the class that a pixel's value means, None for void.

        Raises:
            KeyError: it means nothing.
        """
        if value in self.void_values:
            return None
        if self.class_names and value not in self.class_names:
            raise KeyError(value)
        return value

    def is_crowd(self, value: int) -> bool:
        """Whether the pixels of a value are a crowd region."""
        return False

    def read(self, index: int, size: tuple[int, int]) -> Segments:
        """Segments of an image: of a map of classes one a class, of a map of instances one an id."""
        if not self.has_instances:
            return self._classes(self.raw_map(index), self.annotation(index))
        runs = Runs.of(int32_ids(self.raw_map(index), self.annotation(index)).numpy())
        labels, unknown = self._labels(unique_ids(runs))
        if unknown:
            raise ValueError(f"{self.annotation(index)} {self.unknown_ids.format(some(unknown))}")
        classes: dict[int, int | None] = {
            i: VOID if label is None else self.class_of_label[label] for i, label in labels.items()
        }
        return Segments.from_ids(runs, classes, [i for i in labels if self.is_crowd(i)])

    def _labels(self, values: Iterable[int]) -> tuple[dict[int, int | None], list[int]]:
        """`label_of` the values, and those that mean nothing."""
        labels: dict[int, int | None] = {}
        unknown = []
        for value in values:
            try:
                labels[value] = self.label_of(value)
            except KeyError:
                unknown.append(value)
        return labels, unknown

    def check(self, index: int, picture: Picture | None, report: ReportFault) -> Checked | None:
        """Reads the label file, compares its size, and reports values that mean nothing."""
        path = self.files[index][1]
        assert path is not None
        read = read_class_map(path, report)
        if read is None:
            return None
        ids, palette = read
        compare_sizes(ids.shape, picture, "the label", "size_mismatch", report)
        found = regions(ids)
        checked = Checked(ids.shape, ids, values=set(found), palette=palette)
        labels, unknown = self._labels(found)
        areas = {value: region.area for value, region in found.items()}
        checked.add(areas, labels, [value for value in labels if self.is_crowd(value)])
        if unknown:
            share = sum(areas[value] for value in unknown) / ids.size
            report("ids_outside", f"values {some(unknown, 8)} on {share:.2%} of the pixels")
        return checked

    def check_values(self, values: set[int]) -> Iterator[tuple[str, str]]:
        """Of maps of classes, whether they seem to count from another number than the names do."""
        if self.kind == "semantic" and (shifted := _shift(self.class_names, values - self.void_values)):
            yield "off_by_one", shifted


def _shift(names: Mapping[int, str], seen: set[int]) -> str | None:
    """What suggests that maps count classes from another number than the names do; None: nothing."""
    number = len(names)
    if number < 2:
        return None
    if set(names) == set(range(number)):
        if number in seen and 0 not in seen:
            return f"the names are of 0..{number - 1}, the files hold {number} and never 0: they count from 1"
        if seen - set(names) == {number}:
            return (
                f"the names are of 0..{number - 1}, the files hold 0..{number}: 0 may be unlabeled, and the names be "
                f"of 1..{number}"
            )
        if seen == set(range(1, number)) and number > 2:
            return f"0, {names[0]}, is the only class that never occurs: the files may count from 1"
    if set(names) == set(range(1, number + 1)) and 0 in seen:
        if number in seen:
            return f"the names are of 1..{number}, the files also hold 0: unlabeled pixels, or a class without a name"
        return f"the names are of 1..{number}, the files hold 0 and never {number}: they count from 0"
    return None


class LabelValues:
    """Values of label files -> segments, of each class 0..K-1 one.

    Args:
        label_ids: the file's value of each class.
        void_values: values that are void, beside 255 and 65535 where these are no class.

    Raises:
        ValueError: a value is class and void at once, or outside of 0..65535.

    Examples:
        >>> import torch
        >>> values = LabelValues([7, 9], void_values=[0])
        >>> values(torch.tensor([[7, 7, 0], [9, 7, 255]]), "street.png").pixels
        tensor([[[ 0,  0, -1],
                 [ 1,  0, -1]]], dtype=torch.int8)
    """

    def __init__(self, label_ids: Sequence[int], void_values: Collection[int]):
        if both := sorted(set(label_ids) & set(void_values)):
            raise ValueError(
                f"Label values {some(both)} are classes and void at once: give them one of the two meanings."
            )
        if outside := [value for value in (*label_ids, *void_values) if not 0 <= value < 2**16]:
            raise ValueError(f"Label values lie in 0..65535, got {some(outside)}.")
        self.label_ids = list(label_ids)
        self.void_values = sorted({*void_values, *VOID_VALUES} - set(label_ids))
        self._classes = np.full(2**16, NO_SEGMENT, dtype=np.int32)
        self._classes[self.void_values] = VOID
        self._classes[self.label_ids] = np.arange(len(self.label_ids))

    def __call__(self, values: Tensor, where: str) -> Segments:
        """Segments of a map (H, W); `where` is its name in messages.

        Raises:
            ValueError: a value is neither class nor void.
        """
        runs = Runs.of(values.numpy())
        found = runs.values
        if found.min(initial=0) < 0 or found.max(initial=0) >= 2**16:
            raise ValueError(f"{where} holds values from {found.min()} to {found.max()}, labels lie in 0..65535.")
        classes = runs.look_up(self._classes)
        if (unknown := classes.values == NO_SEGMENT).any():
            wrong, share = np.unique(found[unknown]).tolist(), runs.lengths[unknown].sum() / values.numel()
            first, last = self.label_ids[0], self.label_ids[-1]
            gaps = "" if last - first + 1 == len(self.label_ids) else ", with gaps"
            raise ValueError(
                f"{where} holds label values {some(wrong, 10)} ({share:.1%} of the pixels), which are no "
                f"class. The {len(self.label_ids)} classes have the values {first}..{last}{gaps}; void is "
                f"{', '.join(map(str, self.void_values))}. Name the missing classes, or give void_values."
            )
        return Segments.from_class_map(classes)


def as_values(void_values: Any) -> set[int]:
    """The `void_values` of a reader, which can be a single one.

    Raises:
        ValueError: they are no integers.

    Examples:
        >>> as_values(255), as_values([0, 255])
        ({255}, {0, 255})
    """
    values = [void_values] if isinstance(void_values, int) else void_values
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"void_values={void_values!r}: needs label values, such as [255].")
    found = set(values)
    if wrong := [value for value in found if isinstance(value, bool) or not isinstance(value, Integral)]:
        raise ValueError(f"void_values: {some([repr(value) for value in wrong])} is no label value, such as 255.")
    return {int(value) for value in found}


def pair_files(images: Path, labels: Path, root: Path, report: ReportFault = refuse) -> list[FilePair]:
    """Each image of a folder with the label map of the same name, sorted by name; then, if reported, labels alone.

    Args:
        images: folder of the images.
        labels: folder of the label maps.
        root: folder of the data, for messages.
        report: is told of files without a partner, of one name, and of other kinds.
    """
    image_of = _by_stem(images, IMAGE_SUFFIXES, "image", report)
    label_of = _by_stem(labels, LABEL_SUFFIXES, "label", report)
    if not image_of:
        looked = f"No images in {images} (looked for {', '.join(IMAGE_SUFFIXES)})."
        report("no_images", "no images", images, ValueError(looked))
    alone = sorted(set(label_of) - set(image_of))
    if labels.is_dir() and (missing := sorted(set(image_of) - set(label_of))):
        error = FileNotFoundError(
            f"{len(missing)} images have no label map ({', '.join(LABEL_SUFFIXES)}) in {labels}: {some(missing)}."
        )
        for stem in missing:
            if lossy := [path for suffix in _LOSSY_SUFFIXES if (path := labels / f"{stem}{suffix}").is_file()]:
                report("lossy_label", "label maps are PNG, TIFF or BMP", lossy[0], error)
                continue
            place = bisect_left(alone, stem)
            near = alone[place] if place < len(alone) and alone[place].startswith(stem) else None
            hint = f", but {label_of[near].name}: both must have one name" if near else ""
            message = f"no {shown_path(labels, root)}/{stem}.png{hint}"
            report("image_without_label", message, image_of[stem], error)
    error = FileNotFoundError(f"{len(alone)} label maps have no image in {images}: {some(alone)}.")
    for stem in alone:
        report("label_without_image", "no image of this name", label_of[stem], error)
    pairs: list[FilePair] = [(path, label_of.get(stem)) for stem, path in sorted(image_of.items())]
    return [*pairs, *((None, label_of[stem]) for stem in alone)]


def _by_stem(folder: Path, suffixes: Sequence[str], kind: str, report: ReportFault) -> dict[str, Path]:
    """The files of a folder by their names without suffix."""
    entries = os.scandir(folder) if folder.is_dir() else ()
    paths = sorted(Path(entry.path) for entry in entries if entry.is_file())
    times = Counter(path.stem for path in paths if path.suffix.lower() in suffixes)
    twice = sorted(stem for stem, number in times.items() if number > 1)
    what = {"image": "Images", "label": "Label maps"}[kind]
    error = ValueError(f"{what} of the same name in {folder}: {some(twice)}.")
    found: dict[str, Path] = {}
    for path in paths:
        if path.suffix.lower() not in suffixes:
            if path.name[0] != "." and (kind == "image" or path.suffix.lower() not in _LOSSY_SUFFIXES):
                report("file_not_listed", f"not read as {kind}: {path.suffix or 'no'} file", path)
        elif path.stem in found:
            report("same_name", f"the {kind} {found[path.stem].name} has this name too", path, error)
        else:
            found[path.stem] = path
    return found


def read_label(
    path: Path,
    read: Callable[[Any, str], Tensor],
    wrong: Callable[[Image.Image], tuple[str, str] | None],
    report: ReportFault,
) -> tuple[Image.Image, np.ndarray] | None:
    """A label file and its ids (H, W), as a reader's own `read` gives them; None, and a report, for what is none.

    Args:
        path: of the file.
        read: image and name -> ids (H, W).
        wrong: kind and message of what is wrong with a decoded file; None: nothing.
        report: is told.
    """
    try:
        image = decoded(path, path.name)
        if fault := wrong(image):
            report(*fault, path)
            return None
        return image, read(image, path.name).numpy()
    except (OSError, ValueError) as error:
        message = str(error).removeprefix(f"{path.name}: ")
        report("unreadable_label", message.removeprefix(f"{path.name} cannot be read as an image: "), path)
        return None


def read_class_map(path: Path, report: ReportFault) -> tuple[np.ndarray, dict[int, tuple[int, ...]]] | None:
    """Ids (H, W), and the color of each id of a palette file; None, and a report, for what is no map of ids."""
    found = read_label(path, read_map, _wrong_channels, report)
    if found is None:
        return None
    image, ids = found
    colors = np.array(image.getpalette("RGB") if image.mode == "P" else []).reshape(-1, 3)  # (colors, 3)
    used = np.unique(ids).tolist() if len(colors) else []
    return ids, {i: tuple(colors[i].tolist()) for i in used if i < len(colors)}


def _wrong_channels(image: Image.Image) -> tuple[str, str] | None:
    if len(image.getbands()) == 1:
        return None
    return "color_label", f"mode {image.mode}: {_described_colors(image)}"


def _described_colors(image: Image.Image) -> str:
    """What the colors of a label file probably are."""
    pixels = np.asarray(image.convert("RGB"))
    if (pixels == pixels[..., :1]).all():
        return (
            "the three channels are equal, so the first one is the map: Image.open(PATH).convert('RGB').getchannel(0)"
        )
    colors = np.unique(colored_ids(pixels))
    if np.isin(colors, colored_ids(voc_colors())).all():
        return f"{len(colors)} colors, all of Pascal VOC's palette: the id is the place of the color in it"
    if len(colors) <= 256:
        return f"{len(colors)} colors, so it is a palette or a legend turned into RGB"
    return f"{len(colors)} colors: smoothed by a resize or by JPEG, or a photograph"


def voc_colors() -> np.ndarray:
    """(256, 3) uint8: Pascal VOC's color of each id, whose bits are dealt out to the channels from the top.

    Examples:
        >>> voc_colors()[:4].tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    """
    ids = np.arange(256)
    colors = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colors
