"""Draw docs/method_pairs.png, method_matching.png and method_padding.png, the pictures of docs/method.md.

    python docs/make_method_figures.py DSB2018_FOLDER [CHECKPOINT]

Of the data, validation images of the 2018 Data Science Bowl (CC0), two crops are shown, one with its annotation.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor, Segments
from maskcls_hf.data import SegmentationFolder
from maskcls_hf.models.matching import BipartiteMatcher, Predictions, prepare_targets
from maskcls_hf.visual.drawing import draw_overlay, segment_colors

ROOT = Path(__file__).resolve().parents[1]
SEVERAL, FEW, CROP = 66, 23, 128  # places of two validation images; pixels of their upper left corners
SHOWN = 6  # pairs
plt.rcParams.update({"font.size": 11, "axes.titlesize": 12, "figure.dpi": 130, "savefig.bbox": "tight"})


class Example:
    """A crop with its annotation, and what the network says of it."""

    def __init__(self, data: Path, index: int, checkpoint: Path):
        self.model = MaskClsForUniversalSegmentation.from_pretrained(checkpoint)
        self.processor = MaskClsImageProcessor.from_pretrained(checkpoint)
        sample = SegmentationFolder(data, "val")[index]
        self.pixels = np.asarray(sample["image"]).transpose(1, 2, 0)[:CROP, :CROP].copy()
        self.shown = (self.pixels * (255.0 / self.pixels.max())).astype(np.uint8)  # brighter
        ids = sample["segments"].index_map.numpy()[:CROP, :CROP].astype(np.int64)  # 0: the background, as a class
        kept = [i for i in np.unique(ids).tolist() if i == 0 or (ids == i).sum() >= 20]
        self.truth = [ids == i for i in kept]  # (H, W) each
        self.labels = [int(i > 0) for i in kept]
        self.outputs = self.run(self.pixels)
        self.probabilities = self.outputs.class_queries_logits[0].softmax(-1)  # (N, K + 1)
        self.masks = self.outputs.masks_queries_logits[0].sigmoid()  # (N, h, w)

    @torch.inference_mode()
    def run(self, *images: NDArray[np.uint8], model: Any = None) -> Any:
        return (model or self.model)(**self.processor(list(images), return_tensors="pt"))

    def largest(self) -> list[int]:
        """Queries: background first, then the largest sure nuclei, and one that found nothing."""
        areas = (self.masks > 0.5).sum((1, 2))
        nuclei = (areas * (self.probabilities[:, 1] > 0.8)).argsort(descending=True).tolist()
        background = int(self.probabilities[:, 0].argmax())
        nothing = int((areas * (self.probabilities[:, 2] > 0.9)).argmax())
        return [background, *nuclei[: SHOWN - 2], nothing]


def show(axes: Any, image: Any, title: str = "", **options: Any) -> None:
    axes.imshow(image, interpolation="nearest", **options)
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_pairs(example: Example, out: Path) -> None:
    queries, processor = example.largest(), example.processor
    figure = plt.figure(figsize=(12, 6.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    row = upper.subplots(1, SHOWN)
    row[0].set_ylabel(f"{SHOWN} of {len(example.masks)} pairs")
    for axes, query in zip(row, queries, strict=True):
        background, nucleus, nothing = example.probabilities[query].tolist()
        title = f"background {background:.2f}\nnucleus {nucleus:.2f}\nno object {nothing:.2f}"
        show(axes, example.masks[query], title, cmap="gray", vmin=0, vmax=1)
        axes.title.set_fontsize(10)
    scores = torch.einsum("nk,nyx->kyx", example.probabilities[:, :-1], example.masks)  # (K, h, w)
    settings = processor.inference_defaults["panoptic"]  # as the model has saved them
    found = processor.post_process_panoptic_segmentation(example.outputs, **settings)
    segments = Segments.from_output(found[0])
    colors = segment_colors(segments.records, 2, processor.label_ids_to_fuse or [])
    overlay = draw_overlay(
        example.shown, found[0]["segmentation"].numpy(), segments.records, colors, {0: "background", 1: "nucleus"},
        legend=False,
    )  # fmt: skip
    row = lower.subplots(1, 4)
    row[0].set_ylabel("maps")
    show(row[0], example.shown, "the image")
    show(row[1], scores[1], "score of “nucleus”:\nsum of p(nucleus) m", cmap="magma", vmin=0)
    semantic = processor.post_process_semantic_segmentation(example.outputs)[0]
    show(row[2], semantic, "semantic map: the class\nof the highest score", cmap="gray")
    show(row[3], overlay, "panoptic map: the pair\nof the highest p m")
    figure.savefig(out)
    plt.close(figure)


def draw_matching(example: Example, out: Path) -> None:
    config, outputs = example.model.config, example.outputs
    labels, masks = torch.tensor(example.labels), torch.from_numpy(np.stack(example.truth)).float()
    targets = prepare_targets([masks], [labels], config.num_labels, masks.device)
    predictions = Predictions(outputs.class_queries_logits[:, None], outputs.masks_queries_logits[:, None])
    matcher = BipartiteMatcher(config)
    terms = matcher.cost_terms(predictions, targets)
    cost = torch.stack([matcher.weights[name] * term for name, term in terms.items()]).sum(0)[0, 0, :, : len(labels)]
    matched = matcher(predictions, targets)
    query_of = dict(zip(matched.segment.tolist(), matched.query.tolist(), strict=True))
    others = [query for query in example.largest() if query not in query_of.values()]
    others += [query for query in cost.min(1).values.argsort().tolist() if query not in [*query_of.values(), *others]]
    rows = [query_of[segment] for segment in range(len(labels))] + others[:3]

    names = [chr(ord("A") + segment) for segment in range(len(labels))]
    ids = np.argmax(np.stack(example.truth), axis=0)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 5), width_ratios=(1, 1.25, 1), layout="constrained")
    palette = plt.get_cmap("tab10")
    show(left, palette(ids % 10), "annotated segments")
    matrix = cost[rows].numpy()  # (queries, M)
    middle.imshow(matrix, cmap="viridis_r", aspect="auto")
    for row in range(len(rows)):
        for column in range(len(labels)):
            light = matrix[row, column] > (matrix.min() + matrix.max()) / 2
            text = f"{matrix[row, column]:.1f}"
            middle.text(column, row, text, ha="center", va="center", color="white" if light else "black", fontsize=9)
    for segment in range(len(labels)):
        middle.add_patch(Rectangle((segment - 0.48, segment - 0.48), 0.96, 0.96, fill=False, edgecolor="red", lw=2.5))
    middle.set_xticks(range(len(labels)), names)
    middle.set_yticks(range(len(rows)), [f"query {query}" for query in rows])
    middle.set_xlabel("segment")
    middle.set_title("cost of each pair and segment;\nred: the cheapest one-to-one choice")
    predicted = torch.stack([example.masks[query] for query in rows[: len(labels)]])
    inside = predicted.max(0).values > 0.5
    drawn = palette(predicted.argmax(0).numpy() % 10)
    drawn[~inside.numpy()] = (1, 1, 1, 1)
    show(right, drawn, "masks of the matched queries")
    for segment, name in enumerate(names):
        for axes, mask in ((left, example.truth[segment]), (right, (predicted[segment] > 0.5).numpy())):
            if mask.any():
                axes.text(*label_place(mask), name, color="white", ha="center", va="center", weight="bold", fontsize=13)
    figure.savefig(out)
    plt.close(figure)


def label_place(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """(x, y) of the pixel of a mask that is farthest from its border, near enough."""
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(x), float(y)


def draw_padding(example: Example, checkpoint: Path, out: Path) -> None:
    small = example.pixels[:96, :96]
    large = example.pixels[::-1, ::-1].copy()
    seeing = MaskClsForUniversalSegmentation.from_pretrained(checkpoint, attend_to_padding=True)
    figure, row = plt.subplots(1, 4, figsize=(13, 3.9), layout="constrained")
    factor = 255.0 / example.pixels.max()
    canvas = np.zeros((CROP, CROP, 3), dtype=np.uint8)
    canvas[:96, :96] = (small * factor).astype(np.uint8)
    show(row[0], (large * factor).astype(np.uint8), f"image 1 of a batch:\n{CROP} x {CROP} pixels")
    show(row[1], canvas, "image 2: 96 x 96 pixels,\npadded to the size of image 1")
    for position, size in (((96, 0), (32, CROP)), ((0, 96), (96, 32))):
        row[1].add_patch(Rectangle(position, *size, facecolor="#dddddd", edgecolor="#999999", hatch="///", lw=0))
    row[1].text(64, 112, "padding", ha="center", va="center", backgroundcolor="white")
    images = []
    for model, name in ((example.model, "masked out\n(the default)"), (seeing, "seen\n(attend_to_padding=True)")):
        alone = example.run(small, model=model).masks_queries_logits[0]  # (N, 24, 24)
        batched = example.run(small, large, model=model).masks_queries_logits[0][:, :24, :24]
        change = (batched - alone).abs().amax(0) / alone.std()
        images.append((change, f"padding {name}: up to {change.max():.1g}"))
    for axes, (change, title) in zip(row[2:], images, strict=True):
        show(axes, change, title, cmap="magma", vmin=0, vmax=float(images[1][0].max()))
    figure.colorbar(row[3].images[0], ax=row[2:], shrink=0.8, label="change of mask logits\nby image 1 (deviations)")
    figure.savefig(out)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=ROOT / "model_cards" / "maskcls-nuclei-tiny")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    draw_pairs(Example(arguments.data, SEVERAL, arguments.checkpoint), arguments.out / "method_pairs.png")
    example = Example(arguments.data, FEW, arguments.checkpoint)
    draw_matching(example, arguments.out / "method_matching.png")
    draw_padding(example, arguments.checkpoint, arguments.out / "method_padding.png")


if __name__ == "__main__":
    main()
