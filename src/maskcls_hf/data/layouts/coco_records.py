"""The records of a COCO json, checked once for all: a reader raises the first fault, `validate` lists every one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, cast

from ..files import class_name, has_controls, shown

CocoKind = Literal["instances", "panoptic"]

KEYS = ("images", "annotations", "categories")
MOST_PIXELS = 2**31  # pycocotools counts pixels in 32 bits
_MOST_SEGMENTS = 2**24  # of the colors that are their ids
WHOLE = "a whole number"
UNREAD = object()
Item = TypeVar("Item")


class _Field(NamedTuple):
    read: Callable[[Any], Any]  # the value as it is used; ValueError: it is of another kind
    expected: str
    optional: bool = False  # it may be missing, or null


def _if(good: bool, value: Item) -> Item:
    if not good:
        raise ValueError
    return value


def is_number(value: Any) -> bool:
    """Whether a value of a json is a number, and of a size that a float can have.

    Examples:
        >>> is_number(2.5), is_number(True), is_number(2**70)
        (True, False, False)
    """
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _whole(value: Any) -> int:
    value = int(value) if type(value) is float and value.is_integer() else value
    return cast(int, _if(type(value) is int, value))  # nor a bool, which counts as an int


def _file_name(value: Any) -> str:
    return _if(not has_controls(name := class_name(value)), name)


def _side(value: Any) -> int:
    return _if((side := _whole(value)) >= 1, side)


def _segment_id(value: Any) -> int:
    return _if(0 <= (segment := _whole(value)) < _MOST_SEGMENTS, segment)


def _id(value: Any) -> int | str:
    return value if type(value) is str else _whole(value)


def _number(value: Any) -> float:
    return cast(float, _if(is_number(value), value))


def _flag(value: Any) -> int:
    return int(_if(value in (0, 1, "0", "1"), value))  # True is 1


def _list(value: Any) -> list[Any]:
    return cast(list[Any], _if(type(value) is list, value))


ID, FILE_NAME = _Field(_id, "a whole number or a text"), _Field(_file_name, "the name of a file")
SIDE, CATEGORY_ID = _Field(_side, "a number of pixels from 1"), _Field(_whole, WHOLE)
FLAG, NUMBER = _Field(_flag, "0 or 1", optional=True), _Field(_number, "a number", optional=True)
OPTIONAL_SIDE = SIDE._replace(optional=True)  # that of the file, then
IMAGE = {"id": ID, "file_name": FILE_NAME, "height": OPTIONAL_SIDE, "width": OPTIONAL_SIDE}
_CATEGORY = {"id": CATEGORY_ID, "name": _Field(class_name, "a name"), "isthing": FLAG}
_ANNOTATION: dict[CocoKind, dict[str, _Field]] = {
    "instances": {
        "id": ID._replace(optional=True), "image_id": ID, "category_id": CATEGORY_ID, "iscrowd": FLAG, "area": NUMBER,
    },
    "panoptic": {"image_id": ID, "file_name": FILE_NAME, "segments_info": _Field(_list, "a list")},
}  # fmt: skip
_SEGMENT = {
    "id": _Field(_segment_id, f"{WHOLE} below 2^24"), "category_id": CATEGORY_ID, "iscrowd": FLAG, "area": NUMBER,
}  # fmt: skip


def _wrong_field(record: Any, fields: Mapping[str, _Field]) -> str | None:
    """What is wrong with a record; None: nothing, and its fields have become the values that are used."""
    if type(record) is not dict:
        return f"is {shown(record)}, not a record"
    for name, field in fields.items():
        value = record.get(name)
        if value is None:
            if field.optional:
                continue
            return f"has {name} null, not {field.expected}" if name in record else f"has no {name}"
        try:
            record[name] = field.read(value)
        except ValueError:
            return f"has {name} {shown(value)}, not {field.expected}"
    return None


class CocoContent:
    """The records that nothing is wrong with.

    Args:
        content: of the json; `UNREAD`: it could not be read, as is known already.
        kind: of file.
        report: is told what is wrong: the kind of finding, a message that names record and field, and the image or map
            that it is about, if any. It may raise.

    Attributes:
        class_names (`dict[int, str]`): by category id.
        stuff (`list[int]`): ids of the categories whose `isthing` is 0.
        images (`dict`): image id -> record, in the order of the file.
        annotations (`dict`): image id -> its annotations, in the order of the file. A panoptic one also has `dropped`,
            the ids of the segments that were refused, None for one whose id is unknown.
    """

    def __init__(self, content: Any, kind: CocoKind, report: Callable[..., None]):
        self.kind, self._report = kind, report
        self.class_names: dict[int, str] = {}
        self.stuff: list[int] = []
        self.images: dict[int | str, dict[str, Any]] = {}
        self.annotations: dict[int | str, list[dict[str, Any]]] = {}
        # ids of refused records, as text: that others refer to them is no further fault
        self._refused: dict[str, set[str]] = {key: set() for key in KEYS}
        if content is UNREAD:
            return
        if type(content) is not dict:
            report("bad_json", f"is {shown(content)}, no object with {', '.join(KEYS)}")
            return
        if lacking := [key for key in KEYS if type(content.get(key)) is not list]:
            report("bad_json", f"lacks {', '.join(lacking)} (lists), so this is no COCO annotation file")
        lists = {key: [] if key in lacking else content[key] for key in KEYS}
        self._read_categories(lists["categories"])
        if not (self.class_names or self._refused["categories"] or "categories" in lacking):
            report("bad_class_names", "lists no categories")
        self._read_images(lists["images"])
        if not self.images and "images" not in lacking:
            report("no_images", "lists no images")
        self.annotations = {image_id: [] for image_id in self.images}
        if kind == "instances":
            self._read_instances(lists["annotations"])
            self._drop_group(lists["categories"])
        else:
            self._read_panoptic(lists["annotations"])

    def _checked(self, key: str, records: list[Any], fields: Mapping[str, _Field]) -> Iterator[tuple[int, Any]]:
        """Complete records, with their places."""
        for place, record in enumerate(records):
            if wrong := _wrong_field(record, fields):
                own_id = record.get("id") if type(record) is dict else None
                self._refused[key].add(str(own_id) if isinstance(own_id, (str, int, float)) else "")
                where = _place(key, place, own_id)
                self._report("bad_record", f"{where} {wrong}{self._other_kind(key, record)}")
                continue
            yield place, record

    def _other_kind(self, key: str, record: Any) -> str:
        if key != "annotations" or type(record) is not dict or ("segments_info" in record) == (self.kind == "panoptic"):
            return ""
        if self.kind == "panoptic":
            return ", so this is no panoptic file"
        return ", so this is a panoptic file (layout coco_panoptic)"

    def _read_categories(self, records: list[Any]) -> None:
        for place, record in self._checked("categories", records, _CATEGORY):
            label, name = record["id"], record["name"]
            if label in self.class_names:
                self._report(
                    "double_id",
                    f"categories[{place}], {shown(name)}, has id {label}, as {shown(self.class_names[label])} has",
                )
                continue
            self.class_names[label] = name
            if self.kind == "panoptic" and record.get("isthing") is None:
                self._report("missing_isthing", f"categories without isthing: {shown(name)} (id {label})")
            elif self.kind == "panoptic" and not record["isthing"]:
                self.stuff.append(label)

    def _read_images(self, records: list[Any]) -> None:
        id_of: dict[str, int | str] = {}
        for place, record in self._checked("images", records, IMAGE):
            image_id, name = record["id"], record["file_name"]
            height, width = record.get("height"), record.get("width")
            if height and width and height * width >= MOST_PIXELS:
                self._refused["images"].add(str(image_id))
                self._report(
                    "bad_record",
                    f"{_place('images', place, image_id)} has height {height} and width {width}, 2^31 pixels or more",
                )
                continue
            if image_id in self.images:
                other = self.images[image_id]["file_name"]
                self._report("double_id", f"several images have one id, {shown(image_id)}: {name} and {other}", name)
                continue
            if name in id_of:
                self._report(
                    "same_name", f"images {shown(id_of[name])} and {shown(image_id)} are of one file, {name}", name
                )
            id_of.setdefault(name, image_id)
            self.images[image_id] = record

    def _is_listed(self, what: str, label: Any, key: str, listed: Mapping[Any, Any], rule: str, file: Any) -> bool:
        """Whether `label` is the id of a record of `key`, which `what` refers to."""
        if label in listed:
            return True
        if listed and str(label) not in self._refused[key]:
            kind = {"images": "image", "categories": "category"}[key]
            other = next((other for other in (str(label), _as_number(label)) if other in listed), None)
            hint = "" if other is None else f": there {shown(other)} is a {'text' if type(other) is str else 'number'}"
            self._report(rule, f"{what} is of {kind} {shown(label)}, which the file does not list{hint}", file)
        return False

    def _read_instances(self, records: list[Any]) -> None:
        ids: set[Any] = set()
        for place, record in self._checked("annotations", records, _ANNOTATION["instances"]):
            own_id, image_id = record.get("id"), record["image_id"]
            name = f"annotation {own_id}" if type(own_id) is int else _place("annotations", place, own_id)
            if not self._is_listed(name, image_id, "images", self.images, "orphan_annotation", None):
                continue
            file = self.images[image_id]["file_name"]
            label = record["category_id"]
            if label == 0 and label not in self.class_names and "attributes" in record:
                self._report("skipped_shape", f"{name} has no label (category 0 of CVAT)", file)
                continue
            if not self._is_listed(name, label, "categories", self.class_names, "unknown_category", file):
                continue
            if own_id is not None and own_id in ids:
                self._report("double_annotation_id", f"{name} is there more than once", file)
            ids.add(own_id)
            self.annotations[image_id].append(record)

    def _drop_group(self, records: list[Any]) -> None:
        """Without Roboflow's category 0, where it is but the name of the group of the others."""
        others = [r.get("supercategory") for r in records if type(r) is dict and r.get("id") != 0]
        if not others or any(other != self.class_names.get(0, ()) for other in others):
            return
        if not any(record["category_id"] == 0 for found in self.annotations.values() for record in found):
            name = self.class_names.pop(0)
            self._report("skipped_shape", f"category 0, {shown(name)}, is the name of the others' group")

    def _read_panoptic(self, records: list[Any]) -> None:
        for place, record in self._checked("annotations", records, _ANNOTATION["panoptic"]):
            image_id, file = record["image_id"], record["file_name"]
            if not self._is_listed(
                f"annotations[{place}], {file},", image_id, "images", self.images, "orphan_annotation", None
            ):
                continue
            if self.annotations[image_id]:
                self._report(
                    "double_id", f"image {shown(image_id)} has several panoptic annotations, also {file}", file
                )
                continue
            self._read_segments(record)
            self.annotations[image_id].append(record)
        for image_id, found in self.annotations.items():
            if not found and not self._refused["annotations"]:
                name = self.images[image_id]["file_name"]
                self._report(
                    "image_without_label", f"image {shown(image_id)}, {name}, has no panoptic annotation", name
                )

    def _read_segments(self, annotation: dict[str, Any]) -> None:
        file = annotation["file_name"]
        good: dict[int, Any] = {}
        annotation["dropped"] = []
        for place, segment in enumerate(annotation["segments_info"]):
            where = f"{file}: segments_info[{place}]"
            if wrong := _wrong_field(segment, _SEGMENT):
                annotation["dropped"].append(None)
                self._report("bad_record", f"{where} {wrong}", file)
                continue
            own_id, label = segment["id"], segment["category_id"]
            if own_id in good or own_id == 0:
                wrong = "has id 0, which is void" if own_id == 0 else f"has id {own_id}, as another segment has"
                self._report("double_id", f"{where} {wrong}", file)
            elif self._is_listed(where, label, "categories", self.class_names, "unknown_category", file):
                good[own_id] = segment
            else:
                annotation["dropped"].append(own_id)
        annotation["segments_info"] = list(good.values())


def _place(key: str, place: int, own_id: Any) -> str:
    return f"{key}[{place}]" if own_id is None else f"{key}[{place}] (id {shown(own_id)})"


def _as_number(label: Any) -> Any:
    return int(label) if type(label) is str and label.isascii() and label.isdigit() and len(label) < 20 else None
