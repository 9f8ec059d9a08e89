"""What the COCO layouts share: finding the files, reading the json once, keeping it in few bytes."""

from __future__ import annotations

import glob
import os
import pickle
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...utils.places import require_folder
from ..checks import Picture, Region, ReportFault, compare_sizes, shown_path
from ..dataset import Kind, SegmentationDataset, check_size
from ..files import IMAGE_SUFFIXES, image_size, read_json, shown, some, with_split
from .coco_records import UNREAD, CocoContent, CocoKind, is_number

_NAMES_TRIED = 50  # names of the json by which the folder of its files is looked for
USUAL_SPLITS = "(train|training|val|valid|validation|test)[0-9]*"


class Packed:
    """A list of Python objects in one block of bytes: small, and shared by forked loader workers without copies."""

    def __init__(self, items: Iterable[Any]):
        packed = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        self._ends = np.cumsum([len(item) for item in packed], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(packed), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = self._ends[index - 1] if index else 0
        return pickle.loads(self._bytes[start : self._ends[index]].tobytes())


class CocoDataset(SegmentationDataset):
    """Images of a COCO json with its categories; subclasses read the annotations.

    Args:
        content: of the json, as [`_open`] has read it.
        class_names: see [`SegmentationDataset`].
        kind: see [`SegmentationDataset`].
        stuff: see [`SegmentationDataset`].
        image_folder: of the images, where it is not found by looking.
        cache: see [`SegmentationDataset`].
        report: see [`SegmentationDataset`].
    """

    json_kind: ClassVar[CocoKind]
    image_folder: Path | None = None

    def __init__(
        self,
        content: CocoContent,
        class_names: Mapping[int, str],
        kind: Kind,
        stuff: Collection[int],
        image_folder: str | None,
        cache: bool,
        report: ReportFault,
    ):
        super().__init__(class_names, kind, stuff=stuff, cache=cache, report=report)
        self.class_names = dict(content.class_names)
        self.image_ids = list(content.images)
        listed = [image["file_name"] for image in content.images.values()]

        def fault(place: int, said: str, folder: Path) -> tuple[str, str, Path | str]:
            where = f"listed as image {shown(self.image_ids[place])}, but not in {shown_path(folder, self.root)}"
            return "label_without_image", f"{where}: {said}", folder / listed[place]

        self.image_folder, found = self._files("image", listed, image_folder, self._image_folders(), fault, report)
        self.file_names = [name or other for name, other in zip(found, listed, strict=True)]
        self._missing = {place for place, name in enumerate(found) if name is None}
        self.names = [str(Path(name).with_suffix("")) for name in self.file_names]
        self._sizes = [self._size(place, image) for place, image in enumerate(content.images.values())]

    def _size(self, place: int, image: Mapping[str, Any]) -> tuple[int, int]:
        """That of the json, else that of the file; (0, 0) where a check has found neither."""
        if image.get("height") and image.get("width"):
            return image["height"], image["width"]
        if place in self._missing:
            return 0, 0
        try:
            return image_size(self.image_path(place))
        except ValueError:
            return 0, 0  # reading it says why

    @classmethod
    def places(cls, root: Path, split: str | None) -> list[Path]:
        """The usual places of the split's json."""
        kind = cls.json_kind
        if not split:
            return [root / f"{kind}.json", root / "annotations" / f"{kind}.json"]
        return [root / f"{split}/{kind}.json", root / f"annotations/{kind}_{split}.json", root / f"{kind}_{split}.json"]

    @classmethod
    def find(cls, root: Path, split: str | None, options: Mapping[str, Any]) -> bool:
        """Whether the split's json is there: that of the option `annotations`, or one that is found by its name."""
        if options.get("annotations"):
            pattern = str(options["annotations"])
            return bool(split) == ("{split}" in pattern) and (root / with_split(pattern, split)).is_file()
        return bool(cls.find_jsons(root, split))

    @classmethod
    def splits(cls, root: Path, options: Mapping[str, Any]) -> Iterable[str]:
        """Names in those of the jsons, and of folders as in other layouts; one name for each json."""
        names = list(super().splits(root, options))
        if options.get("annotations"):
            return [*names, *_splits_of(str(root / str(options["annotations"])))]
        kind = cls.json_kind
        names += [path.stem.removeprefix(f"{kind}_") for path in (root / "annotations").glob(f"{kind}_*.json")]
        # the sample data of panopticapi has panoptic_coco_categories.json, too: a split has maps
        of_kind = [p for p in root.glob(f"{kind}_*.json") if kind == "instances" or p.with_suffix("").is_dir()]
        names += [path.stem.removeprefix(f"{kind}_") for path in of_kind]
        for path in (*root.glob("annotations/*.json"), *root.glob("*.json")):  # train.json, beside others
            images = root / path.stem, root / "images" / path.stem
            if re.fullmatch(USUAL_SPLITS, path.stem) or any(folder.is_dir() for folder in images):
                names.append(path.stem)
        # of "train" and "train2017", which have one json, the longer one
        return {tuple(cls.find_jsons(root, name)): name for name in sorted(set(names), key=len)}.values()

    @classmethod
    def find_jsons(cls, root: Path, split: str | None) -> list[Path]:
        """The jsons that can be that of a split."""
        if found := [path for path in cls.places(root, split) if path.is_file()]:
            return found
        if split:  # with the year behind it, such as instances_train2017.json
            pattern = f"{cls.json_kind}_{glob.escape(split)}{'[0-9]' * 4}.json"
            return [path for folder in (root / "annotations", root) for path in sorted(folder.glob(pattern))]
        # a panoptic json beside the folder of its maps, such as panoptic_examples.json beside panoptic_examples
        return [path for path in sorted(root.glob(f"{cls.json_kind}_*.json")) if path.with_suffix("").is_dir()]

    def _open(self, root: str | Path, split: str | None, annotations: str | None, report: ReportFault) -> CocoContent:
        """What the json holds; `annotations`: where it lies below the root, None: it is looked for."""
        self.root, self.split = Path(root), split
        self.json_path = self.root / f"{self.json_kind}.json"
        try:
            self.json_path = self._choose_json(annotations)
            content = read_json(self.json_path)
        except (OSError, ValueError) as error:
            report("bad_json", str(error), self.json_path if self.json_path.is_file() else None, error)
            content = UNREAD

        def told(kind: str, message: str, file: str | None = None) -> None:
            report(kind, message, file or self.json_path, ValueError(f"{self.json_path}: {message}."))

        return CocoContent(content, self.json_kind, told)

    def _choose_json(self, annotations: str | None) -> Path:
        """The json of the split. FileNotFoundError: there is none. ValueError: there are several."""
        root, split, kind = self.root, self.split, self.json_kind
        if annotations:
            return root / with_split(annotations, split)
        found = self.find_jsons(root, split)
        if not found:
            looked = ", ".join(map(str, self.places(root, split)))
            what = {"instances": "instances", "panoptic": "panoptic json"}[kind]
            raise FileNotFoundError(f"No COCO {what} in {root}, split {split}: looked for {looked}.")
        if len(found) > 1:
            several = ", ".join(str(path.relative_to(root)) for path in found)
            raise ValueError(
                f"{root}, split {split}, has several files of COCO {kind}: {several}. Choose by the option annotations."
            )
        return found[0]

    def _image_folders(self) -> list[Path]:
        """Where the images can lie."""
        root, split, beside = self.root, self.split, self.json_path.parent
        own = self.json_path.stem.removeprefix(f"{self.json_kind}_")  # such as train2017
        folders = [beside / "images"]
        if split:
            folders += [root / split / "images", root / "images" / split, root / split]
        folders += [root / "images", root / "input_images", beside]
        for name in (own, own.rstrip("0123456789")):
            if name not in ("", self.json_kind):
                folders += [root / name, root / "images" / name]
        return folders

    def _files(
        self,
        what: str,
        names: Sequence[str],
        given: str | None,
        folders: list[Path],
        fault: Callable[[int, str, Path], tuple[str, str, Path | str]],
        report: ReportFault,
    ) -> tuple[Path, list[str | None]]:
        """The folder of the files of these names ("": of none), and their names as it has them, None for missing ones.

        Args:
            what: "image" or "panoptic map".
            names: of the files, as the json has them.
            given: the folder, below the root; None: the first of `folders` that has one of the files.
            folders: where they can lie.
            fault: finding (kind, message, file) of a missing file, by its place, what is said of it, and the folder.
            report: is told.
        """
        kind, of_json = what.split()[-1], f"of {self.json_path}"
        found: list[str | None] = [None] * len(names)
        try:
            if not any(names):
                return self.root, found
            folder = self.root / with_split(given, self.split) if given else None
            folder = folder or _first_with(self.root, folders, list(filter(None, names)), f"{what} {of_json}", kind)
            require_folder(folder, kind)
        except (OSError, ValueError) as error:
            report("missing_folder", str(error), self.json_path, error)
            return self.root, found
        files, missing = _NamedFiles(self.root, folder), {}
        for place, name in enumerate(names):
            try:
                found[place] = files.find(name) if name else None
            except FileNotFoundError as error:
                missing[place] = str(error)
            except ValueError as error:
                message = f"file_name {error}"
                report("bad_record", message, self.json_path, ValueError(f"{what}s {of_json}: {message}."))
        several = f"{len(missing)} {what}s {of_json} are missing from {folder}: {some(list(missing.values()))}."
        for place, said in missing.items():
            report(*fault(place, said, folder), FileNotFoundError(several))
        if folder != self.image_folder:
            # those of folders below are left alone
            for name in sorted(files.there - {Path(name).name for name in (*names, *filter(None, found))}):
                if name.lower().endswith(IMAGE_SUFFIXES):
                    report("file_not_listed", f"no {kind} of {self.json_path.name}", folder / name)
        return folder, found

    def image_path(self, index: int) -> Path:
        """File of an image; None where it is missing, which only a check lets pass."""
        # None for a check alone: else nothing is missing
        return None if index in self._missing else self.image_folder / self.file_names[index]  # type: ignore

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image, as the json says."""
        return list(self._sizes)

    def record(self, index: int) -> str:
        """The record of an image, for messages."""
        return f"{self.json_path}, image {shown(self.image_ids[index])} ({self.file_names[index]})"

    def require_size(self, index: int, size: tuple[int, int]) -> None:
        """Refuses an image whose size is not that of the json.

        Args:
            index: of the image.
            size: (height, width) of the image itself.

        Raises:
            ValueError: the two differ.
        """
        check_size(self._sizes[index], size, self.record(index), str(self.image_path(index)))

    def check_size(self, index: int, picture: Picture | None, report: ReportFault) -> tuple[int, int]:
        """Size of an image, whose file says it better than the json.

        Args:
            index: of the image.
            picture: the image; None: it could not be read.
            report: is told where the two differ.

        Returns:
            (height, width).
        """
        compare_sizes(self._sizes[index], picture, "the json", "json_size_mismatch", report)
        return picture.size if picture else self._sizes[index]


def check_numbers(record: Mapping[str, Any], region: Region, what: str, slack: bool, report: ReportFault) -> None:
    """Compares area and box of a json record with its mask.

    Args:
        record: of the json.
        region: area and box of the mask.
        what: the record in words, for the message.
        slack: they can be those of a polygon, not of its pixels.
        report: is told where they differ.
    """
    left, top, width, height = region.box
    if record.get("area") is not None:
        tolerance = 0.1 * region.area + width + height if slack else 0.5
        if not abs(float(record["area"]) - region.area) <= tolerance:  # NaN neither
            report("area_mismatch", f"{what}: area {record['area']}, mask {region.area}")
    given = record.get("bbox")
    if given is None:
        return
    if not (isinstance(given, list) and len(given) == 4 and all(map(is_number, given))):
        report("box_mismatch", f"{what}: box {shown(given)}, not [left, top, width, height]")
        return
    tolerance = 3 + 0.05 * max(width, height) if slack else 0.5
    box = np.array(given, dtype=np.float64)
    corners = np.array([left, top, left + width, top + height])
    if not (abs(np.append(box[:2], box[:2] + box[2:]) - corners) <= tolerance).all():
        hint = ", so it is [left, top, right, bottom]" if (abs(box - corners) <= tolerance).all() else ""
        found = [round(number, 1) for number in box.tolist()]
        report("box_mismatch", f"{what}: box {found}, mask {list(region.box)}{hint}")


class _NamedFiles:
    """The files of a folder, by the names that a json has for them.

    Args:
        root: folder of the data: no name may lead out of it, or out of `folder`.
    """

    def __init__(self, root: Path, folder: Path):
        self.root, self.folder = root, folder
        self.there = _files_of(folder)
        self._listed: dict[Path, dict[str, list[str]]] = {}  # files of each folder by what their names are compared by

    def find(self, name: str) -> str:
        """The name on the disk, which can be in another Unicode form.

        Raises:
            FileNotFoundError: there is no such file; says what is near.
            ValueError: the name leads out of the data.
        """
        if name in self.there:
            return name
        path = self.folder / name
        inside = os.path.abspath(path)
        if not any(Path(inside).is_relative_to(os.path.abspath(top)) for top in (self.root, self.folder)):
            raise ValueError(f"{name} leads out of the data folder")
        if os.path.isfile(path):  # False for names that are too long, too
            return name
        if "\\" in name:  # of a tool on Windows
            with suppress(FileNotFoundError):
                return self.find(name.replace("\\", "/"))
        if path.parent not in self._listed:
            self._listed[path.parent] = _by_letters(_files_of(path.parent))
        near = self._listed[path.parent].get(_letters(path.name), [])
        same = [other for other in near if _composed(other) == _composed(path.name)]
        if len(same) == 1:
            return str(Path(name).with_name(same[0]))
        hint = ""
        if near:
            hint = f" (there is {near[0]}: small and capital letters differ)"
        elif "\\" in name:
            hint = " (written with backslashes: write / between folders)"
        elif os.path.isdir(path):
            hint = " (a folder)"
        raise FileNotFoundError(f"{name}{hint}")


def _files_of(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_file()} if os.path.isdir(folder) else set()


def _by_letters(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(_letters(name), []).append(name)
    return found


def _letters(name: str) -> str:
    """The same for names that differ in their Unicode form, or in small and capital letters, alone."""
    return _composed(name).lower()


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _first_with(root: Path, folders: list[Path], names: Sequence[str], what: str, kind: str) -> Path:
    """The first folder that has one of the first names. FileNotFoundError: none has."""
    folders = list(dict.fromkeys(folders))
    for name in names[:_NAMES_TRIED]:
        for folder in folders:
            if os.path.isfile(folder / name):
                return folder
    files = [_NamedFiles(root, folder) for folder in folders]
    for name in names[:_NAMES_TRIED]:
        for there in files:
            with suppress(FileNotFoundError, ValueError):
                there.find(name)
                return there.folder
    looked = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(f"No folder with {names[0]}, the first {what}. Looked in {looked}; or give {kind}_folder.")


def _splits_of(pattern: str) -> Iterator[str]:
    """What `{split}` can be in the path of a file."""
    split = re.escape("{split}")
    form = re.escape(pattern).replace(split, "(.+)", 1).replace(split, r"\1")
    for path in glob.glob("*".join(map(glob.escape, pattern.split("{split}")))):
        if (match := re.fullmatch(form, path)) and match.groups():
            yield match[1]
