"""The section of a model card that says how to use the model."""

from __future__ import annotations

import json
import shlex

from ..utils.plain_text import markdown, printable
from .card_facts import CardFacts


def use(facts: CardFacts) -> str:
    if facts.without_weights:
        return "The weights are not published; the training below makes them."
    task, auto_class = facts.model.task, facts.model.kind.auto_class
    section = facts.section("evaluation")
    threshold, overlap = section.get("threshold", 0.8), section.get("overlap_threshold", 0.8)
    options, arguments = "", ""
    name, model = literal(facts.name), word(facts.name)
    if task == "panoptic":
        code, words = ([quote(value) for value in (threshold, overlap)] for quote in (literal, word))
        options = ", threshold={}, overlap_mask_area_threshold={}".format(*code)
        arguments = " --threshold {} --overlap-threshold {}".format(*words)
    return f"""Without this package, by the code that comes with the weights:

```python
from transformers import pipeline

segment = pipeline("image-segmentation", model={name}, trust_remote_code=True)
for found in segment("photo.jpg", subtask="{task}"{options}):
    print(found["label"], found["score"], found["mask"].size)
```

With the package `maskcls_hf`:

```python
import maskcls_hf  # the Auto classes now know its models
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto_class}

image_processor = AutoImageProcessor.from_pretrained({name})
model = {auto_class}.from_pretrained({name})
with torch.inference_mode():
    outputs = model(**image_processor(Image.open("photo.jpg"), return_tensors="pt"))
result = image_processor.post_process_{task}_segmentation(outputs{options})[0]
```

or on the command line:

    maskcls segment photos/ --model {model} --task {task}{arguments} --out found

{input_sentence(facts)}"""


def literal(value: object) -> str:
    """As Python code, on one line."""
    return json.dumps(value, default=str)


def word(value: object) -> str:
    """As one argument of a shell."""
    return shlex.quote(printable(value))


def input_sentence(facts: CardFacts) -> str:
    processor = facts.model.processor
    said = []
    if processor.get("do_autocontrast"):
        said.append("stretches the contrast of each image")
    size = processor.get("size") or {}
    if not processor.get("do_resize", True):
        said.append("does not resize")
    elif "shortest_edge" in size:
        limit = f", the longer one to at most {markdown(size['longest_edge'])}" if size.get("longest_edge") else ""
        said.append(f"resizes the shorter edge to {markdown(size['shortest_edge'])} pixels{limit}")
    elif "height" in size:
        said.append(f"resizes to {markdown(size['width'])} x {markdown(size['height'])} pixels")
    return f"The image processor {' and '.join(said)}. Maps have the size of the image." if said else ""
