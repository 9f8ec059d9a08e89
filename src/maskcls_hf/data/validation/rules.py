"""Everything that `maskcls validate` looks for: how bad it is, its title, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Rule(NamedTuple):
    severity: Severity
    title: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """
    Args:
        kind: key of `RULES`.
        message: what is wrong there.
        split: of the data; None: all of it.
        file: below the data folder, or the image that the finding is about; None: the split.
    """

    kind: str
    message: str
    split: str | None = None
    file: str | None = None

    @property
    def severity(self) -> Severity:
        return RULES[self.kind].severity


def _error(title: str, advice: str) -> Rule:
    return Rule("error", title, advice)


def _warning(title: str, advice: str) -> Rule:
    return Rule("warning", title, advice)


def _note(title: str, advice: str) -> Rule:
    return Rule("note", title, advice)


RULES: dict[str, Rule] = {
    # the folder
    "unknown_layout": _error(
        "No known layout", "Arrange the files as one of the layouts, or name it with --layout and --split."
    ),
    "missing_folder": _error("A folder is missing", "Put the files there, or name the folder in the recipe's options."),
    "bad_class_names": _error(
        "The names of the classes cannot be read",
        'Write labels.json beside the splits: {"0": "sky", "1": "road"}; in a COCO json, categories with id and name.',
    ),
    "no_images": _error("A split has no images", "Put images there: .jpg, .png, .tif, .bmp or .webp."),
    "image_without_label": _error(
        "Images without a label", "Annotate them, or move them out of the folder; both files have one name."
    ),
    "label_without_image": _error("Labels without an image", "Add the image, or remove the annotation."),
    "lossy_label": _error(
        "Label maps in a lossy format",
        "JPEG changes ids. Export them again as PNG; converting the JPEG keeps its faults.",
    ),
    "same_name": _error("Several files of one name", "Rename one of them, with its partner, or remove it."),
    "reader_refuses": _error("The reader refuses the data", "See the message; it names the file."),
    "file_not_listed": _note(
        "Files that the annotations do not list", "They are not read. Nothing, if that is wanted."
    ),
    # single files
    "unreadable_image": _error(
        "Images that cannot be read",
        "As the message says; a damaged file: copy or download it again, or remove it and its label.",
    ),
    "unreadable_label": _error(
        "Label files that cannot be read",
        "As the message says; a damaged file: export it again, or remove it and its image.",
    ),
    "size_mismatch": _error(
        "Label and image differ in size",
        "Export the label at the size of its image. Resize labels with nearest neighbour only.",
    ),
    "exif_mismatch": _error(
        "Image turned by its EXIF orientation, label not",
        "Turn the label the same way (PIL.ImageOps.exif_transpose of the image shows which), or save the image "
        "without its orientation tag if its pixels match the label.",
    ),
    "exif_turned": _note(
        "Images with an EXIF orientation that the size does not prove",
        "The image is turned upright when read. Look whether the label lies upright too.",
    ),
    "colour_label": _error(
        "Label maps in colour",
        "A label map has one channel of class ids. Of a palette file the indices are read: never .convert('RGB') it. "
        "Map each colour to its id and save with mode L.",
    ),
    "grey_panoptic": _error(
        "Panoptic maps without three channels", "A COCO panoptic PNG is RGB: id = R + 256 G + 65536 B. Export it so."
    ),
    "palette_conflict": _warning(
        "Palette indices change their colour between files",
        "The tool that wrote them sorted the palette anew for each file, so an index is no class. Map colours to ids.",
    ),
    "duplicate_image": _note("The same image twice in a split", "Remove one, or merge their labels."),
    "leak": _warning("The same image in two splits", "Remove it from one: a score on seen images is too high."),
    # classes
    "ids_outside": _error(
        "Label values that are no class",
        "Name them in labels.json; or, if they mark unlabelled pixels, give void_values in the recipe's data options "
        "(--void here).",
    ),
    "off_by_one": _warning(
        "Class ids seem to be shifted by one", "Make the keys of labels.json equal to the values in the files."
    ),
    "mask_255": _warning(
        "255 seems to be read as something else than it means",
        "Save the second class of a mask as 1, each instance as 1..n. Where 255 marks unlabelled pixels of instance "
        "maps, as the border in Pascal VOC's SegmentationObject, give it as void (--void 255 here, void_values in the "
        "recipe's data options).",
    ),
    "void_class": _warning(
        "A class is named like unlabelled pixels",
        "It is trained and scored as a class. Leave it out of labels.json and give its value as void (--void here, "
        "void_values in the recipe's data options).",
    ),
    "nothing_to_learn": _error(
        "There is nothing to learn or to score",
        "Look whether the labels are complete, and whether their values mean what the names of the classes say.",
    ),
    "never_seen": _warning(
        "Classes that never occur", "They cannot be learned: leave them out, or add images with them."
    ),
    "only_in_train": _warning(
        "Classes that occur in training, but not here", "They have no score here: split the images anew."
    ),
    "not_in_train": _warning(
        "Classes that occur, but not in training", "Their score will be 0: split the images anew, or leave them out."
    ),
    "same_class_name": _note(
        "Classes of one name", "They get their id behind the name; join or rename them if they are one."
    ),
    "control_characters": _note(
        "Class names with control characters", "They are trained with, and shown as \\n or \\x1b. Better rename them."
    ),
    "classes_differ": _error("The splits have different classes", "Give all splits the same categories and ids."),
    # segments
    "all_void": _warning(
        "Images with every pixel unlabelled", "Nothing is learned from them: remove or annotate them."
    ),
    "no_segments": _note("Images without an instance", "Right for true negatives; else annotate them."),
    "empty_segment": _warning("Segments without a pixel", "Draw them anew, or remove them; they are skipped."),
    "relative_polygon": _warning(
        "Polygons in parts of the image", "Points are pixels: multiply x by the width of the image, y by its height."
    ),
    "tiny_segment": _note("Segments of under 10 pixels", "Often slips of the annotation tool. Look at a few."),
    "vanishing": _warning(
        "Segments that vanish at training resolution",
        "Train at a larger size (image_processor.size of the recipe), or accept that they are not learned.",
    ),
    "too_many_segments": _warning(
        "Images with more segments than queries",
        "A model of N queries finds N segments at most: raise num_queries, or train and predict on crops.",
    ),
    "stuff_twice": _warning(
        "Stuff in several segments of one image",
        "A stuff class is one segment an image: merge them, or set isthing to 1.",
    ),
    "crowd": _note("Crowd regions", "Nothing: they are unlabelled in training, and scored as COCO does."),
    # COCO json
    "bad_json": _error("An annotation file cannot be read", "Export it again."),
    "bad_record": _error("Incomplete records in the json", "Add the missing keys, or remove the record."),
    "double_id": _error("Several records of one id", "Number them anew; annotations refer to images by id."),
    "double_annotation_id": _warning(
        "Several annotations of one id", "Number them anew: pycocotools keeps only the last of them."
    ),
    "missing_isthing": _error(
        "Categories without isthing", "Say of each category whether it is a thing (1) or stuff (0)."
    ),
    "orphan_annotation": _error("Annotations of images that the json lacks", "Add the image record, or remove them."),
    "unknown_category": _error("Annotations of unknown categories", "Add the category, or remove the annotations."),
    "json_size_mismatch": _error(
        "Size in the json is not that of the image", "Correct height and width, or put the right image there."
    ),
    "bad_segmentation": _error("Masks that cannot be drawn", "Correct or remove these annotations."),
    "ids_not_in_json": _error(
        "Segment ids in the PNG that the json lacks", "Add them to segments_info, or paint these pixels black (void)."
    ),
    "area_mismatch": _warning("Area in the json is not that of the mask", "Compute it anew: AP by size depends on it."),
    "box_mismatch": _warning(
        "Box in the json is not that of the mask", "Compute it anew, as [left, top, width, height]."
    ),
}
