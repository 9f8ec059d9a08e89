"""A process that cannot import maskcls_hf: loads folders, uses them, saves them again. See test_remote_code.py.

Arguments: a folder of a mask-classification model, one of a per-pixel model, one to write to. Each model is used
twice, as saved by the package and as saved here. Writes `report.json` and `<model>_<generation>_<task>.npy`.
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

import numpy as np
import torch


class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "maskcls_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def masks_of(pipe, image, task: str) -> np.ndarray:
    """(n, H, W)"""
    options = {} if task == "semantic" else {"threshold": 0.5, "overlap_mask_area_threshold": 0.0}
    segments = pipe(image, subtask=task, **options)
    return np.stack([np.asarray(segment["mask"]) for segment in segments])


def main(maskcls: Path, perpixel: Path, out: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, AutoModelForUniversalSegmentation, pipeline

    image = Image.open(out / "picture.png")
    modules = {}
    for name, folder, tasks in (
        ("maskcls", maskcls, ("semantic", "panoptic", "instance")),
        ("perpixel", perpixel, ("semantic",)),
    ):
        for generation in ("first", "second"):
            pipe = pipeline("image-segmentation", model=str(folder), device="cpu", trust_remote_code=True)
            modules[f"{name}_{generation}"] = type(pipe.model).__module__
            for task in tasks:
                np.save(out / f"{name}_{generation}_{task}.npy", masks_of(pipe, image, task))
            folder = out / f"{name}_again"
            pipe.model.save_pretrained(folder)
            pipe.image_processor.save_pretrained(folder)

    model = AutoModelForUniversalSegmentation.from_pretrained(maskcls, trust_remote_code=True)
    inputs = AutoImageProcessor.from_pretrained(maskcls, trust_remote_code=True)(image, return_tensors="pt")
    with torch.no_grad():
        class_logits = model(**inputs).class_queries_logits
    bare = AutoModel.from_pretrained(maskcls, trust_remote_code=True)
    report = {
        "modules": modules,
        "class_logits": class_logits.tolist(),
        "bare": [type(bare).__name__, list(bare(inputs["pixel_values"]).transformer_decoder_last_hidden_state.shape)],
    }
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    sys.meta_path.insert(0, Hidden())
    main(*(Path(argument) for argument in sys.argv[1:]))
