"""Segment an image with the checkpoint of this repository:  make demo

The image, nuclei.png, is a validation image of the 2018 Data Science Bowl (CC0); the checkpoint was trained on others
(model_cards/maskcls-nuclei-tiny). It knows itself how it is run.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from maskcls_hf import Segments
from maskcls_hf.cli.coco import CocoRecords, coco_content, map_image
from maskcls_hf.inference import Predictor
from maskcls_hf.visual.drawing import Color, draw_overlay, segment_colors

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "model_cards" / "maskcls-nuclei-tiny"
SHOWN = 10  # rows of the table


def main(checkpoint: Path = CHECKPOINT, out: Path = ROOT / "demo") -> None:
    if not (checkpoint / "model.safetensors").is_file():
        sys.exit(
            f"No checkpoint in {checkpoint}: restore the folder from the repository, or train one (see docs/train.md)."
        )
    image = Image.open(ROOT / "nuclei.png").convert("RGB")
    pixels = np.array(image)  # (H, W, 3)

    predict = Predictor.from_pretrained(checkpoint)
    names, stuff = predict.id2label, predict.image_processor.label_ids_to_fuse or []
    result = Segments.from_output(predict(image, "panoptic"))
    colors = segment_colors(result.records, len(names), stuff)
    out.mkdir(exist_ok=True)
    draw_overlay(pixels, result.index_map.numpy(), result.records, colors, names).save(out / "overlay.png")
    map_image(result, "panoptic", colors, len(names)).save(out / "map.png")
    records = CocoRecords("panoptic", names, stuff)
    record = records.of("map.png", result, colors)
    record["image"]["file_name"] = "nuclei.png"
    (out / "segments.json").write_text(json.dumps(coco_content([record], records.categories)))

    print_table(names, record["annotations"][0]["segments_info"], colors)
    print(f"Written to {out}: overlay.png, map.png, segments.json")


def print_table(names: dict[int, str], records: list[dict[str, Any]], colors: list[Color]) -> None:
    """The largest ones, and how many each class has."""
    numbers = Counter(names[record["category_id"]] for record in records)
    table = Table(title=f"Segments: {', '.join(f'{name} {number}' for name, number in numbers.items())}")
    for heading in ("", "class", "score", "area", "box (left, top, width, height)"):
        table.add_column(heading, justify="left" if heading in ("", "class") else "right")
    by_size = sorted(zip(records, colors, strict=True), key=lambda pair: -pair[0]["area"])
    for record, (red, green, blue) in by_size[:SHOWN]:
        table.add_row(
            f"[rgb({red},{green},{blue})]■[/]",
            names[record["category_id"]],
            f"{record['score']:.2f}",
            str(record["area"]),
            ", ".join(str(number) for number in record["bbox"]),
        )
    if len(records) > SHOWN:
        table.caption = f"and {len(records) - SHOWN} smaller ones"
    Console().print(table)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
