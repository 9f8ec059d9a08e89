"""A process that cannot import maskcls_hf: loads folders, uses them, saves them again. See test_every_family.py.

Argument: a folder with `picture.png` and `tasks.json`, folder of a model -> its tasks; the first has a transformer
decoder. Each model is used twice, as saved by the package and as saved here. Writes `report.json`,
`<model>_<generation>_<task>.npy` and `<model>_logits.pt`.
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
    return np.stack([np.asarray(segment["mask"]) for segment in pipe(image, subtask=task, **options)])


@torch.no_grad()
def main(out: Path) -> None:
    from PIL import Image
    from transformers import AutoModel, pipeline

    image = Image.open(out / "picture.png")
    tasks_of = json.loads((out / "tasks.json").read_text())
    modules = {}
    for folder, tasks in tasks_of.items():
        name = Path(folder).name
        for generation in ("first", "second"):
            pipe = pipeline("image-segmentation", model=folder, device="cpu", trust_remote_code=True)
            modules[f"{name}_{generation}"] = type(pipe.model).__module__
            for task in tasks:
                np.save(out / f"{name}_{generation}_{task}.npy", masks_of(pipe, image, task))
            inputs = pipe.image_processor(image, return_tensors="pt")
            outputs = pipe.model(**inputs)
            if generation == "first":
                torch.save({field: outputs[field] for field in outputs if "logits" in field}, out / f"{name}_logits.pt")
            folder = str(out / f"{name}_again")
            pipe.model.save_pretrained(folder)
            pipe.image_processor.save_pretrained(folder)

    first = next(iter(tasks_of))
    bare = AutoModel.from_pretrained(first, trust_remote_code=True)
    states = bare(inputs["pixel_values"]).transformer_decoder_last_hidden_state
    report = {"modules": modules, "bare": [type(bare).__name__, list(states.shape)]}
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    sys.meta_path.insert(0, Hidden())
    main(Path(sys.argv[1]))
