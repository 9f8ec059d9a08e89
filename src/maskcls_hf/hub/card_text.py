"""The text of a model card, section by section; a section without anything to say is left out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..metrics.table import markdown_table
from ..utils.plain_text import markdown, markdown_code, percent, printable
from .card_options import CardOptions
from .saved_model import Recipe, SavedModel
from .scores import Scores

MANY_CLASSES = 30  # more are folded away
# Rows of the table of a training: section and key of the recipe.
SETTINGS = {
    "images a step": ("training", "batch_size"),
    "steps": ("schedule", "max_steps"),
    "epochs": ("schedule", "epochs"),
    "crops": ("augmentation", "crop_size"),
    "AdamW, learning rate": ("optimizer", "learning_rate"),
    "learning rate of the backbone, times": ("optimizer", "backbone_multiplier"),
    "weight decay": ("optimizer", "weight_decay"),
    "schedule": ("schedule", "kind"),
    "decay of averaged weights": ("training", "ema_decay"),
    "precision": ("training", "precision"),
    "limit in minutes": ("training", "max_minutes"),
    "seed": ("training", "seed"),
}


@dataclass
class Card:
    """All that a card is made of. Of each picture the path in the repository, and its caption."""

    model: SavedModel
    options: CardOptions
    recipe: Recipe | None
    scores: Sequence[Scores]
    state: dict[str, Any]  # of the training
    curves: str | None
    pictures: Sequence[tuple[str, str]]
    failures: Sequence[tuple[str, str]]

    @property
    def name(self) -> str:
        """Name on the Hub, or else of the folder."""
        return self.options.repo_id or self.model.folder.absolute().name

    @property
    def data_name(self) -> str:
        """Name of the training data, also where nobody says it."""
        return "the training data" if self.options.data is None else self.options.data.name

    def section(self, name: str) -> dict[str, Any]:
        """Of the recipe."""
        return {} if self.recipe is None else self.recipe.get(name)

    def text(self) -> str:
        """Markdown, without the metadata."""
        stated = self.options.license
        sections = {
            "Use": use(self),
            "Training data": _training_data(self),
            "Training": training(self),
            "Scores": "\n\n".join(scores(self, evaluation) for evaluation in self.scores)
            or "None: the model was not evaluated.",
            "Examples": pictures(self.pictures),
            "Failure cases": pictures(self.failures),
            "Speed": speed(self),
            "Limitations": limitations(self),
            "License": f"Of the weights: {markdown(stated) if stated else 'not stated'}.",
        }
        if self.options.without_weights:
            del sections["License"]
        return "\n\n".join(
            [_introduction(self), *(f"## {title}\n\n{text}" for title, text in sections.items() if text)]
        )


def _introduction(card: Card) -> str:
    model, config = card.model, card.model.full_config
    kind = "A mask-classification model (MaskFormer: Cheng, Schwing, Kirillov, NeurIPS 2021)"
    if not model.finds_segments:
        kind = "A per-pixel classification model, a baseline of MaskFormer (Cheng, Schwing, Kirillov, NeurIPS 2021)"
    backbone = f"backbone {markdown(getattr(config.backbone_config, 'model_type', 'timm'))}"
    if card.recipe is not None:
        checkpoint = card.section("model").get("backbone_checkpoint")
        backbone += f" that started from {markdown_code(checkpoint)}" if checkpoint else ", trained from scratch"
    queries = f"; {config.num_queries} queries" if model.finds_segments else ""
    parameters = model.parameters()
    size = "" if parameters is None else f" of {parameters / 1e6:.1f} million parameters"
    does = {
        "semantic": "It gives each pixel of an image one of",
        "panoptic": "It finds the segments of an image, each of one of",
    }[model.task]
    title, first = f"# {markdown(card.name.split('/')[-1])}", f"{kind}{size}: {backbone}{queries}."
    return f"{title}\n\n{first}\n\n{does} {len(model.classes)} classes.\n\n{_class_list(model)}"


def _class_list(model: SavedModel) -> str:
    stuff = set(model.stuff)
    groups = {"Classes": list(model.classes.values())}
    if model.task == "panoptic":
        groups = {
            "Things (with instances)": [name for label, name in model.classes.items() if label not in stuff],
            "Stuff (one segment an image)": [name for label, name in model.classes.items() if label in stuff],
        }
    text = "\n\n".join(f"{title}: {', '.join(map(markdown, names))}." for title, names in groups.items() if names)
    many = len(model.classes)
    return _folded(f"The {many} classes", text) if many > MANY_CLASSES else text


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def use(card: Card) -> str:
    """How to load and run the model."""
    if card.options.without_weights:
        return "The weights are not published; the training below makes them."
    task, auto_class = card.model.task, card.model.kind.auto_class
    options, arguments = "", ""
    name, model = literal(card.name), word(card.name)
    if task == "panoptic":
        section = card.section("evaluation")
        for key, option in (("threshold", "threshold"), ("overlap_threshold", "overlap_mask_area_threshold")):
            if section.get(key) is not None:
                options += f", {option}={literal(section[key])}"
                arguments += f" --{key.replace('_', '-')} {word(section[key])}"
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

{_input_sentence(card.model.processor)}"""


def literal(value: object) -> str:
    """As Python code, on one line."""
    return json.dumps(value, default=str)


def word(value: object) -> str:
    """As one argument of a shell."""
    return shlex.quote(printable(value))


def _input_sentence(processor: dict[str, Any]) -> str:
    said = ["stretches the contrast of each image"] if processor.get("do_autocontrast") else []
    size = processor.get("size") or {}
    if not processor.get("do_resize", True):
        said.append("does not resize")
    elif "shortest_edge" in size:
        limit = f", the longer one to at most {markdown(size['longest_edge'])}" if size.get("longest_edge") else ""
        said.append(f"resizes the shorter edge to {markdown(size['shortest_edge'])} pixels{limit}")
    elif "height" in size:
        said.append(f"resizes to {markdown(size['width'])} x {markdown(size['height'])} pixels")
    return f"The image processor {' and '.join(said)}. Maps have the size of the image." if said else ""


def _training_data(card: Card) -> str:
    data = card.options.data
    if data is None:
        return "Not named here."
    said = [f"{markdown(data.name)}."]
    if splits := card.section("data"):
        said.append(f"Trained on its part {markdown_code(splits.get('train_split'))}.")
    if data.description:
        said.append(markdown(data.description, links=True))
    terms = markdown(data.terms, links=True) if data.terms else "not stated here."
    return " ".join(said) + f"\n\nTerms of the data: {terms}"


def training(card: Card) -> str:
    """The recipe of the training as a table, and its curves."""
    parts = []
    if card.recipe is not None:
        named = f", made of the package's recipe {markdown_code(card.recipe.name)}" if card.recipe.name else ""
        folder = (card.options.data.hub_id.split("/")[-1] if card.options.data else "") or "DATA"
        values = {row: card.section(section).get(key) for row, (section, key) in SETTINGS.items()}
        rows = [[row, markdown(value)] for row, value in values.items() if value is not None]
        parts += [
            f"By `recipe.yaml` in this repository{named}:",
            f"    maskcls train --recipe recipe.yaml --data {folder} --out OUT",
            markdown_table([["setting", "value"], *rows]) if rows else "",
        ]
    if state := card.state:
        said = f"{markdown(state.get('global_step'))} of {markdown(state.get('max_steps'))} steps were made"
        runtime = [entry["train_runtime"] for entry in state.get("log_history") or [] if "train_runtime" in entry]
        parts.append(f"{said}, in {runtime[-1] / 60:.0f} minutes." if runtime else f"{said}.")
    if card.curves:
        parts.append(f"![Losses and scores over the steps of the training]({card.curves})")
    return "\n\n".join(part for part in parts if part)


def scores(card: Card, evaluation: Scores) -> str:
    """The scores of one evaluation, as tables."""
    paper = card.section("paper")
    parts = [_evaluation_sentence(card, evaluation.settings)]
    if evaluation.overall:
        parts.append(evaluation.overall_markdown(paper))
        if paper and paper.get("source"):
            parts.append(f"The paper's scores are those of its {markdown(paper['source'])}.")
        if evaluation.intervals:
            parts.append("Intervals: bootstrap over the images, taken as independent.")
    if evaluation.loss is not None:
        parts.append(f"Loss: {evaluation.loss:.4g}.")
    if table := evaluation.per_class_markdown():
        parts.append(_folded("Scores of each class", table) if len(evaluation.per_class) > MANY_CLASSES else table)
    return "\n\n".join(parts)


def _evaluation_sentence(card: Card, settings: dict[str, Any]) -> str:
    """Where and how the scores were measured."""
    images = f"{markdown(settings['images'])} images of " if settings.get("images") else ""
    where = markdown(Path(settings["data"]).name if settings.get("data") else card.data_name)
    said = [f"On {images}{where}" + (f", part {markdown_code(settings['split'])}" if settings.get("split") else "")]
    if settings.get("crop"):
        which = "the middle crop of each image" if settings.get("middle") else "crops side by side"
        said.append(f"{which}, {markdown(settings['crop'])} pixels")
    if settings.get("tile"):
        said.append(f"in tiles of {markdown(settings['tile'])} pixels")
    scales = settings.get("scales") or [1]
    if [*scales] != [1]:
        said.append("class scores averaged over the scales " + ", ".join(map(markdown, scales)))
    if settings.get("flip"):
        said.append("and over mirror images")
    if card.model.task == "panoptic" and settings.get("threshold") is not None:
        kept = settings.get("overlap_threshold")
        that_keep = "" if kept is None else f" that keep {markdown(kept)} of their mask"
        said.append(f"segments from a class probability of {markdown(settings['threshold'])}{that_keep}")
    if settings.get("step") is not None:
        said.append(f"after step {markdown(settings['step'])}")
    return ", ".join(said) + "; in per cent."


def pictures(shown: Sequence[tuple[str, str]]) -> str:
    """Pictures with their captions; "" without any."""
    return "\n\n".join(f"![{markdown(caption)}]({path})\n\n{markdown(caption)}" for path, caption in shown)


def speed(card: Card) -> str:
    """The time of an image; "" where it was not measured."""
    if card.options.speed is None:
        return ""
    milliseconds, (height, width), machine = card.options.speed
    return f"{milliseconds:.0f} ms a forward pass of one image of {width} x {height} pixels, on {markdown(machine)}."


def limitations(card: Card) -> str:
    """What follows from the model and its scores, and what the options say."""
    model, said = card.model, ["It tells classes apart, not instances."]
    if model.finds_segments:
        said = [
            f"At most {model.full_config.num_queries} segments an image can be found, one a query; images with more, "
            "or much larger than those of the training, want to be cut into tiles (`maskcls segment --tile`)."
        ]
    said.append(f"It knows these classes alone, as {markdown(card.data_name)} draws them; no other images were scored.")
    weakest = card.scores[-1].weakest_classes() if card.scores and len(model.classes) > 2 else []
    if weakest:
        listed = ", ".join(f"{markdown(name)} ({percent(value)})" for name, _, value in weakest)
        said.append(f"Lowest {weakest[0][1]} of a class in per cent: {listed}.")
    if card.options.limitations:
        said.append(markdown(card.options.limitations, links=True))
    return "\n".join(f"- {line}" for line in said)
