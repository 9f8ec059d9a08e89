"""`pipeline("image-segmentation")` for the models of this package: what is not given is as the model has it saved."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import ImageSegmentationPipeline
from transformers.image_utils import load_image
from transformers.utils import ModelOutput

from ..inference.predictor import Predictor
from ..models.inference_defaults import defaults_of
from ..models.post_processing import NO_CLASS

THRESHOLDS = ("threshold", "mask_threshold", "overlap_mask_area_threshold")


class SegmentationPipeline(ImageSegmentationPipeline):
    """transformers' pipeline, whose place it takes; it treats other models as that does.

    Without `subtask`, thresholds and tiles of its own, the `inference_defaults` of the image processor hold: the saved
    task, options of the post-processing, tile, overlap and enlargement. A threshold that is given counts more, of
    whatever value. (Where a model runs by the code that comes with it, without this package, transformers' pipeline
    cuts no tiles, knows no saved task, and gives a threshold of 0.9 where its user gives none, so that a given 0.9
    counts as none there.)
    """

    @property
    def _own(self) -> bool:
        return hasattr(self.image_processor, "inference_defaults")

    @property
    def _resamples(self) -> bool:
        """Whether images go to the model in another way than whole and as the image processor resizes them."""
        defaults = defaults_of(self.image_processor)
        return bool(defaults.get("tile") or defaults.get("enlarge"))

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if self._own and self._resamples:  # results of tiles are joined as they come
            forward = dict(postprocess)
        return preprocess, forward, postprocess

    def preprocess(  # type: ignore[override]
        self, image: Any, subtask: str | None = None, timeout: float | None = None
    ) -> Any:
        """As in transformers; an image that is cut into tiles or enlarged stays an image.

        Args:
            image: PIL image, path, URL or base64.
            subtask: "semantic", "panoptic" or "instance". None: as saved.
            timeout: for a download, in seconds.
        """
        if self._own and self._resamples:
            return {"image": load_image(image, timeout=timeout)}
        return super().preprocess(image, subtask, timeout)

    def _forward(self, model_inputs: Any, **options: Any) -> Any:  # type: ignore[override]
        if "image" not in model_inputs:
            return super()._forward(model_inputs)
        images = model_inputs["image"]
        predictor = self._predictor()
        task = options.pop("subtask", None) or predictor.task
        if task != "panoptic":
            options.pop("overlap_mask_area_threshold", None)
        if task == "semantic":
            options = {}
        found = predictor.predict(images if isinstance(images, list) else [images], {task: options})
        results = [of_image[task] for of_image in found]
        return {"found": results if isinstance(images, list) else results[0]}

    def _predictor(self) -> Predictor:
        return Predictor(self.model, self.image_processor)

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, subtask: str | None = None, **given: Any
    ) -> list[dict[str, Any]]:
        """One record a segment: `score` (None in semantic maps), `label`, `mask` (a PIL image, 0 and 255)."""
        if not self._own:
            records: list[dict[str, Any]] = super().postprocess(model_outputs, subtask, **given)
            return records
        task, processor = subtask or self._predictor().task, self.image_processor
        if "found" in model_outputs:
            found = model_outputs["found"]
            segmentation, segments = found["segmentation"], found["segments_info"]
            return [self._record(segmentation, info["id"], info["label_id"], info.get("score")) for info in segments]
        sizes = model_outputs["target_size"]
        # Which says that outputs come from a pipeline that does not know what its user gave.
        model_outputs = ModelOutput({name: value for name, value in model_outputs.items() if name != "target_size"})
        if task == "semantic":
            (class_map,) = processor.post_process_semantic_segmentation(model_outputs, sizes)  # type: ignore[union-attr]
            labels = [label for label in class_map.unique().tolist() if label != NO_CLASS]
            return [self._record(class_map, label, label, None) for label in labels]
        post_process = getattr(processor, f"post_process_{task}_segmentation", None)
        if post_process is None:
            raise ValueError(f"subtask must be semantic, panoptic or instance, got {task!r}.")
        (found,) = post_process(model_outputs, target_sizes=sizes, **given)
        return [
            self._record(found["segmentation"], info["id"], info["label_id"], info["score"])
            for info in found["segments_info"]
        ]

    def _record(self, segmentation: Tensor, number: int, label: int, score: float | None) -> dict[str, Any]:
        mask = Image.fromarray((segmentation == number).numpy().astype(np.uint8) * 255, mode="L")
        names: Any = self.model.config.id2label
        return {"score": score, "label": names[label], "mask": mask}
