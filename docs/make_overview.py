"""Draw docs/overview.png: an image, some of its probability-mask pairs, and the map that they make.

    python docs/make_overview.py IMAGE [CHECKPOINT]

The picture in the README shows an image of the 2018 Data Science Bowl (CC0) that the checkpoint was not trained on.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

import maskcls_hf  # noqa: F401  (the Auto classes now know its models)
from maskcls_hf.visual.drawing import PAPER, TEXT, draw_overlay, segment_colors

ROOT = Path(__file__).resolve().parents[1]
EDGE, GAP, MARGIN, LINE = 384, 14, 60, 30
GRID = 3  # pairs drawn in GRID x GRID cells


def square(pixels: NDArray[Any], edge: int, smooth: bool = True) -> Image.Image:
    """The middle of `pixels`, enlarged to `edge` x `edge`."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = Image.fromarray(pixels[top : top + side, left : left + side])
    return middle.resize((edge, edge), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def pairs(outputs: Any, names: dict[int, str]) -> list[tuple[str, NDArray[np.uint8]]]:
    """Captions and masks: the largest that are sure of their class, and last a query that found nothing."""
    probabilities = outputs.class_queries_logits[0].softmax(-1)  # (N, K + 1)
    masks = outputs.masks_queries_logits[0].sigmoid()  # (N, h, w)
    scores, labels = probabilities.max(-1)
    no_object = labels == probabilities.shape[1] - 1
    areas = (masks > 0.5).sum((1, 2)) * (scores > 0.8)
    order = (areas - 10**9 * no_object).argsort(descending=True).tolist()
    nothing = [query for query in order if no_object[query]][:1]
    chosen = order[: GRID * GRID - len(nothing)] + nothing
    height, width = (int(length) for length in outputs.valid_sizes[0] // 4)
    return [
        (
            f"{names.get(int(labels[query]), 'no object')} {float(scores[query]):.2f}",
            (255 * masks[query, :height, :width]).byte().numpy(),
        )
        for query in chosen
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "model_cards" / "maskcls-nuclei-tiny")
    parser.add_argument("--crop", type=int, default=128, help="pixels of the upper left corner")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "overview.png")
    arguments = parser.parse_args()

    image = np.array(Image.open(arguments.image).convert("RGB"))[: arguments.crop, : arguments.crop]
    image_processor = AutoImageProcessor.from_pretrained(arguments.checkpoint)
    model = AutoModelForUniversalSegmentation.from_pretrained(arguments.checkpoint)
    with torch.inference_mode():
        outputs = model(**image_processor(image, return_tensors="pt"))
    found = image_processor.post_process_panoptic_segmentation(
        outputs,
        threshold=0.5,
        overlap_mask_area_threshold=0.5,  # as on the model card
    )[0]
    ids, segments = found["segmentation"].numpy(), found["segments_info"]
    names = model.config.id2label
    colors = segment_colors(segments, len(names), image_processor.label_ids_to_fuse or [])
    overlay = np.asarray(draw_overlay(image, ids, segments, colors, names, legend=False))

    sheet = Image.new("RGB", (3 * EDGE + 4 * MARGIN, EDGE + 2 * LINE + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 2 * LINE
    lefts = [MARGIN + column * (EDGE + MARGIN) for column in range(3)]
    headings = ("an image", f"{model.config.num_queries} pairs: class and mask", "a map")
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left + EDGE / 2, LINE), heading, fill=TEXT, font=ImageFont.load_default(22), anchor="mm")
    sheet.paste(square(image, EDGE), (lefts[0], top))
    sheet.paste(square(overlay, EDGE), (lefts[2], top))
    cell = (EDGE - (GRID - 1) * GAP) // GRID
    for index, (caption, mask) in enumerate(pairs(outputs, names)):
        left = lefts[1] + index % GRID * (cell + GAP)
        cell_top = top + index // GRID * (cell + GAP)
        sheet.paste(square(mask, cell).convert("RGB"), (left, cell_top))
        draw.rectangle((left, cell_top + cell - 17, left + cell - 1, cell_top + cell - 1), fill=(30, 30, 34))
        draw.text((left + 6, cell_top + cell - 9), caption, fill=PAPER, font=ImageFont.load_default(12), anchor="lm")
    for left in lefts[1:]:
        middle = (left - MARGIN / 2, top + EDGE / 2)
        arrow = [(middle[0] - 12, middle[1] - 14), (middle[0] + 12, middle[1]), (middle[0] - 12, middle[1] + 14)]
        draw.polygon(arrow, fill=(150, 150, 158))
    sheet.save(arguments.out)


if __name__ == "__main__":
    main()
