"""What all layouts share: class ids without gaps, the check of sizes, the cache, fields for model and processor."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.utils.data import Dataset

from .checks import Checked, Picture, ReportFault, compare_sizes, refuse
from .errors import naming_image
from .files import image_size, read_image
from .sample import Sample, Segments, as_sample, void_id_of

Kind = Literal["semantic", "instance", "panoptic"]


class Classes:
    """Classes of a data set, for its targets, its model and its image processor.

    Args:
        class_names: the file's id of each class -> its name; ids may have gaps.
        kind: "semantic" (one class a pixel), "instance" (things only; a pixel can be in no segment) or "panoptic"
            (things and stuff).
        stuff: the file's ids of the classes without instances; None: all for semantic data, else none.

    Attributes:
        class_names (`dict[int, str]`): as given.
        id2label (`dict[int, str]`): names of the classes 0..K-1, in rising order of the file's ids.
        label_ids (`list[int]`): the file's id of each class.
        class_of_label (`dict[int, int]`): the other way round.
        stuff_ids (`list[int]`): classes that are one segment an image.
        has_instances (`bool`): segments have an identity; else the annotations are maps of classes.
        void_id (`int`): value of unlabeled pixels in maps of classes: 255, or 65535 for more than 255 classes.

    Raises:
        ValueError: a stuff class has no name.

    Examples:
        >>> classes = Classes({7: "road", 24: "person"}, "panoptic", stuff=[7])
        >>> classes.id2label, classes.stuff_ids
        ({0: 'road', 1: 'person'}, [0])
        >>> classes.processor_fields()["label_ids_to_fuse"]
        [0]
    """

    def __init__(self, class_names: Mapping[int, str], kind: Kind, stuff: Collection[int] | None = None):
        self.kind: Kind = kind
        self.class_names = dict(class_names)
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

    @property
    def stuff_labels(self) -> set[int]:
        """The file's ids of `stuff_ids`."""
        return {self.label_ids[i] for i in self.stuff_ids}

    def model_fields(self) -> dict[str, dict[Any, Any]]:
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

    The base of every layout. A layout of your own is a subclass that [`register_layout`] gives a name. It says where
    its files are (`find`, and `names`, `image_path`, `annotation`) and reads an annotation (`read`). Its constructor
    takes the folder of the data, the split, `cache`, `report`, and its own options by name. For `maskcls validate` it
    may go on where it calls `report` with what is wrong, and look more closely in `check`.

    Args:
        class_names: see [`Classes`].
        kind: see [`Classes`].
        stuff: see [`Classes`].
        cache: keep what was read in memory after its first use; every loader worker has its own.
        report: told what is wrong, see [`ReportFault`].

    Attributes:
        names (`list[str]`): name of each image.

    Raises:
        ValueError: no class is named; (on access) what is wrong with an image or its annotation.
        DataError: (on access) the same, where the message did not name the image.

    Example::

        class Pairs(SegmentationDataset):  # ROOT/SPLIT/NAME.png and NAME.npy, a map of classes
            def __init__(self, root, split, *, cache=False, report=refuse):
                super().__init__({0: "sky", 1: "road"}, "semantic", cache=cache)
                self.images = sorted((Path(root) / split).glob("*.png"))
                self.names = [path.stem for path in self.images]

            @classmethod
            def find(cls, root, split, options):
                return bool(split) and any((root / split).glob("*.npy"))

            def image_path(self, index):
                return self.images[index]

            def annotation(self, index):
                return str(self.images[index].with_suffix(".npy"))

            def read(self, index, size):
                return Segments.from_class_map(np.load(self.annotation(index)), void_id=255)

        register_layout("pairs", Pairs)
    """

    names: list[str]
    always_split: ClassVar[bool] = False  # the layout has a folder for each split
    found_by_common_names: ClassVar[bool] = False  # data of other layouts lies in folders of these names too
    split_folders: ClassVar[str] = "{split}"  # the folders whose names are those of splits
    expects_things = False  # `validate` notes an image without an instance

    def __init__(
        self,
        class_names: Mapping[int, str],
        kind: Kind,
        *,
        stuff: Collection[int] | None = None,
        cache: bool = False,
        report: ReportFault = refuse,
    ):
        super().__init__(class_names, kind, stuff)
        if not class_names and report is refuse:  # who else passes none has reported it
            raise ValueError("No class is named.")
        self._cache: dict[int, tuple[Tensor, Segments]] | None = {} if cache else None

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether a split of the data in `root` has this layout; False always: it is only opened by its name.

        Args:
            root: folder of the data.
            split: None: the data has no splits.
            options: of the constructor, where `maskcls validate` or a recipe gives them.
        """
        return False

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """Folders or files that [`find`] looks for, for messages."""
        return []

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Names that can be splits, of which [`find`] knows more."""
        pattern = str(options.get("image_folder") or cls.split_folders)
        folder = root / pattern.split("{split}")[0]
        if "{split}" in pattern and folder.is_dir():
            yield from (path.name for path in folder.iterdir() if path.is_dir())

    @abstractmethod
    def image_path(self, index: int) -> Path:
        """File of an image."""

    @abstractmethod
    def annotation(self, index: int) -> str:
        """Where the annotation of an image stands, for messages."""

    @abstractmethod
    def read(self, index: int, size: tuple[int, int]) -> Segments:
        """Segments of an image.

        Args:
            index: of the image.
            size: (height, width) of the image, which its annotation should have.

        Raises:
            ValueError: what is wrong with them; an OSError of the file may pass, too.
        """

    def check(self, index: int, picture: Picture | None, report: ReportFault) -> Checked | None:
        """Annotation of an image with all that is wrong with it; None where it cannot be read.

        Args:
            index: of the image.
            picture: the image; None: it cannot be read.
            report: is told what is wrong.
        """
        if picture is None:
            return None
        try:
            segments = self.read(index, picture.size)
        except (OSError, ValueError) as error:
            report("unreadable_label", str(error))
            return None
        compare_sizes(segments.size, picture, "the label", "size_mismatch", report)
        return Checked.of(segments, self.label_ids)

    def check_values(self, values: set[int]) -> Iterator[tuple[str, str]]:
        """What is wrong with the values of all label maps together: kinds and messages."""
        return iter(())

    def label_path(self, index: int) -> Path | None:
        """File of an annotation; None: it has none of its own, or it is missing."""
        return None

    def is_labeled(self, index: int) -> bool:
        """Whether there is an annotation to check."""
        return True

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
        with naming_image(self.names[index]):
            if self._cache is None:
                image, segments = self._read(index)
            else:
                if index not in self._cache:
                    self._cache[index] = self._read(index)
                image, segments = self._cache[index]
            return as_sample(image, segments, self.names[index])

    def segments(self, index: int) -> Segments:
        """Segments of an image, whose pixels are not read."""
        with naming_image(self.names[index]):
            return self.read(index, image_size(self.image_path(index)))

    def _read(self, index: int) -> tuple[Tensor, Segments]:
        image = read_image(self.image_path(index))
        size = (image.shape[-2], image.shape[-1])
        segments = self.read(index, size)
        check_size(segments.size, size, self.annotation(index), str(self.image_path(index)))
        return image, segments


def check_size(size: tuple[int, int], expected: tuple[int, int], annotation: str, image_name: str) -> None:
    """Refuses an annotation of another size than its image.

    Args:
        size: (height, width) of the annotation.
        expected: (height, width) of the image.
        annotation: where it stands, for the message.
        image_name: for the message.

    Raises:
        ValueError: the two differ; names both.
    """
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
    labels = sorted(class_names)
    names = [class_names[label] for label in labels]
    while len(times := Counter(names)) < len(names):  # again where "cat (1)" is a name of its own
        names = [name if times[name] == 1 else f"{name} ({label})" for label, name in zip(labels, names, strict=True)]
    return dict(enumerate(names))
