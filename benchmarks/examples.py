"""Made-up images, annotations and predictions that look like real ones to what is timed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from maskcls_hf.inference import Predictor

Shape = tuple[int, int]
SHARED = Path(__file__).parents[2] / "shared"
VALID, PADDED, GRID = (512, 910), (512, 928), (128, 232)  # what the network sees of a 16:9 photo, and its masks


def blobs(shape: Shape, number: int, rng: np.random.Generator) -> np.ndarray:
    """Places of segments (H, W), 0..number-1, with wavy outlines."""
    points = rng.random((number, 2)) * shape
    waves = ndimage.gaussian_filter(rng.standard_normal((2, *shape)), (0, 5, 5))
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 8 * waves / waves.std()
    nearest = np.full(shape, np.inf)
    places = np.zeros(shape, dtype=np.int64)
    for place, (row, column) in enumerate(points):
        distance = (rows - row) ** 2 + (columns - column) ** 2
        closer = distance < nearest
        nearest[closer], places[closer] = distance[closer], place
    return places


def photo(shape: Shape, places: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """An image whose segments have colors of their own, and grain."""
    colors = rng.integers(0, 255, (places.max() + 1, 3))
    return Image.fromarray((colors[places] * 0.8 + rng.integers(0, 50, (*shape, 3))).astype(np.uint8))


def predictions(
    grid: Shape, queries: int, labels: int, segments: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class logits (N, K+1) and mask logits (N, *grid) of a trained network's kind: `segments` queries are sure of a
    class and have a mask with an outline two cells wide; the others are sure of no object."""
    places = blobs(grid, segments, rng)
    masks = (places == np.arange(segments)[:, None, None]).astype(np.float32)
    mask_logits = ndimage.gaussian_filter(rng.standard_normal((queries, *grid)).astype(np.float32), (0, 3, 3))
    mask_logits *= 1.5 / mask_logits.std()
    mask_logits -= 6
    mask_logits[:segments] += 12 * ndimage.gaussian_filter(masks, (0, 1, 1))
    class_logits = rng.standard_normal((queries, labels + 1)).astype(np.float32)
    class_logits[np.arange(segments), rng.integers(0, labels, segments)] += 8
    class_logits[segments:, labels] += 8
    return torch.from_numpy(class_logits), torch.from_numpy(mask_logits)


def unsure_predictions(
    grid: Shape, queries: int, labels: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, as of a network that was not trained: every query can win everywhere."""
    class_logits = rng.standard_normal((queries, labels + 1)).astype(np.float32)
    mask_logits = rng.standard_normal((queries, *grid)).astype(np.float32)
    return torch.from_numpy(class_logits), torch.from_numpy(mask_logits)


def noisy_predictions(
    grid: Shape, queries: int, labels: int, segments: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `predictions`, of a network that is less sure where: outlines several cells wide, and noise in every cell."""
    class_logits, _ = predictions(grid, queries, labels, segments, rng)
    masks = (blobs(grid, segments, rng) == np.arange(segments)[:, None, None]).astype(np.float32)
    mask_logits = 1.5 * rng.standard_normal((queries, *grid)).astype(np.float32) - 4
    mask_logits[:segments] += 8 * ndimage.gaussian_filter(masks, (0, 3, 3))
    return class_logits, torch.from_numpy(mask_logits)


def facade_outputs(size: Shape) -> SimpleNamespace | None:
    """Outputs of a network that was trained on facades, for a photograph of this size from its validation images; None
    where they are not beside the repository."""
    model, photos = SHARED / "models/facades_lite0_2h", SHARED / "data/building_facades/val/images"
    if not (model.is_dir() and photos.is_dir()):
        return None
    with Image.open(min(photos.iterdir())) as photograph:
        image = photograph.convert("RGB").resize(size[::-1])
    predictor = Predictor.from_pretrained(model)
    inputs = predictor.image_processor(image, return_tensors="pt")
    with torch.inference_mode():
        return predictor.model(**inputs)


def outputs(pair: tuple[torch.Tensor, torch.Tensor], padded: Shape, valid: Shape) -> SimpleNamespace:
    """A model's outputs for one image."""
    return SimpleNamespace(
        class_queries_logits=pair[0][None],
        masks_queries_logits=pair[1][None],
        padded_sizes=torch.tensor([padded]),
        valid_sizes=torch.tensor([valid]),
    )
