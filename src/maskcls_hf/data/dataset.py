"""What all readers share: class ids without gaps, the check of sizes, the cache, fields for model and processor."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .errors import naming
from .files import image_size, read_image
from .sample import Sample, void_id_of

Kind = Literal["semantic", "instance", "panoptic"]


class Targets(NamedTuple):
    """Annotation of one image: as the fields of [`Sample`], but a map of ids is (H, W)."""

    pixels: Tensor
    classes: dict[int, int | None] | None = None
    crowd_ids: Sequence[int] = ()
    areas: Mapping[int, float] | None = None


class Classes:
    """Classes of a data set, for its targets, its model and its image processor.

    Args:
        class_names: the file's id of each class -> its name; ids may have gaps.
        kind: "semantic" (one class a pixel), "instance" (things only; a pixel can be in no segment) or "panoptic"
            (things and stuff).
        stuff: the file's ids of the classes without instances; None: all for semantic data, else none.

    Attributes:
        id2label (`dict[int, str]`): names of the classes 0..K-1, in rising order of the file's ids.
        label_ids (`list[int]`): the file's id of each class.
        class_of_label (`dict[int, int]`): the other way round.
        stuff_ids (`list[int]`): classes that are one segment an image.
        has_instances (`bool`): segments have an identity; else the annotations are maps of classes.
        void_id (`int`): value of unlabelled pixels in maps of classes: 255, or 65535 for more than 255 classes.
    """

    def __init__(self, class_names: Mapping[int, str], kind: Kind, stuff: Collection[int] | None = None):
        self.kind: Kind = kind
        self.has_instances = kind != "semantic"
        self.label_ids = sorted(class_names)
        self.class_of_label = {label: place for place, label in enumerate(self.label_ids)}
        self.id2label = _distinct_names(class_names)
        if stuff is None:
            stuff = () if self.has_instances else self.label_ids
        if unknown := sorted(set(stuff) - set(class_names)):
            raise ValueError(f"Stuff classes {unknown} have no name in id2label.")
        self.stuff_ids = sorted(self.class_of_label[label] for label in stuff)
        self.void_id = void_id_of(len(self.id2label))

    def model_fields(self) -> dict[str, dict]:
        """`id2label` and `label2id`, for the configuration of a model."""
        return {"id2label": dict(self.id2label), "label2id": {name: i for i, name in self.id2label.items()}}

    def processor_fields(self) -> dict[str, Any]:
        """What an image processor must know of the classes: `MaskClsImageProcessor(**data.processor_fields())`."""
        return {
            "num_labels": len(self.id2label),
            "void_id": self.void_id,
            "label_offset": 0,
            "label_ids_to_fuse": list(self.stuff_ids),
        }


class SegmentationDataset(Classes, Dataset[Sample]):
    """Annotated images of one split; files are read and masks made on access.

    Args:
        class_names, kind, stuff: see [`Classes`].
        cache: keep what was read in memory after its first use; every loader worker has its own.
    """

    def __init__(
        self,
        class_names: Mapping[int, str],
        kind: Kind,
        *,
        stuff: Collection[int] | None = None,
        cache: bool = False,
    ):
        super().__init__(class_names, kind, stuff)
        self._cache: dict[int, tuple[Tensor, Targets]] | None = {} if cache else None

    names: list[str]
    """Name of each image."""

    @abstractmethod
    def image_path(self, index: int) -> Path:
        """File of an image."""

    @abstractmethod
    def annotation(self, index: int) -> str:
        """Where the annotation of an image stands, for messages."""

    @abstractmethod
    def _read_targets(self, index: int, size: tuple[int, int]) -> Targets:
        """Annotation of an image of this size (height, width)."""

    def raw_map(self, index: int) -> Tensor | None:
        """The ids (H, W) as the file has them, before they become classes; None where no file holds a map."""
        return None

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image, from the headers of the files."""
        return [image_size(self.image_path(index)) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        with naming(self.names[index]):
            if self._cache is None:
                image, targets = self._read(index)
            else:
                if index not in self._cache:
                    self._cache[index] = self._read(index)
                image, targets = self._cache[index]
            return as_sample(image, targets, self.names[index])

    def targets(self, index: int) -> Targets:
        """Annotation of an image, without its pixels."""
        with naming(self.names[index]):
            return self._read_targets(index, image_size(self.image_path(index)))

    def _read(self, index: int) -> tuple[Tensor, Targets]:
        image = read_image(self.image_path(index))
        size = image.shape[-2], image.shape[-1]
        targets = self._read_targets(index, size)
        check_sizes(targets.pixels, image, self.annotation(index), str(self.image_path(index)))
        return image, targets


def as_sample(image: Tensor, targets: Targets, name: str) -> Sample:
    """The sample of an image (3, H, W); what can change of the targets is a copy."""
    pixels = targets.pixels if targets.pixels.ndim == 3 else targets.pixels[None]
    sample = Sample(
        image=tv_tensors.Image(image),
        segmentation_map=tv_tensors.Mask(pixels),
        instance_id_to_semantic_id=None if targets.classes is None else dict(targets.classes),
        crowd_ids=list(targets.crowd_ids),
        name=name,
    )
    if targets.areas is not None:
        sample["areas"] = dict(targets.areas)
    return sample


def check_sizes(pixels: Tensor, image: Tensor, annotation: str, image_name: str) -> None:
    """ValueError that names both unless annotation (..., H, W) and image (3, H, W) have one size."""
    check_size((pixels.shape[-2], pixels.shape[-1]), (image.shape[-2], image.shape[-1]), annotation, image_name)


def check_size(size: tuple[int, int], expected: tuple[int, int], annotation: str, image_name: str) -> None:
    """As [`check_sizes`], of sizes (height, width)."""
    if size == expected:
        return
    message = (
        f"{annotation} is {size[1]} x {size[0]} pixels (width x height), its image {image_name} "
        f"{expected[1]} x {expected[0]}."
    )
    if size == expected[::-1]:
        message += " The two are turned against each other: the EXIF orientation of images and label maps is applied."
    raise ValueError(message)


def _distinct_names(class_names: Mapping[int, str]) -> dict[int, str]:
    """Names by class; one that several classes share gets the file's id behind it."""
    if not class_names:
        raise ValueError("No class is named.")
    labels = sorted(class_names)
    names = [class_names[label] for label in labels]
    while len(times := Counter(names)) < len(names):  # again where "cat (1)" is a name of its own
        names = [name if times[name] == 1 else f"{name} ({label})" for label, name in zip(labels, names, strict=True)]
    return dict(enumerate(names))
