"""Segment a photograph with the checkpoint of this repository:  make demo

The photograph is a part of `mahotas.demos.nuclear_image()`, which lies inside the mahotas package (MIT license): nuclei
under a fluorescence microscope, here shrunk to the size of those in the training images. The checkpoint was trained on
other images only (model_cards/maskcls-nuclei-tiny).
"""

import json
import sys
from pathlib import Path
from typing import Any

import mahotas.demos
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

import maskcls_hf  # noqa: F401  (the Auto classes now know its models)
from maskcls_hf.cli.coco import CocoRecords, coco_content, map_image
from maskcls_hf.metrics import Segments
from maskcls_hf.visual.drawing import Color, draw_overlay, segment_colors

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "model_cards" / "maskcls-nuclei-tiny"
PART, SHRINK = (0, 0, 512, 512), 4  # left, top, right, bottom of the part


def main(checkpoint: Path = CHECKPOINT, out: Path = ROOT / "demo") -> None:
    if not (checkpoint / "model.safetensors").is_file():
        sys.exit(
            f"No checkpoint in {checkpoint}: restore the folder from the repository, or train one (see README.md)."
        )
    image = Image.fromarray(mahotas.demos.nuclear_image()).convert("RGB").crop(PART).reduce(SHRINK)
    photograph = np.array(image)  # (H, W, 3)

    image_processor = AutoImageProcessor.from_pretrained(checkpoint)
    model = AutoModelForUniversalSegmentation.from_pretrained(checkpoint)
    with torch.inference_mode():
        outputs = model(**image_processor(photograph, return_tensors="pt"))
    found = image_processor.post_process_panoptic_segmentation(
        outputs,
        threshold=0.5,
        overlap_mask_area_threshold=0.5,  # as on the model card
    )[0]

    names, stuff = model.config.id2label, image_processor.label_ids_to_fuse or []
    result = Segments.from_output(found)
    colors = segment_colors(result.records, len(names), stuff)
    out.mkdir(exist_ok=True)
    draw_overlay(photograph, result.index_map.numpy(), result.records, colors, names).save(out / "overlay.png")
    map_image(result, "panoptic", colors, len(names)).save(out / "map.png")
    records = CocoRecords("panoptic", names, stuff)
    record = records.of("map.png", result, colors)
    record["image"]["file_name"] = "nuclear"
    (out / "segments.json").write_text(json.dumps(coco_content([record], records.categories)))

    print_table(names, record["annotations"][0]["segments_info"], colors)
    print(f"Written to {out}: overlay.png, map.png, segments.json")


def print_table(names: dict[int, str], records: list[dict[str, Any]], colors: list[Color]) -> None:
    table = Table(title="Segments")
    for heading in ("", "class", "score", "area", "box (left, top, width, height)"):
        table.add_column(heading, justify="left" if heading in ("", "class") else "right")
    for record, (red, green, blue) in zip(records, colors, strict=True):
        table.add_row(
            f"[rgb({red},{green},{blue})]■[/]",
            names[record["category_id"]],
            f"{record['score']:.2f}",
            str(record["area"]),
            ", ".join(str(number) for number in record["bbox"]),
        )
    Console().print(table)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
