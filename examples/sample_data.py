"""Small data sets to try things with, as the guides do: maps of two classes, and cells, each an instance.

    python examples/sample_data.py            # writes my_data and cells

Layouts are those of `maskcls_hf.data.SegmentationFolder`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # image (H, W, 3) and labels (H, W)


def lake(random: np.random.Generator, size: int = 64) -> Pair:
    """Sky (0) over a lake (1); the upper rows are not annotated (255)."""
    rows, columns = np.mgrid[:size, :size]
    labels = (rows > size * random.uniform(0.4, 0.6) + 3 * np.sin(columns / 9)).astype(np.uint8)
    image = np.array([(150, 190, 240), (40, 80, 120)])[labels] + random.normal(0, 12, (size, size, 3))
    labels[:4] = 255
    return image.clip(0, 255).astype(np.uint8), labels


def cells(random: np.random.Generator, size: int = 128) -> Pair:
    """Bright nuclei (1, 2, ...) that do not touch, on black (0)."""
    rows, columns = np.mgrid[:size, :size]
    labels = np.zeros((size, size), dtype=np.uint8)
    for top in range(0, size // 3 * 3, size // 3):
        for left in range(0, size // 3 * 3, size // 3):
            row, column = top + random.uniform(16, 26), left + random.uniform(16, 26)
            radius, stretch = random.uniform(7, 11), random.uniform(0.7, 1.3)
            labels[((rows - row) / stretch) ** 2 + (columns - column) ** 2 < radius**2] = labels.max() + 1
    bright = Image.fromarray(np.where(labels, 130, 12).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.5))
    image = np.asarray(bright)[..., None] + random.normal(0, 4, (size, size, 1)).repeat(3, -1)
    return image.clip(0, 255).astype(np.uint8), labels


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(), help="where they are written to (here)")
    folder = parser.parse_args(argv).folder
    random = np.random.default_rng(0)
    sets = (
        ("my_data", lake, "labels", {"0": "sky", "1": "lake"}),
        ("cells", cells, "instances", {"1": "nucleus"}),
    )
    for name, draw, kind, classes in sets:
        for split in ("train", "val"):
            for part in ("images", kind):
                (folder / name / split / part).mkdir(parents=True, exist_ok=True)
            for image_name in ("a", "b"):
                image, labels = draw(random)
                Image.fromarray(image).save(folder / name / split / "images" / f"{image_name}.png")
                Image.fromarray(labels).save(folder / name / split / kind / f"{image_name}.png")
        (folder / name / "labels.json").write_text(json.dumps(classes))


if __name__ == "__main__":
    main()
