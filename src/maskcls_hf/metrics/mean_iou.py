"""Mean intersection over union of semantic maps, from one confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(prediction: Tensor, target: Tensor, num_labels: int, void_id: int = 255) -> Tensor:
    """Pixels of each true class (rows) that each class was predicted for (columns): (K, K) int64.

    Args:
        prediction: predicted class ids (H, W).
        target: true class ids (H, W); pixels of `void_id` don't count.

    Raises:
        ValueError: the sizes differ, or an id lies outside the classes.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"Prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in size.")
    counted = target != void_id
    prediction, target = prediction[counted].long(), target[counted].long()
    for name, ids in (("Prediction", prediction), ("Target", target)):
        if ids.numel() and (ids.min() < 0 or ids.max() >= num_labels):
            wrong = [i for i in ids.unique().tolist() if not 0 <= i < num_labels]
            raise ValueError(f"{name} holds class ids {wrong} outside 0..{num_labels - 1}.")
    counts = torch.bincount(target * num_labels + prediction, minlength=num_labels**2)
    return counts.view(num_labels, num_labels)


def semantic_target(
    mask_labels: Tensor, class_labels: Tensor, void_mask: Tensor | None = None, void_id: int = 255
) -> Tensor:
    """Class ids (H, W) of an image from its segments: masks (M, H, W), classes (M,).

    Pixels in no segment and pixels of `void_mask` (H, W) are void.
    """
    target = torch.full(mask_labels.shape[-2:], void_id, dtype=torch.int64, device=mask_labels.device)
    for mask, label in zip(mask_labels, class_labels, strict=True):
        target[mask.bool()] = label
    if void_mask is not None:
        target[void_mask] = void_id
    return target


class MeanIoU:
    """Gathers confusion matrices; memory stays constant.

    Args:
        id2label: names of the K classes, ids 0..K-1.
    """

    def __init__(self, id2label: dict[int, str], void_id: int = 255):
        self.id2label = id2label
        self.void_id = void_id
        self.reset()

    def reset(self) -> None:
        num_labels = len(self.id2label)
        self.confusion = torch.zeros(num_labels, num_labels, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add one image: predicted and true class ids (H, W)."""
        self.add(confusion_matrix(prediction, target, len(self.id2label), self.void_id))

    def add(self, confusion: Tensor) -> None:
        """Add a confusion matrix (K, K) or several (..., K, K)."""
        self.confusion += confusion.to(self.confusion).reshape(-1, *self.confusion.shape).sum(0)

    def compute(self) -> dict[str, float]:
        """`mean_iou`, `pixel_accuracy` and `iou_CLASS` of each class.

        A class that neither the predictions nor the targets hold has IoU NaN and doesn't count in the mean.
        """
        confusion = self.confusion.double()
        hits = confusion.diagonal()
        iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)  # (K,), 0 / 0 = NaN
        scores = {"mean_iou": iou.nanmean().item(), "pixel_accuracy": (hits.sum() / confusion.sum()).item()}
        for label_id, name in sorted(self.id2label.items()):
            scores[f"iou_{name}"] = iou[label_id].item()
        return scores
