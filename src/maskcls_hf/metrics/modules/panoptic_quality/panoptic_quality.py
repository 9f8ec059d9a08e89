"""Panoptic quality as a module of the `evaluate` library: `evaluate.load("PATH/panoptic_quality")`."""

from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from maskcls_hf.metrics import PanopticQuality, Segments
from maskcls_hf.models.image_reading import colored_ids
from maskcls_hf.models.run_lengths import Runs

_DESCRIPTION = """
Panoptic quality (PQ), its factors segmentation quality (SQ, the mean IoU of matched segments) and recognition quality
(RQ, the F1 of matched segments), for all classes, things and stuff, with the rules of panopticapi for void and crowds.
"""

_INPUTS = """
Args:
    predictions (`list` of `dict`), one an image:
        - `segmentation`: integer array of shape `(height, width)`, the id of each pixel's segment, or an image
          `(height, width, 3)` in the colors of COCO panoptic files (id = R + 256 G + 65536 B). Ids below 1 that
          `segments_info` lacks are no segment.
        - `segments_info`: list of dicts with `id` and `label_id` (or `category_id`, as in COCO's files); other keys are
          allowed. As `post_process_panoptic_segmentation` gives them.
    references (`list` of `dict`), one an image:
        - `segmentation`: likewise; pixels with an id that `segments_info` lacks are void.
        - `segments_info`: likewise, and for crowd regions `iscrowd` 1. A segment without a pixel is missed.
    num_labels (`int`):
        Number of classes; their ids are 0..num_labels-1.
    stuff_ids (`list` of `int`, *optional*):
        Classes of stuff; the others are things.

Returns:
    `dict`: `pq`, `sq`, `rq`, the same with `_things` and `_stuff` (floats), and `per_category_pq`, `per_category_sq`,
    `per_category_rq` (arrays of shape `(num_labels,)`). NaN where neither predictions nor references hold a class.

Examples:

    >>> metric = evaluate.load("PATH/panoptic_quality")
    >>> infos = [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}]
    >>> image = {"segmentation": [[1, 1], [2, 2]], "segments_info": infos}
    >>> metric.add(prediction=image, reference=image)
    >>> metric.compute(num_labels=2, stuff_ids=[1])["pq"]
    1.0
"""

_CITATION = """\
@inproceedings{kirillov2019panoptic,
  title={Panoptic Segmentation},
  author={Kirillov, Alexander and He, Kaiming and Girshick, Ross and Rother, Carsten and Doll{\\'a}r, Piotr},
  booktitle={CVPR},
  year={2019}
}"""

_INFO = ("id", "label_id", "iscrowd")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class PanopticQualityModule(evaluate.Metric):  # type: ignore[misc]  # a class without types
    """`maskcls_hf.metrics.PanopticQuality` as `evaluate` loads it."""

    def _info(self) -> evaluate.MetricInfo:
        image = {
            "segmentation": datasets.Image(),
            "segments_info": [{field: datasets.Value("int64") for field in _INFO}],
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": image, "references": image}),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one image."""
        prediction, reference = _numbered(prediction, "prediction", True), _numbered(reference, "reference")
        super().add(prediction=prediction, reference=reference, **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add several images."""
        predictions = [_numbered(image, f"prediction {number}", True) for number, image in enumerate(predictions)]
        references = [_numbered(image, f"reference {number}") for number, image in enumerate(references)]
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(
        self, *, predictions: Any, references: Any, num_labels: int, stuff_ids: Collection[int] = ()
    ) -> dict[str, Any]:
        metric = PanopticQuality({label: str(label) for label in range(num_labels)}, stuff_ids)
        for number, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            infos = reference["segments_info"]
            truth = Segments(
                torch.tensor([info["label_id"] for info in infos], dtype=torch.int64),
                Runs.of(np.array(reference["segmentation"]).astype(np.int32) - 1),
                torch.tensor([info["iscrowd"] == 1 for info in infos], dtype=torch.bool),
                name=f"image {number}",
            )
            found = {"segmentation": np.array(prediction["segmentation"]), "segments_info": prediction["segments_info"]}
            metric.update(Segments.from_output(found, truth.name), truth)
        of_classes = metric.class_scores(metric.sums)
        return metric.compute() | {f"per_category_{name}": values.numpy() for name, values in of_classes.items()}


def _numbered(image: Any, name: str, check_ids: bool = False) -> dict[str, Any]:
    """Segments numbered from 1 in the order of `segments_info`, so that 16 bits hold them; 0 is no segment.

    `check_ids`, for predictions: ids above 0 that `segments_info` lacks are errors.
    """
    if not isinstance(image, Mapping) or not {"segmentation", "segments_info"} <= set(image):
        raise ValueError(f"{name} is no dict with segmentation and segments_info.")
    ids = np.asarray(image["segmentation"])
    if ids.ndim == 3 and ids.shape[-1] == 3:
        ids = colored_ids(ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iub":
        raise ValueError(
            f"{name}: segmentation has shape {ids.shape} of {ids.dtype}; expected integers (height, width), or an "
            "image of three channels (height, width, 3)."
        )
    infos = [_record(info, f"{name}, segments_info {place}") for place, info in enumerate(image["segments_info"])]
    known = [info["id"] for info in infos]
    if len(set(known)) < len(known):
        raise ValueError(f"{name}: segments_info names an id twice: {sorted(known)[:20]}.")
    if len(known) >= 2**16:
        raise ValueError(f"{name}: {len(known)} segments; at most {2**16 - 1} are stored.")
    present, runs = Runs.of(ids).numbered()
    number = dict(zip(known, range(1, len(known) + 1), strict=True))
    unknown = [i for i in present.tolist() if i not in number and i > 0]
    if check_ids and unknown:
        raise ValueError(f"{name}: the map holds ids {unknown[:5]} that segments_info lacks.")
    numbers = np.array([number.get(i, 0) for i in present.tolist()], dtype=np.uint16)
    segmentation = runs.look_up(numbers).map()
    return {"segmentation": segmentation, "segments_info": [info | {"id": number[info["id"]]} for info in infos]}


def _record(info: Any, where: str) -> dict[str, int]:
    """The numbers of a segment. ValueError: one of them is missing or is none."""
    given = dict(info) if isinstance(info, Mapping) else {}
    given.setdefault("label_id", given.get("category_id"))
    given.setdefault("iscrowd", 0)
    found = {}
    for field in _INFO:
        value: Any = given.get(field)
        is_number = isinstance(value, (Integral, np.bool_)) and -(2**63) <= int(value) < 2**63
        if not is_number or (field == "iscrowd" and value not in (0, 1)):
            needed = "label_id (or category_id)" if field == "label_id" else field
            raise ValueError(f"{where}: {needed} is {value!r}, not a number as needed: {info}.")
        found[field] = int(value)
    return found
