"""Model cards and pushes of a Trainer, with the card and the files of `maskcls push`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer

from .model_card import CardOptions, TrainingData, write_model_card
from .push import push


class PublishingTrainer(Trainer):
    """`Trainer` whose cards and pushes are those of `maskcls push`."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md` into the output folder, where the model is saved (`save_model`). Arguments: see
        [`card_options`].

        Raises:
            FileNotFoundError: no model is saved there.
        """
        if args:
            raise TypeError("create_model_card takes its arguments by name.")
        if self.is_world_process_zero():
            options = card_options(**kwargs)
            self.save_state()
            write_model_card(str(self.args.output_dir), options)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and upload it with its card, and nothing else of the output folder. All processes call it.

        Args:
            blocking: wait for the end of the upload; False returns a `Future`.
            kwargs: see [`card_options`].
            For the others see `Trainer.push_to_hub`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        options = card_options(**kwargs)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        with self._no_push():
            super().save_model()
        if not self.is_world_process_zero():
            return None
        self.save_state()
        self._finish_current_push()
        upload: dict[str, Any] = {
            "private": self.args.hub_private_repo if private is None else private,
            "token": token,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message or "End of training",
        }
        if blocking:
            return push(str(self.args.output_dir), str(self.hub_model_id), options, **upload)
        return HfApi().run_as_future(push, str(self.args.output_dir), str(self.hub_model_id), options, **upload)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; with `TrainingArguments(push_to_hub=True)` [`push_to_hub`] follows."""
        with self._no_push():  # Trainer would push while averaged weights are swapped in
            super().save_model(output_dir, _internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    @contextmanager
    def _no_push(self) -> Iterator[None]:
        wanted, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            yield
        finally:
            self.args.push_to_hub = wanted


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
    """Options of a card by names of `Trainer.create_model_card` and `maskcls push`.

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
