"""Draw crops of validation images, their annotated nuclei, and the nuclei that a model finds, side by side.

python docs/show_nuclei.py DSB2018_FOLDER CHECKPOINT OUT.png
"""

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.data import SegmentationFolder

IMAGES, CROP, COLUMNS, ZOOM = (11, 17, 23, 40, 52, 60, 70, 77, 90, 101, 112, 125), 128, 3, 2
HEADING = 56  # pixels
COLORS = np.random.default_rng(1).integers(70, 255, (4096, 3), dtype=np.uint8)


def painted(ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    return np.where((ids == 0)[..., None], np.uint8(0), COLORS[ids % len(COLORS)])


def triple(sample: dict, model: MaskClsForUniversalSegmentation, processor: MaskClsImageProcessor) -> NDArray[np.uint8]:
    """Image, annotation and prediction of the upper left crop (CROP, 3 * CROP, 3)."""
    pixels = np.asarray(sample["image"]).transpose(1, 2, 0)[:CROP, :CROP]
    annotated = sample["segments"].index_map.numpy()[:CROP, :CROP].astype(np.int64)  # 0: the background, as a class
    with torch.inference_mode():
        outputs = model(**processor(pixels.copy(), return_tensors="pt"))
    result = processor.post_process_panoptic_segmentation(
        outputs,
        threshold=0.5,
        overlap_mask_area_threshold=0.5,  # as on the model card
    )[0]
    nuclei = [segment["id"] for segment in result["segments_info"] if segment["label_id"] == 1]
    found = result["segmentation"].numpy().astype(np.int64)
    found[~np.isin(found, nuclei)] = 0
    brightened = np.clip(pixels * (255.0 / max(int(pixels.max()), 1)), 0, 255).astype(np.uint8)
    return np.concatenate([brightened, painted(annotated), painted(found)], axis=1)


def main(data: Path, checkpoint: Path, out: Path) -> None:
    model = MaskClsForUniversalSegmentation.from_pretrained(checkpoint)
    processor = MaskClsImageProcessor.from_pretrained(checkpoint)
    folder = SegmentationFolder(data, "val")
    triples = [
        np.pad(triple(folder[i], model, processor), ((0, 6), (0, 12), (0, 0)), constant_values=255) for i in IMAGES
    ]
    rows = [np.concatenate(triples[i : i + COLUMNS], axis=1) for i in range(0, len(triples), COLUMNS)]
    crops = Image.fromarray(np.concatenate(rows, axis=0))
    crops = crops.resize((crops.width * ZOOM, crops.height * ZOOM), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (crops.width, crops.height + HEADING), "white")
    picture.paste(crops, (0, HEADING))
    draw = ImageDraw.Draw(picture)
    for column in range(COLUMNS):
        for place, heading in enumerate(("image", "annotated", "found")):
            middle = column * crops.width / COLUMNS + (place + 0.5) * CROP * ZOOM
            draw.text((middle, HEADING / 2), heading, fill="black", font=ImageFont.load_default(30), anchor="mm")
    picture.save(out, optimize=True)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
