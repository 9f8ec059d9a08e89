"""Mean IoU as a module of the `evaluate` library: `evaluate.load("PATH/mean_iou")`."""

from collections.abc import Mapping
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from maskcls_hf.metrics import MeanIoU as StreamingMeanIoU

_DESCRIPTION = """
Mean intersection over union of semantic maps: of each class, the pixels that are predicted and true divided by those
that are predicted or true, over all images; then the mean over the classes. Classes that neither the predictions nor
the references hold are NaN and don't count in the mean.
"""

_INPUTS = """
Args:
    predictions (`list` of integer arrays of shape `(height, width)`, or of PIL images with one channel):
        Predicted class ids. `ignore_index` is no class: the pixel is a miss.
    references (likewise):
        True class ids; pixels of `ignore_index` don't count. Sizes may differ between images.
    num_labels (`int`):
        Number of classes; their ids are 0..num_labels-1. Other ids are errors.
    ignore_index (`int`):
        Marks unlabeled pixels.
    nan_to_num (`int`, *optional*):
        Replaces NaN in the results.
    label_map (`dict` of `int` to `int`, *optional*):
        Ids of the references and the ids that they become, all at once.
    reduce_labels (`bool`, *optional*, defaults to `False`):
        References count classes from 1, and 0 is unlabeled (ADE20K).

Returns:
    `dict`: `mean_iou`, `mean_accuracy`, `overall_accuracy`, `frequency_weighted_iou` (floats), `per_category_iou` and
    `per_category_accuracy` (arrays of shape `(num_labels,)`).

Examples:

    >>> metric = evaluate.load("PATH/mean_iou")
    >>> metric.add(prediction=[[0, 1], [1, 1]], reference=[[0, 1], [0, 255]])
    >>> scores = metric.compute(num_labels=2, ignore_index=255)
    >>> scores["mean_iou"]
    0.5
"""

_CITATION = """\
@inproceedings{long2015fully,
  title={Fully Convolutional Networks for Semantic Segmentation},
  author={Long, Jonathan and Shelhamer, Evan and Darrell, Trevor},
  booktitle={CVPR},
  year={2015}
}"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class MeanIoU(evaluate.Metric):  # type: ignore[misc]  # a class without types
    """`maskcls_hf.metrics.MeanIoU` as `evaluate` loads it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Image(), "references": datasets.Image()}),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one image."""
        prediction, reference = _class_map(prediction, "prediction"), _class_map(reference, "reference")
        super().add(prediction=prediction, reference=reference, **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add several images."""
        predictions, references = (
            [_class_map(image, f"{name} {number}") for number, image in enumerate(images)]
            for name, images in (("prediction", predictions), ("reference", references))
        )
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(
        self,
        *,
        predictions: Any,
        references: Any,
        num_labels: int,
        ignore_index: int,
        nan_to_num: int | None = None,
        label_map: Mapping[int, int] | None = None,
        reduce_labels: bool = False,
    ) -> dict[str, Any]:
        metric = StreamingMeanIoU({label: str(label) for label in range(num_labels)}, void_id=ignore_index)
        for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            reference = np.asarray(reference).astype(np.int64)
            if label_map:
                old = reference.copy()
                for label, new in label_map.items():
                    reference[old == int(label)] = int(new)
            if reduce_labels:
                void = (reference == 0) | (reference == ignore_index)
                reference = np.where(void, ignore_index, reference - 1)
            try:
                metric.update(np.asarray(prediction), reference)
            except ValueError as error:
                raise ValueError(f"image {number}: {error}") from error
        scores, of_classes = metric.scores(metric.sums), metric.class_scores(metric.sums)
        results = {
            "mean_iou": scores["mean_iou"].item(),
            "mean_accuracy": scores["mean_accuracy"].item(),
            "overall_accuracy": scores["pixel_accuracy"].item(),
            "frequency_weighted_iou": scores["frequency_weighted_iou"].item(),
            "per_category_iou": of_classes["iou"].numpy(),
            "per_category_accuracy": of_classes["accuracy"].numpy(),
        }
        if nan_to_num is not None:
            results = {name: np.nan_to_num(value, nan=nan_to_num) for name, value in results.items()}
        return results


def _class_map(image: Any, name: str) -> NDArray[np.uint16]:
    """Ids in 16 bits, which `datasets` stores without loss as PNG."""
    ids = np.asarray(image)
    if ids.ndim != 2 or ids.dtype.kind not in "iub":
        raise ValueError(f"{name}: a class map has integers of shape (height, width), got {ids.shape} of {ids.dtype}.")
    smallest, largest = int(ids.min(initial=0)), int(ids.max(initial=0))
    if not 0 <= smallest <= largest < 2**16:
        raise ValueError(
            f"{name}: ids go from {smallest} to {largest}, class maps hold 0..65535. Of unlabeled pixels marked "
            f"otherwise: np.where(ids == {smallest if smallest < 0 else largest}, 255, ids) and ignore_index=255."
        )
    return ids.astype(np.uint16)
