"""The text of a model card, section by section; a section without anything to say is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..metrics.table import markdown_table
from ..utils.plain_text import markdown, markdown_code
from .card_facts import CardFacts
from .card_use import use
from .saved_model import SavedModel
from .scores import Scores, percent

MANY_CLASSES = 30  # more are folded away


def card_text(facts: CardFacts) -> str:
    """Markdown, without the metadata."""
    sections = (
        ("", introduction(facts)),
        ("Use", use(facts)),
        ("Training data", training_data(facts)),
        ("Training", training(facts)),
        ("Scores", scores(facts)),
        ("Examples", pictures(facts.pictures)),
        ("Failure cases", pictures(facts.failures)),
        ("Speed", speed(facts)),
        ("Limitations", limitations(facts)),
        ("License", license_of(facts)),
    )
    return "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections if text) + "\n"


def introduction(facts: CardFacts) -> str:
    model, config = facts.model, facts.model.full_config
    kind = "A mask-classification model (MaskFormer: Cheng, Schwing, Kirillov, NeurIPS 2021)"
    if not model.finds_segments:
        kind = "A per-pixel classification model, a baseline of MaskFormer (Cheng, Schwing, Kirillov, NeurIPS 2021)"
    backbone = getattr(config.backbone_config, "model_type", "timm")
    parts = [f"backbone {markdown(backbone)}"]
    if facts.recipe is not None:
        checkpoint = facts.section("model").get("backbone_checkpoint")
        parts[0] += f" that started from {markdown_code(checkpoint)}" if checkpoint else ", trained from scratch"
    if model.finds_segments:
        parts.append(f"{config.num_queries} queries")
    parameters = model.parameters()
    size = "" if parameters is None else f" of {parameters / 1e6:.1f} million parameters"
    does = {
        "semantic": "It gives each pixel of an image one of",
        "panoptic": "It finds the segments of an image, each of one of",
    }[model.task]
    return "\n\n".join(
        [
            f"# {markdown(facts.name.split('/')[-1])}",
            f"{kind}{size}: {'; '.join(parts)}.",
            f"{does} {len(model.classes)} classes.",
            class_list(model),
        ]
    )


def class_list(model: SavedModel) -> str:
    stuff = set(model.stuff)
    groups = {"Classes": list(model.classes.values())}
    if model.task == "panoptic":
        groups = {
            "Things (with instances)": [name for label, name in model.classes.items() if label not in stuff],
            "Stuff (one segment an image)": [name for label, name in model.classes.items() if label in stuff],
        }
    text = "\n\n".join(f"{title}: {', '.join(map(markdown, names))}." for title, names in groups.items() if names)
    if len(model.classes) <= MANY_CLASSES:
        return text
    return f"<details><summary>The {len(model.classes)} classes</summary>\n\n{text}\n\n</details>"


def training_data(facts: CardFacts) -> str:
    if facts.data is None:
        return "Not named here."
    splits = facts.section("data")
    said = [f"{markdown(facts.data.name)}."]
    if splits:
        said.append(f"Trained on its part {markdown_code(splits.get('train_split'))}.")
    if facts.data.description:
        said.append(markdown(facts.data.description, links=True))
    terms = markdown(facts.data.terms, links=True) if facts.data.terms else "not stated here."
    return " ".join(said) + f"\n\nTerms of the data: {terms}"


def training(facts: CardFacts) -> str:
    parts = []
    if facts.recipe is not None:
        named = f", made of the package's recipe {markdown_code(facts.recipe.name)}" if facts.recipe.name else ""
        folder = (facts.data.hub_id.split("/")[-1] if facts.data else "") or "DATA"
        parts += [
            f"By `recipe.yaml` in this repository{named}:",
            f"    maskcls train --recipe recipe.yaml --data {folder} --out OUT",
            settings_table(facts),
        ]
    if facts.state:
        parts.append(progress_sentence(facts))
    if facts.curves:
        parts.append(f"![Losses and scores over the steps of the training]({facts.curves})")
    return "\n\n".join(part for part in parts if part)


def settings_table(facts: CardFacts) -> str:
    optimizer, schedule, settings = (facts.section(name) for name in ("optimizer", "schedule", "training"))
    augmentation = facts.section("augmentation")
    rows = {
        "images a step": settings.get("batch_size"),
        "steps": schedule.get("max_steps"),
        "crops": augmentation.get("crop_size"),
        "AdamW, learning rate": optimizer.get("learning_rate"),
        "learning rate of the backbone, times": optimizer.get("backbone_multiplier"),
        "weight decay": optimizer.get("weight_decay"),
        "schedule": schedule.get("kind"),
        "decay of averaged weights": settings.get("ema_decay"),
        "precision": settings.get("precision"),
        "limit in minutes": settings.get("max_minutes"),
        "seed": settings.get("seed"),
    }
    lines = [[name, markdown(value)] for name, value in rows.items() if value is not None]
    return markdown_table([["setting", "value"], *lines]) if lines else ""


def progress_sentence(facts: CardFacts) -> str:
    state = facts.state
    said = f"{markdown(state.get('global_step'))} of {markdown(state.get('max_steps'))} steps were made"
    runtime = [entry["train_runtime"] for entry in state.get("log_history") or [] if "train_runtime" in entry]
    return f"{said}, in {runtime[-1] / 60:.0f} minutes." if runtime else f"{said}."


def scores(facts: CardFacts) -> str:
    if not facts.scores:
        return "None: the model was not evaluated."
    return "\n\n".join(scores_of(facts, evaluation) for evaluation in facts.scores)


def scores_of(facts: CardFacts, evaluation: Scores) -> str:
    paper = facts.section("paper")
    parts = [evaluation_sentence(facts, evaluation.settings)]
    if evaluation.overall:
        parts.append(evaluation.overall_markdown(paper))
        if paper and paper.get("source"):
            parts.append(f"The paper's scores are those of its {markdown(paper['source'])}.")
        if evaluation.intervals:
            parts.append("Intervals: bootstrap over the images, taken as independent.")
    if evaluation.loss is not None:
        parts.append(f"Loss: {evaluation.loss:.4g}.")
    if table := evaluation.per_class_markdown():
        many = len(evaluation.per_class) > MANY_CLASSES
        parts.append(f"<details><summary>Scores of each class</summary>\n\n{table}\n\n</details>" if many else table)
    return "\n\n".join(parts)


def evaluation_sentence(facts: CardFacts, settings: dict[str, Any]) -> str:
    """Where and how the scores were measured."""
    images = f"{markdown(settings['images'])} images of " if settings.get("images") else ""
    where = markdown(Path(settings["data"]).name if settings.get("data") else facts.data_name)
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
    if facts.model.task == "panoptic" and settings.get("threshold") is not None:
        said.append(
            f"segments from a class probability of {markdown(settings['threshold'])} that keep "
            f"{markdown(settings.get('overlap_threshold'))} of their mask"
        )
    if settings.get("step") is not None:
        said.append(f"after step {markdown(settings['step'])}")
    return ", ".join(said) + "; in per cent."


def pictures(shown: Sequence[tuple[str, str]]) -> str:
    return "\n\n".join(f"![{markdown(caption)}]({path})\n\n{markdown(caption)}" for path, caption in shown)


def speed(facts: CardFacts) -> str:
    if facts.speed is None:
        return ""
    milliseconds, (height, width), machine = facts.speed
    return f"{milliseconds:.0f} ms a forward pass of one image of {width} x {height} pixels, on {markdown(machine)}."


def limitations(facts: CardFacts) -> str:
    model, said = facts.model, []
    if model.finds_segments:
        said.append(
            f"At most {model.full_config.num_queries} segments an image can be found, one a query; images with more, "
            "or much larger than those of the training, want to be cut into tiles (`maskcls segment --tile`)."
        )
    else:
        said.append("It tells classes apart, not instances.")
    said.append(
        f"It knows these classes alone, as {markdown(facts.data_name)} draws them; no other images were scored."
    )
    weakest = facts.scores[-1].weakest_classes() if facts.scores and len(model.classes) > 2 else []
    if weakest:
        listed = ", ".join(f"{markdown(name)} ({percent(value)})" for name, _, value in weakest)
        said.append(f"Lowest {weakest[0][1]} of a class in per cent: {listed}.")
    if facts.limitations:
        said.append(markdown(facts.limitations, links=True))
    return "\n".join(f"- {line}" for line in said)


def license_of(facts: CardFacts) -> str:
    if facts.without_weights:
        return ""
    return f"Of the weights: {markdown(facts.license)}." if facts.license else "Of the weights: not stated."
