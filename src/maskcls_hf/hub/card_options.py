"""Options of a card by the names that `Trainer.create_model_card` and `maskcls push` give them."""

from __future__ import annotations

from collections.abc import Sequence

from .model_card import CardOptions, TrainingData


def card_options(
    *,
    license: str | None = None,
    tags: str | Sequence[str] | None = None,
    dataset: str | None = None,
    data_terms: str | None = None,
    data_description: str | None = None,
    limitations: str | None = None,
    model_name: str | None = None,
) -> CardOptions:
    """
    Args:
        license: of the weights, as the Hub names it.
        tags: further tags of the Hub.
        dataset: name of the training data, or its id on the Hub; `data_terms`, `data_description`: what is to be said
            of it.
        limitations: of the model, beside those that follow from it.
        model_name: heads the card; in a push the name of the repository does.
    """
    return CardOptions(
        repo_id=model_name,
        license=license,
        data=None if dataset is None else TrainingData(dataset, data_terms, data_description),
        limitations=limitations,
        tags=[tags] if isinstance(tags, str) else list(tags or ()),
    )
