"""All that a model card is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .saved_model import Recipe, SavedModel
from .scores import Scores
from .speed import Speed


@dataclass
class TrainingData:
    """
    Args:
        name: for people, or the id on the Hub (`owner/name`).
        terms: under which the data may be used.
        description: what else is to be said of it: origin, number of images, splits.
    """

    name: str
    terms: str | None = None
    description: str | None = None

    @property
    def hub_id(self) -> str:
        """`name` where it is one, else made of it."""
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.name):
            return self.name
        return re.sub(r"[^\w.]+", "-", self.name.lower()).strip("-") or "unknown"


@dataclass
class CardFacts:
    """What a card says; see [`CardOptions`]. Of each picture the path in the repository, and its caption."""

    model: SavedModel
    name: str
    recipe: Recipe | None = None
    scores: Sequence[Scores] = ()
    state: dict[str, Any] = field(default_factory=dict)
    data: TrainingData | None = None
    license: str | None = None
    curves: str | None = None
    pictures: Sequence[tuple[str, str]] = ()
    failures: Sequence[tuple[str, str]] = ()
    speed: Speed | None = None
    limitations: str | None = None
    without_weights: bool = False

    @property
    def base_model(self) -> str | None:
        """Name on the Hub of the backbone that the training began with."""
        checkpoint = self.section("model").get("backbone_checkpoint")
        return checkpoint if checkpoint and re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint) else None

    @property
    def tasks_of_tags(self) -> list[str]:
        panoptic = ["panoptic-segmentation", "instance-segmentation"] if self.model.task == "panoptic" else []
        return ["semantic-segmentation", *panoptic]

    def section(self, name: str) -> dict[str, Any]:
        return {} if self.recipe is None else self.recipe.get(name)

    @property
    def data_name(self) -> str:
        return "the training data" if self.data is None else self.data.name
