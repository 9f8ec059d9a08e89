"""What a model card says that the folder of a model does not know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .speed import Speed


@dataclass
class TrainingData:
    """The data that a model was trained on.

    Args:
        name: for people, or the id on the Hub (`owner/name`).
        terms: under which the data may be used.
        description: what else is to be said of it: origin, number of images, splits.

    Examples:
        >>> TrainingData("Nuclei of DSB 2018").hub_id
        'nuclei-of-dsb-2018'
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
class Picture:
    """A picture for the card, with what it shows."""

    path: Path
    caption: str = ""


@dataclass
class CardOptions:
    """What a card says that the folder of a model does not know. All is optional, nothing is made up.

    Args:
        repo_id: name on the Hub, for the snippets; None: the folder's name.
        license: of the weights, an identifier of the Hub such as "apache-2.0".
        data: that the model was trained on.
        results: scores, each a JSON file of `maskcls evaluate --json` or a training, or its content; None: the
            `eval_results.json` in the folder, or else the last evaluation in its log.
        recipe: file of the recipe; None: the `recipe.yaml` in the folder.
        pictures: of what the model finds.
        failures: the same of images that it does badly on; see `failure_cases`.
        speed: see `measure_speed`.
        limitations: beside those that follow from the model and its scores.
        tags: further tags of the Hub.
        without_weights: say that they are not published, instead of how to use them.
    """

    repo_id: str | None = None
    license: str | None = None
    data: TrainingData | None = None
    results: Sequence[str | Path | Mapping[str, Any]] | None = None
    recipe: str | Path | None = None
    pictures: Sequence[Picture] = ()
    failures: Sequence[Picture] = ()
    speed: Speed | None = None
    limitations: str | None = None
    tags: Sequence[str] = field(default_factory=list)
    without_weights: bool = False


def card_options(
    *,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    dataset: str | None = None,
    data_terms: str | None = None,
    data_description: str | None = None,
    limitations: str | None = None,
    model_name: str | None = None,
    **options: Any,
) -> CardOptions:
    """Options by the names that `Trainer.create_model_card` and `maskcls push` give them.

    Args:
        license: of the weights, an identifier of the Hub such as "apache-2.0".
        tags: further tags of the Hub, one or several.
        dataset: name of the training data; see [`TrainingData`].
        data_terms: under which the data may be used.
        data_description: what else is to be said of the data.
        limitations: beside those that follow from the model and its scores.
        model_name: heads the card; in a push the name of the repository does.
        options: further fields of [`CardOptions`].
    """
    return CardOptions(
        repo_id=model_name,
        license=license,
        data=None if dataset is None else TrainingData(dataset, data_terms, data_description),
        limitations=limitations,
        tags=[tags] if isinstance(tags, str) else list(tags or ()),
        **options,
    )
